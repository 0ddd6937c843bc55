"""Cost of lanes: CPU of the scheduler process, and speed and transfers of dask.array, against plain Dask.

``python benchmarks/scheduler_cost.py [--quick] [--pairs 7] [--only cpu|guarded|array]``

1. CPU (user + system) of the scheduler process for 20,000 tasks that do nothing, on 2 real worker processes of 4 threads, from connected
   clients to the last result: without start-up. Roots, and chains of two. One lane against plain Dask with one client, two lanes against
   plain Dask with two. The two of a pair are fresh processes that run at the same time, both schedulers on the same core: on a shared
   machine whose speed varies by half within minutes, runs one after the other differ by a fifth, and these by a few percent. A ratio is
   that of the medians, its spread that of the pairs. Where ``perf`` can count them, also instructions of that process.
   The guarded rows are the same with certificates: a guarded scheduler against a plain one, both over TLS. Limits: 1.05 and 1.10.
2. dask.array (a reduction, a rechunk, map_overlap): wall seconds, and bytes that the workers received from each other, again with one
   client and with two that compute at the same time. Both clusters are there, and compute in turn, nine times a pair; medians. Single
   computations differ by a third.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from uuid import uuid4

import dask.array as da
import psutil
from _lanes import FAIR, KINDS, OUT, OWNER, PLAIN, Cluster, Workers, cluster, counted, finish, in_turn
from dask._task_spec import Task, TaskRef
from distributed import Client, Scheduler

LANES = {"A": 1, "B": 1}
NAMES = {"one_lane": ("A/x",), "two_lanes": ("A/x", "B/x")}
PEOPLE = {"one_lane": ("A/anna",), "two_lanes": ("A/anna", "B/bert")}


Send = Callable[[Client, int], list[Any]]
"""Sends this many tasks."""


def noop(value: Any) -> Any:
    return value


def cpu_seconds(dask_scheduler: Scheduler) -> float:
    """Of the scheduler process until now."""
    return time.process_time()


def send_roots(client: Client, count: int) -> list[Any]:
    return client.map(noop, range(count), pure=False)


def send_chains(client: Client, count: int) -> list[Any]:
    # one graph: the order of two maps would depend on which of the clients' graphs comes first
    first, second = f"first-{uuid4()}", f"second-{uuid4()}"
    graph: dict[Any, Any] = {(first, i): Task((first, i), noop, i) for i in range(count // 2)}
    graph |= {(second, i): Task((second, i), noop, TaskRef((first, i))) for i in range(count // 2)}
    return client.get(graph, [(second, i) for i in range(count // 2)], sync=False)


def process_id(dask_scheduler: Scheduler) -> int:
    """Of the scheduler."""
    return os.getpid()


@contextmanager
def both(
    workers: dict[str, Workers], names: tuple[str, ...], number: int, modules: tuple[str, ...] = (), certificates: str | None = None
) -> Iterator[dict[str, Cluster]]:
    """A plain cluster and one with lanes; which of them starts first changes from pair to pair."""
    with ExitStack() as stack:
        made = {}
        for kind in in_turn(number):
            options = {} if kind == PLAIN else {"lanes": LANES}
            made[kind] = stack.enter_context(
                cluster(workers[kind], kind, names, record=False, modules=modules, certificates=certificates, **options)
            )
        yield made


def costs(
    workers: dict[str, Workers], names: tuple[str, ...], number: int, send: Send, tasks: int, certificates: str | None = None
) -> dict[str, dict[str, float]]:
    """CPU seconds, and instructions, of both scheduler processes, which run at the same time on the same core."""
    core = min(os.sched_getaffinity(0))
    with both(workers, names, number, certificates=certificates) as made:
        processes = {kind: one.ask(process_id) for kind, one in made.items()}
        for process in processes.values():
            psutil.Process(process).cpu_affinity([core])
        time.sleep(1.0)
        with ExitStack() as stack, ThreadPoolExecutor(len(made)) as pool:
            instructions = {kind: stack.enter_context(counted(process)) for kind, process in processes.items()}
            # what was computed is kept until both have ended: to forget it would cost the other one time
            spent = {kind: pool.submit(spend, one, send, tasks // len(names)) for kind, one in made.items()}
            seconds = {kind: future.result()[0] for kind, future in spent.items()}
        return {kind: {"seconds": seconds[kind]} | instructions[kind] for kind in made}


def spend(made: Cluster, send: Send, tasks: int) -> tuple[float, list[Any]]:
    """CPU seconds of the scheduler for tasks of every client, and what they computed."""
    before = made.ask(cpu_seconds)
    sent = [send(client, tasks) for client in made.clients.values()]
    for client, futures in zip(made.clients.values(), sent):
        finish(client, futures)
    return made.ask(cpu_seconds) - before, sent


def reduction(seed: int) -> da.Array:
    return (da.random.default_rng(seed).random((6000, 6000), chunks=300) ** 2).mean(axis=0).sum()


def rechunk(seed: int) -> da.Array:
    # tasks, because what P2P sends is not in the workers' counts of transfers
    return da.random.default_rng(seed).random((4000, 4000), chunks=(200, 4000)).rechunk((4000, 200), method="tasks").sum()


def map_overlap(seed: int) -> da.Array:
    return da.random.default_rng(seed).random((4000, 4000), chunks=400).map_overlap(noop, depth=20, boundary="reflect").sum()


ARRAYS = {"reduction": reduction, "rechunk": rechunk, "map_overlap": map_overlap}


def received(dask_worker: Any) -> int:
    """Bytes that a worker got from others since it was asked last."""
    log = dask_worker.transfer_incoming_log
    assert len(log) < log.maxlen, "the log of transfers is full: some are forgotten"
    total = sum(entry["total"] for entry in log)
    log.clear()
    return total


def compute(made: Cluster, build: Callable[[int], da.Array]) -> tuple[float, float]:
    """Wall seconds and bytes moved when all clients compute at once."""
    first = next(iter(made.clients.values()))
    first.run(received)
    started = time.perf_counter()
    with ThreadPoolExecutor(len(made.clients)) as pool:
        # a seed each: equal arrays of two clients would be one set of tasks
        list(pool.map(lambda seed, client: client.compute(build(seed)).result(), range(len(made.clients)), made.clients.values()))
    return time.perf_counter() - started, sum(first.run(received).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair of 2,000 tasks, as a smoke test")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of clusters of each kind")
    parser.add_argument("--only", choices=["cpu", "guarded", "array"], help="run only this part")
    arguments = parser.parse_args()
    pairs, tasks, turns = (1, 2000, 1) if arguments.quick else (arguments.pairs, 20_000, 9)
    workers = {kind: Workers(threads=4) for kind in KINDS}
    try:
        ratios = {name: cpu(workers, name, pairs, tasks) if arguments.only in (None, "cpu") else {} for name in NAMES}
        secured = guarded(workers, pairs, tasks) if arguments.only in (None, "guarded") else {}
        found = {name: array(workers, name, pairs, turns) if arguments.only in (None, "array") else {} for name in NAMES}
    finally:
        for those in workers.values():
            those.close()
    plot(ratios, found)
    result: dict[str, Any] = {}
    for measure, what in (("cpu", "seconds"), ("instructions", "instructions")):
        for name in NAMES:
            each = [r[what]["ratio"] for r in ratios[name].values() if what in r]
            result |= {f"{measure}_ratio_{name}": max(each)} if each else {}
    for name, those in secured.items():
        result[f"cpu_ratio_guarded_{name}"] = max(r["seconds"]["ratio"] for r in those.values())
    result["cpu"] = ratios
    result["guarded"] = secured
    result["array"] = found
    print(json.dumps(result))


def guarded(workers: dict[str, Workers], pairs: int, tasks: int) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Ratios of CPU seconds over TLS with certificates, for one person and for two."""
    from cryodask.cluster.access.tls import Authority

    with tempfile.TemporaryDirectory() as folder:
        authority = Authority.create(f"{folder}/authority", owner=OWNER, cluster="benchmark")
        for who in ("anna", "bert"):
            authority.invite(who, [], address="tls://127.0.0.1:1")
        return {name: cpu(workers, name, pairs, tasks, str(authority.folder)) for name in PEOPLE}


