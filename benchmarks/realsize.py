"""Refinement at 128 and 256 px: whole runs from 15 A, speed beside RELION's local step, memory, and 5,000 particles through workers.

    python benchmarks/realsize.py [--rows whole,speed,relion,memory,scale]
    python benchmarks/realsize.py --stack particles.star --truth map.mrc --symmetry C1 --mask-diameter 200 --finest 2.2

Stacks are simulated (see _sizes.py): 6bqn (C1) and beta-galactosidase (D2). A given STAR file is one of RELION 3.1 with true poses; its
truth may have any box, voxel size and grey scale.

whole    refine3d from the truth at 15 A: poses and FSC against the truth, CPU s.
speed    CPU ms per particle of a local pass, the difference of two particle counts: images read, transformed, poses and shifts refined from
         those of a pass 8 shells lower, slices inserted, residual noise measured. Maps and grids, the same for any count, are apart.
relion   the same of relion_refine's local step in sampling that ends as fine, from the true poses; in the same run, so at the same load.
memory   peak resident memory of a process that loads a leaf of 1,563 particles and runs a local pass, and of the maximisation.
scale    one local pass of 5,000 particles on two local workers: bytes between workers beside the model's; 200,000 particles by cost model.

CPU seconds are those of one thread. The last line is JSON; what was not measured is null.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _sizes import Case, Clock, Particles, functions, kept_bytes, made, opened, parameters, pass_state, relion_local, rf, start_columns
from _stacks import OUT, iterate, sphere_fsc

from cryodask.errors import CryodaskError
from cryodask.kernels import expectation, local_search
from cryodask.kernels.orientations import angular_error_deg
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.stage import Columns, Context
from cryodask.stages.refine3d import refine3d

ROWS = ("whole", "speed", "relion", "memory", "scale")
SHELLS_ANGSTROM = (11.3, 8.1, 6.5, 5.7, 4.5)
TARGETS: dict[str, dict[str, float]] = {
    "6bqn strong": {"fsc_8.1": 0.79, "fsc_6.5": 0.66, "cpu_seconds": 35.0},
    "5a1a strong": {"fsc_8.1": 0.82, "fsc_5.7": 0.72, "fsc_4.5": 0.65, "cpu_seconds": 25.0},
    "6bqn real": {"beyond_5_deg": 0.22, "fsc_11.3": 0.82, "fsc_8.1": 0.54, "cpu_seconds": 90.0},
}
TARGET_MS, TARGET_RATIO, TARGET_PEAK_GIB, TARGET_KB = {128: 5.0, 256: 22.0}, 80.0, 3.5, 110.0
LEAF = 1563
COUNTS = {128: (100, 600), 256: (60, 300)}
RELION_COUNTS = {128: (8, 32), 256: (4, 16)}
REPEATS = 3


# --- whole runs ---------------------------------------------------------------------------------------------------------------
def whole(case: Case, target: dict[str, float]) -> dict[str, Any]:
    """One refinement from 15 A, judged by the truth."""
    particles = opened(case)
    box, pixel = particles.set.box, particles.pixel
    images = particles.images(np.arange(particles.set.count))
    begun = time.process_time()
    beside = [0.0]

    def watch(state: dict, metrics: dict, columns: Columns, cpu: float) -> None:
        start = time.process_time()
        words = [f"{cpu - beside[0]:6.1f} s {metrics.get('phase')}"]
        words += [f"{key} {metrics[key]:.2f}" for key in ("scored_angstrom", "resolution_angstrom", "certainty") if key in metrics]
        if metrics.get("phase") not in ("noise power", "grey scale", "verdict"):
            modes = float(columns["mode_count"].mean())
            words.append("median {:.2f} deg, > 5 deg {:.3f}, shift {:.2f} A".format(*errors(particles, columns, case.symmetry)))
            words.append(f"modes {modes:.2f}")
        print("   " + "  ".join(words), flush=True)
        beside[0] += time.process_time() - start

    result, state = iterate(refine3d, parameters(case), images, particles.set, watch=watch)
    seconds = time.process_time() - begun - beside[0]
    columns = {"mode_rotation": _rotations(result), "mode_origin_angstrom": _origins(result)}
    median, beyond, shift = errors(particles, columns, case.symmetry)
    curve = sphere_fsc(np.asarray(result["final_map"]), particles.truth, pixel, 0.475 * case.mask_diameter_angstrom)
    row = {
        "cpu_seconds": round(seconds, 1), "median_deg": round(median, 3), "beyond_5_deg": round(beyond, 4),
        "shift_angstrom": round(shift, 3),
        **{f"fsc_{a}": round(float(curve[s]), 3) for a in SHELLS_ANGSTROM if (s := round(box * pixel / a)) < len(curve)},
        "reported_angstrom": round(float(result["resolution_angstrom"]), 2), "succeeded": bool(result["succeeded"]),
        "passes": int(state["passes"]),
    }  # fmt: skip
    reached = {key: bool(row[key] <= limit if "fsc" not in key else row[key] >= limit) for key, limit in target.items()}
    print(f"  {case.name}: {row}", flush=True)
    for key, limit in target.items():
        print(f"    {key:14s} {row[key]:8} wanted {'>=' if 'fsc' in key else '<='} {limit}{'' if reached[key] else '   MISSED'}")
    return {**row, "reached": all(reached.values()) if target else None, "curve": curve.tolist(), "length": box * pixel}


def errors(particles: Particles, columns: Columns, symmetry: str, index: np.ndarray | None = None) -> tuple[float, float, float]:
    """Median angular error, degrees; share beyond 5 degrees; median error of the shifts, Angstrom."""
    assert particles.poses is not None
    some = np.arange(particles.set.count) if index is None else index
    found = torch.from_numpy(np.asarray(columns["mode_rotation"]))[:, 0].double()
    degrees = angular_error_deg(found, particles.poses.rotations[some].double(), symmetry_operators(symmetry)).numpy()
    shift = np.linalg.norm(columns["mode_origin_angstrom"][:, 0] - particles.poses.origins_angstrom[some], axis=1)
    return float(np.median(degrees)), float((degrees > 5.0).mean()), float(np.median(shift))


def _rotations(result: dict[str, Any]) -> np.ndarray:
    from _judge import column_rotations

    return column_rotations(result)[:, None].numpy()


def _origins(result: dict[str, Any]) -> np.ndarray:
    return np.stack([result["origin_y_angstrom"], result["origin_x_angstrom"]], -1)[:, None]


# --- cost of a particle ---------------------------------------------------------------------------------------------------------
KERNELS = (
    (expectation, "load_particles"), (functions, "image_rows"), (local_search, "climb"), (local_search, "insert"),
    (local_search, "shell_terms"),
)  # fmt: skip


class Bench:
    """Passes of one half of a case's particles at one resolution."""

    def __init__(self, case: Case, phase: str = "local", finest_angstrom: float | None = None) -> None:
        self.case, self.particles, self.params = case, opened(case), parameters(case)
        self.state = pass_state(case, self.particles, self.params, phase, finest_angstrom or case.finest_angstrom)
        self.half = np.nonzero(self.particles.set.columns["half_set"] == 0)[0]

    def before(self, count: int) -> Columns:
        """Poses of a local pass 8 shells lower, from true poses with errors."""
        length = float(self.state["length_angstrom"])
        lower = self.state["rings"] - rf.sizes_of(self.state).beyond
        state = pass_state(self.case, self.particles, self.params, "local", length / lower)
        index = self.half[:count]
        with Context() as context:
            shared = functions.prepare(self.params, state, 0, context)
            block = functions.load(self.params, state, self.particles.block(index), context)
            return functions.expect(self.params, state, shared, block, start_columns(self.particles, index), context)[1]

    def run(self, shared: Any, columns: Columns, count: int) -> tuple[Any, Any, Columns]:
        """Load and expect: what is loaded, the sums, and the columns."""
        index = self.half[:count]
        with Context() as context:
            block = functions.load(self.params, self.state, self.particles.block(index), context)
            return block, *functions.expect(
                self.params, self.state, shared, block, {name: values[:count] for name, values in columns.items()}, context
            )


