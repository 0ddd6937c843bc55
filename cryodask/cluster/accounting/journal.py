"""A file of usage figures: one JSON line per time bucket and key, robust against a killed process and a torn line."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

HOUR, DAY = 3600, 86400
_HOURLY_DAYS = 62

Bucket = tuple[int, tuple[str, ...]]
Sums = dict[Bucket, dict[str, float]]


def bucket_start(when: float, now: float) -> int:
    """Start of the hour, or of the day (UTC) for entries older than two months."""
    length = bucket_seconds(when, now)
    return int(when // length) * length


def bucket_seconds(when: float, now: float) -> int:
    """Length of the bucket that a time falls into: an hour, or a day for entries older than two months."""
    return HOUR if now - when < _HOURLY_DAYS * DAY else DAY


class UsageJournal:
    """``usage.jsonl`` of a folder: each line adds figures to a bucket, so that the sum of all lines is the total usage.

    :meth:`compact` merges lines of the same bucket: the file grows by one line per hour and key, and by one line per day and key for
    entries older than two months. A truncated line is ignored. Several processes may append to one file.

    Parameters
    ----------
    folder : path
        Created if missing, readable by this account only.
    names : sequence of str
        Names of the parts of a key, in order; everything else in a line is a figure.
    """

    def __init__(self, folder: str | Path, names: Iterable[str]) -> None:
        self.folder, self._names = Path(folder), tuple(names)
        self.path = self.folder / "usage.jsonl"

    def read(self) -> Sums:
        """Sums of all complete lines."""
        sums: Sums = {}
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            for line in file:
                try:
                    content = json.loads(line)
                    key = int(content.pop("from")), tuple(str(content.pop(name)) for name in self._names)
                    add(sums, key, {name: float(value) for name, value in content.items()})
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue  # truncated by a crash or a full disk
        return sums

    def append(self, sums: Mapping[Bucket, Mapping[str, float]]) -> None:
        """Append lines. On an OSError (a full disk) nothing is appended."""
        if not sums:
            return
        text = "".join(self._line(key, figures) for key, figures in sums.items()).encode()
        with self._alone(), open(self.path, "ab+", buffering=0, opener=_private) as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                text = text if file.read(1) == b"\n" else b"\n" + text  # after a truncated line
            try:
                written = 0
                while written < len(text):
                    written += file.write(text[written:])
            except OSError:
                file.truncate(size)
                raise

    def sync(self) -> None:
        """Wait until the data are on disk."""
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            os.fsync(file.fileno())

    def compact(self, now: float) -> Sums:
        """Rewrite the file with one line per bucket; returns all sums."""
        with self._alone():
            sums: Sums = {}
            for (start, key), figures in self.read().items():
                add(sums, (bucket_start(start, now), key), figures)
            part = self.path.with_suffix(".part")
            with open(part, "wb", opener=_private) as file:
                file.writelines(self._line(key, figures).encode() for key, figures in sorted(sums.items()))
                file.flush()
                os.fsync(file.fileno())
            part.rename(self.path)
        return sums

    def _line(self, key: Bucket, figures: Mapping[str, float]) -> str:
        values = {name: round(value, 6) for name, value in figures.items() if value}
        return json.dumps({"from": key[0], **dict(zip(self._names, key[1])), **values}) + "\n"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Context manager with a file lock, because two schedulers may share a folder during a hand-over."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(self.folder / "usage.lock", "a", encoding="utf-8", opener=_private) as lock:
            with contextlib.suppress(OSError):  # some network file systems do not support locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def add(sums: Sums, key: Bucket, figures: Mapping[str, Any]) -> None:
    """Add figures to those of a bucket."""
    into = sums.setdefault(key, {})
    for name, value in figures.items():
        into[name] = into.get(name, 0.0) + value


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
