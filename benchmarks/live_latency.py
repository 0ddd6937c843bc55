"""Latency of a live item while others saturate the cluster.

``python benchmarks/live_latency.py [--quick] [--items 100]``: 16 slots (2 worker processes of 8 threads). HPDA floods tasks of 0.4 s that
sleep, without inputs (roots) or with inputs in memory. Meanwhile live items of 0.2 s are submitted, one when the one before is back, and
in bursts of four; the time is from ``submit`` to the result at the client. On an idle cluster, with weights live:hpda 3:1, with live
strict, with one thread reserved for it, and with plain Dask, where a lane may never get its turn: each row ends after its time limit.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

import numpy as np
from _lanes import FAIR, OUT, PLAIN, Workers, cluster, finish, in_memory, roots, work
from distributed import Client

ITEM, FOREIGN = 0.2, 0.4
FLOODS = {"roots": roots, "in memory": in_memory}
LANES = {"live": 3, "hpda": 1}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "3:1": (FAIR, {"lanes": LANES}),
    "strict": (FAIR, {"lanes": LANES, "strict": ["live"]}),
    "reserve 1": (FAIR, {"lanes": LANES, "reserve": {"live": 1}}),
    "plain": (PLAIN, {}),
}


def latencies(client: Client, items: int, burst: int, limit: float) -> list[float]:
    """Seconds from submit to result of each item; those that were not back after ``limit`` seconds are missing."""
    rng, found, ends = random.Random(burst), [], time.monotonic() + limit
    while len(found) < items and time.monotonic() < ends:
        back: list[float] = []
        sent = time.monotonic()
        futures = [client.submit(work, ITEM, pure=False) for _ in range(burst)]
        for future in futures:
            future.add_done_callback(lambda _: back.append(time.monotonic() - sent))  # noqa: B023
        try:
            finish(client, futures, max(0.1, ends - time.monotonic()))
        except TimeoutError:
            return found + back
        while len(back) < burst:
            time.sleep(0.001)
        found += back
        time.sleep(rng.uniform(0.0, FOREIGN))  # the phase of the foreign tasks must not matter
    return found


def measure(workers: Workers, setting: str, flood: str | None, items: int, burst: int) -> list[float]:
    """Latencies of items with one flood (None: an idle cluster)."""
    kind, options = SETTINGS[setting]
    longest = items / burst * 2.0 if kind == FAIR else 20.0
    with cluster(workers, kind, ("hpda/batch", "live/session"), record=False, **options) as made:
        hpda, live = made.clients.values()
        finish(live, [live.submit(work, 0.01, pure=False) for _ in range(4)])
        kept = []
        if flood is not None:
            slots = workers.count * workers.threads
            kept = FLOODS[flood](hpda, int(slots * (longest + 5.0) / FOREIGN), FOREIGN)
            time.sleep(2.0)
        found = latencies(live, items, burst, longest)
        assert flood is None or not all(f.done() for f in kept), "the flood ended before the items"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="12 items, without strict, as a smoke test")
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--threads", type=int, default=8, help="threads of each of the two workers")
    arguments = parser.parse_args()
    items = 12 if arguments.quick else arguments.items
    settings = [s for s in SETTINGS if not (arguments.quick and s == "strict")]
    workers, rows = Workers(threads=arguments.threads), {}
    print(f"{'items':<12}{'hpda':<12}{'lanes':<12}{'back':>5}{'p50 s':>8}{'p95 s':>8}{'max s':>8}", flush=True)
    try:
        for burst in (1, 4):
            cases = [("3:1", None), *((setting, flood) for setting in settings for flood in FLOODS)]
            for setting, flood in cases:
                found = measure(workers, setting, flood, items, burst)
                # an item that never came back was slower than all that did
                middle, high, longest = np.percentile([*found, *[np.inf] * (items - len(found))], (50, 95, 100), method="higher")
                rows[burst, flood, setting] = float(high), found
                title = "one by one" if burst == 1 else f"bursts of {burst}"
                name = setting if flood else "-"
                print(f"{title:<12}{flood or 'idle':<12}{name:<12}{len(found):>5}{middle:8.2f}{high:8.2f}{longest:8.2f}", flush=True)
    finally:
        workers.close()
    plot(rows, settings)
    result = {}
    for burst, prefix in ((1, ""), (4, "bursts_")):
        idle = rows[burst, None, "3:1"][0]
        shared, reserved = (max(rows[burst, flood, setting][0] for flood in FLOODS) for setting in ("3:1", "reserve 1"))
        result[f"{prefix}p95_minus_idle_in_foreign_tasks"] = round((shared - idle) / FOREIGN, 2)
        result[f"{prefix}p95_reserved_over_idle"] = round(reserved / idle, 2)
    print(json.dumps(result))


def plot(rows: dict[tuple[int, str | None, str], tuple[float, list[float]]], settings: list[str]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axis, burst in zip(figure.subplots(1, 2, sharey=True), (1, 4)):
        cases = [(None, "3:1"), *((flood, setting) for setting in settings for flood in FLOODS)]
        axis.boxplot([rows[burst, *case][1] or [np.nan] for case in cases], whis=(5, 95))
        axis.set_xticks(range(1, len(cases) + 1), [f"{flood}\n{setting}" if flood else "idle" for flood, setting in cases], fontsize=6)
        idle = rows[burst, None, "3:1"][0]
        axis.axhline(idle + FOREIGN, color="C1", label="idle p95 + one foreign task")
        axis.axhline(1.3 * idle, color="C2", label="1.3 x idle p95")
        axis.set(title="one by one" if burst == 1 else f"bursts of {burst}", ylabel="s from submit to result (5, 25, 50, 75, 95 %)")
        axis.legend(fontsize=7)
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "live_latency.png", dpi=90)


if __name__ == "__main__":
    main()
