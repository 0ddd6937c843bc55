"""Registry of every stored quantity: name, dimensions, type, unit and description.

Dimension words are the same everywhere: ``micrograph`` (one exposure: its movie and its sum), ``frame, y, x, z, axis`` (y, x),
``patch, slot`` (a particle within its micrograph), ``particle, class, half, shell`` and so on. Arrays are ``(..., y, x)``; rows and
columns are in the frame of MRC files (TIFF pages are flipped in y on reading, as RELION does), pixel 0 is the centre of the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

SLOTS = 4096
"""Maximum number of picks per micrograph."""
PROFILE_REACH_DIAMETERS = 0.9
"""Radius to which the profile of a picked particle is learnt."""


@dataclass(frozen=True)
class Var:
    """One variable of the vocabulary.

    ``kind``: a ``column`` (at most 8 KiB per item) and a ``table`` (up to 256 KiB) are in the commit record, ``bulk`` is in a shard file.
    ``chunk``: inner chunk of a bulk variable, 0 = the whole axis. ``dtype`` "input" = that of the first item read.
    A column with dimension ``slot`` is ragged: its length differs from micrograph to micrograph.
    """

    name: str
    dims: tuple[str, ...]
    dtype: str
    units: str
    doc: str
    kind: Literal["column", "table", "bulk"] = "column"
    chunk: tuple[int, ...] = ()
    part: str = ""
    """``product.part`` that it belongs to (see products.py); empty for registry facts of an exposure."""
    rounded: bool = False
    """Bulk floats whose stage rounds them to a small part of their noise, so that they are worth compressing."""

    @property
    def ragged(self) -> bool:
        """Whether it has one value per particle, so that its length differs from micrograph to micrograph."""
        return self.dims[:1] in (("slot",), ("particle",))

    @property
    def per_particle(self) -> bool:
        """Whether it has one value per particle of a particle set."""
        return self.dims[:1] == ("particle",)

    def dims_in(self, *, per_item: bool) -> tuple[str, ...]:
        """Its dimensions in a result: particles are slots of their exposure (per item), or rows of a set."""
        return (("slot" if per_item else "particle"), *self.dims[1:]) if self.ragged else self.dims


VARIABLES: dict[str, Var] = {}
_RECALLED: set[str] = set()


def register(variables: Iterable[Var], part: str = "") -> None:
    """Add variables to the vocabulary, as columns of ``part``; a second definition of a name must equal the first."""
    for var in variables:
        var = replace(var, part=var.part or part)
        if var.name in _RECALLED:
            _RECALLED.discard(var.name)
            del VARIABLES[var.name]
        if VARIABLES.setdefault(var.name, var) != var:
            raise ValueError(f"variable {var.name!r} is already defined differently: {VARIABLES[var.name]}")


def described(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Variables as a stored result describes them."""
    return {name: asdict(VARIABLES[name]) for name in names}


def recall(descriptions: Mapping[str, Mapping[str, Any]]) -> None:
    """Register variables of a stored result whose stage is not installed; a package's own definition takes precedence."""
    for name, about in descriptions.items():
        if name not in VARIABLES:
            VARIABLES[name] = Var(**{**about, "dims": tuple(about["dims"]), "chunk": tuple(about["chunk"])})
            _RECALLED.add(name)


def _scalars(rows: Iterable[tuple[str, str, str]], dtype: str = "f8") -> list[Var]:
    return [Var(name, (), dtype, units, doc) for name, units, doc in rows]


