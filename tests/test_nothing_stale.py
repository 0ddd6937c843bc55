"""What a change makes again: exactly the generations that depend on what changed, no other, and gc removes only what nothing needs."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import _toy_stages as toys
import mrcfile
import numpy as np
import pytest
import yaml
from distributed import Client

from cryodask.formats.movies import write_mrc_movie
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.store.journal import content_crc
from cryodask.store.project import Project

pytestmark = pytest.mark.heavy

MAPS = ["ingest", "toy_motion", "toy_ctf", "toy_pick", "toy_extract"]
SINGLES = ["toy_classify", "curate", "toy_refine", "toy_mask", "toy_postprocess"]
ALL = [*MAPS, *SINGLES]
FROM_MOTION, FROM_EXTRACT = ALL[1:], ALL[4:]
AFTER_CTF = ["toy_ctf", "toy_classify", "curate"]
"""The toy refinement reads no CTF, and the same particles are kept: nothing of it changes."""


@pytest.fixture(scope="module")
def here():
    """A cluster in this process: the toy stages are known here only."""
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        yield client


def _write_map(path: Path, value: float) -> None:
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(np.random.default_rng(int(value)).normal(size=(4, 4, 4)).astype(np.float32))


def _write_movie(folder: Path, number: int, seed: int | None = None) -> None:
    frames = np.random.default_rng(number if seed is None else seed).poisson(2.0, (3, 16, 16)).astype(np.uint8)
    write_mrc_movie(folder / "movies" / f"m{number}.mrc", frames, 1.0)


@pytest.fixture
def session(tmp_path) -> Path:
    (tmp_path / "movies").mkdir()
    for number in range(4):
        _write_movie(tmp_path, number)
    for name in ("reference", "mask"):
        _write_map(tmp_path / f"{name}.mrc", 1)
    with mrcfile.new(tmp_path / "gain.mrc") as file:
        file.set_data(np.random.default_rng(5).uniform(0.9, 1.1, (16, 16)).astype(np.float32))
    project = {
        "name": "toy",
        "inputs": {"movies": "movies/*.mrc", "gain": "gain.mrc"},
        "microscope": {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "pixel_size_angstrom": 1.0},
        "pipeline": [
            "toy_motion",
            "toy_ctf",
            {"toy_pick": {"reference": "reference.mrc"}},
            "toy_extract",
            "toy_classify",
            {"curate": {"keep": "all"}},
            "toy_refine",
            {"toy_mask": {"reference": "mask.mrc"}},
            "toy_postprocess",
        ],
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(project))
    return tmp_path


def _run(session: Path, here) -> Project:
    return run_plan(make_plan(session / "toy.yaml"), here)


def _made(project: Project) -> dict[tuple[str, str], float]:
    """When each record of the current generations was made, by stage and item."""
    return {
        (label, record["name"]): record["time"]
        for label in project.stages
        for record in project.generation(label).records().values()
        if record["name"] in {i.name for i in project.items()} | {label}
    }


def _set(session: Path, *path, value) -> None:
    content = yaml.safe_load((session / "toy.yaml").read_text())
    inner = content
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    (session / "toy.yaml").write_text(yaml.safe_dump(content))


def _gain_by_name(session: Path) -> None:
    shutil.copy(session / "gain.mrc", session / "other.mrc")
    _set(session, "inputs", "gain", value="other.mrc")


def _gain_by_content(session: Path) -> None:
    with mrcfile.open(session / "gain.mrc", "r+") as file:
        file.data[3, 3] *= 1.01


def _touch_references(session: Path) -> None:
    for name in ("gain.mrc", "reference.mrc", "mask.mrc", "toy.yaml"):
        os.utime(session / name, (1, 1))


def _remove(session: Path) -> None:
    (session / "movies" / "m0.mrc").unlink()
    Project(session / "toy").forget_exposures(["m0"])


def _replace_movie(session: Path) -> None:
    _write_movie(session, 2, seed=99)
    os.utime(session / "movies" / "m2.mrc", (5, 5))


def _flip_a_byte_in_the_middle(session: Path) -> None:
    path = session / "movies" / "m2.mrc"
    then = path.stat()
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))


CHANGES = [
    ("nothing at all", lambda s: None, []),
    ("the date of gain, reference and mask", _touch_references, []),
    ("a parameter of motion", lambda s: _set(s, "pipeline", 0, value={"toy_motion": {"number": 2}}), FROM_MOTION),
    ("a parameter of ctf", lambda s: _set(s, "pipeline", 1, value={"toy_ctf": {"number": 2}}), AFTER_CTF),
    ("a parameter of extraction", lambda s: _set(s, "pipeline", 3, value={"toy_extract": {"number": 2}}), FROM_EXTRACT),
    ("a parameter of the classes", lambda s: _set(s, "pipeline", 4, value={"toy_classify": {"number": 2}}), SINGLES[:2]),
    ("a parameter of the refinement", lambda s: _set(s, "pipeline", 6, value={"toy_refine": {"number": 2}}), SINGLES[2:]),
    ("a parameter of the last step", lambda s: _set(s, "pipeline", 8, value={"toy_postprocess": {"number": 2}}), SINGLES[-1:]),
    ("a parameter given as its default", lambda s: _set(s, "pipeline", 0, value={"toy_motion": {"number": 1.0}}), []),
    ("the gain's name", _gain_by_name, []),
    ("the gain's content", _gain_by_content, FROM_MOTION),
    ("the gain's orientation", lambda s: _set(s, "inputs", "gain_flip", value="up-down"), FROM_MOTION),
    ("the picking reference", lambda s: _write_map(s / "reference.mrc", 2), ["toy_pick", *FROM_EXTRACT]),
    ("the mask file", lambda s: _write_map(s / "mask.mrc", 2), SINGLES[3:]),
    ("the voltage", lambda s: _set(s, "microscope", "voltage_kv", value=200), AFTER_CTF),
    ("the pixel size", lambda s: _set(s, "microscope", "pixel_size_angstrom", value=2.0), FROM_MOTION),
    ("the dose", lambda s: _set(s, "microscope", "dose_per_frame", value=2.0), FROM_MOTION),
    ("a movie that was written again", _replace_movie, ALL),
    ("a byte in the middle of a movie whose date was set back", _flip_a_byte_in_the_middle, ALL),
    ("an added movie", lambda s: _write_movie(s, 7), ALL),
    ("a removed movie", lambda s: (s / "movies" / "m1.mrc").unlink(), []),
    ("a forgotten movie", lambda s: Project(s / "toy").forget_exposures(["m1"]), SINGLES),
    ("a renamed movie", lambda s: (s / "movies" / "m1.mrc").rename(s / "movies" / "other.mrc"), []),
    ("movies that were touched", lambda s: [os.utime(p, (9, 9)) for p in (s / "movies").iterdir()], []),
]
ONE_MOVIE_ONLY = {
    "a movie that was written again": {"m2"},
    "a byte in the middle of a movie whose date was set back": {"m2"},
    "an added movie": {"m7"},
}


@pytest.mark.parametrize(("what", "change", "expected"), CHANGES, ids=[c[0] for c in CHANGES])
def test_a_change_makes_again_exactly_what_depends_on_it(session, here, monkeypatch, what, change, expected):
    # roughness cannot tell the orientation of a toy gain
    monkeypatch.setattr("cryodask.formats.gain.check_gain", lambda *a, **k: None)
    before = _made(_run(session, here))
    change(session)
    after = _made(_run(session, here))
    renewed = {key for key, when in after.items() if before.get(key) != when}
    assert sorted({label for label, _ in renewed}, key=ALL.index) == expected
    movies = ONE_MOVIE_ONLY.get(what)
    if movies:
        assert {name for label, name in renewed if label in MAPS} == movies
    elif what == "a forgotten movie":
        assert "m1" not in {name for _, name in after}


def test_an_upgraded_stage_version_renews_it_and_what_follows_when_asked(session, here, monkeypatch):
    before = _made(_run(session, here))
    monkeypatch.setitem(toys.stage.__globals__["STAGES"], "toy_ctf", dataclasses.replace(toys.toy_ctf, version=2))
    assert _made(_run(session, here)) == before, "another version never recomputes unasked"
    after = _made(run_plan(make_plan(session / "toy.yaml"), here, update=["toy_ctf"]))
    assert sorted({label for (label, name), t in after.items() if before[label, name] != t}, key=ALL.index) == AFTER_CTF


def test_a_change_that_is_taken_back_finds_the_old_results(session, here):
    before = _made(_run(session, here))
    _set(session, "pipeline", 1, value={"toy_ctf": {"number": 2}})
    _run(session, here)
    _set(session, "pipeline", 1, value="toy_ctf")
    assert _made(_run(session, here)) == before


def test_a_forgotten_movie_that_is_taken_in_again_brings_its_results_along(session, here):
    before = _made(_run(session, here))
    Project(session / "toy").forget_exposures(["m1"])
    without = _run(session, here)
    assert "m1" not in without["toy_ctf"]["micrograph"].values
    assert "m1" not in without.particles()["micrograph"].values
    assert without.overview()[0][1] == "3/3"
    without.forget_exposures(["m1"], undo=True)
    assert _made(_run(session, here)) == before


def test_movies_of_one_date_that_swap_their_names_keep_their_results(session, here):
    movies = session / "movies"
    for path in movies.iterdir():
        os.utime(path, (7, 7))
    before = _run(session, here)
    rows = {item.name: (item.row, item.content) for item in before.items()}
    values = dict(zip(before["toy_motion"]["row"].values.tolist(), before["toy_motion"]["total_motion"].values.tolist()))
    for old, new in (("m1", "x"), ("m2", "m1"), ("x", "m2")):
        (movies / f"{old}.mrc").rename(movies / f"{new}.mrc")
    after = _run(session, here)
    assert {item.name: (item.row, item.content) for item in after.items()} == {**rows, "m1": rows["m2"], "m2": rows["m1"]}
    assert dict(zip(after["toy_motion"]["row"].values.tolist(), after["toy_motion"]["total_motion"].values.tolist())) == values


def test_maps_never_come_from_a_mixture_of_old_and_new(session, here):
    """After every change the result is that of a project made from nothing."""
    _run(session, here)
    for change in (_replace_movie, _gain_by_content, lambda s: _write_movie(s, 9), _remove):
        change(session)
        grown = _run(session, here)
        made = {label: content_crc({**grown.generation(label).committed()[0], "row": 0}) for label in ("toy_refine", "toy_postprocess")}
        _set(session, "folder", value="fresh")
        fresh = _run(session, here)
        assert made == {label: content_crc(fresh.generation(label).committed()[0]) for label in made}
        shutil.rmtree(fresh.path)
        _set(session, "folder", value="toy")


def test_gc_removes_what_nothing_needs_and_nothing_else(session, here):
    _run(session, here)
    _set(session, "pipeline", 1, value={"toy_ctf": {"number": 2}})
    project = _run(session, here)
    current = {project.generation(label).path for label in ALL}
    superseded = set(project.superseded())
    assert {p.parent.name for p in superseded} == set(AFTER_CTF)
    before = _made(project)
    assert project.collect_garbage() > 0
    assert not any(p.exists() for p in superseded)
    assert all(p.exists() for p in current)
    assert project.verify() == []
    assert _made(_run(session, here)) == before, "nothing had to be made again"
