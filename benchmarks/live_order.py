"""Order of movies: a model of one day of a watched session, with cryodask's own order of work.

``python benchmarks/live_order.py [--seeds 5]``

About 3,800 movies arrive in 24 h (183 an hour, with pauses at new squares); four slots take 48 to 75 s per movie; processing stops from
10:00 to 11:30, and half the slots are lost from 15:00 to 18:00. "oldest" takes the movies in the order of their arrival, "newest" is
``cryodask.run.backlog``; with ``again``, 600 movies are put back at noon by a changed parameter. Latency is from arrival to result; a
moment is stale when the newest result is of a movie that arrived more than 5 minutes before the newest one.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from cryodask.run.backlog import Backlog
from cryodask.store.project import Item

OUT = Path(__file__).parent / "out"
HOUR, STEP_SECONDS = 3600.0, 5.0
SLOTS, NIGHT = 4, 24 * HOUR


@dataclass(frozen=True)
class Day:
    """What came of it; minutes, and the share of the day in which the newest result was old."""

    done: int
    median_minutes: float
    p95_minutes: float
    longest_minutes: float
    stale_share: float


class _InOrder:
    """As they came; those to be made again before all others, as they stand first in the registry."""

    def __init__(self) -> None:
        self._queue: deque[Item] = deque()

    def add(self, items: list[Item]) -> None:
        self._queue.extend(items)

    def add_again(self, items: list[Item]) -> None:
        self._queue.extendleft(reversed(items))

    def take(self) -> Item | None:
        return self._queue.popleft() if self._queue else None


def arrivals(rng: random.Random) -> list[float]:
    """Moments of arrival, s."""
    now, out = 0.0, []
    while now < NIGHT:
        now += rng.expovariate(183 / HOUR * 1.25) + (rng.uniform(120, 420) if rng.random() < 1 / 40 else 0.0)
        out.append(now)
    return [moment for moment in out if moment < NIGHT]


def slots_at(moment: float) -> int:
    """Movies that are processed at the same time."""
    hour = moment / HOUR
    return 0 if 10 <= hour < 11.5 else SLOTS // 2 if 15 <= hour < 18 else SLOTS


def day(order: str, seed: int, again: int = 0) -> Day:
    """One day with an order of work."""
    rng = random.Random(seed)
    came = arrivals(rng)
    waiting = Backlog() if order == "newest" else _InOrder()
    busy: list[tuple[float, int]] = []
    latency: dict[int, float] = {}
    now, seen, newest, stale, moments = 0.0, 0, 0.0, 0, 0
    while len(latency) < len(came):
        new = []
        while seen < len(came) and came[seen] <= now:
            new.append(Item(row=seen, name="", inputs={}, content=""))
            seen += 1
        waiting.add(new)
        if again and now >= 12 * HOUR:
            back = [Item(row=-1 - i, name="", inputs={}, content="") for i in range(again)]
            if isinstance(waiting, Backlog):
                waiting._again.extend(back)
            else:
                waiting.add_again(back)
            again = 0
        while busy and busy[0][0] <= now:
            when, row = heapq.heappop(busy)
            if row >= 0:
                latency[row] = when - came[row]
                newest = max(newest, came[row])
        while len(busy) < slots_at(now) and (item := waiting.take()) is not None:
            heapq.heappush(busy, (now + 60.0 * rng.uniform(0.8, 1.25), item.row))
        if newest and now < NIGHT:
            moments += 1
            stale += came[seen - 1] - newest > 300
        now += STEP_SECONDS
    minutes = sorted(seconds / 60 for seconds in latency.values())
    return Day(len(minutes), statistics.median(minutes), minutes[int(0.95 * (len(minutes) - 1))], minutes[-1], stale / moments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    line: dict[str, float] = {}
    print(f"{'order':10} {'again':>6} {'median':>8} {'p95':>8} {'longest':>8}  min   stale, % of the day")
    rows = []
    for order in ("oldest", "newest"):
        for again in (0, 600):
            days = [day(order, seed, again) for seed in seeds]
            mean = {name: statistics.mean(getattr(d, name) for d in days) for name in Day.__dataclass_fields__}
            row = mean["median_minutes"], mean["p95_minutes"], mean["longest_minutes"], 100 * mean["stale_share"]
            print(f"{order:10} {again:6d} {row[0]:8.1f} {row[1]:8.1f} {row[2]:8.1f} {row[3]:20.1f}")
            rows.append((f"{order}\n{again} again" if again else order, row))
            label = f"{order}_again" if again else order
            line |= {f"{label}_median_minutes": round(row[0], 2), f"{label}_stale_share": round(row[3] / 100, 3)}
    plot(rows)
    print(json.dumps(line))


def plot(rows: list[tuple[str, tuple[float, float, float, float]]]) -> None:
    """Save ``out/live_order.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    names = [name for name, _ in rows]
    left.bar(names, [row[0] for _, row in rows])
    left.set(ylabel="median latency, min", yscale="log")
    right.bar(names, [row[3] for _, row in rows])
    right.set(ylabel="newest result older than 5 min, % of the day")
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "live_order.png", dpi=120)


if __name__ == "__main__":
    main()