def cpu(
    workers: dict[str, Workers], name: str, pairs: int, tasks: int, certificates: str | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """Ratios of CPU seconds and of instructions by kind of tasks, with the spread of the pairs."""
    result = {}
    for title, send in (("roots", send_roots), ("chains", send_chains)):
        spent: dict[str, list[dict[str, float]]] = {PLAIN: [], FAIR: []}
        for number in range(pairs):
            for kind, found in costs(workers, (PEOPLE if certificates else NAMES)[name], number, send, tasks, certificates).items():
                spent[kind].append(found)
        of = {what: {kind: [run[what] for run in spent[kind] if what in run] for kind in spent} for what in ("seconds", "instructions")}
        result[title] = {what: ratio_of(of[what][FAIR], of[what][PLAIN]) for what in of if of[what][PLAIN]}
        plain, ours = (" ".join(f"{seconds:.2f}" for seconds in of["seconds"][kind]) for kind in (PLAIN, FAIR))
        print(
            f"{name:<10}{title:<8}{'guarded' if certificates else '':<8}"
            + "  ".join(f"{what} {_text(ratio)}" for what, ratio in result[title].items())
            + f"   plain {plain} s, lanes {ours} s",
            flush=True,
        )
    return result


def array(workers: dict[str, Workers], name: str, pairs: int, turns: int) -> dict[str, dict[str, float]]:
    """Ratios of wall time and of bytes moved by kind of array."""
    runs: dict[str, dict[str, list[tuple[float, float]]]] = {title: {kind: [] for kind in KINDS} for title in ARRAYS}
    for number in range(pairs):
        with both(workers, NAMES[name], number, modules=("dask.array",)) as made:
            for one in made.values():
                compute(one, reduction)  # imports
            for title, build in ARRAYS.items():
                for turn in range(turns):
                    for kind in in_turn(number + turn):
                        runs[title][kind].append(compute(made[kind], build))
    result = {}
    for title, found in runs.items():
        wall, moved = (ratio_of(*([run[i] for run in found[kind]] for kind in (FAIR, PLAIN))) for i in (0, 1))
        result[title] = {"wall": wall["ratio"], "bytes": moved["ratio"], "wall_from": wall["from"], "wall_to": wall["to"],
                         "bytes_from": moved["from"], "bytes_to": moved["to"]}  # fmt: skip
        seconds, size = (statistics.median(run[i] for run in found[PLAIN]) for i in (0, 1))
        print(f"{name:<10}{title:<12}wall {_text(wall)}  bytes {_text(moved)}   plain {seconds:.2f} s, {size / 1e6:.1f} MB", flush=True)
    return result


def ratio_of(ours: list[float], plain: list[float]) -> dict[str, float]:
    """Of medians, and the smallest and largest ratio of a pair."""
    each = [a / max(b, 1e-9) for a, b in zip(ours, plain)]
    middle = statistics.median(ours) / max(statistics.median(plain), 1e-9)
    return {"ratio": round(middle, 3), "from": round(min(each), 3), "to": round(max(each), 3)}


def _text(found: dict[str, float]) -> str:
    return f"{found['ratio']:.3f} ({found['from']:.3f} to {found['to']:.3f})"


def plot(ratios: dict[str, dict[str, dict[str, dict[str, float]]]], found: dict[str, dict[str, dict[str, float]]]) -> None:
    from matplotlib.figure import Figure

    bars = [
        (f"CPU {what}, {title}", name, r["ratio"], r["from"], r["to"])
        for what in ("seconds", "instructions")
        for name in NAMES
        for title, measured in ratios[name].items()
        for r in ([measured[what]] if what in measured else [])
    ]
    for what in ("wall", "bytes"):
        bars += [
            (f"{what}, {title}", name, r[what], r[f"{what}_from"], r[f"{what}_to"]) for name in NAMES for title, r in found[name].items()
        ]
    titles = list(dict.fromkeys(title for title, *_ in bars))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for title, name, ratio, low, high in bars:
        offset = list(NAMES).index(name)
        axis.bar(
            titles.index(title) + 0.4 * offset,
            ratio,
            0.36,
            color=f"C{offset}",
            label=name.replace("_", " ") if title == titles[0] else None,
        )
        axis.plot([titles.index(title) + 0.4 * offset] * 2, [low, high], color="k")
    axis.set_xticks(range(len(titles)), titles, rotation=30, ha="right", fontsize=8)
    axis.axhline(1.0, color="k", linewidth=0.8)
    axis.set(ylabel="with lanes / plain Dask (line: pairs)")
    axis.legend()
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "scheduler_cost.png", dpi=90)


if __name__ == "__main__":
    main()