# --- exposures
register(
    [
        Var("movie_path", (), "U", "", "movie file"),
        Var("eer_dose_per_frame", (), "f8", "electron/angstrom^2", "exposure of a camera frame of EER movies by the project file"),
        Var("micrograph_path", (), "U", "", "motion-corrected micrograph, MRC file"),
        Var("coordinates_path", (), "U", "", "STAR file of the micrograph's picks"),
        Var("particles_path", (), "U", "", "STAR file of particles"),
        Var("micrograph_name", (), "U", "", "name of the micrograph in that STAR file"),
        Var("pick_edits", (), "table", "", "edits of the picks of an exposure by a person; never stored"),
        Var("foreign_values", (), "table", "", "what another project knows of an exposure; never stored"),
        Var("particle_rows", (), "table", "", "rows of a particle table that belong to an exposure; never stored"),
    ]
)
register(
    [
        Var("movie", ("frame", "y", "x"), "input", "electron", "raw counts", "bulk", (1, 0, 0)),
        Var("gain", ("y", "x"), "f4", "1", "gain reference: multiplies the counts"),
        Var("mean_count", (), "f8", "electron/pixel", "mean count per pixel and frame, before the gain"),
        Var("frames_per_fraction", (), "i4", "1", "camera frames summed in a frame of the movie when it was read (EER); else 1"),
        Var("dose_per_fraction", (), "f8", "electron/angstrom^2", "exposure of a frame that is a sum of camera frames (EER); else NaN"),
    ],
    "exposures.frames",
)
register(
    _scalars(
        [
            ("voltage_kv", "kV", "acceleration voltage"),
            ("spherical_aberration_mm", "mm", "spherical aberration Cs"),
            ("amplitude_contrast", "1", "amplitude contrast Q, as a fraction"),
            ("pixel_size_angstrom", "angstrom", "pixel size of the micrograph"),
        ]
    ),
    "exposures.optics",
)
register(
    _scalars(
        [
            ("dose_per_frame", "electron/angstrom^2", "exposure of one movie frame"),
            ("pre_exposure", "electron/angstrom^2", "exposure before the first frame"),
        ]
    ),
    "exposures.dose",
)
register(
    [
        Var("micrograph_sum", ("y", "x"), "f4", "electron", "aligned sum of all frames", "bulk", (512, 512), rounded=True),
        Var("micrograph_dw", ("y", "x"), "f4", "electron", "aligned sum, dose-weighted", "bulk", (512, 512), rounded=True),
    ],
    "exposures.micrograph",
)
register(
    [
        Var(
            "micrograph_preview",
            ("preview", "preview_y", "preview_x"),
            "u1",
            "1",
            "to look at: the sum of all frames, and its power spectrum, both small and 8-bit",
            "bulk",
            (1, 0, 0),
        )
    ]
)
register(
    [
        Var("frame_shift", ("frame", "axis"), "f4", "angstrom", "displacement of the specimen, mean over frames zero"),
        Var("patch_position", ("patch", "axis"), "f4", "pixel", "centres of the local-motion grid, rows and columns"),
        Var("patch_shift", ("patch", "frame", "axis"), "f4", "angstrom", "displacement of the specimen at the patches, mean zero", "table"),
        Var("motion_polynomial", ("coefficient",), "f8", "pixel", "RELION's 2 x 18 coefficients of the local motion, X first"),
        Var("total_motion", (), "f8", "angstrom", "path length of the whole-frame trajectory"),
        Var("early_motion", (), "f8", "angstrom", "its length in the first 4 electrons per square angstrom"),
        Var("hot_pixel_count", (), "i8", "1", "defect pixels repaired"),
        Var(
            "still_pattern_share",
            (),
            "f8",
            "1",
            "power of a pattern that stands still while the specimen moves, over that of the noise of a frame at fine detail; 0 if none",
        ),
        Var("hot_pixel", ("defect", "axis"), "i2", "pixel", "rows and columns of repaired pixels, without those whose gain is 0", "table"),
    ],
    "exposures.field",
)
register(
    _scalars(
        [
            ("defocus_u_angstrom", "angstrom", "defocus along the astigmatism angle, underfocus positive"),
            ("defocus_v_angstrom", "angstrom", "defocus across the astigmatism angle"),
            ("defocus_angle_deg", "degree", "direction of defocus u, from +x towards +y"),
            ("phase_shift_deg", "degree", "phase shift of a phase plate"),
        ]
    ),
    "exposures.ctf",
)
register(
    [
        *_scalars(
            [
                ("ctf_resolution_angstrom", "angstrom", "resolution to which the fit agrees with the rings"),
                ("ctf_figure_of_merit", "1", "correlation of the fitted rings with the spectrum"),
                ("ice_ring_excess", "1", "power about 3.90 or 3.66 A, rings of crystalline ice, over its smooth background, minus 1"),
                ("ctf_alternative_defocus_angstrom", "angstrom", "mean defocus of the best fit elsewhere"),
                ("ctf_alternative_score", "1", "score of the alternative over that of the fit: near 1 is a warning"),
            ]
        ),
        Var("spectrum_frequency", ("shell",), "f4", "1/angstrom", "frequencies of the averaged spectrum"),
        Var("spectrum_average", ("shell",), "f4", "1", "equi-phase average of the spectrum, background removed"),
        Var("spectrum_fit", ("shell",), "f4", "1", "fitted CTF squared at the same frequencies"),
        Var("spectrum_image", ("ky", "kx"), "f2", "1", "power spectrum, background removed, zero frequency at n//2", "bulk"),
    ],
    "exposures.ctf_quality",
)

