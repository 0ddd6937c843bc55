"""Cost of a movie and of a particle: CPU seconds and bytes of every stage, for ``cryodask plan``.

``python benchmarks/stage_costs.py [--only movies|particles] [--write]``: simulated movies of 2048 x 2048 and 4096 x 4096 pixels (40 frames,
LZW TIFF) go through the runner on one worker. What the worker spends beyond its stages (decoding, compressing, checksums, writing) counts
as stage ``store``. A stage's cost is a line through the two sizes. 2D classification, refinement and initial maps take two numbers of
simulated particles per box size with one thread in this process: a fixed part and a part per particle. ``--write`` puts the result into the
package; the movies stay in benchmarks/out/costs.

``--predict STAGE BOX COUNT`` runs a stage with that many particles, which were not measured, and compares its CPU seconds with the costs in
the package.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "out" / "costs"
SIZES = (2048, 4096)
MOVIES, FRAMES, PIXEL, DOSE, DIAMETER, BOX, SCALED = 2, 40, 0.83, 1.25, 180.0, 320, 160
MAP_STAGES = ("ingest", "motion", "ctf", "pick", "extract")
COUNTS = {64: (600, 2400), 128: (600, 1800)}
"""Two numbers of particles by box size, pixels."""
AB_INITIO_BOX, WARM_UP = 64, 200
UNITS = {
    "ingest": "frame megapixel", "motion": "frame megapixel", "store": "frame megapixel",
    "ctf": "megapixel", "pick": "megapixel", "extract": "particle megapixel",
}  # fmt: skip


def session(size: int) -> Path:
    """A simulated session and its project file."""
    from cryodask.simulate import SessionParams, simulate_session

    folder = OUT / f"movies-{size}"
    if not (folder / "session.yaml").exists():
        params = SessionParams(
            movies=MOVIES, height=size, width=size, frames=FRAMES, pixel_size_angstrom=PIXEL, dose_per_frame=DOSE, seed=3,
            particles=250 * size**2 // 4096**2, truth_maps=((64, 3.32),),
        )  # fmt: skip
        simulate_session(folder, params, processes=1)
        (folder / "session.yaml").write_text(f"""name: session
inputs: {{movies: "movies/*.tif", gain: gain.mrc}}
microscope: {{voltage_kv: 300, spherical_aberration_mm: 2.7, pixel_size_angstrom: {PIXEL}, dose_per_frame: {DOSE}}}
pipeline: [motion, ctf, {{pick: {{diameter_angstrom: {DIAMETER}}}}}, {{extract: {{box: {BOX}, scale_to: {SCALED}}}}}]
""")
    shutil.rmtree(folder / "session", ignore_errors=True)
    return folder / "session.yaml"


def _used() -> tuple[float, int]:
    """CPU seconds of this process and its threads, and its largest resident memory, bytes."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return time.process_time(), int(found[1]) * 1024


def measure_movies(size: int, client: Any) -> dict[str, Any]:
    """Means over the movies of one size: CPU seconds by stage, bytes by stage, particles, peak memory."""
    from cryodask.run.recipe import make_plan
    from cryodask.run.session import run_plan

    plan = make_plan(session(size))
    before = next(iter(client.run(_used).values()))[0]
    project = run_plan(plan, client)
    cpu, peak = next(iter(client.run(_used).values()))
    assert not project.failures(), project.failures()
    seconds, stored = {}, {}
    for name in MAP_STAGES:
        records = list(project.generation(name).committed().values())
        assert len(records) == MOVIES
        seconds[name] = sum(r["cpu_seconds"] for r in records) / MOVIES
        stored[name] = sum(f.stat().st_size for f in (project.path / "stages" / name).rglob("*") if f.is_file()) / MOVIES
    seconds["store"] = (cpu - before) / MOVIES - sum(seconds.values())
    movies = list((plan.path.parent / "movies").iterdir())
    return {
        "seconds": seconds, "stored": stored, "peak": peak, "particles": project.particles().sizes["particle"] / MOVIES,
        "movie_bytes": sum(m.stat().st_size for m in movies) / len(movies),
    }  # fmt: skip


