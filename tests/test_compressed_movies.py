"""MRC movies that are compressed as a whole: streamed, and refused where a plain file would be."""

from __future__ import annotations

import bz2
import gzip
import pickle
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest

from cryodask.errors import MovieError
from cryodask.formats.compressed import ending_of, stem_of
from cryodask.formats.movies import open_movie, write_mrc_movie
from cryodask.stage import load_stages

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda data: gzip.compress(data, 1),
    ".bz2": lambda data: bz2.compress(data, 1),
    ".zst": lambda data: imagecodecs.zstd_encode(data, 1),
}
FRAMES = np.random.default_rng(0).poisson(1.2, (5, 40, 53)).astype(np.uint8)


@pytest.fixture(params=COMPRESS)
def kind(request):
    if request.param == ".zst":
        pytest.importorskip("pyarrow")
    return request.param


def written(folder: Path, kind: str, data: bytes | None = None) -> Path:
    write_mrc_movie(folder / "m.mrc", FRAMES, 1.0)
    path = folder / f"m.mrc{kind}"
    path.write_bytes(COMPRESS[kind]((folder / "m.mrc").read_bytes() if data is None else data))
    return path


def test_frames_come_in_any_order_and_in_other_processes(tmp_path, kind):
    movie = open_movie(written(tmp_path, kind))
    assert (movie.shape, movie.pixel_size_angstrom) == (FRAMES.shape, 1.0)
    for i in (0, 1, 3, 2, 4, 4, -5):
        assert np.array_equal(movie[i], FRAMES[i])
    other = pickle.loads(pickle.dumps(movie))
    assert np.array_equal(other[1], FRAMES[1])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.98, 0.999])
def test_a_truncated_stream_is_an_error(tmp_path, kind, share):
    path = written(tmp_path, kind)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(MovieError, match=r"cannot be decompressed|empty"):
        open_movie(path)[4]


def test_fewer_and_more_frames_than_the_header_says_are_errors(tmp_path, kind):
    write_mrc_movie(tmp_path / "m.mrc", FRAMES, 1.0)
    plain = (tmp_path / "m.mrc").read_bytes()
    movie = open_movie(written(tmp_path, kind, plain[:-2120]))
    assert np.array_equal(movie[3], FRAMES[3])
    with pytest.raises(MovieError, match="section 5 of 5 cannot be decompressed"):
        movie[4]
    for more in (b"\1", bytes(40 * 53), bytes(50_000_000)):  # 50 MB of zeros are 50 kB in the file, and are not read
        with pytest.raises(MovieError, match="longer than its header says"):
            open_movie(written(tmp_path, kind, plain + more))[4]
    assert np.array_equal(open_movie(written(tmp_path, kind, plain + bytes(100)))[4], FRAMES[4])


def test_what_is_not_a_compressed_movie_is_refused(tmp_path, kind):
    path = written(tmp_path, kind)
    path.write_bytes((tmp_path / "m.mrc").read_bytes())
    with pytest.raises(MovieError, match="cannot be decompressed"):
        open_movie(path)
    with pytest.raises(MovieError, match="header is invalid"):
        open_movie(written(tmp_path, kind, np.random.default_rng(0).bytes(3000)))
    with pytest.raises(MovieError, match="it ends after 12 of 1024 bytes"):
        open_movie(written(tmp_path, kind, bytes(12)))
    huge = bytearray((tmp_path / "m.mrc").read_bytes())
    huge[0:8] = (9_000_000).to_bytes(4, "little") * 2
    with pytest.raises(MovieError, match="sections of 81000000000000 bytes"):
        open_movie(written(tmp_path, kind, bytes(huge)))


def test_ingest_reads_a_compressed_movie_once(tmp_path, kind):
    stage = load_stages()["ingest"]
    path = written(tmp_path, kind)
    given = stage.process(stage.params(), movie_path=str(path))
    assert given["mean_count"] == FRAMES[0].mean()
    assert given["movie"].movie.place.at == 1
    given = stage.process(stage.params(storage="in_place"), movie_path=str(path))
    assert given["mean_count"] == pytest.approx(FRAMES[[0, 2, 4]].mean())
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(MovieError, match="cannot be decompressed"):
        stage.process(stage.params(storage="in_place"), movie_path=str(path))


def test_names_of_compressed_movies():
    assert (ending_of("a/m.x.MRC.gz"), stem_of("a/m.x.mrc.gz")) == (".mrc.gz", "m.x")
    assert (ending_of("a/m.x.tif"), stem_of("a/m.x.tif")) == (".tif", "m.x")
