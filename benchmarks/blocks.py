"""Iterations over blocks: bit-identity for any number of workers, the cost of a worker's death, and traffic between workers.

``python benchmarks/blocks.py [--quick]``: 20,000 simulated particles of 32 px in a store, classify2d on 1, 2 and 4 local workers, and
once more on 4 of which one is killed (kill -9) in mid-iteration. Every expectation and every loading of a block is counted where it
happens. Bytes are those that workers report to have received from each other (distributed's log of incoming transfers), an
iteration, against ``cryodask.run.leaves.traffic``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed import Client

from cryodask.cluster.connect import close, connect
from cryodask.kernels.expectation import ctf_values
from cryodask.kernels.fourier import centred_ifft2
from cryodask.kernels.orientations import random_rotations
from cryodask.kernels.projection import fourier_volume, half_plane, slices
from cryodask.run.blocks import iterate_on_workers
from cryodask.run.checkpoints import read_state
from cryodask.run.leaves import cut_leaves, home_of_leaves, settle, traffic
from cryodask.run.particles import StoredParticles
from cryodask.stage import Columns, Context, ParticleBlock, ParticleSet, State, Sums
from cryodask.stages.classify2d import Classify2DParams, classify2d
from cryodask.store.generation import Generation
from cryodask.store.identity import make_ids
from cryodask.store.layouts import Grid
from cryodask.store.particles import ImagePlaces

OUT = Path(__file__).parent / "out"
PIXEL, BOX, PER_MICROGRAPH = 5.0, 32, 500


class Counted:
    """The functions of classify2d; what is done is noted in a file, one line each."""

    halves = classify2d.functions.halves
    start = staticmethod(classify2d.functions.start)
    cache_key = staticmethod(classify2d.functions.cache_key)
    prepare = staticmethod(classify2d.functions.prepare)
    maximise = staticmethod(classify2d.functions.maximise)
    finished = staticmethod(classify2d.functions.finished)
    result = staticmethod(classify2d.functions.result)

    def __init__(self, log: Path) -> None:
        self.log = log

    def note(self, **what: Any) -> None:
        """One line, whoever writes: short appends of several processes do not mix."""
        with open(self.log, "ab", buffering=0) as file:
            file.write(json.dumps({**what, "pid": os.getpid()}).encode() + b"\n")

    def load(self, params: Any, state: State, block: ParticleBlock, context: Context) -> Any:
        """As the stage's, noted."""
        self.note(event="load", first=int(block.index[0]), iteration=state["iteration"])
        return classify2d.functions.load(params, state, block, context)

    def expect(self, params: Any, state: State, shared: Any, block: Any, previous: Columns, context: Context) -> tuple[Sums, Columns]:
        """As the stage's, noted before and after."""
        self.note(event="expect", first=int(block.index[0]), iteration=state["iteration"])
        cpu = time.process_time()
        sums, columns = classify2d.functions.expect(params, state, shared, block, previous, context)
        size = sum(int(getattr(v, "nbytes", 8)) for v in sums.values())
        each = sum(v.nbytes for v in columns.values()) // len(block.index)
        self.note(event="done", first=int(block.index[0]), iteration=state["iteration"], sums=size, columns=each,
                  cpu=time.process_time() - cpu)  # fmt: skip
        return sums, columns


