"""The fused task of the map runner: one item through consecutive map stages, each committed as soon as it is done."""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.errors import InputError, MicrographError
from cryodask.run.devices import make_ready
from cryodask.stage import Params, Stage, find_stage
from cryodask.store.generation import Generation
from cryodask.store.journal import Record
from cryodask.store.project import Item


@dataclass(frozen=True)
class Link:
    """One stage of the chain: where its needs come from and where its results go."""

    label: str
    stage_name: str
    params: Params
    source: dict[str, str]
    folder: Path

    @property
    def stage(self) -> Stage:
        """The registered stage."""
        return find_stage(self.stage_name)


@dataclass
class Chain:
    """A job of the map runner. ``constants`` are what all items share (optics); the gain is mapped from its file."""

    links: tuple[Link, ...]
    constants: dict[str, Any]
    gain_path: Path | None = None
    earlier: dict[str, Path] = field(default_factory=dict)
    _read: dict[str, Generation] = field(default_factory=dict)
    _fresh: dict[str, dict[int, Record]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read": {}, "_fresh": {}}

    # --- in the driver ----------------------------------------------------------------------------------------------------------
    def unfinished(self, items: list[Item], *, retry_quarantined: bool = False) -> list[Item]:
        """Items that are not committed in every stage, and not quarantined in one (unless asked to try those again)."""
        committed = [self._journals(link).records() for link in self.links]
        out = []
        for item in items:
            records = [c.get(item.row) for c in committed]
            fresh = [r for r in records if r is not None and r.get("input") == item.fingerprint]
            if any(not r["ok"] for r in fresh) and not retry_quarantined:
                continue
            if sum(r["ok"] for r in fresh) < len(self.links):
                out.append(item)
        return out

    def quarantined(self, items: list[Item]) -> int:
        """How many of the items are quarantined in one of the stages."""
        failed = [{row: r for row, r in self._journals(link).records().items() if not r["ok"]} for link in self.links]
        return sum(any(item.row in f and f[item.row].get("input") == item.fingerprint for f in failed) for item in items)

    def quarantine(self, item: Item, error: str, message: str, tries: int) -> None:
        """Record the failure with the first stage that lacks the item.

        Raises
        ------
        InputError
            When it is not the item that is missing but all of its folder: that blames no movie, it stops the run.
        """
        _stop_if_the_folder_is_gone(item)
        for link in self.links:
            generation = self._journals(link)
            record = generation.records().get(item.row)
            if record is None or not record["ok"] or record.get("input") != item.fingerprint:
                generation.commit_failure(item.row, item.name, error, message, tries, input=item.fingerprint, revision=item.revision)
                generation.journal.close()
                return

    def brief(self, item: Item, again: bool) -> dict[str, Record]:
        """Records of an item in the stages that have it: a worker reads no journals."""
        if again:
            self._fresh = {}
        for label, folder in (*((link.label, link.folder) for link in self.links), *self.earlier.items()):
            if label not in self._fresh:
                self._fresh[label] = self._read.setdefault(label, Generation(folder)).committed()
        found = {label: records[item.row] for label, records in self._fresh.items() if item.row in records}
        return {label: record for label, record in found.items() if record.get("input") == item.fingerprint}

    def _journals(self, link: Link) -> Generation:
        # kept: its journals are read on from where they were read to
        return self._read.setdefault(link.label, Generation(link.folder))

    # --- in a worker --------------------------------------------------------------------------------------------------------------
    def run(self, item: Item, brief: dict[str, Record], device: str, attempt: int) -> None:
        """Process and commit one item: the stages that have it already are read, not repeated."""
        make_ready(device)
        values: dict[str, Any] = {**self.constants, **item.inputs}
        records = dict(brief)
        for link in self.links:
            generation = self._generation(link.label)
            if link.label in records:
                continue
            needs = {n: self._value(n, link.source[n], item, values, records) for n in link.stage.needs}
            needs |= {n: self._value(n, link.source[n], item, values, records) if n in link.source else None for n in link.stage.optional}
            started, started_cpu = time.time(), time.process_time()
            given = link.stage.process(link.params, device=device, **needs)
            _refuse_nonsense(link, item, given)
            seconds = {"seconds": round(time.time() - started, 4), "cpu_seconds": round(time.process_time() - started_cpu, 4)}
            made = {"input": item.fingerprint, "revision": item.revision, "attempt": attempt}
            record = generation.commit(item.row, item.name, given, **made, **seconds)
            records[link.label] = record
            values.update({f"{link.label}/{name}": value for name, value in given.items()})
            if "movie" in record["shards"]:
                values[f"{link.label}/movie"] = generation.read(record, "movie")  # its codec decodes faster than LZW

    def _generation(self, label: str) -> Generation:
        folder = next((link.folder for link in self.links if link.label == label), None) or self.earlier[label]
        return _generation_at(str(folder))

    def _value(self, name: str, label: str, item: Item, values: dict[str, Any], records: dict[str, Record]) -> Any:
        if label == "inputs":
            if name == "gain":
                return _array_at(str(self.gain_path)) if self.gain_path else None
            if name not in values:
                raise MicrographError(f"{item.name} has no {name}.", "its row of the STAR file is incomplete", "complete or remove the row")
            return values[name]
        if f"{label}/{name}" in values:
            return values[f"{label}/{name}"]
        record = records.get(label)
        if record is None:
            raise MicrographError(
                f"{item.name} has no {name}: stage {label} did not finish with it.", "it was quarantined there", "see the report"
            )
        if name in record["columns"] or name in record["shards"]:
            return self._generation(label).read(record, name)
        # a movie that is used where it lies was not stored: its stage opens it again
        link = next(link for link in self.links if link.label == label)
        needs = {n: self._value(n, link.source[n], item, values, records) for n in link.stage.needs}
        needs |= {n: self._value(n, link.source[n], item, values, records) for n in link.stage.optional if n in link.source}
        return link.stage.process(link.params, **needs)[name]


_OPEN: dict[str, Generation] = {}


def _generation_at(folder: str) -> Generation:
    # one journal file a process and generation
    return _OPEN.setdefault(folder, Generation(folder))


@functools.lru_cache(maxsize=2)
def _array_at(path: str) -> np.ndarray:
    return np.load(path)


def _refuse_nonsense(link: Link, item: Item, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim >= 2 and not np.isfinite(value).all():
            raise MicrographError(
                f"{name} of {item.name} has {int((~np.isfinite(value)).sum())} pixels that are no numbers after stage {link.label}.",
                "the input holds NaN pixels",
                "look at the input; the other micrographs go on",
            )


def _stop_if_the_folder_is_gone(item: Item) -> None:
    """Raise where the folder of an item's input is missing or empty: an unmounted disk must not send a session into quarantine."""
    for name, value in item.inputs.items():
        if not name.endswith("_path") or os.path.exists(str(value)):
            continue
        folder = Path(str(value)).parent
        try:
            gone = not any(os.scandir(folder))
        except OSError:
            gone = True
        if gone:
            raise InputError(
                f"The folder {folder} with the inputs is missing, empty or cannot be read; {item.name} was to be read from it.",
                "the disk is not mounted any more, or the folder was moved or renamed",
                "bring the folder back and run the same command again: it goes on where it stopped, nothing was quarantined for this",
            )
