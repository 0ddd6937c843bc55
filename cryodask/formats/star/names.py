"""Names of columns in RELION and in cryodask.

``COLUMNS`` is the one table of names; ``OPTICS`` lists what RELION writes once per optics group.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import NamedTuple


class Column(NamedTuple):
    """Name in cryodask, name in RELION, dtype here, and the offset subtracted from RELION's number on reading."""

    name: str
    relion: str
    dtype: str = "f8"
    base: int = 0


COLUMNS = (
    Column("micrograph_name", "rlnMicrographName", "str"),
    Column("movie_name", "rlnMicrographMovieName", "str"),
    Column("metadata_name", "rlnMicrographMetadata", "str"),
    Column("image_name", "rlnImageName", "str"),
    Column("ctf_image", "rlnCtfImage", "str"),
    Column("optics_group", "rlnOpticsGroup", "i8"),
    Column("defocus_u_angstrom", "rlnDefocusU"),
    Column("defocus_v_angstrom", "rlnDefocusV"),
    Column("defocus_angle_deg", "rlnDefocusAngle"),
    Column("phase_shift_deg", "rlnPhaseShift"),
    Column("ctf_b_factor_angstrom2", "rlnCtfBfactor"),
    Column("ctf_scale_factor", "rlnCtfScalefactor"),
    Column("ctf_resolution_angstrom", "rlnCtfMaxResolution"),
    Column("ctf_figure_of_merit", "rlnCtfFigureOfMerit"),
    Column("total_motion", "rlnAccumMotionTotal"),
    Column("early_motion", "rlnAccumMotionEarly"),
    Column("particle_x", "rlnCoordinateX"),
    Column("particle_y", "rlnCoordinateY"),
    Column("pick_score", "rlnAutopickFigureOfMerit"),
    Column("rot_deg", "rlnAngleRot"),
    Column("tilt_deg", "rlnAngleTilt"),
    Column("psi_deg", "rlnAnglePsi"),
    Column("origin_x_angstrom", "rlnOriginXAngst"),
    Column("origin_y_angstrom", "rlnOriginYAngst"),
    Column("class_number", "rlnClassNumber", "i8"),
    Column("half_set", "rlnRandomSubset", "i8", 1),
    Column("class_probability", "rlnMaxValueProbDistribution"),
    Column("log_likelihood", "rlnLogLikeliContribution"),
    Column("particle_id", "cryodaskParticleId", "i8"),
    Column("cryosparc_uid", "cryosparcUid", "i8"),
    Column("birth_x", "cryodaskBirthX"),
    Column("birth_y", "cryodaskBirthY"),
)
OPTICS = (
    Column("optics_group_name", "rlnOpticsGroupName", "str"),
    Column("voltage_kv", "rlnVoltage"),
    Column("spherical_aberration_mm", "rlnSphericalAberration"),
    Column("amplitude_contrast", "rlnAmplitudeContrast"),
    Column("pixel_size_angstrom", "rlnMicrographPixelSize"),
    Column("particle_pixel_size_angstrom", "rlnImagePixelSize"),
    Column("box", "rlnImageSize", "i8"),
    Column("image_dimensions", "rlnImageDimensionality", "i8"),
    Column("ctf_premultiplied", "rlnCtfDataAreCtfPremultiplied", "i8"),
    Column("phase_flipped", "rlnCtfDataArePhaseFlipped", "i8"),
)
CRYOSPARC = ("cryosparcShift", "cryosparcTilt", "cryosparcTrefoil", "cryosparcTetrafoil", "cryosparcAnisomag")
"""Aberrations in cryoSPARC's own numbers, as lists, for the way back."""
KEPT = (
    *("rlnBeamTiltX", "rlnBeamTiltY", "rlnOddZernike", "rlnEvenZernike"),
    *("rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11", "rlnMtfFileName", "rlnMtfOriginalPixelSize"),
    *CRYOSPARC,
)
"""Columns of optics groups that are carried along as RELION writes them, in one text per row (``relion_optics``)."""
ALIASES = {
    "rlnMicrographPixelSize": ("rlnMicrographOriginalPixelSize",),
    "rlnCtfDataAreCtfPremultiplied": ("rlnDataAreCtfPremultiplied",),
    "rlnCtfDataArePhaseFlipped": ("rlnDataArePhaseFlipped",),
    "particle_y": ("pick_y",),
    "particle_x": ("pick_x",),
}
OLD = ("rlnDetectorPixelSize", "rlnMagnification", "rlnOriginX", "rlnOriginY")
"""Columns of RELION 3.0 whose values are converted."""
OF_TOMOGRAMS = ("rlnTomoName", "rlnCoordinateZ")
TEXT = tuple(c.relion for c in (*COLUMNS, *OPTICS) if c.dtype == "str")
WHOLE = tuple(c.relion for c in (*COLUMNS, *OPTICS) if c.dtype == "i8")
PARTICLE_ID = "cryodaskParticleId"
_KNOWN = (*(c.relion for c in (*COLUMNS, *OPTICS)), *KEPT, *(a for names in ALIASES.values() for a in names), *OLD, *OF_TOMOGRAMS)
_BY_SMALL = {name.lower(): name for name in (*_KNOWN, "optics", "particles", "images", "micrographs", "movies")}
SIDE = frozenset(
    {
        *("ctf_resolution_angstrom", "ctf_figure_of_merit", "total_motion", "early_motion", "pick_score"),
        *("class_probability", "log_likelihood", "ctf_b_factor_angstrom2", "ctf_scale_factor"),
    }
)
"""Columns that no result depends on: whatever is not a number there is a missing value."""
NONE = {"class_number": 0, "half_set": 0}
"""Integers of RELION that mean that there is no value."""

_UID = re.compile(r"[0-9]{6,21}_(?=.)")
_OF_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def canonical(name: str) -> str:
    """RELION's spelling of the name of a column or table, which are the same in any case, as in CIF; unknown ones as they are."""
    return _BY_SMALL.get(name.lower(), name)


def stem(name: str) -> str:
    """The name of a file without its folder and extension; EPU and SerialEM write paths of Windows."""
    return (PureWindowsPath if _OF_WINDOWS.match(name) else PurePosixPath)(name).stem


def bare(name: str) -> str:
    """A file name without the number that cryoSPARC puts before it (``000123_name``, or a uid of up to 21 digits)."""
    return _UID.sub("", name, count=1) if _UID.match(name) else name
