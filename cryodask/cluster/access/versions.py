"""Refuses clients and workers with other versions; distributed only warns, and then fails later in unrelated places."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Worker

RELEASE = version("cryodask")

_EQUAL = ("dask", "distributed", "msgpack", "cloudpickle")


def why_refused(kind: str, theirs: dict[str, Any] | None, ours: dict[str, Any], release: str | None = None) -> str | None:
    """Message for a client or worker whose versions differ from the scheduler's; None if they agree.

    Parameters
    ----------
    kind : str
        ``client`` or ``worker``.
    theirs, ours : dict
        From ``distributed.versions.get_versions``.
    release : str, optional
        Their cryodask release, which plain Dask does not have.
    """
    theirs = theirs or {}
    pairs = {name: (theirs.get("packages", {}).get(name), ours["packages"][name]) for name in _EQUAL}
    pairs["python"] = _minor(theirs), _minor(ours)
    pairs["cryodask"] = release or RELEASE, RELEASE
    different = [f"{name} {a or 'unknown'} (here {b})" for name, (a, b) in pairs.items() if a != b]
    if not different:
        return None
    return (
        f"The versions of this {kind} differ from the scheduler's: {', '.join(different)}.\n"
        "  Usual reason: another environment was active\n"
        "  What to do: use the scheduler's environment; only the patch level of Python may differ"
    )


def announce(worker: Worker) -> None:
    """Have a worker that registers tell the scheduler which cryodask it has: versions are compared, and tasks are sent in less."""
    worker.startup_information["cryodask"] = lambda worker: RELEASE


async def dask_setup(worker: Worker) -> None:
    """``--preload cryodask.cluster.access.versions`` for workers without certificates; those with certificates do it themselves."""
    announce(worker)


def _minor(versions: dict[str, Any]) -> str:
    return ".".join(str(versions.get("host", {}).get("python", "")).split(".")[:2])
