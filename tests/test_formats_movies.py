"""Movie and gain files: what is written comes back in the MRC frame, what is broken says so."""

from __future__ import annotations

import gzip
import pickle
import subprocess
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cryodask.errors import GainError, InputError, MovieError
from cryodask.formats.gain import FLIPS, orient_gain
from cryodask.formats.movies import (
    open_movie,
    read_gain,
    write_mrc_movie,
    write_tiff_movie,
)
from cryodask.formats.mrc import open_mrc, read_mrc, write_mrc
from cryodask.stage import Frames


def counts(shape: tuple[int, ...] = (5, 40, 53), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).poisson(1.2, shape).astype(np.uint8)


def read_all(path: Path) -> list[np.ndarray]:
    movie = open_movie(path)
    return [movie[i] for i in range(len(movie))]


def test_tiff_page_rows_are_flipped_into_the_mrc_frame(tmp_path: Path) -> None:
    frames = counts()
    write_tiff_movie(tmp_path / "m.tif", frames, 0.885)
    assert np.array_equal(tifffile.imread(tmp_path / "m.tif"), frames[:, ::-1])
    movie = open_movie(tmp_path / "m.tif")
    assert movie.shape == frames.shape
    assert movie.dtype == np.uint8
    assert len(movie) == 5
    assert all(np.array_equal(movie[i], frames[i]) for i in range(5))
    assert np.array_equal(movie[-1], frames[-1])
    assert movie.pixel_size_angstrom == pytest.approx(0.885, rel=1e-7)


@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "f4"])
def test_tiff_types_come_back(tmp_path: Path, kind: str) -> None:
    frames = counts().astype(kind)
    write_tiff_movie(tmp_path / "m.tiff", frames)
    movie = open_movie(tmp_path / "m.tiff")
    assert movie.dtype == np.dtype(kind)
    assert np.array_equal(movie[3], frames[3])
    assert movie.pixel_size_angstrom is None


@settings(max_examples=20, deadline=None)
@given(
    data=hnp.arrays(
        st.sampled_from([np.int8, np.int16, np.uint16, np.float16, np.float32]),
        st.tuples(*[st.integers(1, 6)] * 3),
        elements=st.integers(0, 100),
    )
)
def test_mrc_round_trip_is_exact_and_valid(tmp_path_factory: pytest.TempPathFactory, data: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("mrc") / "m.mrc"
    write_mrc(path, data, 1.25, stack=True)
    back, pixel = read_mrc(path)
    assert np.array_equal(back.reshape(data.shape), data)
    assert back.dtype == data.dtype
    assert pixel == pytest.approx(1.25)
    with mrcfile.open(path) as other:
        assert np.array_equal(np.asarray(other.data).reshape(data.shape), data)


def test_maps_are_volumes_and_stacks_are_stacks_for_other_programs(tmp_path: Path) -> None:
    data = np.random.default_rng(1).normal(size=(4, 6, 8)).astype(np.float32)
    for stack in (False, True):
        write_mrc(tmp_path / "m.mrc", data, 2.0, stack=stack)
        assert mrcfile.validate(tmp_path / "m.mrc")
        with mrcfile.open(tmp_path / "m.mrc") as other:
            assert other.is_volume() != stack
            assert other.is_image_stack() == stack
            assert float(other.voxel_size.x) == 2.0


def test_four_bit_movie_of_odd_width_is_unpacked_low_bits_first(tmp_path: Path) -> None:
    frames = counts((3, 5, 7)).clip(0, 15)
    write_mrc(tmp_path / "m.mrc", frames.astype(np.int8), 1.0, stack=True)
    header = bytearray((tmp_path / "m.mrc").read_bytes()[:1024])
    header[12:16] = (101).to_bytes(4, "little")
    even = np.pad(frames, ((0, 0), (0, 0), (0, 1)))
    (tmp_path / "m.mrc").write_bytes(bytes(header) + (even[:, :, 0::2] | even[:, :, 1::2] << 4).tobytes())
    movie = open_movie(tmp_path / "m.mrc")
    assert movie.dtype == np.uint8
    assert all(np.array_equal(movie[i], frames[i]) for i in range(3))


def test_real_camera_movies_are_read(shared: Path, tmp_path: Path) -> None:
    # Direct Electron movies, mode 6; their voxel size of -10 is no pixel size
    movie = open_movie(shared / "data/movies/de_movie_32x4x8_u2.mrc")
    assert movie.shape == (32, 4, 8)
    assert movie.pixel_size_angstrom is None
    (tmp_path / "m.mrc").write_bytes(gzip.decompress((shared / "data/movies/de_movie_348x16x16_u2.mrc.gz").read_bytes()))
    movie = open_movie(tmp_path / "m.mrc")
    values = np.stack([movie[i] for i in range(len(movie))])
    assert movie.shape == (348, 16, 16)
    assert (values.min(), values.max()) == (681, 1596)
    (tmp_path / "f.mrc").write_bytes(gzip.decompress((shared / "data/movies/fei2_header_HAADFscan.mrc.gz").read_bytes()))
    image, _ = read_mrc(tmp_path / "f.mrc")  # behind an extended header of 909,312 bytes
    assert (image.min(), image.max()) == (3923, 9399)


@pytest.mark.parametrize("name", ["m.tif", "m.mrc"])
def test_open_movie_survives_pickling_and_meets_the_protocol(tmp_path: Path, name: str) -> None:
    frames = counts()
    (write_tiff_movie if name.endswith("tif") else write_mrc_movie)(tmp_path / name, frames, 1.0)
    movie = pickle.loads(pickle.dumps(open_movie(tmp_path / name)))
    assert isinstance(movie, Frames)
    assert np.array_equal(movie[2], frames[2])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", ["m.tif", "m.mrc"])
def test_a_movie_cut_short_anywhere_is_an_error_and_never_a_shorter_movie(tmp_path: Path, name: str, share: float) -> None:
    (write_tiff_movie if name.endswith("tif") else write_mrc_movie)(tmp_path / name, counts((6, 64, 64)), 1.0)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(MovieError, match=r"truncated|empty|less than|not a TIFF|cannot be read|decoded"):
        read_all(tmp_path / name)


def test_what_is_no_movie_says_why(tmp_path: Path) -> None:
    with pytest.raises(MovieError, match="does not exist"):
        open_movie(tmp_path / "absent.tif")
    tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((20, 20, 3), np.uint8), photometric="rgb")
    with pytest.raises(MovieError, match="colour"):
        open_movie(tmp_path / "rgb.tif")
    (tmp_path / "text.tif").write_text("no picture at all, but a text of some length")
    with pytest.raises(MovieError, match="not a TIFF"):
        open_movie(tmp_path / "text.tif")
    (tmp_path / "noise.mrc").write_bytes(np.random.default_rng(0).bytes(4000))
    with pytest.raises(MovieError, match=r"is invalid|mode"):
        open_movie(tmp_path / "noise.mrc")
    (tmp_path / "movie.dm3").write_bytes(b"\0\0\0\4")
    with pytest.raises(MovieError, match="not in a supported movie format"):
        open_movie(tmp_path / "movie.dm3")
    with pytest.raises(InputError, match="does not exist"):
        open_mrc(tmp_path / "absent.mrc")


