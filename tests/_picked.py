"""A small project of imported micrographs and picks: an asymmetric picture, so that nothing can be mirrored unnoticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from distributed import Client

from cryodask.formats.mrc import write_mrc
from cryodask.formats.star import write_coordinates
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.store.project import Project

SHAPE = (1300, 1700)
PLACES = np.array([(100.0, 200.0), (120.0, 1500.0), (650.0, 850.0), (1180.0, 300.0), (1040.0, 1220.0)])
PIPELINE = ["import_micrographs", "import_picks", "edit_picks"]


def micrograph(seed: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """Noise with a bright square of 9 pixels at each place, `(y, x)` float32."""
    picture = np.random.default_rng(seed).normal(0.0, 1.0, shape).astype(np.float32)
    for y, x in PLACES.astype(int):
        picture[y - 4 : y + 5, x - 4 : x + 5] += 25.0
    return picture


def picked_project(folder: Path, count: int = 3, pipeline: list[object] | None = None) -> Path:
    """Make and run the project; returns its folder."""
    (folder / "in").mkdir()
    (folder / "picks").mkdir()
    rows = []
    for k in range(count):
        write_mrc(folder / "in" / f"m{k}.mrc", micrograph(k), 2.0)
        write_coordinates(folder / "picks" / f"m{k}.star", PLACES[:, 0], PLACES[:, 1], np.linspace(3.0, 1.0, len(PLACES)))
        rows.append(f"in/m{k}.mrc 1")
    optics = "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnVoltage #2\n_rlnSphericalAberration #3\n_rlnAmplitudeContrast #4\n"
    optics += "_rlnMicrographPixelSize #5\n1 300 2.7 0.1 2.0\n"
    table = "\ndata_micrographs\n\nloop_\n_rlnMicrographName #1\n_rlnOpticsGroup #2\n" + "\n".join(rows) + "\n"
    (folder / "m.star").write_text(optics + table)
    run(folder, pipeline or PIPELINE)
    return folder / "session"


def run(folder: Path, pipeline: list[object]) -> Project:
    """Run a pipeline on the micrographs of :func:`picked_project`."""
    given = {"import_micrographs": {"star": "m.star"}, "import_picks": {"folder": "picks"}}
    steps = [{step: given[step]} if isinstance(step, str) and step in given else step for step in pipeline]
    (folder / "s.yaml").write_text(yaml.safe_dump({"name": "session", "pipeline": steps}))
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        return run_plan(make_plan(folder / "s.yaml"), client)