def cost(case: Case, phase: str, finest_angstrom: float, counts: tuple[int, int]) -> dict[str, Any]:
    """Marginal CPU ms of a particle in a pass, by kernel; fixed seconds of a leaf and of a half's references."""
    bench = Bench(case, phase, finest_angstrom)
    columns = bench.before(counts[1])
    with Context() as context:
        functions.prepare(bench.params, bench.state, 0, context)
        start = time.process_time()
        shared = functions.prepare(bench.params, bench.state, 0, context)
        prepared = time.process_time() - start
    bench.run(shared, columns, 8)  # compiles
    best: dict[int, tuple[float, dict[str, float]]] = {}
    for _ in range(REPEATS):
        for count in counts:
            with Clock(*KERNELS) as clock:
                start = time.process_time()
                _, _, found = bench.run(shared, columns, count)
                seconds = time.process_time() - start
            if count not in best or seconds < best[count][0]:
                best[count] = seconds, clock.seconds
    few, many = counts
    each = lambda a, b: round(1e3 * (b - a) / (many - few), 3)  # noqa: E731
    ms = each(best[few][0], best[many][0])
    rings, length = bench.state["rings"], float(bench.state["length_angstrom"])
    row = {
        "phase": phase, "angstrom": round(length / rings, 2), "rings": rings, "ms": ms,
        "leaf_fixed_seconds": round(best[few][0] - few * ms / 1e3, 3), "prepare_seconds": round(prepared, 2),
        "kernels_ms": {name: each(best[few][1][name], best[many][1][name]) for _, name in KERNELS},
    }  # fmt: skip
    if phase == "local":
        before = errors(bench.particles, columns, case.symmetry, bench.half[:many])
        after = errors(bench.particles, found, case.symmetry, bench.half[:many])
        row |= {
            "start_deg": round(before[0], 3),
            "median_deg": round(after[0], 3),
            "beyond_5_deg": after[1],
            "shift_angstrom": round(after[2], 3),
        }
    print(f"  {case.name} {row}", flush=True)
    return row


