"""Dark references: what a camera records without electrons, subtracted from each frame before the gain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryodask.errors import GainError, MovieError
from cryodask.formats.dm4 import open_dm4
from cryodask.formats.movies import DM4_ENDINGS, MRC_ENDINGS, TIFF_ENDINGS, CheckedMovie, MovieFile
from cryodask.formats.mrc import open_mrc
from cryodask.formats.tiff import open_tiff


@dataclass(frozen=True)
class Subtracted:
    """A movie less a dark reference `(y, x)` float32."""

    movie: CheckedMovie
    dark: np.ndarray

    @property
    def path(self) -> str:
        """Path of the file."""
        return self.movie.path

    @property
    def pixel_size_angstrom(self) -> float | None:
        """Pixel size in the header; None if the header has no plausible value."""
        return self.movie.pixel_size_angstrom

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frame, y, x)."""
        return self.movie.shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the differences."""
        return np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self.movie)

    def __getitem__(self, index: int) -> np.ndarray:
        """Frame ``index``, `(y, x)`, in MRC row order."""
        return np.subtract(self.movie[index], self.dark, dtype=np.float32)


def read_dark(path: str | Path, movie: CheckedMovie) -> np.ndarray:
    """A dark reference for a movie, `(y, x)` float32 in MRC row order: TIFF and DM4 are flipped, MRC is not.

    Raises
    ------
    GainError
        If it has no single section of finite values.
    MovieError
        If it is not of the size of the movie, or of an electron counting (EER) movie.
    """
    ending = Path(path).suffix.lower()
    if ending not in TIFF_ENDINGS + MRC_ENDINGS + DM4_ENDINGS:
        raise GainError(f"{path} is not in a supported format of dark references (.mrc, .tif, .dm4).", "", "convert it to MRC")
    opened = open_tiff if ending in TIFF_ENDINGS else open_dm4 if ending in DM4_ENDINGS else open_mrc
    stack: MovieFile = opened(path, GainError)
    if len(stack) != 1:
        raise GainError(f"{path} has {len(stack)} sections; a dark reference must have exactly one.", "it is a movie", "check the path")
    dark = stack[0].astype(np.float32)
    if not np.isfinite(dark).all():
        raise GainError(f"{path} has NaN or infinite values, which a dark reference cannot have.", "it is damaged", "copy it again")
    if dark.shape != movie.shape[1:]:
        raise MovieError(
            f"{movie.path} has frames of {movie.shape[1]} x {movie.shape[2]} pixels (rows, columns), the dark reference"
            f" {dark.shape[0]} x {dark.shape[1]}.",
            "it is of another camera mode",
            "give the dark reference of this mode",
        )
    if not np.isnan(movie.dose_per_fraction):
        raise MovieError(f"{movie.path} has counted events, which have no dark reference.", "", "leave out  ingest: {dark: ...}")
    return dark
