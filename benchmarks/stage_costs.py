"""Cost of a movie and of a particle: CPU seconds and bytes of every stage, for ``cryodask plan``.

``python benchmarks/stage_costs.py [--write]``: simulated movies of 2048 x 2048 and 4096 x 4096 pixels (40 frames, LZW TIFF) go through the
runner on one worker; 2D classification and refinement take 2400 simulated particles with one thread in this process. What the
worker spends beyond its stages (decoding, compressing, checksums, writing) counts as stage ``store``. A stage's cost is a line through the
two sizes. ``--write`` puts the result into the package; the movies stay in benchmarks/out/costs.
"""

from __future__ import annotations

import argparse
import datetime
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
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
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
    """CPU seconds a particle of the stages that take all particles, at boxes of 64 and, for refinement, 128 pixels."""
    import torch
    from _stacks import iterate, peers_stack, read_stack

    from cryodask.stages.classify2d import Classify2DParams, classify2d
    from cryodask.stages.refine3d import Refine3DParams, refine3d

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    stack = peers_stack()
    out: dict[str, dict[str, Any]] = {}
    for box in (64, 128):
        images, particles, _ = read_stack(stack[f"p{box}"].with_suffix(".mrcs"), stack[f"p{box}"].with_suffix(".star"))
        start = str(stack["truth64.mrc"] if box == 64 else stack["truth128.mrc"])
        runs: dict[str, Any] = {
            "classify2d": (classify2d, Classify2DParams(classes=20)),
            "refine3d": (refine3d, Refine3DParams(symmetry="D2", reference=start, mask_diameter_angstrom=200.0)),
        }
        for name, (stage, params) in runs.items():
            begun = time.process_time()
            iterate(stage, params, images, particles)
            seconds = time.process_time() - begun
            print(f"{name} at {box} pixels: {seconds:.1f} CPU s for {len(images)} particles", flush=True)
            out.setdefault(name, {})[str(box)] = seconds / len(images)
    return out


def line(at: list[float], seconds: list[float]) -> dict[str, float]:
    """Cost as a fixed part and a part per unit, both not negative, through the larger of two measurements at least."""
    slope = max(0.0, (seconds[1] - seconds[0]) / (at[1] - at[0]))
    fixed = max(0.0, seconds[1] - slope * at[1])
    return {"fixed_seconds": round(fixed, 4), "seconds_per_unit": round((seconds[1] - fixed) / at[1], 6)}


def main() -> None:
    from cryodask.cluster.connect import close, connect

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write cryodask/stage_costs.json")
    arguments = parser.parse_args()
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
    stages = {n: {"unit": u, **line(units[u], [m["seconds"][n] for m in movies])} for n, u in UNITS.items()}
    result = {
        "measured": datetime.date.today().isoformat(),
        "machine": f"one core of a shared {os.cpu_count()}-core {platform.machine()} machine, one thread, CPU only",
        "command": "python benchmarks/stage_costs.py --write",
        "movies": f"simulated, {SIZES[0]} and {SIZES[1]} pixels square, {FRAMES} frames, {DOSE * PIXEL**2:.2f} electrons a pixel and frame",
        "map_stages": stages,
        "bytes": {
            "lzw_movie_per_count": round(large["movie_bytes"] / (FRAMES * pixels), 4),
            "stored_movie_per_count": round(large["stored"]["ingest"] / (FRAMES * pixels), 4),
            "stored_micrograph_per_pixel": round(sum(large["stored"][n] for n in ("motion", "ctf", "pick")) / pixels, 4),
            "stored_particle_per_pixel": round(large["stored"]["extract"] / (large["particles"] * SCALED**2), 4),
        },
        "worker_memory": {"megapixels": pixels / 1e6, "frames": FRAMES, "peak_bytes": large["peak"]},
        "particle_stages": measure_particles(),
    }
    print(json.dumps(result, indent=1))
    if arguments.write:
        (ROOT / "cryodask" / "stage_costs.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
