"""The compiled kernels where numba is installed (extra ``compiled``); else, and on GPUs, the same is done in torch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import lru_cache
from typing import Any

from torch import device as Device


def compiled(name: str, device: Device) -> Any:
    """Module ``_NAME_numba`` with the compiled kernels, or None where torch has to do."""
    return _module(name) if device.type == "cpu" and _has_numba() else None


@lru_cache(maxsize=8)
def _module(name: str) -> Any:
    return importlib.import_module(f"cryodask.kernels._{name}_numba")


@lru_cache(maxsize=1)
def _has_numba() -> bool:
    """Whether numba is installed; says once that it is not."""
    found = importlib.util.find_spec("numba") is not None
    if not found:
        print(
            "numba is not installed: torch refines poses, about fifteen times slower (pip install 'cryodask[compiled]')",
            file=sys.stderr,
        )
    return found
