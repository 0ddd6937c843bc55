"""Whether Slurm's programs are there and answer, where sessions are submitted from this host."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

from cryodask.web.checking.finding import Finding, note, ok, problem

_USED = ("sbatch", "squeue", "scancel")
_ANSWER_SECONDS = 15.0


def check_slurm() -> Iterator[Finding]:
    """The programs that clusters of the kind ``slurm`` call, and one question to the controller."""
    missing = [name for name in _USED if shutil.which(name) is None]
    if len(missing) == len(_USED):
        yield note(
            "Slurm", "It is not installed here: jobs cannot be submitted from this host.", "install its client programs if they should be"
        )
        return
    if missing:
        yield problem(
            "Slurm", f"{', '.join(missing)} not found in PATH.", "install all client programs of Slurm, or correct PATH in the unit"
        )
        return
    try:
        done = subprocess.run(["squeue", "-h", "--me"], capture_output=True, text=True, timeout=_ANSWER_SECONDS, stdin=subprocess.DEVNULL)
        failed = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0] if done.returncode else ""
    except subprocess.TimeoutExpired:
        failed = f"no answer within {_ANSWER_SECONDS:.0f} s"
    except OSError as error:
        failed = str(error)
    if failed:
        yield problem("Slurm", f"squeue --me fails: {failed}", "check that slurmctld runs and that this host may ask it")
    else:
        yield ok("Slurm", "The controller answers.")
