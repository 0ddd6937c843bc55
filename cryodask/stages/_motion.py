"""Alignment and summation of the frames of a movie on tensors, the computation of stage ``motion``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cryodask.context import return_freed_memory
from cryodask.errors import MicrographError
from cryodask.kernels.dose import empty_sums, filtered_sum, flattened, low_rank_weights
from cryodask.kernels.motion_align import align_frames
from cryodask.kernels.motion_frames import (
    Repair,
    bin_gain,
    bin_mask,
    find_defects,
    plan_repair,
    repair_frame,
    still_bins,
    survey,
    transform_frames,
)
from cryodask.kernels.motion_model import FittedField, relion_polynomial
from cryodask.kernels.motion_patches import choose_patches, crop_for_patches, cut_patches, fit_local_motion
from cryodask.kernels.preview import preview
from cryodask.kernels.rounding import rounded_to_noise
from cryodask.kernels.warp import add_warped, stripe_field
from cryodask.stage import Frames
from cryodask.stages.motion import NODES
from cryodask.vocabulary import SLOTS

if TYPE_CHECKING:
    from cryodask.stages.motion import MotionParams

_STRIPE = 64
_BATCH = 4
_MOST_ALIGNED = 64
"""Movies with more frames are aligned in groups of neighbouring frames, and the trajectory is interpolated."""


class FrameSource:
    """Reads frames as tensors, and repairs defects once known; keeps those of a movie that is read in place, if they fit in memory."""

    def __init__(self, movie: Frames, device: str, budget_mb: int) -> None:
        self.movie, self.device = movie, device
        self.kind = _working_type(np.dtype(movie.dtype))
        # those in the store are decoded again at a tenth of the cost of a stage, those in memory are there already
        slow = not getattr(movie, "stored", True)
        # one block for all frames, because single frames would fragment the heap
        fits = slow and int(np.prod(movie.shape)) * self.kind.itemsize <= budget_mb * 2**20
        self.kept = torch.empty(movie.shape, dtype=_TORCH[self.kind.name], device=device) if fits else None
        self.known: set[int] = set()
        self.repair: Repair | None = None
        self.repaired: set[int] = set()

    def __call__(self, index: int) -> Tensor:
        if self.kept is None:
            read = np.asarray(self.movie[index])
            if read.flags.writeable and not read.flags.owndata:  # a view of the movie, which the repair must not change
                read = read.copy()
            frame = torch.from_numpy(np.require(read, self.kind, ["C", "W"])).to(self.device)
        else:
            frame = self.kept[index]
            if index not in self.known:
                frame.copy_(torch.from_numpy(np.require(self.movie[index], self.kind, ["C", "W"])))
                self.known.add(index)
        if self.repair is not None and index not in self.repaired:
            repair_frame(frame, self.repair, index)
            if self.kept is not None:
                self.repaired.add(index)
        return frame


_TORCH = {"uint8": torch.uint8, "int8": torch.int8, "int16": torch.int16, "float32": torch.float32}


def _working_type(stored: np.dtype) -> np.dtype:
    """The dtype that torch computes with: 8-bit integers and int16 unchanged, all others float32 (exact below 2^24)."""
    return np.dtype(stored.name if stored.name in _TORCH else np.float32)


def corrected(
    params: MotionParams,
    movie: Frames,
    gain: np.ndarray | None,
    *,
    pixel_size_angstrom: float,
    dose_per_frame: float,
    pre_exposure: float,
    voltage_kv: float,
    device: str,
) -> dict[str, Any]:
    """Output of stage ``motion`` for a movie `(frame, y, x)` with a gain `(y, x)` of matching shape; the pixel is the micrograph's."""
    frames, height, width = movie.shape
    shape, step = (height, width), params.binning
    pixel = pixel_size_angstrom / step
    source = FrameSource(movie, device, params.frames_in_memory_mb)
    # never written to, so the gain shared by all movies of a worker is not copied
    factor = None if gain is None else torch.from_numpy(np.require(gain, np.float32, ["C", "W"])).to(device)
    node_shift, track, defects, still = _measure(params, source, frames, shape, factor, pixel, dose_per_frame)
    plain, weighted = sum_frames(source, frames, shape, factor, node_shift / pixel, pixel, dose_per_frame, pre_exposure, voltage_kv, step)
    position = _nodes(shape)
    steps = np.linalg.norm(np.diff(track, axis=0), axis=1)
    middle = pre_exposure + (np.arange(frames) + 0.5) * dose_per_frame
    early = np.clip((4.0 - middle[:-1]) / max(dose_per_frame, 1e-9), 0.0, 1.0)
    return {
        "micrograph_sum": plain,
        "micrograph_dw": weighted,
        "micrograph_preview": preview(plain),
        "frame_shift": track.astype(np.float32),
        "patch_position": (position / step).astype(np.float32),
        "patch_shift": node_shift.astype(np.float32),
        "motion_polynomial": relion_polynomial(position, node_shift, track, shape, pixel),
        "total_motion": float(steps.sum()),
        "early_motion": float((steps * early).sum()),
        "hot_pixel_count": int(defects.sum()),
        "hot_pixel": _listed(defects, gain),
        "still_pattern_share": still,
    }


def _listed(defects: np.ndarray, gain: np.ndarray | None) -> np.ndarray:
    """Defects `(defect, 2)` int16 (y, x) that differ from movie to movie, at most as many as a column may hold."""
    own = defects if gain is None else defects & (gain > 0)
    return np.argwhere(own)[:SLOTS].astype(np.int16)


