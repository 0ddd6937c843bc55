"""Every error of cryodask: what happened, the usual reason, the way out.

::

    CryodaskError                 stops the run
    ├── ProjectFileError          stops: the project file or the command line is wrong (found before any work)
    ├── InputError                stops: an input that all items share is wrong (gain, reference, mask, STAR file)
    │   ├── GainError
    │   └── StarError
    ├── ProgramMissingError       stops: a program that a step runs is not here (found before any work)
    ├── PluginError               stops: a stage, reader ... of another package cannot be used as it is
    ├── StoreError                stops: the project folder cannot be read or written
    │   ├── DiskError
    │   │   └── DiskFullError
    │   ├── LockedError
    │   └── TakenOverError
    ├── ClusterError              stops: workers cannot be started or are gone
    ├── Stopped                   a person stopped the run
    ├── Quarantined               at the end of a run that was to be strict: exposures are quarantined
    └── ItemError                 quarantines ONE item and goes on
        ├── MovieError            a movie that is missing, truncated or of another shape
        ├── MicrographError       a micrograph that a stage cannot use (NaN pixels, box larger than it ...)
        └── ProgramError          a program failed, took too long, or left no result

OSError and MemoryError raised inside an item are retried, then quarantined.
"""

from __future__ import annotations

import errno
from typing import Literal

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE)


class CryodaskError(Exception):
    """Base of all errors: three sentences instead of one.

    Parameters
    ----------
    what : str
        What happened, to what, with the numbers.
    usual_reason : str
        Why this usually happens.
    way_out : str
        What the user can do about it.
    """

    on_failure: Literal["stop", "quarantine"] = "stop"
    exit_status: int = 2
    """Of a run that this error ends; see :func:`exit_status`."""

    def __init__(self, what: str, usual_reason: str = "", way_out: str = "") -> None:
        super().__init__(what, usual_reason, way_out)
        self.what, self.usual_reason, self.way_out = what, usual_reason, way_out

    @property
    def problem(self) -> str:
        """What happened and what to do, in one line."""
        end = "" if self.what.endswith((".", "!", "?", ":")) else "."
        return f"{self.what}{end} {self.way_out}".strip()

    def __str__(self) -> str:
        lines = [self.what]
        if self.usual_reason:
            lines.append(f"  Usual reason: {self.usual_reason}")
        if self.way_out:
            lines.append(f"  What to do: {self.way_out}")
        return "\n".join(lines)


class ProjectFileError(CryodaskError):
    """The project file or a command-line option is wrong."""


class InputError(CryodaskError):
    """An input that all items share is missing or does not fit the others."""


class GainError(InputError):
    """The gain reference does not fit the movies."""


class StarError(InputError):
    """A STAR file lacks what is needed or cannot be parsed."""


class ProgramMissingError(CryodaskError):
    """A program that a step runs is not installed here, or does not say its version."""


class PluginError(CryodaskError):
    """A part of another package (stage, reader, exporter, kind of pool) cannot be used as it is."""


class StoreError(CryodaskError):
    """The project folder is not what is needed: another format, no such result."""


class DiskError(StoreError):
    """The disk with the project cannot be read or written, or has lost bytes."""

    exit_status = 4


class DiskFullError(DiskError):
    """No space is left where the project lies."""


class LockedError(StoreError):
    """Another driver works on this project."""


class TakenOverError(StoreError):
    """Another driver took over the project of this one, which was stopped or out of reach of its disk."""

    exit_status = 5


class ClusterError(CryodaskError):
    """Workers cannot be started, or all are gone."""

    exit_status = 3


class Stopped(CryodaskError):
    """A person stopped the run; it goes on with the same command."""

    exit_status = 130


class Quarantined(CryodaskError):
    """A strict run is done, but not with every exposure."""

    exit_status = 1


class ItemError(CryodaskError):
    """One item cannot be processed; the run goes on without it."""

    on_failure = "quarantine"


class MovieError(ItemError):
    """A movie is missing, truncated or of another shape than the rest."""


class MicrographError(ItemError):
    """A micrograph cannot be used by a stage."""


class ProgramError(ItemError):
    """A program that a stage ran failed, took too long, or left no result."""


def exit_status(error: BaseException) -> int:
    """Exit status of a run that ends with an error, by whose fault it was.

    1 exposures are quarantined (only where a run is strict), 2 the project file, an input or an option, 3 the cluster, 4 the disk with
    the results, 5 another driver took the project over, 130 a person interrupted it.
    """
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, CryodaskError):
        return error.exit_status
    return 4 if isinstance(error, OSError) and error.errno in _OF_THE_DISK else 2
