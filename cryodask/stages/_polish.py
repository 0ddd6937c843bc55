"""Refinement of motion with particles, the computation of stage ``polish``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodask.errors import InputError, MicrographError
from cryodask.kernels import particle_motion as pm
from cryodask.kernels.dose import amplitude_after_exposure, critical_exposure, dose_weights
from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.motion_frames import find_defects, plan_repair
from cryodask.kernels.motion_model import relion_polynomial
from cryodask.kernels.orientations import euler_to_matrix
from cryodask.kernels.particle_field import (
    MotionPrior,
    absolute_prior,
    fit_particle_field,
    likeliest_amplitudes,
    residual_prior,
)
from cryodask.kernels.preview import preview
from cryodask.stage import Context, Frames
from cryodask.stages._half_maps import check_half_maps
from cryodask.stages._motion import FrameSource, sum_frames
from cryodask.stages._particle_checks import check_mask
from cryodask.stages.extract import extract
from cryodask.stages.polish import PRIORS
from cryodask.vocabulary import SLOTS

if TYPE_CHECKING:
    from cryodask.stages.polish import PolishParams

_LEAST_FOR_ABSOLUTE = 10
"""Particles with a say from which they find the motion alone; fewer know it less well than the frames do."""
_SHARE_OF_FRAMES = 0.15
"""Weight of the motion found before in the mean of both, where it differs from that of the particles by no more than their error.

