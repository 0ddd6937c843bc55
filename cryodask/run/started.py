"""``started.json``: how the run of a project was started, so that it can be started again from the page of its session."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from cryodask.store.files import disk_errors, write_atomically

_NAME = "started.json"


@dataclass(frozen=True)
class Started:
    """The project file of a run, its options for the command line, whether it watched for movies, and its cluster and lane, if given."""

    file: Path
    options: tuple[str, ...]
    watch: bool
    cluster: str | None = None
    lane: str | None = None

    def write(self, folder: Path) -> None:
        """Record it in the folder of a project."""
        said = {"options": list(self.options), "watch": self.watch, "cluster": self.cluster, "lane": self.lane}
        with disk_errors(folder):
            # relative, so that both can be moved together
            write_atomically(folder / _NAME, json.dumps({"file": os.path.relpath(self.file.resolve(), folder.resolve()), **said}))

    @classmethod
    def read(cls, folder: Path) -> Started | None:
        """How the last run of a project was started; None if nobody knows."""
        try:
            said = json.loads((folder / _NAME).read_text())
            file = (folder / str(said["file"])).resolve()
            cluster, lane = (None if said[key] is None else str(said[key]) for key in ("cluster", "lane"))
            return cls(file, tuple(str(word) for word in said["options"]), bool(said["watch"]), cluster, lane)
        except (OSError, ValueError, KeyError, TypeError):
            return None
