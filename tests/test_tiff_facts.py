"""TIFF movies of other programs: every page is compared with the first and with the file; a table of variants."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile

from cryodask.errors import CryodaskError, MovieError
from cryodask.formats.movies import MovieFile, Reader, open_movie, write_tiff_movie
from cryodask.formats.tiff import open_tiff

SHAPE = (4, 48, 40)


def counts(kind: str = "u1", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).poisson(9, shape).astype(kind)


def written(folder: Path, pages: Any, *, big: bool = False, order: str = "<", **how: Any) -> Path:
    """Pages with the options of tifffile; a page may be a pair of an image and options of its own."""
    with tifffile.TiffWriter(folder / "m.tif", bigtiff=big, byteorder=order) as tiff:
        for page in pages:
            image, own = page if isinstance(page, tuple) else (page, {})
            tiff.write(image, **{"contiguous": False, "metadata": None, "photometric": "minisblack"} | how | own)
    return folder / "m.tif"


def read_all(path: Path) -> np.ndarray:
    movie = open_movie(path)
    return np.stack([movie[i] for i in range(len(movie))])


@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "f4"])
@pytest.mark.parametrize("how", [
    {}, {"rowsperstrip": 7}, {"compression": "lzw", "rowsperstrip": 16}, {"compression": "zlib", "predictor": True},
    {"compression": "zstd", "rowsperstrip": 5}, {"compression": "packbits"}, {"tile": (16, 32)}, {"compression": "lzw", "tile": (32, 16)},
], ids=str)  # fmt: skip
@pytest.mark.parametrize(("big", "order"), [(False, "<"), (True, "<"), (False, ">"), (True, ">")])
def test_types_compressions_and_layouts_are_read_as_libtiff_reads_them(
    tmp_path: Path, kind: str, how: dict[str, Any], big: bool, order: str
) -> None:
    path = written(tmp_path, counts(kind), big=big, order=order, **how)
    found = read_all(path)
    assert found.dtype == np.dtype(kind)
    assert np.array_equal(found, counts(kind)[:, ::-1])
    assert np.array_equal(found[2], imagecodecs.tiff_decode(path.read_bytes(), index=2)[::-1])


@pytest.mark.parametrize("kind", ["f2", "f8", "u4", "i1"])
def test_rare_types_are_read(tmp_path: Path, kind: str) -> None:
    assert np.array_equal(read_all(written(tmp_path, counts(kind))), counts(kind)[:, ::-1])


A = counts()[0]
THUMBNAIL = A[::4, ::4]
REFUSED: list[tuple[str, list[Any], str]] = [
    ("16 bit after 8 bit", [A, A, A.astype("u2")], "page 3 of 3 has the type unsigned 16 bit, the first unsigned 8 bit"),
    ("8 bit after 16 bit", [A.astype("u2"), A], "page 2 of 2 has the type unsigned 8 bit"),
    ("signed after unsigned", [A, A.astype("i1")], "type signed 8 bit|the tag 339"),
    ("signed 16 after unsigned 16", [A.astype("u2"), A.astype("i2")], "type signed 16 bit|the tag 339"),
    ("floats after integers", [A, A.astype("f4")], "type floating-point 32 bit|the tag 339"),
    ("one page compressed", [A, (A, {"compression": "lzw"})], "page 2 of 2 has the compression"),
    ("two compressions", [(A, {"compression": "zlib"}), (A, {"compression": "lzw"})], "page 2 of 2 has the compression"),
    ("another width", [A, A[:, :-1]], "page 2 of 2 has the size 39 x 48, the first 40 x 48"),
    ("another height", [A, A, A[1:]], "page 3 of 3 has the size 40 x 47"),
    ("turned", [A, np.ascontiguousarray(A.T)], "size 48 x 40"),
    ("thumbnail last", [A, A, (THUMBNAIL, {"subfiletype": 1})], "page 3 of 3 is a thumbnail"),
    ("thumbnail first", [(THUMBNAIL, {"subfiletype": 1}), A], "page 1 of 2 is a thumbnail"),
    ("thumbnail of full size", [A, (A, {"subfiletype": 1})], "is a thumbnail"),
    ("colours", [(np.stack([A] * 3, -1), {"photometric": "rgb"})], "colour image .3 samples"),
    ("colour planes", [(np.stack([A] * 3), {"photometric": "rgb", "planarconfig": "separate"})], "colour image .3 samples"),
    ("two samples", [(np.stack([A] * 2, -1), {"planarconfig": "contig"})], "colour image .2 samples"),
    ("a colour page among grey ones", [A, (np.stack([A] * 3, -1), {"photometric": "rgb"})], "page 2 of 2 is a colour image"),
    ("white is zero", [(A, {"photometric": "miniswhite"})], "white is zero"),
    ("palette", [(A, {"photometric": "palette", "colormap": np.zeros((3, 256), "u2")})], "palette"),
    ("one bit", [A > 9], "pixels of 1 bit"),
    ("complex", [A.astype("c8")], "sample format 6"),
    ("rows from bottom to top", [(A, {"extratags": [(274, "H", 1, 4, True)]})], "orientation 4"),
    ("turned by orientation", [(A, {"extratags": [(274, "H", 1, 6, True)]})], "orientation 6"),
]


@pytest.mark.parametrize(("pages", "said"), [(pages, said) for _, pages, said in REFUSED], ids=[name for name, _, _ in REFUSED])
@pytest.mark.parametrize("big", [False, True])
def test_pages_that_are_no_frames_of_one_movie_are_refused_by_name(tmp_path: Path, pages: list[Any], said: str, big: bool) -> None:
    with pytest.raises(MovieError, match=said):
        open_movie(written(tmp_path, pages, big=big))


def test_orientation_of_the_usual_kind_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, [(frame, {"extratags": [(274, "H", 1, 1, True)]}) for frame in counts()])
    assert np.array_equal(read_all(path), counts()[:, ::-1])


def test_packed_super_resolution_frames_are_known_by_their_size(tmp_path: Path) -> None:
    # RELION and IMOD take 8-bit frames of these sizes for two counts per byte
    pairs = np.zeros((7676, 3710), "u1")
    pairs[1, 4] = 0x5A
    movie = open_movie(written(tmp_path, [pairs], compression="lzw"))
    assert movie.shape == (1, 7676, 7420)
    assert movie[0][7674, 8:10].tolist() == [0xA, 0x5]


# --- tags and strips of a damaged file ---------------------------------------------------------------------------------------
def with_tag(raw: bytes, page: int, tag: int, change: Callable[[bytearray, tifffile.TiffTag], None]) -> bytes:
    data = bytearray(raw)
    with tifffile.TiffFile(io.BytesIO(raw)) as tiff:
        change(data, tiff.pages[page].tags[tag])
    return bytes(data)


def put(code: str, value: int, at: str = "value", place: int = 0) -> Callable[[bytearray, tifffile.TiffTag], None]:
    """Write a number over a tag's code, type, count, value, or an element of its values."""

    def change(data: bytearray, tag: tifffile.TiffTag) -> None:
        start = {"code": tag.offset, "type": tag.offset + 2, "count": tag.offset + 4, "value": tag.offset + 8, "values": tag.valueoffset}[
            at
        ]
        struct.pack_into("<" + code, data, start + place, value)

    return change