def test_gain_of_a_tiff_is_flipped_and_of_mrc_is_not(tmp_path: Path) -> None:
    gain = np.random.default_rng(0).uniform(0.8, 1.2, (12, 10)).astype(np.float32)
    write_mrc(tmp_path / "g.mrc", gain, 1.0)
    tifffile.imwrite(tmp_path / "g.gain", gain[::-1])
    assert np.array_equal(read_gain(tmp_path / "g.mrc"), gain)
    assert np.array_equal(read_gain(tmp_path / "g.gain"), gain)
    write_mrc(tmp_path / "bad.mrc", gain - 1.0, 1.0)
    with pytest.raises(GainError, match="not valid for a gain"):
        read_gain(tmp_path / "bad.mrc")


@pytest.mark.relion
def test_gain_turns_are_those_of_relion(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scene = np.kron(rng.uniform(15.0, 60.0, (40, 32)), np.ones((8, 8)))
    frames = rng.poisson(scene, (4, *scene.shape)).astype(np.uint8)
    write_tiff_movie(tmp_path / "m.tif", frames, 1.0)
    (tmp_path / "m.star").write_text(
        "\ndata_optics\n\nloop_\n_rlnOpticsGroupName\n_rlnOpticsGroup\n_rlnMicrographOriginalPixelSize\n_rlnVoltage\n"
        "_rlnSphericalAberration\n_rlnAmplitudeContrast\ng 1 1.0 300 2.7 0.1\n\ndata_movies\n\nloop_\n_rlnMicrographMovieName\n"
        "_rlnOpticsGroup\nm.tif 1\n\n"
    )
    for rotate, flip in ((1, 0), (3, 0), (0, 1), (1, 2)):
        gain = rng.uniform(0.8, 1.2, scene.shape[::-1] if rotate % 2 else scene.shape).astype(np.float32)
        write_mrc(tmp_path / "g.mrc", gain, 1.0)
        options = f"--gain_rot {rotate} --gain_flip {flip} --patch_x 1 --patch_y 1 --dose_per_frame 1 --bfactor 150 --j 1"
        command = ["relion_run_motioncorr", "--i", "m.star", "--o", "o/", "--use_own", "--gainref", "g.mrc", *options.split()]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        ratio = read_mrc(tmp_path / "o" / "m.mrc")[0] / frames.sum(0)
        turned = orient_gain(gain, 90 * rotate, FLIPS[flip])
        assert np.corrcoef(ratio.ravel(), turned.ravel())[0, 1] > 0.9  # 0.997 seen; other turns below 0.1
