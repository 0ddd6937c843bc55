"""MRC files of other programs: what the header says is applied, or the file is refused by name; a table of variants."""

from __future__ import annotations

import itertools
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cryodask.errors import CryodaskError, InputError, MovieError
from cryodask.formats.movies import open_movie
from cryodask.formats.mrc import open_mrc, read_map, read_mrc

IMOD_STAMP = 1146047817


def mrc(data: np.ndarray, order: str = "<", **words: Any) -> bytes:
    """An MRC file of `(sections, rows, columns)`; ``words``: header words that differ, by name."""
    modes = {"i1": 0, "u1": 0, "i2": 1, "f4": 2, "c4": 3, "c8": 4, "u2": 6, "f2": 12}
    sections, rows, columns = data.shape
    size, cell, axes = words.get("size", (columns, rows, sections)), words.get("cell"), words.get("axes", (1, 2, 3))
    grid = words.get("grid", (columns, rows, sections))
    header = bytearray(1024)
    struct.pack_into(order + "4i", header, 0, *size, words.get("mode", modes[data.dtype.str[1:]]))
    struct.pack_into(order + "3i", header, 28, *grid)
    struct.pack_into(order + "6f", header, 40, *(grid if cell is None else cell), *words.get("angles", (90.0, 90.0, 90.0)))
    struct.pack_into(order + "3i", header, 64, *axes)
    struct.pack_into(order + "3f", header, 76, *words.get("statistics", (0.0, 0.0, 0.0)))
    struct.pack_into(order + "2i", header, 88, words.get("space_group", 0), words.get("extended", 0))
    if "flags" in words:
        struct.pack_into(order + "2i", header, 152, IMOD_STAMP, words["flags"])
    header[208:216] = b"MAP " + words.get("stamp", b"DD\0\0" if order == "<" else b"\x11\x11\0\0")
    if "label" in words:
        struct.pack_into(order + "i", header, 220, 1)
        header[224 : 224 + len(words["label"])] = words["label"]
    body = data.astype(data.dtype.newbyteorder(order)).tobytes()
    return bytes(header) + words.get("between", b"") + body + words.get("after", b"")


def written(folder: Path, raw: bytes) -> Path:
    (folder / "m.mrc").write_bytes(raw)
    return folder / "m.mrc"


def frames_of(path: Path) -> np.ndarray:
    movie = open_movie(path)
    return np.stack([movie[i] for i in range(len(movie))])


@pytest.mark.parametrize("axes", list(itertools.permutations((1, 2, 3))))
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("shape", [(4, 5, 6), (7, 7, 7), (5, 4, 4)])
def test_all_axis_orders_give_z_y_x(tmp_path: Path, axes: tuple[int, int, int], order: str, shape: tuple[int, int, int]) -> None:
    truth = np.random.default_rng(0).integers(0, 3000, shape).astype("i2")  # (z, y, x)
    mapc, mapr, maps = axes
    stored = np.ascontiguousarray(truth.transpose(3 - maps, 3 - mapr, 3 - mapc))
    path = written(tmp_path, mrc(stored, order, axes=axes, grid=shape[::-1], cell=[2.0 * n for n in shape[::-1]], space_group=1))
    assert np.array_equal(read_mrc(path)[0], truth)
    assert np.array_equal(frames_of(path), truth)  # read frame by frame
    volume, voxel = read_map(path)
    assert np.array_equal(volume, truth)
    assert voxel == 2.0


@pytest.mark.parametrize("axes", [(0, 2, 3), (-1, 2, 3), (1, -2, 3), (1, 1, 3), (2, 2, 2), (1, 2, 4), (3, 2, 2), (1, 2, 2**31 - 1)])
def test_invalid_axes_are_refused(tmp_path: Path, axes: tuple[int, int, int]) -> None:
    path = written(tmp_path, mrc(np.ones((4, 4, 4), "f4"), axes=axes))
    for read, error in ((open_movie, MovieError), (read_mrc, InputError), (read_map, InputError)):
        with pytest.raises(error, match="invalid axes"):
            read(path)


