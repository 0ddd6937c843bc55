"""Archiving that is killed at random: is any byte ever lost?

``python benchmarks/archive.py [--quick]``: three movies and three micrographs are archived to a folder, deleted from the trash and
restored, again and again. Each call runs in a process that kills itself (SIGKILL) before a system call chosen at random, sometimes halfway
through a write. After each call every file must be in its place or in the trash with its sha256, or away with a verified copy of that
sha256; what is not counts as lost. The machine stays up, so this says nothing about power failures. Object stores:
``pytest -m slow tests/test_archive.py``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from cryodask.testing.archives import Killed, kill_at_random

OUT = Path(__file__).parent / "out"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 kills instead of 200, as a smoke test")
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = kill_at_random(Path(folder) / "session", str(Path(folder) / "archive"), 20 if arguments.quick else 200)
    print(f"{'killed after':<12} {'times':>6}")
    for call, count in found.kills.most_common():
        print(f"{call:<12} {count:>6}")
    print("\nstates seen between kills: " + ", ".join(f"{state} {count}" for state, count in found.states.most_common()))
    plot(found)
    print(json.dumps({"kills": found.kills.total(), "bytes_lost": found.bytes_lost, "seconds": round(time.perf_counter() - began, 1)}))


def plot(found: Killed) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    calls, states = figure.subplots(1, 2)
    calls.bar(list(found.kills), list(found.kills.values()))
    calls.set(title=f"{found.kills.total()} kills, {found.bytes_lost} bytes lost", xlabel="last system call", ylabel="kills")
    calls.tick_params(axis="x", rotation=60)
    states.bar(list(found.states), list(found.states.values()), color="C1")
    states.set(title="States of files after a kill", ylabel="files seen")
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "archive.png", dpi=120)
    print(f"plot: {OUT / 'archive.png'}")


if __name__ == "__main__":
    main()
