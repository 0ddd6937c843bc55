"""Movies and gain references in any container: ``open_movie`` gives frames one by one, in MRC row order."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cryodask.errors import CryodaskError, GainError, MovieError
from cryodask.formats.compressed import COMPRESSIONS, CompressedMrcStack, ending_of, open_compressed_mrc
from cryodask.formats.dm4 import open_dm4
from cryodask.formats.eer import EerMovie, open_eer
from cryodask.formats.fractions import EER_ENDINGS, Fractions
from cryodask.formats.gain import Flip, check_dead_pixels, orient_gain, reciprocal_gain
from cryodask.formats.mrc import open_mrc, write_mrc
from cryodask.formats.tiff import open_tiff, write_tiff
from cryodask.plugins import Plugins

TIFF_ENDINGS = (".tif", ".tiff")
MRC_ENDINGS = (".mrc", ".mrcs", ".st")
COMPRESSED_MRC_ENDINGS = tuple(mrc + compression for mrc in MRC_ENDINGS for compression in COMPRESSIONS)
DM4_ENDINGS = (".dm4",)
MOVIE_ENDINGS = TIFF_ENDINGS + MRC_ENDINGS + EER_ENDINGS + COMPRESSED_MRC_ENDINGS + DM4_ENDINGS


class MovieFile(Protocol):
    """A movie file: the ``Frames`` of the stages, with path and pixel size."""

    @property
    def path(self) -> str:
        """Path of the file, as given."""
        ...

    @property
    def pixel_size_angstrom(self) -> float | None:
        """Pixel size in the header; None if the header has no plausible value."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(frame, y, x)."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the counts."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """Frame ``index``, `(y, x)`, in MRC row order."""
        ...


@dataclass(frozen=True)
class Reader:
    """A movie format.

    Parameters
    ----------
    endings : tuple of str
        File extensions, lower case with the dot.
    open : callable ``(path) -> MovieFile``
        Reads the header and keeps no file open; the result can be pickled. Raises MovieError for a file that is not a valid movie.
    """

    endings: tuple[str, ...]
    open: Callable[[str | Path], MovieFile]


def _refused(name: str, reader: object) -> str:
    """Why a reader of another package cannot be used; empty if it can."""
    if not isinstance(reader, Reader) or not callable(reader.open):
        return f"it is a {type(reader).__name__}, not a {Reader.__module__}.Reader"
    if wrong := [e for e in reader.endings if not e.startswith(".") or e != e.lower() or e in MOVIE_ENDINGS]:
        return f"{', '.join(wrong)} is not a valid extension: use lower case with the dot, and none that cryodask reads itself"
    try:
        inspect.signature(reader.open).bind("path")
    except TypeError as error:
        return f"open is called as open(path): {error}"
    return ""


OTHERS = Plugins("cryodask.readers", _refused)
"""Readers of other packages."""


def _reader(ending: str) -> Reader | None:
    if ending in TIFF_ENDINGS:
        return Reader(TIFF_ENDINGS, lambda path: open_tiff(path, MovieError))
    if ending in MRC_ENDINGS:
        return Reader(MRC_ENDINGS, lambda path: open_mrc(path, MovieError, counts=True))
    if ending in COMPRESSED_MRC_ENDINGS:
        return Reader(COMPRESSED_MRC_ENDINGS, lambda path: open_compressed_mrc(path, MovieError, counts=True))
    if ending in DM4_ENDINGS:
        return Reader(DM4_ENDINGS, lambda path: open_dm4(path, MovieError))
    if ending in EER_ENDINGS:
        return Reader(EER_ENDINGS, lambda path: open_eer(str(path)))
    return next((reader for reader in OTHERS.load().values() if ending in reader.endings), None)


def open_movie(path: str | Path, fractions: Fractions | None = None) -> CheckedMovie:
    """Open a movie for reading frame by frame.

    Parameters
    ----------
    path : str or Path
        ``.tif, .tiff`` (any compression that tifffile reads; rows are flipped into MRC order), ``.mrc, .mrcs, .st``
        (modes 0, 1, 2, 6, 12, 101), these with ``.gz, .bz2, .zst`` after them, ``.eer``, ``.dm4``, and formats of installed packages (entry
        points of the group ``cryodask.readers``).
    fractions : Fractions, optional
        How the camera frames of an EER movie are summed; by default each is a frame. Other formats ignore it.

    Returns
    -------
    CheckedMovie
        ``len``, ``shape`` `(frame, y, x)`, ``dtype``, ``[i]`` `(y, x)` decoded on access, ``pixel_size_angstrom`` (None if
        not in the header), ``path``. No file is kept open, so it can be pickled.

    Raises
    ------
    MovieError
        If the file is missing, empty, truncated, longer than its header says, of another format, or not a greyscale movie. Reading a
        frame raises it if the frame cannot be decoded, or has NaN or infinite pixels.
    """
    reader = _reader(ending_of(path))
    if reader is None:
        endings = [*MOVIE_ENDINGS, *(ending for other in OTHERS.load().values() for ending in other.endings)]
        raise MovieError(
            f"{path} is not in a supported movie format ({', '.join(endings)}).{OTHERS.hint('')}",
            "another kind of file is among the movies, or they have a camera format such as .dm3",
            "narrow the pattern of the movies, install a package that reads the format, or convert them to TIFF or MRC",
        )
    movie = _guarded(str(path), "cannot be opened", lambda: reader.open(path))
    if fractions is not None and isinstance(movie, EerMovie):
        movie = movie.fractionated(fractions)
    if len(movie.shape) != 3 or len(movie) < 1 or min(movie.shape[1:]) < 4 or movie.dtype.kind not in "uif":
        raise MovieError(
            f"{path} is not a valid movie: its shape is {' x '.join(map(str, movie.shape))}, its pixels are of type {movie.dtype}.",
            "another kind of file is among the movies",
            "remove it from the folder, or narrow the pattern of the movies",
        )
    return CheckedMovie(movie)


@dataclass(frozen=True)
class CheckedMovie:
    """A movie whose frames are checked as they are read: size, type, and finite values."""

    movie: MovieFile

    @property
    def path(self) -> str:
        """Path of the file."""
        return str(self.movie.path)

    @property
    def pixel_size_angstrom(self) -> float | None:
        """Pixel size in the header; None if the header has no plausible value."""
        return self.movie.pixel_size_angstrom

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frame, y, x)."""
        frames, y, x = self.movie.shape
        return frames, y, x

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the counts."""
        return self.movie.dtype

    @property
    def frames_per_fraction(self) -> int:
        """Number of camera frames in a frame; 1 unless they were summed on reading."""
        return self.movie.frames_per_fraction if isinstance(self.movie, EerMovie) else 1

    @property
    def dose_per_fraction(self) -> float:
        """Exposure of a frame, electrons per square Angstrom; NaN unless frames of known exposure were summed on reading."""
        dose = self.movie.camera_dose_e_a2 if isinstance(self.movie, EerMovie) else None
        return float("nan") if dose is None else dose * self.frames_per_fraction

    @property
    def is_stream(self) -> bool:
        """Whether frames should be read in order: the file is compressed as a whole, and a step back begins again."""
        return isinstance(self.movie, CompressedMrcStack)

    @property
    def metadata_dose(self) -> float | None:
        """Exposure of a camera frame by the metadata of an EER file, electrons per square Angstrom; None if there are none."""
        return self.movie.metadata_dose_e_a2 if isinstance(self.movie, EerMovie) else None

    def __len__(self) -> int:
        return len(self.movie)

    def __getitem__(self, index: int) -> np.ndarray:
        """Frame ``index``, `(y, x)`, in MRC row order."""
        n = len(self.movie)
        if not -n <= index < n:
            raise IndexError(index)
        frame = _guarded(self.path, f"frame {index % n + 1} of {n} cannot be read", lambda: np.asarray(self.movie[index]))
        where = f"{self.path}: frame {index % n + 1} of {n}"
        if frame.shape != self.shape[1:] or frame.dtype != self.dtype:
            raise MovieError(
                f"{where} has {' x '.join(map(str, frame.shape))} pixels of type {frame.dtype}, the movie"
                f" {' x '.join(map(str, self.shape[1:]))} of type {self.dtype}.",
                "",
                "write the movie with frames of one size and type",
            )
        if frame.dtype.kind == "f" and not np.isfinite(frame).all():
            raise MovieError(f"{where} has NaN or infinite pixels.", "a failed conversion wrote it", "convert it again")
        return frame


def _guarded(path: str, what: str, read: Callable[[], Any]) -> Any:
    """Call a reader. What it raises about one movie quarantines this movie; failures of the disk or of memory pass through."""
    try:
        return read()
    except (CryodaskError, OSError, MemoryError):
        raise
    except Exception as cause:
        said = " ".join(str(cause).split())[:100]
        raise MovieError(f"{path} {what} ({type(cause).__name__}: {said}).", "the file is damaged", "copy it again") from cause


def write_tiff_movie(path: str | Path, frames: np.ndarray, pixel_size_angstrom: float | None = None) -> None:
    """Write a movie `(frame, y, x)` in MRC row order as LZW TIFF (integers keep their dtype)."""
    write_tiff(path, frames, pixel_size_angstrom)


def write_mrc_movie(path: str | Path, frames: np.ndarray, pixel_size_angstrom: float) -> None:
    """Write a movie `(frame, y, x)` as an MRC stack; with counts above 127 it has 16 bits per pixel."""
    write_mrc(path, frames, pixel_size_angstrom, stack=True)


def read_gain(
    path: str | Path, rotate: int = 0, flip: Flip | int = "none", *, divides: bool | None = None, eer: bool = False
) -> np.ndarray:
    """Gain reference `(y, x)` float32 that multiplies, in MRC row order, oriented by `orient_gain`; its reciprocal if it divides.

    ``.mrc`` is read unchanged, ``.tif, .tiff, .gain`` (EER gains are TIFF files) and ``.dm4`` with rows flipped, unless it is for EER
    movies, whose rows are not flipped.

    Parameters
    ----------
    divides : bool, optional
        Whether the counts are divided by the gain. By default they are multiplied by it; but an MRC gain of EER movies divides, as in
        RELION 3.1.3.
    eer : bool
        The gain is for EER movies.
    """
    ending = Path(path).suffix.lower()
    if ending in (*TIFF_ENDINGS, ".gain"):
        stack: MovieFile = open_tiff(path, GainError)
    elif ending in MRC_ENDINGS:
        stack = open_mrc(path, GainError)
    elif ending in DM4_ENDINGS:
        stack = open_dm4(path, GainError)
    else:
        raise GainError(f"{path} is not in a supported gain format (.mrc, .tif, .gain, .dm4)", "", "convert it to MRC")
    if len(stack) != 1:
        raise GainError(f"{path} has {len(stack)} sections, but a gain has one", "it is a movie", "check the path")
    gain = stack[0].astype(np.float32)
    if not np.isfinite(gain).all() or gain.min() < 0 or not gain.any():
        raise GainError(
            f"{path} has values that are not valid for a gain (minimum {gain.min():g}, maximum {gain.max():g})",
            "it is a dark reference, or damaged",
            "give the reference that multiplies the counts: about 1, and 0 at dead pixels",
        )
    check_dead_pixels(gain, str(path))
    if eer and ending not in MRC_ENDINGS:
        gain = gain[::-1]  # as stored
    if divides is None:
        divides = eer and ending in MRC_ENDINGS
    return orient_gain(reciprocal_gain(gain) if divides else gain, rotate, flip)
