"""Motion correction: frames in, aligned and dose-weighted micrographs and their trajectories out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from cryodask.errors import GainError, MicrographError
from cryodask.formats.gain import on_frames
from cryodask.kernels.preview import preview_shape
from cryodask.stage import AddedMark, Context, EffortMark, Frames, Params, Picture, Resources, Sizes, stage

if TYPE_CHECKING:
    import xarray as xr

NODES = 9
"""The local motion is stored on a regular grid of 9 x 9 nodes, from the first to the last pixel of the micrograph."""
_IMAGES = 7
"""Number of float32 images in memory at a time: the sums (kernels.dose.RANK) and their transforms, the plain one, and the gain."""


class MotionParams(Params):
    """Parameters of motion correction."""

    patches: tuple[int, int] = Field(
        default=(5, 5),
        description="maximum number of patches (rows, columns) for local motion; fewer are used if the signal is weak, (1, 1) turns it off",
    )
    alignment_resolution_angstrom: float = Field(
        default=8.0, gt=2.0, le=40.0, description="finest detail used to measure motion, Angstrom; finer detail gets less weight anyway"
    )
    binning: Annotated[Literal[1, 2], AddedMark] = Field(
        default=1,
        description="2: super-resolution movies, summed at the physical pixel size, which is microscope.pixel_size_angstrom then",
    )
    frames_in_memory_mb: Annotated[int, EffortMark] = Field(
        default=512,
        ge=0,
        description="memory for the raw frames of a movie that is read in place, megabytes; larger movies, and stored ones, are read twice",
    )


def _memory(params: MotionParams, sizes: Sizes) -> float:
    pixels = float(sizes.get("y", 4096) * sizes.get("x", 4096))
    raw = sizes.get("frame", 40) * pixels
    kept = raw if raw <= params.frames_in_memory_mb * 2**20 else 4.0 * pixels
    if params.binning > 1:  # while defects are looked for; the sums are small
        return kept + 4.0 * 4.0 * pixels + 2.5e8
    return kept + _IMAGES * 4.0 * pixels + 2.5e8


def _sizes(params: MotionParams, sizes: Sizes) -> Sizes:
    return {**micrograph_sizes(sizes, params.binning), "patch": NODES**2, "coefficient": 36, "axis": 2, "preview": 2}


def micrograph_sizes(sizes: Sizes, binning: int) -> Sizes:
    """Sizes of a movie's micrograph and of its preview beside the others."""
    if not {"y", "x"} <= sizes.keys():
        return sizes
    height, width = sizes["y"] // binning, sizes["x"] // binning
    return {**sizes, "y": height, "x": width, **dict(zip(("preview_y", "preview_x"), preview_shape(height, width)))}


@stage(
    version=4,
    needs=["movie", "pixel_size_angstrom", "dose_per_frame", "pre_exposure", "voltage_kv"],
    optional=["gain", "dose_per_fraction"],
    gives=[
        "micrograph_sum",
        "micrograph_dw",
        "micrograph_preview",
        "frame_shift",
        "patch_position",
        "patch_shift",
        "motion_polynomial",
        "total_motion",
        "early_motion",
        "hot_pixel_count",
        "hot_pixel",
        "still_pattern_share",
    ],
    sizes=_sizes,
    resources=Resources(memory=_memory),
)
def motion(
    params: MotionParams,
    *,
    movie: Frames,
    gain: np.ndarray | None = None,
    pixel_size_angstrom: float,
    dose_per_frame: float,
    dose_per_fraction: float | None = None,
    pre_exposure: float = 0.0,
    voltage_kv: float = 300.0,
    context: Context,
) -> dict[str, Any]:
    """Align the frames of a movie, globally and locally, and sum them, plain and dose-weighted.

    The gain multiplies the counts (each of its pixels four of them if the movie is super-resolution and the gain is not); hot, dead and
    gain-0 pixels are replaced by the counts of a good neighbour. Motion is measured by
    maximum likelihood: correlation peaks find it to a pixel, then each frame is matched to the sum with weights from the measured spectra
    of signal and noise. The whole-frame track and the local field (overlapping patches) are smoothed by a Gaussian process in exposure
    and position, with constants chosen for each movie by marginal likelihood, so that weak movies fall back to the whole-frame track.
    Frames are then resampled once at the moved positions by a 6-tap windowed sinc and added to four sums that represent the
    exposure weights (Grant & Grigorieff 2015) at low rank.

    With ``binning`` 2 every second pixel of the frames is read, behind a low-pass whose response is divided out of the sums: pixel (y, x)
    of the micrograph is pixel (2 y, 2 x) of the movie, as where RELION crops the Fourier transform.

    Where the frames share a pattern that stands still while the specimen moves, as with a missing or wrong gain, what it is expected
    to add to all correlations is subtracted. If the patches nevertheless show less specimen along the local field than
    without it, the field is dropped and the whole-frame track kept. ``still_pattern_share`` is then above 0, and the run says so.

    The sums are rounded to a 32nd of the standard deviation of their noise or less, which adds a ten-thousandth to its variance and lets
    them be stored in a third of the bytes.

    ``frame_shift`` and ``patch_shift`` are displacements of the specimen in Angstrom (y, x), each with mean zero over the frames;
    ``patch_shift`` includes the whole-frame motion and is given at ``patch_position``, a 9 x 9 grid over the whole micrograph.
    ``micrograph_preview`` is a small picture of the plain sum and of its spectrum, for people.
    ``motion_polynomial`` is the local part in RELION's form and sign; ``hot_pixel`` lists up to 4096 repaired pixels. The prior on
    velocity is of the form of Zivanov, Nakane & Scheres (2019).
    """
    from cryodask.stages._motion import corrected

    _, height, width = movie.shape
    check_binning(params.binning, (height, width))
    gain = None if gain is None else on_frames(gain, (height, width))
    if gain is not None and gain.shape != (height, width):
        raise GainError(
            f"the gain is {gain.shape[0]} x {gain.shape[1]} pixels, the movie {height} x {width}",
            "the gain was saved in the camera's orientation, or belongs to another camera mode",
            "set gain_rotate and gain_flip",
        )
    return corrected(
        params,
        movie,
        gain,
        pixel_size_angstrom=pixel_size_angstrom,
        dose_per_frame=exposure_of_frame(dose_per_frame, dose_per_fraction),
        pre_exposure=pre_exposure,
        voltage_kv=voltage_kv,
        device=context.device,
    )