register(
    [Var("relion_optics", (), "U", "", "beam tilt, aberrations, magnification and MTF of RELION's optics group, JSON; no stage uses them")],
    "exposures.aberrations",
)

# --- particles, exposure by exposure
register(
    [
        Var("particle_id", ("slot",), "i8", "1", "identity of the particle (birth, exposure, number, copy); never changes"),
        Var("particle_half", ("slot",), "i1", "1", "gold-standard half-set, 0 or 1, assigned at birth"),
        Var("natural_key", ("slot",), "i8", "1", "hash of the particle's name in its source"),
        Var("pick_y", ("slot",), "f4", "pixel", "row of the particle's centre in the micrograph"),
        Var("pick_x", ("slot",), "f4", "pixel", "column of the particle's centre in the micrograph"),
    ],
    "particles.position",
)
register(
    [
        Var("pick_score", ("slot",), "f4", "1", "normalised correlation with the learnt radial template, or the best of the given ones"),
        Var("cryosparc_uid", ("slot",), "i8", "1", "uid of the particle in cryoSPARC, its 64 bits as a signed integer; 0 if it has none"),
        Var("pick_accepted", ("slot",), "i1", "1", "1 if the score is above the threshold"),
        Var("pick_threshold", (), "f8", "1", "score above which peaks are accepted"),
        Var("pick_chance", (), "f8", "1", "highest score of a peak of noise with the power spectrum of the micrograph"),
        Var("pick_excess_skew", (), "f8", "1", "third moment of the score map, minus that of such noise"),
        Var("pick_count", (), "i8", "1", "peaks accepted"),
        Var(
            "pick_profile",
            ("radius",),
            "f4",
            "1",
            f"learnt radial profile to {PROFILE_REACH_DIAMETERS} diameters, positive: brighter than the surroundings",
        ),
        Var(
            "excluded_regions",
            ("cell_y", "cell_x"),
            "i1",
            "1",
            "1 where contamination, crystals or carbon cover most of a cell of the exposure",
        ),
        Var("excluded_share", (), "f8", "1", "share of the exposure that they cover"),
        Var("pick_excluded_count", (), "i8", "1", "peaks above the threshold on them, or half a diameter around; never accepted"),
    ],
    "particles.score",
)
register(
    [
        Var(
            "particle_image",
            ("slot", "y", "x"),
            "f4",
            "1",
            "boxed particle, protein white, background mean 0 and sd 1",
            "bulk",
            (16, 0, 0),
        ),
        Var("particle_y", ("slot",), "f4", "pixel", "row of the box's centre in the micrograph"),
        Var("particle_x", ("slot",), "f4", "pixel", "column of the box's centre in the micrograph"),
        Var("image_giver", ("particle",), "i2", "1", "which of several extractions holds the image"),
        Var("image_row", ("particle",), "i8", "1", "row of the exposure whose shard has the image"),
        Var("image_slot", ("particle",), "i4", "1", "its place in that shard"),
        Var("particle_count", (), "i8", "1", "particles extracted"),
        Var("subtraction_contrast", (), "f8", "1", "contrast of the particles of an exposure, relative to the map that was subtracted"),
        Var("subtracted_share", (), "f8", "1", "share of the signal that was subtracted"),
        Var("particle_pixel_size_angstrom", (), "f8", "angstrom", "pixel size of the particle images"),
    ],
    "particles.image",
)
register(
    [
        Var("particle_defocus_u_angstrom", ("slot",), "f4", "angstrom", "defocus u of the particle, where it has its own"),
        Var("particle_defocus_v_angstrom", ("slot",), "f4", "angstrom", "defocus v of the particle"),
        Var("particle_defocus_angle_deg", ("slot",), "f4", "degree", "astigmatism angle of the particle"),
        Var("particle_phase_shift_deg", ("slot",), "f4", "degree", "phase shift of the particle"),
        Var("ctf_b_factor_angstrom2", ("slot",), "f4", "angstrom^2", "B factor of the particle from another program; no stage uses it"),
        Var("ctf_scale_factor", ("slot",), "f4", "1", "scale factor of the particle from another program; no stage uses it"),
        Var("beam_tilt_x_mrad", ("particle",), "f4", "mrad", "beam tilt along x, in RELION's sign"),
        Var("beam_tilt_y_mrad", ("particle",), "f4", "mrad", "beam tilt along y, in RELION's sign"),
        Var("trefoil_x_angstrom3", ("particle",), "f4", "angstrom^3", "trefoil: phase error x |k|^3 cos 3 theta, k in 1/angstrom"),
        Var("trefoil_y_angstrom3", ("particle",), "f4", "angstrom^3", "trefoil: phase error y |k|^3 sin 3 theta"),
        Var("tetrafoil_x_angstrom4", ("particle",), "f4", "angstrom^4", "tetrafoil: adds x |k|^4 cos 4 theta to the argument of the CTF"),
        Var("tetrafoil_y_angstrom4", ("particle",), "f4", "angstrom^4", "tetrafoil: adds y |k|^4 sin 4 theta"),
        Var("magnification_xx", ("particle",), "f4", "1", "magnification matrix M: the image at k shows the projection at M k"),
        Var("magnification_xy", ("particle",), "f4", "1", "magnification matrix, off the diagonal"),
        Var("magnification_yy", ("particle",), "f4", "1", "magnification matrix, along y"),
    ],
    "particles.ctf",
)

