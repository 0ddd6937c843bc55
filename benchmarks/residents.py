"""What runs leave in a worker's memory, and whether the number of threads changes a bit.

``python benchmarks/residents.py [--quick] [--runs 20]``

The same project (2D classes, then a refinement; 400 simulated particles of 48 pixels) is run again and again on one worker, each time in a
folder of its own: resident memory of the worker's process after each run, against that after the first. Then once more on a worker with
one thread and on one with four: bits that differ in any result of the two steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
from pathlib import Path

import dask
import numpy as np
import psutil
from distributed import Client

import cryodask
from cryodask.cluster import LaneCluster
from cryodask.cluster.local import local_environment
from cryodask.formats.mrc import write_mrc
from cryodask.simulate.particles import simulate_particles
from cryodask.store.project import Project

OUT = Path(__file__).parent / "out" / "residents"
PIPELINE = """name: {name}
inputs: {{particles: particles.star}}
pipeline:
  - classify2d: {{classes: 4, iterations: 3}}
  - refine3d: {{reference: start.mrc, symmetry: D2, iterations: 3, lowpass_angstrom: 30}}
"""


def prepare(count: int) -> None:
    """Particles, and a blob as the start of the refinement."""
    shutil.rmtree(OUT, ignore_errors=True)
    simulate_particles(OUT, count=count)
    z, y, x = np.ogrid[-24:24, -24:24, -24:24]
    write_mrc(OUT / "start.mrc", np.exp(-(z**2 / 180 + y**2 / 120 + x**2 / 60)).astype(np.float32), 5.5)


def run(name: str, client: Client) -> Project:
    """The project once, in a folder of its own."""
    path = OUT / f"{name}.yaml"
    path.write_text(PIPELINE.format(name=name))
    return cryodask.run_project(path, client, listen=[])


def resident_bytes(client: Client) -> int:
    """Of the worker's process."""
    client.run(gc.collect)
    return next(iter(client.run(lambda: psutil.Process().memory_info().rss).values()))


def contents(project: Project) -> dict[str, np.ndarray]:
    """Every array of the two steps."""
    out = {}
    for step in ("classify2d", "refine3d"):
        generation = project.generation(step)
        record = generation.committed()[0]
        for name in generation.meta["gives"]:
            out[f"{step}.{name}"] = np.ascontiguousarray(generation.read(record, name))
    return out


def differing_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> int:
    """Bits that are not the same in two sets of results."""
    assert a.keys() == b.keys()
    found = 0
    for name in a:
        left, right = (np.frombuffer(values[name].tobytes(), np.uint8) for values in (a, b))
        found += 8 * abs(len(left) - len(right)) if len(left) != len(right) else int(np.bitwise_count(left ^ right).sum())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="4 runs of 200 particles")
    asked = parser.parse_args()
    runs, count = (4, 200) if asked.quick else (asked.runs, 400)
    prepare(count)
    memory: list[int] = []
    results = {}
    for threads in (1, 4):
        with (
            dask.config.set(local_environment()),
            LaneCluster(n_workers=1, threads_per_worker=threads, dashboard_address=None) as cluster,
            Client(cluster) as client,
        ):
            results[threads] = contents(run(f"threads{threads}", client))
            if threads == 1:
                for number in range(runs):
                    run(f"run{number}", client)
                    memory.append(resident_bytes(client))
    growth = [one / memory[0] - 1 for one in memory]
    print("run   resident MB   growth")
    for number, (size, share) in enumerate(zip(memory, growth)):
        print(f"{number + 1:3d} {size / 1e6:13.1f} {100 * share:7.2f} %")
    bits = differing_bits(results[1], results[4])
    print(f"bits that differ between 1 and 4 threads: {bits}")
    plot(memory)
    print(json.dumps({"memory_growth_share": round(max(growth), 4), "differing_bits": bits, "runs": runs}))


def plot(memory: list[int]) -> None:
    """Save ``out/residents.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    axes.plot(range(1, len(memory) + 1), [size / 1e6 for size in memory], "o-")
    axes.axhline(1.05 * memory[0] / 1e6, color="grey", linestyle=":", label="5 % above the first")
    axes.set(xlabel="run", ylabel="worker's resident memory, MB", ylim=(0, None))
    axes.legend()
    figure.savefig(OUT.parent / "residents.png", dpi=120)


if __name__ == "__main__":
    main()
