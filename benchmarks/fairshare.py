"""Does every lane get its share of the workers, for any order of arrival and any kind of tasks? Compared with plain Dask.

``python benchmarks/fairshare.py [--quick] [--loads roots shuffle] [--weights 1:1 1:2:3]``: 16 slots (2 worker processes of 8 threads)
with tasks that sleep. One client floods 5,000 tasks first, the others follow 1 s later. A share is the part of the workers' time, by
their own start and stop of each task, in a window of 50 of the longest tasks that begins when all tasks are on the scheduler and the
first second has passed. All tasks come from one function, so that nothing can be learned of a lane from the names of its tasks.
Plain Dask runs the same loads once each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from _lanes import FAIR, OUT, PLAIN, THREADS, WORKERS, Workers, cluster, finish, in_memory, roots, shares, until_there, work
from distributed import Client

SECONDS, FIRST, LATER = 0.1, 5000, 2500
SLOTS = WORKERS * THREADS
Flood = Callable[[Client, float], Any]
"""Sends tasks; takes the fraction of all slots (0 to 1) that its lane should get, and returns what must be kept alive."""


def flood(client: Client, wanted: float, count: int = LATER, seconds: float = SECONDS) -> Any:
    return roots(client, count, seconds)


def flood_in_memory(client: Client, wanted: float, count: int = LATER) -> Any:
    return in_memory(client, count, SECONDS)


def flood_gpus(client: Client, wanted: float, count: int = LATER, seconds: float = SECONDS) -> Any:
    return roots(client, count, seconds, resources={"GPU": 1})


def flood_behind_a_gate(client: Client, wanted: float) -> Any:
    """Tasks with an input each, all of which become ready at one moment."""
    inputs = client.map(abs, range(FIRST), pure=False)
    finish(client, inputs)  # on a busy machine the gate would open when the window is over
    gate = client.submit(work, 3.0, pure=False)
    futures = client.map(work, [SECONDS] * FIRST, inputs, [gate] * FIRST, pure=False)
    until_there(client, futures[-1])
    return gate, futures


def flood_after_a_pause(client: Client, wanted: float) -> Any:
    finish(client, roots(client, 160, SECONDS))
    time.sleep(3.0)
    return flood(client, wanted)


def slow(block: np.ndarray) -> np.ndarray:
    time.sleep(SECONDS)
    return block + 1.0


def slow_sum(block: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    time.sleep(SECONDS)
    return block.sum(axis=axis, keepdims=keepdims)


def flood_reduction(client: Client, wanted: float) -> Any:
    """Sleeping blocks under a tree of sleeping sums."""
    blocks = _zeros(client).map_blocks(slow, dtype=float, meta=np.empty((0, 0)))
    total = da.reduction(blocks, slow_sum, slow_sum, axis=(0, 1), dtype=float, split_every=4, combine=slow_sum, meta=np.empty(()))
    return _computed(client, total)


def flood_xarray(client: Client, wanted: float) -> Any:
    blocks = xr.DataArray(_zeros(client), dims=("time", "y"))
    return _computed(client, xr.apply_ufunc(slow, blocks, dask="parallelized", output_dtypes=[float]).mean("time"))


def flood_shuffle(client: Client, wanted: float) -> Any:
    """A P2P shuffle with slow partitions on both sides, as many as pass in 8 s, so that the window sees both."""
    import pandas as pd
    from dask import dataframe as dd

    def read(number: int) -> pd.DataFrame:
        time.sleep(SECONDS)
        return pd.DataFrame({"k": np.arange(number, number + 50) % 97, "v": 1.0})

    def use(frame: pd.DataFrame) -> pd.DataFrame:
        time.sleep(SECONDS)
        return frame

    count = int(8.0 / 2 * SLOTS * wanted / SECONDS)
    meta = pd.DataFrame({"k": np.zeros(0, int), "v": np.zeros(0)})
    frame = dd.from_map(read, range(count), meta=meta).shuffle("k", npartitions=count, shuffle_method="p2p")
    return _computed(client, frame.map_partitions(use, meta=meta))


def _zeros(client: Client) -> da.Array:
    # a name of its own: equal arrays of two clients would be one set of tasks, paid for by the first of them
    return da.zeros((LATER, 4), chunks=(1, 4), name=f"zeros-{client.id}")


def _computed(client: Client, collection: Any) -> Any:
    future = client.compute(collection)
    future = future if hasattr(future, "key") else future.data  # xarray gives an array of its own around the future
    until_there(client, future)
    return future


@dataclass(frozen=True)
class Load:
    """What the first client sends, and what each of the others sends 1 s later."""

    first: Flood
    later: Flood
    longest: float = SECONDS
    gpus: int = 0
    """slots for GPU tasks on each worker; then these are what is shared"""
    pause: float = 1.0
    settle: float = 1.0
    kill: bool = False
    """kill -9 a worker after a third of the window"""
    weights: tuple[str, ...] = ("1:1", "1:3", "3:1", "1:2:3")
    modules: tuple[str, ...] = ()
    users: dict[str, float] = field(default_factory=dict)
    """weights of users x and y inside the first lane, who both flood"""


_first = partial(flood, count=FIRST)
LOADS = {
    "roots": Load(_first, flood),
    "in-memory": Load(partial(flood_in_memory, count=FIRST), flood_in_memory),
    "gpu": Load(partial(flood_gpus, count=FIRST), flood_gpus, gpus=2),
    "gpu-0.4-0.05": Load(partial(flood_gpus, count=FIRST, seconds=0.4), partial(flood_gpus, count=4000, seconds=0.05), 0.4, gpus=2),
    "0.4-0.05": Load(partial(flood, count=FIRST, seconds=0.4), partial(flood, count=8000, seconds=0.05), 0.4),
    "late-ready": Load(flood_behind_a_gate, flood, settle=3.0),
    "reduction": Load(_first, flood_reduction, modules=("dask.array",)),
    "comes-back": Load(_first, flood_after_a_pause, settle=0.5),
    "alone-first": Load(partial(flood_in_memory, count=FIRST), flood, pause=2.0, settle=0.0),
    "shuffle": Load(_first, flood_shuffle, modules=("dask.dataframe", "distributed.shuffle"), weights=("1:1", "1:3", "3:1")),
    "xarray": Load(_first, flood_xarray, modules=("xarray", "dask.array"), weights=("1:1", "1:3", "3:1")),
    "users-2:1": Load(_first, flood, weights=("1:1",), users={"x": 2, "y": 1}),
    "worker-killed": Load(_first, flood, kill=True, weights=("1:1", "1:3")),
}


def wanted_of(load: Load, weights: str) -> dict[str, float]:
    """Percent of the slots by client, the first one first."""
    parts = [float(w) for w in weights.split(":")]
    wanted = {f"{lane}/x": 100 * part / sum(parts) for lane, part in zip("ABC", parts)}
    if load.users:
        whole = wanted.pop("A/x")
        wanted = {**{f"A/{user}": whole * w / sum(load.users.values()) for user, w in load.users.items()}, **wanted}
    return wanted


def measure(workers: Workers, kind: str, load: Load, weights: str, tasks: int) -> dict[str, float]:
    """Percent of the workers' time by client, over a window of ``tasks`` of the longest tasks."""
    wanted = wanted_of(load, weights)
    options: dict[str, Any] = {"lanes": {lane: float(w) for lane, w in zip("ABC", weights.split(":"))}}
    if load.users:
        options["lanes"]["A"] = {"weight": options["lanes"]["A"], "users": load.users}
    resources = {"GPU": float(load.gpus)} if load.gpus else None
    with (
        cluster(workers, kind, wanted, resources=resources, modules=load.modules, **options) as made,
        ThreadPoolExecutor(len(wanted)) as pool,
    ):
        name, *others = wanted
        kept = [load.first(made.clients[name], wanted[name] / 100)]
        time.sleep(load.pause)
        kept += pool.map(lambda other: load.later(made.clients[other], wanted[other] / 100), others)
        time.sleep(load.settle)
        begin = time.time()
        end = begin + tasks * load.longest
        if load.kill:
            time.sleep((end - begin) / 3)
            workers.kill(1)
        # what runs when the window ends is known when it has finished
        time.sleep(max(0.0, end - time.time()) + 1.5 * load.longest + 0.3)
        found = shares(made.log(), begin, end, wanted)
        del kept
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1:3 on four loads and windows of 20 tasks, as a smoke test")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS), metavar="LOAD", help=", ".join(LOADS))
    parser.add_argument("--weights", nargs="+", default=["1:1", "1:3", "3:1", "1:2:3"], help="weights to run, of those defined for a load")
    parser.add_argument("--no-plain", action="store_true", help="without plain Dask")
    arguments = parser.parse_args()
    names, chosen, tasks = arguments.loads, arguments.weights, 50
    if arguments.quick:
        names, chosen, tasks = [n for n in ("roots", "in-memory", "gpu", "shuffle") if n in names], ["1:3"], 20
    print(f"{'load':<15}{'weights':<9}{'wanted':<26}{'with lanes':<26}{'error':>6}   plain Dask", flush=True)
    workers, rows = Workers(), []
    try:
        for name in names:
            load, plain = LOADS[name], {}
            for weights in [w for w in load.weights if w in chosen]:
                if not plain and not arguments.no_plain:
                    plain = measure(workers, PLAIN, load, weights, tasks)
                    shown = _text(plain)
                found, wanted = measure(workers, FAIR, load, weights, tasks), wanted_of(load, weights)
                error = max(abs(found[n] - wanted[n]) for n in wanted)
                rows.append({"load": name, "weights": weights, "wanted": wanted, "found": found, "error": error, "plain": plain})
                print(f"{name:<15}{weights:<9}{_text(wanted):<26}{_text(found):<26}{error:6.1f}   {shown if plain else ''}", flush=True)
                shown = '"'
    finally:
        workers.close()
    plot(rows)
    result = {f"{r['load']} {r['weights']}": {n: round(v, 1) for n, v in r["found"].items()} for r in rows}
    print(json.dumps({"largest_share_error_points": round(max(r["error"] for r in rows), 1), "shares": result}))


def _text(values: dict[str, float]) -> str:
    return " : ".join(f"{v:.1f}" for v in values.values())


def plot(rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.0 + 0.26 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    for position, row in enumerate(rows):
        for axis, values in ((left, row["found"]), (right, row["plain"])):
            begin = 0.0
            for number, value in enumerate(values.values()):
                axis.barh(position, value, left=begin, color=f"C{number}", height=0.75)
                begin += value
        for edge in np.cumsum(list(row["wanted"].values()))[:-1]:
            left.plot([edge, edge], [position - 0.45, position + 0.45], color="k")
            right.plot([edge, edge], [position - 0.45, position + 0.45], color="k")
    left.set_yticks(range(len(rows)), [f"{r['load']} {r['weights']}" for r in rows], fontsize=7)
    left.invert_yaxis()
    left.set(xlabel="% of the workers' time (bars) and of the weights (lines)", title="with lanes")
    right.set(xlabel="%", title="plain Dask, same load")
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "fairshare.png", dpi=90)


if __name__ == "__main__":
    main()
