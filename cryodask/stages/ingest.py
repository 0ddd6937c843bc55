"""Stage ``ingest``: copies movies into the project frame by frame, or reads them in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from cryodask.errors import MovieError
from cryodask.formats.dark import Subtracted, read_dark
from cryodask.formats.fractions import Fractions
from cryodask.formats.movies import MovieFile, open_movie
from cryodask.stage import AddedMark, Context, InputFile, Output, Params, stage


class IngestParams(Params):
    """Parameters of stage ``ingest``."""

    storage: Literal["chunked", "in_place"] = Field(
        "chunked",
        description="chunked copies the counts into the project (smaller and faster to read than LZW), in_place reads the original file",
    )
    eer_fraction_dose: Annotated[float, AddedMark] = Field(
        1.0, gt=0, le=100, description="exposure of the fractions into which EER movies are summed, electrons per square Angstrom"
    )
    eer_fraction_frames: Annotated[int | None, AddedMark] = Field(
        None, ge=1, le=65535, description="camera frames per fraction of EER movies, instead of an exposure"
    )
    eer_upsampling: Annotated[Literal[1, 2], AddedMark] = Field(
        1,
        description="pixels of EER movies per camera pixel: 1 (4K), or 2 (8K, with half the pixel size in microscope)",
    )

    dark: Annotated[InputFile | None, AddedMark] = Field(
        None,
        description="dark reference (MRC, TIFF), subtracted from each frame before the gain; frames are then stored as float32",
    )

    def fractions(self, camera_dose_e_a2: float | None) -> Fractions:
        """How EER movies are summed; the exposure of a camera frame is that of the project file, or None if it has none."""
        return Fractions(self.eer_fraction_dose, self.eer_fraction_frames, self.eer_upsampling, camera_dose_e_a2)


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
    optional=["eer_dose_per_frame"],
    gives=["movie", "mean_count", "frames_per_fraction", "dose_per_fraction"],
    outputs=[Output("exposures", "exposures", ("frames", "optics", "dose"))],
)
def ingest(params: IngestParams, *, movie_path: str, eer_dose_per_frame: float | None = None, context: Context) -> dict[str, Any]:
    """Open a movie (TIFF, MRC, EER), check that it is complete, and add it to the project.

    Chunked storage writes one compressed chunk per frame (blosc zstd-1 with bitshuffle), streamed: no movie is ever held in memory.
    ``mean_count`` is measured on three frames (of a movie that is compressed as a whole, on the first).

    Camera frames of EER movies are summed into fractions as they are decoded. The exposure of a camera frame is ``dose_per_frame`` of the
    project file if that is given, else that of the file's metadata. Camera frames that do not fill a last fraction are left out.
    """
    opened = open_movie(movie_path, params.fractions(eer_dose_per_frame))
    movie = opened if params.dark is None else Subtracted(opened, read_dark(params.dark, opened))
    frames = len(movie)
    once = opened.is_stream and params.storage == "chunked"  # storing it reads it to the end, and checks it
    sample = [_measured(movie[i]) for i in ([0] if once else sorted({0, frames // 2, frames - 1}))]
    while once and len(sample) < frames and sample[-1].is_empty:
        sample.append(_measured(movie[len(sample)]))
    mean = float(np.mean([one.mean for one in sample]))
    if mean <= 0:
        least = min(one.least for one in sample)
        if least < 0:
            raise MovieError(
                f"{movie_path} has a mean of {mean:.3g} and values down to {least:.3g}, which are not counts.",
                "a mean was subtracted from it, or unsigned integers were written as signed ones",
                "give the counts as the camera recorded them",
            )
        raise MovieError(f"{movie_path} has no counts.", "the beam was blanked, or the camera failed", "remove it from the folder")
    return {
        "movie": movie if params.storage == "chunked" else _InPlace(movie),
        "mean_count": mean,
        "frames_per_fraction": opened.frames_per_fraction,
        "dose_per_fraction": opened.dose_per_fraction,
    }


@dataclass(frozen=True)
class _Measured:
    """Of a frame; as float64 it has eight times the memory of its counts, so that no two are kept."""

    mean: float
    least: float
    is_empty: bool


def _measured(frame: Any) -> _Measured:
    values = np.asarray(frame, np.float64)
    return _Measured(float(values.mean()), float(values.min()), not values.any())
