"""External programs that stages run: where they are, and their versions."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cryodask.errors import ClusterError, ProgramMissingError

_PATIENCE_SECONDS = 60.0
_VERSIONS: dict[tuple[str, int, str], str] = {}


@dataclass(frozen=True)
class Program:
    """A program that a stage needs.

    Parameters
    ----------
    name : str
        Name on the PATH.
    version_arguments : tuple of str
        Arguments that make it print its version.
    version_pattern : str
        Regular expression whose first group matches the version in its output.
    install : str
        How to install it; ends the message that refuses a run without it.
    version_program : str, optional
        Another program on the PATH that prints the version of this one.
    """

    name: str
    version_arguments: tuple[str, ...] = ("--version",)
    version_pattern: str = r"(\d+\.\d+[\w.+-]*)"
    install: str = "install it, or load its module first"
    version_program: str | None = None

    def version(self) -> str:
        """Version of the program on this machine; the program is run once per executable file.

        Raises
        ------
        ProgramMissingError
            It is not on the PATH, cannot be started, or reports no version.
        """
        asked = self.version_program or self.name
        for name in (self.name, asked):
            if path_of(name) is None:
                raise ProgramMissingError(f"{name} is not on the PATH of {socket.gethostname()}.", "", f"{self.install}")
        path = path_of(asked) or asked
        key = str(path), Path(path).stat().st_mtime_ns, self.version_pattern
        if key not in _VERSIONS:
            _VERSIONS[key] = self._asked(path)
        return _VERSIONS[key]

    def _asked(self, path: str) -> str:
        command = [path, *self.version_arguments]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_PATIENCE_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ProgramMissingError(f"{path} cannot be started: {error}.", "", self.install) from error
        printed = done.stdout.decode(errors="replace")
        found = re.search(self.version_pattern, printed)
        if not found:
            raise ProgramMissingError(
                f"{' '.join(command)} reports no version: {printed.strip()[-300:] or 'it prints nothing'}",
                "a library it needs is missing, or it is another program of the same name",
                self.install,
            )
        return found.group(1)


def path_of(name: str) -> str | None:
    """Path of a program; None if it is not on the PATH."""
    return shutil.which(name)


def check_same_version(program: Program, wanted: str) -> None:
    """On a worker: refuse to run a program whose version differs from the one in the key of the result.

    Raises
    ------
    ClusterError
        It stops the run, because every item would fail.
    """
    here, way_out = socket.gethostname(), "give the workers the driver's PATH (module load in their job, or the same container)"
    try:
        found = program.version()
    except ProgramMissingError as error:
        raise ClusterError(f"A worker cannot run {program.name}. {error.what}", "", way_out) from error
    if found != wanted:
        raise ClusterError(f"The worker on {here} has {program.name} {found}, but this run was planned with {wanted}.", "", way_out)
