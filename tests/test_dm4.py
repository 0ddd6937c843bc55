"""DM4 files: what is read of files written here and by DigitalMicrograph's other readers' tests, and damaged ones."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from cryodask.errors import CryodaskError, GainError, MovieError
from cryodask.formats.dm4 import open_dm4
from cryodask.formats.movies import open_movie, read_gain
from cryodask.formats.mrc import write_mrc
from cryodask.formats.tiff import write_tiff

KINDS = {"i2": (1, 2), "f4": (2, 6), "u1": (6, 10), "i4": (7, 3), "i1": (9, 9), "u2": (10, 4), "u4": (11, 5), "f8": (12, 7)}
"""``DataType`` of images, and type of their values."""


def value(kind: int, data: bytes, *info: int) -> bytes:
    return b"%%%%" + struct.pack(f">Q{1 + len(info)}Q", 1 + len(info), kind, *info) + data


def number(n: int, mark: str) -> bytes:
    return value(5, struct.pack(mark + "I", n))


def real(x: float, mark: str) -> bytes:
    return value(6, struct.pack(mark + "f", x))


def text(words: str, mark: str) -> bytes:
    return value(20, words.encode("utf-16-le" if mark == "<" else "utf-16-be"), 4, len(words))


def group(*tags: tuple[str, bytes | tuple]) -> bytes:
    """A group of (name, value) or (name, (tags of a group...))."""
    out = struct.pack(">BBQ", 1, 0, len(tags))
    for name, inside in tags:
        is_group = isinstance(inside, tuple)
        data = group(*inside) if is_group else inside
        out += struct.pack(">BH", 20 if is_group else 21, len(name)) + name.encode("latin-1") + struct.pack(">Q", len(data)) + data
    return out


def image(array: np.ndarray, mark: str, pixel_nm: float = 0.05, data_type: int | None = None) -> tuple:
    kind, of_values = KINDS[array.dtype.str[1:]]
    data = array.astype(array.dtype.newbyteorder(mark)).tobytes()
    dimension = ("", (("Origin", real(0.0, mark)), ("Scale", real(pixel_nm, mark)), ("Units", text("nm", mark))))
    inside = (
        ("Calibrations", (("Brightness", (("Scale", real(1.0, mark)),)), ("Dimension", (dimension,) * array.ndim))),
        ("Data", value(20, data, of_values, array.size)),
        ("DataType", number(kind if data_type is None else data_type, mark)),
        ("Dimensions", tuple(("", number(n, mark)) for n in reversed(array.shape))),
        ("PixelDepth", number(array.itemsize, mark)),
    )
    return ("", (("ImageData", inside), ("Name", text("image", mark))))


def write(path: Path, *images: tuple, mark: str = "<") -> Path:
    named = ("Point", value(15, struct.pack(mark + "II", 1, 2), 0, 2, 0, 5, 0, 5))  # a structure, which nobody needs
    root = group(("ApplicationBounds", (named,)), ("ImageList", images), ("InImageMode", number(1, mark)))
    path.write_bytes(struct.pack(">IQI", 4, len(root), mark == "<") + root + bytes(8))
    return path


THUMBNAIL = image(np.zeros((4, 4), np.int32), "<", data_type=23)


@pytest.mark.parametrize("mark", ["<", ">"])
@pytest.mark.parametrize("kind", KINDS)
def test_images_and_stacks_of_all_types_are_read_as_they_were_written(tmp_path, kind, mark):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 100, (3, 5, 7)).astype(kind)
    found = open_dm4(write(tmp_path / "a.dm4", THUMBNAIL, image(array, mark), mark=mark))
    assert found.shape == (3, 5, 7)
    assert found.dtype == np.dtype(kind)
    assert found.pixel_size_angstrom == pytest.approx(0.5)
    for i in range(3):
        assert np.array_equal(found[i], array[i, ::-1])  # the first row is the upper one of the picture
    single = open_dm4(write(tmp_path / "b.dm4", image(array[0], mark), mark=mark))
    assert single.shape == (1, 5, 7)


@pytest.mark.parametrize("name", ["dm4_float32_nonsquare.dm4", "dm4_3d_int16_64_65_66.dm4.gz"])
def test_files_of_another_projects_tests(shared, tmp_path, name):
    """Ramps along x; ncempy 1.16 reads sums of 520,192 and 8,648,640."""
    data = (shared / "data" / "movies" / name).read_bytes()
    path = tmp_path / "a.dm4"
    path.write_bytes(gzip.decompress(data) if name.endswith(".gz") else data)
    found = open_dm4(path)
    shape, total = ((1, 64, 128), 520_192) if "float32" in name else ((66, 65, 64), 8_648_640)
    assert found.shape == shape
    assert sum(found[i].astype(float).sum() for i in range(len(found))) == total
    assert found[len(found) - 1][3].tolist() == list(range(shape[2]))


def test_a_gain_and_a_movie_are_what_they_are_in_other_formats(tmp_path):
    rng = np.random.default_rng(1)
    gain, frames = rng.uniform(0.9, 1.1, (24, 32)).astype(np.float32), rng.poisson(2.0, (5, 24, 32)).astype(np.uint8)
    write_tiff(tmp_path / "gain.tif", gain[None], 1.0)
    write_mrc(tmp_path / "gain.mrc", gain, 1.0)
    write(tmp_path / "gain.dm4", THUMBNAIL, image(gain[::-1], "<"))
    assert np.array_equal(read_gain(tmp_path / "gain.dm4"), read_gain(tmp_path / "gain.tif"))
    assert np.array_equal(read_gain(tmp_path / "gain.dm4", 90, "up-down"), read_gain(tmp_path / "gain.mrc", 90, "up-down"))
    movie = open_movie(write(tmp_path / "m.dm4", image(frames[:, ::-1], "<", pixel_nm=0.0834)))
    assert movie.shape == (5, 24, 32)
    assert movie.pixel_size_angstrom == pytest.approx(0.834)
    assert all(np.array_equal(movie[i], frames[i]) for i in range(5))


def test_what_cannot_be_read_is_named(tmp_path):
    array = np.ones((4, 4), np.float32)
    two = write(tmp_path / "two.dm4", image(array, "<"), image(array, "<"))
    with pytest.raises(GainError, match="2 images"):
        read_gain(two)
    with pytest.raises(MovieError, match="no image of real numbers"):
        open_movie(write(tmp_path / "none.dm4", THUMBNAIL))
    (tmp_path / "bad.dm4").write_bytes(struct.pack(">IQI", 3, 100, 1) + bytes(200))
    with pytest.raises(MovieError, match=r"not a valid DM4 file .version 3"):
        open_movie(tmp_path / "bad.dm4")


def test_damaged_files_are_refused_or_read_as_before(tmp_path):
    """A byte changed, or the end cut off: an error that names the file, or an image of the same kind of content; never anything else."""
    rng = np.random.default_rng(2)
    whole = write(tmp_path / "a.dm4", THUMBNAIL, image(rng.uniform(0, 1, (6, 8)).astype(np.float32), "<")).read_bytes()
    header, said = len(whole), []
    for n in range(600):
        data = bytearray(whole)
        if n % 4 == 0:
            data = data[: int(rng.integers(1, header))]
        else:
            for at in rng.integers(0, header, int(rng.integers(1, 4))):
                data[at] = int(rng.integers(0, 256))
        path = tmp_path / "b.dm4"
        path.write_bytes(bytes(data))
        try:
            found = open_dm4(path)
            assert found[0].shape == found.shape[1:]
        except CryodaskError as error:
            said.append(str(error))
    assert len(said) > 150
    assert all("b.dm4" in one for one in said)