ABERRATIONS = (
    *("beam_tilt_x_mrad", "beam_tilt_y_mrad", "trefoil_x_angstrom3", "trefoil_y_angstrom3"),
    *("tetrafoil_x_angstrom4", "tetrafoil_y_angstrom4", "magnification_xx", "magnification_xy", "magnification_yy"),
)
"""What CTF refinement finds for an optics group; every particle of the group has the same values."""

CTF_COLUMNS = ("defocus_u_angstrom", "defocus_v_angstrom", "defocus_angle_deg", "phase_shift_deg")
"""What describes the CTF of an exposure or particle, apart from the optics."""
OPTICS = ("voltage_kv", "spherical_aberration_mm", "amplitude_contrast")
"""What the exposures of a data set share."""


@dataclass(frozen=True)
class Limits:
    """What physics and instruments allow of a quantity."""

    least: float
    most: float
    unit: str

    def hold(self, value: Any) -> Any:
        """Whether a value, or each of an array, lies within the limits; NaN does not."""
        return (value >= self.least) & (value <= self.most)

    def __str__(self) -> str:
        return f"between {self.least:g} and {self.most:g}{' ' + self.unit if self.unit else ''}"


LIMITS = {
    "voltage_kv": Limits(20, 3000, "kV"),
    "spherical_aberration_mm": Limits(0, 20, "mm"),
    "amplitude_contrast": Limits(0, 1, ""),
    "pixel_size_angstrom": Limits(0.05, 100, "A"),
    "particle_pixel_size_angstrom": Limits(0.05, 100, "A"),
    "defocus_u_angstrom": Limits(-500_000, 500_000, "A"),
    "defocus_v_angstrom": Limits(-500_000, 500_000, "A"),
    "phase_shift_deg": Limits(-360, 360, "degrees"),
    **dict.fromkeys(("defocus_angle_deg", "rot_deg", "tilt_deg", "psi_deg"), Limits(-1000, 1000, "degrees")),  # any turn, but no defocus
    "particle_y": Limits(-10_000_000, 10_000_000, "pixels"),
    "particle_x": Limits(-10_000_000, 10_000_000, "pixels"),
    "origin_y_angstrom": Limits(-100_000, 100_000, "A"),
    "origin_x_angstrom": Limits(-100_000, 100_000, "A"),
    "dose_per_frame": Limits(0, 100, "e/A^2"),  # a whole exposure in one frame has less
    "pre_exposure": Limits(0, 1000, "e/A^2"),
}
"""Limits of quantities, in the project file and in files of other programs."""

