"""Cost of the event stream: reading its end, and writing it.

``python benchmarks/events.py [--quick] [--events 1000000]``

A million events of exposures are written through the product's own log (several files, as it rotates): CPU of the driver an event, as a
share of items that take 1 s of CPU and of the events that each causes (one for its commit, and the counts). Then the last 100 are read,
twenty times, from a cold reader each time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

from cryodask.run.events import Counted, Events, ExposureCommitted, StepStarted
from cryodask.run.events.log import EventLog, event_files, tail
from cryodask.run.events.progress import LogFile
from cryodask.run.events.status import StatusFile

OUT = Path(__file__).parent / "out" / "events"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="20,000 events")
    asked = parser.parse_args()
    count = 20_000 if asked.quick else asked.events
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    events = Events()
    events.join(EventLog(OUT, events.run), StatusFile(OUT), LogFile(OUT, events.run))
    events.emit(StepStarted, step="motion", steps=["ingest", "motion"], total=count, kept=0)
    before = time.process_time()
    for row in range(count):
        events.emit(ExposureCommitted, step="motion", row=row, name=f"FoilHole_{row:07d}")
        if row % 2 == 0:  # two slots: the runner counts once a second
            events.emit(
                Counted, step="motion", seen=count, done=row, quarantined=0, running=2, waiting=count - row - 2, workers=2, arriving=None
            )
    share = (time.process_time() - before) / count
    events.end(None)
    files = event_files(OUT)
    size = sum(path.stat().st_size for path in files)
    reads = []
    for _ in range(20):
        began = time.perf_counter()
        found = tail(OUT, 100)
        reads.append(1e3 * (time.perf_counter() - began))
    assert len(found) == 100
    print(f"{count} exposures: {len(files)} files of {size / 1e6:.0f} MB in all")
    print(f"CPU of an exposure's events    {1e6 * share:8.1f} us   {100 * share:.3f} % of an item of 1 s")
    print(f"the last 100 events            {statistics.median(reads):8.2f} ms   (longest of 20: {max(reads):.2f} ms)")
    plot(reads)
    print(json.dumps({"tail_ms": round(statistics.median(reads), 3), "cost_share_of_1s": round(share, 6), "events": count}))


def plot(reads: list[float]) -> None:
    """Save ``out/events.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    axes.plot(reads, "o")
    axes.axhline(20, color="grey", linestyle=":", label="20 ms")
    axes.set(xlabel="reading", ylabel="last 100 of all events, ms", ylim=(0, None))
    axes.legend()
    figure.savefig(OUT.parent / "events.png", dpi=120)


if __name__ == "__main__":
    main()
