"""Striping and quota of a Lustre file system, where the program ``lfs`` exists."""

from __future__ import annotations

import getpass
import shutil
import subprocess
from pathlib import Path

_SECONDS = 20


def lustre_lines(folder: Path) -> list[str]:
    """What ``lfs`` says about a folder: stripe count, and the quota of this account; empty without it."""
    if shutil.which("lfs") is None:
        return []
    stripes = _lfs("getstripe", "-d", "-c", str(folder))
    quota = _lfs("quota", "-h", "-u", getpass.getuser(), str(folder))
    lines = [f"Lustre: {folder} has a stripe count of {stripes.strip()}"] if stripes.strip() else []
    return lines + [f"Lustre: {line.strip()}" for line in quota.splitlines() if line.strip()]


def _lfs(*words: str) -> str:
    try:
        done = subprocess.run(["lfs", *words], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
