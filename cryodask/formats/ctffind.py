"""CTF fits as text files of CTFFIND 4 and cisTEM's ctffind: comment lines with the settings, and a row of seven numbers per image."""

from __future__ import annotations

import math
import re
from pathlib import Path

from cryodask.errors import InputError

_SETTINGS = {
    "pixel_size_angstrom": r"Pixel size:\s*([-+.\deE]+)",
    "voltage_kv": r"acceleration voltage:\s*([-+.\deE]+)",
    "spherical_aberration_mm": r"spherical aberration:\s*([-+.\deE]+)",
    "amplitude_contrast": r"amplitude contrast:\s*([-+.\deE]+)",
}
_COLUMNS = 7


def read_fit(path: str | Path) -> tuple[str, dict[str, float]]:
    """The fit of one micrograph: the name of the image that was fitted, and its optics and CTF under the vocabulary's names.

    Angles are as in RELION. ``ctf_resolution_angstrom`` is missing where the program found no agreement at all (inf).

    Raises
    ------
    InputError
        If the file is damaged or of another program, has fits of several images, or numbers that are not finite.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", "it is not a text file of CTFFIND", "check the path") from error
    head = "\n".join(line for line in lines if line.startswith("#"))
    image = re.search(r"Input file:\s*(.*?)\s*;", head)
    settings = {name: re.search(pattern, head) for name, pattern in _SETTINGS.items()}
    missing = [name for name, found in settings.items() if found is None]
    if image is None or missing:
        raise InputError(
            f"{path} does not say the {'input file' if image is None else missing[0]}.", "it is not of CTFFIND 4", "check the path"
        )
    rows = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    if len(rows) != 1:
        raise InputError(f"{path} has {len(rows)} rows, not one.", "a stack was fitted, or the file is truncated", "fit each micrograph")
    try:
        numbers = [float(word) for word in rows[0]]
        out = {name: float(found[1]) for name, found in settings.items() if found is not None}
    except ValueError as error:
        raise InputError(f"{path}: {error}.", "the file is damaged", "fit the micrograph again") from error
    if len(numbers) != _COLUMNS or not all(map(math.isfinite, [*numbers[:-1], *out.values()])):
        raise InputError(f"{path} has a row of {len(numbers)} numbers, not {_COLUMNS} finite ones.", "the file is damaged", "fit it again")
    _, first, second, azimuth, phase, score, spacing = numbers
    out |= {"defocus_u_angstrom": first, "defocus_v_angstrom": second, "defocus_angle_deg": azimuth}
    out |= {"phase_shift_deg": math.degrees(phase), "ctf_figure_of_merit": score}
    return image[1], {**out, "ctf_resolution_angstrom": spacing} if math.isfinite(spacing) else out
