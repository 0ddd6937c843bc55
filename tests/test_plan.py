"""What a facility needs: the arithmetic, what it rests on, and whether it covers a real facility."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
import yaml
from typer.testing import CliRunner

from cryodask.cli_plan import plan
from cryodask.costs import Load, ParticleCost, measured_costs
from cryodask.errors import ProjectFileError
from cryodask.plan import SHAPES, costs_of_project, plan_facility
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.simulate import SessionParams, simulate_session

app = typer.Typer()
app.command()(plan)
app.command("other")(lambda: None)


def shown(*words):
    return CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "200"}, catch_exceptions=False)


@pytest.fixture(scope="module")
def sessions(shared):
    """Sessions of a real facility: two microscopes, 114 sessions, movies an hour where the times of the files tell them."""
    return pd.read_csv(shared / "data" / "metadata" / "facility" / "sessions_emhub.csv")


def test_twice_the_microscopes_need_twice_of_everything():
    one, two = (plan_facility(Load(microscopes=n), "mixed") for n in (1, 2))
    for name in ("cores for live", "cores for batch", "raw movies", "results", "writing", "reading", "network"):
        assert two[name] == pytest.approx(2 * one[name])
    assert two["memory of a worker"] == one["memory of a worker"]


def test_the_sum_can_be_done_by_hand():
    load = Load(microscopes=4, movies_per_hour=300, camera="falcon", frames=40, particles=200, box=320, scale_to=128)
    costs = measured_costs()
    found = plan_facility(load, "mixed", costs)
    pixels = 4096 * 4096 / 1e6
    seconds = sum(
        cost.fixed
        + cost.per_unit * {"frame megapixel": 40 * pixels, "megapixel": pixels, "particle megapixel": 200 * 320**2 / 1e6}[cost.unit]
        for cost in costs.map_stages.values()
    )
    live = 4 * 300 / 3600 * seconds / 0.7
    in_a_set = 300 * 24 * 200  # of a microscope and day; half of them are refined
    flat, refined = costs.particle_stages["classify2d"][64], costs.particle_stages["refine3d"][128]  # classes cost no more at 128 pixels
    runs = flat.fixed + flat.per_particle * in_a_set
    runs += refined.fixed + refined.per_particle * in_a_set / 2 + refined.per_drawn * min(in_a_set / 2, refined.drawn)
    batch = 4 * 2 * runs / 86400 / 0.7
    assert found["cores for live"] == pytest.approx(live)
    assert found["cores for batch"] == pytest.approx(batch, rel=1e-6)
    assert found["cores"] == math.ceil(max((live + batch) / 0.75, 2 * live))
    movie = 40 * 4096**2 * costs.bytes["lzw_movie_per_count"]
    assert found["raw movies"] == pytest.approx(4 * 300 * 24 * 14 * movie / 1e12)


def test_costs_of_a_movie_are_those_that_were_measured():
    costs = measured_costs()
    seconds = costs.movie_seconds(Load(camera="falcon", frames=40, particles=210))
    assert {"ingest", "motion", "ctf", "pick", "extract", "store"} == set(seconds)
    # 3838 x 3710 x 32 frames took 10.7 s with reading in benchmarks/motion.py
    motion = costs.map_stages["motion"].per_unit * 3838 * 3710 * 32 / 1e6
    assert 0.5 * 10.7 < motion < 1.5 * 10.7
    small, middle, large = (costs.particle_seconds("refine3d", box, 1e5) for box in (64, 128, 256))
    assert small < middle < large
    assert costs.particle_seconds("classify2d", 16, 1000) == costs.particle_seconds("classify2d", 64, 1000)


def test_particles_cost_a_fixed_part_and_passes_that_draw_some_of_them():
    cost = ParticleCost(fixed=10.0, per_particle=0.01, per_drawn=0.1, drawn=1000)
    assert [cost.seconds(n) for n in (0, 500, 1000, 3000)] == pytest.approx([10.0, 65.0, 120.0, 140.0])


def test_between_and_beyond_two_boxes_seconds_are_a_power_law():
    by_box = {64: ParticleCost(2.0, 0.02, 0.0, 0), 128: ParticleCost(1.0, 0.07, 0.1, 100)}  # of 100 particles 4 and 18 s
    costs = replace(measured_costs(), particle_stages={"refine3d": by_box, "ab_initio": {64: by_box[64]}})
    found = [costs.particle_seconds("refine3d", box, 100) for box in (32, 64, 128, 256)]
    assert found == pytest.approx([4.0, 4.0, 18.0, 81.0])
    assert [costs.particle_seconds("ab_initio", box, 100) for box in (64, 256)] == pytest.approx([4.0, 4.0])


def test_movies_that_stay_where_they_lie_save_their_copy():
    copied, in_place = (plan_facility(Load(in_place=x), "preprocessing") for x in (False, True))
    assert in_place["raw movies"] == copied["raw movies"]
    assert in_place["results"] < 0.7 * copied["results"]
    assert in_place["writing"] < copied["writing"]


def test_shapes_differ_in_what_they_do():
    preprocessing, analysis, mixed = (plan_facility(Load(), shape) for shape in SHAPES)
    names = [n.name for n in analysis.needs]
    assert "cores for live" not in names
    assert analysis["raw movies"] == 0
    assert preprocessing["cores for batch"] < mixed["cores for batch"] == analysis["cores for batch"]
    assert (preprocessing["GPUs"], analysis["GPUs"], mixed["GPUs"]) == (0, 0, 1)


def test_weights_are_those_of_the_blueprints():
    folder = Path(__file__).parents[1] / "configs" / "blueprints"
    for name, weights in SHAPES.items():
        lanes = yaml.safe_load((folder / f"{name}.yaml").read_text())["cluster"]["lanes"]
        assert {n: lane["weight"] if isinstance(lane, dict) else lane for n, lane in lanes.items()} == weights


def test_nonsense_is_refused_in_a_sentence():
    with pytest.raises(ProjectFileError, match="frames is out of range"):
        Load(frames=0)
    with pytest.raises(ProjectFileError, match="hours_per_day"):
        Load(hours_per_day=25)
    with pytest.raises(ProjectFileError, match="no camera 'k4'"):
        Load(camera="k4")
    with pytest.raises(ProjectFileError, match="no blueprint"):
        plan_facility(Load(), "mixd")


def test_the_table_shows_needs_and_every_assumption():
    out = shown("--microscopes", "4", "--movies-per-hour", "300", "--blueprint", "mixed").stdout
    made = plan_facility(Load(microscopes=4), "mixed")
    for need in made.needs:
        assert need.name in out
    for assumption in made.assumptions:
        assert assumption.name in out
    assert "benchmarks/stage_costs.py" in out


def test_json_holds_the_same_numbers():
    out = json.loads(shown("--microscopes", "4", "--frames", "40", "--box", "300", "--json").stdout)
    made = plan_facility(Load(microscopes=4, frames=40, box=300, scale_to=150), "mixed")
    assert {n["name"]: n["value"] for n in out["needs"]} == {n.name: n.value for n in made.needs}
    assert out["load"]["scale_to"] == 150


# --- against a real facility -----------------------------------------------------------------------------------------------------
def test_default_movies_are_as_large_as_real_ones(sessions):
    """The median of 114 real sessions is 316 MB a movie."""
    each = Load()
    planned = each.frame_megapixels * measured_costs().bytes["lzw_movie_per_count"]
    real = sessions["bytes_per_movie"] / 1e6
    assert 0.8 * real.median() < planned < 1.5 * real.median()


def test_cores_for_the_rate_of_every_real_session_keep_up_with_it(sessions):
    """Cores for the session's own rate and size of movies do its movies in less time than it took to record them."""
    rated = sessions.dropna(subset=["movies_per_hour"])
    assert len(rated) == 26
    assert rated["movies_per_hour"].max() > 800
    for _, s in rated.iterrows():
        size = s["bytes_per_movie"] / 1e6
        load = Load(camera="k3", movies_per_hour=s["movies_per_hour"], movie_megabytes=size)
        found = plan_facility(load, "preprocessing")
        hours = s["movies"] * sum(found.movie_seconds.values()) / found["cores for live"] / 3600
        assert hours < s["movies"] / s["movies_per_hour"]
        assert found["writing"] * 3600e9 > s["movies_per_hour"] * s["bytes_per_movie"]


