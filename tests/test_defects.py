"""Lists of camera defects and dark references: what they mean to pixels, and what is refused."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cryodask.errors import GainError, MovieError
from cryodask.formats.defects import apply_defects, read_defects
from cryodask.formats.gain import on_frames
from cryodask.formats.movies import write_mrc_movie, write_tiff_movie
from cryodask.formats.mrc import write_mrc
from cryodask.stage import load_stages

SIZE = "CameraSizeX 14\nCameraSizeY 12\n"


def defects(folder: Path, text: str, **how: bool) -> np.ndarray:
    path = folder / "defects.txt"
    path.write_text(text)
    return read_defects(path, **how)


@pytest.mark.parametrize(
    ("line", "pixels"),
    [  # rows and columns of the file; the rules of IMOD's CorrectDefects (clip and alignframes)
        ("BadPixels 3 1 13 11", [(1, 3), (11, 13)]),
        ("BadColumns 5\t6", np.s_[:, 5:7]),
        ("BadRows 4,9", np.s_[[4, 9], :]),
        ("PartialBadColumn 2 3 4 10", np.s_[4:11, 2:5]),
        ("PartialBadRow 2 3 4 10", np.s_[2:5, 4:11]),
        ("UsableArea 0 0 0 0\nBadRows 1", np.s_[1, :]),
        ("WasScaled 1\nBadPixels 4 2", np.s_[2:4, 4:6]),
        ("WasScaled 2\nBadPixels 4 0", np.s_[0:4, 4:8]),
        ("# a comment\n\nRotationAndFlip 3\nK2Type 1\nFalconType 0\nNumToAvgSuperRes 0\nWasScaled -1\nBadRows 0", np.s_[0, :]),
    ],
)
def test_each_kind_of_defect_covers_its_pixels(tmp_path, line, pixels):
    truth = np.zeros((12, 14), bool)
    for at in pixels if isinstance(pixels, list) else [pixels]:
        truth[at] = True
    assert np.array_equal(defects(tmp_path, SIZE + line + "\n", eer=True), truth)
    assert np.array_equal(defects(tmp_path, SIZE.replace("\n", "\r\n") + line), truth[::-1])  # rows of TIFF and MRC movies


def test_what_lies_outside_the_usable_area_is_a_defect(tmp_path):
    mask = defects(tmp_path, SIZE + "UsableArea 2 1 10 12", eer=True)
    assert not mask[2:11, 1:13].any()
    assert mask.sum() == 12 * 14 - 9 * 12


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 13)), min_size=1, max_size=30),
    st.lists(st.integers(0, 13), max_size=3),
    st.lists(st.tuples(st.integers(0, 13), st.integers(0, 11), st.integers(0, 11)), max_size=3),
)
def test_any_list_comes_back_as_its_pixels(tmp_path_factory, pixels, columns, partial):
    truth = np.zeros((12, 14), bool)
    lines = ["BadPixels " + " ".join(f"{x} {y}" for y, x in pixels), *(["BadColumns " + " ".join(map(str, columns))] if columns else [])]
    for y, x in pixels:
        truth[y, x] = True
    truth[:, columns] = True
    for x, a, b in partial:
        lines.append(f"PartialBadColumn {x} 1 {min(a, b)} {max(a, b)}")
        truth[min(a, b) : max(a, b) + 1, x] = True
    if not truth.all():
        assert np.array_equal(defects(tmp_path_factory.mktemp("d"), SIZE + "\n".join(lines), eer=True), truth)


@settings(max_examples=100)
@given(st.text(alphabet="BadPixelsRowColumn 0123456789-.#\n", max_size=80))
def test_any_text_is_a_list_or_an_error(tmp_path_factory, text):
    with suppress(GainError):
        assert defects(tmp_path_factory.mktemp("d"), SIZE + text).shape == (12, 14)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("BadRows 1", "does not give the size"),
        (SIZE + "BadPixels 3 12", "line 3: BadPixels names pixels that a camera of 14 x 12 pixels does not have"),
        (SIZE + "PartialBadRow 1 1 5 3", "line 3: PartialBadRow names pixels"),
        (SIZE + "BadPixels 3", "1 values, pairs are needed"),
        (SIZE + "PartialBadColumn 3 1 2", "3 values, 4 are needed"),
        (SIZE + "BadRows 1.5", "whole numbers"),
        (SIZE + "BadRows -1", "whole numbers"),
        (SIZE + "3 4 1 1", "'3' is not a kind of defect"),
        (SIZE + "UsableArea 5 5 4 4", "all pixels"),
        ("\0" * 100, "is an image"),
        ("", "is empty"),
    ],
)
def test_what_is_not_a_list_of_defects_says_why(tmp_path, text, said):
    with pytest.raises(GainError, match=said):
        defects(tmp_path, text)


def test_defects_are_pixels_of_gain_zero_at_either_resolution():
    mask = np.zeros((12, 14), bool)
    mask[3, 4] = True
    gain = np.random.default_rng(0).uniform(0.8, 1.2, (12, 14)).astype(np.float32)
    assert np.array_equal(apply_defects(None, mask), ~mask)
    assert np.array_equal(apply_defects(gain, mask), np.where(mask, 0, gain))
    fine = on_frames(gain, (24, 28))
    assert np.array_equal(fine, gain.repeat(2, 0).repeat(2, 1))
    assert np.array_equal(apply_defects(fine, mask) == 0, mask.repeat(2, 0).repeat(2, 1))
    assert np.array_equal(apply_defects(gain, mask.repeat(2, 0).repeat(2, 1)), apply_defects(fine, mask))
    assert on_frames(gain, (24, 30)) is gain
    with pytest.raises(GainError, match=r"12 x 14 pixels .* 14 x 12"):
        apply_defects(np.ascontiguousarray(gain.T), mask)


def test_a_dark_reference_is_subtracted_from_every_frame(tmp_path):
    rng = np.random.default_rng(0)
    frames, dark = rng.poisson(30.0, (4, 12, 14)).astype(np.uint16), rng.uniform(3.0, 5.0, (12, 14)).astype(np.float32)
    write_tiff_movie(tmp_path / "m.tif", frames)
    write_mrc(tmp_path / "d.mrc", dark, 1.0)
    stage = load_stages()["ingest"]
    given = stage.process(stage.params(dark=str(tmp_path / "d.mrc")), movie_path=str(tmp_path / "m.tif"))
    assert given["movie"].dtype == np.float32
    assert all(np.array_equal(given["movie"][i], frames[i] - dark) for i in range(4))
    assert given["mean_count"] == pytest.approx((frames[[0, 2, 3]] - dark).mean())
    write_tiff_movie(tmp_path / "d.tif", dark[None])
    given = stage.process(stage.params(dark=str(tmp_path / "d.tif"), storage="in_place"), movie_path=str(tmp_path / "m.tif"))
    assert np.array_equal(given["movie"][2], frames[2] - dark)


def test_wrong_dark_references_are_refused(tmp_path):
    write_mrc_movie(tmp_path / "m.mrc", np.ones((2, 12, 14), np.uint8), 1.0)
    stage = load_stages()["ingest"]
    for name, data, error, said in (
        ("turned", np.zeros((14, 12), np.float32), MovieError, "the dark reference 14 x 12"),
        ("nan", np.full((12, 14), np.nan, np.float32), GainError, "NaN"),
        ("movie", np.zeros((2, 12, 14), np.float32), GainError, "2 sections"),
    ):
        write_mrc(tmp_path / f"{name}.mrc", data, 1.0, stack=data.ndim == 3)
        with pytest.raises(error, match=said):
            stage.process(stage.params(dark=str(tmp_path / f"{name}.mrc")), movie_path=str(tmp_path / "m.mrc"))
