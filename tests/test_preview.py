"""The dry run: memory, lanes and clusters that are checked before work, and what the work would take."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import test_counts as counts
import yaml
from _once import simulated
from distributed import Client
from typer.testing import CliRunner

from cryodask.cli import app
from cryodask.errors import ProjectFileError
from cryodask.formats.movies import write_tiff_movie
from cryodask.formats.mrc import write_mrc
from cryodask.run.preview import lines, preview
from cryodask.run.recipe import draft_plan, make_plan
from cryodask.run.selection import Wanted
from cryodask.run.session import check_inputs, run_plan
from cryodask.run.watch import Until
from cryodask.simulate import SessionParams
from cryodask.stage import STAGES, Params, Resources, stage
from cryodask.store.identity import row_of
from cryodask.store.project import Project

MICROSCOPE = {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "pixel_size_angstrom": 1.77, "dose_per_frame": 6.667}
FIRST = ["motion", "ctf", {"pick": {"diameter_angstrom": 180}}]
SMALL = {"memory": "1GiB", "cores": 4, "processes": 4}
"""0.9 * 2**30 / 4 = 241591910 bytes a worker."""


def project_file(folder, pipeline=FIRST, **more):
    content = {"name": "p", "inputs": {"movies": "movies/*.tif"}, "microscope": MICROSCOPE, "pipeline": pipeline, **more}
    (folder / "p.yaml").write_text(yaml.safe_dump(content))
    return folder / "p.yaml"


def movies(folder, shape=(6, 64, 64), count=2):
    (folder / "movies").mkdir()
    for i in range(count):
        write_tiff_movie(folder / "movies" / f"m{i}.tif", np.full(shape, i, np.uint8), 1.77)
    return folder


def cluster_file(folder, **content):
    (folder / "cluster.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return str(folder / "cluster.yaml")


def slurm(folder, **pools):
    return cluster_file(folder, kind="slurm", pools=pools)


def problems(path, cluster, **asked):
    return preview(draft_plan(path), Wanted(cluster=cluster, **asked)).problems


# --- micrographs -----------------------------------------------------------------------------------------------------------------
def test_a_box_that_no_micrograph_holds_is_refused_without_speaking_of_memory(tmp_path):
    movies(tmp_path, (2, 64, 48))
    small = {"pick": {"diameter_angstrom": 60}}
    assert preview(draft_plan(project_file(tmp_path, ["motion", small, {"extract": {"box": 48}}]))).problems == []
    (said,) = preview(draft_plan(project_file(tmp_path, ["motion", small, {"extract": {"box": 20000}}]))).problems
    assert said.startswith("extract: a box of 20000 pixels is larger than the micrographs (64 x 48 pixels)")
    (said,) = preview(draft_plan(project_file(tmp_path, [{"motion": {"binning": 2}}, small, {"extract": {"box": 32}}]))).problems
    assert said.startswith("extract: a box of 32 pixels is larger than the micrographs (32 x 24 pixels)")


def test_an_unknown_point_group_is_told_once(tmp_path):
    movies(tmp_path)
    write_mrc(tmp_path / "m.mrc", np.random.default_rng(0).normal(size=(8, 8, 8)).astype("f4"), 1.77)
    cut = ["motion", "ctf", {"pick": {"diameter_angstrom": 60}}, {"extract": {"box": 8}}]
    path = project_file(tmp_path, [*cut, {"refine3d": {"reference": "m.mrc"}}, {"refine3d as again": {}}, "ctf_refine"])
    assert [w.partition(":")[0] for w in draft_plan(path).graph.warnings if "point group" in w] == ["refine3d"]


def test_an_empty_path_is_refused(tmp_path):
    with pytest.raises(ProjectFileError, match=r"inputs\.movies: the path is empty"):
        draft_plan(project_file(tmp_path, inputs={"movies": ""}))


# --- memory --------------------------------------------------------------------------------------------------------------------
# motion states 6 * 64 * 64 + 4 * (4 + 5) * 64 * 64 + 2.5e8 = 250172032 bytes for such a movie, ctf 4 * 64 * 64 + 2e8 = 200016384
def test_a_step_that_no_pool_can_hold_is_refused_with_the_memory_of_each(tmp_path):
    path, cluster = project_file(movies(tmp_path)), slurm(tmp_path, cpu=SMALL, gpu={"memory": "500MiB", "cores": 2, "gpus": 2})
    said = (
        "motion needs about 0.25 GB for an exposure of 6 x 64 x 64, but no pool has workers with that much: cpu 0.24 GB, gpu 0.24 GB "
        f"per worker. Give a pool of {cluster} more memory, or fewer processes."
    )
    assert problems(path, cluster) == [said]
    assert problems(project_file(tmp_path, cluster="cluster.yaml"), None) == [said]


def test_one_pool_that_can_hold_it_is_enough(tmp_path):
    path = project_file(movies(tmp_path))
    assert problems(path, slurm(tmp_path, cpu=SMALL, large={**SMALL, "memory": "2GiB"})) == []
    assert problems(path, slurm(tmp_path, cpu={**SMALL, "processes": 2})) == []


@pytest.mark.parametrize(("workers", "fits"), [(1, True), (10_000_000, False)])
def test_local_workers_share_the_machine(tmp_path, workers, fits):
    path = project_file(movies(tmp_path))
    found = preview(draft_plan(path), Wanted(workers=workers)).problems
    assert found == [] if fits else [p.split()[0] for p in found] == ["motion", "ctf", "pick"]
    assert fits or "Use fewer workers" in found[0]


def test_local_workers_whose_memory_the_file_says_need_more_of_it(tmp_path):
    cluster = cluster_file(tmp_path, kind="local", workers=1, memory="220MiB")
    (found,) = problems(project_file(movies(tmp_path)), cluster, workers=2)
    assert found.endswith(f"each worker has 0.23 GB. Raise memory in {cluster}.")


def test_steps_over_maps_are_checked_with_the_edge_of_an_imported_map(tmp_path):
    # mask states 40 * 64**3 = 10485760 bytes, postprocess 60 * 64**3 = 15728640; a worker has 0.9 * 12 * 2**20 = 11324620
    for seed, name in enumerate(("a.mrc", "b.mrc")):
        write_mrc(tmp_path / name, np.random.default_rng(seed).normal(size=(64, 64, 64)).astype(np.float32), 2.0)
    path = project_file(tmp_path, ["mask", "postprocess"], inputs={"half_maps": ["a.mrc", "b.mrc"]})
    (found,) = problems(path, slurm(tmp_path, cpu={"memory": "12MiB"}))
    assert found.startswith("postprocess needs about 0.02 GB for 64 pixels, but no pool has workers with that much: cpu 0.01 GB")


def test_steps_over_maps_are_checked_with_the_edge_of_the_particles(tmp_path):
    # mask states 40 * 512**3 = 5.4 GB, postprocess 60 * 512**3 = 8.05 GB; a worker has 0.9 * 8 * 2**30 = 7.7 GB
    cut = {"extract": {"box": 600, "scale_to": 512}}
    path = project_file(movies(tmp_path, (2, 600, 600)), [*FIRST, cut, "ab_initio", "refine3d", "mask", "postprocess"])
    (found,) = problems(path, slurm(tmp_path, cpu={"memory": "8GiB"}))
    assert found.startswith("postprocess needs about 8.05 GB for 512 pixels")


@pytest.mark.parametrize("watch", [False, True])
def test_a_run_stops_before_any_work_where_the_dry_run_finds_a_problem(tmp_path, watch):
    (tmp_path / "cluster.yaml").write_text("kind: slum\n")
    path = project_file(movies(tmp_path), cluster="cluster.yaml")
    with pytest.raises(ProjectFileError, match="no kind of cluster 'slum'"):
        check_inputs(make_plan(path), Wanted(watch=Until() if watch else None))
    assert "no kind of cluster 'slum'" in preview(draft_plan(path)).problems[0]


def test_the_command_stops_before_any_job_is_submitted(tmp_path):
    path, cluster = project_file(movies(tmp_path)), slurm(tmp_path, cpu=SMALL)
    result = CliRunner().invoke(app, ["run", str(path), "--cluster", cluster])
    assert isinstance(result.exception, ProjectFileError)
    assert "motion needs about 0.25 GB" in result.exception.what
    dry = CliRunner().invoke(app, ["run", str(path), "--cluster", cluster, "--dry-run"])
    assert dry.exit_code == 2
    assert "problem: motion needs about 0.25 GB" in dry.stdout


# --- clusters and lanes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cluster", ["tcp://10.0.0.1:8786", "scheduler.json"])
def test_what_others_run_is_not_looked_for(tmp_path, cluster):
    assert problems(project_file(movies(tmp_path)), cluster) == []


@pytest.mark.parametrize("cluster", ["nobody-has-this", "gone.invite"])
def test_a_cluster_that_nobody_has_is_a_problem(tmp_path, cluster, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (found,) = problems(project_file(movies(tmp_path)), cluster)
    assert cluster in found


@pytest.mark.parametrize("kind", ["local", "slurm"])
def test_a_lane_that_the_cluster_file_lacks_is_told_and_counts_as_the_default_one(tmp_path, kind):
    more = {"pools": {"cpu": {"memory": "4GiB"}}} if kind == "slurm" else {}
    cluster = cluster_file(tmp_path, kind=kind, lanes={"live": 3, "hpda": 1}, default_lane="hpda", **more)
    path = project_file(movies(tmp_path))
    said = [f"{cluster} has no lane 'life': the work would be charged to 'hpda'. Its lanes are live, hpda."]
    assert preview(draft_plan(path), Wanted(cluster=cluster, lane="life")).warnings == said
    assert check_inputs(make_plan(path), Wanted(cluster=cluster, lane="life")) == said
    assert check_inputs(make_plan(path), Wanted(cluster=cluster, lane="life", watch=Until())) == said
    shown = CliRunner().invoke(app, ["run", str(path), "--cluster", cluster, "--lane", "life", "--dry-run"])
    assert shown.exit_code == 0
    assert f"warning: {said[0]}" in shown.stdout


@pytest.mark.parametrize("lane", ["live", "hpda", "rest", None])
def test_lanes_that_there_are_and_the_default_one_are_fine(tmp_path, lane):
    cluster = cluster_file(tmp_path, kind="local", lanes={"live": 3, "hpda": 1}, default_lane="rest")
    assert preview(draft_plan(project_file(movies(tmp_path))), Wanted(cluster=cluster, lane=lane)).warnings == []


def test_where_no_lanes_are_listed_every_name_is_a_lane(tmp_path):
    path = project_file(movies(tmp_path))
    assert preview(draft_plan(path), Wanted(cluster=slurm(tmp_path, cpu={"memory": "4GiB"}), lane="anything")).warnings == []
    assert preview(draft_plan(path), Wanted(lane="anything")).warnings == []


# --- what it would take ----------------------------------------------------------------------------------------------------------
def test_without_records_the_measured_costs_say_what_a_movie_takes(tmp_path):
    """A movie of 40 x 1024 x 1024 has 41.94304 frame megapixels, 1.048576 a frame; the other numbers are those of stage_costs.json."""
    path = project_file(movies(tmp_path, (40, 1024, 1024)), [*FIRST, {"extract": {"box": 128}}, "classify2d"])
    plan = draft_plan(path)
    shown = preview(plan)
    by = {s.step: s for s in shown.steps}
    assert by["ingest"].cpu_seconds == pytest.approx(2 * (0.1133 + 0.000432 * 41.94304 + 0.0897 + 0.00551 * 41.94304))
    assert by["motion"].cpu_seconds == pytest.approx(2 * 0.015595 * 41.94304)
    assert by["ctf"].cpu_seconds == pytest.approx(2 * (0.1997 + 0.067325 * 1.048576))
    assert by["pick"].cpu_seconds == pytest.approx(2 * (0.0305 + 0.075849 * 1.048576))
    assert [by[label].cpu_seconds for label in ("extract", "classify2d")] == [None, None], "nobody knows how many particles there are"
    assert {by[label].cpu_seconds_from for label in ("ingest", "motion", "ctf", "pick")} == {"stage_costs"}
    # 0.904 + 1.308 + 0.541 + 0.220 = 2.973
    assert lines(plan, shown)[6:] == [
        "in all about 3.0 CPU s: 3.0 from stage_costs, measured on another machine (docs/planning.md); 2 steps have no estimate"
    ]
    assert lines(plan, shown)[1].startswith("  motion      2 exposures, new, about 1.3 CPU s (stage_costs)  exposures of ingest")
    as_json = {s["step"]: s for s in json.loads(shown.as_json())["steps"]}
    assert as_json["motion"]["cpu_seconds_from"] == "stage_costs"
    assert "cpu_seconds_from" not in as_json["extract"]


CUT = {"extract": {"box": 128, "scale_to": 32}}
PICKED = ["motion", "ctf", {"pick": {"diameter_angstrom": 180, "threshold": 0.0}}]
CLASSES = {"classes": 2, "iterations": 2}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preview")
    params = SessionParams(movies=4, height=512, width=512, frames=6, dose_per_frame=40 / 6, particles=11, truth_maps=())
    simulated(tmp_path_factory, folder, params)
    return folder


@pytest.fixture(scope="module")
def done(session, client):
    path = project_file(session, [*PICKED, CUT, {"classify2d": CLASSES}])
    return run_plan(make_plan(path), client)


def _ids(project, label):
    return project.particles(label)["particle_id"].values


def _ahead(session, pipeline):
    return {s.step: s for s in preview(draft_plan(project_file(session, pipeline))).steps}


def test_a_step_that_was_done_before_takes_what_its_records_say(session, done):
    by = _ahead(session, [{"motion": {"patches": [2, 2]}}, *PICKED[1:], CUT, {"classify2d": CLASSES}])
    took = [r["cpu_seconds"] for r in done.records("motion").values()]
    assert by["motion"].cpu_seconds == pytest.approx(sum(took))
    assert by["motion"].cpu_seconds_from == "records"
    assert by["classify2d"].todo is by["classify2d"].cpu_seconds is None, "its particles are not known before they are picked"


def test_a_step_over_a_set_scales_with_its_particles(session, done, client):
    score = float(np.median(done.particles("extract")["pick_score"].values))
    pipeline = [*PICKED, CUT, {"select": {"where": f"pick_score > {score:.6f}"}}]
    every = {"classify2d": {**CLASSES, "from": {"particles": "extract"}}}
    run_plan(make_plan(project_file(session, [*pipeline, every])), client)
    some, all_of_them = len(_ids(Project(done.path), "select")), len(_ids(done, "extract"))
    assert 0 < some < all_of_them
    seconds = next(iter(done.records("classify2d").values()))["seconds"]
    by = _ahead(session, [*pipeline, {"classify2d": CLASSES}])
    assert by["classify2d"].todo == some
    assert by["classify2d"].cpu_seconds == pytest.approx(seconds * some / all_of_them)
    assert by["classify2d"].cpu_seconds_from == "records"


def test_a_new_step_over_known_particles_takes_what_was_measured(session, done):
    """stage_costs.json: 0.5783 CPU s and 0.005235 per particle at 64 pixels (no less at 32); 0.0303 per movie, 0.034531 per megapixel."""
    wide = {"extract as wide": {"box": 96, "from": {"particles": "pick"}}}
    found = _ahead(session, [*PICKED, CUT, {"classify2d": CLASSES}, {"classify2d as more": {"classes": 3}}, wide])
    assert found["more"].cpu_seconds == pytest.approx(0.5783 + 0.005235 * len(_ids(done, "extract")))
    picked = _ids(done, "pick")
    mean = round(len(picked) / len(np.unique(row_of(picked))))
    assert found["wide"].cpu_seconds == pytest.approx(4 * (0.0303 + 0.034531 * mean * 96**2 / 1e6))
    assert {found[label].cpu_seconds_from for label in ("more", "wide")} == {"stage_costs"}


# --- a stage of somebody else ------------------------------------------------------------------------------------------------------
class CountedParams(Params):
    """No parameters."""


@pytest.fixture
def greedy():
    """A stage that wants a gigabyte for each pixel of each of its particles."""

    def all_images(params: CountedParams, *, particle_image, context) -> dict[str, np.ndarray]:
        """Keeps everything."""

    def memory(params, sizes):
        return 1e9 * sizes["slot"] * sizes["y"] * sizes["x"]

    yield stage(version=1, shape="whole", needs=["particle_image"], gives=["annotation"], resources=Resources(memory=memory))(all_images)
    del STAGES["all_images"]


@pytest.mark.usefixtures("greedy")
def test_a_stage_over_particles_is_checked_with_the_particles_that_the_project_has(session, done, tmp_path):
    count, cluster = len(_ids(done, "extract")), slurm(tmp_path, cpu={"memory": "1GiB"})
    (found,) = problems(project_file(session, [*PICKED, CUT, "all_images"]), cluster)
    assert found.startswith(f"all_images needs about {32 * 32 * count}.0 GB for {count} particles of 32 pixels, but no pool")
    unknown = project_file(tmp_path, [*PICKED, CUT, "all_images"], inputs={"movies": str(session / "movies" / "*.tif")})
    assert problems(unknown, cluster) == [], "without a project nobody knows how many there are"


# --- the dry run announces what the run does ----------------------------------------------------------------------------------------
def counted(folder, client, pipeline, before):
    """What the dry run announces of each step over exposures, after the run has done exactly that."""
    told = {s.step: s.todo for s in preview(draft_plan(counts.write(folder, pipeline))).steps if not s.done and s.todo}
    project = counts.run(folder, client, pipeline)
    maps = [label for label in project.stages if project.generation(label).meta["per_item"]]
    done = counts.renewed(before, project)
    assert {label: told[label] for label in maps if label in told} == {label: done[label] for label in maps if label in done}
    return {label: done[label] for label in maps if label in done}


TOYS = counts.PIPELINE[:6]


@pytest.fixture(scope="module")
def here():
    """A cluster in this process: the toy stages are known here only."""
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as one:
        yield one


def _toy(folder, here, pipeline=TOYS, count=4):
    return counts.made(counts.run(counts.session(folder, count), here, pipeline))


def _not_done(folder, pipeline):
    return [s.step for s in preview(draft_plan(counts.write(folder, pipeline))).steps if not s.done]


def test_exposures_that_a_selection_leaves_out_are_not_announced(tmp_path, here):
    selected = [*TOYS[:3], {"select_exposures": {"leave_out": ["m001"]}}, *TOYS[3:]]
    _toy(tmp_path, here, selected)
    assert _not_done(tmp_path, selected) == []


def test_edited_picks_are_not_announced_again(tmp_path, here):
    edited = [*TOYS[:3], {"edit_picks": {"file": "e.csv"}}, *TOYS[3:5]]
    (tmp_path / "e.csv").write_text("micrograph,action,y,x,particle_id\nm001,add,6,6,\n")
    before = _toy(tmp_path, here, edited)
    assert _not_done(tmp_path, edited) == []
    (tmp_path / "e.csv").write_text("micrograph,action,y,x,particle_id\nm001,add,6,7,\n")
    assert counted(tmp_path, here, edited, before)["edit_picks"] == 1


def test_exposures_that_were_forgotten_are_not_announced_as_new(tmp_path, here):
    _toy(tmp_path, here)
    Project(tmp_path / "toy").forget_exposures(["m001"])
    counts.run(tmp_path, here, TOYS)
    assert _not_done(tmp_path, TOYS) == []
    before = counts.made(Project(tmp_path / "toy"))
    counts.movie(tmp_path, 9)
    assert set(counted(tmp_path, here, TOYS, before).values()) == {1}


def test_what_would_be_linked_is_not_announced(tmp_path, here):
    before = _toy(tmp_path, here)
    fewer = [*TOYS[:5], {"toy_curate": {"leave_out_above": 9.0}}, {"toy_extract as full": {"number": 3}}]
    before = counts.made(counts.run(tmp_path, here, fewer)) | before
    # another step whose generation is new, with what an earlier one holds: nothing is computed
    same = [*fewer[:5], {"toy_curate": {"leave_out_above": 9.5}}, fewer[6]]
    counts.run(tmp_path, here, same, until="toy_curate")
    assert [s.todo for s in preview(draft_plan(tmp_path / "toy.yaml")).steps] == [0] * 8
    assert counted(tmp_path, here, same, before) == {}
    # and what needs the rest is counted, not guessed
    other = [{"toy_motion": {"number": 2}}, *TOYS[1:]]
    assert counted(tmp_path, here, other, before) == dict.fromkeys(("toy_motion", "toy_ctf", "toy_pick", "toy_extract"), 4)
    assert counted(tmp_path, here, TOYS, before) == {}


@pytest.mark.parametrize("until", ["toy_classify", "toy_extract"])
def test_classes_that_were_chosen_from_another_classification_are_a_problem(tmp_path, here, until):
    chosen = [*TOYS[:5], {"curate": {"keep": [1]}}]
    _toy(tmp_path, here, chosen)
    other = [*TOYS[:4], {"toy_classify": {"number": 2}}, {"curate": {"keep": [1]}}]
    counts.run(tmp_path, here, other, until=until)
    shown = preview(draft_plan(tmp_path / "toy.yaml"))
    assert len(shown.problems) == 1
    assert shown.problems[0].startswith("curate: classes 1 were chosen from toy_classify@")
    assert preview(draft_plan(tmp_path / "toy.yaml"), Wanted(update=("curate",))).problems == []
    with pytest.raises(ProjectFileError, match="classes 1 were chosen"):
        counts.run(tmp_path, here, other)


def test_nothing_is_written_by_a_dry_run(tmp_path, here):
    _toy(tmp_path, here)
    counts.movie(tmp_path, 9)
    path = counts.write(tmp_path, [{"toy_motion": {"number": 2}}, *TOYS[1:]])
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "toy").rglob("*")}
    preview(draft_plan(path))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "toy").rglob("*")} == before


def test_a_threshold_that_is_undone_cuts_nothing_again(session, done, client, tmp_path):
    shutil.copytree(session, tmp_path / "s")
    folder = tmp_path / "s"
    before = counts.made(Project(done.path))
    limit = float(np.median(done.particles("extract")["pick_score"].values))
    higher = [*PICKED[:2], {"pick": {"diameter_angstrom": 180, "threshold": limit}}, CUT]
    changed = counts.renewed(before, run_plan(make_plan(project_file(folder, higher)), client))
    assert 0 < changed["extract"] <= 4
    assert set(changed) == {"extract"}
    assert counts.renewed(before, run_plan(make_plan(project_file(folder, [*PICKED, CUT])), client)) == {}