def check_binning(binning: int, shape: tuple[int, ...]) -> None:
    """Refuse frames that cannot be binned.

    Raises
    ------
    MicrographError
    """
    if any(n % binning for n in shape):
        raise MicrographError(
            f"frames of {shape[0]} x {shape[1]} pixels cannot be binned by {binning}",
            "this is not a super-resolution movie",
            "set  binning: 1",
        )


def exposure_of_frame(dose_per_frame: float, dose_per_fraction: float | None) -> float:
    """Exposure of a frame of the movie, electrons per square Angstrom: that of a fraction where camera frames were summed on reading."""
    return dose_per_frame if dose_per_fraction is None or math.isnan(dose_per_fraction) else dose_per_fraction


@motion.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """Motion over the session, tracks, and local motion of the first micrograph."""
    from matplotlib.figure import Figure

    total, early = ds["total_motion"].values, ds["early_motion"].values
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, 2)
    axes[0].plot(np.arange(1, len(total) + 1), total, "o", ms=3, label="whole exposure")
    axes[0].plot(np.arange(1, len(early) + 1), early, "o", ms=3, label="first 4 e/Å²")
    axes[0].set(xlabel="micrograph", ylabel="motion (Å)", ylim=(0, None))
    axes[0].legend(frameon=False)
    axes[1].hist(total, bins=min(40, max(5, len(total) // 2)), color="C0")
    axes[1].set(xlabel="motion (Å)", ylabel="micrographs")
    yield Picture("Motion over the session", "Length of the whole-frame track of each micrograph.", figure)

    tracks = np.asarray(ds["frame_shift"].values)
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for track in tracks[:: max(1, len(tracks) // 24)]:
        axes[0].plot(track[:, 1] - track[0, 1], track[:, 0] - track[0, 0], lw=0.8)
    axes[0].plot(0, 0, "k+")
    axes[0].set(xlabel="x (Å)", ylabel="y (Å)", aspect="equal", title="whole-frame tracks")
    steps = np.linalg.norm(np.diff(tracks, axis=1), axis=2)
    axes[1].plot(np.arange(2, tracks.shape[1] + 1), np.median(steps, 0), "k")
    axes[1].fill_between(np.arange(2, tracks.shape[1] + 1), *np.percentile(steps, [16, 84], axis=0), alpha=0.3, color="k", lw=0)
    axes[1].set(xlabel="frame", ylabel="step (Å)", title="motion from frame to frame", ylim=(0, None))
    yield Picture("Tracks", "Left: displacement of the specimen from the first frame. Right: median step and its 68 % range.", figure)

    field, place = np.asarray(ds["patch_shift"].values), np.asarray(ds["patch_position"].values)
    local = field - tracks[:, None]
    strength = np.sqrt((local**2).sum(-1).mean((1, 2)))
    row = int(np.argsort(strength)[len(strength) // 2])
    figure = Figure(figsize=(5, 5), layout="constrained")
    one = figure.subplots()
    length = 0.5 * (place[row, :, 1].max() / (NODES - 1)) / max(float(np.abs(local[row]).max()), 1e-6)
    for (y, x), path in zip(place[row], local[row]):
        one.plot(x + length * (path[:, 1] - path[0, 1]), y + length * (path[:, 0] - path[0, 0]), lw=1.0, color="C0")
        one.plot(x, y, "k.", ms=3)
    one.set(xlabel="x (pixel)", ylabel="y (pixel)", aspect="equal")
    name = str(ds["micrograph"].values[row]) if "micrograph" in ds.coords else f"micrograph {row + 1}"
    yield Picture(
        "Local motion", f"{name}: local part of the tracks (dots: first frame), at most {np.abs(local[row]).max():.2f} Å.", figure
    )
