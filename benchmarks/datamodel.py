"""Cost of the data model on a large project: opening, displaying, viewing particles, planning, importing.

``python benchmarks/datamodel.py [--quick]`` makes a project of 10,000 exposures and 2,000,000 particles in seven steps (columns only, no
images: the journals as workers would have left them), and a STAR file of 1,000,000 particles in 5,000 micrographs. Each figure is CPU
seconds of a fresh process without its imports; the import runs on a local worker of its own and counts the driver.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

OUT = Path(__file__).parent / "out"
PIPELINE: list[Any] = [
    {"motion": {"patches": [2, 2]}},
    "ctf",
    {"pick": {"diameter_angstrom": 20}},
    {"extract": {"box": 8}},
    {"classify2d": {"classes": 50}},
    {"curate": {"keep": [1, 2]}},
]
GOALS = {
    "open_cpu_s": 0.2,
    "info_cpu_s": 1.0,
    "particles_cpu_s": 1.5,
    "dry_run_cpu_s": 1.5,
    "resolve_cpu_s": 1.0,
    "star_import_cpu_s": 12.0,
    "star_import_peak_gb": 1.2,
}

COMMON = """
import sys, time, resource
import dask.array, xarray, pandas, zarr, scipy.spatial
import cryodask
from cryodask.stage import load_stages
load_stages()
import cryodask.store.particles, cryodask.store.datasets, cryodask.run.preview, cryodask.run.execute
folder = sys.argv[1]
before = time.process_time()
"""
MEASURES = {
    "open_cpu_s": "project = cryodask.open(folder + '/big')",
    "info_cpu_s": "project = cryodask.open(folder + '/big'); repr(project); project.failures()",
    "particles_cpu_s": """
project = cryodask.open(folder + '/big')
count = project.particles('classify2d').sizes['particle']
assert count > 1000, count
""",
    "dry_run_cpu_s": """
from cryodask.run.recipe import make_plan
from cryodask.run.preview import preview
shown = preview(make_plan(folder + '/big.yaml'))
assert all(s.done for s in shown.steps), [(s.step, s.why, s.todo) for s in shown.steps]
""",
    "resolve_cpu_s": """
