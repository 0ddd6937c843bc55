"""Types of the values in a cluster file: memory, walltimes, paths, directives, licences."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from dask.utils import parse_bytes
from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, ValidationInfo

from cryodask.cluster.directives import checked_directive, checked_shell_line
from cryodask.documents import expand

_NETWORK = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "afs", "glusterfs", "pvfs2", "wekafs", "panfs", "9p"}
_NETWORK_FUSE = ("fuse.ceph", "fuse.gluster", "fuse.sshfs", "fuse.juicefs")


def _as_slurm(text: str) -> str:
    """Memory as Slurm reads it: K, M, G and T without a B are powers of 1024 (Dask takes them for powers of 1000)."""
    return re.sub(r"(?<=[0-9. ])([KMGT])$", r"\1iB", text.strip(), flags=re.IGNORECASE)


def _memory(given: str) -> str:
    text = _as_slurm(given)
    try:
        fits = text.isascii() and parse_bytes(text) >= 2**20
    except (ValueError, OverflowError):
        fits = False
    if not fits:
        raise ValueError("memory needs a number with a unit, such as 64GiB or 4000MB")
    return text


def _walltime(given: object) -> object:
    said = str(given)
    if not isinstance(given, (int, float)) and re.fullmatch(r"\d+:\d\d", said):
        raise ValueError(f'Slurm reads two numbers as minutes and seconds: write "{said}:00" if these are hours, "0:{said}" if not')
    if isinstance(given, (int, float)) or not re.fullmatch(r"\d+-\d+:\d\d(:\d\d)?|\d+:\d\d:\d\d", said):
        raise ValueError('write it as "hours:minutes:seconds" or "days-hours:minutes:seconds"')
    if not re.search("[1-9]", said):
        raise ValueError("a job needs some time; Slurm takes zero for no limit")
    return given


def _one_line(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("must be a single line of printable characters")
    return text


def _file(path: str, info: ValidationInfo) -> str:
    """A path as written in a cluster file: relative to that file. Addresses of images are not paths."""
    return path if "://" in path else os.path.normpath(Path((info.context or {}).get("folder", ""), expand(path)).absolute())


def _program(path: str, info: ValidationInfo) -> str:
    return _file(path, info) if "/" in path else path


def _on_node(path: str) -> str:
    # variables are those of the node, but a tilde in quotes would be a folder of that name
    return os.path.expanduser(path)


Memory = Annotated[str, AfterValidator(_memory)]
BinaryMemory = Annotated[str, AfterValidator(_as_slurm)]
Walltime = Annotated[str, BeforeValidator(_walltime)]
Line = Annotated[str, AfterValidator(_one_line)]
Directive = Annotated[Line, AfterValidator(checked_directive)]
Command = Annotated[Line, AfterValidator(checked_shell_line)]
FilePath = Annotated[Line, AfterValidator(_file)]
Invitation = Annotated[str, Field(pattern=r"\.invite$"), AfterValidator(_file)]
Program = Annotated[Line, AfterValidator(_program)]
NodePath = Annotated[Line, AfterValidator(_on_node)]
Word = Annotated[str, Field(pattern=r"^[\w.,:+=@/-]+$")]
MemoryOption = Literal["mem", "mem-per-cpu", "none"]
Weight = Annotated[float, Field(strict=True, gt=0)]
PoolName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Licences = dict[Annotated[str, Field(pattern=r"^[A-Za-z][\w.-]*(@[\w.-]+)?$")], PositiveInt]
ServiceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


GPU = "GPU"
"""Dask resource of a worker process that is bound to a GPU."""


def licence(name: str) -> str:
    """Dask resource of a worker process that has a licence."""
    return f"licence-{name}"


def network_file_system(path: str) -> str:
    """Type of the network file system of a path on this machine; empty for a local one, or if only the node can tell."""
    if "$" in path:
        return ""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return ""
    real = os.path.realpath(path)
    above = [(len(point), kind) for point, kind in mounts if real == point or real.startswith(point.rstrip("/") + "/")]
    kind = max(above, default=(0, ""))[1]
    return kind if kind in _NETWORK or kind.startswith(_NETWORK_FUSE) else ""
