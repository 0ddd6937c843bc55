"""Two hundred workers and fifty thousand items: does the runner's window keep pace, and how many tasks are on the scheduler meanwhile?

``python benchmarks/scale.py [--quick] [--pairs 1] [--workers 200] [--items 50000]``: each run is a process of its own that holds a
scheduler, 200 workers of one thread and the client. Items do nothing. Ours: ``MapRunner`` on a scheduler with lanes; plain: ``client.map``
of all items on Dask's own scheduler. The two of a pair run at the same time, on a core each, and change cores every second: on a shared
machine whose cores differ by a tenth, and whose speed varies by half within minutes, nothing else can be compared. A pair takes 3 to 6
minutes. Throughput is items a second of wall time, its ratio the median of the pairs (beside it the ratios of CPU and, where ``perf`` can
count them, of instructions); the tasks that the scheduler holds and the memory of the process are sampled five times a second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import dask
import psutil
from _lanes import FAIR, KINDS, OUT, PLAIN, counted, in_turn
from distributed import Client, Scheduler, Worker, wait


class Nothing:
    """A job of the map runner that does nothing."""

    def brief(self, item: Any, again: bool) -> None:
        """Nothing travels."""

    def run(self, item: Any, brief: None, device: str, attempt: int) -> None:
        """Nothing."""

    def quarantine(self, item: Any, error: str, message: str, tries: int) -> None:
        """Never."""
        raise AssertionError(message)


def no_op(item: Any) -> None:
    """Nothing."""


def one_run(kind: str, workers: int, items: int) -> dict[str, Any]:
    """In a process of its own: all items, and what the scheduler holds meanwhile."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    scheduler = asyncio.run_coroutine_threadsafe(_cluster(kind, workers), loop).result(300)
    client = Client(scheduler.address, name="batch/scale")
    client.wait_for_workers(workers)
    wait(client.map(no_op, range(4 * workers), pure=False))
    me, samples, over = psutil.Process(), [], threading.Event()
    started = time.perf_counter()

    def look() -> None:
        while not over.is_set():
            samples.append((time.perf_counter() - started, len(scheduler.tasks), me.memory_info().rss))
            over.wait(0.2)

    looker = threading.Thread(target=look)
    looker.start()
    with counted(os.getpid()) as instructions:
        begun, cpu = time.perf_counter(), time.process_time()
        window = _send_all(kind, client, items)
        wall, used = time.perf_counter() - begun, time.process_time() - cpu
    over.set()
    looker.join()
    step = max(1, len(samples) // 300)
    return {"wall": wall, "cpu": used, "window": window, "peak": max(s[1] for s in samples), "samples": samples[::step]} | instructions


def _send_all(kind: str, client: Client, items: int) -> int:
    from cryodask.run.map import MapRunner
    from cryodask.store.project import Item

    source = (Item(row, f"item{row}", f"content {row}") for row in range(items))
    if kind == PLAIN:
        wait(client.map(no_op, list(source), pure=False))
        return 0
    runner = MapRunner(client, Nothing())
    counts = runner.run(source)
    assert counts["done"] == items, counts
    return runner.window


async def _cluster(kind: str, workers: int) -> Scheduler:
    from cryodask.cluster import FairShareScheduler
    from cryodask.cluster.environment import SETTINGS

    dask.config.set(SETTINGS)
    dask.config.set({"distributed.worker.memory.terminate": False, "distributed.worker.memory.pause": False})
    options = {"lanes": {"batch": 1, "live": 3}} if kind == FAIR else {}
    scheduler = await (FairShareScheduler if kind == FAIR else Scheduler)(dashboard=False, host="127.0.0.1", port=0, **options)
    # a few at a time: two hundred registrations at once run into the time limits of connections
    for start in range(0, workers, 20):
        some = [
            Worker(scheduler.address, nthreads=1, name=f"w{start + i}", dashboard=False, memory_limit=0, host="127.0.0.1")
            for i in range(min(20, workers - start))
        ]
        await asyncio.gather(*some)
        _KEPT.extend(some)
    return scheduler


_KEPT: list[Worker] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 workers and 2,000 items once, as a smoke test")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    workers, items, pairs = (20, 2000, 1) if arguments.quick else (arguments.workers, arguments.items, arguments.pairs)
    if arguments.one:
        print(json.dumps(one_run(arguments.one, workers, items)), flush=True)
        return
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    print(f"{'':<8}{'items/s':>9}{'CPU s':>8}{'peak tasks':>12}{'memory grew MB':>16}")
    for number in range(pairs):
        begun = {}
        for kind in in_turn(number):
            command = [sys.executable, "-W", "ignore", __file__, "--one", kind, "--workers", str(workers), "--items", str(items)]
            begun[kind] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        exchange_cores(list(begun.values()))
        for kind, process in begun.items():
            said = process.communicate()[0]
            if process.returncode:
                raise RuntimeError(f"{kind}: the run ended with {process.returncode}")
            found = json.loads(said.splitlines()[-1])
            runs[kind].append(found)
            grew = max(s[2] for s in found["samples"]) - found["samples"][0][2]
            print(f"{kind:<8}{items / found['wall']:9.0f}{found['cpu']:8.1f}{found['peak']:12}{grew / 1e6:16.0f}", flush=True)
    plot(runs)
    ratios = [round(plain["wall"] / ours["wall"], 3) for plain, ours in zip(runs[PLAIN], runs[FAIR])]
    counts = {kind: [run["instructions"] for run in runs[kind] if "instructions" in run] for kind in KINDS}
    cpu = {kind: statistics.median(run["cpu"] for run in runs[kind]) for kind in KINDS}
    ours = runs[FAIR]
    print(
        json.dumps(
            {
                "throughput_ratio": round(statistics.median(ratios), 3),
                "pairs": ratios,
                "cpu_ratio": round(cpu[FAIR] / cpu[PLAIN], 3),
                **({"instructions_ratio": round(sum(counts[FAIR]) / sum(counts[PLAIN]), 3)} if counts[PLAIN] else {}),
                "scheduler_peak_tasks": max(run["peak"] for run in ours),
                "window": ours[0]["window"],
            }
        )
    )


def exchange_cores(processes: list[subprocess.Popen[str]]) -> None:
    """Every second, until one of them has ended."""
    cores = sorted(os.sched_getaffinity(0))
    while all(process.poll() is None for process in processes):
        for core, process in zip(itertools.cycle(cores), processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                for thread in psutil.Process(process.pid).threads():
                    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                        os.sched_setaffinity(thread.id, {core})
        cores = cores[1:] + cores[:1]
        time.sleep(1)


def plot(runs: dict[str, list[dict[str, Any]]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    tasks, memory = figure.subplots(1, 2)
    for kind, title, colour in ((PLAIN, "client.map, plain Dask", "C7"), (FAIR, "map runner, lanes", "C0")):
        for number, run in enumerate(runs[kind]):
            seconds, held, resident = zip(*run["samples"])
            tasks.plot(seconds, held, color=colour, label=None if number else title)
            memory.plot(seconds, [(r - resident[0]) / 1e6 for r in resident], color=colour)
    tasks.set(xlabel="s", ylabel="tasks that the scheduler holds", yscale="log")
    memory.set(xlabel="s", ylabel="memory above the start, MB")
    tasks.legend()
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "scale.png", dpi=90)


if __name__ == "__main__":
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    main()
