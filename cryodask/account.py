"""Folders of this account that belong to no project."""

from __future__ import annotations

import os
from pathlib import Path


def state_folder() -> Path:
    """Folder of this account for state that outlives a process."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "cryodask"


def cache_folder() -> Path:
    """Folder of this account for what can be made again: on a local disk, and not worth a back-up."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cryodask"
