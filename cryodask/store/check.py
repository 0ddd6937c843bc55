"""Verification of committed data, bit by bit, and invalidation of damaged commits. Nothing is ever deleted.

A commit whose shards are missing or do not match its record is invalid. A further journal line undoes its lines, and the next run
recomputes the item. If another intact record of the row matches the shards (a second attempt renamed its files over those of the
first), that record counts again. A shard that was removed on purpose (see away.py) is not missing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cryodask.store.away import Ledger
from cryodask.store.files import disk_errors
from cryodask.store.journal import Journal, JournalContents
from cryodask.store.lines import Record
from cryodask.store.shards import file_crc
from cryodask.store.table import damaged_compaction

if TYPE_CHECKING:
    from cryodask.store.generation import Generation


def damaged(generation: Generation) -> list[str]:
    """One sentence for each item in a generation that does not match its checksum or was left by a dead process."""
    contents = Journal(generation.journal.folder).read()
    torn = [f"journal line {line} is incomplete, harmless: it is ignored" for line in contents.torn_lines]
    lost = [f"{generation.path}: journal line {line} is damaged, its commit is lost" for line in contents.damaged_lines]
    away = Ledger(generation.project)
    shards = [problem for record in contents.records.values() for problem in _problems(generation, contents, record, away)]
    return [*torn, *lost, *damaged_compaction(generation.path), *shards]


def repair(generation: Generation) -> list[str]:
    """Invalidate every commit that does not match its shards, set damaged journal lines aside; returns the names of the items."""
    contents = Journal(generation.journal.folder).read()
    taken = _take_back(generation, contents, list(contents.records.values()))
    with disk_errors(generation.path):
        generation.journal.drop_damaged_lines()
    return [record["name"] for record, _ in taken]


def check_files(generation: Generation) -> list[str]:
    """Compare size and time of every committed shard with its record; read those that differ, and invalidate mismatches."""
    contents, away = generation.journal.read(), Ledger(generation.project)
    touched = [record for record in contents.records.values() if not _untouched(generation, record, away)]
    return [problem for _, problem in _take_back(generation, contents, touched)]


def _shard_paths(generation: Generation, record: Record) -> Iterator[tuple[str, Path]]:
    for name in record.get("shards", {}):
        yield name, generation.shard_of(record, name)


def _is_away(away: Ledger, path: Path, crc: int) -> bool:
    """Whether a missing shard was removed on purpose, with these bytes."""
    line = away.of_result(path)
    return line is not None and line["crc"] == crc


def _untouched(generation: Generation, record: Record, away: Ledger) -> bool:
    for name, path in _shard_paths(generation, record):
        try:
            there = os.stat(path)
        except FileNotFoundError:
            if _is_away(away, path, record["shards"][name]):
                continue
            return False
        if [there.st_size, there.st_mtime_ns] != record.get("files", {}).get(name, [there.st_size, there.st_mtime_ns]):
            return False
    return True


def _problems(generation: Generation, contents: JournalContents, record: Record, away: Ledger) -> Iterator[str]:
    for name, path in _shard_paths(generation, record):
        try:
            crc = file_crc(path)
        except FileNotFoundError:
            if _is_away(away, path, record["shards"][name]):
                continue
            yield f"{path}: missing, though {record['name']} is committed"
            continue
        if crc == record["shards"][name]:
            continue
        other = [r for _, r in contents.lines[record["row"]] if r.get("shards", {}).get(name) == crc]
        if other:
            yield f"{path}: damaged, it holds another attempt at {record['name']}, not the one of the current record"
        elif path.stat().st_size != record.get("files", {}).get(name, [path.stat().st_size])[0]:
            yield f"{path}: damaged, its length does not match the record of {record['name']}"
        else:
            yield f"{path}: damaged, its bytes do not match the record of {record['name']}"


def _fits(generation: Generation, record: Record, away: Ledger) -> bool:
    for name, path in _shard_paths(generation, record):
        try:
            if file_crc(path) != record["shards"][name]:
                return False
        except FileNotFoundError:
            if not _is_away(away, path, record["shards"][name]):
                return False
    return True


def _take_back(generation: Generation, contents: JournalContents, records: list[Record]) -> list[tuple[Record, str]]:
    """Undo those of ``records`` (the current one of each row) that do not match; returns them with the reason."""
    taken, away = [], Ledger(generation.project)
    with disk_errors(generation.path):
        for record in records:
            problem = next(_problems(generation, contents, record, away), None)
            if problem is None:
                _set_times(generation, record)
                continue
            row = record["row"]
            lines = contents.lines[row]
            good = [crc for crc, r in lines if r["ok"] and _fits(generation, r, away)]
            # without a good record an old failure must not count either, or the item would never be recomputed
            generation.journal.undo(row, record["name"], [crc for crc, r in lines if crc not in good and (r["ok"] or not good)], problem)
            taken.append((record, problem))
        generation.journal.close()
    return taken


def _set_times(generation: Generation, record: Record) -> None:
    """Reset the time of intact shards to that of their record (copying changes it), so that they need not be read each time."""
    for name, path in _shard_paths(generation, record):
        mtime = record.get("files", {}).get(name, [0, None])[1]
        with contextlib.suppress(OSError):
            there = os.stat(path)
            if mtime is not None and there.st_mtime_ns != mtime:
                os.utime(path, ns=(there.st_atime_ns, mtime))
