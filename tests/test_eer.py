"""EER movies: own encoder against other decoders, and damaged files against clear errors."""

from __future__ import annotations

import pickle
import subprocess
from contextlib import suppress
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from cryodask.errors import GainError, MovieError
from cryodask.formats import eer_stream
from cryodask.formats.eer_stream import CODINGS, Coding, StreamError, add_frame
from cryodask.formats.fractions import Fractions
from cryodask.formats.movies import open_movie, read_gain
from cryodask.formats.mrc import write_mrc
from cryodask.simulate.eer import Events, encode_frame, metadata_xml, render, spread_events, write_eer
from cryodask.stage import load_stages

SHAPE = (60, 98)
PIXELS = 60 * 98
SEVEN, EIGHT = CODINGS[65001], CODINGS[65000]


def events_at(pixel: object, seed: int = 0) -> Events:
    rng, at = np.random.default_rng(seed), np.asarray(pixel, np.int64)
    return Events(at, rng.integers(0, 4, len(at)), rng.integers(0, 4, len(at)))


def random_events(rate: float, seed: int, pixels: int = PIXELS) -> Events:
    return events_at(np.flatnonzero(np.random.default_rng(seed).random(pixels) < rate), seed)


def decoded(stream: bytes, coding: Coding = SEVEN, upsampling: int = 1, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    out = np.zeros((shape[0] * upsampling, shape[1] * upsampling), np.uint8)
    add_frame(out, stream, coding, upsampling)
    return out


def movie_file(path: Path, frames: list[Events], shape: tuple[int, int] = SHAPE, **how: object) -> Path:
    items = {
        "numberOfFrames": (len(frames), ""),
        "sensorPixelSize.height": ("8e-11", "m"),
        "totalDose": (f"{0.064 * len(frames):g}", "e/pixel"),  # 0.1 e/A^2 a frame
    }
    write_eer(path, [encode_frame(e, shape[0] * shape[1]) for e in frames], shape, metadata=metadata_xml(items), **how)  # type: ignore[arg-type]
    return path


@pytest.fixture(params=["compiled", "imagecodecs"])
def decoder(request, monkeypatch):
    """Each of the two decoders: that of numba, and the one without."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(eer_stream, "_compiled", lambda: None)


# --- the stream ---------------------------------------------------------------------------------------------------------------
EDGES = {
    "empty": [],
    "first pixel": [0],
    "last pixel": [PIXELS - 1],
    "full": range(PIXELS),
    "runs of 127": [127, 255],
    "an escape before the end": [PIXELS - 128],
    "one pixel more": [PIXELS - 129],
    "two escapes before the end": [PIXELS - 255],
}


@pytest.mark.parametrize("upsampling", [1, 2, 4])
@pytest.mark.parametrize("pixel", EDGES.values(), ids=EDGES)
def test_frames_come_back_whatever_the_length_and_padding_of_their_strip(pixel, upsampling, decoder):
    events = events_at(pixel)
    for coding, long_escapes in ((SEVEN, False), (EIGHT, False), (EIGHT, True)):
        stream = encode_frame(events, PIXELS, coding, long_escapes=long_escapes)
        for padding in (0, 1, 2, 7):
            assert np.array_equal(decoded(stream + bytes(padding), coding, upsampling), render(events, SHAPE, upsampling))


@settings(max_examples=60)
@given(
    st.sets(st.integers(0, 12 * 14 - 1)),
    st.integers(0, 9),
    st.sampled_from([1, 2]),
    st.sampled_from([(SEVEN, False), (EIGHT, False), (EIGHT, True), (Coding(7, 1, 2), False)]),
)
def test_any_frame_comes_back(pixel, seed, upsampling, coded):
    coding, long_escapes = coded
    events = events_at(sorted(pixel), seed)
    kept = Events(events.pixel, events.quarter_y, events.quarter_x >> (2 - coding.column_bits))
    stream = encode_frame(kept, 12 * 14, coding, long_escapes=long_escapes)
    assert np.array_equal(decoded(stream, coding, upsampling, (12, 14)), render(events, (12, 14), upsampling))


def test_a_run_of_no_pixels_after_the_last_event_may_be_missing(decoder):
    events = random_events(0.05, 0)
    events = Events(np.append(events.pixel, PIXELS - 1), np.append(events.quarter_y, 1), np.append(events.quarter_x, 2))
    bits = np.unpackbits(np.frombuffer(encode_frame(events, PIXELS), np.uint8), bitorder="little")
    escapes = int(((np.diff(events.pixel, prepend=-1) - 1) // 127).sum())
    stream = np.packbits(bits[: 7 * escapes + 11 * len(events.pixel)], bitorder="little").tobytes()
    for upsampling in (1, 2):
        assert np.array_equal(decoded(stream, SEVEN, upsampling), render(events, SHAPE, upsampling))


def test_a_truncated_stream_is_an_error_and_never_a_frame_with_fewer_events(decoder):
    # imagecodecs returns fewer events without a word; of 3,600 cuts of this kind none passes here
    for rate, seed in ((0.5, 0), (0.05, 1), (0.005, 2), (0.9, 3)):
        events = random_events(rate, seed)
        stream, truth = encode_frame(events, PIXELS), render(events, SHAPE)
        for cut in range(1, min(len(stream), 250)):
            try:
                assert np.array_equal(decoded(stream[:-cut]), truth)
            except StreamError:
                continue


@settings(max_examples=200)
@given(st.binary(max_size=400), st.sampled_from([SEVEN, EIGHT]), st.sampled_from([1, 2]))
def test_any_bytes_are_a_frame_or_an_error(stream, coding, upsampling):
    with suppress(StreamError):
        assert decoded(stream, coding, upsampling, (12, 14)).max() <= 1


def test_a_saturated_fraction_keeps_its_counts(tmp_path):
    frames = [events_at(range(PIXELS))] * 300
    movie = open_movie(movie_file(tmp_path / "m.eer", frames), Fractions(frames=300))
    assert movie.dtype == np.uint16
    assert (movie[0] == 300).all()
    assert open_movie(tmp_path / "m.eer", Fractions(frames=255)).dtype == np.uint8


# --- the file -----------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    frames = [random_events(0.05, seed) for seed in range(23)]
    return movie_file(tmp_path_factory.mktemp("eer") / "m.eer", frames), frames


@pytest.mark.parametrize("upsampling", [1, 2])
def test_fractions_are_sums_of_camera_frames(recorded, upsampling):
    path, frames = recorded
    movie = pickle.loads(pickle.dumps(open_movie(path, Fractions(dose_e_a2=0.51, upsampling=upsampling))))
    truth = np.stack([render(e, SHAPE, upsampling) for e in frames])
    assert movie.shape == (4, 60 * upsampling, 98 * upsampling)  # 5 camera frames of 0.1 e/A^2; the last 3 are left out
    assert (movie.frames_per_fraction, movie.dose_per_fraction) == (5, pytest.approx(0.5, rel=1e-4))
    assert movie.pixel_size_angstrom == pytest.approx(0.8 / upsampling)
    for i in range(4):
        assert np.array_equal(movie[i], truth[5 * i : 5 * i + 5].sum(0))
    assert np.array_equal(movie[-1], movie[3])


def test_the_project_files_exposure_comes_before_the_metadata(recorded):
    movie = open_movie(recorded[0], Fractions(camera_dose_e_a2=0.25))
    assert (movie.frames_per_fraction, movie.dose_per_fraction) == (4, 1.0)
    assert len(open_movie(recorded[0], Fractions(frames=1000))) == 1
    assert len(open_movie(recorded[0])) == 23


@pytest.mark.parametrize("upsampling", [1, 2])
def test_imagecodecs_reads_the_same_frames_of_the_strips_that_tifffile_finds(recorded, upsampling):
    path, frames = recorded
    with tifffile.TiffFile(path) as tiff:
        told = getattr(tiff, "eer_metadata", None)  # older ones do not read it
        assert not isinstance(told, dict) or told["sensorPixelSize.height"] == pytest.approx(8e-11)
        for page, events in zip(tiff.pages, frames, strict=True):
            strip = page.parent.filehandle.read_array("u1", page.databytecounts[0], page.dataoffsets[0]).tobytes()
            shape = (60 * upsampling, 98 * upsampling)
            theirs = imagecodecs.eer_decode(strip + bytes(4 + len(strip) % 2), shape, 7, 2, 2, superres=upsampling - 1)
            assert np.array_equal(theirs, render(events, SHAPE, upsampling))


def test_pages_without_events_are_left_out(tmp_path):
    frames = [random_events(0.05, seed) for seed in range(2)]
    path = movie_file(tmp_path / "m.eer", frames)
    image = np.full(SHAPE, 7, np.uint16)
    with tifffile.TiffWriter(path, append=True, bigtiff=True) as tiff:
        tiff.write(image, photometric="minisblack", metadata=None)
    assert len(open_movie(path)) == 2


def test_variable_coding_is_read_from_its_tags(tmp_path):
    events = random_events(0.05, 0)
    stored = Events(events.pixel, events.quarter_y, events.quarter_x >> 1)
    coding = Coding(7, 1, 2)
    write_eer(tmp_path / "m.eer", [encode_frame(stored, PIXELS, coding)], SHAPE, compression=65002, coding=coding)
    assert np.array_equal(open_movie(tmp_path / "m.eer")[0], render(events, SHAPE))
    with pytest.raises(MovieError, match=r"exposure of .* is not known"):
        open_movie(tmp_path / "m.eer", Fractions())


def test_damaged_files_are_refused_by_name(tmp_path):
    path = movie_file(tmp_path / "m.eer", [random_events(0.05, seed) for seed in range(6)])
    whole = path.read_bytes()
    for share in (0.0, 0.001, 0.3, 0.9, 0.9999):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(MovieError, match=r"truncated|empty|not a TIFF"):
            open_movie(path)
    strip = encode_frame(random_events(0.05, 0), PIXELS)
    path.write_bytes(whole.replace(strip, strip[:100] + bytes(len(strip) - 100)))
    with pytest.raises(MovieError, match="camera frame 1 of 6 cannot be decoded"):
        open_movie(path)[0]
    path.write_bytes(whole.replace(b">6<", b">9<"))
    with pytest.raises(MovieError, match="has 6 frames, its metadata announce 9"):
        open_movie(path)
    write_eer(path, [strip], (16384, 32768))
    with pytest.raises(MovieError, match="no camera has"):
        open_movie(path)
    write_eer(path, [bytes(20_000)], SHAPE)
    with pytest.raises(MovieError, match="more than its pixels can have"):
        open_movie(path)
    write_eer(path, [encode_frame(random_events(0.05, 0), 61 * 97)], (61, 97), metadata=b"<metadata>")
    with pytest.raises(MovieError, match="cannot be read at 2 times"):
        open_movie(path, Fractions(upsampling=2, camera_dose_e_a2=1.0))
    tifffile.imwrite(path, np.zeros(SHAPE, np.uint8))
    with pytest.raises(MovieError, match="no frames of events"):
        open_movie(path)


@pytest.mark.parametrize("bits", [(0, 2, 2), (-1, 2, 2), (17, 2, 2), (31, 2, 2), (7, 9, 2), (7, 2, 255), (0, 0, 0), (7, -1, 2)])
def test_codes_that_no_camera_writes_are_refused_by_the_file_and_by_the_decoder(tmp_path, bits, decoder):
    """With codes of no bits the decoder would never come to an end."""
    with pytest.raises(StreamError, match="codes of"):
        decoded(bytes(64), Coding(*bits))
    if min(bits) >= 0:
        path = movie_file(tmp_path / "m.eer", [random_events(0.01, 0)], compression=65002, coding=Coding(*bits))
        with pytest.raises(MovieError, match=f"codes of {bits[0]}, {bits[1]} and {bits[2]} bits"):
            open_movie(path)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=600), st.integers(1, 16), st.integers(0, 8), st.integers(0, 8))
def test_every_coding_comes_to_an_end(stream, run_bits, column_bits, row_bits):
    """A code has a bit at least, so a stream of n bits has at most n codes; what follows it is no part of it."""
    out = np.zeros((12, 14), np.uint8)
    with suppress(StreamError):
        add_frame(out, stream, Coding(run_bits, column_bits, row_bits))
        assert out.sum() * (run_bits + column_bits + row_bits) <= 8 * len(stream)


@pytest.mark.parametrize(
    ("width", "height", "pixel"),
    [("8e-11", "8e-11", 0.8), (None, "8e-11", 0.8), ("8e-11", None, 0.8), ("8.05e-11", "8e-11", 0.8), ("8e-11", "1.6e-10", None),
     ("0", "8e-11", 0.8), ("1", "8e-11", 0.8), (None, None, 0.0)],
)  # fmt: skip
def test_the_pixels_of_the_metadata_are_square(tmp_path, width, height, pixel):
    items = {f"sensorPixelSize.{edge}": (text, "m") for edge, text in (("width", width), ("height", height)) if text}
    path = tmp_path / "m.eer"
    write_eer(path, [encode_frame(random_events(0.01, 0), PIXELS)], SHAPE, metadata=metadata_xml({"numberOfFrames": ("1", ""), **items}))
    if pixel is None:
        with pytest.raises(MovieError, match=r"0\.8 x 1\.6 A by its metadata"):
            open_movie(path)
    else:
        assert (open_movie(path).pixel_size_angstrom or 0.0) == pytest.approx(pixel)


@pytest.mark.parametrize("seed", range(4))
def test_damage_anywhere_is_an_error_or_changes_no_more_than_events(tmp_path, seed):
    rng = np.random.default_rng(seed)
    whole = movie_file(tmp_path / "o.eer", [random_events(0.01, s) for s in range(5)]).read_bytes()
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.choice([0, 255, data[at] ^ 1 << int(rng.integers(8))])
        (tmp_path / "m.eer").write_bytes(data)
        with suppress(MovieError):
            movie = open_movie(tmp_path / "m.eer", Fractions(frames=2, camera_dose_e_a2=1.0))
            assert all(movie[i].max() <= 2 for i in range(len(movie)))


def test_ingest_gives_fractions_and_their_exposure(recorded):
    stage = load_stages()["ingest"]
    given = stage.process(stage.params(eer_fraction_frames=4, eer_upsampling=2), movie_path=str(recorded[0]))
    assert given["movie"].shape == (5, 120, 196)
    assert (given["frames_per_fraction"], given["dose_per_fraction"]) == (4, pytest.approx(0.4, rel=1e-4))
    empty = movie_file(recorded[0].with_name("empty.eer"), [events_at([])] * 10)
    with pytest.raises(MovieError, match="has no counts"):
        stage.process(stage.params(), movie_path=str(empty))
    given = stage.process(stage.params(), movie_path=str(recorded[0]), eer_dose_per_frame=0.5)
    assert (given["frames_per_fraction"], given["dose_per_fraction"]) == (2, 1.0)


def test_simulated_counts_are_spread_over_camera_frames():
    counts = np.random.default_rng(0).poisson(3.0, SHAPE).astype(np.uint8)
    counts[0, 0] = 200
    frames = [render(events, SHAPE) for events in spread_events(np.random.default_rng(1), counts, 40)]
    assert len(frames) == 40
    assert np.array_equal(np.sum(frames, 0), np.minimum(counts, 40))
    rates = [frame.mean() for frame in frames]
    assert np.ptp(rates) < 0.03  # 0.075 events a pixel


# --- gains --------------------------------------------------------------------------------------------------------------------
def test_gains_of_eer_movies_are_not_flipped_and_mrc_gains_divide(tmp_path):
    gain = np.random.default_rng(0).uniform(0.8, 1.2, (12, 10)).astype(np.float32)
    write_mrc(tmp_path / "g.mrc", gain, 1.0)
    tifffile.imwrite(tmp_path / "g.gain", gain)
    assert np.array_equal(read_gain(tmp_path / "g.gain", eer=True), gain)
    assert np.allclose(read_gain(tmp_path / "g.mrc", eer=True), 1.0 / gain, rtol=1e-6)
    assert np.array_equal(read_gain(tmp_path / "g.mrc", divides=False, eer=True), gain)
    assert np.allclose(read_gain(tmp_path / "g.gain", divides=True, eer=True), 1.0 / gain, rtol=1e-6)
    gain[3, 4] = np.nan
    write_mrc(tmp_path / "g.mrc", gain, 1.0)
    tifffile.imwrite(tmp_path / "g.gain", gain)
    for name in ("g.mrc", "g.gain"):
        with pytest.raises(GainError, match="not valid for a gain"):
            read_gain(tmp_path / name, eer=True)


@pytest.fixture(scope="module")
def counted():
    """A movie `(frame, y, x)` of a still scene, and a gain of half its rows and columns."""
    rng = np.random.default_rng(0)
    scene = np.kron(rng.uniform(2.0, 6.0, (20, 24)), np.ones((8, 8)))
    return rng.poisson(scene, (4, 160, 192)).astype(np.uint8), rng.uniform(0.8, 1.2, (80, 96)).astype(np.float32)


def corrected(movie, gain, **dose):
    stage = load_stages()["motion"]
    given = {"pixel_size_angstrom": 1.0, "pre_exposure": 0.0, "voltage_kv": 300.0}
    return stage.process(stage.params(patches=(1, 1)), movie=movie, gain=gain, **given, **dose)["micrograph_dw"]


def test_a_gain_of_physical_pixels_is_that_of_four_super_resolution_pixels(counted):
    movie, gain = counted
    fine = corrected(movie, gain.repeat(2, 0).repeat(2, 1), dose_per_frame=1.0)
    assert np.array_equal(corrected(movie, gain, dose_per_frame=1.0), fine)
    with pytest.raises(GainError, match="80 x 90"):
        corrected(movie, gain[:, :90], dose_per_frame=1.0)


def test_the_exposure_of_a_fraction_weights_it_where_there_is_one(counted):
    movie, gain = counted
    plain = corrected(movie, gain, dose_per_frame=2.5)
    assert np.array_equal(corrected(movie, gain, dose_per_frame=0.1, dose_per_fraction=2.5), plain)
    assert np.array_equal(corrected(movie, gain, dose_per_frame=2.5, dose_per_fraction=float("nan")), plain)


@pytest.mark.relion
@pytest.mark.slow
def test_relion_decodes_the_same_with_rows_flipped_in_its_tiff(tmp_path):
    rng, shape = np.random.default_rng(0), (4096, 4096)
    scene = np.kron(rng.uniform(0.01, 0.04, (32, 32)), np.ones((128, 128)))  # neither its flip nor its transpose looks like it
    frames = [events_at(np.flatnonzero(rng.random(scene.size, np.float32) < scene.ravel()), seed) for seed in range(4)]
    movie_file(tmp_path / "m.eer", frames, shape)
    for upsampling in (1, 2):
        command = ["relion_convert_to_tiff", "--i", "m.eer", "--o", f"o{upsampling}", "--eer_grouping", "2", "--compression", "none"]
        (tmp_path / f"o{upsampling}").mkdir()
        subprocess.run([*command, "--eer_upsampling", str(upsampling)], cwd=tmp_path, check=True, capture_output=True)
        theirs = tifffile.imread(tmp_path / f"o{upsampling}" / "m.tif")[:, ::-1]
        movie = open_movie(tmp_path / "m.eer", Fractions(frames=2, upsampling=upsampling))
        assert len(theirs) == len(movie) == 2
        assert all(np.array_equal(movie[i], theirs[i]) for i in range(2))