def simulate(folder: Path, count: int, seed: int = 0) -> StoredParticles:
    """Projections of a random molecule with CTF and noise, committed micrograph by micrograph as an extraction does."""
    g = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    c = torch.arange(BOX).float() - BOX // 2
    z, y, x = torch.meshgrid(c, c, c, indexing="ij")
    volume = torch.zeros(BOX, BOX, BOX)
    for p in rng.normal(size=(14, 3)) * 0.11 * BOX:
        volume += torch.exp(-((x - p[0]) ** 2 + (y - p[1]) ** 2 + (z - p[2]) ** 2) / 4.5)
    defocus = rng.uniform(8e3, 2.2e4, count)
    columns = {
        "defocus_u_angstrom": defocus,
        "defocus_v_angstrom": defocus - rng.uniform(0, 400, count),
        "defocus_angle_deg": rng.uniform(0, 180, count),
        "phase_shift_deg": np.zeros(count),
        "voltage_kv": np.full(count, 300.0),
        "spherical_aberration_mm": np.full(count, 2.7),
        "amplitude_contrast": np.full(count, 0.1),
        "half_set": np.arange(count) % 2,
    }
    rotations = random_rotations(count, g)
    plane, fourier = half_plane(BOX // 2 - 1), fourier_volume(volume, BOX // 2 - 1)
    row, slot = np.arange(count) // PER_MICROGRAPH, np.arange(count) % PER_MICROGRAPH
    columns["micrograph"] = row
    images = Generation.create(
        folder, meta={"stage": "extract", "version": 1, "params": {}, "recipes": {}}, gives=("particle_image",), per_item=True,
        grids={"": Grid({"slot": PER_MICROGRAPH, "y": BOX, "x": BOX}, {})},
    )  # fmt: skip
    for number in range(int(row[-1]) + 1):
        here = np.nonzero(row == number)[0]
        values = slices(fourier, rotations[here], plane.ky, plane.kx)
        values = values * ctf_values({k: v[here] for k, v in columns.items()}, plane.ky, plane.kx, BOX * PIXEL)
        spectrum = torch.zeros(len(here), BOX, BOX, dtype=torch.complex64)
        spectrum[:, plane.ky % BOX, plane.kx] = values
        spectrum[:, (-plane.ky) % BOX, (-plane.kx) % BOX] = values.conj()
        clean = centred_ifft2(spectrum).numpy()
        noisy = clean / clean.std() * 0.4 + rng.standard_normal(clean.shape, dtype=np.float32)
        images.commit(number, f"micrograph{number}", {"particle_image": noisy.astype(np.float32)})
    places = ImagePlaces((images,), row, slot, np.zeros(count, np.int16))
    return StoredParticles(ParticleSet(count, BOX, PIXEL, columns), make_ids(1, row, slot), places)


def digest(values: dict[str, Any]) -> str:
    """Hash of all that a stage gives."""
    found = hashlib.md5()
    for name in sorted(values):
        found.update(name.encode() + np.ascontiguousarray(values[name]).tobytes())
    return found.hexdigest()


def received(client: Client) -> int:
    """Bytes that the workers have received from each other since they started."""
    return sum(client.run(lambda dask_worker: sum(t["total"] for t in dask_worker.transfer_incoming_log)).values())


def read_log(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


class Killer(threading.Thread):
    """Kills one worker when it is at its second block of an iteration."""

    def __init__(self, log: Path, iteration: int) -> None:
        super().__init__(daemon=True)
        self.log, self.iteration, self.victim = log, iteration, 0

    def run(self) -> None:
        """Wait for the moment."""
        while not self.victim:
            begun = Counter(e["pid"] for e in read_log(self.log) if e["event"] == "expect" and e["iteration"] == self.iteration)
            for pid, count in begun.items():
                if count >= 2:
                    self.victim = pid
                    os.kill(pid, signal.SIGKILL)
                    return
            time.sleep(0.05)


def run(particles: StoredParticles, params: Classify2DParams, workers: int, folder: Path, kill_in: int | None = None) -> dict[str, Any]:
    """One classification; its digest, what was done where, and the bytes of each iteration."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "log"
    client = connect("local", workers=workers)
    bytes_after, killer = [0], None
    if kill_in is not None:
        killer = Killer(log, kill_in)
        killer.start()

    def on_iteration(state: State, metrics: dict[str, Any]) -> None:
        bytes_after.append(received(client))

    started = time.perf_counter()
    try:
        result = iterate_on_workers(
            client, "classify2d", Counted(log), params, particles, {}, folder / "checkpoints", on_iteration=on_iteration
        )
        names = sorted((str(w["name"]) for w in client.scheduler_info(n_workers=-1)["workers"].values()), key=lambda n: (len(n), n))
    finally:
        close(client)
    return {
        "digest": digest(result), "log": read_log(log), "moved": np.diff(bytes_after).tolist(), "names": names,
        "victim": killer.victim if killer else 0, "wall": time.perf_counter() - started,
        "state": sum(getattr(v, "nbytes", 8) for v in read_state(max((folder / "checkpoints").glob("iteration-*.npz"))).values()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 particles on 1 and 2 workers, as a smoke test")
    arguments = parser.parse_args()
    count, numbers = (2000, (1, 2)) if arguments.quick else (20_000, (1, 2, 4))
    params = Classify2DParams(classes=32, resolution_angstrom=14.0, shift_range_angstrom=20.0, iterations=2)
    folder = OUT / "blocks" / "stages" / "extract"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        torch.set_num_threads(1)
        particles = simulate(folder / "images", count)
        runs = {n: run(particles, params, n, folder / f"workers{n}") for n in numbers}
        killed = run(particles, params, numbers[-1], folder / "killed", kill_in=1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(particles, runs, killed)


def report(particles: StoredParticles, runs: dict[int, dict[str, Any]], killed: dict[str, Any]) -> None:
    leaves = cut_leaves(particles.set, Counted.halves)
    worst = 1.0  # measured over model in the worst iteration
    print(f"{particles.set.count} particles of {BOX} px, {len(leaves)} leaves, classify2d, {len(runs[1]['moved'])} iterations")
    print(f"{'workers':>8}{'bits':>35}{'E-step CPU s':>26}{'wall s':>9}   moved MB / model MB, by iteration")
    for number, found in runs.items():
        done = [e for e in found["log"] if e["event"] == "done"]
        cpu = [sum(e["cpu"] for e in done if e["iteration"] == i) for i in range(len(found["moved"]))]
        homes = home_of_leaves(len(leaves), settle([], found["names"]), found["names"])
        model = traffic(leaves, homes, sums_bytes=done[-1]["sums"], state_bytes=found["state"], up_bytes=done[-1]["columns"])
        pairs = [(moved, model.between_workers) for moved in found["moved"]]
        for moved, expected in pairs:
            assert (moved == 0) == (expected == 0), (moved, expected)
            worst = max(worst, moved / expected, key=lambda r: abs(np.log(r))) if expected else worst
        text = "  ".join(f"{a / 1e6:.3f} / {b / 1e6:.3f}" for a, b in pairs)
        print(f"{number:>8}{found['digest']:>35}{' '.join(f'{c:.1f}' for c in cpu):>26}{found['wall']:9.1f}   {text}")
        print(f"         model: {model}")
    equal = len({found["digest"] for found in [*runs.values(), killed]}) == 1
    executed = sum(e["event"] == "expect" for e in killed["log"])
    again = executed - len(leaves) * len(killed["moved"])
    of_victim = len({e["first"] for e in killed["log"] if e["pid"] == killed["victim"] and e["event"] == "expect"})
    loads = Counter((e["pid"], e["first"]) for e in killed["log"] if e["event"] == "load")
    first_home = {e["first"]: e["pid"] for e in reversed(killed["log"]) if e["event"] == "load"}
    survivors = set(first_home.values()) - {killed["victim"]}
    reloaded = sum(loads[pid, first] - 1 for first, pid in first_home.items() if pid in survivors)
    print(f"{'killed':>8}{killed['digest']:>35}  worker {killed['victim']} with {of_victim} leaves killed in iteration 1:")
    print(f"         {again} of {executed} expectations were done again; blocks of the others loaded again: {reloaded}")
    assert reloaded == 0
    assert again <= of_victim
    plot(runs, killed)
    print(
        json.dumps({"bits_equal": equal, "recomputed_blocks": again, "leaves_of_the_dead": of_victim, "bytes_over_model": round(worst, 4)})
    )


def plot(runs: dict[int, dict[str, Any]], killed: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for offset, found in enumerate([*runs.values(), killed]):
        done = Counter((e["pid"], e["iteration"]) for e in found["log"] if e["event"] == "expect")
        bottom = 0
        for (_, iteration), count in sorted(done.items(), key=lambda kv: (kv[0][1], kv[0][0])):
            axis.bar(offset, count, bottom=bottom, color=f"C{iteration}", edgecolor="w", linewidth=1.0)
            bottom += count
    axis.set_xticks(range(len(runs) + 1), [*map(str, runs), f"{max(runs)}, one killed"])
    axis.set(xlabel="workers", ylabel="expectations done", title="a box a worker and iteration (colour)")
    figure.savefig(OUT / "blocks.png", dpi=90)


if __name__ == "__main__":
    main()
