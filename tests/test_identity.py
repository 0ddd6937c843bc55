"""Who a particle is, from movies to the second refinement: ids, halves, places and reasons, on a simulated session with its truth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from _command import command
from _once import simulated

from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.simulate import SessionParams, load_truth
from cryodask.store.identity import parse_id, row_of
from cryodask.store.project import Project

pytestmark = pytest.mark.heavy

PIXEL = 1.77
PARAMS = SessionParams(movies=14, height=512, width=512, frames=6, dose_per_frame=40 / 6, particles=11, truth_maps=())
PIPELINE = [
    {"motion": {"patches": [3, 3]}},
    "ctf",
    {"pick": {"diameter_angstrom": 180}},
    {"extract": {"box": 128, "scale_to": 32}},
    {"classify2d": {"classes": 3, "iterations": 4}},
    {"curate": {"keep": [1, 2]}},
    {"extract as full": {"box": 160, "scale_to": 40, "recentre": True}},
    {"ab_initio": {"symmetry": "D2", "restarts": 1, "steps": 10, "particles": 100}},
    {"refine3d": {"iterations": 7, "from": {"particles": "full"}}},
    {"extract as again": {"box": 192, "scale_to": 48, "recentre": True}},
    {"refine3d as fine": {"iterations": 2}},
]


def write(folder: Path, pipeline=PIPELINE, name: str = "p", **more) -> Path:
    content = {
        "name": name,
        "inputs": {"movies": "movies/*.tif", "gain": "gain.mrc"},
        "microscope": {
            "voltage_kv": 300, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1, "pixel_size_angstrom": PIXEL,
            "dose_per_frame": 6.667,
        },
        "pipeline": pipeline,
        **more,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder / f"{name}.yaml"


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    simulated(tmp_path_factory, folder, PARAMS)
    return folder


@pytest.fixture(scope="module")
def done(session, client) -> Project:
    return run_plan(make_plan(write(session)), client)


def ids(project: Project, label: str) -> np.ndarray:
    return project.particles(label)["particle_id"].values


def test_every_step_is_given_exactly_the_particles_that_the_step_before_kept(done):
    assert done.failures() == []
    kept = ids(done, "curate")
    assert 0 < len(kept) < len(ids(done, "classify2d"))
    assert (ids(done, "classify2d") == ids(done, "extract")).all()
    for before, after in (("curate", "full"), ("full", "refine3d"), ("refine3d", "again"), ("again", "fine")):
        here, there = set(ids(done, before).tolist()), set(ids(done, after).tolist())
        assert there <= here
        left_out = here - there
        for one in left_out:
            said = dict(done.where(one))[after]
            assert said.startswith("left out: "), said
    assert (ids(done, "fine") == ids(done, "again")).all()
    assert len(ids(done, "fine")) >= 0.8 * len(kept)


def test_no_particle_changes_its_half_and_the_halves_are_balanced(done):
    halves: dict[int, int] = {}
    for label in ("pick", "extract", "classify2d", "curate", "full", "refine3d", "again", "fine"):
        particles = done.particles(label)
        for one, half in zip(particles["particle_id"].values.tolist(), particles["half_set"].values.tolist()):
            assert halves.setdefault(one, half) == half
    picked = done.particles("pick")
    for row in np.unique(row_of(picked["particle_id"].values)):
        half = picked["half_set"].values[row_of(picked["particle_id"].values) == row]
        assert abs(int((half == 0).sum()) - int((half == 1).sum())) <= 1


def test_positions_and_centres_are_places_in_the_exposure(done, session):
    """A box of any size shows a particle at the same place: pick, box and origin belong together."""
    for label in ("extract", "full", "again"):
        particles = done.particles(label)
        assert (np.abs(particles["position_y_angstrom"] / PIXEL - particles["particle_y"]) < 12).all()
    fine = done.particles("fine")
    assert np.allclose(fine["box_y_angstrom"] - fine["centre_y_angstrom"], fine["origin_y_angstrom"], atol=1e-3)
    # cut again at the refined centre, between pixels too: nothing remains of the origin but rounding
    again = done.particles("again")
    assert float(np.abs(again["origin_y_angstrom"]).max()) <= 0.01 * PIXEL
    assert float(np.abs(again["origin_x_angstrom"]).max()) <= 0.01 * PIXEL


def test_after_recentring_the_true_position_of_a_particle_is_within_a_pixel_of_the_centre_of_its_box(done, session):
    truth, found = load_truth(session), done.particles("again")
    movie = [truth.names.index(name) for name in found["micrograph"].values]
    away = [truth.columns[n][movie] - found[n].values[:, None] for n in ("particle_y", "particle_x")]
    nearest_px = np.nanmin(np.hypot(*away), axis=1)
    assert nearest_px.max() <= 1.0, np.sort(nearest_px)[-5:]
    assert np.median(nearest_px) < 0.5
    assert len(np.unique([*zip(movie, np.nanargmin(np.hypot(*away), axis=1))], axis=0)) == len(movie), "no particle is there twice"


def test_one_particle_is_followed_through_all_steps(done):
    dropped = np.setdiff1d(ids(done, "classify2d"), ids(done, "curate"))
    story = dict(done.where(int(dropped[0])))
    assert story["pick"] == story["extract"] == story["classify2d"] == "there"
    assert story["curate"] == "left out: its class is not wanted"
    assert story["fine"] == "not present"
    assert parse_id(story[""].split()[1]) == dropped[0]


def _counts(project: Project) -> dict[str, dict[str, float]]:
    return {label: {r["name"]: r["time"] for r in project.generation(label).records().values()} for label in project.stages}


def test_nothing_is_computed_again_where_nothing_changed(done, session, client, tmp_path):
    before = _counts(done)
    assert _counts(run_plan(make_plan(write(session)), client)) == before
    shutil.copytree(session, tmp_path / "moved")
    moved = run_plan(make_plan(tmp_path / "moved" / "p.yaml"), client)
    assert _counts(moved) == before, "a copied project computes nothing"


def test_a_project_whose_movies_were_archived_goes_on(done, session, client, tmp_path):
    shutil.copytree(session, tmp_path / "moved")
    movies = sorted((tmp_path / "moved" / "movies").iterdir())
    for movie in movies[1:]:
        movie.unlink()
    pipeline = [*PIPELINE[:-1], {"refine3d as fine": {"iterations": 3}}]
    changed = run_plan(make_plan(write(tmp_path / "moved", pipeline)), client)
    assert len(changed.items()) == PARAMS.movies
    before, after = _counts(done), _counts(changed)
    assert {label for label in before if after[label] != before[label]} == {"fine"}
    # chunked ingest: even the frames can be processed again
    again = [{"motion": {"patches": [2, 2]}}, *PIPELINE[1:4]]
    processed = run_plan(make_plan(write(tmp_path / "moved", again)), client)
    assert processed["motion"].sizes["micrograph"] == PARAMS.movies
    assert processed.failures() == []


def test_dry_run_shows_where_everything_comes_from(done, session):
    shown = command("run", session / "p.yaml", "--dry-run", "--json")
    assert shown.returncode == 0, shown.stderr
    plan = json.loads(shown.stdout)
    by = {s["step"]: s for s in plan["steps"]}
    assert all(s["done"] and s["todo"] == 0 and s["why"] == "" for s in plan["steps"])
    assert by["fine"]["inputs"] == {"exposures": "ctf", "particles": "again", "map": "refine3d"}
    assert by["full"]["inputs"] == {"exposures": "ctf", "particles": "curate"}
    assert plan["problems"] == []