The errors have a correlation of 0.64 (two simulated sessions), so that the mean is better than either: a little overall, and
more where the particles know least.
"""
_LEAST_SHELLS = 5
_EARLY_EXPOSURE = 4.0


@dataclass(frozen=True)
class Poses:
    """Particles of an exposure.

    ``ids``, ``half``, ``in_map``, ``likelihood`` `(n,)`; ``position`` and ``centre`` `(n, 2)`, Angstrom (y, x); ``angles`` `(n, 3)`
    (rot, tilt, psi), degrees; ``columns``: CTF, optics and aberrations, each `(n,)`.
    """

    ids: np.ndarray
    half: np.ndarray
    position: np.ndarray
    centre: np.ndarray
    angles: np.ndarray
    in_map: np.ndarray
    likelihood: np.ndarray
    columns: dict[str, np.ndarray]

    def usable(self) -> np.ndarray:
        """Which particles have all that a comparison with the map needs, `(n,)`."""
        known = np.isfinite(self.centre).all(1) & np.isfinite(self.angles).all(1) & np.isin(self.half, (0, 1)) & self.in_map
        for values in self.columns.values():
            known &= np.isfinite(values)
        return known

    def some(self, mask: np.ndarray) -> Poses:
        """Those of a mask `(n,)`."""
        columns = {name: values[mask] for name, values in self.columns.items()}
        own = {name: values[mask] for name, values in self.__dict__.items() if name != "columns"}
        return Poses(**own, columns=columns)


@dataclass(frozen=True)
class Reference:
    """Half-maps `(2, z, y, x)`, mask `(z, y, x)` or None (a sphere), corrected FSC `(shell,)` and voxel size."""

    half_map: np.ndarray
    mask: np.ndarray | None
    fsc: np.ndarray
    voxel_angstrom: float

    def check(self) -> None:
        """Refuse maps, masks and curves that do not belong together.

        Raises
        ------
        InputError
        """
        check_half_maps(self.half_map)
        box = self.half_map.shape[-1]
        if self.mask is not None:
            check_mask(self.mask, self.half_map.shape[1:])
        if len(self.fsc) < box // 2 - 1:
            raise InputError(
                f"the FSC has {len(self.fsc)} shells, but half-maps of {box} voxels have {box // 2 + 1}",
                "it was measured on maps of another box",
                "run postprocess on these half-maps",
            )


@dataclass(frozen=True)
class _Found:
    """``nodes`` `(node, frame, 2)`, ``change`` `(n, frame, 2)` from the prediction, with the constants, and its deviation; all Angstrom.

    ``moved`` `(n, 2)`: of the centres. ``steps``: the last ones; ``prior``: None if the motion was kept.
    """

    nodes: np.ndarray
    change: np.ndarray
    deviation: np.ndarray
    moved: np.ndarray
    steps: pm.Steps
    prior: MotionPrior | None
    kind: str


def polished(
    params: PolishParams,
    movie: Frames,
    gain: np.ndarray | None,
    poses: Poses,
    given: Reference,
    node_position: np.ndarray,
    node_shift: np.ndarray,
    hot_pixel: np.ndarray,
    *,
    pixel_size_angstrom: float,
    dose_per_frame: float,
    pre_exposure: float,
    voltage_kv: float,
    context: Context,
) -> dict[str, Any]:
    """Output of stage ``polish`` for a movie `(frame, y, x)`; ``node_shift`` `(81, frame, 2)` is the motion known so far."""
    given.check()
    frames, shape = movie.shape[0], (movie.shape[1], movie.shape[2])
    step, pixel = params.binning, float(pixel_size_angstrom) / params.binning
    node_position = step * np.asarray(node_position, np.float64)
    _check_field(node_position, node_shift, frames, shape, gain)
    device = context.device
    source = FrameSource(movie, device, params.frames_in_memory_mb)
    factor = None if gain is None else torch.from_numpy(np.require(gain, np.float32, ["C", "W"])).to(device)
    defects = _defects(source, frames, shape, factor, hot_pixel)
    source.repair = plan_repair(defects)
    exposure = pre_exposure + (np.arange(frames) + 0.5) * dose_per_frame
    usable = poses.usable() & _inside(poses.centre / pixel, shape)
    own = poses.some(usable)
    sampling = pm.choose_sampling(given.half_map.shape[-1] * given.voxel_angstrom, pixel, params.finest_angstrom)
    before = np.asarray(node_shift, np.float64)
    places = own.centre / pixel
    known = pm.field_at(before, places, shape)
    rings = np.arange(sampling.radius + 1) / sampling.length_angstrom
    measured = _measured(params, source, frames, factor, own, given, sampling, places, known / pixel, rings, exposure, voltage_kv, context)
    found = _refined(params, measured, own, before, known, node_position * pixel, exposure - pre_exposure, pixel)
    scale = params.damage_scale
    weights = dose_weights(np.maximum(rings, 1e-4), frames, dose_per_frame * scale, pre_exposure * scale, voltage_kv)
    sums = _signal_sums(measured, found, own, known, weights, pixel)
    change = found.change - found.moved[:, None] if len(own.ids) else found.change
    del measured
    centre, amount = poses.centre.copy(), np.zeros(len(poses.ids), np.float32)
    centre[usable] += found.moved
    amount[usable] = found.steps.amount
    plain, weighted = sum_frames(
        source, frames, shape, factor, found.nodes / pixel, pixel, dose_per_frame * scale, pre_exposure * scale, voltage_kv, step
    )
    return {
        "micrograph_sum": plain,
        "micrograph_dw": weighted,
        "micrograph_preview": preview(plain),
        **_field(found.nodes, node_position, shape, pixel, exposure, dose_per_frame),
        "patch_position": (node_position / step).astype(np.float32),
        "patch_shift_before": before.astype(np.float32),
        "hot_pixel_count": int(defects.sum()),
        "hot_pixel": np.asarray(hot_pixel, np.int16).reshape(-1, 2),
        "frame_exposure": exposure,
        "refinement_frequency": rings,
        "expected_decay": (0.5 * exposure[:, None] / critical_exposure(rings, voltage_kv)[None]).astype(np.float32),
        **sums,
        "polish_particles": int(found.steps.counts.sum()),
        "polish_prior": found.kind,
        "motion_change_angstrom": _rms(change) if found.prior is not None else 0.0,
        "motion_deviation_angstrom": _rms(found.deviation) if found.prior is not None else float("nan"),
        **_extracted(params, replace(poses, centre=centre), amount, weighted, step * pixel, context),
    }


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).sum(-1).mean())) if values.size else 0.0


def _check_field(node_position: np.ndarray, node_shift: np.ndarray, frames: int, shape: tuple[int, int], gain: np.ndarray | None) -> None:
    if node_position.size and np.abs(node_position.max(0) - np.array(shape) + 1.0).max() > 1.0:
        last = node_position.max(0) + 1.0
        raise MicrographError(
            f"the motion is known for {last[0]:.0f} x {last[1]:.0f} pixels, but the frames have {shape[0]} x {shape[1]}",
            "binning is not that of the motion correction, or the movie was replaced",
            "set binning as in motion",
        )
    if node_shift.ndim != 3 or node_shift.shape[1] != frames:
        raise MicrographError(
            f"the motion is known for {node_shift.shape[1] if node_shift.ndim == 3 else 0} frames, but the movie has {frames}",
            "the movie was replaced after its motion was corrected",
            "correct its motion again",
        )
    if gain is not None and gain.shape != shape:
        raise MicrographError(
            f"the gain is {gain.shape[0]} x {gain.shape[1]} pixels, the movie {shape[0]} x {shape[1]}",
            "the gain was changed after the motion was corrected",
            "use the gain of the motion correction",
        )


def _inside(places: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.asarray(((places >= 0) & (places <= np.array(shape) - 1.0)).all(1))


def _defects(source: FrameSource, frames: int, shape: tuple[int, int], gain: torch.Tensor | None, hot_pixel: np.ndarray) -> np.ndarray:
    """Mask of the pixels to be repaired: those that the motion correction found, if all could be listed."""
    hot = np.asarray(hot_pixel, np.int64).reshape(-1, 2)
    if len(hot) < SLOTS:
        mask = np.zeros(shape, bool) if gain is None else (gain <= 0).cpu().numpy()
        hot = hot[(hot >= 0).all(1)]
        mask[hot[:, 0], hot[:, 1]] = True
        return mask
    total = torch.zeros(shape, device=source.device)
    for f in range(frames):
        total += source(f)
    return find_defects(total, gain).cpu().numpy()


def _transforms(given: Reference, sampling: pm.Sampling, device: str) -> pm.Reference:
    """Transforms of the half-maps."""
    maps = torch.from_numpy(np.array(given.half_map, np.float32)).to(device)
    box = maps.shape[-1]
    mask = (
        soft_sphere(box, given.voxel_angstrom, 0.375 * box * given.voxel_angstrom, 12.0, device=device)
        if given.mask is None
        else torch.from_numpy(np.array(given.mask, np.float32)).to(device)
    )
    return pm.reference(maps, mask, given.fsc, given.voxel_angstrom, sampling)


def _measured(
    params: PolishParams,
    source: FrameSource,
    frames: int,
    gain: torch.Tensor | None,
    own: Poses,
    given: Reference,
    sampling: pm.Sampling,
    places: np.ndarray,
    predicted: np.ndarray,
    rings: np.ndarray,
    exposure: np.ndarray,
    voltage_kv: float,
    context: Context,
) -> pm.Measurement:
    if sampling.radius < _LEAST_SHELLS:
        raise InputError(
            f"boxes of {sampling.length_angstrom:.0f} A have {sampling.radius} Fourier shells up to {params.finest_angstrom:g} A",
            "finest_angstrom is too coarse, or the voxel size of the map is wrong",
            "set a finer finest_angstrom",
        )
    reference = context.keep(("reference", sampling), lambda: _transforms(given, sampling, context.device))
    rotations = euler_to_matrix(*torch.deg2rad(torch.from_numpy(own.angles)).unbind(1)).float().to(context.device)
    expected = pm.expected_transforms(reference, sampling, own.half, rotations, own.columns)
    damage = amplitude_after_exposure(rings, exposure * params.damage_scale, voltage_kv)
    return pm.measure(source, frames, gain, expected, sampling, places, predicted, damage, invert=params.invert)


def _refined(
    params: PolishParams,
    measured: pm.Measurement,
    own: Poses,
    before: np.ndarray,
    known: np.ndarray,
    nodes: np.ndarray,
    exposure: np.ndarray,
    pixel: float,
) -> _Found:
    """Field at the nodes; that from before where no particle has a say."""
    change = np.zeros_like(known)
    steps = pm.fisher_steps(measured, change)
    moved = np.zeros((len(own.ids), 2))
    kept = _Found(before, change, change, moved, steps, None, PRIORS[0])
    if not steps.counts.any() or known.shape[1] < 2:
        return kept
    absolute = int(steps.counts.sum()) >= _LEAST_FOR_ABSOLUTE
    base = known if absolute else np.zeros_like(known)
    prior = absolute_prior(exposure) if absolute else residual_prior(exposure)
    for number in range(params.rounds):
        if number:
            steps = pm.fisher_steps(measured, change / pixel)
        if not steps.counts.any():
            return kept
        observed, information = steps.step * pixel + change + base, steps.information / pixel**2
        if absolute and number == params.rounds - 1:
            prior = likeliest_amplitudes(prior, own.centre, observed, information)
        last = number == params.rounds - 1
        fitted = fit_particle_field(prior, own.centre, observed, information, nodes, errors=last)
        constant = np.where(steps.counts[:, None], fitted.constant, -fitted.particles.mean(1))
        change = fitted.particles + constant[:, None] - base
    moved = change.mean(1)
    if not absolute:
        return _Found(before + _centred(fitted.nodes), change, fitted.deviation, moved, steps, prior, PRIORS[1])
    error, difference = _rms(fitted.deviation[steps.counts]), _rms(_centred(change)[steps.counts])
    share = _SHARE_OF_FRAMES * min(1.0, error / max(difference, 1e-6)) ** 2
    change = moved[:, None] + (1.0 - share) * _centred(change)
    at_nodes = share * before + (1.0 - share) * _centred(fitted.nodes)
    return _Found(at_nodes, change, fitted.deviation, moved, steps, prior, PRIORS[2])


def _centred(tracks: np.ndarray) -> np.ndarray:
    """Tracks `(n, frame, 2)` without their means over frames."""
    return np.asarray(tracks - tracks.mean(1, keepdims=True))


def _signal_sums(
    measured: pm.Measurement, found: _Found, own: Poses, known: np.ndarray, weights: np.ndarray, pixel: float
) -> dict[str, np.ndarray]:
    """Correlation with the reference by frame and shell; weighted by exposure, with the motion before, after, and without the half-set."""
    counts = found.steps.counts
    cross, power, square = measured.correlation_sums(found.change / pixel, counts)

    def weighted(change: np.ndarray) -> np.ndarray:
        return np.asarray((weights * measured.correlation_sums(change / pixel, counts)[0]).sum(0))

    recentred = np.broadcast_to(found.moved[:, None], found.change.shape)
    blind = recentred
    if found.prior is not None and found.kind == PRIORS[2]:
        blind = _blind(found, own, known, pixel) + recentred
    return {
        "frame_correlation": cross.astype(np.float32),
        "frame_power": power.astype(np.float32),
        "reference_power": square,
        "signal_before": weighted(np.zeros_like(found.change)),
        "signal_recentred": weighted(recentred),
        "signal_blind": weighted(blind),
        "signal_after": (weights * cross).sum(0),
    }


def _blind(found: _Found, own: Poses, known: np.ndarray, pixel: float) -> np.ndarray:
    """Change of motion `(n, frame, 2)` for each particle from the particles of the other half-set alone."""
    assert found.prior is not None
    out = np.zeros_like(found.change)
    observed, information = found.steps.step * pixel + found.change + known, found.steps.information / pixel**2
    for half in (0, 1):
        there, here = own.half != half, own.half == half
        if there.any() and here.any():
            field = fit_particle_field(
                found.prior, own.centre[there], observed[there], information[there], own.centre[here], errors=False
            ).nodes
            out[here] = _centred(field) - known[here]
    return out


def _field(
    nodes: np.ndarray, position: np.ndarray, shape: tuple[int, int], pixel: float, exposure: np.ndarray, dose: float
) -> dict[str, Any]:
    """The field in the form of stage ``motion``."""
    track = nodes.mean(0)
    steps = np.linalg.norm(np.diff(track, axis=0), axis=1)
    early = np.clip((_EARLY_EXPOSURE - exposure[:-1]) / max(dose, 1e-9), 0.0, 1.0)
    return {
        "frame_shift": track.astype(np.float32),
        "patch_shift": nodes.astype(np.float32),
        "motion_polynomial": relion_polynomial(position, nodes, track, shape, pixel),
        "total_motion": float(steps.sum()),
        "early_motion": float((steps * early).sum()),
    }


def _extracted(
    params: PolishParams, poses: Poses, amount: np.ndarray, micrograph: np.ndarray, pixel: float, context: Context
) -> dict[str, Any]:
    """New images at the new centres, with the poses of those that are whole."""
    images = extract.process(
        params.extraction(),
        micrograph_dw=micrograph,
        pixel_size_angstrom=pixel,
        particle_id=poses.ids,
        position_y_angstrom=poses.position[:, 0],
        position_x_angstrom=poses.position[:, 1],
        centre_y_angstrom=poses.centre[:, 0],
        centre_x_angstrom=poses.centre[:, 1],
        context=context,
        **dict.fromkeys(("class_centre_y_angstrom", "class_centre_x_angstrom")),
    )
    kept = np.isin(poses.ids, images["particle_id"])
    own = poses.some(kept)
    return {
        **images,
        **{f"{name}_deg": own.angles[:, i].astype(np.float32) for i, name in enumerate(("rot", "tilt", "psi"))},
        **{f"centre_{axis}_angstrom": own.centre[:, i] for i, axis in enumerate("yx")},
        "log_likelihood": own.likelihood.astype(np.float32),
        "in_map": own.in_map,
        "signal_amount": amount[kept],
    }