# --- particle sets: one value per particle
register(
    [
        Var("half_set", ("particle",), "i1", "1", "gold-standard half-set, 0 or 1, assigned at birth; never changes"),
        Var(
            "position_y_angstrom", ("particle",), "f8", "angstrom", "position of the pick in the exposure, rows, from the centre of pixel 0"
        ),
        Var("position_x_angstrom", ("particle",), "f8", "angstrom", "position of the pick in the exposure, columns"),
    ],
    "particles.position",
)
register(
    [
        Var("class_number", ("particle",), "i4", "1", "2D class, counted from 1; 0 where the particle has none"),
        Var("class_probability", ("particle",), "f4", "1", "posterior probability of that class"),
    ],
    "particles.class2d",
)
register(
    [
        Var("class_psi_deg", ("particle",), "f4", "degree", "in-plane angle against the average of its class"),
        Var("class_centre_y_angstrom", ("particle",), "f8", "angstrom", "centre found by classification, position in the exposure, rows"),
        Var("class_centre_x_angstrom", ("particle",), "f8", "angstrom", "the same, columns"),
        Var("class_origin_y_angstrom", ("particle",), "f4", "angstrom", "shift that moves the particle to the centre of its box, along y"),
        Var("class_origin_x_angstrom", ("particle",), "f4", "angstrom", "the same, along x"),
        Var("class_log_likelihood", ("particle",), "f4", "1", "log-likelihood gain over an empty image, against its class"),
    ],
    "particles.alignment2d",
)
register(
    [
        Var("rot_deg", ("particle",), "f4", "degree", "first Euler angle (ZYZ, RELION's AngleRot)"),
        Var("tilt_deg", ("particle",), "f4", "degree", "second Euler angle"),
        Var("psi_deg", ("particle",), "f4", "degree", "third Euler angle, in plane"),
        Var("centre_y_angstrom", ("particle",), "f8", "angstrom", "refined centre, position in the exposure, rows"),
        Var("centre_x_angstrom", ("particle",), "f8", "angstrom", "the same, columns"),
        Var("origin_y_angstrom", ("particle",), "f4", "angstrom", "shift that moves the particle to the centre of its box, along y"),
        Var("origin_x_angstrom", ("particle",), "f4", "angstrom", "shift that moves the particle to the centre of its box, along x"),
        Var("log_likelihood", ("particle",), "f4", "1", "log-likelihood gain over an empty image"),
        Var("in_map", ("particle",), "?", "1", "whether the particle is in the map: False if the map does not explain it"),
    ],
    "particles.pose",
)
register(
    [
        Var("unmatched_count", (), "i8", "1", "particles of the matched set without a partner"),
        Var("half_conflict_count", (), "i8", "1", "pairs of matched particles that belong to different half-sets"),
        Var("exposure_row", ("exposure",), "i8", "1", "rows of the exposures that a selection keeps"),
        Var("dropped_row", ("dropped",), "i8", "1", "rows of the exposures that it leaves out"),
        Var("left_out_id", ("left_out",), "i8", "1", "particles of an exposure that were left out"),
        Var("left_out_reason", ("left_out",), "i1", "1", "why: number of the reason in the stage's list"),
        Var("dropped_id", ("dropped",), "i8", "1", "particles of the input that the step left out"),
        Var("removal_reason", ("dropped",), "i1", "1", "why: number of the rule that left the particle out"),
    ]
)
register([Var("annotation", ("particle",), "f8", "1", "a column added by the user")], "particles.note")
register(
    [
        Var("aberration_count", ("optics_group",), "i8", "1", "particles of each optics group whose CTF was refined"),
        Var("aberration_fitted", ("optics_group",), "?", "1", "whether they are enough for its aberrations to be fitted"),
        Var("aberration_value", ("optics_group", "aberration"), "f8", "1", "fitted aberrations, in the order and units of the columns"),
        Var("aberration_deviation", ("optics_group", "aberration"), "f8", "1", "their standard deviations; NaN: not fitted"),
        Var("defocus_change_angstrom", ("particle",), "f4", "angstrom", "refined minus earlier mean defocus of each particle"),
        Var("defocus_spread_angstrom", (), "f8", "angstrom", "estimated spread of the particles' defocus about that of their micrograph"),
        Var("refinement_frequency", ("shell",), "f8", "1/angstrom", "frequency of each Fourier shell"),
        Var("fsc_before", ("shell",), "f8", "1", "FSC of masked half-maps before the refinement of the CTF"),
        Var("fsc_after", ("shell",), "f8", "1", "FSC of masked half-maps after it, at the same poses"),
        Var("resolution_before_angstrom", (), "f8", "angstrom", "where the former falls below 0.143"),
        Var("resolution_after_angstrom", (), "f8", "angstrom", "where the latter falls below 0.143"),
    ]
)

