"""Work in a process that ends, so that the server does not keep its memory; one at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import Any

from cryodask.errors import StoreError

_LIMIT_SECONDS = 120.0
_ONE_AT_A_TIME = threading.Lock()


def computed(module: str, job: dict[str, Any], what: str) -> bytes:
    """What ``python -m MODULE`` writes to its output for a job that it reads as JSON from its input.

    Parameters
    ----------
    what : str
        What it computes, for the errors: ``The mask``.

    Raises
    ------
    StoreError
        If it failed, or took too long.
    """
    with _ONE_AT_A_TIME:
        words = [sys.executable, "-m", module]
        try:
            done = subprocess.run(words, input=json.dumps(job).encode(), capture_output=True, timeout=_LIMIT_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise StoreError(f"{what} took too long to compute.", "the server is overloaded", "try again") from None
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise StoreError(f"{what} cannot be computed: {' '.join(last)}", "", "reload the page")
    return done.stdout
