"""How the camera frames of an EER movie are summed; apart from the reader, because a plan needs it without the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

EER_ENDINGS = (".eer",)


@dataclass(frozen=True)
class Fractions:
    """How the camera frames of an EER movie are summed.

    Parameters
    ----------
    dose_e_a2 : float
        Exposure of a fraction, electrons per square Angstrom; it decides unless ``frames`` are given.
    frames : int, optional
        Camera frames per fraction.
    upsampling : 1 or 2
        2 gives pixels of half the size (super-resolution, "8K").
    camera_dose_e_a2 : float, optional
        Exposure of one camera frame; by default that of the file's metadata.
    """

    dose_e_a2: float = 1.0
    frames: int | None = None
    upsampling: int = 1
    camera_dose_e_a2: float | None = None


def is_eer(path: str | Path) -> bool:
    """Whether a path, or a pattern, is of EER movies."""
    return Path(path).suffix.lower() in EER_ENDINGS