from cryodask.run.inputs import step_inputs
from cryodask.run.keys import Keys
from cryodask.run.recipe import make_plan
from cryodask.store.particles import particle_columns
plan = make_plan(folder + '/next.yaml')
project = cryodask.open(folder + '/big')
step = plan.steps[-1]
inputs = step_inputs(plan, project, step)
Keys(plan, project, {}).of_set(1, inputs)
columns = particle_columns(project, inputs.ref, inputs.ids, {'position', 'image'})
assert len(columns['defocus_u_angstrom']) == len(inputs.ids) > 1000
""",
}
IMPORT = """
import sys, time, resource
import cryodask
from cryodask.stage import load_stages
load_stages()
import pandas, xarray, scipy.spatial
from cryodask.run.session import run_plan
from cryodask.run.recipe import make_plan
if __name__ == "__main__":
    client = cryodask.connect("local", workers=1)
    before = time.process_time()
    project = run_plan(make_plan(sys.argv[1] + "/star.yaml"), client)
    cpu = time.process_time() - before
    assert project.failures() == [], project.failures()[:2]
    ids = project.sets.ids(project.product("import_particles", "particles"))
    client.shutdown()
    print(cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, len(ids))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the size, as a smoke test")
    quick = parser.parse_args().quick
    exposures, each, micrographs, rows = (100, 200, 50, 10_000) if quick else (10_000, 200, 5_000, 1_000_000)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("CRYODASK_SCRATCH")) as scratch:
        folder = Path(scratch)
        started = time.time()
        make_project(folder, exposures, each)
        write_star(folder, rows, micrographs)
        print(
            f"{exposures:,} exposures with {exposures * each:,} particles, a STAR file of {rows:,}: made in {time.time() - started:.0f} s"
        )
        for name, code in MEASURES.items():
            script = COMMON + code + "\nprint(time.process_time() - before)"
            done = subprocess.run([sys.executable, "-c", script, scratch], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            figures[name] = round(float(done.stdout.split()[-1]), 3)
        script = folder / "import.py"
        script.write_text(IMPORT)
        done = subprocess.run([sys.executable, str(script), scratch], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        cpu, peak, count = done.stdout.split()[-3:]
        assert int(count) == rows, (count, rows)
        figures |= {"star_import_cpu_s": round(float(cpu), 2), "star_import_peak_gb": round(float(peak), 3)}
    print(f"\n{'':<22}{'measured':>10}{'goal':>8}")
    for name, value in figures.items():
        print(f"{name:<22}{value:>10.2f}{GOALS[name]:>8.1f}")
    draw(figures)
    print(json.dumps({**figures, "exposures": exposures, "particles": exposures * each, "quick": quick}))


def make_project(folder: Path, exposures: int, each: int) -> None:
    """A project whose journals and sets are complete; what they say is random."""
    from cryodask.formats.movies import write_mrc_movie
    from cryodask.run import sources
    from cryodask.run.chains import ChainMaker
    from cryodask.run.inputs import step_inputs
    from cryodask.run.keys import Keys
    from cryodask.run.recipe import make_plan
    from cryodask.run.refs import Refer
    from cryodask.run.results import settle_result
    from cryodask.store.generation import Generation
    from cryodask.store.layouts import Grid
    from cryodask.store.project import Project

    (folder / "movies").mkdir()
    frames = np.random.default_rng(0).poisson(2.0, (4, 64, 64)).astype(np.uint8)
    write_mrc_movie(folder / "movies" / "m.mrc", frames, 1.0)
    template = bytearray((folder / "movies" / "m.mrc").read_bytes())
    (folder / "movies" / "m.mrc").unlink()
    for number in range(exposures):
        template[2000:2008] = number.to_bytes(8, "little")
        (folder / "movies" / f"FoilHole_{number:08d}_fractions.mrc").write_bytes(template)
    content = {
        "name": "big",
        "inputs": {"movies": "movies/*.mrc"},
        "microscope": {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "pixel_size_angstrom": 1.0},
        "pipeline": PIPELINE,
    }
    (folder / "big.yaml").write_text(yaml.safe_dump(content))
    content["pipeline"] = [*PIPELINE, {"ab_initio": {"symmetry": "C1"}}]
    (folder / "next.yaml").write_text(yaml.safe_dump({**content, "folder": "big"}))
    plan = make_plan(folder / "big.yaml")
    project = Project.create(plan.folder, "big")
    project.state.constants, project.state.home = plan.constants, ".."
    project.update_exposures(sources.list_exposures(plan, project), complete=True)
    keys = Keys(plan, project, {})
    rng = np.random.default_rng(0)

    def adopt(step: Any, key: str, recipes: dict[str, str] | None = None) -> None:
        project.state.adopt(step.label, Refer(plan, project.state).state_of(step, key, recipes))

    maps = [s for s in plan.steps if s.stage.shape == "map"]
    maker = ChainMaker(plan, project, keys, project.items(), {}, frozenset(), lambda step, target: adopt(step, target.key, target.recipes))
    chain = maker.chain(maps)
    for step, link in zip(maps, chain.links):
        _fill(project, step, link, each, rng)
    for step in (s for s in plan.steps if s.stage.shape != "map"):
        inputs = step_inputs(plan, project, step)
        key = keys.of_set(step.stage.version, inputs)
        assert inputs.ids is not None
        count = len(inputs.ids)
        meta = {"stage": step.stage.name, "version": 1, "params": step.params.model_dump(mode="json"), "recipe": key}
        generation = Generation.create(
            project.path / "stages" / step.stage.name / key,
            meta=meta,
            gives=(*step.stage.gives, "particle_id", "dropped_id", "removal_reason"),
            per_item=False,
            grids={"": Grid({}, {})},
        )
        if step.stage.name == "classify2d":
            result = {n: rng.normal(size=count).astype(np.float32) for n in ("class_psi_deg", "class_log_likelihood", "class_probability")}
            result |= {f"class_origin_{axis}_angstrom": rng.normal(size=count).astype(np.float32) for axis in "yx"}
            result |= {"class_number": rng.integers(1, 4, count).astype(np.int32), "class_share": np.full(3, 1 / 3)}
        else:
            result = {"particle_kept": rng.random(count) < 0.4, "removal_reason": np.ones(count, np.int8)}
        generation.commit_result(settle_result(project, step, inputs, result))
        adopt(step, key)
    project.save()
    for label in project.stages:
        if project.generation(label).meta["per_item"]:
            project.generation(label).compact()


def _fill(project: Any, step: Any, link: Any, each: int, rng: np.random.Generator) -> None:
    """Commit records of a per-exposure step for all exposures, in one journal file."""
    from cryodask.run.slices import slice_digest, slice_of_birth
    from cryodask.store.births import Birth, born
    from cryodask.store.generation import Generation
    from cryodask.store.journal import encode_value
    from cryodask.store.lines import checked_line
    from cryodask.vocabulary import VARIABLES

    generation = Generation(link.folder)
    lengths = {"frame": 4, "axis": 2, "patch": 4, "coefficient": 36, "shell": 32, "radius": 32, "slot": each, "left_out": 0, "defect": 0}
    lengths |= {"cell_y": 32, "cell_x": 32}
    with open(link.folder / "journal" / "node-1-a.jsonl", "wb") as file:
        for item in project.items():
            values: dict[str, Any] = {}
            for name in generation.meta["gives"]:
                var = VARIABLES[name]
                if var.kind != "bulk":
                    values[name] = rng.integers(1, 60, [lengths[d] for d in var.dims_in(per_item=True)]).astype(var.dtype)
            made: dict[str, Any] = {"recipe": link.recipes[""]}
            if link.birth is not None:
                values["pick_score"] = -np.sort(-rng.random(each).astype(np.float32)) + 0.5  # pickers give the best first
                values |= {"pick_y": 10.0 * (np.arange(each) // 20), "pick_x": 10.0 * (np.arange(each) % 20)}  # no two at one place
                found = {n: values[n] for n in ("pick_y", "pick_x", "pick_score")}
                values |= born(Birth(link.birth.number), item.row, found, None)
                values["pick_threshold"] = np.float64(0.0)
                _fill.births[item.row] = values  # type: ignore[attr-defined]
            if step.stage.name == "extract":
                births = _fill.births[item.row]  # type: ignore[attr-defined]
                particles = slice_of_birth(births, 1.0, "auto", link.particle_columns)
                values |= {"particle_id": particles["particle_id"], "particle_count": np.int64(len(particles["particle_id"]))}
                values["particle_pixel_size_angstrom"] = np.float64(1.0)
                made["slice"] = slice_digest(particles)
            bulk = {v.name: 1 for v in step.stage.gives_variables() if v.kind == "bulk"}
            record = {"row": item.row, "name": item.name, "ok": True, "input": item.fingerprint, "time": 1.0, "attempt": 1, **made}
            record |= {"columns": {n: encode_value(v) for n, v in values.items()}, "shards": bulk, "revision": 0, "seconds": 1.0}
            file.write(checked_line(record))


_fill.births = {}  # type: ignore[attr-defined]


def write_star(folder: Path, rows: int, micrographs: int) -> None:
    """A table of particles as RELION's refinement writes it, 26 columns."""
    rng = np.random.default_rng(1)
    labels = [
        "rlnCoordinateX",
        "rlnCoordinateY",
        "rlnAutopickFigureOfMerit",
        "rlnClassNumber",
        "rlnAnglePsi",
        "rlnImageName",
        "rlnMicrographName",
        "rlnOpticsGroup",
        "rlnCtfMaxResolution",
        "rlnCtfFigureOfMerit",
        "rlnDefocusU",
        "rlnDefocusV",
        "rlnDefocusAngle",
        "rlnCtfBfactor",
        "rlnCtfScalefactor",
        "rlnPhaseShift",
        "rlnGroupNumber",
        "rlnAngleRot",
        "rlnAngleTilt",
        "rlnOriginXAngst",
        "rlnOriginYAngst",
        "rlnNormCorrection",
        "rlnLogLikeliContribution",
        "rlnMaxValueProbDistribution",
        "rlnNrOfSignificantSamples",
        "rlnRandomSubset",
    ]
    optics = [
        "rlnOpticsGroup",
        "rlnOpticsGroupName",
        "rlnVoltage",
        "rlnSphericalAberration",
        "rlnAmplitudeContrast",
        "rlnImagePixelSize",
        "rlnImageSize",
        "rlnMicrographPixelSize",
    ]
    with open(folder / "particles.star", "w", encoding="utf-8") as file:
        file.write("\ndata_optics\n\nloop_\n" + "".join(f"_{n} #{i + 1}\n" for i, n in enumerate(optics)))
        file.write("1 opticsGroup1 300.0 2.7 0.1 1.77 64 0.885\n\n\ndata_particles\n\nloop_\n")
        file.write("".join(f"_{n} #{i + 1}\n" for i, n in enumerate(labels)))
        per = rows // micrographs
        for m in range(micrographs):
            v = 0.1 + 0.8 * rng.random((per, 20))  # places in cells of a grid, apart: two at one place would be one particle
            for i in range(per):
                a = v[i]
                file.write(
                    f"{(i % 15 + a[0]) * 260:12.6f} {(i // 15 + a[1]) * 260:12.6f} {a[2]:12.6f} 1 {a[3] * 360:12.6f} "
                    f"{i + 1:06d}@Extract/job018/m{m:05d}.mrcs "
                    f"MotionCorr/job002/m{m:05d}.mrc 1 {a[4] * 8:12.6f} {a[5]:12.6f} {5e3 + a[6] * 2e4:12.6f} {5e3 + a[7] * 2e4:12.6f} "
                    f"{a[8] * 180:12.6f} 0.000000 1.000000 0.000000 1 {a[9] * 360:12.6f} {a[10] * 180:12.6f} {a[11]:12.6f} {a[12]:12.6f} "
                    f"{a[13]:12.6f} {a[14] * 1e5:12.6f} {a[15]:12.6f} 3 {1 + i % 2}\n"
                )
    content = {"name": "star", "pipeline": [{"import_particles": {"star": "particles.star", "images": False}}]}
    (folder / "star.yaml").write_text(yaml.safe_dump(content))


def draw(figures: dict[str, float]) -> None:
    """Share of each goal that was used, in ``benchmarks/out/datamodel.png``."""
    from matplotlib.figure import Figure

    OUT.mkdir(exist_ok=True)
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(figures), [value / GOALS[name] for name, value in figures.items()], color="#4878a8")
    axes.bar_label(bars, [f"{value:.2f}" for value in figures.values()], fontsize=8)
    axes.axvline(1.0, color="black", lw=0.7)
    axes.invert_yaxis()
    axes.set(xlabel="share of the goal")
    figure.savefig(OUT / "datamodel.png", dpi=120)


if __name__ == "__main__":
    main()