def _nodes(shape: tuple[int, int]) -> np.ndarray:
    y, x = np.linspace(0.0, shape[0] - 1.0, NODES), np.linspace(0.0, shape[1] - 1.0, NODES)
    return np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2)


def _measure(
    params: MotionParams, source: FrameSource, frames: int, shape: tuple[int, int], gain: Tensor | None, pixel: float, dose: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Displacement `(node, frame, 2)` and track `(frame, 2)` in Angstrom, mask `(y, x)` of defects, and share of a still pattern."""
    binning = max(1, min(int(params.alignment_resolution_angstrom / (2.8 * pixel)), min(shape) // 32))
    group = -(-frames // _MOST_ALIGNED)
    seen = survey(source, frames, shape, binning, group)
    if not bool(torch.isfinite(seen.total.sum(dtype=torch.float64))):
        raise MicrographError("the movie has NaN or infinite pixels", "a failed conversion wrote it", "convert it again")
    if not bool((seen.total != 0).any()):
        raise MicrographError("the movie has no counts at all", "the beam was blanked, or the camera failed", "remove it")
    defects = find_defects(seen.total, gain)
    mask = defects.cpu().numpy()
    source.repair = plan_repair(mask)
    binned, counts = seen.binned, seen.mean_count
    del seen
    return_freed_memory()
    nodes = _nodes(shape)
    still = np.zeros((len(nodes), frames, 2)), np.zeros((frames, 2)), mask, 0.0
    groups = len(binned)
    if groups < 2 or min(shape) < 64:
        return still
    transform = transform_frames(
        binned,
        None if gain is None else bin_gain(gain, defects, binning),
        bin_mask(defects, binning) | still_bins(binned),
        binning=binning,
        pixel_size_angstrom=pixel,
        resolution_angstrom=max(params.alignment_resolution_angstrom, 2.0 * binning * pixel),
    )
    del binned, defects
    return_freed_memory()
    members = [np.arange(g * group, min(frames, (g + 1) * group)) for g in range(groups)]
    exposure = np.array([(m.mean() + 0.5) * dose for m in members])
    mean_count = np.array([counts[m].sum() for m in members])
    whole = align_frames(transform, mean_count, exposure, pixel)
    count = choose_patches(params.patches, shape, whole, groups, pixel)
    field: FittedField | None = None
    if count is not None:
        # free what the patches no longer use first: together they would be the memory peak of the stage
        transform = crop_for_patches(transform, whole, pixel)
        return_freed_memory()
        patches = cut_patches(transform, whole, count, shape, pixel)
        del transform
        return_freed_memory()
        field = fit_local_motion(patches, whole, mean_count, exposure, pixel)
        del patches
        return_freed_memory()
    track = whole.shift * pixel
    displacement = np.repeat(track[None], len(nodes), 0)
    if field is not None:
        displacement = displacement + field.at(nodes * pixel)
    if group > 1:
        at, centres = np.arange(frames), np.array([m.mean() for m in members])
        displacement = _interpolate(at, centres, displacement)
    displacement -= displacement.mean(1, keepdims=True)
    return displacement, displacement.mean(0), mask, 0.0 if whole.still is None else whole.still.share


def _interpolate(at: np.ndarray, centres: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """Interpolate linearly from groups to frames, extrapolating beyond the first and last centre: `(node, frame, 2)`."""
    left = np.clip(np.searchsorted(centres, at, side="right") - 1, 0, len(centres) - 2)
    share = ((at - centres[left]) / (centres[left + 1] - centres[left]))[None, :, None]
    return displacement[:, left] * (1.0 - share) + displacement[:, left + 1] * share


def sum_frames(
    source: FrameSource,
    frames: int,
    shape: tuple[int, int],
    gain: Tensor | None,
    node_shift_px: np.ndarray,
    pixel: float,
    dose: float,
    pre_exposure: float,
    voltage_kv: float,
    step: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Plain and dose-weighted sums of the frames resampled at their displacement, `(y // step, x // step)` float32, rounded.

    ``shape``, ``node_shift_px`` and ``pixel`` are those of the frames.
    """
    coefficients, filters, k = low_rank_weights(step * pixel, frames, dose, pre_exposure, voltage_kv)
    device, size = source.device, (shape[0] // step, shape[1] // step)
    # a pixel of the sums has the counts of step x step pixels of the frames
    weights = torch.from_numpy((step**2 * coefficients).astype(np.float32)).to(device)
    sums = empty_sums(len(coefficients), size, device)
    images = [one[: size[0], : size[1]] for one in sums]
    batch: list[Tensor] = []
    for start in range(0, frames, _BATCH):
        members = range(start, min(frames, start + _BATCH))
        batch.clear()  # before the next frames are read
        batch += [source(f) for f in members]
        nodes = torch.from_numpy(node_shift_px[:, list(members)].astype(np.float32)).to(device)
        nodes = nodes.permute(1, 2, 0).reshape(len(batch), 2, NODES, NODES)
        stripe = _STRIPE // step  # read from as many rows of the frames
        shift_y, shift_x = (stripe_field(nodes[:, i], shape, stripe, step=step, every_column=n) for i, n in ((0, 1), (1, step)))
        add_warped(images, weights[:, list(members)].contiguous(), batch, gain, shift_y, shift_x, stripe=stripe, step=step)
    # free the raw frames to make room for the transforms
    batch.clear()
    source.kept = None
    plain = images[0].clone() if step == 1 else flattened(sums[0].clone(), size, step)
    images.clear()
    return_freed_memory()
    plain = rounded_to_noise(plain)
    return plain.cpu().numpy(), rounded_to_noise(filtered_sum(sums, size, filters, k, step * pixel, step=step)).cpu().numpy()
