"""Small files of a project that cannot be read, and would keep everything else from being read: found, and set aside.

``project.json`` and the ``places.json`` of results are written again by the next run, from the results; a result whose description
(``zarr.json``) is lost is computed again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from cryodask.errors import StoreError
from cryodask.store.files import disk_errors
from cryodask.store.places import read_lines
from cryodask.store.state import is_damaged

_ASIDE = ".damaged"


def broken_files(project: Path) -> list[Path]:
    """Files of a project that are there, but damaged."""
    of_results = [file for folder in sorted(project.glob("stages/*/*")) for file in _of(folder)]
    return [*([project / "project.json"] if is_damaged(project) else ()), *of_results]


def _of(folder: Path) -> Iterator[Path]:
    for description in sorted({folder / "zarr.json", *folder.glob("*/zarr.json")}):
        try:
            document = json.loads(description.read_bytes())
            if description.parent == folder:
                document["attributes"]["cryodask"]["gives"]
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError):
            yield description
    try:
        read_lines(folder)
    except StoreError:
        yield folder / "places.json"


def set_aside(files: list[Path]) -> None:
    """Rename damaged files to ``NAME.damaged`` (driver only); nothing is deleted."""
    for file in files:
        with disk_errors(file.parent):
            os.replace(file, file.with_name(file.name + _ASIDE))
