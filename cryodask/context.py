"""What a stage function gets besides its parameters and data: a device, threads, a scratch folder, random numbers, other programs."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from cryodask.errors import ProgramError
from cryodask.programs import Program, check_same_version, path_of

_PREFIX = "cryodask-scratch-"
_LINES_QUOTED, _CHARACTERS_QUOTED = 12, 1200


def no_report(fraction: float, figures: dict[str, float]) -> None:
    """Default ``on_report``: discard the report."""


def made_anew(key: Hashable, make: Callable[[], Any]) -> Any:
    """Default ``keep``: nothing is kept."""
    return make()


@dataclass
class Context:
    """Where and how a stage function runs.

    The scratch folder is removed on :meth:`close`, or when the ``with`` block ends.

    Parameters
    ----------
    device : str
        ``"cpu"`` or ``"cuda"``: where to put tensors.
    threads : int
        Number of threads that the function may use.
    log : Path, optional
        File for the output of programs; by default it is kept in the scratch folder and removed with it.
    programs : mapping of Program to str
        Programs that the stage declares, with the versions in its key.
    on_report : callable ``(fraction, figures)``
        Called with each report of the function.
    keep : callable ``(key, make) -> object``
        What all calls of a step on a worker share, such as the transform of a map: made on the first call, kept while there is memory. It
        must depend on the parameters and on the maps of the step alone, and must not be changed.
    """

    device: str = "cpu"
    threads: int = 1
    log: Path | None = None
    programs: Mapping[Program, str] = field(default_factory=dict)
    on_report: Callable[[float, dict[str, float]], None] = no_report
    keep: Callable[[Hashable, Callable[[], Any]], Any] = made_anew
    _scratch: _Scratch | None = field(default=None, init=False, repr=False)
    _ran: int = field(default=0, init=False, repr=False)

    @property
    def scratch(self) -> Path:
        """An empty folder on a local disk, made on first use and removed when the function has returned.

        It is in Dask's ``temporary-directory`` if that is set, else in ``TMPDIR``.
        """
        if self._scratch is None:
            self._scratch = _Scratch()
        return self._scratch.path

    def rng(self, *seeds: int) -> np.random.Generator:
        """A random generator that depends on the seeds alone: the same for every worker, order of items and repetition.

        Pass whatever distinguishes the draws, for example ``context.rng(params.seed, row)``. Any integers will do.
        """
        return np.random.default_rng([seed % 2**64 for seed in seeds])

    def report(self, fraction: float, **figures: float) -> None:
        """Report progress from 0 to 1, with figures of interest (``resolution_angstrom=4.2``)."""
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"a fraction of {fraction} was reported; it must be between 0 and 1")
        self.on_report(fraction, figures)

    def run(
        self, program: str, arguments: Sequence[str | Path | float], *, outputs: Sequence[str] = (), timeout_seconds: float | None = None
    ) -> str:
        """Run a program that the stage declares in the scratch folder; return its output.

        Parameters
        ----------
        program : str
            Name of one of the programs in ``@stage(programs=...)``.
        arguments : sequence
            Command-line arguments, passed as they are, without a shell.
        outputs : sequence of str
            Files that it must write into the scratch folder, and not leave empty.
        timeout_seconds : float, optional
            After this time it is killed together with all processes that it started.

        Raises
        ------
        ProgramError
            It failed, took too long, or an output is missing. The message contains the last lines of its output.
        ClusterError
            The program is not on this machine, or its version differs from the one in the key of the result.
        """
        declared = {known.name: known for known in self.programs}
        if program not in declared:
            raise ValueError(
                f"{program} is not declared by this stage ({', '.join(declared) or 'none'} declared): add it to @stage(programs=...)"
            )
        check_same_version(declared[program], self.programs[declared[program]])
        command = [path_of(program) or program, *map(str, arguments)]
        kept = self.log or self.scratch.with_name(self.scratch.name + ".output")
        kept.parent.mkdir(parents=True, exist_ok=True)
        with kept.open("ab" if self._ran else "wb") as log:
            self._ran += 1
            log.write(f"$ {' '.join([program, *command[1:]])}\n".encode())
            log.flush()
            start = log.tell()
            status = self._finished(command, log, timeout_seconds)
        printed = kept.read_bytes()[start:].decode(errors="replace")
        kept_at = f"; the full output is in {self.log}" if self.log else ""
        told = f"its last lines{kept_at}:\n{_last_lines(printed)}" if printed.strip() else "it printed nothing"
        way_out = "check its output; rerun it by hand with the command in the first line of the log"
        if status is None:
            what = f"{program} took longer than {timeout_seconds:g} s and was killed; {told}"
            raise ProgramError(what, "", f"raise the limit, or {way_out}")
        if status:
            ended = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"failed with exit status {status}"
            raise ProgramError(f"{program} {ended}; {told}", "", way_out)
        missing = [name for name in outputs if not ((self.scratch / name).is_file() and (self.scratch / name).stat().st_size)]
        if missing:
            raise ProgramError(f"{program} exited with status 0, but did not write {', '.join(missing)}; {told}", "", way_out)
        return printed

    def _finished(self, command: list[str], log: IO[bytes], timeout_seconds: float | None) -> int | None:
        """Run a command; return its exit status, or None if it took too long. No process that it started survives."""
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        # the program must not outlive a killed worker, and preexec_fn is not safe in a process with threads
        wrapper = [path] if (path := shutil.which("setpriv")) else []
        process = subprocess.Popen(
            [*wrapper, *(["--pdeathsig", "KILL"] if wrapper else []), *command],
            cwd=self.scratch,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **threads},
            start_new_session=True,
        )
        try:
            return process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def close(self) -> None:
        """Remove the scratch folder."""
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _last_lines(text: str) -> str:
    lines = text.replace("\r", "\n").strip().splitlines()[-_LINES_QUOTED:]
    return "\n".join("  | " + line for line in lines)[-_CHARACTERS_QUOTED:]


class _Scratch:
    """A temporary folder; those that killed processes left behind are removed when the next one is made.

    A file lock, which the kernel releases when the process dies, marks a folder as in use. Its file is beside the folder, so that there
    is never a folder without a lock.
    """

    def __init__(self) -> None:
        home = _scratch_home()
        home.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{_PREFIX}{os.getuid()}-", suffix=".lock", dir=home)
        fcntl.flock(handle, fcntl.LOCK_EX)
        self.lock, self.handle = Path(name), handle
        for other in home.glob(f"{_PREFIX}{os.getuid()}-*.lock"):
            _remove_if_left(other)
        self.path = self.lock.with_suffix("")
        self.path.mkdir(mode=0o700)

    def remove(self) -> None:
        _remove(self.lock)
        os.close(self.handle)


def _scratch_home() -> Path:
    import dask

    return Path(dask.config.get("temporary-directory", None) or tempfile.gettempdir())


def _remove_if_left(lock: Path) -> None:
    with suppress(OSError):
        handle = os.open(lock, os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock)
        finally:
            os.close(handle)


def _remove(lock: Path) -> None:
    folder = lock.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name(folder.name + ".output").unlink(missing_ok=True)
    lock.unlink(missing_ok=True)


def return_freed_memory() -> None:
    """Give freed memory back to the system: glibc keeps what was freed between other blocks, and would grow with every step of a call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
