"""Folders of a facility that all nodes can see: their mode, group, and striping on Lustre."""

from __future__ import annotations

import grp
import os
import shutil
import stat
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field

from cryodask.cluster.fields import Line, Memory, network_file_system
from cryodask.documents import StrictModel
from cryodask.errors import StoreError


class Stripe(StrictModel):
    """How Lustre spreads the files of a folder: over ``count`` targets (-1 for all), in pieces of ``size``."""

    count: int = Field(1, ge=-1)
    size: Memory | None = None
    pool: Line | None = None


class Folder(StrictModel):
    """A folder that all nodes can see. ``mode`` is octal; new files inherit the group of the folder where the first digit is 2."""

    path: Line
    mode: str = Field("2770", pattern=r"^[0-7]{3,4}$")
    group: Line | None = None
    stripe: Stripe | None = None


def striping(folder: Folder) -> list[str] | None:
    """The command that sets the striping of a folder; None if the folder is not on Lustre or ``lfs`` is not installed."""
    above = Path(folder.path)
    while not above.exists():
        above = above.parent
    if folder.stripe is None or shutil.which("lfs") is None or network_file_system(str(above)) != "lustre":
        return None
    words = ["lfs", "setstripe", "-c", str(folder.stripe.count)]
    if folder.stripe.size:
        from dask.utils import parse_bytes

        words += ["-S", str(parse_bytes(folder.stripe.size))]
    words += ["-p", folder.stripe.pool] if folder.stripe.pool else []
    return [*words, folder.path]


def make_folder(folder: Folder) -> None:
    """Make a folder with its mode, group and striping. An existing one is left as it is; a warning lists what differs.

    Raises
    ------
    StoreError
    """
    path = Path(folder.path)
    group = -1 if folder.group is None else find_group(folder.group)
    if path.exists():
        if differs := differences(folder):
            warnings.warn(f"The folder {path} is left as it is: {differs}.", stacklevel=2)
        return
    try:
        path.mkdir(parents=True)
        with _removed_if_it_fails(path):
            os.chown(path, -1, group)
            path.chmod(int(folder.mode, 8))
            command = striping(folder)
            done = subprocess.run(command, capture_output=True, text=True) if command else None
            if command and done and done.returncode:
                raise StoreError(
                    f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()}",
                    "the stripe count exceeds the number of targets, or the pool does not exist",
                    "change stripe under storage in the blueprint",
                )
    except OSError as error:
        raise StoreError(
            f"The folder {path} cannot be created as the blueprint describes it: {error.strerror}.",
            "this account has no write permission there, or is not a member of the group",
            "run this from the service account, or change storage",
        ) from None


@contextmanager
def _removed_if_it_fails(folder: Path) -> Iterator[None]:
    """Remove the folder if the block fails; the next attempt would mistake it for one that belongs to the site."""
    try:
        yield
    except BaseException:
        folder.rmdir()
        raise


def differences(folder: Folder) -> str:
    """How an existing folder differs from the blueprint; empty if it does not."""
    there = Path(folder.path).stat()
    words = []
    if stat.S_IMODE(there.st_mode) != int(folder.mode, 8):
        words.append(f"its mode is {stat.S_IMODE(there.st_mode):o}, not {folder.mode}")
    if folder.group and there.st_gid != find_group(folder.group):
        words.append(f"its group is {_name_of(there.st_gid)}, not {folder.group}")
    return ", ".join(words)


def _name_of(group: int) -> str:
    try:
        return grp.getgrgid(group).gr_name
    except KeyError:
        return str(group)


def find_group(name: str) -> int:
    """Number of a group of this machine.

    Raises
    ------
    StoreError
    """
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise StoreError(
            f"The group {name} does not exist on this machine.", "it is defined on other machines only", "list groups with  getent group"
        ) from None
