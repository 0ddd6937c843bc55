"""Runs a command in a batch job, and reruns it when its cluster was replaced: ``python -m cryodask.cluster.service.driver TIMES WORD...``.

``$CRYODASK_CLUSTER`` names the cluster. A command that fails while its scheduler is alive has failed on its own, and is not rerun.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType

from cryodask.cluster.service.service import Service, find, is_known
from cryodask.errors import ClusterError

_WAIT_SECONDS = 6 * 3600.0
_LOOK_SECONDS = 2.0


def scheduler_id(name: str) -> str | None:
    """Dask's id of the scheduler that currently answers for a service; None if none does."""
    try:
        return str(find(name).ask("identity")["id"])
    except ClusterError:
        return None


def drive(command: list[str], cluster: str, times: int, wait_seconds: float = _WAIT_SECONDS) -> int:
    """Run a command until it succeeds, fails on its own, or has been run ``times`` times; returns its exit status.

    Raises
    ------
    ClusterError
        If this account neither has a cluster of that name nor is invited to one.
    """
    if not is_known(cluster):  # a known cluster may come back, an unknown one never does
        find(cluster)
    status = 1
    for turn in range(1, times + 1):
        before = _wait_for(cluster, wait_seconds)
        status = _run(command)
        if status < 0:
            _say("killed by scancel or at the end of the walltime. Committed results are kept: submit the run again to resume it")
        if status <= 0 or before is None or scheduler_id(cluster) == before:
            break
        _say(
            f"the scheduler of {cluster} was lost"
            + (f"; waiting for the cluster, then rerunning the command ({turn + 1} of {times})" if turn < times else "")
        )
    return status if status >= 0 else 128 - status


def _wait_for(cluster: str, seconds: float) -> str | None:
    deadline, told = time.monotonic() + seconds, ""
    while (found := scheduler_id(cluster)) is None and time.monotonic() < deadline:
        try:
            said: Service | str = find(cluster)
        except ClusterError as error:
            said = error.what
        if str(said) != told:
            told = str(said)
            _say(told)
        time.sleep(_LOOK_SECONDS)
    return found


def _run(command: list[str]) -> int:
    """Exit status; negative if it was killed from outside, in which case it must not be rerun."""
    ended: list[int] = []
    # a background job ignores Ctrl-C, and the command would inherit that
    process = subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))

    def end(number: int, frame: FrameType | None) -> None:
        ended.append(number)
        process.send_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, end)
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    return -ended[0] if ended else abs(status)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(drive(sys.argv[2:], os.environ["CRYODASK_CLUSTER"], int(sys.argv[1])))
    except ClusterError as refused:
        sys.exit(str(refused))
