"""Names of columns in RELION and in cryodask.

``COLUMNS`` is the one table of names; ``OPTICS`` lists what RELION writes once per optics group.
"""

from __future__ import annotations

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
    Column("cryosparc_uid", "cryosparcUid", "str"),
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
)
ALIASES = {
    "rlnMicrographPixelSize": ("rlnMicrographOriginalPixelSize",),
    "particle_y": ("pick_y",),
    "particle_x": ("pick_x",),
}
TEXT = tuple(c.relion for c in (*COLUMNS, *OPTICS) if c.dtype == "str")
WHOLE = tuple(c.relion for c in (*COLUMNS, *OPTICS) if c.dtype == "i8")
PARTICLE_ID = "cryodaskParticleId"