register(
    [
        Var("class3d_number", ("particle",), "i4", "1", "3D class, counted from 1; 0 where the particle has none"),
        Var("class3d_probability", ("particle",), "f4", "1", "posterior probability of that class"),
    ],
    "particles.class3d",
)
register(
    [
        Var("class3d_share", ("class",), "f8", "1", "share of the particles in each 3D class: mean posterior probability"),
        Var("class3d_resolution_angstrom", ("class",), "f8", "angstrom", "resolution of the half-maps of each 3D class"),
        Var("class3d_confusion", ("class", "other_class"), "f8", "1", "expected share of a class (first axis) put into another one"),
        Var("class3d_separation", ("class", "other_class"), "f8", "1", "mean d^2 between the images of two classes, in units of noise"),
        Var("iteration_class_share", ("iteration", "class"), "f8", "1", "share of each class after each iteration"),
        Var("iteration_changed_share", ("iteration",), "f8", "1", "share of the particles that changed class in each iteration"),
        Var("start_score", ("start",), "f8", "nat", "mean log-likelihood per particle of the classification from each start"),
        Var("class_gain", (), "f8", "nat", "gain of log-likelihood per particle by the classes of the other half-set over the consensus"),
        Var("class_gain_z", (), "f8", "1", "gain of log-likelihood by the classes of the other half-set, in standard errors"),
    ]
)

register(
    [Var(f"component{j}", ("particle",), "f4", "1", f"coordinate along component {j} of an analysis of variability") for j in range(1, 7)],
    "particles.components",
)
register(
    [
        Var(
            "component_map", ("component", "z", "y", "x"), "f4", "1", "maps of the components, per standard deviation", "bulk", (1, 0, 0, 0)
        ),
        Var(
            "component_series",
            ("component", "step", "z", "y", "x"),
            "f4",
            "1",
            "maps along each component, from -2 to 2 standard deviations",
            "bulk",
            (1, 1, 0, 0, 0),
        ),
        Var("component_strength", ("component",), "f8", "1", "norm of each component"),
        Var("component_agreement", ("component",), "f8", "1", "canonical correlations of the components of the half-sets alone"),
        Var("component_gain", (), "f8", "nat", "log-likelihood per particle that the components explain"),
    ]
)

