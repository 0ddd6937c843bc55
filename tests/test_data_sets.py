"""Data sets: what optics, gain and membership compute again, that a name is a label, and a set that is listed no longer. Toy stages."""

from __future__ import annotations

import shutil
from pathlib import Path

import _toy_stages  # noqa: F401  (registers the stages)
import numpy as np
import pytest
import yaml
from _told import Told
from distributed import Client
from test_counts import PIPELINE, made, renewed

from cryodask.formats.movies import write_mrc_movie
from cryodask.formats.mrc import write_mrc
from cryodask.run.preview import Preview, preview
from cryodask.run.recipe import draft_plan, make_plan
from cryodask.run.session import run_plan
from cryodask.run.watch import Until
from cryodask.store.project import Project

pytestmark = pytest.mark.heavy

STEPS = PIPELINE[:8]
PER_EXPOSURE = ("ingest", "toy_motion", "toy_ctf", "toy_pick", "toy_extract", "full")
OVER_SETS = {"toy_classify", "toy_curate", "toy_poses"}


@pytest.fixture(scope="module")
def here():
    """A cluster in this process: the toy stages are known here only."""
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        yield client


def movie(folder: Path, data_set: str, number: int, edge: int = 16) -> None:
    (folder / data_set).mkdir(exist_ok=True)
    frames = np.random.default_rng(number).poisson(2.0, (2, edge, edge)).astype(np.uint8)
    write_mrc_movie(folder / data_set / f"m{number:03d}.mrc", frames, 1.0)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six movies in two folders."""
    for number in range(6):
        movie(tmp_path, f"d{number // 3 + 1}", number)
    return tmp_path


def optics(voltage: float = 300, pixel: float = 1.0, dose: float = 1.0) -> dict[str, float]:
    return {"voltage_kv": voltage, "spherical_aberration_mm": 2.7, "pixel_size_angstrom": pixel, "dose_per_frame": dose}


def one(name: str = "one", place: str = "d1", **more) -> dict:
    return {"name": name, "movies": f"{place}/*.mrc", "microscope": optics(), **more}


def two(name: str = "two", place: str = "d2", **more) -> dict:
    return {"name": name, "movies": f"{place}/*.mrc", "microscope": optics(200, dose=2.0), **more}


def write(folder: Path, inputs, pipeline) -> Path:
    (folder / "toy.yaml").write_text(yaml.safe_dump({"name": "toy", "inputs": inputs, "pipeline": pipeline}))
    return folder / "toy.yaml"


def run(folder: Path, here, inputs, pipeline=STEPS, listen=(), **options) -> Project:
    return run_plan(make_plan(write(folder, inputs, pipeline)), here, listen=listen, **options)


def ahead(folder: Path, inputs, pipeline=STEPS) -> Preview:
    return preview(draft_plan(write(folder, inputs, pipeline)))


def todo(shown: Preview) -> dict[str, int | None]:
    return {s.step: s.todo for s in shown.steps if not s.done}


def of_exposures(counts: dict) -> dict[str, int]:
    return {label: counts[label] for label in PER_EXPOSURE if label in counts}


def values(project: Project) -> dict[str, tuple[float, float]]:
    table = project.scalars()[["total_motion", "defocus_u_angstrom"]]
    return {name: tuple(row) for name, row in zip(table.index, table.values.tolist())}


def from_scratch(folder: Path, here, inputs, pipeline) -> dict[str, tuple[float, float]]:
    shutil.rmtree(folder / "toy")
    return values(run(folder, here, inputs, pipeline))


@pytest.mark.parametrize(
    ("microscope", "again"),
    [(optics(200), {"toy_ctf", *OVER_SETS}), (optics(dose=5.0), {"toy_motion", "toy_ctf", "toy_pick", "toy_extract", "full", *OVER_SETS})],
    ids=["voltage", "dose"],
)
def test_changed_optics_of_one_named_data_set_reach_the_steps_over_sets(folder, here, microscope, again):
    before = made(run(folder, here, [one()]))
    changed = run(folder, here, [one(microscope=microscope)])
    assert set(renewed(before, changed)) == again
    found = changed["toy_poses"]["final_map"].values
    shutil.rmtree(folder / "toy")
    assert (run(folder, here, [one(microscope=microscope)])["toy_poses"]["final_map"].values == found).all()


def test_a_changed_gain_of_one_named_data_set_reaches_the_steps_over_sets(folder, here):
    for name, value in (("a", 1.0), ("b", 3.0)):
        write_mrc(folder / f"{name}.mrc", np.full((16, 16), value, np.float32), 1.0)
    first = run(folder, here, [one(gain="a.mrc")])
    before, mean = made(first), float(first["toy_poses"]["final_map"].values.mean())
    changed = run(folder, here, [one(gain="b.mrc")])
    assert set(renewed(before, changed)) >= OVER_SETS
    assert float(changed["toy_poses"]["final_map"].values.mean()) == pytest.approx(3 * mean)


def test_a_movie_moved_to_another_data_set_is_processed_with_its_optics(folder, here):
    before = made(run(folder, here, [one(), two()]))
    (folder / "d1" / "m000.mrc").rename(folder / "d2" / "m000.mrc")
    told = todo(ahead(folder, [one(), two()]))
    project = run(folder, here, [one(), two()])
    counts = renewed(before, project)
    assert of_exposures(counts) == dict.fromkeys(("toy_motion", "toy_ctf", "toy_pick", "toy_extract", "full"), 1)
    assert {k: v for k, v in told.items() if k in PER_EXPOSURE[:5]} == {k: v for k, v in counts.items() if k in PER_EXPOSURE[:5]}
    assert set(counts) >= OVER_SETS
    assert values(project) == from_scratch(folder, here, [one(), two()], STEPS)


def test_two_data_sets_whose_folders_are_swapped_are_computed_again(folder, here):
    before = made(run(folder, here, [one(), two()], STEPS[:3]))
    swapped = [one(place="d2"), two(place="d1")]
    told = todo(ahead(folder, swapped, STEPS[:3]))
    project = run(folder, here, swapped, STEPS[:3])
    assert told == renewed(before, project) == dict.fromkeys(("toy_motion", "toy_ctf", "toy_pick"), 6)
    assert values(project) == from_scratch(folder, here, swapped, STEPS[:3])


def test_what_was_made_in_the_former_data_set_is_not_shown_where_the_new_one_fails(tmp_path, here):
    for number in range(4):
        movie(tmp_path, f"d{number // 2 + 1}", number, edge=16 if number < 2 else 20)
    write_mrc(tmp_path / "gain.mrc", np.ones((20, 20), np.float32), 1.0)
    sets = [one(), two(gain="gain.mrc")]
    assert run(tmp_path, here, sets, STEPS[:4]).failures() == []
    (tmp_path / "d1" / "m000.mrc").rename(tmp_path / "d2" / "m000.mrc")
    project = run(tmp_path, here, sets, STEPS[:4])
    assert [(f["stage"], f["name"]) for f in project.failures()] == [("ingest", "m000")]
    assert set(project.particles("toy_extract")["micrograph"].values) == {"m001", "m002", "m003"}
    assert todo(ahead(tmp_path, sets, STEPS[:4])) == {}, "what is quarantined in one step of a chain goes no further"


RENAMED = {
    "one renamed": [one(), two("zwei")],
    "order changed": [two(), one()],
    "names swapped": [one("two"), two("one")],
}


@pytest.mark.parametrize("inputs", RENAMED.values(), ids=RENAMED)
def test_the_name_of_a_data_set_is_a_label(folder, here, inputs):
    before = made(run(folder, here, [one(), two()]))
    assert todo(ahead(folder, inputs)) == {}
    project = run(folder, here, inputs)
    assert renewed(before, project) == {}
    assert set(project.state.constants) == {i["name"] for i in inputs}
    assert renewed(before, run(folder, here, [one(), two()])) == {}


def test_a_data_set_that_gets_a_name_computes_nothing(folder, here):
    content = {"name": "toy", "inputs": {"movies": "d1/*.mrc"}, "microscope": optics(), "pipeline": STEPS}
    (folder / "toy.yaml").write_text(yaml.safe_dump(content))
    before = made(run_plan(make_plan(folder / "toy.yaml"), here))
    assert renewed(before, run(folder, here, [one()])) == {}


def test_a_data_set_renamed_while_a_session_is_watched_computes_nothing(folder, here):
    before = made(run(folder, here, [one(), two()]))
    project = run(folder, here, [one(), two("zwei")], watch=Until(movies=6))
    assert renewed(before, project) == {}
    assert {item.data_set for item in project.items()} == {"one", "zwei"}


def test_a_data_set_that_is_listed_no_longer_keeps_its_results_and_its_optics(folder, here):
    before = made(run(folder, here, [one(), two()]))
    said = "3 exposures belong to data set two, which is no longer in the project file: results, optics and gain stay as they were"
    shown = ahead(folder, [one()])
    assert todo(shown) == {}
    assert any(w.startswith(said) for w in shown.warnings)
    told = Told()
    project = run(folder, here, [one()], listen=[told])
    assert renewed(before, project) == {}
    assert sum(text.startswith(said) for text in told.said) == 1
    assert (project.failures(), len(project.items())) == ([], 6)
    assert project.scalars()["voltage_kv"].tolist() == [300] * 3 + [200] * 3
    # chunked movies are there still: a changed step processes them as before, with the optics of their set
    changed = [{"toy_motion": {"number": 2}}, *STEPS[1:]]
    project = run(folder, here, [one()], changed)
    assert project.failures() == []
    assert values(project) == from_scratch(folder, here, [one(), two()], changed)


def test_steps_that_need_frames_of_a_referenced_ingest_say_which_are_missing(folder, here):
    in_place = [{"ingest": {"storage": "in_place"}}, *STEPS[:3]]
    before = made(run(folder, here, [one(), two()], in_place))
    (folder / "d2" / "m004.mrc").unlink()
    assert renewed(before, run(folder, here, [one()], in_place)) == {}
    project = run(folder, here, [one()], [in_place[0], {"toy_motion": {"number": 2}}, *in_place[2:]])
    assert [f["name"] for f in project.failures()] == ["m004"]
    assert "m004.mrc" in project.failures()[0]["message"]


def test_movies_in_place_are_checked_at_ingest_and_never_read_once_they_have_changed(folder, here):
    movie(folder, "d2", 5, edge=24)  # the others have 16 pixels
    movie(folder, "d2", 6)
    in_place = [{"ingest": {"storage": "in_place"}}, *STEPS[:3]]
    project = run(folder, here, [one(), two()], in_place)
    said = "movie of m005 has shape (2, 24, 24), not (2, 16, 16) like most of its data set."
    assert [(f["name"], f["stage"], f["message"].splitlines()[0]) for f in project.failures()] == [("m005", "ingest", said)]
    movie(folder, "d2", 40)
    (folder / "d2" / "m040.mrc").rename(folder / "d2" / "m004.mrc")
    whole = (folder / "d2" / "m003.mrc").read_bytes()
    (folder / "d2" / "m003.mrc").write_bytes(whole[:-100])
    (folder / "d1" / "m002.mrc").touch()
    # a run that has listed its movies before, as in a watched session or with a set that is listed no longer
    project = run(folder, here, [one()], [in_place[0], {"toy_motion": {"number": 2}}, *in_place[2:]])
    failures = {f["name"]: f["message"] for f in project.failures() if f["stage"] == "toy_motion"}
    assert set(failures) == {"m003", "m004"}
    assert all("has changed since it was registered" in message for message in failures.values())
    assert "m002" in project["toy_motion"]["micrograph"].values
    # listed again they are other exposures: one is good, the other is truncated
    told = Told()
    project = run(folder, here, [one(), two()], in_place, listen=[told])
    assert any(text.startswith("m004 was recorded again: it is a new exposure") for text in told.said)
    messages = {f["name"]: f["message"] for f in project.failures()}
    assert set(messages) == {"m003", "m005"}
    assert "is truncated" in messages["m003"]


def test_forgotten_exposures_of_a_data_set_that_is_listed_no_longer_come_back_with_its_optics(folder, here):
    before = made(run(folder, here, [one(), two()], STEPS[:4]))
    project = run(folder, here, [one()], STEPS[:4])
    project.forget_exposures(["m003", "m004", "m005"])
    assert len(run(folder, here, [one()], STEPS[:4]).items()) == 3
    project.forget_exposures(["m003", "m004", "m005"], undo=True)
    assert renewed(before, run(folder, here, [one()], STEPS[:4])) == {}


RENAMED = [{**one("two"), "movies": "d1/*.mrc"}]


@pytest.mark.parametrize("watched", [False, True], ids=["run", "watched"])
@pytest.mark.parametrize("in_between", [False, True], ids=["at once", "left before"])
def test_a_set_keeps_its_optics_when_another_one_takes_its_name(folder, here, in_between, watched):
    before = made(run(folder, here, [one(), two()]))
    if in_between:
        run(folder, here, [one()])
    shown = ahead(folder, RENAMED)
    assert todo(shown) == {}
    said = "3 exposures belong to a former data set two (kept as two~1), which is no longer in the project file"
    assert any(w.startswith(said) for w in shown.warnings)
    told = Told()
    project = run(folder, here, RENAMED, listen=[told], **({"watch": Until(movies=3)} if watched else {}))
    assert any(text.startswith(said) for text in told.said)
    assert renewed(before, project) == {}
    assert project.scalars()["voltage_kv"].tolist() == [300] * 3 + [200] * 3
    changed = [{"toy_motion": {"number": 2}}, *STEPS[1:]]
    project = run(folder, here, RENAMED, changed)
    found = values(project)
    # it is there again, under any name; and what is corrected reaches the set that is meant
    before = made(project)
    assert renewed(before, run(folder, here, [*RENAMED, two("three")], changed)) == {}
    assert found == from_scratch(folder, here, [one(), two()], changed)


def test_a_name_that_passes_on_again_keeps_both_sets_apart(folder, here):
    movie(folder, "d3", 7)
    steps = STEPS[:2]
    third = {**one("two", "d3"), "microscope": optics(100)}
    run(folder, here, [one(), two()], steps)
    run(folder, here, RENAMED, steps)
    project = run(folder, here, [third], steps)
    assert project.scalars()["voltage_kv"].tolist() == [300] * 3 + [200] * 3 + [100]
    assert {i.data_set for i in project.items()} == {"two", "two~1", "two~2"}


@pytest.mark.parametrize("moved", [False, True], ids=["archived", "moved"])
def test_archived_movies_of_a_set_follow_what_is_corrected_of_it(folder, here, moved):
    steps = STEPS[:4]
    run(folder, here, [one(), two()], steps)
    (folder / "d2" / "m004.mrc").unlink()
    if moved:
        (folder / "d2").rename(folder / "d9")
    project = run(folder, here, [one(), two(place="d9" if moved else "d2", microscope=optics(250, dose=2.0))], steps)
    assert project.scalars()["voltage_kv"].tolist() == [300] * 3 + [250] * 3
    assert {i.data_set for i in project.items()} == {"one", "two"}


@pytest.mark.parametrize("place", ["optics", "gain"])
def test_only_the_exposures_of_the_set_that_changed_are_cut_again(folder, here, place):
    """Particles and images are of one chain: those of the other set are linked, as a dry run announces it."""
    write_mrc(folder / "g.mrc", np.full((16, 16), 3.0, np.float32), 1.0)
    changed = two(microscope=optics(200, dose=5.0)) if place == "optics" else two(gain="g.mrc")
    steps = STEPS[:4]
    first = made(run(folder, here, [one(), two()], steps))
    announced = todo(ahead(folder, [one(), changed], steps))
    project = run(folder, here, [one(), changed], steps)
    assert of_exposures(renewed(first, project)) == announced
    assert announced["toy_extract"] == 3
    assert {name for (label, name), when in made(project).items() if first[label, name] != when} == {"m003", "m004", "m005"}
    # undone, all is found
    assert todo(ahead(folder, [one(), two()], steps)) == {}
    assert made(run(folder, here, [one(), two()], steps)) == first


def processed(project: Project) -> tuple[set[str], set[str]]:
    """Names of the exposures with particles, and of those that failed."""
    return set(project.particles("toy_extract")["micrograph"].values), {f["name"] for f in project.failures()}


def test_a_movie_of_another_size_has_its_place_in_a_set_of_its_own(tmp_path, here):
    """What its message says to do is done; optics are those of the other set."""
    for number in range(4):
        movie(tmp_path, "d1", number, edge=20 if number == 3 else 16)
    assert processed(run(tmp_path, here, [one()], STEPS[:4])) == ({"m000", "m001", "m002"}, {"m003"})
    (tmp_path / "d2").mkdir()
    (tmp_path / "d1" / "m003.mrc").rename(tmp_path / "d2" / "m003.mrc")
    sets = [one(), {**two(), "microscope": optics()}]
    assert todo(ahead(tmp_path, sets, STEPS[:4])) == dict.fromkeys(PER_EXPOSURE[:5], 1)
    assert processed(run(tmp_path, here, sets, STEPS[:4])) == ({f"m00{n}" for n in range(4)}, set())


@pytest.mark.parametrize("name", ["m009", "m003"], ids=["new", "known"])
def test_a_movie_in_the_wrong_set_is_quarantined_as_from_scratch(tmp_path, here, name):
    """Another set of the project has movies of its size; moved home it counts again."""
    sets = [one(), {**two(), "microscope": optics()}]
    for number in range(5):
        movie(tmp_path, f"d{number // 3 + 1}", number, edge=16 if number < 3 else 20)
    everything, _ = processed(run(tmp_path, here, sets, STEPS[:4]))
    home, wrong = (tmp_path / place / f"{name}.mrc" for place in ("d2", "d1"))
    if name not in everything:
        movie(tmp_path, "d2", 9, edge=20)
    home.rename(wrong)
    assert todo(ahead(tmp_path, sets, STEPS[:4]))["ingest"] == 1
    found = processed(run(tmp_path, here, sets, STEPS[:4]))
    assert found == (everything - {name}, {name})
    assert todo(ahead(tmp_path, sets, STEPS[:4])) == {}
    shutil.rmtree(tmp_path / "toy")
    assert processed(run(tmp_path, here, sets, STEPS[:4])) == found
    wrong.rename(home)
    assert processed(run(tmp_path, here, sets, STEPS[:4])) == (everything | {name}, set())


def test_sets_of_two_sizes_that_swap_their_names_compute_nothing(tmp_path, here):
    for number in range(4):
        movie(tmp_path, f"d{number // 2 + 1}", number, edge=16 if number < 2 else 20)
    before = made(run(tmp_path, here, [one(), two()], STEPS[:4]))
    swapped = [one("two"), two("one")]
    assert todo(ahead(tmp_path, swapped, STEPS[:4])) == {}
    project = run(tmp_path, here, swapped, STEPS[:4])
    assert renewed(before, project) == {}
    assert project.failures() == []