def measure_particles() -> dict[str, dict[str, Any]]:
    """Costs of the stages that take all particles, by stage and box size: a fixed part, and parts per particle."""
    import torch
    from _stacks import peers_stack, read_stack

    from cryodask.stages._refinement import DRAWN_PARTICLES
    from cryodask.stages.ab_initio import AbInitioParams

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    stack = peers_stack()
    most = {"classify2d": 0, "refine3d": 2 * DRAWN_PARTICLES, "ab_initio": AbInitioParams().particles}
    out: dict[str, dict[str, Any]] = {}
    for box, counts in COUNTS.items():
        images, particles, _ = read_stack(stack[f"p{box}"].with_suffix(".mrcs"), stack[f"p{box}"].with_suffix(".star"))
        for name, measure in MEASURES.items():
            if name == "ab_initio" and box != AB_INITIO_BOX:
                continue
            if name not in out:
                measure(*_some(images, particles, WARM_UP))  # imports, and compilation of what is compiled at first use
            found = [measure(*_some(images, particles, count)) for count in counts]
            for count, (drawn, rest) in zip(counts, found):
                print(f"{name}, {count} particles of {box} pixels: {drawn + rest:.1f} CPU s, {drawn:.1f} of them drawn", flush=True)
            out.setdefault(name, {})[str(box)] = particle_cost(counts, found, most[name])
    return out


def _some(images: Any, particles: Any, count: int) -> tuple[Any, Any]:
    """``count`` particles, taken evenly from a stack."""
    import numpy as np
    from _stacks import subset

    return subset(images, particles, np.linspace(0, len(images) - 1, count).astype(int))


Spent = tuple[float, float]
"""CPU seconds of a run in passes that use a limited number of particles, and of everything else."""


def classify(images: Any, particles: Any) -> Spent:
    """2D classification into 20 classes."""
    from _stacks import iterate

    from cryodask.stages.classify2d import Classify2DParams, classify2d

    begun = time.process_time()
    iterate(classify2d, Classify2DParams(classes=20), images, particles)
    return 0.0, time.process_time() - begun


def refine(images: Any, particles: Any) -> Spent:
    """A refinement with D2, from the truth at the stage's own low-pass."""
    from _stacks import iterate, peers_stack

    from cryodask.stages.refine3d import Refine3DParams, refine3d

    start = str(peers_stack()[f"truth{particles.box}.mrc"])
    passes: list[tuple[str, float]] = []
    begun = time.process_time()
    iterate(
        refine3d, Refine3DParams(symmetry="D2", reference=start, mask_diameter_angstrom=200.0), images, particles,
        watch=lambda state, metrics, columns, seconds: passes.append((metrics["phase"], seconds)),
    )  # fmt: skip
    drawn = sum(after - before for (_, before), (phase, after) in itertools.pairwise(passes) if phase == "draw")
    return drawn, time.process_time() - begun - drawn


def from_nothing(images: Any, particles: Any) -> Spent:
    """An initial map with D2: it uses a limited number of particles."""
    import numpy as np

    from cryodask.stage import Context, ParticleBlock
    from cryodask.stages.ab_initio import AbInitioParams, ab_initio

    params, functions = AbInitioParams(symmetry="D2"), ab_initio.functions
    begun = time.process_time()
    with Context() as context:
        index = functions.select(params, particles)
        columns = {name: np.asarray(values)[index] for name, values in particles.columns.items()}
        block = ParticleBlock(index, images[index], columns, particles.pixel_size_angstrom, 0)
        functions.finish(params, block, [functions.chain(params, block, seed, context) for seed in functions.seeds(params)], context)
    return time.process_time() - begun, 0.0


MEASURES = {"classify2d": classify, "refine3d": refine, "ab_initio": from_nothing}


def particle_cost(counts: tuple[int, int], spent: list[Spent], drawn: int) -> dict[str, float]:
    """Costs of a stage at one box size from runs with two numbers of particles."""
    limited, rest = (line(list(counts), [run[part] for run in spent]) for part in (0, 1))
    return {
        "fixed_seconds": round(limited["fixed_seconds"] + rest["fixed_seconds"], 4), "seconds_per_particle": rest["seconds_per_unit"],
        "seconds_per_drawn_particle": limited["seconds_per_unit"], "drawn_particles": drawn,
    }  # fmt: skip


