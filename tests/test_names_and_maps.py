"""Names of movies that are no plain text or look like patterns, maps and masks of other programs, and what many bad movies print."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_mrc_facts import mrc

from cryodask.errors import InputError, MovieError, ProjectFileError
from cryodask.formats.movies import open_movie
from cryodask.formats.mrc import write_mrc
from cryodask.formats.presence import show_name
from cryodask.run import events as of
from cryodask.run.events.progress import Terminal
from cryodask.run.isolation import ItemFailure
from cryodask.run.preview import preview
from cryodask.run.recipe import list_movies, make_plan
from cryodask.run.session import run_session
from cryodask.run.sources import check_files, list_exposures
from cryodask.run.told import is_untold, keep_from_log
from cryodask.stage import load_stages

OPTICS = "microscope: {voltage_kv: 300, spherical_aberration_mm: 2.7, pixel_size_angstrom: 1}\npipeline: [ingest]\n"


def found(folder: Path, pattern: str) -> list[str]:
    (folder / "p.yaml").write_text(f"name: r\ninputs: {{movies: {pattern!r}}}\n{OPTICS}")
    return [os.path.relpath(path, folder) for path in list_movies(make_plan(folder / "p.yaml"))]


@pytest.mark.parametrize("name", ["grid[1]", "what?", "a*b", "[abc]", "{x}", "with space", "a'b", "[!1]", "**"])
def test_the_folder_of_a_project_is_no_pattern(tmp_path: Path, name: str) -> None:
    for folder in (name, "grid1", "whatx", "a_b", "a", "2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.tif").touch()
    assert found(tmp_path / name, "*.tif") == ["m.tif"]
    assert found(tmp_path / name, "m.tif") == ["m.tif"]


def test_folders_and_files_in_a_pattern_are_taken_as_they_are_written(tmp_path: Path) -> None:
    for folder in ("day[1]", "day1", "day2"):
        (tmp_path / folder).mkdir()
        for file in ("a[3].tif", "a3.tif"):
            (tmp_path / folder / file).touch()
    assert found(tmp_path, "day[1]/*.tif") == ["day[1]/a3.tif", "day[1]/a[3].tif"]
    assert found(tmp_path, "day[1]/a[3].tif") == ["day[1]/a[3].tif"]
    assert found(tmp_path, "day[2]/a[3].tif") == ["day2/a3.tif"]
    assert found(tmp_path, "day?/a3.tif") == ["day1/a3.tif", "day2/a3.tif"]
    assert len(found(tmp_path, "**/*.tif")) == 6
    with pytest.raises(ProjectFileError, match="No movie matches b"):
        found(tmp_path, "b*.tif")


@pytest.mark.parametrize(
    ("raw", "shown"), [(b"m\xfc1", r"m\xfc1"), (b"m\n1", r"m\x0a1"), (b"m\x1b[31m", r"m\x1b[31m"), (b"\xff\xfe", r"\xff\xfe")]
)
def test_a_movie_whose_name_is_no_text_is_an_item_with_an_escaped_name(tmp_path: Path, raw: bytes, shown: str) -> None:
    for name in (b"ok", raw):
        (tmp_path / os.fsdecode(name + b".mrc")).write_bytes(mrc(np.full((2, 8, 8), len(name), "i2")))
    (tmp_path / "p.yaml").write_text(f"name: r\ninputs: {{movies: '*.mrc'}}\n{OPTICS}")
    plan = make_plan(tmp_path / "p.yaml")
    arrivals = {a.name: a for a in list_exposures(plan, None)}
    assert set(arrivals) == {"ok", shown}
    odd = arrivals[shown].inputs["movie_path"]
    odd.encode()
    with pytest.raises(MovieError, match="not UTF-8, or control characters"):
        open_movie(tmp_path / odd)


@pytest.mark.parametrize("name", ["mü.tif", "a b", 'q"', "x\\y", "日本", ""])
def test_text_is_shown_as_it_is(name: str) -> None:
    assert show_name(name) == name


# --- maps --------------------------------------------------------------------------------------------------------------------
MAP = np.random.default_rng(0).normal(size=(8, 8, 8)).astype("f4")


def imported(**params: Any) -> dict[str, Any]:
    stage = load_stages()["import_map"]
    return stage.process(stage.params(**params))


@pytest.mark.parametrize(
    ("voxels", "same"),
    [((2.0, 2.0000005), True), ((1.06, 1.0601), True), ((0.83, 0.82995), True), ((1.0, 1.001), False), ((2.0, 1.0), False)],
)
def test_half_maps_are_on_one_grid_if_their_voxels_are_equal_within_rounding(
    tmp_path: Path, voxels: tuple[float, float], same: bool
) -> None:
    for name, voxel, data in zip("ab", voxels, (MAP, MAP[::-1])):
        write_mrc(tmp_path / f"{name}.mrc", data, voxel)
    (tmp_path / "p.yaml").write_text("name: r\npipeline:\n  - import_map: {half_maps: [a.mrc, b.mrc]}\n  - mask\n")
    paths = (str(tmp_path / "a.mrc"), str(tmp_path / "b.mrc"))
    if same:
        assert imported(half_maps=paths)["map_pixel_size_angstrom"] == pytest.approx(voxels[0])
        check_files(make_plan(tmp_path / "p.yaml"))
        return
    with pytest.raises(InputError, match="half-maps differ"):
        imported(half_maps=paths)
    with pytest.raises(InputError, match="half-maps differ"):
        check_files(make_plan(tmp_path / "p.yaml"))


def refuse(folder: Path, step: str, text: str, error: type[Exception] = InputError) -> None:
    (folder / "p.yaml").write_text(f"name: r\npipeline:\n  - {step}\n")
    with pytest.raises(error, match=text):
        check_files(make_plan(folder / "p.yaml"))


def test_what_is_no_map_is_refused_before_anything_runs(tmp_path: Path) -> None:
    write_mrc(tmp_path / "movie.mrc", np.random.default_rng(0).normal(size=(3, 8, 8)).astype("f4"), 2.0)
    (tmp_path / "notes.txt").write_text("no map")
    (tmp_path / "maps").mkdir()
    refuse(tmp_path, "import_map: {file: movie.mrc}", "given as import_map.file, is 3 x 8 x 8 voxels, not a cube")
    refuse(tmp_path, "import_map: {file: notes.txt}", "less than an MRC header")
    refuse(tmp_path, "import_map: {file: maps}", "maps is a folder, not a file", ProjectFileError)


def test_one_map_as_both_half_maps_is_refused_under_any_name(tmp_path: Path) -> None:
    for name in "ab":
        write_mrc(tmp_path / f"{name}.mrc", MAP, 2.0)
    refuse(tmp_path, "import_map: {half_maps: [a.mrc, a.mrc]}", "half-maps of import_map are the same map")
    refuse(tmp_path, "import_map: {half_maps: [a.mrc, b.mrc]}", "half-maps of import_map are the same map")
    refuse(tmp_path, "import_map: {half_maps: [a.mrc, b.mrc], file: a.mrc}", "file and half_maps are both given", ProjectFileError)


def test_an_imported_mask_of_another_box_is_told_before_anything_runs(tmp_path: Path) -> None:
    write_mrc(tmp_path / "map.mrc", MAP, 2.0)
    for name, edge in (("own", 8), ("small", 6)):
        write_mrc(tmp_path / f"{name}.mrc", np.abs(MAP[:edge, :edge, :edge]), 2.0)
    for name, warned in (("own", False), ("small", True)):
        (tmp_path / "p.yaml").write_text(f"name: r\npipeline:\n  - import_map: {{file: map.mrc}}\n  - import_mask: {{file: {name}.mrc}}\n")
        found = [
            w for w in preview(make_plan(tmp_path / "p.yaml")).warnings if "6 x 6 x 6 voxels, but the map of import_map will have 8" in w
        ]
        assert len(found) == warned


CUBE = (16.0, 16.0, 16.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"cell": CUBE}, ""), ({"cell": CUBE, "axes": (3, 1, 2)}, ""), ({"cell": (16.0, 16.0, 8.0)}, "not cubes"),
        ({"cell": (16.0, 8.0, 16.0)}, "not square"), ({"cell": (-16.0,) * 3}, "voxel size of -2"), ({"cell": (0.0,) * 3}, "no voxel size"),
        ({"cell": CUBE, "axes": (0, 1, 2)}, "invalid axes"), ({"cell": CUBE, "size": (8, 8, 7)}, "more sections follow"),
        ({"cell": CUBE, "mode": 4}, "complex"), ({"cell": CUBE, "angles": (90.0, 101.0, 90.0)}, "angles"),
        ({"cell": CUBE, "space_group": 401, "grid": (8, 8, 4)}, "stack of 2 volumes"),
    ],
)  # fmt: skip
def test_maps_and_masks_are_read_by_what_their_header_says(tmp_path: Path, words: dict[str, Any], said: str) -> None:
    values = np.abs(MAP) / np.abs(MAP).max()
    axes = words.get("axes", (1, 2, 3))
    stored = values.transpose(3 - axes[2], 3 - axes[1], 3 - axes[0]) if sorted(axes) == [1, 2, 3] else values
    path = tmp_path / "m.mrc"
    path.write_bytes(mrc(np.ascontiguousarray(stored), **words))
    mask = load_stages()["import_mask"]

    def masked() -> np.ndarray:
        return mask.process(mask.params(file=str(path)), final_map=MAP, map_pixel_size_angstrom=2.0)["solvent_mask"]

    if not said:
        assert np.array_equal(imported(file=str(path))["final_map"], values)
        assert np.array_equal(masked(), values)
        return
    with pytest.raises(InputError, match=said):
        imported(file=str(path))
    if said != "no voxel size":  # a mask is on the grid of its map
        with pytest.raises(InputError, match=said):
            masked()


# --- what is printed ---------------------------------------------------------------------------------------------------------
def test_a_hundred_bad_movies_print_fewer_than_two_hundred_lines() -> None:
    stream = io.StringIO()
    terminal = Terminal(stream)
    for i in range(100):
        message = str(MovieError(f"m{i}.tif is empty (0 bytes).", "the disk was full", "copy it again"))
        terminal(of.ExposureQuarantined(time=0.0, run="r", step="ingest", name=f"m{i}", row=i, message=message))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 + 99  # the reason of all is explained once
    assert lines[:3] == ["quarantined m0: m0.tif is empty (0 bytes).", "  Usual reason: the disk was full", "  What to do: copy it again"]
    assert lines[-1] == "quarantined m99: m99.tif is empty (0 bytes)."


def test_dask_is_silent_about_errors_that_the_driver_tells_and_about_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cryodask.run.told._TOLD", set())
    text = "Compute Failed\nKey:       %s\nState:     executing\nException: %r\nTraceback: %r\n"

    def logged(error: Exception, traceback: str = "") -> bool:
        return is_untold(logging.LogRecord("distributed.worker", logging.ERROR, "", 0, text, ("k", repr(error), traceback), None))

    failure, refused = ItemFailure("MovieError", "m.tif is empty", "quarantine"), InputError("The half-maps are copies.", "", "give others")
    assert logged(failure)
    assert logged(refused)
    for error in (failure, refused):
        keep_from_log(error)
    assert not logged(failure)
    assert not logged(refused)
    assert logged(ValueError("a fault"), "raise InputError(text)")
    assert logged(ValueError("Exception: InputError(x)"))


def test_a_step_that_refuses_its_maps_prints_no_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).normal(size=(16, 16, 16)).astype(np.float32)
    for name, values in (("h1", noise), ("h2", 2 * noise)):
        write_mrc(tmp_path / f"{name}.mrc", values, 2.0)
    steps = "pipeline:\n  - import_map: {half_maps: [h1.mrc, h2.mrc]}\n  - mask: {threshold: 0.5}\n  - postprocess\nworkers: 1\n"
    (tmp_path / "p.yaml").write_text("name: r\n" + steps)
    with pytest.raises(InputError, match="not independent"):
        run_session(tmp_path / "p.yaml")
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert "Compute Failed" not in printed.err
