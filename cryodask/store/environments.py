"""The environment of a result: software versions and CPU instruction set, stored with every record.

The same movies, parameters and code give other last bits with another numpy or on another CPU. A record names the environment it was made
in; each environment is stored once, in ``<project>/environments/<id>.json``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from cryodask.store.files import write_atomically
from cryodask.version import VERSION

PACKAGES = ("torch", "numpy", "scipy", "zarr")
MADE_IN = "made_in"
"""Key in a record: ids of the environments it was made in; several if workers differ."""
_INSTRUCTION_SETS = ("avx512f", "avx2", "avx", "sse4_2", "sve", "asimd")
Environment = Mapping[str, str]


@functools.cache
def environment() -> dict[str, str]:
    """The environment of this process: versions by package, and ``cpu``, its widest instruction set."""
    found = {"cryodask": VERSION, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "-"
    return {**found, "cpu": f"{platform.machine()} {_instruction_set()}".strip()}


def _instruction_set() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    lines = [line for line in text.splitlines() if line.lower().startswith(("flags", "features"))]
    flags = set(lines[0].partition(":")[2].split()) if lines else set()
    return next((name for name in _INSTRUCTION_SETS if name in flags), "")


def id_of(made_in: Environment) -> str:
    """Id of an environment: a short hash."""
    return _id_of(tuple(sorted(made_in.items())))


@functools.lru_cache(maxsize=64)
def _id_of(items: tuple[tuple[str, str], ...]) -> str:
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:8]


def note(project: Path, made_in: Environment | None = None) -> str:
    """Store an environment (by default that of this process) in a project, once; returns its id."""
    made_in = environment() if made_in is None else dict(made_in)
    name = id_of(made_in)
    path = project / "environments" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(made_in, indent=1))
    return name


def read(project: Path, name: str) -> dict[str, str]:
    """The environment with an id; empty if unknown."""
    try:
        found: dict[str, str] = json.loads((project / "environments" / f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def counts(records: Iterable[Mapping[str, object]]) -> Counter[str]:
    """Number of records by environment id."""
    made = (record.get(MADE_IN) for record in records if record.get("ok"))
    return Counter(str(name) for names in made if isinstance(names, list) for name in names)


def difference(before: Environment, now: Environment) -> str:
    """Differences between two environments, as ``numpy 1.26.4 -> 2.3.0, cpu ...``."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name, '-')} -> {now.get(name, '-')}" for name in names)