DAMAGED: list[tuple[int, int, Callable[[bytearray, tifffile.TiffTag], None], str]] = [
    (1, 256, put("I", 0), "page 2 of 4 is 0 x 48"),
    (1, 256, put("I", 39), "page 2 of 4 has|cannot be decoded"),
    (0, 256, put("I", 2**32 - 1), "more than any camera"),
    (0, 257, put("I", 2**32 - 1), "more than any camera"),
    (2, 257, put("I", 0), "40 x 0"),
    (0, 256, put("I", 2, "count"), "page 1 has 2 values in the tag 256"),
    (3, 257, put("I", 0, "count"), "page 4 has 0 values in the tag 257"),
    (0, 256, put("H", 2, "type"), "page 1 has a tag 256 of the type 2"),
    (0, 256, put("H", 999, "type"), "page 1 has a tag 256 of the type 999"),
    (1, 256, put("H", 257, "code"), "page 2 has the tag 257 twice"),
    (1, 256, put("H", 60000, "code"), "page 2 of 4 lacks the tag 256"),
    (2, 259, put("H", 60000, "code"), "page 3 of 4 lacks the tag 259 that the first has"),
    (2, 259, put("H", 7), "has the compression|cannot be decoded|cannot be read"),
    (2, 259, put("H", 12345), "has the compression|cannot be decoded|cannot be read"),
    (0, 258, put("H", 8), "page 2 of 4 has the type unsigned 16 bit, the first unsigned 8 bit"),
    (0, 258, put("H", 0), "page 1 of 4|cannot be"),
    (1, 262, put("H", 3), "palette"),
    (1, 277, put("H", 3), "colour image|samples"),
    (1, 278, put("I", 0), "page 2 of 4 is|strips"),
    (1, 278, put("I", 48), "page 2 of 4 should have 1 strips, but lists 3 and 3"),
    (1, 278, put("I", 1), "should have 48 strips, but lists 3 and 3"),
    (1, 273, put("I", 2, "count"), "should have 3 strips, but lists"),
    (1, 279, put("I", 2, "count"), "should have 3 strips, but lists"),
    (1, 279, put("I", 2**31 - 1, "count"), "page 2|cannot be read"),
    (1, 279, put("H", 0, "values", 2), "page 2 of 4 has no data for strip 2: writing was interrupted"),
    (3, 279, put("H", 0, "values", 0), "page 4 of 4 has no data for strip 1"),
    (1, 279, put("H", 65535, "values", 4), "page 2 of 4 is truncated"),
    (1, 273, put("I", 0, "values", 4), "page 2 of 4 has no data for strip 2"),
    (1, 273, put("I", 2**32 - 1, "values", 4), "page 2 of 4 is truncated"),
    (1, 273, put("I", 30, "values", 4), "cannot be decoded"),
]


