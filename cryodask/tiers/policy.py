"""Retention: how long each category of files stays, what goes next, and the announcements before it goes.

The section ``storage`` of a facility file::

    storage:
      archive: s3://cryo-archive/sessions   # or a folder; without one nothing is archived
      shards: {then: thin, after_days: 3, since: session}
      originals: {then: archive, after_days: 90}
      micrographs: {then: archive, after_days: 365}
      particles: {then: keep}
      maps: {then: keep}

Nothing is removed by a date alone: what is due was announced before, and a person confirms the size (see :func:`execute`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cryodask.documents import read_yaml
from cryodask.errors import ProjectFileError, StoreError
from cryodask.store.away import Ledger
from cryodask.store.lock import ProjectLock
from cryodask.store.project import Project
from cryodask.tiers.archive import Archived, archive
from cryodask.tiers.inventory import CATEGORIES, pieces
from cryodask.tiers.marks import MARKS
from cryodask.tiers.thin import thin

DAY = 86400.0
ANNOUNCED_DAYS = (14, 7, 1)
_ACKNOWLEDGED = "hand-over acknowledged"


class Rule(BaseModel):
    """What happens to one category of files, and when."""

    model_config = ConfigDict(extra="forbid")

    then: Literal["archive", "thin", "keep"] = Field(default="keep", description="archive, delete what can be recomputed, or keep")
    after_days: float = Field(default=0.0, ge=0.0, description="days until then")
    since: Literal["handover", "session"] = Field(default="handover", description="hand-over acknowledged, or last result")


class Storage(BaseModel):
    """The section ``storage`` of a facility file."""

    model_config = ConfigDict(extra="forbid")

    archive: str = Field(default="", description="folder or address of the archive; empty: nothing is archived")
    shards: Rule = Rule(then="thin", after_days=3, since="session")
    originals: Rule = Rule(then="archive", after_days=90)
    micrographs: Rule = Rule(then="archive", after_days=365)
    particles: Rule = Rule()
    maps: Rule = Rule()


def read_storage(path: str | Path | None) -> Storage:
    """The policy of a facility file; the defaults without one.

    Raises
    ------
    ProjectFileError
    """
    if path is None:
        return Storage()
    content = read_yaml(path, "facility file")
    section = content.get("storage") if isinstance(content, dict) else None
    try:
        return Storage.model_validate(section or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProjectFileError(f"{path}: storage.{where}: {first['msg']}.", "", "compare it with docs/storage.md") from None


@dataclass(frozen=True)
class Going:
    """What happens to a category. ``due``: seconds since 1970; None if no date is set, with the reason in ``why``."""

    category: str
    then: str
    files: int
    bytes: int
    due: float | None
    why: str = ""


def acknowledge(folder: str | Path, who: str) -> None:
    """Record that the owner has the data of a session; from now on the retention counts."""
    with ProjectLock(Path(folder)):
        Ledger(folder, MARKS).note(_ACKNOWLEDGED, who=who)


def acknowledged(project: Project) -> dict[str, object] | None:
    """``who`` acknowledged the hand-over, and the ``time``; None if nobody has."""
    line = Ledger(project.path, MARKS).records().get(_ACKNOWLEDGED)
    return None if line is None else {"who": line["who"], "time": line["time"]}


def forecast(project: Project, storage: Storage) -> list[Going]:
    """What goes when, by category; categories that stay, or have nothing here, are left out."""
    handed_over = Ledger(project.path, MARKS).records().get(_ACKNOWLEDGED)
    starts = {"handover": handed_over["time"] if handed_over else None, "session": _last_result(project)}
    out = []
    for category in CATEGORIES:
        rule: Rule = getattr(storage, category)
        sizes = [size for piece in pieces(project, [category]) if (size := piece.size()) is not None]
        if not sizes or rule.then == "keep":
            continue
        start, why = starts[rule.since], ""
        if rule.then == "archive" and not storage.archive:
            start, why = None, "no archive is set"
        elif start is None:
            why = "the hand-over is not acknowledged" if rule.since == "handover" else "there are no results yet"
        due = None if start is None else start + rule.after_days * DAY
        out.append(Going(category, rule.then, len(sizes), sum(sizes), due, why))
    return out


def _last_result(project: Project) -> float | None:
    times = [r["time"] for label in project.stages for r in project.generation(label).records().values()]
    return max(times, default=None)


# --- announced, confirmed, done ---------------------------------------------------------------------------------------------------
def announce(folder: str | Path, storage: Storage, now: float | None = None) -> list[str]:
    """Record the announcements that are due, each once; returns them as sentences. Called daily by a timer or the dashboard."""
    now = time.time() if now is None else now
    with ProjectLock(Path(folder)):
        project = Project(folder)
        marks = Ledger(project.path, MARKS)
        said = []
        for going in forecast(project, storage):
            if going.due is None:
                continue
            left = (going.due - now) / DAY
            reached = [days for days in ANNOUNCED_DAYS if left <= days]
            if not reached:
                continue
            name = f"announced {going.category} {going.due:.0f} {min(reached)}"
            if name in marks.records():
                continue
            when = time.strftime("%Y-%m-%d", time.gmtime(max(going.due, now + DAY)))
            text = f"{project.name}: {going.files} files of {going.category}, {size_text(going.bytes)}: {going.then} on {when}"
            marks.note(name, text=text, due=going.due, announced=now, category=going.category)
            said.append(text)
        return said


def announcements(project: Project) -> list[dict[str, object]]:
    """All announcements, oldest first: ``text``, ``category``, ``due``, ``announced``."""
    lines = [line for name, line in Ledger(project.path, MARKS).records().items() if name.startswith("announced ")]
    names = ("text", "category", "due", "announced")
    return [{name: line[name] for name in names} for line in sorted(lines, key=lambda line: float(line["announced"]))]


def due_now(project: Project, storage: Storage, now: float) -> list[Going]:
    """What may go now: due, and announced at least a day ago."""
    earlier = {(a["category"], a["due"]) for a in announcements(project) if float(str(a["announced"])) <= now - DAY}
    return [g for g in forecast(project, storage) if g.due is not None and g.due <= now and (g.category, g.due) in earlier]


def confirmation(going: Iterable[Going]) -> str:
    """The text that a person must give to confirm: the size of what goes."""
    return size_text(sum(one.bytes for one in going))


def checked(project: Project, storage: Storage, confirm: str, now: float) -> list[Going]:
    """What may go now, if its size was confirmed.

    Raises
    ------
    StoreError
        If the size does not agree, or nothing is due.
    """
    going = due_now(project, storage, now)
    if not going:
        raise StoreError("Nothing is due.", "it was not announced a day ago, or its date has not come", "see  cryodask storage PROJECT")
    if confirm.strip() != confirmation(going):
        raise StoreError(
            f"{confirm!r} is not the size of what would go: {confirmation(going)}.",
            "something was added or removed since the list was shown",
            "look at the list again and confirm its size",
        )
    return going


def execute(
    folder: str | Path, storage: Storage, confirm: str, *, say: Callable[[str], None] = lambda text: None, now: float | None = None
) -> Archived:
    """Archive and thin what is due.

    Parameters
    ----------
    folder : path
    storage : Storage
    confirm : str
        The size of what goes, as :func:`confirmation` gives it: whoever confirms has seen the list.
    say : callable
        Called with a sentence per problem.
    now : float, optional
        Time, seconds since 1970.

    Raises
    ------
    StoreError
        If the size does not agree, or nothing is due.
    """
    now = time.time() if now is None else now
    project = Project(folder)
    going = checked(project, storage, confirm, now)
    done = Archived()
    to_archive = [one.category for one in going if one.then == "archive"]
    if to_archive:
        done = archive(folder, storage.archive, to_archive, say=say, now=now)
    for category in (one.category for one in going if one.then == "thin"):
        for label in _steps_with(project, category):
            freed = thin(folder, label)
            done.removed, done.bytes = done.removed + freed.files, done.bytes + freed.bytes
            done.problems += [f"{label}: {kept}" for kept in freed.kept]
    return done


def _steps_with(project: Project, category: str) -> list[str]:
    places = {piece.place for piece in pieces(project, [category])}
    return [label for label in project.stages if project.step(label).place in places]


def size_text(size: float) -> str:
    """A size for people, ``1.2 GB``."""
    unit, name = next(((u, n) for u, n in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if size >= u), (1e3, "kB"))
    return f"{size / unit:.1f} {name}"
