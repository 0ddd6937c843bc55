"""Sets united, expanded, pooled and carried through another program: ids, halves and sources on a simulated session."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr
from _once import simulated
from _told import Told
from test_identity import ids, write

from cryodask.errors import InputError
from cryodask.formats.mrc import write_mrc
from cryodask.formats.star import read_particle_table
from cryodask.interop import export_relion
from cryodask.report import write_report
from cryodask.run.preview import preview
from cryodask.run.recipe import draft_plan, make_plan
from cryodask.run.session import run_plan
from cryodask.simulate import SessionParams
from cryodask.stages.motion import motion
from cryodask.store.identity import birth_of, copy_of, half_sets, parent_of
from cryodask.store.project import Project

pytestmark = pytest.mark.heavy

PARAMS = SessionParams(movies=4, height=512, width=512, frames=4, dose_per_frame=10, particles=11, truth_maps=((32, 7.08),))
PICKED = [{"motion": {"patches": [1, 1]}}, "ctf", {"pick": {"diameter_angstrom": 180}}]


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("united")
    simulated(tmp_path_factory, folder, PARAMS)
    return folder


def run(folder: Path, pipeline, client, name: str = "p", **more) -> Project:
    return run_plan(make_plan(write(folder, pipeline, name, **more)), client)


def sources(folder: Path, name: str = "p") -> dict[str, dict[str, list[str]]]:
    plan = draft_plan(folder / f"{name}.yaml")
    assert plan.graph.problems == ()
    return {s.label: {port: [p.ref for p in products] for port, products in s.inputs.items()} for s in plan.steps}


def test_two_pickers_joined_hold_each_particle_once(session, client):
    pipeline = [
        *PICKED,
        {"pick as other": {"diameter_angstrom": 150}},
        {"merge": {"nearer_than_angstrom": 90, "from": {"particles": ["pick", "other"]}}},
        {"extract": {"box": 128, "scale_to": 32}},
        {"classify2d": {"classes": 2, "iterations": 2}},
    ]
    project = run(session, pipeline, client)
    assert sources(session)["extract"] == {"exposures": ["ctf"], "particles": ["merge"]}
    merged = project.particles("merge")
    one, other = project.particles("pick"), project.particles("other")
    assert set(birth_of(one["particle_id"].values)) == {1}
    assert set(birth_of(other["particle_id"].values)) == {2}
    assert set(ids(project, "pick")) <= set(ids(project, "merge")), "the first source's particles all stay"
    assert set(ids(project, "merge")) <= set(ids(project, "pick")) | set(ids(project, "other"))
    assert len(merged["particle_id"]) < len(one["particle_id"]) + len(other["particle_id"])
    for row in np.unique(merged["row"].values):
        here = merged.isel(particle=np.flatnonzero(merged["row"].values == row))
        y, x, birth = (here[n].values for n in ("position_y_angstrom", "position_x_angstrom", "particle_id"))
        birth = birth_of(birth)
        far = np.hypot(y[:, None] - y, x[:, None] - x)
        assert (far[birth[:, None] != birth] >= 90).all()
    assert (merged["half_set"].values == half_sets(merged["particle_id"].values)).all()
    # a dropped one says why, and what was cut is what was merged
    gone = np.setdiff1d(ids(project, "other"), ids(project, "merge"))
    assert dict(project.where(int(gone[0])))["merge"].startswith("left out: ")
    assert set(ids(project, "extract")) <= set(ids(project, "merge"))


def test_three_sets_merged_are_their_union_with_every_part_that_all_have(session, client):
    base = [*PICKED, {"extract": {"box": 128, "scale_to": 32}}, {"classify2d": {"classes": 3, "iterations": 3}}]
    parts = [{f"curate as c{k}": {"keep": [k], "from": "classify2d"}} for k in (1, 2, 3)]
    pipeline = [*base, *parts, {"merge": {"from": {"particles": ["c1", "c2", "c3"]}}}]
    project = run(session, pipeline, client)
    merged = project.particles("merge")
    assert (merged["particle_id"].values == ids(project, "classify2d")).all()
    before = project.particles("classify2d")
    for name in ("class_number", "class_psi_deg", "class_centre_y_angstrom", "defocus_u_angstrom", "half_set", "position_x_angstrom"):
        np.testing.assert_array_equal(merged[name].values, before[name].values, err_msg=name)
    assert (merged["particle_image"].values == before["particle_image"].values).all()


def test_a_set_expanded_by_its_symmetry_and_contracted_is_the_set_again(session, client):
    pipeline = [
        *PICKED,
        {"extract": {"box": 128, "scale_to": 32}},
        {"refine3d": {"reference": "truth/map_32_7.08A.mrc", "symmetry": "D2", "iterations": 1}},
        "expand",
        "contract",
    ]
    project = run(session, pipeline, client)
    whole, copies = ids(project, "refine3d"), ids(project, "expand")
    assert len(copies) == 4 * len(whole)
    assert set(copy_of(copies)) == {1, 2, 3, 4}
    assert (np.unique(parent_of(copies)) == whole).all()
    expanded = project.particles("expand")
    parent = dict(zip(whole.tolist(), project.particles("refine3d")["half_set"].values.tolist()))
    assert all(parent[p] == half for p, half in zip(parent_of(copies).tolist(), expanded["half_set"].values.tolist()))
    assert np.isfinite(expanded["defocus_u_angstrom"].values).all()
    first = expanded.isel(particle=np.flatnonzero(copy_of(copies) == 1))
    assert np.allclose(first["tilt_deg"].values, project.particles("refine3d")["tilt_deg"].values, atol=1e-3)
    assert (ids(project, "contract") == whole).all()
    assert "rot_deg" not in project.particles("contract")


def test_exposures_that_are_left_out_take_their_particles_along(session, client):
    pipeline = [
        *PICKED,
        {"extract": {"box": 128, "scale_to": 32}},
        {"select_exposures": {"leave_out": ["movie_0002"]}},
        {"classify2d": {"classes": 2, "iterations": 2}},
    ]
    project = run(session, pipeline, client)
    names = set(project.particles("classify2d")["micrograph"].values)
    assert "movie_0002" not in names
    assert len(names) == PARAMS.movies - 1
    gone = project.particles("extract")
    one = gone["particle_id"].values[gone["micrograph"].values == "movie_0002"][0]
    assert dict(project.where(int(one)))["classify2d"] == "left out: its exposure is missing, or lacks data that the step needs"


def test_selecting_by_an_expression(session, client):
    pipeline = [
        *PICKED,
        {"extract": {"box": 128, "scale_to": 32}},
        {"classify2d": {"classes": 2, "iterations": 2}},
        {"select": {"where": "class_number == 1 and defocus_u_angstrom > 0"}},
    ]
    project = run(session, pipeline, client)
    classes = project.particles("classify2d")
    assert (ids(project, "select") == classes["particle_id"].values[classes["class_number"].values == 1]).all()


@pytest.fixture(scope="module")
def two_data_sets(tmp_path_factory, session) -> Path:
    folder = tmp_path_factory.mktemp("two")
    other = SessionParams(
        movies=2, height=576, width=640, frames=5, dose_per_frame=10, particles=8, pixel_size_angstrom=1.5, seed=5, truth_maps=()
    )
    simulated(tmp_path_factory, folder / "day2", other)
    (folder / "day1").mkdir()
    for what in ("movies", "gain.mrc", "truth"):
        (folder / "day1" / what).symlink_to(session / what)
    microscope = {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1, "dose_per_frame": 10}
    content = {
        "name": "both",
        "inputs": [
            {"name": name, "movies": f"{name}/movies/*.tif", "gain": f"{name}/gain.mrc",
             "microscope": {**microscope, "pixel_size_angstrom": pixel}}
            for name, pixel in (("day1", 1.77), ("day2", 1.5))
        ],
        "pipeline": [
            {"motion": {"patches": [1, 1]}}, "ctf", {"pick": {"diameter_angstrom": 180}},
            {"extract": {"box_angstrom": 226.56, "pixel_size_angstrom": 7.08}},
            {"refine3d": {"reference": "day1/truth/map_32_7.08A.mrc", "symmetry": "D2", "iterations": 1}},
        ],
    }  # fmt: skip
    (folder / "both.yaml").write_text(yaml.safe_dump(content))
    return folder


def test_two_data_sets_of_different_pixel_sizes_are_refined_together(two_data_sets, client):
    folder = two_data_sets
    for path in sorted((folder / "day2" / "movies").iterdir()):
        if not path.name.startswith("b_"):
            path.rename(path.with_name(f"b_{path.name}"))
    begun = _first_data_set(folder, client)
    project = run_plan(make_plan(folder / "both.yaml"), client)
    assert project.failures() == []
    kept = {r["name"]: r.get("computed", r["time"]) for r in project.records("motion").values()}
    assert begun == {name: kept[name] for name in begun}, "the data set that came later has images of another size: nothing is made again"
    table = project.scalars()
    assert sorted(table["pixel_size_angstrom"].unique()) == [1.5, 1.77]
    refined = project.particles("refine3d")
    by_set = np.char.startswith(refined["micrograph"].values.astype(str), "b_")
    assert by_set.any()
    assert (~by_set).any()
    assert refined.sizes["x"] == 32
    assert np.allclose(refined["particle_pixel_size_angstrom"].values, 7.08)
    # a particle lies where its own pixel size says
    pixel = np.where(by_set, 1.5, 1.77)
    assert np.allclose(refined["box_y_angstrom"], refined["particle_y"] * pixel)
    _images_exist_once_per_size(project)
    written = {path.name for path in export_relion(project, folder / "relion")}
    assert {f"{name}.star" for name in project["motion"]["micrograph"].values} <= written
    page = write_report(project).read_text()
    assert page.count("<img") > 10
    _pooled(project, client)
    # another optics of one data set computes that one again, no other
    before = {label: {r["name"]: r.get("computed", r["time"]) for r in project.records(label).values()} for label in project.stages}
    content = yaml.safe_load((folder / "both.yaml").read_text())
    content["inputs"][1]["microscope"]["voltage_kv"] = 200
    (folder / "both.yaml").write_text(yaml.safe_dump(content))
    changed = run_plan(make_plan(folder / "both.yaml"), client, until="ctf")
    for label in ("ctf", "motion"):
        renewed = {r["name"] for r in changed.records(label).values() if before[label][r["name"]] != r.get("computed", r["time"])}
        assert renewed == {n for n in before[label] if n.startswith("b_")}, label
    assert "box_angstrom and pixel_size_angstrom" in draft_plan(_in_pixels(folder)).graph.problems[0]


def _first_data_set(folder: Path, client) -> dict[str, float]:
    """The project with the first data set alone: when each exposure was computed."""
    content = yaml.safe_load((folder / "both.yaml").read_text())
    alone = {**content, "inputs": content["inputs"][:1], "pipeline": content["pipeline"][:2]}
    (folder / "both.yaml").write_text(yaml.safe_dump(alone))
    project = run_plan(make_plan(folder / "both.yaml"), client)
    (folder / "both.yaml").write_text(yaml.safe_dump(content))
    assert len(project["motion"]["micrograph_dw"]) == PARAMS.movies
    return {r["name"]: r["time"] for r in project.records("motion").values()}


def _images_exist_once_per_size(project: Project) -> None:
    """512 x 512 in 4 frames beside 576 x 640 in 5: arrays side by side, each readable by any Zarr library, and lazily the same bits."""
    assert "micrograph_dw" not in project["motion"]
    assert project["motion"].attrs["images"].startswith("2 sizes")
    small, large = project.by_image_size("motion")
    assert (small.sizes["micrograph"], small.sizes["y"], small.sizes["x"]) == (PARAMS.movies, 512, 512)
    assert (large.sizes["micrograph"], large.sizes["y"], large.sizes["x"]) == (2, 576, 640)
    assert [d["movie"].shape[1:] for d in project.by_image_size("ingest")] == [(4, 512, 512), (5, 576, 640)]
    stored = zarr.open_array(project.generation("motion").path / "micrograph_dw.576x640.float32", mode="r")
    assert (stored[int(large["row"].values[0])] == large["micrograph_dw"][0].values).all()
    assert project.verify() == []
    one = project.by_image_size("ingest")[1].isel(micrograph=[0])
    optics = project.micrographs().sel(micrograph=one["micrograph"])
    gain = np.load(project.path / project.state.gain["day2"])
    given = one.merge(optics.drop_vars("row")).assign(gain=(("y", "x"), gain))
    again = motion(given, patches=[1, 1])
    assert (again["micrograph_dw"].values == large["micrograph_dw"][:1].values).all()


def _pooled(project: Project, client) -> None:
    """Another project that takes its exposures from this one: micrographs of both sizes come along, bit by bit."""
    folder = project.path.parent
    pipeline = [{"import_project": {"project": project.path.name, "step": "extract"}}, {"pick": {"diameter_angstrom": 170}}]
    (folder / "pooled.yaml").write_text(yaml.safe_dump({"name": "pooled", "pipeline": pipeline}))
    pooled = run_plan(make_plan(folder / "pooled.yaml"), client)
    assert pooled.failures() == []
    for there, here in zip(project.by_image_size("motion"), pooled.by_image_size("import_project"), strict=True):
        assert (here["micrograph_dw"].values == there["micrograph_dw"].values).all()


def _in_pixels(folder: Path) -> Path:
    content = yaml.safe_load((folder / "both.yaml").read_text())
    content["pipeline"][3] = {"extract": {"box": 128}}
    (folder / "pixels.yaml").write_text(yaml.safe_dump(content))
    return folder / "pixels.yaml"


@pytest.mark.relion
def test_every_id_is_back_from_relion(session, client, tmp_path):
    pipeline = [*PICKED, {"extract": {"box": 128, "scale_to": 32}}]
    folder = tmp_path / "s"
    shutil.copytree(session, folder)
    project = run(folder, pipeline, client)
    export_relion(project, folder / "relion")
    sent = read_particle_table(folder / "relion" / "particles.star")
    assert (np.sort(sent.particle_id) == ids(project, "extract")).all()
    command = ["relion_refine", "--i", "particles.star", "--o", "out/run", "--K", "2", "--iter", "1", "--particle_diameter", "180"]
    command += [
        "--tau2_fudge",
        "2",
        "--psi_step",
        "30",
        "--offset_range",
        "3",
        "--offset_step",
        "2",
        "--norm",
        "--scale",
        "--random_seed",
        "1",
    ]
    (folder / "relion" / "out").mkdir()
    done = subprocess.run(command, cwd=folder / "relion", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    table = (folder / "relion" / "out" / "run_it001_data.star").read_text()
    assert "_cryodaskBirthX" in table, "RELION passes on what proves an id"
    back = {"import_particles as back": {"star": "relion/out/run_it001_data.star", "images": False, "from": {"exposures": "ctf"}}}
    returned = run(folder, [*pipeline, back], client)
    assert returned.failures() == []
    assert (ids(returned, "back") == ids(project, "extract")).all()
    came = returned.particles("back")
    assert (came["half_set"].values == project.particles("extract")["half_set"].values).all()
    assert set(came["class_number"].values) <= {1, 2}
    assert dict(returned.where(int(came["particle_id"].values[0])))["extract"] == "there"


CUT = {"extract": {"box": 128, "scale_to": 32}}


def _rows_changed(star: Path, out: Path, change) -> None:
    """A STAR file of particles with other rows: `change` maps the list of rows, each a list of values, and gives the place of a column."""
    lines = star.read_text(encoding="utf-8").splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("_")) + 1
    named = [line for line in lines[:start] if line.startswith("_")]
    named = named[max(i for i, line in enumerate(named) if line.endswith("#1")) :]
    at = {line.split()[0][1:]: i for i, line in enumerate(named)}
    rows = [line.split() for line in lines[start:] if line.strip()]
    out.write_text("\n".join([*lines[:start], *("\t".join(row) for row in change(rows, at))]) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def exported(session, client, tmp_path_factory) -> Path:
    """A project, and what it exported: boxes of several pixels beside the places of birth."""
    folder = tmp_path_factory.mktemp("exported") / "s"
    shutil.copytree(session, folder, ignore=shutil.ignore_patterns("p"))
    edits = "micrograph,action,y,x,particle_id\nmovie_0001,add,250.5,260,\n"
    (folder / "edits.csv").write_text(edits)
    project = run(folder, [*PICKED, {"edit_picks": {"file": "edits.csv"}}, CUT], client, "p")
    export_relion(project, folder / "relion")
    return folder


def _back(star: str) -> dict:
    return {"import_particles as back": {"star": star, "images": False, "from": {"exposures": "ctf"}}}


EDITED = [*PICKED, {"edit_picks": {"file": "edits.csv"}}, CUT]


def _returned(exported: Path, folder: Path, client, change, pipeline=EDITED, name: str = "p", listen=()) -> Project:
    if not folder.exists():
        shutil.copytree(exported, folder)
    _rows_changed(folder / "relion" / "particles.star", folder / "relion" / "w.star", change)
    return run_plan(make_plan(write(folder, [*pipeline, _back("relion/w.star")], name)), client, listen=listen)


def _moved(rows, at):
    """As after another extraction at refined centres: the boxes stand elsewhere."""
    for row in rows:
        row[at["rlnCoordinateX"]] = str(float(row[at["rlnCoordinateX"]]) + 9)
    return rows[::-1]


def test_ids_come_back_whatever_the_pipeline_is_now(exported, client, tmp_path):
    want = ids(Project(exported / "p"), "extract")
    assert set(birth_of(want)) == {1, 2}
    changed = [*PICKED[:2], {"pick": {"diameter_angstrom": 170}}, CUT]
    for n, pipeline in enumerate((EDITED, PICKED[:2], changed)):
        project = _returned(exported, tmp_path / f"s{n}", client, _moved, pipeline)
        assert (ids(project, "back") == want).all()
        if n == 0:
            assert (project.particles("back")["half_set"].values == project.particles("extract")["half_set"].values).all()
    # all in one first run, in the same exposures: the particles are born before they come back
    shutil.copytree(exported, tmp_path / "new")
    shutil.rmtree(tmp_path / "new" / "p")
    project = _returned(exported, tmp_path / "new", client, lambda rows, at: rows)
    assert (ids(project, "back") == ids(project, "extract")).all()


def test_ids_of_another_project_are_not_taken_for_own_ones(exported, client, tmp_path):
    other = [*PICKED[:2], {"pick": {"diameter_angstrom": 150}}, CUT]
    told = Told()
    project = _returned(exported, tmp_path / "s", client, lambda rows, at: rows, other, "other", [told])
    own, back = project.particles("pick"), project.particles("back")
    assert back.sizes["particle"] == len(ids(Project(exported / "p"), "extract"))
    _, i, j = np.intersect1d(own["particle_id"].values, back["particle_id"].values, return_indices=True)
    apart = np.hypot(*(own[f"position_{a}_angstrom"].values[i] - back[f"position_{a}_angstrom"].values[j] for a in "yx"))
    assert (apart < 2 * 1.77).all(), "same number and same place, or another particle"
    assert len(i) < len(back["particle_id"]) / 2 + 1
    assert any("with an id from another project" in text for text in told.said)


def test_rows_added_by_hand_rows_twice_and_rows_of_other_micrographs(exported, client, tmp_path):
    want = ids(Project(exported / "p"), "extract")
    told = Told()

    def change(rows, at):
        new = [list(rows[0]) for _ in range(2)]
        for n, row in enumerate(new):
            row[at["rlnImageName"]], row[at["rlnCoordinateX"]], row[at["rlnCoordinateY"]] = (
                f"00000{n + 1}@hand.mrcs",
                f"{60 + 90 * n}",
                "60",
            )
            row[at["cryodaskParticleId"]] = str(n * ((7 << 51) + 128))
        other = [list(row) for row in rows[:3]]
        for n, row in enumerate(other):
            row[at["rlnMicrographName"]], row[at["rlnImageName"]] = "micrographs/other.mrc", f"{n + 1}@other.mrcs"
        return [*rows[:4], *new, *rows[1:], *other]

    project = _returned(exported, tmp_path / "s", client, change, listen=[told])
    got = ids(project, "back")
    assert project.failures() == []
    assert len(got) == len(want) + 2
    assert np.isin(want, got).all()
    assert "back: 3 rows left out, because an earlier row has the same image: micrographs/movie_0001.mrc (3)" in told.said
    expected = "back: 3 rows of 1 micrograph left out, because they are not among the exposures of this step: micrographs/other.mrc (3)"
    assert expected in told.said
    assert project.step("back").left_out == {"micrographs/other.mrc": 3}

    def elsewhere(rows, at):
        for row in rows:
            row[at["rlnMicrographName"]] = "micrographs/other.mrc"
        return rows

    with pytest.raises(InputError, match="These are all the rows of its file"):
        _returned(exported, tmp_path / "s", client, elsewhere)


def test_projects_of_another_pixel_size_share_only_particles_at_the_same_place(session, client, tmp_path):
    folder = tmp_path / "s"
    shutil.copytree(session, folder)
    microscope = {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1, "dose_per_frame": 10}
    movies = {"movies": "movies/movie_000[12].tif"}
    first = {"inputs": {**movies, "gain": "gain.mrc"}}
    parts = {
        "one": run(folder, [*PICKED, CUT], client, "one", **first),
        "two": run(folder, [*PICKED, CUT], client, "two", **first, microscope={**microscope, "pixel_size_angstrom": 1.5}),
        "three": run(folder, [*PICKED, CUT], client, "three", inputs=movies),
    }
    steps = [{f"import_project as {n}": {"project": n, "step": "extract"}} for n in parts]
    (folder / "pooled.yaml").write_text(yaml.safe_dump({"name": "pooled", "pipeline": steps}))
    pooled = run_plan(make_plan(folder / "pooled.yaml"), client)
    assert pooled.failures() == []
    places: dict[int, list[float]] = {}
    for n, part in parts.items():
        particles = pooled.particles(n)
        assert particles.sizes["particle"] == part.particles("extract").sizes["particle"]
        pixel = 1.5 if n == "two" else 1.77
        place = np.stack([particles[f"position_{a}_angstrom"].values / pixel for a in "yx"], 1).tolist()
        for one, there in zip(particles["particle_id"].values.tolist(), place):
            first = places.setdefault(one, there)
            assert np.hypot(first[0] - there[0], first[1] - there[1]) <= 1.01
    assert len(places) > parts["one"].particles("extract").sizes["particle"]
    both = {"merge": {"prefer": "one", "from": {"particles": ["one", "two"]}}}
    (folder / "pooled.yaml").write_text(yaml.safe_dump({"name": "pooled", "pipeline": [*steps, both]}))
    with pytest.raises(InputError, match="were picked or imported independently and share"):
        run_plan(make_plan(folder / "pooled.yaml"), client)
    (folder / "pooled.yaml").write_text(yaml.safe_dump({"name": "pooled", "pipeline": steps}))
    again = run_plan(make_plan(folder / "pooled.yaml"), client, start_again_from="one")
    assert all((ids(again, n) == ids(pooled, n)).all() for n in parts)


def test_projects_that_share_movies_are_pooled_by_content(session, client, tmp_path):
    folder = tmp_path / "pool"
    shutil.copytree(session, folder)
    base = [*PICKED, {"extract": {"box": 128, "scale_to": 32}}]
    names = {"one": "movies/movie_000[12].tif", "two": "movies/movie_000[23].tif"}
    parts = {n: run(folder, base, client, n, inputs={"movies": pattern, "gain": "gain.mrc"}) for n, pattern in names.items()}
    pooled = [
        {"import_project as s1": {"project": "one", "step": "extract"}},
        {"import_project as s2": {"project": "two", "step": "extract"}},
        {"merge": {"from": {"particles": ["s1", "s2"]}}},
        {"classify2d": {"classes": 2, "iterations": 2}},
    ]
    content = {"name": "pooled", "pipeline": pooled}
    (folder / "pooled.yaml").write_text(yaml.safe_dump(content))
    project = run_plan(make_plan(folder / "pooled.yaml"), client)
    assert project.failures() == []
    assert len(project.items()) == 3, "one movie is in both"
    counts = {n: {} for n in parts}
    for n, part in parts.items():
        particles = part.particles("extract")
        for name in particles["micrograph"].values:
            counts[n][name] = counts[n].get(name, 0) + 1
    union = {**counts["one"], **counts["two"]}
    merged = project.particles("merge")
    assert merged.sizes["particle"] == sum(union.values()), "shared particles once, others never joined"
    halves = dict(zip(merged["particle_id"].values.tolist(), merged["half_set"].values.tolist()))
    for label, n in (("s1", "one"), ("s2", "two")):
        there, here = parts[n].particles("extract"), project.particles(label)
        assert here.sizes["particle"] == there.sizes["particle"]
        assert np.sort(here["defocus_u_angstrom"].values).tolist() == np.sort(there["defocus_u_angstrom"].values).tolist()
        assert all(halves[i] == h for i, h in zip(here["particle_id"].values.tolist(), here["half_set"].values.tolist())), "one half each"
        if label == "s1":
            assert sorted(here["half_set"].values.tolist()) == sorted(there["half_set"].values.tolist())
        row = int(np.flatnonzero(here["micrograph"].values == there["micrograph"].values[0])[0])
        same = int(
            np.flatnonzero(
                np.isclose(there["position_y_angstrom"].values, float(here["position_y_angstrom"][row]), atol=0.01)
                & np.isclose(there["position_x_angstrom"].values, float(here["position_x_angstrom"][row]), atol=0.01)
            )[0]
        )
        assert (here["particle_image"][row].values == there["particle_image"][same].values).all()
    assert project.particles("classify2d").sizes["particle"] == sum(union.values())


def test_picks_that_a_person_adds_moves_and_removes(session, client, tmp_path):
    folder = tmp_path / "s"
    shutil.copytree(session, folder)
    pipeline = [*PICKED, "edit_picks", {"extract": {"box": 128, "scale_to": 32}}]
    plain = run(folder, pipeline, client)
    assert (ids(plain, "edit_picks") == ids(plain, "pick")).all(), "without edits everything passes"
    here = plain.particles("edit_picks")
    first = here.isel(particle=np.flatnonzero(here["micrograph"].values == "movie_0001"))
    removed, moved = (int(i) for i in first["particle_id"].values[:2])
    rows = [
        "micrograph,action,y,x,particle_id",
        "movie_0001,add,250.5,260,",
        f"movie_0001,remove,,,{removed}",
        f"movie_0001,move,300,310,{moved}",
    ]
    (folder / "edits.csv").write_text("\n".join(rows) + "\n")
    edited = [*PICKED, {"edit_picks": {"file": "edits.csv"}}, pipeline[-1]]
    before = {r["name"]: r.get("computed", r["time"]) for r in plain.records("extract").values()}
    project = run(folder, edited, client)
    assert project.failures() == []
    after = project.particles("edit_picks")
    new = np.setdiff1d(after["particle_id"].values, ids(plain, "pick"))
    assert len(new) == 1
    assert set(birth_of(new)) != set(birth_of(ids(plain, "pick")))
    assert removed not in after["particle_id"].values
    assert dict(project.where(removed))["edit_picks"] == "left out: it was removed by hand"
    place = after.isel(particle=int(np.flatnonzero(after["particle_id"].values == moved)[0]))
    assert float(place["position_y_angstrom"]) == pytest.approx(300 * 1.77)
    born = after.isel(particle=int(np.flatnonzero(after["particle_id"].values == new[0])[0]))
    assert float(born["position_x_angstrom"]) == pytest.approx(260 * 1.77)
    assert int(born["half_set"]) == int(half_sets(new)[0])
    # one exposure is cut again, the others are what they were
    now = {r["name"]: r.get("computed", r["time"]) for r in project.records("extract").values()}
    assert {n for n in now if now[n] != before[n]} == {"movie_0001"}
    # the same edits again change nothing, and the added pick is who it was
    again = run(
        folder,
        edited,
        client,
    )
    assert (ids(again, "edit_picks") == after["particle_id"].values).all()


def _stacks(folder: Path, *, seed: int) -> None:
    """Three micrographs of four particles of noise each, and two selections of them that overlap."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    head = "\ndata_particles\n\nloop_\n_rlnImageName #1\n_rlnMicrographName #2\n_rlnDefocusU #3\n_rlnDefocusV #4\n_rlnDefocusAngle #5\n"
    head += "_rlnOpticsGroup #6\n"
    optics = "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnVoltage #2\n_rlnSphericalAberration #3\n_rlnAmplitudeContrast #4\n"
    optics += "_rlnImagePixelSize #5\n_rlnImageSize #6\n_rlnImageDimensionality #7\n1 300 2.7 0.1 4.0 16 2\n"
    rows = []
    for m in range(3):
        write_mrc(folder / f"m{m}.mrcs", rng.standard_normal((4, 16, 16)).astype(np.float32), 4.0, stack=True)
        rows += [f"{i + 1:06d}@m{m}.mrcs m{m}.mrc {10000 + m} {9900 + m} 30 1" for i in range(4)]
    (folder / "first.star").write_text(optics + head + "\n".join(rows[:9]) + "\n")
    (folder / "second.star").write_text(optics + head + "\n".join(reversed(rows[6:])) + "\n")


