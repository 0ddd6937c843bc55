"""Cost of the runner and the store: CPU of all processes against a plain loop, and a hundred thousand items through the window.

``python benchmarks/overhead.py [--quick] [--items 100000]``

1. Items of about 1 s of CPU (Fourier transforms, seeded) that give a micrograph of 2000 x 2000 float32 (16 MB). Ours: MapRunner on a local
   cluster of two workers, each item committed to a store. Plain: two processes, half of the items each, ``np.save`` and fsync. Both do
   the same ``process``. CPU is user + system of the whole tree of processes (driver with scheduler, nannies, workers), from an idle
   cluster to the end of the run. Five alternating pairs, the median of each arm.
2. ``runner_ms``: CPU of the whole tree per item for items that do nothing and commit nothing. ``commit_ms``: CPU of ``Generation.commit``
   of the 16 MB array in one process; ``save_ms``: the same for np.save and fsync.
3. Items that do nothing, through the window and by ``client.map`` of all of them, each in a process of its own with a fresh cluster of two
   workers: the tasks that the scheduler holds and the memory of its process over time, and the throughput (items a second of wall time;
   the ratio of CPU beside it, as the machine may be shared).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

OUT = Path(__file__).parent / "out"
SHAPE = (2000, 2000)
ROUNDS_OF_A_SECOND = 2300


def process(row: int, rounds: int) -> np.ndarray:
    """A micrograph `(y, x)` float32 from ``rounds`` Fourier transforms there and back."""
    import torch

    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(row)
    tile = torch.randn(250, 250, generator=g)
    for _ in range(rounds):
        tile = torch.fft.irfft2(torch.fft.rfft2(tile) * 0.999, s=(250, 250))
    return tile.repeat(8, 8).numpy()


@dataclass
class Commit:
    """A job of the map runner: the item's micrograph, committed."""

    folder: Path
    rounds: int

    def run(self, item: Any, brief: None, device: str, attempt: int) -> None:
        """Process and commit."""
        from cryodask.run.item_values import generation_at

        started = time.thread_time()
        micrograph = process(item.row, self.rounds)
        with open(self.folder / "process_seconds", "a", encoding="utf-8") as file:
            file.write(f"{time.thread_time() - started}\n")
        generation_at(str(self.folder)).commit(item.row, item.name, {"micrograph_sum": micrograph})

    def brief(self, item: Any, again: bool) -> None:
        """Nothing travels with an item."""

    def quarantine(self, item: Any, error: str, message: str, tries: int) -> None:
        """No item fails here."""
        raise RuntimeError(f"{item.name}: {error}: {message}")


@dataclass
class Nothing:
    """A job that does nothing."""

    def run(self, item: Any, brief: None, device: str, attempt: int) -> None:
        """Nothing."""

    def brief(self, item: Any, again: bool) -> None:
        """Nothing travels with an item."""

    def quarantine(self, item: Any, error: str, message: str, tries: int) -> None:
        """No item fails here."""
        raise RuntimeError(f"{item.name}: {error}: {message}")


def no_op(item: Any) -> None:
    """What ``client.map`` does with an item."""


def tree_seconds() -> float:
    """CPU seconds of this process and all below it, those that have ended included."""
    me = psutil.Process()
    total = 0.0
    for one in [me, *me.children(recursive=True)]:
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def make_store(folder: Path) -> Path:
    from cryodask.store.generation import Generation
    from cryodask.store.layouts import Grid

    shutil.rmtree(folder, ignore_errors=True)
    meta = {"stage": "motion", "version": 1, "params": {}, "recipes": {}, "inputs": {}}
    sizes = {"y": SHAPE[0], "x": SHAPE[1]}
    return Generation.create(folder, meta=meta, gives=("micrograph_sum",), per_item=True, grids={"": Grid(sizes, {})}).path