def test_default_plan_of_two_microscopes_covers_what_two_real_ones_recorded(sessions):
    """Storage for movies kept thirty days covers the most that this facility recorded in any thirty days."""
    start = pd.to_datetime(sessions["start"])
    by_day = sessions.set_index(start)["total_bytes"].sort_index().resample("D").sum()
    most = by_day.rolling("30D").sum().max()
    found = plan_facility(Load(microscopes=2, movies_per_hour=300, days_raw=30), "preprocessing")
    assert sessions["resource"].nunique() == 2
    assert most < found["raw movies"] * 1e12
    busiest = sessions.dropna(subset=["movies_per_hour"]).groupby("resource")["movies_per_hour"].median()
    assert busiest.sum() < 2 * 300 * 1.5


# --- from a project --------------------------------------------------------------------------------------------------------------
def test_a_project_of_the_user_tells_what_its_movies_took(client, tmp_path):
    simulate_session(tmp_path, SessionParams(movies=2, height=512, width=512, frames=6, particles=10, truth_maps=((32, 7.0),)))
    (tmp_path / "p.yaml").write_text(
        "name: p\ninputs: {movies: 'movies/*.tif', gain: gain.mrc}\n"
        "microscope: {voltage_kv: 300, spherical_aberration_mm: 2.7, pixel_size_angstrom: 1.77, dose_per_frame: 1.67}\n"
        "pipeline: [motion, ctf, {pick: {diameter_angstrom: 180}}, {extract: {box: 160, scale_to: 80}}]\n"
    )
    project = run_plan(make_plan(tmp_path / "p.yaml"), client)
    costs, load = costs_of_project(tmp_path / "p")
    assert load["frames"] == 6
    assert load["megapixels"] == pytest.approx(512 * 512 / 1e6)
    assert (load["box"], load["scale_to"]) == (160, 80)
    sizes = [p.stat().st_size for p in (tmp_path / "movies").iterdir()]
    assert load["movie_megabytes"] == pytest.approx(np.mean(sizes) / 1e6)
    took = np.mean([r["cpu_seconds"] for r in project.records("motion").values()])
    assert costs.movie_seconds(Load(**load))["motion"] == pytest.approx(took)
    assert costs.map_stages["store"] == measured_costs().map_stages["store"]
    text = shown("--from", str(tmp_path / "p")).stdout
    assert "CPU seconds and bytes of 2 movies" in text
    assert plan_facility(replace(Load(**load), frames=12), "preprocessing", costs)["cores for live"] > 0


def test_a_project_without_movies_is_refused(tmp_path):
    from cryodask.store.project import Project

    Project.create(tmp_path / "empty", "empty").save()
    with pytest.raises(ProjectFileError, match="has no record of what its movies cost"):
        costs_of_project(tmp_path / "empty")