def test_tables_of_the_same_stacks_are_of_the_same_exposures_and_a_moved_table_computes_nothing(client, tmp_path):
    _stacks(tmp_path / "there", seed=1)
    (tmp_path / "work").mkdir()

    def pipeline(where: Path):
        both = [{f"import_particles as {n}": {"star": str(where / f"{n}.star")}} for n in ("first", "second")]
        return [*both, {"select": {"where": "defocus_u_angstrom > 10000.5"}}]

    def done(where: Path, more=()) -> Project:
        (tmp_path / "work" / "p.yaml").write_text(yaml.safe_dump({"name": "p", "pipeline": [*pipeline(where), *more]}))
        return run_plan(make_plan(tmp_path / "work" / "p.yaml"), client)

    project = done(tmp_path / "there")
    assert project.failures() == []
    assert sorted(item.name for item in project.items()) == ["m0", "m1", "m2"]
    assert [project.particles(label).sizes["particle"] for label in ("first", "second", "select")] == [9, 6, 6]
    with pytest.raises(InputError, match="first and second were picked or imported independently and share 2 exposures"):
        done(tmp_path / "there", [{"merge": {"from": {"particles": ["first", "second"]}}}])
    before = {label: (project.state.steps[label].place, ids(project, label).tolist()) for label in project.stages}
    times = {label: {r["name"]: r["time"] for r in project.records(label).values()} for label in project.stages}
    shutil.move(tmp_path / "there", tmp_path / "elsewhere")
    moved = done(tmp_path / "elsewhere")
    assert {label: (moved.state.steps[label].place, ids(moved, label).tolist()) for label in moved.stages} == before
    assert {label: {r["name"]: r["time"] for r in moved.records(label).values()} for label in moved.stages} == times


def test_tables_of_two_sessions_with_the_same_names_are_not_taken_for_one(tmp_path):
    for n, folder in enumerate(("a", "b")):
        _stacks(tmp_path / folder, seed=n)
    both = [{f"import_particles as {n}": {"star": f"{n}/first.star"}} for n in ("a", "b")]
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"name": "p", "pipeline": [*both, {"merge": {"from": {"particles": ["a", "b"]}}}]}))
    said = preview(make_plan(tmp_path / "p.yaml")).problems
    assert len(said) == 1
    assert "Two inputs have the same name m0" in said[0]