@pytest.mark.parametrize(("page", "tag", "change", "said"), DAMAGED)
@pytest.mark.parametrize("compression", ["lzw", "zlib"])
def test_a_damaged_tag_quarantines_the_movie_in_one_short_sentence(
    tmp_path: Path, compression: str, page: int, tag: int, change: Callable[[bytearray, tifffile.TiffTag], None], said: str
) -> None:
    path = written(tmp_path, counts("u2"), compression=compression, rowsperstrip=16)
    path.write_bytes(with_tag(path.read_bytes(), page, tag, change))
    with pytest.raises(MovieError, match=said) as caught:
        read_all(path)
    assert "\n" not in caught.value.what
    assert len(caught.value.what) < 100 + 150 + len(str(path))


@pytest.mark.parametrize("tag", [282, 283, 296, 305])
@pytest.mark.parametrize("change", [put("I", 5, "count"), put("H", 2, "type"), put("I", 2**32 - 1, "value"), put("H", 700, "code")])
def test_a_damaged_tag_that_nobody_needs_refuses_nothing(
    tmp_path: Path, tag: int, change: Callable[[bytearray, tifffile.TiffTag], None]
) -> None:
    path = written(tmp_path, counts(), compression="lzw", resolution=(10**8, 10**8), resolutionunit="CENTIMETER")
    path.write_bytes(with_tag(path.read_bytes(), 0, tag, change))
    assert np.array_equal(read_all(path), counts()[:, ::-1])


def test_a_strip_without_compression_has_the_bytes_of_its_rows(tmp_path: Path) -> None:
    path = written(tmp_path, counts("u2"), rowsperstrip=16)
    path.write_bytes(with_tag(path.read_bytes(), 2, 279, put("H", 1278, "values", 2)))
    with pytest.raises(MovieError, match="page 3 of 4 has 1278 bytes in strip 2, not as many as its rows"):
        open_movie(path)


# --- more in the file than its directory says --------------------------------------------------------------------------------
def next_link(raw: bytes, page: int) -> int:
    """Place of the link from a page to the next, in a classic little-endian TIFF."""
    at = 4
    for _ in range(page + 1):
        start = struct.unpack_from("<I", raw, at)[0]
        at = start + 2 + 12 * struct.unpack_from("<H", raw, start)[0]
    return at


@pytest.mark.parametrize("compression", [None, "lzw"])
@pytest.mark.parametrize("page", [0, 1, 2])
def test_frames_that_no_page_lists_are_missed(tmp_path: Path, page: int, compression: str | None) -> None:
    path = written(tmp_path, counts(), compression=compression)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, next_link(bytes(raw), page), 0)  # the chain ends early
    path.write_bytes(raw)
    with pytest.raises(MovieError, match=rf"bytes that none of its {page + 1} pages list"):
        open_movie(path)


def test_a_page_that_is_skipped_or_comes_twice_is_refused(tmp_path: Path) -> None:
    raw = written(tmp_path, counts()).read_bytes()
    links = [struct.unpack_from("<I", raw, next_link(raw, i))[0] for i in range(3)]
    for page, target, said in (
        (0, links[1], "none of its 3 pages list"),
        (2, links[0], "lead back"),
        (1, 10**9, "truncated"),
        (1, 9, "truncated|page"),
    ):
        changed = bytearray(raw)
        struct.pack_into("<I", changed, next_link(raw, page), target)
        (tmp_path / "m.tif").write_bytes(changed)
        with pytest.raises(MovieError, match=said):
            read_all(tmp_path / "m.tif")


def test_a_stack_in_one_page_as_of_imagej_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "m.tif", counts("u2"), imagej=True)
    with tifffile.TiffFile(tmp_path / "m.tif") as tiff:
        many = len(tiff.pages)
    if many == 1:
        with pytest.raises(MovieError, match="none of its 1 pages list"):
            open_movie(tmp_path / "m.tif")
    tifffile.imwrite(tmp_path / "m.tif", counts("u2"), photometric="minisblack", truncate=True, contiguous=True)
    with pytest.raises(MovieError, match="none of its 1 pages list"):
        open_movie(tmp_path / "m.tif")


