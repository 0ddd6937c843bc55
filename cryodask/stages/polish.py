"""Stage ``polish``: the motion of a movie refined with its particles and their map, new sums and new particle images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from cryodask.formats.gain import on_frames
from cryodask.stage import AddedMark, Context, EffortMark, Frames, Output, Params, Picture, Resources, Sizes, port, stage
from cryodask.stages.extract import REASONS, ExtractParams
from cryodask.stages.motion import NODES, check_binning, exposure_of_frame, micrograph_sizes
from cryodask.vocabulary import ABERRATIONS, Var, register

if TYPE_CHECKING:
    import xarray as xr

PRIORS = ("that of motion", "residual", "absolute")
"""How the field was found: kept, or fitted with a prior on its difference from that of ``motion``, or on the displacement itself."""
_IMAGES = 9

register(
    [Var("signal_amount", ("slot",), "f4", "1", "share of its expected signal that a particle shows in the frames, 1 on average")],
    "particles.quality",
)
register(
    [
        Var("patch_shift_before", ("patch", "frame", "axis"), "f4", "angstrom", "displacement of the specimen before polishing", "table"),
        Var("frame_exposure", ("frame",), "f8", "electron/angstrom^2", "exposure at the middle of each frame", "table"),
        Var("frame_correlation", ("frame", "shell"), "f4", "1", "sum over particles of Re conj(V) X, V the reference", "table"),
        Var("frame_power", ("frame", "shell"), "f4", "1", "sum over particles of |X|^2 in each frame", "table"),
        Var("reference_power", ("shell",), "f8", "1", "sum over particles of |V|^2"),
        Var("expected_decay", ("frame", "shell"), "f4", "1", "loss of log amplitude by damage as published: N / (2 Ne)", "table"),
        Var("signal_before", ("shell",), "f8", "1", "dose-weighted correlation of the particles with their reference before polishing"),
        Var("signal_recentred", ("shell",), "f8", "1", "the same with new centres and the motion from before"),
        Var("signal_blind", ("shell",), "f8", "1", "the same with motion found without the particle's own half-set"),
        Var("signal_after", ("shell",), "f8", "1", "the same after polishing"),
        Var("polish_particles", (), "i8", "1", "particles that look like the map, and decide the motion"),
        Var("polish_prior", (), "U", "", "how the motion was found"),
        Var("motion_change_angstrom", (), "f8", "angstrom", "difference of the motion at the particles before and after, rms"),
        Var("motion_deviation_angstrom", (), "f8", "angstrom", "expected error of the motion at the particles, rms"),
    ]
)


class PolishParams(Params):
    """Parameters of ``polish``."""

    box: int = Field(description="box size of the new images in the micrograph, pixels, even", ge=8)
    scale_to: int | None = Field(
        None, description="box size of the images, pixels, even; the box is downscaled to it in Fourier space", ge=8
    )
    background_diameter_angstrom: float | None = Field(
        None, description="diameter outside which the background is measured, Angstrom; by default 3/4 of the box", gt=0
    )
    invert: bool = Field(True, description="protein is dark in the movie, white in particle images")
    finest_angstrom: float = Field(6.0, gt=1.0, le=30.0, description="finest detail compared with the map, Angstrom")
    damage_scale: float = Field(
        1.0, gt=0.0, le=10.0, description="factor on the exposure in the weights of the frames; the report shows what the session says"
    )
    binning: Annotated[Literal[1, 2], AddedMark] = Field(1, description="pixels of the movie per pixel of the micrograph, as in motion")
    rounds: int = Field(3, ge=1, le=10, description="number of times that displacements are measured and smoothed")
    frames_in_memory_mb: Annotated[int, EffortMark] = Field(
        default=512, ge=0, description="memory for the raw frames of a movie, megabytes; larger movies are read twice"
    )

    @model_validator(mode="after")
    def _as_extract(self) -> PolishParams:
        if self.box:
            self.extraction()
        return self

    def extraction(self) -> ExtractParams:
        """How the new images are extracted."""
        shared = ("box", "scale_to", "background_diameter_angstrom", "invert")
        return ExtractParams.model_validate({name: getattr(self, name) for name in shared} | {"recentre": True})


def _sizes(params: PolishParams, sizes: Sizes) -> Sizes:
    size = params.scale_to or params.box
    own = {"particle_image.y": size, "particle_image.x": size}
    return {**micrograph_sizes(sizes, params.binning), "patch": NODES**2, "coefficient": 36, "axis": 2, "preview": 2, **own}


def _memory(params: PolishParams, sizes: Sizes) -> float:
    pixels = float(sizes.get("y", 4096) * sizes.get("x", 4096))
    raw = sizes.get("frame", 40) * pixels
    kept = raw if raw <= params.frames_in_memory_mb * 2**20 else 4.0 * pixels
    # half transforms of 300 particles of 400 Angstrom in all frames, while the sums are not there yet
    products = 300.0 * sizes.get("frame", 40) * 8.0 * 2.0 * (400.0 / params.finest_angstrom) ** 2
    return kept + max(products, _IMAGES * 4.0 * pixels) + 4e8


@stage(
    version=2,
    needs=[
        "movie", "pixel_size_angstrom", "dose_per_frame", "pre_exposure", "voltage_kv", "spherical_aberration_mm", "amplitude_contrast",
        "defocus_u_angstrom", "defocus_v_angstrom", "defocus_angle_deg", "phase_shift_deg", "patch_position", "patch_shift",
        "hot_pixel", "particle_id", "half_set", "position_y_angstrom", "position_x_angstrom", "rot_deg", "tilt_deg", "psi_deg",
        "centre_y_angstrom", "centre_x_angstrom", "final_map", "half_map", "map_pixel_size_angstrom", "fsc_corrected",
    ],
    optional=[
        "gain", "dose_per_fraction",
        "solvent_mask", "in_map", "log_likelihood", "particle_defocus_u_angstrom", "particle_defocus_v_angstrom",
        "particle_defocus_angle_deg", "particle_phase_shift_deg", *ABERRATIONS,
    ],
    gives=[
        "micrograph_sum", "micrograph_dw", "micrograph_preview", "frame_shift", "patch_position", "patch_shift", "motion_polynomial",
        "total_motion", "early_motion", "hot_pixel_count", "hot_pixel", "patch_shift_before", "frame_exposure", "frame_correlation",
        "frame_power", "reference_power", "refinement_frequency", "expected_decay", "signal_before", "signal_recentred", "signal_blind",
        "signal_after", "polish_particles", "polish_prior", "motion_change_angstrom", "motion_deviation_angstrom", "particle_id",
        "particle_image", "particle_y", "particle_x", "particle_count", "particle_pixel_size_angstrom", "left_out_id", "left_out_reason",
        "rot_deg", "tilt_deg", "psi_deg", "centre_y_angstrom", "centre_x_angstrom", "log_likelihood", "in_map", "signal_amount",
    ],
    ports=[
        "exposures[frames, field, ctf, optics, dose, aberrations?]", "particles[position, pose, ctf?]", "map[final, half_maps, fsc]",
        port("mask?:mask[mask]", default="related"),
    ],
    outputs=[
        Output("exposures", "exposures", ("micrograph", "field"), on="exposures"),
        Output("particles", "particles", ("image", "pose", "quality"), on="particles", subset=True, frame="same"),
    ],
    reasons=REASONS,
    sizes=_sizes,
    resources=Resources(memory=_memory),
)  # fmt: skip
def polish(
    params: PolishParams,
    *,
    movie: Frames,
    pixel_size_angstrom: float,
    dose_per_frame: float,
    voltage_kv: float,
    spherical_aberration_mm: float,
    amplitude_contrast: float,
    defocus_u_angstrom: float,
    defocus_v_angstrom: float,
    defocus_angle_deg: float,
    phase_shift_deg: float,
    patch_position: np.ndarray,
    patch_shift: np.ndarray,
    hot_pixel: np.ndarray,
    particle_id: np.ndarray,
    half_set: np.ndarray,
    position_y_angstrom: np.ndarray,
    position_x_angstrom: np.ndarray,
    rot_deg: np.ndarray,
    tilt_deg: np.ndarray,
    psi_deg: np.ndarray,
    centre_y_angstrom: np.ndarray,
    centre_x_angstrom: np.ndarray,
    final_map: np.ndarray,
    half_map: np.ndarray,
    map_pixel_size_angstrom: float,
    fsc_corrected: np.ndarray,
    dose_per_fraction: float | None = None,
    pre_exposure: float = 0.0,
    gain: np.ndarray | None = None,
    solvent_mask: np.ndarray | None = None,
    in_map: np.ndarray | None = None,
    log_likelihood: np.ndarray | None = None,
    particle_defocus_u_angstrom: np.ndarray | None = None,
    particle_defocus_v_angstrom: np.ndarray | None = None,
    particle_defocus_angle_deg: np.ndarray | None = None,
    particle_phase_shift_deg: np.ndarray | None = None,
    beam_tilt_x_mrad: np.ndarray | None = None,
    beam_tilt_y_mrad: np.ndarray | None = None,
    trefoil_x_angstrom3: np.ndarray | None = None,
    trefoil_y_angstrom3: np.ndarray | None = None,
    tetrafoil_x_angstrom4: np.ndarray | None = None,
    tetrafoil_y_angstrom4: np.ndarray | None = None,
    magnification_xx: np.ndarray | None = None,
    magnification_xy: np.ndarray | None = None,
    magnification_yy: np.ndarray | None = None,
    context: Context,
) -> dict[str, Any]:
    """Refine the motion of a movie with its particles and their map; sum the frames again and extract the particles again.

    The displacement of each particle in each frame is measured against its own half-map, so that the half-sets stay independent:
    Fisher scoring with honest variances, in boxes as long as the map's. A Gaussian process in exposure and position smooths
    them, with an unknown constant per particle, the error of its centre, which is corrected (Zivanov, Nakane & Scheres 2019, with jitter of
    the whole frame). Particles that do not look like the map, on empty ice for example, have no say. With fewer than ten others only
    small differences from the motion found before are allowed, and with none it is kept.

    The new motion replaces that of ``motion``: it is read at the same 9 x 9 nodes, and the frames are warped along it as before. The
    particles keep their ids and half-sets. Centres and images are new, poses are not: refine them next. ``signal_amount`` shows which
    particles do not look like the map (``select``).

    Frames are weighted by their exposure times ``damage_scale``. The report shows the scale that the session's own particles suggest, from
    the correlation of the frames with the reference, with a fall-off of the reference that is free in every shell.
    """
    from cryodask.stages._polish import Poses, Reference, polished

    count = len(particle_id)
    exposure_ctf = {
        "defocus_u_angstrom": (particle_defocus_u_angstrom, defocus_u_angstrom),
        "defocus_v_angstrom": (particle_defocus_v_angstrom, defocus_v_angstrom),
        "defocus_angle_deg": (particle_defocus_angle_deg, defocus_angle_deg),
        "phase_shift_deg": (particle_phase_shift_deg, phase_shift_deg),
    }
    columns = {name: np.full(count, whole) if own is None else np.asarray(own) for name, (own, whole) in exposure_ctf.items()}
    optics = {
        "voltage_kv": voltage_kv, "spherical_aberration_mm": spherical_aberration_mm, "amplitude_contrast": amplitude_contrast,
    }  # fmt: skip
    columns |= {name: np.full(count, value) for name, value in optics.items()}
    aberrations = (
        beam_tilt_x_mrad, beam_tilt_y_mrad, trefoil_x_angstrom3, trefoil_y_angstrom3, tetrafoil_x_angstrom4, tetrafoil_y_angstrom4,
        magnification_xx, magnification_xy, magnification_yy,
    )  # fmt: skip
    columns |= {name: np.asarray(own) for name, own in zip(ABERRATIONS, aberrations) if own is not None}
    poses = Poses(
        np.asarray(particle_id, np.int64), np.asarray(half_set), np.stack([position_y_angstrom, position_x_angstrom], -1).reshape(-1, 2),
        np.stack([centre_y_angstrom, centre_x_angstrom], -1).astype(np.float64).reshape(-1, 2),
        np.stack([rot_deg, tilt_deg, psi_deg], -1).astype(np.float64).reshape(-1, 3),
        np.ones(count, bool) if in_map is None else np.asarray(in_map, bool),
        np.full(count, np.nan) if log_likelihood is None else np.asarray(log_likelihood), columns,
    )  # fmt: skip
    check_binning(params.binning, movie.shape[1:])
    given = Reference(half_map, solvent_mask, fsc_corrected, float(map_pixel_size_angstrom))
    gain = None if gain is None else on_frames(gain, (movie.shape[1], movie.shape[2]))
    return polished(
        params, movie, gain, poses, given, patch_position, patch_shift, hot_pixel,
        pixel_size_angstrom=pixel_size_angstrom, dose_per_frame=exposure_of_frame(dose_per_frame, dose_per_fraction),
        pre_exposure=pre_exposure, voltage_kv=voltage_kv, context=context,
    )  # fmt: skip


@polish.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """Field before and after, damage and B factors, signal gained."""
    from cryodask.stages._polish_pictures import draw_damage, draw_field, draw_session, draw_signal

    yield draw_session(ds)
    yield draw_signal(ds)
    yield draw_field(ds)
    yield from draw_damage(ds)
