"""Files that were removed on purpose: where their bytes are, and how to get them back.

``tiers/ledger/files/journal/`` has one line per step of a file (see journal.py). A file is named ``project:PATH`` (relative to the project
folder) or ``inputs:PATH`` (as in the registry, relative to the folder of the project file). Its ``state`` is one of

- ``copied``, ``verified``: a copy was written, and read back with the right length and checksums; the file itself is still here,
- ``removed``: the file may be gone; ``archive`` and ``key`` say where its verified copy is,
- ``thinned``: the file may be gone; the step that made it can make it again, and ``crc`` says what it must be,
- ``restored``, ``remade``: it is back.

A file that is here is used, whatever the ledger says; the ledger only explains one that is missing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from cryodask.errors import AwayError
from cryodask.store.journal import Journal, JournalContents
from cryodask.store.lines import Record

REMOVED, THINNED = "removed", "thinned"
_ABSENT = (REMOVED, THINNED)


class Ledger:
    """The current line of every file that was ever archived or thinned; read incrementally.

    Parameters
    ----------
    project : path
        Folder of the project.
    name : str
        ``files``, or another collection of named facts that is kept in the same way.
    """

    def __init__(self, project: str | Path, name: str = "files") -> None:
        self.project = Path(project)
        self.journal = Journal(self.project / "tiers" / "ledger" / name / "journal")
        self._seen: JournalContents | None = None
        self._by_name: dict[str, Record] = {}
        self._writes = False

    def records(self) -> Mapping[str, Record]:
        """Current line of each name."""
        if self._writes:  # the only writer, as it holds the lock
            return self._by_name
        contents = self.journal.read()
        if contents is not self._seen:
            self._seen, self._by_name = contents, {record["name"]: record for record in contents.records.values()}
        return self._by_name

    def note(self, name: str, **facts: object) -> None:
        """Append a line, durable on return (driver only). Facts of the former line that are not given again are kept."""
        self.note_all({name: facts})

    def note_all(self, facts: Mapping[str, Mapping[str, object]]) -> None:
        """Append a line for each name, with one sync."""
        records, lines = self.records(), []
        free, now = len(records), round(time.time(), 3)
        for name, given in facts.items():
            former = records.get(name)
            kept = {k: v for k, v in (former or {}).items() if k not in ("epoch", "time")}
            row, revision = (former["row"], former["revision"] + 1) if former is not None else (free, 0)
            free += former is None
            lines.append({**kept, **given, "row": row, "name": name, "ok": True, "revision": revision, "time": now})
        if lines:
            self.journal.append(*lines)
            self._by_name = self._by_name if self._writes else dict(records)
            self._by_name.update({str(line["name"]): line for line in lines})
            self._writes = True

    def absent(self) -> dict[str, Record]:
        """Lines of the files that may be missing on purpose; without those of results that were removed since."""
        there: dict[str, bool] = {}

        def stays(name: str) -> bool:
            kind, _, path = name.partition(":")
            result = "/".join(path.split("/")[:3])
            if kind == "project" and result not in there:
                there[result] = (self.project / result / "zarr.json").exists()
            return kind != "project" or there[result]

        return {name: record for name, record in self.records().items() if record["state"] in _ABSENT and stays(name)}

    def of_result(self, path: Path) -> Record | None:
        """Why a file of a result may be missing; None if it may not."""
        record = self.records().get(self.name_of(path))
        return record if record is not None and record["state"] in _ABSENT else None

    def name_of(self, path: Path) -> str:
        """Name of a file below the project folder."""
        return f"project:{path.absolute().relative_to(self.project.absolute()).as_posix()}"


def away_error(project: Path, records: Iterable[Record], what: str, needed_by: str = "") -> AwayError:
    """The error for files that are needed and away, with the command that brings them back.

    Parameters
    ----------
    project : Path
    records : iterable of Record
        Their lines in the ledger.
    what : str
        The files in words, as the start of a sentence (``3 movies``).
    needed_by : str
        The step that needs them; empty for a reader.
    """
    lines = list(records)
    archives = sorted({str(r["archive"]) for r in lines if r["state"] == REMOVED})
    need = f", and {needed_by} needs them" if needed_by else ""
    if not archives:
        return AwayError(
            f"{what} were thinned on purpose{need}.",
            "",
            "run a step that needs them: it recomputes them and compares them with their checksums",
        )
    rows = sorted({int(r["exposure"]) for r in lines if r["state"] == REMOVED and r.get("exposure") is not None})
    only = f" --rows {row_ranges(rows)}" if rows else ""
    kinds = ",".join(sorted({str(r["category"]) for r in lines if r["state"] == REMOVED}))
    return AwayError(
        f"{what} are away in {', '.join(archives)}{need}.",
        "they were archived and removed on purpose; nothing is lost",
        f"restore them first:  cryodask restore {project} --what {kinds}{only}",
    )


def row_ranges(rows: Iterable[int]) -> str:
    """Rows as text, ``0-4,7``."""
    runs: list[list[int]] = []
    for row in sorted(rows):
        if runs and row == runs[-1][1] + 1:
            runs[-1][1] = row
        else:
            runs.append([row, row])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def explained(path: Path) -> AwayError | None:
    """The error for a missing file of a result that was removed on purpose; None if it was not."""
    project = next((p.parent for p in path.absolute().parents if p.name == "stages" and (p.parent / "project.json").exists()), None)
    if project is None:
        return None
    record = Ledger(project).of_result(path)
    if record is None:
        return None
    return away_error(project, [record], f"The bytes of {path.relative_to(project) if path.is_absolute() else path}")


def away_sentences(project: Path) -> list[str]:
    """What is away, one sentence per category and place; empty if nothing is."""
    counted: dict[tuple[str, str], list[int]] = {}
    for record in Ledger(project).absent().values():
        where = f"in {record['archive']}" if record["state"] == REMOVED else "thinned: recomputed when they are needed"
        counted.setdefault((str(record["category"]), where), []).append(int(record["size"]))
    out = []
    for (category, where), sizes in sorted(counted.items()):
        files = "1 file" if len(sizes) == 1 else f"{len(sizes)} files"
        out.append(f"away on purpose: {category}, {files}, {sum(sizes) / 1e6:.1f} MB, {where}")
    return out
