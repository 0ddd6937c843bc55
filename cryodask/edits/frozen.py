"""Frozen states: what the edits amounted to when somebody said "use these". Runs read nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryodask.edits.choices import current
from cryodask.edits.log import FROZEN_ROW, OperationLog
from cryodask.edits.masks import recipe
from cryodask.edits.operations import KINDS, new_id
from cryodask.edits.picks import edits_of
from cryodask.edits.regions import region_set
from cryodask.errors import InputError, StoreError
from cryodask.store.files import disk_errors, write_atomically


@dataclass(frozen=True)
class Frozen:
    """A frozen state. ``of``: the result that it belongs to: the classification of classes, the map of a mask, the analysis of regions.
    ``time``: seconds since 1970, for display only.
    """

    kind: str
    digest: str
    who: str
    time: float
    content: dict[str, Any]
    of: str = ""

    @property
    def picks(self) -> dict[int, list[dict[str, Any]]]:
        """Edits of stage ``edit_picks`` by row."""
        return {
            int(row): [{**one, **({"place": tuple(one["place"])} if "place" in one else {})} for one in edits]
            for row, edits in self.content.items()
        }

    @property
    def numbers(self) -> dict[int, str]:
        """Chosen classes, or excluded exposures, with their reasons."""
        return {int(row): str(reason) for row, reason in self.content.items()}


def state_of(log: OperationLog, of: str = "") -> dict[str, Any]:
    """What the operations of a log amount to now, as it would be frozen."""
    log.look()
    if log.kind == "picks":
        edits = {str(row): edits_of(log.of_row(row)) for row in log.rows()}
        return {row: some for row, some in edits.items() if some}
    if log.kind == "masks":
        return recipe(log.of_row(0), of)
    if log.kind == "regions":
        return region_set(log.of_row(0), of)
    wanted = {"classes": "keep", "exposures": "leave_out"}[log.kind]
    values = current(one for row in log.rows() for one in log.of_row(row))
    return {str(row): found.value for (place, row, name), found in values.items() if (place, name) == (of, wanted)}


def freeze(log: OperationLog, who: str, of: str = "") -> Frozen:
    """Freeze the current state: from now on runs use it.

    Parameters
    ----------
    log : OperationLog
    who : str
        Who decides.
    of : str
        For classes: the classification, ``STAGE/KEY``; for masks: the map; for regions: the analysis of variability.

    Returns
    -------
    Frozen

    Raises
    ------
    InputError
        If these are classes or regions and none is chosen: a step without any waits, as if nothing had been frozen.
    StoreError
        If the project is gone, or its disk is full.
    """
    content = state_of(log, of)
    if log.kind == "classes" and not content:
        raise InputError(
            f"No class of {of.replace('/', '@') or 'the classification'} is chosen.",
            "",
            "choose classes on the page Classes of  cryodask dashboard, or set keep of select_classes in the project file",
        )
    if log.kind == "regions" and not content["regions"]:
        raise InputError(
            f"No region of {of.replace('/', '@') or 'the components'} is chosen.",
            "",
            "choose one on the page of the components of  cryodask dashboard, or set regions of select_region in the project file",
        )
    text = json.dumps({"kind": log.kind, "of": of, "content": content}, sort_keys=True)
    digest = _digest(text)
    path = _path(log.project, log.kind, digest)
    line = {"id": new_id(), "n": log.highest + 1, "row": FROZEN_ROW, "do": "freeze", "hash": digest, "of": of}
    if (log.project / "project.json").is_file():  # append() refuses a project that is gone
        with disk_errors(log.folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
    (stored,) = log.append([line], who)
    return Frozen(log.kind, digest, who, stored["time"], json.loads(text)["content"], of)


def frozen(project: str | Path, kind: str, of: str = "") -> Frozen | None:
    """The state that runs use now; None if nothing was frozen yet.

    Raises
    ------
    StoreError
        If its file is missing or damaged.
    """
    folder = Path(project)
    if not (folder / "edits" / kind).is_dir():
        return None
    log = OperationLog(folder, kind)
    log.look()
    return latest(log, of)


def latest(log: OperationLog, of: str = "") -> Frozen | None:
    """Like :func:`frozen`, for a log that has been read."""
    lines = [line for line in log.of_row(FROZEN_ROW) if line["of"] == of]
    if not lines:
        return None
    line = lines[-1]
    path = _path(log.project, log.kind, line["hash"])
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError):
        text = ""
    if _digest(text) != line["hash"]:
        raise StoreError(
            f"{path} is missing or damaged: the {log.kind} that {line['who']} said to use cannot be read.",
            "it was edited or removed by hand, or the disk lost bytes",
            f"freeze them again in the browser, or with  cryodask edits freeze {log.project} {log.kind}",
        )
    return Frozen(log.kind, line["hash"], line["who"], line["time"], json.loads(text)["content"], of)


class Stamps:
    """Digests of the states that runs use, read incrementally."""

    def __init__(self, project: str | Path) -> None:
        self._project = Path(project)
        self._logs: dict[str, OperationLog] = {}

    def now(self, kinds: Iterable[str] = tuple(KINDS)) -> dict[tuple[str, str], str]:
        """Digests by kind, and by the result they belong to; they change when somebody freezes another state."""
        out: dict[tuple[str, str], str] = {}
        for kind in kinds:
            if (self._project / "edits" / kind).is_dir():
                log = self._logs.setdefault(kind, OperationLog(self._project, kind))
                log.look()
                out |= {(kind, str(line["of"])): str(line["hash"]) for line in log.of_row(FROZEN_ROW)}
        return out


def _path(project: Path, kind: str, digest: str) -> Path:
    return project / "edits" / kind / "frozen" / f"{digest}.json"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
