"""What other programs say of exposures changes between two runs: the result is that of a run from scratch."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from _told import Told
from test_identity import write

from cryodask.errors import InputError, MicrographError, ProjectFileError
from cryodask.formats.star import read_micrographs, read_optics, read_particles
from cryodask.interop import export_relion
from cryodask.run.preview import preview
from cryodask.run.recipe import make_plan
from cryodask.run.session import check_inputs, run_plan
from cryodask.simulate import SessionParams, simulate_session
from cryodask.store.generation import Generation
from cryodask.store.layouts import Grid
from cryodask.store.project import Project

pytestmark = pytest.mark.heavy

PARAMS = SessionParams(movies=4, height=448, width=448, frames=3, dose_per_frame=10, particles=8, truth_maps=())
CLASSES = {"classify2d": {"classes": 2, "iterations": 1}}
PICKED = [{"motion": {"patches": [1, 1]}}, "ctf", {"pick": {"diameter_angstrom": 180}}, {"extract": {"box": 128, "scale_to": 32}}]


@pytest.fixture(scope="module")
def made(tmp_path_factory, client) -> Path:
    """A session, processed (``p``) and exported (``relion``)."""
    folder = tmp_path_factory.mktemp("imports")
    simulate_session(folder, PARAMS, processes=1)
    export_relion(run_plan(make_plan(write(folder, PICKED)), client), folder / "relion")
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "s"))


def run(folder: Path, client, pipeline, name: str, *, movies: bool = False) -> tuple[Project, list[str]]:
    path = write(folder, pipeline, name)
    if not movies:
        path.write_text(yaml.safe_dump({"name": name, "pipeline": pipeline}))
    told = Told()
    return run_plan(make_plan(path), client, listen=[told]), told.said


def counts(project: Project, *labels: str) -> list[int]:
    return [project.particles(label).sizes["particle"] for label in labels]


def without(source: Path, target: Path, word: str) -> int:
    """A table without the rows that hold a word; how many are left."""
    lines = source.read_text(encoding="utf-8").splitlines()
    target.write_text("\n".join(line for line in lines if "@" not in line or word not in line) + "\n", encoding="utf-8")
    return sum("@" in line for line in target.read_text(encoding="utf-8").splitlines())


def forget(folder: Path, client, name: str) -> int:
    """Make the processed project forget an exposure; how many particles it has left."""
    project = Project(folder / "p")
    project.forget_exposures([name])
    return counts(run_plan(make_plan(folder / "p.yaml"), client), "extract")[0]


def test_a_pooled_project_follows_its_source_that_forgets_an_exposure(folder, client):
    pipeline = [{"import_project as a": {"project": "p", "step": "extract"}}, CLASSES]
    project, _ = run(folder, client, pipeline, "pool")
    left = forget(folder, client, "movie_0003")
    assert left < counts(project, "a")[0]
    project, said = run(folder, client, pipeline, "pool")
    assert counts(project, "a", "classify2d") == [left, left]
    assert project.failures() == []
    assert any("movie_0003" in line and "no longer" in line for line in said)
    project = Project(folder / "p")
    project.forget_exposures(["movie_0003"], undo=True)
    everything = counts(run_plan(make_plan(folder / "p.yaml"), client), "extract")
    assert counts(run(folder, client, pipeline, "pool")[0], "a") == everything


def test_one_of_two_sources_loses_an_exposure(folder, client):
    shutil.copy(folder / "relion/particles.star", folder / "relion/b.star")
    pipeline = [
        {"import_particles as a": {"star": "relion/particles.star"}},
        {"import_particles as b": {"star": "relion/b.star"}},
        {"classify2d": {"classes": 2, "iterations": 1, "from": {"particles": "b", "exposures": "b"}}},
    ]
    project, _ = run(folder, client, pipeline, "two")
    everything = counts(project, "a")[0]
    assert counts(project, "b", "classify2d") == [everything] * 2
    left = without(folder / "relion/particles.star", folder / "relion/b.star", "movie_0002")
    project, _ = run(folder, client, pipeline, "two")
    assert counts(project, "a", "b", "classify2d") == [everything, left, left]


def test_one_of_two_pooled_projects_forgets_an_exposure(folder, client):
    write(folder, PICKED, "other")
    shutil.copytree(folder / "p", folder / "other")
    pipeline = [{f"import_project as {n}": {"project": p, "step": "extract"}} for n, p in (("a", "p"), ("b", "other"))]
    project, _ = run(folder, client, pipeline, "pool")
    everything = counts(project, "b")[0]
    left = forget(folder, client, "movie_0003")
    project, _ = run(folder, client, pipeline, "pool")
    assert counts(project, "a", "b") == [left, everything]
    assert project.failures() == []


def test_a_table_that_lost_a_micrograph_has_no_particles_there(folder, client):
    star = folder / "relion/w.star"
    shutil.copy(folder / "relion/particles.star", star)
    pipeline = [{"import_particles": {"star": "relion/w.star"}}, CLASSES]
    run(folder, client, pipeline, "w")
    left = without(folder / "relion/particles.star", star, "movie_0001")
    project, said = run(folder, client, pipeline, "w")
    assert counts(project, "import_particles", "classify2d") == [left, left]
    assert project.failures() == []
    assert any("movie_0001" in line and "no longer" in line for line in said)
    _, said = run(folder, client, pipeline, "w")
    assert not any("no longer" in line for line in said), "said once"


def test_an_exposure_that_fails_in_its_birth_has_no_particles_later(folder, client):
    picks = folder / "picks"
    shutil.copytree(folder / "relion/coordinates/micrographs", picks)
    pipeline = [*PICKED[:2], {"import_picks": {"folder": "picks"}}, PICKED[3], CLASSES]
    labels = ("import_picks", "extract", "classify2d")
    everything = counts(run(folder, client, pipeline, "own", movies=True)[0], *labels)
    (picks / "movie_0002.star").rename(folder / "aside.star")
    project, _ = run(folder, client, pipeline, "own", movies=True)
    assert project.failures()[0]["message"].startswith("There is no picks file for movie_0002.")
    found = counts(project, *labels)
    assert found == counts(run(folder, client, pipeline, "scratch", movies=True)[0], *labels)
    assert found[0] < everything[0]
    (folder / "aside.star").rename(picks / "movie_0002.star")
    assert counts(run(folder, client, pipeline, "own", movies=True)[0], *labels) == everything


def test_a_micrograph_whose_folder_is_called_otherwise_is_the_same(folder, client):
    star = folder / "relion/w.star"
    shutil.copy(folder / "relion/particles.star", star)
    pipeline = [{"import_particles": {"star": "relion/w.star"}}, CLASSES]
    project, _ = run(folder, client, pipeline, "w")
    before = {label: [r["time"] for r in project.records(label).values()] for label in project.stages}
    found = project.particles("import_particles")["particle_id"].values
    star.write_text(star.read_text().replace("micrographs/", "MotionCorr/job002/micrographs/"))
    project, said = run(folder, client, pipeline, "w")
    assert not any("recorded again" in line or "no longer" in line for line in said)
    assert len(project.registered()) == PARAMS.movies
    assert (project.particles("import_particles")["particle_id"].values == found).all()
    assert {label: [r["time"] for r in project.records(label).values()] for label in project.stages} == before


@pytest.mark.parametrize("what", ["table", "picks", "edits"])
def test_a_file_that_was_read_still_fits_when_movies_are_renamed(folder, client, what):
    shutil.copytree(folder / "relion/coordinates/micrographs", folder / "picks")
    one = Project(folder / "p").particles("extract").isel(particle=0)
    (folder / "edits.csv").write_text(f"micrograph,action,y,x,particle_id\n{one['micrograph'].item()},add,100,100,\n")
    steps = {
        "table": {"import_particles as back": {"star": "relion/particles.star", "images": False, "from": {"exposures": "ctf"}}},
        "picks": {"import_picks as back": {"folder": "picks", "from": {"exposures": "ctf"}}},
        "edits": {"edit_picks as back": {"file": "edits.csv"}},
    }
    pipeline = [*PICKED[:3], steps[what], {"extract as again": PICKED[3]["extract"]}]
    project, _ = run(folder, client, pipeline, "own", movies=True)
    before = {label: [r["time"] for r in project.records(label).values()] for label in project.stages}
    for movie in (folder / "movies").iterdir():
        movie.rename(movie.with_name(f"new_{movie.name}"))
    assert preview(make_plan(folder / "own.yaml")).problems == []
    project, said = run(folder, client, pipeline, "own", movies=True)
    assert not any("left out" in line for line in said)
    assert {label: [r["time"] for r in project.records(label).values()] for label in project.stages} == before


def test_a_dry_run_knows_exposures_by_the_names_that_a_run_will_know(folder, client):
    pipeline = [*PICKED[:2], {"select_exposures": {"leave_out": ["movie_0002"]}}]
    run(folder, client, pipeline, "own", movies=True)
    project = Project(folder / "own")

    def refused(sentence: str) -> None:
        assert [sentence in problem for problem in preview(make_plan(folder / "own.yaml")).problems] == [True]
        with pytest.raises(ProjectFileError, match=sentence):
            check_inputs(make_plan(folder / "own.yaml"))

    project.forget_exposures(["movie_0002"])
    refused("which was forgotten")
    project.forget_exposures(["movie_0002"], undo=True)
    (folder / "movies/movie_0002.tif").rename(folder / "movies/other.tif")
    refused("'movie_0002', which is now called 'other'")


def test_a_pooled_project_is_exported_as_its_source(folder, client):
    project, _ = run(folder, client, [{"import_project": {"project": "p", "step": "extract"}}], "pool")
    export_relion(project, folder / "pooled")
    one, other = (read_particles(folder / f / "particles.star") for f in ("relion", "pooled"))
    names = ("pixel_size_angstrom", "voltage_kv", "particle_pixel_size_angstrom", "defocus_u_angstrom", "particle_y")
    for name in names:
        np.testing.assert_allclose(np.sort(other[name]), np.sort(one[name]), rtol=1e-6, err_msg=name)
    one, other = (read_micrographs(folder / f / "micrographs_ctf.star") for f in ("relion", "pooled"))
    assert set(other) >= {"pixel_size_angstrom", "defocus_u_angstrom"}
    assert all(list(other[name]) == list(one[name]) for name in other)


def test_a_value_of_another_number_of_dimensions_is_refused_at_the_commit(tmp_path):
    generation = Generation.create(
        tmp_path / "g", meta={"stage": "ctf", "version": 1, "params": {}}, gives=("voltage_kv",), per_item=True, grids={"": Grid({}, {})}
    )
    with pytest.raises(MicrographError, match="voltage_kv of m1 has the shape"):
        generation.commit(0, "m1", {"voltage_kv": np.zeros(0)})
    generation.commit(1, "m2", {"voltage_kv": 300.0})
    assert generation.table()["voltage_kv"].tolist() == [300.0]


def exported(project: Project, folder: Path) -> dict[str, set[str]]:
    """Names of the exposures in each part of an export."""
    export_relion(project, folder)
    found = {
        name: {p.stem for p in (folder / name).iterdir()}
        for name in ("micrographs", "motion", "movies", "coordinates/micrographs")
        if (folder / name).is_dir()
    }
    tables = {"micrographs_ctf": read_micrographs(folder / "micrographs_ctf.star"), "particles": read_particles(folder / "particles.star")}
    return found | {name: {Path(str(m)).stem for m in table["micrograph_name"]} for name, table in tables.items()}


def test_an_export_has_the_exposures_of_its_particles_only(folder, client):
    selected = [*PICKED[:3], {"select_exposures": {"leave_out": ["movie_0002"]}}, PICKED[3]]
    found = exported(run(folder, client, selected, "p", movies=True)[0], folder / "selected")
    assert len(found) == 6
    assert all(names == {"movie_0001", "movie_0003", "movie_0004"} for names in found.values())


def test_a_union_is_exported_with_the_micrographs_of_all_its_sources(folder, client):
    """One source has forgotten what the other one has."""
    write(folder, PICKED, "other")
    shutil.copytree(folder / "p", folder / "other")
    forget(folder, client, "movie_0003")
    Project(folder / "other").forget_exposures(["movie_0001"])
    run_plan(make_plan(folder / "other.yaml"), client)
    pipeline = [{f"import_project as {n}": {"project": p, "step": "extract"}} for n, p in (("a", "p"), ("b", "other"))]
    pipeline += [{"merge": {"nearer_than_angstrom": 90, "from": {"particles": ["a", "b"]}}}, CLASSES]
    found = exported(run(folder, client, pipeline, "pool")[0], folder / "union")
    assert found.keys() == {"micrographs", "coordinates/micrographs", "micrographs_ctf", "particles"}
    assert all(names == {f"movie_000{n}" for n in range(1, 5)} for names in found.values())


def test_images_of_other_pixel_sizes_are_not_united(folder, client):
    """Two tables that share no particle."""
    star = folder / "relion/particles.star"
    for name in ("a", "b"):
        without(star, folder / f"relion/{name}.star", "movie_0001" if name == "a" else "movie_0002")
    other = folder / "relion/b.star"
    for number in (3, 4):
        without(other, other, f"movie_000{number}")
    # the plan reads the head of a table: here the optics come later
    head, rows = other.read_text().replace("\t7.08\t", "\t8.00\t").split("data_particles")
    other.write_text(f"data_particles{rows}\n{head}\n")
    pipeline = [{f"import_particles as {n}": {"star": f"relion/{n}.star"}} for n in ("a", "b")]
    pipeline += [{"merge": {"from": {"particles": ["a", "b"]}}}, CLASSES]
    with pytest.raises(InputError, match=r"pixel sizes cannot be merged: 7\.08 A in a and 8 A in b"):
        run(folder, client, pipeline, "sizes")


OPTICS = """
data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnMicrographOriginalPixelSize #3
_rlnImageSize #4
_rlnImagePixelSize #5
"""


def test_what_the_optics_of_a_table_say_of_its_images_is_compared_before_work(tmp_path, made):
    """Images of another size, or of micrographs of two pixel sizes, are refused by the plan, not by the run."""
    table = (made / "relion" / "particles.star").read_text()
    assert read_optics(made / "relion" / "particles.star") == [
        {"pixel_size_angstrom": 1.77, "particle_pixel_size_angstrom": pytest.approx(4 * 1.77), "box": 32}
    ]
    rows = table[table.index("data_particles") :]
    (tmp_path / "small.star").write_text(OPTICS + '1 "group 1" 1.77 24 9.44\n\n' + rows)
    mixed = OPTICS + "1 a 1.77 32 7.08\n2 b 1.05 32 7.08\n\ndata_micrographs\n\nloop_\n_rlnMicrographName #1\n_rlnOpticsGroup #2\n"
    (tmp_path / "mixed.star").write_text(mixed + "a.mrc 1\nb.mrc 2\n")
    shutil.copy(made / "relion" / "particles.star", tmp_path / "alike.star")

    def plan(*pipeline):
        (tmp_path / "x.yaml").write_text(yaml.safe_dump({"name": "x", "pipeline": list(pipeline)}))
        return make_plan(tmp_path / "x.yaml")

    def merged(name: str):
        tables = [{"import_particles as a": {"star": "alike.star"}}, {"import_particles as b": {"star": name}}]
        return plan(*tables, {"merge": {"from": {"particles": ["a", "b"]}}})

    assert merged("alike.star").steps[-1].label == "merge"
    with pytest.raises(ProjectFileError, match=r"the images differ: a \(scaled to 32, pixel size in A 7.08\) and b \(scaled to 24, pixel"):
        merged("small.star")
    with pytest.raises(ProjectFileError, match=r"pixel sizes of 1.05 A and 1.77 A, so a box in pixels has different lengths"):
        plan({"import_micrographs": {"star": "mixed.star"}}, "ctf", {"pick": {"diameter_angstrom": 180}}, {"extract": {"box": 64}})