@pytest.mark.parametrize("kind", ["i1", "i2", "f4", "u2", "f2"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("extended", [0, 1024, 7])
def test_modes_byte_orders_and_extended_headers(tmp_path: Path, kind: str, order: str, extended: int) -> None:
    truth = np.random.default_rng(0).integers(0, 120, (3, 5, 7)).astype(kind)
    path = written(tmp_path, mrc(truth, order, extended=extended, between=b"x" * extended))
    found = frames_of(path)
    assert found.dtype == np.dtype(kind)
    assert np.array_equal(found, truth)


@pytest.mark.parametrize("shape", [(256, 256, 256), (1, 256, 512)])
def test_sizes_that_are_plausible_in_both_byte_orders_are_decided_by_the_length(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    truth = np.zeros(shape, "i1")
    truth[0, 3, 5] = 7
    for stamp in (b"DD\0\0", b"\x11\x11\0\0", bytes(4)):
        movie = open_movie(written(tmp_path, mrc(truth, ">", stamp=stamp)))
        assert movie.shape == shape
        assert movie[0][3, 5] == 7


SIX = np.arange(4 * 6 * 8, dtype="i2").reshape(4, 6, 8)
LENGTHS: list[tuple[str, dict[str, Any], str]] = [
    ("one section in the header", {"size": (8, 6, 1)}, "longer than its header.*3 more sections follow the 1"),
    ("a section too few", {"size": (8, 6, 3)}, "longer than its header.*1 more sections"),
    ("a section too many", {"size": (8, 6, 5)}, r"truncated.*4 of 5 sections"),
    ("rows too few", {"size": (8, 5, 4)}, "longer than its header"),
    ("columns too few", {"size": (7, 6, 4)}, "longer than its header"),
    ("columns too many", {"size": (9, 6, 4)}, "truncated"),
    ("a mode of fewer bytes", {"mode": 0}, "longer than its header.*4 more sections"),
    ("a mode of more bytes", {"mode": 2}, r"truncated.*2 of 4 sections"),
    ("4 bit", {"mode": 101}, "longer than its header"),
    ("bytes behind", {"after": b"abc"}, "longer than its header"),
    ("a section of zeros behind", {"after": bytes(96)}, "longer than its header.*1 more sections"),
    ("more zeros than a section", {"after": bytes(100)}, "longer than its header"),
    ("an extended header that is absent", {"extended": 1024}, "extended header of 1024|truncated"),
    ("an extended header that is not announced", {"between": b"x" * 1024}, "longer than its header"),
    ("a negative extended header", {"extended": -80}, "extended header of -80"),
    ("an extended header beyond the end", {"extended": 2**31 - 1}, "extended header of 2147483647"),
    ("no columns", {"size": (0, 6, 4)}, "header is invalid"),
    ("negative rows", {"size": (8, -6, 4)}, "header is invalid"),
    ("absurd size", {"size": (9_999_999, 9_999_999, 9_999_999)}, "truncated"),
    ("more than absurd", {"size": (2**31 - 1, 6, 4)}, "header is invalid"),
    ("mode 3", {"mode": 3}, "complex 16-bit"),
    ("mode 4", {"mode": 4}, "complex 32-bit"),
    ("mode 7", {"mode": 7}, "32-bit integers"),
    ("mode 16", {"mode": 16}, "RGB"),
    ("mode 5", {"mode": 5}, r"mode 5 \(unknown\)"),
    ("negative mode", {"mode": -1}, "header is invalid"),
]


@pytest.mark.parametrize(("words", "said"), [(words, said) for _, words, said in LENGTHS], ids=[name for name, _, _ in LENGTHS])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_file_that_is_not_what_its_header_says_is_refused(tmp_path: Path, order: str, words: dict[str, Any], said: str) -> None:
    path = written(tmp_path, mrc(SIX, order, **words))
    with pytest.raises(MovieError, match=said):
        open_movie(path)
    with pytest.raises(InputError, match=said):
        read_map(path)


@pytest.mark.parametrize("count", [1, 4, 95])
def test_padding_with_zeros_is_ignored_with_a_warning(tmp_path: Path, count: int) -> None:
    path = written(tmp_path, mrc(SIX, after=bytes(count)))
    with pytest.warns(UserWarning, match=f"{count} zero bytes after its 4 sections"):
        assert np.array_equal(frames_of(path), SIX)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"\x1f\x8b\x08\0", "gzip"), (b"BZh91AY", "bzip2"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"),
        (b"\x89HDF\r\n", "HDF5"), (b"", "empty"), (b"abc", "truncated"),
    ],
)  # fmt: skip
def test_other_formats_are_named(tmp_path: Path, head: bytes, said: str) -> None:
    with pytest.raises(MovieError, match=said):
        open_movie(written(tmp_path, head + bytes(2000 if len(head) > 3 else 0)))


def test_folders_and_devices_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "folder.mrc").mkdir()
    for name, said in ((tmp_path / "folder.mrc", "is a folder"), ("/dev/null", "device"), (tmp_path / "m.mrc" / "n.mrc", "does not exist")):
        with pytest.raises(InputError, match=said):
            open_mrc(name)


