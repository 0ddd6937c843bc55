"""Clients and workers of other versions are refused: distributed only warns, and its pickles and messages then fail later, anywhere."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

RELEASE = version("cryodask")

_EQUAL = ("dask", "distributed", "msgpack", "cloudpickle")


def why_refused(kind: str, theirs: dict[str, Any] | None, ours: dict[str, Any], release: str | None = None) -> str | None:
    """What to tell a client or a worker whose versions differ from the scheduler's; None if they agree.

    Parameters
    ----------
    kind : str
        ``client`` or ``worker``.
    theirs, ours : dict
        As ``distributed.versions.get_versions`` gives them.
    release : str, optional
        Theirs of cryodask, which plain Dask has none of.
    """
    theirs = theirs or {}
    pairs = {name: (theirs.get("packages", {}).get(name), ours["packages"][name]) for name in _EQUAL}
    pairs["python"] = _minor(theirs), _minor(ours)
    pairs["cryodask"] = release or RELEASE, RELEASE
    different = [f"{name} {a or 'unknown'} (here {b})" for name, (a, b) in pairs.items() if a != b]
    if not different:
        return None
    return (
        f"This {kind} has other versions than the scheduler: {', '.join(different)}.\n"
        "  Usual reason: another environment was active\n"
        "  What to do: use the scheduler's environment; only patch levels of Python may differ"
    )


def _minor(versions: dict[str, Any]) -> str:
    return ".".join(str(versions.get("host", {}).get("python", "")).split(".")[:2])
