"""Data that were removed on purpose and are needed now: thinned arrays are recomputed and compared with their checksums; for archived files
the run stops before work, with the command that restores them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from dataclasses import replace as replaced
from typing import Any

from cryodask.errors import StoreError
from cryodask.run.chain import Brief, Chain, Link
from cryodask.run.chains import ChainMaker
from cryodask.run.content import IMAGES
from cryodask.run.inputs import StepInputs, whole_values
from cryodask.run.recipe import Plan
from cryodask.run.refs import INPUTS, PARTICLES
from cryodask.run.whole import Stored
from cryodask.store import environments
from cryodask.store.away import REMOVED, Ledger, away_error
from cryodask.store.environments import MADE_IN
from cryodask.store.generation import Generation
from cryodask.store.lines import Record
from cryodask.store.particles import image_places
from cryodask.store.project import Item, Project
from cryodask.vocabulary import VARIABLES

Rows = dict[str, set[int]]
"""Exposure rows by step."""
Say = Callable[[str], None]


@dataclass
class Needs:
    """What the steps ``by`` need and is not here: ``archived`` lines of the ledger, and rows that a step must make again."""

    archived: list[Record] = field(default_factory=list)
    thinned: Rows = field(default_factory=dict)
    by: list[str] = field(default_factory=list)

    def refuse_archived(self, project: Project) -> None:
        """Stop, if something must be restored first.

        Raises
        ------
        AwayError
        """
        if self.archived:
            names = {line["name"] for line in self.archived}
            files = f"{len(names)} files" if len(names) > 1 else str(self.archived[0]["name"]).partition(":")[2]
            raise away_error(project.path, self.archived, files, f"step {self.by[0]}")


class _Look:
    """Looks for what is away among the inputs of per-exposure steps."""

    def __init__(self, project: Project) -> None:
        self.project, self.ledger, self.needs = project, Ledger(project.path), Needs()
        self.absent = self.ledger.absent()
        self.step = ""

    def _found(self) -> None:
        if self.step not in self.needs.by:
            self.needs.by.append(self.step)

    def file_of_result(self, generation: Generation, record: Record, name: str, label: str) -> None:
        path = generation.shard_of(record, name)
        line = self.absent.get(self.ledger.name_of(path))
        if line is None or path.exists():
            return
        self._found()
        if line["state"] == REMOVED:
            self.needs.archived.append(line)
        else:
            self.needs.thinned.setdefault(label, set()).add(int(record["row"]))

    def link(self, chain: Chain, link: Link, items: Iterable[Item], lacking: Mapping[str, set[int]]) -> None:
        self.step = link.label
        for stored in link.whole.values():
            self.whole(stored)
        for item in items:
            for name, source in link.source.items():
                self._input(chain, link, name, source, item, lacking)

    def whole(self, stored: Stored) -> None:
        generation = Generation(stored.folder)
        record = generation.committed().get(0)
        if record is not None and stored.name in record["shards"]:
            self.file_of_result(generation, record, stored.name, "")

    def _input(self, chain: Chain, link: Link, name: str, source: str, item: Item, lacking: Mapping[str, set[int]]) -> None:
        if source == INPUTS:
            path = item.inputs.get(name) if name in IMAGES else None
            line = self.absent.get(f"inputs:{path}")
            if line is not None and not os.path.exists(self.project.home / str(path)):
                self._found()
                self.needs.archived.append(line)
            return
        if source == PARTICLES or name in link.whole or VARIABLES[name].kind != "bulk":
            return
        for label in source.split("|"):
            record = chain.record_of(label, item.row)
            if item.row in lacking.get(label, ()) or record is None:
                continue
            if name in record["shards"]:
                self.file_of_result(chain.generation_of(label), record, name, label)
            elif name not in record["columns"]:  # read in place, by the step that gave it
                giver = chain.link_of(label)
                for own, its_source in giver.source.items():
                    self._input(chain, giver, own, its_source, item, lacking)


def needs_of_chain(project: Project, chain: Chain, items: Iterable[Item], lacking: Mapping[str, set[int]]) -> Needs:
    """What the links of a chain need for the rows that they lack, and is away."""
    look = _Look(project)
    if look.absent:
        for link in chain.links:
            look.link(chain, link, [item for item in items if item.row in lacking.get(link.label, ())], lacking)
    return look.needs


def needs_of_set(plan: Plan, project: Project, inputs: StepInputs) -> Needs:
    """What a step over a set needs, and is away: the images of its particles, and stored maps and masks."""
    look, step = _Look(project), inputs.step
    if not look.absent or step.stage.shape == "set":
        return look.needs
    look.step = step.label
    for value in whole_values(plan, project, inputs).values():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Stored):
                look.whole(one)
    ref, ids = inputs.ref, inputs.ids
    if step.stage.shape == "whole" or ref is None or ids is None or not len(ids) or "image" not in ref.parts:
        return look.needs
    labels = {project.step(label).place: label for label in project.stages}
    images = image_places(project, ref, ids)
    for number, generation in enumerate(images.images):
        rows = set(images.row[images.giver == number].tolist())
        label = labels.get(f"{generation.path.parent.name}/{generation.key}", "")
        for row, record in generation.committed().items():
            if row in rows:
                look.file_of_result(generation, record, "particle_image", label)
    return look.needs


@dataclass
class Remake(Chain):
    """A chain that makes results again that exist already: the new record replaces the old one only when it is complete.

    ``again``: rows that each step makes again.
    """

    again: Rows = field(default_factory=dict)

    @classmethod
    def of(cls, chain: Chain, again: Rows) -> Remake:
        """A copy of a chain."""
        return cls(**{f.name: getattr(chain, f.name) for f in fields(chain)}, again=again)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "again": {}}

    def brief(self, item: Item, again: bool) -> Brief:
        """Like that of a chain, but without the records of what is made again."""
        brief = super().brief(item, again)
        kept = {label: record for label, record in brief.records.items() if item.row not in self.again.get(label, ())}
        return replaced(brief, records=kept)

    def quarantine(self, item: Item, error: str, message: str, tries: int) -> None:
        """Stop the run: the committed result stays.

        Raises
        ------
        StoreError
        """
        raise StoreError(
            f"{item.name} cannot be recomputed, though it was computed before ({error}: {message}).",
            "its input has changed since its arrays were thinned",
            "fix the input and rerun; its committed numbers are kept",
        )


def bring_back(
    needs: Needs, plan: Plan, project: Project, maker: ChainMaker, items: list[Item], send: Callable[[Chain, list[Item]], None], say: Say
) -> None:
    """Recompute thinned arrays, and report how they compare with the stored checksums.

    ``send``: processes some items of a chain.

    Raises
    ------
    AwayError
        If something that is needed for it is archived.
    StoreError
        If a step that made them is no longer in the project file as it was.
    """
    needs.refuse_archived(project)
    if not needs.thinned:
        return
    by = ", ".join(needs.by)
    remake = _remade_chain(plan, project, maker, items, needs.thinned, by)
    before = {label: {row: project.records(label)[row] for row in rows} for label, rows in remake.again.items()}
    rows = {row for some in before.values() for row in some}
    say(f"{', '.join(before)}: thinned arrays of {len(rows)} exposures are recomputed, because {by} needs them")
    send(remake, [item for item in items if item.row in rows])
    _settle_remade(project, before, say)


def _remade_chain(plan: Plan, project: Project, maker: ChainMaker, items: list[Item], wanted: Rows, needed_by: str) -> Remake:
    """The chain that makes thinned arrays again, with the steps whose own arrays it needs for that."""
    rows: Rows = {label: set(some) for label, some in wanted.items()}
    while True:
        steps = [step for step in plan.steps if step.label in rows]
        gone = [label for label in rows if label not in {step.label for step in steps}]
        changed = [step.label for step in steps if maker.target(step).key != project.step(step.label).key]
        if gone or changed:
            which = (gone or changed)[0] or "that made them"
            raise StoreError(
                f"Step {needed_by} needs arrays that were thinned, and step {which} is not in the project file as it was.",
                "the step was removed, or its parameters were changed",
                "put it back into the project file and rerun: the arrays are recomputed",
            )
        chain = maker.chain(steps)
        found = needs_of_chain(project, chain, items, rows)
        found.refuse_archived(project)
        more = {label: some - rows.get(label, set()) for label, some in found.thinned.items()}
        if not any(more.values()):
            return Remake.of(chain, {step.label: rows[step.label] for step in steps})
        for label, some in more.items():
            rows.setdefault(label, set()).update(some)


def _settle_remade(project: Project, before: Mapping[str, Mapping[int, Record]], say: Say) -> None:
    """Compare what was made again with the stored checksums, report it, and note that it is back."""
    ledger = Ledger(project.path)
    for label, old in before.items():
        generation = project.generation(label)
        now = generation.committed()
        lines: dict[str, dict[str, object]] = {}
        other: list[int] = []
        for row, record in old.items():
            new = now[row]
            if new["shards"] != record["shards"]:
                other.append(row)
            for name, crc in new["shards"].items():
                key = ledger.name_of(generation.shard_of(new, name))
                if key in ledger.records():
                    lines[key] = {"state": "remade", "crc": crc, "size": new["files"][name][0]}
        ledger.note_all(lines)
        say(_remade_text(project, label, old, now, other))


def _remade_text(project: Project, label: str, old: Mapping[int, Record], now: Mapping[int, Record], other: list[int]) -> str:
    exposures = "1 exposure" if len(old) == 1 else f"{len(old)} exposures"
    if not other:
        return f"{label}: {exposures} recomputed, bit-identical to the stored checksums"
    row = other[0]
    was, became = (environments.read(project.path, str(r.get(MADE_IN, [""])[0])) for r in (old[row], now[row]))
    difference = environments.difference(was, became)
    why = f"the environment has changed ({difference})" if difference else "in the same software environment, so the hardware differs"
    return f"{label}: {exposures} recomputed, {len(other)} of them differ from the stored checksums: {why}; the new ones are kept"
