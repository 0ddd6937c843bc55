"""Stage ``ingest``: copies movies into the project frame by frame, or reads them in place."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from cryodask.errors import MovieError
from cryodask.formats.movies import MovieFile, open_movie
from cryodask.stage import Context, Output, Params, stage


class IngestParams(Params):
    """Parameters of stage ``ingest``."""

    storage: Literal["chunked", "in_place"] = Field(
        "chunked",
        description="chunked copies the counts into the project (smaller and faster to read than LZW), in_place reads the original file",
    )


class _InPlace:
    """Frames that are not stored, because the movie is read in place."""

    stored = False

    def __init__(self, movie: MovieFile) -> None:
        self.movie, self.shape, self.dtype = movie, movie.shape, movie.dtype

    def __len__(self) -> int:
        return len(self.movie)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.movie[index]


@stage(
    version=1,
    needs=["movie_path"],
    gives=["movie", "mean_count"],
    outputs=[Output("exposures", "exposures", ("frames", "optics", "dose"))],
)
def ingest(params: IngestParams, *, movie_path: str, context: Context) -> dict[str, Any]:
    """Open a movie (TIFF, MRC), check that it is complete, and add it to the project.

    Chunked storage writes one compressed chunk per frame (blosc zstd-1 with bitshuffle), streamed: no movie is ever held in memory.
    ``mean_count`` is measured on three frames.
    """
    movie = open_movie(movie_path)
    frames = len(movie)
    sample = [np.asarray(movie[i], np.float64) for i in sorted({0, frames // 2, frames - 1})]
    mean = float(np.mean([f.mean() for f in sample]))
    if mean <= 0:
        least = min(float(f.min()) for f in sample)
        if least < 0:
            raise MovieError(
                f"{movie_path} has a mean of {mean:.3g} and values down to {least:.3g}, which are not counts.",
                "a mean was subtracted from it, or unsigned integers were written as signed ones",
                "give the counts as the camera recorded them",
            )
        raise MovieError(f"{movie_path} has no counts.", "the beam was blanked, or the camera failed", "remove it from the folder")
    return {"movie": movie if params.storage == "chunked" else _InPlace(movie), "mean_count": mean}