# --- signs -------------------------------------------------------------------------------------------------------------------
def drawn(mean: float, kind: str, shape: tuple[int, int, int] = (3, 32, 32)) -> np.ndarray:
    return np.random.default_rng(1).normal(mean, 10.0, shape).round().astype("i8").astype(kind)


@pytest.mark.parametrize(
    ("data", "words", "as_movie", "as_image"),
    [
        (drawn(120, "u1"), {}, "refused", "refused"),
        (drawn(120, "u1"), {"flags": 0}, "u1", "u1"),
        (drawn(120, "u1"), {"flags": 4}, "u1", "u1"),
        (drawn(120, "u1"), {"statistics": (80.0, 160.0, 120.0)}, "u1", "u1"),
        (drawn(190, "u1"), {"statistics": (150.0, 230.0, 190.0)}, "u1", "u1"),
        (drawn(60, "i1"), {}, "i1", "i1"),
        (drawn(60, "i1"), {"flags": 1}, "i1", "i1"),
        (drawn(0, "i1"), {}, "refused", "i1"),
        (drawn(0, "i1"), {"flags": 1}, "i1", "i1"),
        (drawn(0, "i1"), {"statistics": (-40.0, 40.0, 0.0)}, "refused", "i1"),
        (drawn(-60, "i1"), {"flags": 1}, "i1", "i1"),
        (drawn(32768, "u2").view("i2"), {}, "refused", "refused"),
        (drawn(32768, "u2"), {}, "u2", "u2"),
        (drawn(0, "i2"), {}, "i2", "i2"),
        (drawn(5, "f4"), {}, "f4", "f4"),
    ],
)
def test_the_sign_of_the_counts_is_known_or_the_file_is_refused(
    tmp_path: Path, data: np.ndarray, words: dict[str, Any], as_movie: str, as_image: str
) -> None:
    path = written(tmp_path, mrc(data, **words))
    for read, wanted in ((frames_of, as_movie), (lambda p: read_mrc(p)[0], as_image)):
        if wanted == "refused":
            with pytest.raises(CryodaskError, match="negative values that look like unsigned ones"):
                read(path)
        else:
            found = read(path)
            assert found.dtype == np.dtype(wanted)
            assert np.array_equal(found, data)


@pytest.mark.parametrize("columns", [16, 15, 6])
@pytest.mark.parametrize(
    ("mode", "flags", "width"), [(101, None, "whole"), (0, 16, "whole"), (0, 16, "half"), (0, 20, "half"), (0, 17, "signed")]
)
def test_four_bit_pixels(tmp_path: Path, columns: int, mode: int, flags: int | None, width: str) -> None:
    truth = np.random.default_rng(0).integers(0, 16, (3, 5, columns)).astype("u1")
    even = np.pad(truth, ((0, 0), (0, 0), (0, columns % 2)))
    pairs = even[..., 0::2] | even[..., 1::2] << 4
    size = (columns, 5, 3) if width == "whole" else (pairs.shape[2], 5, 3)
    words: dict[str, Any] = {"mode": mode, "size": size, "grid": size, "cell": [2.0 * n for n in size]}
    path = written(tmp_path, mrc(pairs, **words, **({} if flags is None else {"flags": flags})))
    if width == "signed":
        with pytest.raises(MovieError, match="packed in signed bytes"):
            open_movie(path)
        return
    found = frames_of(path)
    assert np.array_equal(found, truth if width == "whole" else even)
    assert open_movie(path).pixel_size_angstrom == 2.0


