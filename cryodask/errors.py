"""All exceptions of cryodask. Each says what happened, the usual reason, and what to do.

::

    CryodaskError                 stops the run
    ├── ProjectFileError          stops: the project file or the command line is wrong (found before any work)
    ├── InputError                stops: an input that all items share is wrong (gain, reference, mask, STAR file)
    │   ├── GainError
    │   └── StarError
    ├── ProgramMissingError       stops: a program that a step runs is not installed (found before any work)
    ├── PluginError               stops: a stage, reader ... of another package cannot be used
    ├── StoreError                stops: the project folder cannot be read or written
    │   ├── DiskError
    │   │   └── DiskFullError
    │   ├── LockedError
    │   ├── AwayError             stops: data that were removed on purpose are needed (found before any work)
    │   ├── ArchiveError          stops an archive run: the archive cannot be used, or its copy differs; nothing is removed
    │   └── TakenOverError
    ├── ClusterError              stops: workers cannot be started or are gone
    ├── Stopped                   the user stopped the run
    ├── Quarantined               at the end of a strict run: exposures are quarantined
    └── ItemError                 quarantines ONE item; the run continues
        ├── MovieError            the movie is missing, truncated or has another shape
        ├── MicrographError       a stage cannot use the micrograph (NaN pixels, box too large ...)
        └── ProgramError          a program failed, took too long, or wrote no result

OSError and MemoryError raised inside an item are retried, then quarantined.
"""

from __future__ import annotations

import errno
from typing import Literal

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE)


class CryodaskError(Exception):
    """Base of all exceptions, with a message of up to three sentences.

    Parameters
    ----------
    what : str
        What happened to what, with the numbers.
    usual_reason : str
        The usual cause; empty if there is none.
    way_out : str
        What the user can do.
    """

    on_failure: Literal["stop", "quarantine"] = "stop"
    exit_status: int = 2
    """Exit status of a run that this error ends; see :func:`exit_status`."""

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
    """An input that all items share is missing or does not match the others."""


class GainError(InputError):
    """The gain reference does not match the movies."""


class StarError(InputError):
    """A STAR file cannot be parsed or lacks required columns."""


class ProgramMissingError(CryodaskError):
    """A program that a step runs is not installed here, or does not report its version."""


class PluginError(CryodaskError):
    """A stage, reader, exporter or pool kind of another package cannot be used."""


class StoreError(CryodaskError):
    """The project folder cannot be used: another format, or no such result."""


class DiskError(StoreError):
    """The project's disk cannot be read or written, or data on it are damaged."""

    exit_status = 4


class DiskFullError(DiskError):
    """No space is left on the project's disk."""


class LockedError(StoreError):
    """Another driver is working on this project."""


class AwayError(StoreError):
    """Data that were archived or thinned on purpose are needed; the message has the command that brings them back."""


class ArchiveError(StoreError):
    """An archive cannot be reached or written, or a copy in it is not what was written. The local file stays."""


class TakenOverError(StoreError):
    """Another driver took the project over, because this one was suspended or lost access to the disk."""

    exit_status = 5


class ClusterError(CryodaskError):
    """Workers cannot be started, or all of them are gone."""

    exit_status = 3


class Stopped(CryodaskError):
    """The user stopped the run; the same command resumes it."""

    exit_status = 130


class Quarantined(CryodaskError):
    """A strict run has finished, but exposures are quarantined."""

    exit_status = 1


class ItemError(CryodaskError):
    """One item cannot be processed; the run continues without it."""

    on_failure = "quarantine"


class MovieError(ItemError):
    """A movie is missing, truncated or differs in shape from the rest."""


class MicrographError(ItemError):
    """A stage cannot use a micrograph."""


class ProgramError(ItemError):
    """A program that a stage ran failed, took too long, or wrote no result."""


def exit_status(error: BaseException) -> int:
    """Exit status of a run that ends with an error, by cause.

    1 exposures are quarantined (strict runs only), 2 the project file, an input or an option, 3 the cluster, 4 the project's disk,
    5 another driver took the project over, 130 the user interrupted it.
    """
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, CryodaskError):
        return error.exit_status
    return 4 if isinstance(error, OSError) and error.errno in _OF_THE_DISK else 2