def speed(case: Case, with_relion: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Our local step and RELION's on the same stack."""
    box = opened(case).set.box
    size = 256 if box > 160 else 128
    half = opened(case).set.count // 2
    ours = cost(case, "local", case.finest_angstrom, (min(COUNTS[size][0], half // 4), min(COUNTS[size][1], half)))
    if not with_relion:
        return ours, None
    folder = OUT / "realsize" / "relion"
    try:
        step = relion_local(case, opened(case), folder, RELION_COUNTS[size])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if step is None:
        print("  relion_refine is not installed: no comparison")
        return ours, None
    # again, because the load of the machine changes
    again = cost(case, "local", case.finest_angstrom, (min(COUNTS[size][0], half // 4), min(COUNTS[size][1], half)))
    ours = min(ours, again, key=lambda row: row["ms"])
    theirs = {**asdict(step), "ratio": round(step.seconds_per_particle / (ours["ms"] / 1e3), 1)}
    print(f"  RELION {case.name}: {theirs}", flush=True)
    return ours, theirs


# --- memory -----------------------------------------------------------------------------------------------------------------------
def resident(what: str = "VmHWM") -> int:
    """Resident memory of this process, bytes; ``VmHWM`` is the highest so far."""
    line = next(line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def one_leaf(case: Case) -> dict[str, Any]:
    """In a process of its own: a local pass of one leaf."""
    bench = Bench(case)
    count = min(LEAF, len(bench.half))
    columns = start_columns(bench.particles, bench.half[:count])
    bench.particles = opened(case)
    idle = resident("VmRSS")
    reset_peak()
    with Context() as context:
        shared = functions.prepare(bench.params, bench.state, 0, context)
        prepared = resident()
        reset_peak()
        block = functions.load(bench.params, bench.state, bench.particles.block(bench.half[:count]), context)
        loaded = resident()
        reset_peak()
        sums, found = functions.expect(bench.params, bench.state, shared, block, columns, context)
    return {
        "particles": count, "idle": idle, "prepare": prepared, "load": loaded, "expect": resident(),
        "peak": max(prepared, loaded, resident()),
        "kept_per_particle": kept_bytes(block) / count, "sums": sum(int(getattr(v, "nbytes", 8)) for v in sums.values()),
        "columns_per_particle": sum(v.nbytes for v in found.values()) / count,
        "state": sum(int(getattr(v, "nbytes", 8)) for v in bench.state.values()),
    }  # fmt: skip


def one_maximisation(case: Case) -> dict[str, Any]:
    """In a process of its own: the last maximisation, with maps for the next pass and final ones."""
    bench = Bench(case)
    sums = []
    for half in (0, 1):
        index = np.nonzero(bench.particles.set.columns["half_set"] == half)[0][:40]
        with Context() as context:
            shared = functions.prepare(bench.params, bench.state, half, context)
            block = functions.load(bench.params, bench.state, bench.particles.block(index, half), context)
            sums.append(functions.expect(bench.params, bench.state, shared, block, start_columns(bench.particles, index), context)[0])
    del shared, block
    before, start = resident("VmRSS"), time.process_time()
    reset_peak()
    with Context() as context:
        functions.maximise(bench.params, bench.state, sums, context)
    return {"before": before, "peak": resident(), "cpu_seconds": round(time.process_time() - start, 2)}


def memory(case: Case) -> dict[str, Any]:
    """Peaks of both, each in a fresh process."""
    found = {what: in_process_of_its_own(what, case) for what in ("one_leaf", "one_maximisation")}
    for what, row in found.items():
        shown = {
            k: (f"{v / 2**30:.2f} GiB" if k not in ("particles", "kept_per_particle", "columns_per_particle", "cpu_seconds") else v)
            for k, v in row.items()
        }
        print(f"  {what}: {shown}", flush=True)
    return found


def in_process_of_its_own(what: str, case: Case) -> dict[str, Any]:
    """What a function of this file returns for a case."""
    text = json.dumps(asdict(case), default=str)
    done = subprocess.run([sys.executable, __file__, "--one", what, text], stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


# --- 200,000 particles ----------------------------------------------------------------------------------------------------------
def projected(costs: dict[str, dict[str, Any]], held: dict[str, dict[str, Any]], count: int = 200_000, cores: int = 64) -> dict[str, Any]:
    """CPU hours, minutes on so many cores, and memory of a worker, by costs measured on samples.

    The passes are those of the stage: two drawn ones on a sample, two over all views, local ones that gain 8 shells each until the finest
    is reached, one more of these that gains nothing, and a last one over all views. Local passes cost in proportion to the pixels scored.
    """
    local, fine = costs["local"], costs["local"]["rings"]
    passes = [("drawn", rings, 2.0 * rf.DRAWN_PARTICLES) for rings in (15, 15)] + [("global", 15, count), ("global", 23, count)]
    passes += [("local", min(rings, fine), count) for rings in range(31, fine + 8, 8)] + [
        ("local", fine, count),
        ("last global", fine, count),
    ]
    load = local["kernels_ms"]["load_particles"] + local["kernels_ms"]["image_rows"]
    milliseconds, serial = 3 * load * count, 0.0
    for kind, rings, particles in passes:
        at_rings = (local["ms"] - load) * (rings / fine) ** 2
        if kind == "local":
            milliseconds += at_rings * particles
        elif kind == "drawn":
            milliseconds += costs["draw"]["ms"] * particles
        else:
            milliseconds += (costs["global"]["ms"] - load) * particles + (at_rings if rings > 23 else 0.0) * particles
        share = (rings / fine) ** 3
        serial += share * (held["one_maximisation"]["cpu_seconds"] + local["prepare_seconds"])
    leaf = held["one_leaf"]
    leaves = -(-128 // cores)
    return {
        "cpu_hours": round(milliseconds / 3.6e6, 1), "minutes_on_64_cores": round(milliseconds / 6e4 / cores, 1),
        "serial_minutes": round(serial / 60, 1), "passes": len(passes), "passes_allowed": parameters_iterations(),
        "gib_of_a_worker": round((leaf["peak"] + (leaves - 1) * (leaf["sums"] + LEAF * leaf["kept_per_particle"])) / 2**30, 2),
    }  # fmt: skip


def parameters_iterations() -> int:
    """Passes that refine3d allows by default."""
    return int(refine3d.params.model_fields["iterations"].default)


# --- all rows -------------------------------------------------------------------------------------------------------------------
def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", default=",".join(ROWS), help="some of whole, speed, relion, memory, scale")
    p.add_argument("--stack", type=Path, metavar="STAR", help="particles from elsewhere, with true poses")
    p.add_argument("--truth", type=Path, metavar="MRC", help="true map of --stack")
    p.add_argument("--symmetry", default="C1", help="point group of --stack")
    p.add_argument("--mask-diameter", type=float, metavar="A", help="diameter of the spherical mask; by default 0.75 of the box")
    p.add_argument("--finest", type=float, metavar="A", help="resolution of the timed passes of --stack; by default 2.15 pixels")
    p.add_argument("--particles", type=int, default=5000, help="particles of the row scale")
    p.add_argument("--scale-angstrom", type=float, metavar="A", help="resolution of the row scale; by default that of the timed passes")
    p.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    a.rows = a.rows.split(",")
    if unknown := set(a.rows) - set(ROWS):
        p.error(f"unknown rows {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if bool(a.stack) != bool(a.truth):
        p.error("--stack and --truth belong together")
    return a


def given(a: argparse.Namespace) -> Case:
    """The case of the options."""
    from _molecules import read_rows

    _, particles, poses = read_rows(a.stack)
    if poses is None:
        raise SystemExit(f"{a.stack} has no poses: costs of local passes and errors need the true ones")
    pixel = float(particles.pixel_size_angstrom)
    diameter = a.mask_diameter or 0.75 * particles.box * pixel
    return Case(a.stack.stem, a.stack.resolve(), a.truth.resolve(), a.symmetry, diameter, a.finest or 2.15 * pixel)


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    a = arguments()
    if a.one:
        fields = json.loads(a.one[1])
        case = Case(**{**fields, "star": Path(fields["star"]), "truth": Path(fields["truth"])})
        print(json.dumps({"one_leaf": one_leaf, "one_maximisation": one_maximisation}[a.one[0]](case)))
        return
    OUT.mkdir(exist_ok=True)
    own = given(a) if a.stack else None
    wide = own or (made("6bqn", 5000, 256, "real", 7) if {"speed", "relion", "memory", "scale"} & set(a.rows) else None)
    runs: dict[str, dict[str, Any]] = {}
    if "whole" in a.rows:
        print("whole runs from 15 A")
        if own:
            runs[own.name] = whole(own, {})
        else:
            for model, count, box, strength, seed in (
                ("6bqn", 600, 128, "strong", 1),
                ("5a1a", 240, 128, "strong", 2),
                ("6bqn", 2400, 128, "real", 7),
            ):
                name = f"{model} {strength}"
                runs[name] = whole(made(model, count, box, strength, seed), TARGETS[name])
    steps: dict[int, tuple[dict[str, Any], dict[str, Any] | None]] = {}
    if {"speed", "relion"} & set(a.rows):
        print("cost of a particle in a local pass")
        for case in [own] if own else [made("6bqn", 2400, 128, "real", 7), wide]:
            assert case is not None
            steps[256 if case is wide and opened(case).set.box > 160 else 128] = speed(case, "relion" in a.rows)
    held = None
    if "memory" in a.rows:
        print("memory")
        assert wide is not None
        held = memory(wide)
    through, projection = None, None
    if "scale" in a.rows:
        assert wide is not None
        print(f"{a.particles} particles through workers")
        from _through_workers import one_pass

        through = one_pass(wide, a.particles, 2, a.scale_angstrom or wide.finest_angstrom, OUT / "realsize" / "scale")
        print(f"  {through}", flush=True)
        if held and steps.get(256):
            count = opened(wide).set.count // 2
            costs = {"local": steps[256][0]} | {
                phase: cost(wide, phase, angstrom, (min(20, count // 4), min(60, count)))
                for phase, angstrom in (("global", 9.8), ("draw", 15.1))
            }
            projection = projected(costs, held)
            print(f"  200,000 particles: {projection}", flush=True)
    plot(runs, steps)
    print(json.dumps(summary(runs, steps, held, through, projection)))


def summary(runs: dict, steps: dict, held: dict | None, through: dict | None, projection: dict | None) -> dict[str, Any]:
    """The last line."""
    row: dict[str, Any] = {}
    for size in (128, 256):
        ours, theirs = steps.get(size, (None, None))
        row |= {
            f"ratio_to_relion_{size}_c1": theirs["ratio"] if theirs else None,
            f"cpu_seconds_per_particle_{size}_c1": round(ours["ms"] / 1e3, 5) if ours else None,
            f"relion_seconds_per_particle_{size}_c1": round(theirs["seconds_per_particle"], 3) if theirs else None,
            f"median_deg_{size}_c1": ours["median_deg"] if ours else None,
            f"prepare_seconds_{size}_c1": ours["prepare_seconds"] if ours else None,
        }
    leaf, last = (held["one_leaf"], held["one_maximisation"]) if held else (None, None)
    peak = max(leaf["peak"], last["peak"]) if leaf and last else None
    row |= {
        "worker_peak_gb": round(peak / 1e9, 3) if peak else None,
        "worker_peak_gib": round(peak / 2**30, 3) if peak else None,
        "leaf_peak_gib": round(leaf["peak"] / 2**30, 3) if leaf else None,
        "maximise_peak_gib": round(last["peak"] / 2**30, 3) if last else None,
        "maximise_seconds": last["cpu_seconds"] if last else None,
        "kb_per_particle": round(leaf["kept_per_particle"] / 1e3, 1) if leaf else None,
        "bytes_over_model": through["bytes_over_model"] if through else None,
        "through_workers_peak_gib": round(through["worker_peak"] / 2**30, 3) if through else None,
        "cpu_hours_200000": projection["cpu_hours"] if projection else None,
        "gib_of_a_worker_200000": projection["gib_of_a_worker"] if projection else None,
        "whole": {name: {k: v for k, v in run.items() if k not in ("curve", "length")} for name, run in runs.items()} or None,
    }
    print("targets:")
    checks = [(f"{size} px, ms per particle", steps[size][0]["ms"], "<=", limit) for size, limit in TARGET_MS.items() if size in steps]
    checks += [(f"{size} px, times RELION", step[1]["ratio"], ">=", TARGET_RATIO) for size, step in steps.items() if step[1]]
    if leaf and last:
        checks += [
            ("worker peak, GiB", row["worker_peak_gib"], "<=", TARGET_PEAK_GIB),
            ("kept per particle, kB", row["kb_per_particle"], "<=", TARGET_KB),
        ]
    if through:
        checks.append(("bytes over model, off by", round(abs(row["bytes_over_model"] - 1.0), 4), "<=", 0.1))
    for what, value, sign, limit in checks:
        missed = value > limit if sign == "<=" else value < limit
        print(f"  {what:28s} {value:10} wanted {sign} {limit:g}{'   MISSED' if missed else ''}")
    return row


def plot(runs: dict[str, dict[str, Any]], steps: dict[int, tuple[dict[str, Any], dict[str, Any] | None]]) -> None:
    """FSC of whole runs against the truth with their targets, and what a particle costs by kernel."""
    from matplotlib.figure import Figure

    if not runs and not steps:
        return
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, run) in enumerate(runs.items()):
        curve = np.array(run["curve"])
        left.plot(np.arange(1, len(curve)) / run["length"], curve[1:], color=f"C{number}", label=name)
        for key, limit in TARGETS.get(name, {}).items():
            if key.startswith("fsc_"):
                left.plot(1.0 / float(key[4:]), limit, "v", color=f"C{number}")
    left.set(xlabel="1/A", ylabel="FSC against the truth (triangles: wanted)", ylim=(-0.1, 1.02))
    if runs:
        left.legend(fontsize=8)
    for place, (size, (ours, _)) in enumerate(sorted(steps.items())):
        bottom = 0.0
        parts = dict(ours["kernels_ms"])
        parts["other"] = max(0.0, ours["ms"] - sum(parts.values()))
        for colour, (name, ms) in enumerate(parts.items()):
            right.bar(place, ms, bottom=bottom, color=f"C{colour}", label=None if place else name)
            bottom += ms
        right.plot([place - 0.45, place + 0.45], [TARGET_MS[size]] * 2, "k--", linewidth=0.8)
    right.set_xticks(range(len(steps)), [f"{size} px" for size in sorted(steps)])
    right.set(ylabel="CPU ms per particle, local pass (dashed: wanted)")
    if steps:
        right.legend(fontsize=8)
    figure.savefig(OUT / "realsize.png", dpi=110)


if __name__ == "__main__":
    try:
        main()
    except CryodaskError as error:
        raise SystemExit(str(error)) from None