# --- averages, maps and curves
register(
    [
        Var("class_average", ("class", "y", "x"), "f4", "1", "2D class averages", "bulk", (1, 0, 0)),
        Var("class_share", ("class",), "f4", "1", "share of the particles in the class"),
        Var("class_pixel_size_angstrom", (), "f8", "angstrom", "pixel size of the class averages"),
    ],
    "classes.averages",
)
register(
    [
        Var("class_resolution_angstrom", ("class",), "f4", "angstrom", "resolution of the class average"),
        Var("class_score", ("class",), "f4", "1", "quality of the class, 0 junk to 1 best"),
    ],
    "classes.scores",
)
register(
    [
        Var("to_final_map", ("z", "y", "x"), "f4", "1", "map of the input 'to'; never stored", "bulk"),
        Var("to_map_pixel_size_angstrom", (), "f8", "angstrom", "voxel size of that map; never stored"),
        Var("maps_final_map", ("z", "y", "x"), "f4", "1", "maps of the input 'maps', a list; never stored", "bulk"),
        Var("maps_map_pixel_size_angstrom", (), "f8", "angstrom", "voxel sizes of these maps; never stored"),
    ]
)
register(
    [
        Var("final_map", ("z", "y", "x"), "f4", "1", "map of all particles, unsharpened", "bulk"),
        Var("map_pixel_size_angstrom", (), "f8", "angstrom", "voxel size of the map"),
        Var("class_map", ("class", "z", "y", "x"), "f4", "1", "map of each 3D class, unsharpened", "bulk", (1, 0, 0, 0)),
        Var("chain_score", ("chain",), "f8", "1", "mean log-likelihood per particle of each restart"),
    ],
    "map.final",
)
register(
    [
        Var("half_map", ("half", "z", "y", "x"), "f4", "1", "unmasked, unsharpened half-maps", "bulk", (1, 0, 0, 0)),
        Var(
            "class_half_map",
            ("class", "half", "z", "y", "x"),
            "f4",
            "1",
            "unmasked, unsharpened half-maps of each 3D class",
            "bulk",
            (1, 1, 0, 0, 0),
        ),
    ],
    "map.half_maps",
)
register(
    [
        Var("shell_resolution_angstrom", ("shell",), "f8", "angstrom", "resolution of each Fourier shell"),
        Var("fsc_unmasked", ("shell",), "f8", "1", "FSC of the unmasked half-maps"),
        Var("fsc_masked", ("shell",), "f8", "1", "FSC of the masked half-maps"),
        Var("fsc_randomised", ("shell",), "f8", "1", "FSC of the masked half-maps with random phases"),
        Var("fsc_corrected", ("shell",), "f8", "1", "FSC corrected for the mask (Chen et al. 2013)"),
        Var("noise_correlation", (), "f8", "1", "correlation of the half-maps in their solvent; 0 if independent, NaN if unknown"),
        Var(
            "resolution_angstrom",
            (),
            "f8",
            "angstrom",
            "first interpolated crossing of 0.143 by the corrected FSC, within the shells that exceed noise",
        ),
        Var("iteration_resolution_angstrom", ("iteration",), "f8", "angstrom", "supported resolution after each iteration"),
    ],
    "map.fsc",
)
register(
    [
        Var("succeeded", (), "?", "1", "whether the evidence, which needs no ground truth, supports the map"),
        Var("pose_certainty", (), "f8", "1", "mean share of a particle's likeliest pose in its posterior, at the first decisive pass"),
        Var("held_out_gain", (), "f8", "nat", "gain in log-likelihood per unseen particle from detail finer than the starting map"),
        Var("held_out_z", (), "f8", "1", "gain from detail finer than the starting map, in standard errors"),
        Var("explained_share", (), "f8", "1", "share of the particles' explainable signal that the map of the other half explains"),
        Var("fourier_coverage", ("shell",), "f8", "1", "share of each Fourier shell that the views cover"),
        Var("view_coverage", (), "f8", "1", "share of the Fourier shell at the resolution of the half-maps that the views cover"),
        Var("cut_share", (), "f8", "1", "share of the half-maps' common power outside the spherical mask"),
        Var("iteration_log_likelihood", ("iteration",), "f8", "nat", "mean log-likelihood per particle in each iteration"),
        Var(
            "iteration_certainty",
            ("iteration",),
            "f8",
            "1",
            "mean share of a particle's likeliest pose in each iteration; NaN: poses were drawn",
        ),
    ],
    "map.verdict",
)
register(
    [
        Var("sharpened_map", ("z", "y", "x"), "f4", "1", "sharpened and low-passed map", "bulk"),
        Var("b_factor_angstrom2", (), "f8", "angstrom^2", "B-factor applied to the map; negative sharpens"),
        Var(
            "log_amplitude",
            ("shell",),
            "f8",
            "1",
            "ln of the mean amplitude of the unmasked mean map, weighted by its FSC; NaN where there is none",
        ),
        Var(
            "log_amplitude_fitted",
            ("shell",),
            "f8",
            "1",
            "line through it whose slope is a quarter of the fitted B-factor; NaN outside the fit",
        ),
        Var("local_resolution_angstrom", ("z", "y", "x"), "f4", "angstrom", "resolution about each voxel", "bulk"),
        Var("local_resolution_percentile", ("percentile",), "f8", "angstrom", "its 5th, 25th, 50th, 75th and 95th percentile in the mask"),
    ],
    "map.view",
)
register(
    [
        Var("cone_axis", ("cone", "axis3"), "f8", "1", "axes of the cones, x, y, z"),
        Var("cone_fsc", ("cone", "shell"), "f8", "1", "FSC of the half-maps in a cone of 20 degrees about each axis"),
        Var("cone_resolution_angstrom", ("cone",), "f8", "angstrom", "where it first falls below 0.143"),
        Var("cone_frequency", ("shell",), "f8", "1/angstrom", "frequency of each Fourier shell"),
        Var("cone_area_ratio", (), "f8", "1", "least over largest area under the cones' FSC"),
        Var("view_sampling", (), "f8", "1", "harmonic mean of the sampling of directions by the views; 1 if even, NaN if unknown"),
        Var("unreached_share", (), "f8", "1", "share of directions that no view samples; NaN if unknown"),
    ]
)
register(
    [
        Var(
            "model_file",
            ("byte",),
            "u1",
            "1",
            "an atomic model, mmCIF; coordinates in Angstrom from the centre of voxel 0 of the map",
            "bulk",
        ),
        Var("dock_hand", (), "U", "", "hand of the map by docking: right, mirrored or unknown"),
        Var("dock_correlation", (), "f8", "1", "mean correlation of the shells with the map, at the best pose"),
        Var("dock_correlation_mirrored", (), "f8", "1", "the same with the mirror image of the map"),
        Var("dock_resolution_angstrom", (), "f8", "angstrom", "resolution of the map that was assumed"),
        Var("dock_rotation", ("axis3", "axis3b"), "f8", "1", "rotation of the model's coordinates, to their left"),
        Var("dock_shift_angstrom", ("axis3",), "f8", "angstrom", "what is added after the rotation, x, y, z"),
        Var("built_residues", (), "i8", "1", "residues that a program has built into the map"),
        Var("built_chains", (), "i8", "1", "chains that they form"),
        Var("moved_angstrom", (), "f8", "angstrom", "root mean square distance that a refinement has moved the atoms"),
    ],
    "model.atoms",
)
register(
    [
        Var("model_fsc", ("shell",), "f8", "1", "FSC of the map with the model's density under the model's mask"),
        Var("model_frequency", ("shell",), "f8", "1/angstrom", "frequency of each Fourier shell"),
        Var("model_resolution_angstrom", (), "f8", "angstrom", "where that falls below 0.5"),
        Var("residue_name", ("residue",), "U", "", "chain, residue name and number of each residue of the model"),
        Var("residue_correlation", ("residue",), "f4", "1", "local correlation of map and model, mean over the residue's atoms"),
        Var("residue_kind", ("residue",), "U", "", "protein, nucleic acid or other"),
        Var("residue_q", ("residue",), "f4", "1", "Q-score, mean over the residue's atoms; NaN if not computed"),
        Var("residue_q_expected", ("residue",), "f4", "1", "the same in a map of the same spectrum that agrees with the model"),
        Var("atom_residue", ("atom",), "i4", "1", "row of the residue of each atom that was scored", "bulk"),
        Var("atom_q", ("atom",), "f4", "1", "Q-score of each atom (Pintilie et al. 2020); NaN if not computed", "bulk"),
        Var("q_resolution_angstrom", (), "f8", "angstrom", "resolution of the map that decided whether Q-scores mean anything"),
        Var("q_missing", (), "U", "", "why there are no Q-scores; empty if there are"),
        Var("q_map", (), "U", "", "map that was scored: sharpened or unsharpened"),
        Var("element_name", ("element",), "U", "", "chain, first and last residue of each helix or strand"),
        Var("element_kind", ("element",), "U", "", "helix or strand"),
        Var("element_first", ("element",), "i4", "1", "row of its first residue"),
        Var("element_last", ("element",), "i4", "1", "row of its last residue"),
        Var("element_correlation", ("element",), "f4", "1", "mean local correlation of its residues"),
        Var("element_q", ("element",), "f4", "1", "mean Q-score of its residues; NaN if not computed"),
        Var("element_source", (), "U", "", "where helices and strands are from: file, CA atoms (P-SEA) or both; empty if there are none"),
        Var("waters_left_out", (), "i8", "1", "atoms of waters in the model's file"),
        Var("hydrogens_left_out", (), "i8", "1", "hydrogens in the model's file"),
        Var("alternates_left_out", (), "i8", "1", "atoms of second and further conformations in the model's file"),
    ]
)
register([Var("solvent_mask", ("z", "y", "x"), "f4", "1", "soft mask around the molecule", "bulk")], "mask.mask")
