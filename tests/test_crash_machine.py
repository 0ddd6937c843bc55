"""A state machine over the store: any work, killed before any of its system calls, and what the next one to open it must find."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import dask
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from cryodask.store.generation import Generation
from cryodask.store.layouts import Grid
from cryodask.store.project import Arrival, Item, Project
from cryodask.store.shards import file_crc
from cryodask.store.state import StepState
from cryodask.testing.crash import crash

NAMES = [f"m{number}" for number in range(6)]
names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)


def moments(calls: int) -> st.SearchStrategy[int | None]:
    """Before which system call the work is killed, of about as many as it makes; seldom not at all."""
    return st.one_of(st.integers(1, calls), st.integers(1, calls), st.none())


def value(row: int, revision: int) -> float:
    """What a stage makes of the input of that revision: the same bits in every attempt."""
    return row + 100.0 * revision + 0.5


def image(number: float) -> np.ndarray:
    return np.arange(48, dtype=np.float32).reshape(6, 8) + np.float32(number)


class Store(RuleBasedStateMachine):
    """``acknowledged``: row -> revision whose commit returned. ``begun``: row -> revisions whose commit was killed on its way.

    ``row_of`` says which row has a name now, ``contents`` what the bytes of each row are, ``present`` which rows are shown.
    """

    kills: ClassVar[int] = 0
    works: ClassVar[int] = 0

    @initialize()
    def make(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="crash-machine-"))
        project = Project.create(self.folder / "p", "p")
        meta = {"stage": "motion", "version": 1, "params": {}, "recipes": {"": "recipe"}, "inputs": {}}
        path = project.path / "stages" / "motion" / "key"
        gives = ("micrograph_sum", "total_motion", "pick_y")
        Generation.create(path, meta=meta, gives=gives, per_item=True, grids={"": Grid({"y": 6, "x": 8}, {})})
        project.state.adopt("motion", StepState(stage="motion", key="key"))
        project.save()
        project.update_exposures((Arrival(name, f"first {name}", {"version": 0}) for name in NAMES), complete=True)
        self.row_of = {name: row for row, name in enumerate(NAMES)}
        self.contents = {row: f"first {name}" for row, name in enumerate(NAMES)}
        self.inputs = dict.fromkeys(self.contents, 0)
        self.present = set(self.contents)
        self.acknowledged: dict[int, int] = {}
        self.begun: dict[int, set[int]] = {row: set() for row in self.contents}
        self.failed: dict[int, set[int]] = {row: set() for row in self.contents}
        self.damaged: set[int] = set()
        self.attempt = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, work: Callable[[Project], Iterator[Any]], before: int | None, split: bool) -> list[Any] | None:
        """What the work was told is safe; None with it if it was killed (see ``self.died``)."""
        project = Project(self.folder / "p")
        outcome = crash(lambda: work(project), before=before, split=split)
        type(self).works += 1
        type(self).kills += outcome.killed
        self.died = outcome.killed
        return outcome.done

    def _items(self) -> dict[int, Item]:
        """Every exposure ever registered, by row."""
        return Project(self.folder / "p")._registry.all()

    def _shown(self) -> set[int]:
        return {item.row for item in Project(self.folder / "p").items()}

    def _forgotten(self, row: int) -> bool:
        registry = Project(self.folder / "p")._registry
        registry.present()
        return registry._rows.entries[row].forgotten

    def _named(self, some: list[str]) -> list[Item]:
        items = self._items()
        return [items[self.row_of[name]] for name in some]

    def _arrivals(self, some: list[str]) -> list[Arrival]:
        rows = [self.row_of[name] for name in some]
        return [Arrival(name, self.contents[row], {"version": self.inputs[row]}) for name, row in zip(some, rows)]

    # --- what is done to it -----------------------------------------------------------------------------------------------------
    @rule(some=names, before=moments(24), split=st.booleans())
    def commit(self, some, before, split):
        """A worker commits items, the first time or again."""
        items = self._named(some)
        self.attempt += 1
        attempt = self.attempt

        def work(project):
            generation = project.generation("motion")
            for item in items:
                number = value(item.row, item.revision)
                given = {"micrograph_sum": image(number), "total_motion": number, "pick_y": np.full(item.row + 1, number)}
                made = {"input": item.fingerprint, "revision": item.revision, "attempt": attempt}
                generation.commit(item.row, item.name, given, **made)
                yield item.row

        done = self._run(work, before, split)
        for item in items:
            if item.row in done:
                self.acknowledged[item.row] = item.revision
                self.begun[item.row] = set()
                self.damaged.discard(item.row)
            else:
                self.begun[item.row].add(item.revision)
                if item.row in self.damaged and self._fits(item.row):
                    self.damaged.discard(item.row)  # the same bits again, over those that were damaged

    def _fits(self, row: int) -> bool:
        generation = self._generation()
        path = generation.shard_path("micrograph_sum", row, 2)
        return path.exists() and file_crc(path) == generation.committed()[row]["shards"]["micrograph_sum"]

    @rule(some=names, before=moments(7), split=st.booleans())
    def quarantine(self, some, before, split):
        """The driver records failures."""
        items = self._named(some)
        self.attempt += 1
        attempt = self.attempt

        def work(project):
            for item in items:
                made = {"input": item.fingerprint, "revision": item.revision, "attempt": attempt}
                project.generation("motion").commit_failure(item.row, item.name, "MovieError", "bad", 1, **made)
                yield item.row

        self._run(work, before, split)
        there = self._generation().committed()
        for item in items:
            self.failed[item.row].add(item.revision)
            if self.acknowledged.get(item.row, item.revision) < item.revision and item.row not in there:
                # the failure of a later input outranks the result, whose shards are nobody's from then on
                del self.acknowledged[item.row]
                self.damaged.discard(item.row)

    @rule(some=names, before=moments(4), split=st.booleans())
    def change_inputs(self, some, before, split):
        """A STAR file says other values of exposures."""
        wanted = [Arrival(a.name, a.content, {"version": a.inputs["version"] + 1}) for a in self._arrivals(some)]
        self._register(wanted, before, split)

    @rule(some=names, before=moments(4), split=st.booleans())
    def bring_back(self, some, before, split):
        """Movies that went come back as they were, or are taken in again."""
        self._register(self._arrivals(some), before, split, remember=True)

    def _register(self, wanted, before, split, *, remember=False):
        rows = {a.name: self.row_of[a.name] for a in wanted}
        old, out = self._items(), {row for row in rows.values() if self._forgotten(row)}

        def work(project):
            project.update_exposures(wanted, complete=False)
            if remember:
                project.forget_exposures(rows, undo=True)
            yield [(item.row, item.revision) for item in project.items() if item.row in rows.values()]

        done = self._run(work, before, split)
        shown = self._shown()
        for arrival in wanted:
            row, version = rows[arrival.name], arrival.inputs["version"]
            item = self._items()[row]
            changed = old[row].inputs["version"] != version
            new = (version, old[row].revision + changed)
            allowed = [new] if done else [new, (old[row].inputs["version"], old[row].revision)]
            assert (item.inputs["version"], item.revision) in allowed
            assert item.content == arrival.content
            assert row in shown or not done or (row in out and not remember)
            assert row not in shown or row not in out or remember
            self.inputs[row] = item.inputs["version"]
        assert shown - set(rows.values()) == self.present - set(rows.values())
        self.present = (self.present - set(rows.values())) | (shown & set(rows.values()))

    @rule(some=names, before=moments(4), split=st.booleans())
    def collect_again(self, some, before, split):
        """Movies are written again under their names: they are other exposures, with rows of their own."""
        fresh = [Arrival(name, f"{len(self.contents)} {name}", {"version": 0}) for name in some]
        known = set(self._items())
        done = self._run(lambda project: iter([project.update_exposures(fresh, complete=False).items]), before, split)
        found = {item.content: item for item in self._items().values()}
        for arrival in fresh:
            item = found.get(arrival.content)
            if item is None:
                assert self.died
                assert not done
                continue
            assert item.row not in known
            assert (item.name, item.revision) == (arrival.name, 0)
            self.present = self.present - {self.row_of[item.name]} | {item.row}
            self.row_of[item.name] = item.row
            self.contents[item.row], self.inputs[item.row] = item.content, 0
            self.begun[item.row], self.failed[item.row] = set(), set()
        assert set(self._items()) == set(self.contents)

    @rule(some=names, before=moments(3), split=st.booleans())
    def remove(self, some, before, split):
        """Movies vanish from the folder: results that there are stay, also those that a worker committed after its movie had left."""
        kept = [name for name, row in sorted(self.row_of.items()) if row in self.present and name not in some]
        named = {row for row in self.row_of.values() if not self._forgotten(row)}
        stay = {self.row_of[name] for name in kept} | (named & set(self._generation().committed()))
        listing = self._arrivals(kept)
        done = self._run(lambda project: iter([project.update_exposures(listing, complete=True)]), before, split)
        shown = self._shown()
        assert stay & self.present <= shown <= self.present | stay
        assert not done or shown == stay
        self.present = shown

    @rule(some=names, before=moments(3), split=st.booleans())
    def forget(self, some, before, split):
        """Exposures are taken out on purpose, whatever results they have."""
        rows = {self.row_of[name] for name in some}
        done = self._run(lambda project: iter([project.forget_exposures(some)]), before, split)
        shown = self._shown()
        assert self.present - rows <= shown <= self.present
        assert not done or shown == self.present - rows
        self.present = shown

    @rule(before=moments(5), split=st.booleans())
    def compact(self, before, split):
        """The driver lays the columns together."""
        self._run(lambda project: iter([project.generation("motion").compact()]), before, split)

    @rule(before=st.integers(1, 8), split=st.booleans())
    def save(self, before, split):
        """The driver writes what it does next."""
        old = Project(self.folder / "p").state.runs

        def work(project):
            project.state.runs = old + 1
            project.save()
            yield old + 1

        done = self._run(work, before, split)
        assert Project(self.folder / "p").state.runs in (done or [old, old + 1])

    @precondition(lambda self: self.acknowledged)
    @rule(place=st.integers(0, 99), how=st.sampled_from(["flip", "truncate", "remove"]))
    def damage(self, place, how):
        """The disk loses bytes of a committed shard."""
        row = sorted(self.acknowledged)[place % len(self.acknowledged)]
        if row in self.damaged:
            return
        path = self._generation().shard_path("micrograph_sum", row, 2)
        raw = path.read_bytes()
        if how == "remove":
            path.unlink()
        else:
            path.write_bytes(raw[:-30] if how == "truncate" else raw[:50] + bytes([raw[50] ^ 1]) + raw[51:])
        self.damaged.add(row)

    @rule(at=st.integers(0, 10_000))
    def damage_compaction(self, at):
        """The disk loses a byte of the cache."""
        path = self._generation().path / "columns.npz"
        if path.exists():
            raw = bytearray(path.read_bytes())
            raw[at % len(raw)] ^= 0x5A
            path.write_bytes(raw)

    @precondition(lambda self: self.damaged)
    @rule(before=moments(8), split=st.booleans(), how=st.sampled_from(["repair", "check_files"]))
    def repair(self, before, split, how):
        """Commits that do not fit their shards are taken back, by the user or by the next run."""
        self._run(lambda project: iter([getattr(project.generation("motion"), how)()]), before, split)
        there = self._generation().committed()
        for row in list(self.damaged):
            if row not in there:
                self.damaged.discard(row)
                del self.acknowledged[row]
            else:
                assert self.died

    # --- what must hold ---------------------------------------------------------------------------------------------------------
    def _generation(self) -> Generation:
        return Project(self.folder / "p").generation("motion")

    @invariant()
    def all_that_was_acknowledged_is_there_with_the_right_bits_and_nothing_else_by_half(self):
        if not hasattr(self, "folder"):
            return
        project = Project(self.folder / "p")
        dataset = project["motion"]
        items = {item.row: item for item in project.items()}
        assert set(items) == self.present
        shown = dataset["row"].values.tolist()
        for place, row in enumerate(shown):
            revision = items[row].revision
            assert revision == self.acknowledged.get(row) or revision in self.begun[row]
            number = value(row, revision)
            assert dataset["total_motion"].values[place] == number
            assert (dataset["pick_y"].values[place][: row + 1] == number).all()
            if row not in self.damaged:
                with dask.config.set(scheduler="synchronous"):
                    np.testing.assert_array_equal(dataset["micrograph_sum"][place].values, image(number))
            self.acknowledged[row] = revision  # what was seen once must not vanish
        for row, item in items.items():
            if self.acknowledged.get(row) == item.revision:
                assert row in shown
        for failure in project.failures():
            assert items[failure["row"]].revision in self.failed[failure["row"]]
        repr(project)
        project.joined()

    @invariant()
    def verify_finds_exactly_the_damage_that_was_done(self):
        if not hasattr(self, "folder"):
            return
        found = {int(re.search(r"/micrograph_sum/c/(\d+)/", problem)[1]) for problem in self._problems()}
        assert self.damaged <= found
        # a commit of a changed input that died after its rename: the old result is hidden by then, and made again
        assert all(row in self.damaged or self.begun[row] for row in found)

    def _problems(self) -> list[str]:
        return [p for p in Project(self.folder / "p").verify() if "harmless" not in p]


def explore(examples: int, steps: int) -> type[Store]:
    """Run a fresh machine; returns its class, which has counted."""
    machine = type("Machine", (Store,), {"kills": 0, "works": 0})
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)
    print(f"{machine.works} works, {machine.kills} of them killed")
    return machine


@pytest.mark.heavy
def test_killed_at_any_of_a_few_moments_the_store_loses_nothing_acknowledged():
    assert explore(examples=6, steps=12).kills >= 10


@pytest.mark.slow
def test_killed_at_hundreds_of_moments_the_store_loses_nothing_acknowledged():
    assert explore(examples=60, steps=25).kills >= 260