def test_two_files_in_one_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, counts())
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(MovieError, match="none of its 4 pages list"):
        open_movie(path)


def test_metadata_of_any_length_is_no_data(tmp_path: Path) -> None:
    path = written(tmp_path, [(f, {"extratags": [(65000, "s", 0, "x" * 20000, True)]}) for f in counts()], compression="lzw")
    assert np.array_equal(read_all(path), counts()[:, ::-1])


# --- any reader --------------------------------------------------------------------------------------------------------------
class Failing:
    """A movie of another package whose frames raise."""

    path, pixel_size_angstrom, shape, dtype = "m.odd", None, (2, 8, 8), np.dtype("f4")

    def __init__(self, frame: object) -> None:
        self.frame = frame

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> np.ndarray:
        if isinstance(self.frame, BaseException):
            raise self.frame
        return self.frame  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (KeyError("x"), "frame 2 of 2 cannot be read .KeyError"), (RecursionError(), "RecursionError"), (struct.error("short"), "short"),
        (np.zeros((8, 7), "f4"), "8 x 7 pixels"), (np.zeros((8, 8), "f8"), "type float64"), (np.full((8, 8), np.nan, "f4"), "NaN"),
    ],
)  # fmt: skip
def test_what_a_reader_of_another_package_raises_is_one_item_s_error(monkeypatch: pytest.MonkeyPatch, frame: object, said: str) -> None:
    movie: MovieFile = Failing(frame)
    monkeypatch.setattr("cryodask.formats.movies._reader", lambda ending: Reader((".odd",), lambda path: movie))
    with pytest.raises(MovieError, match=said):
        open_movie("m.odd")[1]


def test_failures_of_the_disk_are_not_the_file_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = written(tmp_path, counts())

    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("tifffile.TiffFile", broken)
    with pytest.raises(OSError, match="Input/output"):  # retried, unlike a damaged file
        open_tiff(path)
    monkeypatch.setattr("tifffile.TiffFile", lambda *_: {}[0])
    with pytest.raises(CryodaskError, match=r"cannot be read as TIFF \(KeyError"):
        open_tiff(path)


@pytest.mark.parametrize("value", [0, 1, 7, 255])
@pytest.mark.parametrize("shape", [(6, 64, 64), (1, 16, 16), (40, 32, 48), (3, 256, 256)])
@pytest.mark.parametrize("compression", [None, "lzw", "zlib"])
def test_frames_of_one_value_are_a_movie_however_small_they_are_compressed(tmp_path, value, shape, compression):
    tifffile.imwrite(tmp_path / "m.tif", np.full(shape, value, np.uint8), compression=compression, photometric="minisblack")
    write_tiff_movie(tmp_path / "ours.tif", np.full(shape, value, np.uint8), 1.0)
    for name in ("m.tif", "ours.tif"):
        movie = open_movie(tmp_path / name)
        assert movie.shape == shape
        assert (np.asarray(movie[len(movie) - 1]) == value).all()


def test_frames_below_a_page_are_missed(tmp_path: Path) -> None:
    path = tmp_path / "m.tif"
    for shape, refused in ((A.shape, True), (THUMBNAIL.shape, False)):
        with tifffile.TiffWriter(path) as tiff:
            tiff.write(A, photometric="minisblack", metadata=None, subifds=1)
            tiff.write(A[: shape[0], : shape[1]], photometric="minisblack", metadata=None)
        if refused:
            with pytest.raises(MovieError, match="page 1 of 1 contains further images of its size"):
                open_movie(path)
        else:
            assert len(open_movie(path)) == 1


@pytest.mark.parametrize(("y", "found"), [(1.1, 1.1), (1.105, 1.1), (1e7, 1.1), (2.2, None)])
def test_pixels_of_two_sizes_are_refused(tmp_path: Path, y: float, found: float | None) -> None:
    path = tmp_path / "m.tif"
    # as ratios: of floats earlier releases of tifffile write a few digits
    resolution = [(round(1e9 / size), 10) for size in (1.1, y)]
    tifffile.imwrite(path, A, photometric="minisblack", metadata=None, resolution=resolution, resolutionunit="CENTIMETER")
    if found is None:
        with pytest.raises(MovieError, match=r"pixels of 1\.1 x 2\.2 A \(x, y\), which are not square"):
            open_movie(path)
    else:
        assert open_movie(path).pixel_size_angstrom == pytest.approx(found, rel=1e-6)