# --- 1: items of a second -----------------------------------------------------------------------------------------------------
def save(folder: Path, row: int, array: np.ndarray) -> None:
    with open(folder / f"{row}.npy", "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def plain_half(folder: Path, rows: list[int], rounds: int) -> None:
    """One process of the plain arm: ready, wait for the word, work, tell the CPU seconds."""
    process(0, 2)
    print("ready", flush=True)
    sys.stdin.readline()
    started, inside = time.process_time(), 0.0
    for row in rows:
        before = time.thread_time()
        micrograph = process(row, rounds)
        inside += time.thread_time() - before
        save(folder, row, micrograph)
    print(time.process_time() - started, inside, flush=True)


def plain(folder: Path, items: int, rounds: int) -> np.ndarray:
    """CPU seconds of the plain arm: all of it, and of that ``process``."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    halves = [
        subprocess.Popen(
            [sys.executable, __file__, "--plain", str(folder), str(half), str(items), str(rounds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for half in range(2)
    ]  # fmt: skip
    for one in halves:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in halves:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    return np.sum([[float(v) for v in one.communicate()[0].split()] for one in halves], 0)


def ours(client: Any, folder: Path, items: int, rounds: int) -> np.ndarray:
    """CPU seconds of the whole tree for the same through runner and store: all of it, and of that ``process``."""
    from cryodask.run.map import MapRunner
    from cryodask.store.project import Item

    job = Commit(make_store(folder), rounds)
    wait_until_idle(client)
    started = tree_seconds()
    counts = MapRunner(client, job).run(Item(row, f"item{row}", f"content {row}") for row in range(items))
    used = tree_seconds() - started
    assert counts["done"] == items, counts
    return np.array([used, np.loadtxt(job.folder / "process_seconds").sum()])


def wait_until_idle(client: Any) -> None:
    """Wait until no task is known and the workers' start is over."""
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        before, now = tree_seconds(), time.monotonic()
        time.sleep(1.0)
        if (tree_seconds() - before) / (time.monotonic() - now) < 0.3:
            return


def of_a_second(client: Any, folder: Path, items: int, pairs: int, rounds: int) -> np.ndarray:
    """CPU seconds `(pair, arm, all or process)`; the arm that goes first alternates."""
    ours(client, folder / "store", 4, 2)  # imports
    arms = [lambda: plain(folder / "plain", items, rounds), lambda: ours(client, folder / "store", items, rounds)]
    found = np.zeros((pairs, 2, 2))
    for pair in range(pairs):
        for arm in (0, 1) if pair % 2 == 0 else (1, 0):
            found[pair, arm] = arms[arm]()
    check_equal(folder, items)
    return found


def check_equal(folder: Path, items: int) -> None:
    import zarr

    array = zarr.open_array(folder / "store" / "micrograph_sum", mode="r")
    for row in range(items):
        assert np.array_equal(array[row], np.load(folder / "plain" / f"{row}.npy")), row


# --- 2: per item ----------------------------------------------------------------------------------------------------------------
def runner_seconds(client: Any, items: int) -> float:
    """CPU of the whole tree per item that does nothing."""
    from cryodask.run.map import MapRunner
    from cryodask.store.project import Item

    MapRunner(client, Nothing()).run(Item(row, f"item{row}", f"content {row}") for row in range(20))
    wait_until_idle(client)
    started = tree_seconds()
    MapRunner(client, Nothing()).run(Item(row, f"item{row}", f"content {row}") for row in range(items))
    return (tree_seconds() - started) / items


def commit_and_save_seconds(folder: Path, times: int) -> tuple[float, float]:
    """CPU of one commit, and of np.save with fsync, of the same array; medians of alternating turns."""
    from cryodask.store.generation import Generation

    generation = Generation(make_store(folder / "commits"))
    (folder / "saves").mkdir(parents=True, exist_ok=True)
    array = process(1, 2)
    commits, saves = [], []
    for turn in range(times + 2):
        started = time.process_time()
        generation.commit(turn, f"item{turn}", {"micrograph_sum": array})
        between = time.process_time()
        save(folder / "saves", turn, array)
        commits.append(between - started)
        saves.append(time.process_time() - between)
    generation.journal.close()
    return statistics.median(commits[2:]), statistics.median(saves[2:])


# --- 3: very many ---------------------------------------------------------------------------------------------------------------
def many(how: str, items: int) -> None:
    """In a process of its own: all items, and what the scheduler holds meanwhile; one JSON line."""
    from distributed import wait

    from cryodask.cluster.connect import _OWN_CLUSTERS, close, connect
    from cryodask.run.map import MapRunner
    from cryodask.store.project import Item

    client = connect("local", workers=2)
    scheduler = _OWN_CLUSTERS[id(client)][0].scheduler
    me, samples, over = psutil.Process(), [], threading.Event()
    MapRunner(client, Nothing()).run(Item(row, f"warm{row}", f"content {row}") for row in range(50))
    started, cpu = time.perf_counter(), tree_seconds()

    def look() -> None:
        while not over.is_set():
            samples.append((time.perf_counter() - started, len(scheduler.tasks), me.memory_info().rss))
            over.wait(0.1)

    looker = threading.Thread(target=look)
    looker.start()
    if how == "window":
        runner = MapRunner(client, Nothing())
        counts = runner.run(Item(row, f"item{row}", f"content {row}") for row in range(items))
        assert counts["done"] == items, counts
        window = runner.window
    else:
        futures = client.map(no_op, [Item(row, f"item{row}", f"content {row}") for row in range(items)], pure=False)
        wait(futures)
        window = 0
    wall, used = time.perf_counter() - started, tree_seconds() - cpu
    over.set()
    looker.join()
    step = max(1, len(samples) // 500)
    peak = max(s[1] for s in samples)
    close(client)
    print(json.dumps({"wall": wall, "cpu": used, "peak_tasks": peak, "window": window, "samples": samples[::step]}))


def in_a_process(how: str, items: int) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--many", how, str(items)], stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few short items, as a smoke test")
    parser.add_argument("--items", type=int, default=100_000, help="number of empty items")
    parser.add_argument("--only", choices=["second", "many"], help="run only this part")
    parser.add_argument("--plain", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--many", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        folder, half, items, rounds = arguments.plain
        plain_half(Path(folder), list(range(int(half), int(items), 2)), int(rounds))
        return
    if arguments.many:
        many(arguments.many[0], int(arguments.many[1]))
        return
    folder = OUT / "overhead" / "stages" / "motion"
    out: dict[str, Any] = {}
    try:
        if arguments.only != "many":
            out |= part_of_seconds(folder, quick=arguments.quick)
        if arguments.only != "second":
            out |= part_of_many(2000 if arguments.quick else arguments.items)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(out))


def part_of_seconds(folder: Path, *, quick: bool) -> dict[str, Any]:
    from cryodask.cluster.connect import close, connect

    rounds = 20 if quick else ROUNDS_OF_A_SECOND
    client = connect("local", workers=2)
    try:
        found = of_a_second(client, folder, 4 if quick else 20, 1 if quick else 5, rounds)
        each = runner_seconds(client, 100 if quick else 1000)
    finally:
        close(client)
    commit, saved = commit_and_save_seconds(folder, 3 if quick else 20)
    # process is the same in both arms, but on a shared machine its CPU time is not: so what is beside it is stated too
    beside = (found[:, 1, 0] - found[:, 1, 1] - found[:, 0, 0] + found[:, 0, 1]) / found[:, 0, 1]
    ratio = np.median(found[:, 1, 0]) / np.median(found[:, 0, 0]) - 1.0
    print(f"CPU s of {4 if quick else 20} items\n{'plain':>10}{'process':>10}{'ours':>10}{'process':>10}{'ratio':>8}{'beside process':>16}")
    for ((a, in_a), (b, in_b)), more in zip(found, beside):
        print(f"{a:10.2f}{in_a:10.2f}{b:10.2f}{in_b:10.2f}{b / a:8.3f}{more:16.3f}")
    print(f"an item: runner {1e3 * each:.2f} ms (whole tree), commit {1e3 * commit:.2f} ms, np.save and fsync {1e3 * saved:.2f} ms of CPU")
    return {
        "overhead_1s": round(float(ratio), 4), "beside_process_1s": round(float(np.median(beside)), 4),
        "runner_ms": round(1e3 * each, 3), "commit_ms": round(1e3 * commit, 3), "save_ms": round(1e3 * saved, 3),
    }  # fmt: skip


def part_of_many(items: int) -> dict[str, Any]:
    found = {how: in_a_process(how, items) for how in ("map", "window")}
    window, whole = found["window"], found["map"]
    print(f"{items} items that do nothing, two workers")
    print(f"{'':12}{'wall s':>9}{'items/s':>9}{'CPU ms':>9}{'tasks':>9}{'memory MB, first and last':>28}")
    for how, v in found.items():
        first, last = v["samples"][0][2] / 1e6, v["samples"][-1][2] / 1e6
        cpu = 1e3 * v["cpu"] / items
        print(f"{how:12}{v['wall']:9.1f}{items / v['wall']:9.0f}{cpu:9.2f}{v['peak_tasks']:9}{first:16.0f}{last:12.0f}")
    plot(found)
    assert window["peak_tasks"] <= window["window"] * 2, "the scheduler holds more than the window"
    return {
        "scheduler_peak_tasks": window["peak_tasks"], "throughput_ratio": round(whole["wall"] / window["wall"], 3),
        "cpu_ratio": round(window["cpu"] / whole["cpu"], 3),
    }  # fmt: skip


def plot(found: dict[str, dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for how, label in (("map", "client.map of all"), ("window", "MapRunner's window")):
        at, tasks, memory = np.array(found[how]["samples"]).T
        axes[0].semilogy(at, np.maximum(tasks, 1), label=label)
        axes[1].plot(at, memory / 1e6, label=label)
    axes[0].set(xlabel="time (s)", ylabel="tasks that the scheduler holds")
    axes[1].set(xlabel="time (s)", ylabel="memory of driver and scheduler (MB)", ylim=(0, None))
    axes[0].legend(frameon=False)
    figure.savefig(OUT / "overhead.png", dpi=90)


if __name__ == "__main__":
    main()
