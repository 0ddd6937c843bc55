"""EER movies, and compressed MRC movies with a list of defects, through a run; EER movies for RELION."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from distributed import Client

from cryodask.formats.movies import write_mrc_movie
from cryodask.formats.mrc import read_mrc
from cryodask.formats.star import read_tables
from cryodask.interop.relion import export_relion
from cryodask.run.checks import look_ahead
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.run.sources import list_exposures
from cryodask.simulate import SessionParams, prepare_session, simulate_movie, simulate_one
from cryodask.simulate.session import session_detector
from cryodask.store.project import Project

PARAMS = SessionParams(movies=1, height=192, width=256, frames=4, particles=2, truth_maps=(), format="eer", camera_frames=20, seed=5)
OPTICS = {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "pixel_size_angstrom": 1.77}


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    prepare_session(folder, PARAMS)
    simulate_one(folder, PARAMS, 0)
    counts = simulate_movie(PARAMS, 0)[0]
    (folder / "packed").mkdir()
    write_mrc_movie(folder / "plain.mrc", counts, 1.77)
    (folder / "packed" / "other.mrc.gz").write_bytes(gzip.compress((folder / "plain.mrc").read_bytes(), 1))
    (folder / "defects.txt").write_text("CameraSizeX 256\nCameraSizeY 192\nBadColumns 100\nBadPixels 7 0\n")
    write(folder, dose_per_frame=PARAMS.dose_per_frame / 20)
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        run_plan(make_plan(folder / "both.yaml"), client=client)
    return folder


def write(folder: Path, **microscope: float) -> None:
    sets = [
        {"name": "events", "movies": "movies/*.eer", "gain": "gain.gain", "microscope": {**OPTICS, **microscope}},
        {"name": "packed", "movies": "packed/*.mrc.gz", "defects": "defects.txt", "microscope": {**OPTICS, "dose_per_frame": 1.6}},
    ]
    content = {"name": "both", "inputs": sets, "pipeline": [{"ingest": {"eer_fraction_frames": 20}}, "motion"]}
    (folder / "both.yaml").write_text(yaml.safe_dump(content))


def test_fractions_and_their_exposure_are_stored_and_used(session):
    project = Project(session / "both")
    assert project.failures() == []
    assert [item.name for item in project.items()] == ["movie_0001", "other"]
    generation = project.generation("ingest")
    first, other = (generation.committed()[row] for row in (0, 1))
    counts = simulate_movie(PARAMS, 0)[0]
    assert np.array_equal(generation.read(first, "movie").read(), np.minimum(counts, 20))
    assert np.array_equal(generation.read(other, "movie").read(), counts)
    assert generation.read(first, "frames_per_fraction") == 20
    assert generation.read(first, "dose_per_fraction") == pytest.approx(PARAMS.dose_per_frame)
    assert generation.read(other, "frames_per_fraction") == 1
    assert np.isnan(generation.read(other, "dose_per_fraction"))
    gain = np.load(session / "both" / project.state.gain["packed"])
    assert not gain[:, 100].any()
    assert gain[-1, 7] == 0  # row 0 of the file is the top
    assert (gain == 0).sum() == 193


def test_the_exposure_enters_the_key_of_eer_movies_only(session):
    before = make_plan(session / "both.yaml").constants
    assert before["events"]["eer_dose_per_frame"] == PARAMS.dose_per_frame / 20
    assert "eer_dose_per_frame" not in before["packed"]


def test_relion_gets_grouping_dose_and_a_gain_that_divides(session, tmp_path):
    export_relion(Project(session / "both"), tmp_path)
    general = read_tables(tmp_path / "motion" / "movie_0001.star")["general"]
    assert (general["rlnEERGrouping"], general["rlnEERUpsampling"]) == (20, 1)
    assert general["rlnMicrographDoseRate"] == pytest.approx(PARAMS.dose_per_frame)
    gain, live = read_mrc(tmp_path / general["rlnMicrographGainName"])[0], session_detector(PARAMS).gain > 0
    assert np.allclose(gain[live] * session_detector(PARAMS).gain[live], 1.0, rtol=1e-5)
    assert not gain[~live].any()
    other = read_tables(tmp_path / "motion" / "other.star")["general"]
    assert "rlnEERGrouping" not in other
    assert other["rlnMicrographDoseRate"] == 1.6


def test_a_plan_says_what_it_takes_from_the_metadata_or_that_they_differ(session, tmp_path):
    def warnings() -> str:
        plan = make_plan(session / "both.yaml")
        return json.dumps(look_ahead(plan, None, list_exposures(plan, None)).warnings)

    try:
        assert "e/A^2" not in warnings()
        write(session)
        assert "by the metadata of movie_0001 a camera frame has 0.08333 e/A^2, and 20 of them make a fraction of 1.67 e/A^2" in warnings()
        write(session, dose_per_frame=1.0)
        assert "give an exposure of 0.08333 e/A^2 per camera frame, the project file 1" in warnings()
    finally:
        write(session, dose_per_frame=PARAMS.dose_per_frame / 20)