def line(at: list[float], seconds: list[float]) -> dict[str, float]:
    """Cost as a fixed part and a part per unit, both not negative, through the larger of two measurements at least."""
    slope = max(0.0, (seconds[1] - seconds[0]) / (at[1] - at[0]))
    fixed = max(0.0, seconds[1] - slope * at[1])
    return {"fixed_seconds": round(fixed, 4), "seconds_per_unit": round((seconds[1] - fixed) / at[1], 6)}


def compare(name: str, box: int, count: int) -> dict[str, float]:
    """CPU seconds of a run with other particles than those of the measurement, and what the costs of the package say."""
    import torch
    from _stacks import another_stack, read_stack

    from cryodask.costs import measured_costs

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    stack = another_stack(box, count, seed=2)
    images, particles, _ = read_stack(stack.with_suffix(".mrcs"), stack.with_suffix(".star"))
    MEASURES[name](*_some(images, particles, WARM_UP))
    seconds = sum(MEASURES[name](images, particles))
    predicted = measured_costs().particle_seconds(name, box, count)
    return {"measured_s": round(seconds, 1), "predicted_s": round(predicted, 1), "ratio": round(predicted / seconds, 3)}


def measured_movies() -> dict[str, Any]:
    """Costs of the stages that take one movie each, and bytes."""
    from cryodask.cluster.connect import close, connect

    client = connect("local", workers=1)
    try:
        measure_movies(SIZES[0], client)  # imports, and compilation of what is compiled at first use
        movies = [measure_movies(size, client) for size in SIZES]
    finally:
        close(client)
    print(json.dumps(movies, indent=1), flush=True)
    megapixels = [size**2 / 1e6 for size in SIZES]
    units = {
        "frame megapixel": [FRAMES * m for m in megapixels], "megapixel": megapixels,
        "particle megapixel": [m["particles"] * BOX**2 / 1e6 for m in movies],
    }  # fmt: skip
    large, pixels = movies[1], SIZES[1] ** 2
    size = " and ".join(map(str, SIZES))
    return {
        "movies": f"simulated, {size} pixels square, {FRAMES} frames, {DOSE * PIXEL**2:.2f} electrons a pixel and frame; {_today()}",
        "map_stages": {n: {"unit": u, **line(units[u], [m["seconds"][n] for m in movies])} for n, u in UNITS.items()},
        "bytes": {
            "lzw_movie_per_count": round(large["movie_bytes"] / (FRAMES * pixels), 4),
            "stored_movie_per_count": round(large["stored"]["ingest"] / (FRAMES * pixels), 4),
            "stored_micrograph_per_pixel": round(sum(large["stored"][n] for n in ("motion", "ctf", "pick")) / pixels, 4),
            "stored_particle_per_pixel": round(large["stored"]["extract"] / (large["particles"] * SCALED**2), 4),
        },
        "worker_memory": {"megapixels": pixels / 1e6, "frames": FRAMES, "peak_bytes": large["peak"]},
    }


def measured_particles() -> dict[str, Any]:
    """Costs of the stages that take all particles."""
    counts = ", ".join(f"{' and '.join(map(str, counts))} of {box} pixels" for box, counts in COUNTS.items())
    return {"particles": f"simulated, {counts}; {_today()}", "particle_stages": measure_particles()}


def _today() -> str:
    return datetime.date.today().isoformat()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["movies", "particles"], help="measure only these; --write keeps the figures of the others")
    parser.add_argument("--write", action="store_true", help="write cryodask/stage_costs.json")
    parser.add_argument("--predict", nargs=3, metavar=("STAGE", "BOX", "COUNT"), help="compare a run with what the package predicts")
    arguments = parser.parse_args()
    if arguments.predict:
        print(json.dumps(compare(arguments.predict[0], *map(int, arguments.predict[1:]))))
        return
    file = ROOT / "cryodask" / "stage_costs.json"
    result = json.loads(file.read_text()) | {
        "machine": f"one core of a shared {os.cpu_count()}-core {platform.machine()} machine, one thread, CPU only",
        "command": "python benchmarks/stage_costs.py --write",
    }
    result |= measured_movies() if arguments.only != "particles" else {}
    result |= measured_particles() if arguments.only != "movies" else {}
    print(json.dumps(result, indent=1))
    if arguments.write:
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