def test_packed_super_resolution_frames_are_known_by_their_label(tmp_path: Path) -> None:
    pairs = np.zeros((1, 7420, 3838), "u1")
    pairs[0, 2, 3] = 0x5A
    path = written(tmp_path, mrc(pairs, label=b"SerialEMCCD: Dose frac. image, 4 bits packed  r/f 0", flags=0))
    movie = open_movie(path)
    assert movie.shape == (1, 7420, 7676)
    assert movie[0][2, 6:8].tolist() == [0xA, 0x5]
    assert open_movie(written(tmp_path, mrc(pairs, flags=0))).shape == (1, 7420, 3838)


# --- voxels ------------------------------------------------------------------------------------------------------------------
NAN = float("nan")


@pytest.mark.parametrize(
    ("words", "of_map", "of_movie"),
    [
        ({"cell": (24.0, 18.0, 12.0)}, 3.0, 3.0),
        ({"cell": (24.0, 18.0, 12.0), "space_group": 1}, 3.0, 3.0),
        ({"cell": (24.0012, 18.0, 12.0)}, 3.00015, 3.00015),
        ({"cell": (24.0, 18.0, 4.0)}, "not cubes", 3.0),
        ({"cell": (24.0, 18.0, 4.0), "grid": (8, 6, 1)}, 3.0, 3.0),
        ({"cell": (24.0, 18.0, 999.0), "grid": (8, 6, 1)}, 3.0, 3.0),
        ({"cell": (24.0, 19.0, 12.0)}, "not square", "not square"),
        ({"cell": (24.0, 18.6, 12.0)}, "not square", "not square"),
        ({"cell": (0.0, 0.0, 0.0)}, None, None),
        ({"grid": (0, 0, 0)}, None, None),
        ({"cell": (-80.0, -60.0, 0.0)}, "voxel size of -10", None),
        ({"cell": (NAN, NAN, NAN)}, "voxel size of nan", None),
        ({"cell": (NAN, 18.0, 12.0)}, "voxel size of nan", None),
        ({"cell": (24.0, 18.0, NAN)}, "voxel size of nan", 3.0),
        ({"cell": (1e30, 1e30, 1e30)}, "voxel size of 1.*e\\+29", None),
        ({"cell": (8e-4, 6e-4, 4e-4)}, "voxel size of 0.0001", None),
        ({"cell": (24.0, 18.0, 12.0), "angles": (90.0, 90.0, 120.0)}, "angles", 3.0),
        ({"cell": (24.0, 18.0, 12.0), "angles": (0.0, 0.0, 0.0)}, 3.0, 3.0),
        ({"cell": (48.0, 36.0, 24.0), "grid": (16, 12, 8)}, 3.0, 3.0),
    ],
)
def test_voxel_sizes(tmp_path: Path, words: dict[str, Any], of_map: float | str | None, of_movie: float | str | None) -> None:
    path = written(tmp_path, mrc(SIX.astype("f4"), **words))
    for read, wanted in ((lambda: read_map(path)[1], of_map), (lambda: open_movie(path).pixel_size_angstrom, of_movie)):
        if isinstance(wanted, str):
            with pytest.raises(CryodaskError, match=wanted):
                read()
        else:
            assert read() == (None if wanted is None else pytest.approx(wanted, rel=1e-6))


def test_a_stack_of_volumes_is_no_map(tmp_path: Path) -> None:
    path = written(tmp_path, mrc(np.ones((8, 4, 4), "f4"), space_group=401, grid=(4, 4, 4)))
    with pytest.raises(InputError, match="stack of 2 volumes"):
        read_map(path)
    assert read_map(written(tmp_path, mrc(np.ones((4, 4, 4), "f4"), space_group=401)))[0].shape == (4, 4, 4)


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["f4", "f2"])
def test_a_value_that_is_not_finite_is_refused(tmp_path: Path, value: float, kind: str) -> None:
    data = np.ones((5, 6, 8), kind)
    data[3, 2, 1] = value
    path = written(tmp_path, mrc(data))
    movie = open_movie(path)
    assert movie[0].shape == (6, 8)
    with pytest.raises(MovieError, match="frame 4 of 5 has NaN or infinite pixels"):
        movie[3]
    with pytest.raises(InputError, match="1 of 240 voxels are NaN or infinite"):
        read_map(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, mrc(SIX))
    movie = open_movie(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(MovieError, match="section 4 of 4 ends too early"):
        movie[3]


def test_exact_files_warn_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_movie(written(tmp_path, mrc(SIX)))
