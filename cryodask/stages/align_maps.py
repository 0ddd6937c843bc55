"""Stage ``align_maps``: brings a map, and the poses that refer to it, into the frame of another map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.stage import Context, Output, Params, Port, Resources, Sizes, port, stage

_ANGLES = ("rot_deg", "tilt_deg", "psi_deg")
_CENTRES = ("centre_y_angstrom", "centre_x_angstrom")
_MIRRORED, _BETTER, _CLEAR = 1.25, 1.15, 0.7
"""Ratios of the correlations with the map and its mirror image. Unrelated maps correlate as well with either (0.3 at 15 A, 0.5 at 20 A);
the same molecule, 1.6 to 1.9 times better with the right one; at 25 A and beyond both correlations are high."""
_LARGEST_RATIO = 1.5
"""Ratio of the voxel sizes beyond which one of them is taken to be wrong."""


class AlignMapsParams(Params):
    """Parameters of ``align_maps``."""

    resolution_angstrom: float | None = Field(
        None,
        gt=0,
        description="finest resolution at which the maps are compared, Angstrom; by default where the FSC of the half-maps falls to 0.5, "
        "7.3 A at most",
    )
    seed: int = Field(0, ge=0, description="seed of the search")


def _memory(params: AlignMapsParams, sizes: Sizes) -> float:
    return 3e8 + 60.0 * sizes["z"] * sizes["y"] * sizes["x"]


@stage(
    version=1,
    shape="whole",
    needs=["final_map", "half_map", "map_pixel_size_angstrom", "to_final_map", "to_map_pixel_size_angstrom"],
    optional=[*_ANGLES, *_CENTRES, "log_likelihood", "in_map"],
    ports=["map[final, half_maps]", Port("to", "map", ("final",), default="explicit"), port("particles?:particles[pose]", copies=True)],
    outputs=[
        Output("particles", "particles", ("pose",), on="particles", frame="to"),
        Output("map", "map", ("final", "half_maps"), on="map", frame="to", drops=("view",)),
    ],
    gives=[
        "final_map", "half_map", "map_pixel_size_angstrom", *_ANGLES, *_CENTRES, "log_likelihood", "in_map", "dock_correlation",
        "dock_correlation_mirrored", "dock_rotation", "dock_shift_angstrom",
    ],
    resources=Resources(memory=_memory),
)  # fmt: skip
def align_maps(
    params: AlignMapsParams,
    *,
    final_map: np.ndarray,
    half_map: np.ndarray,
    map_pixel_size_angstrom: float,
    to_final_map: np.ndarray,
    to_map_pixel_size_angstrom: float,
    rot_deg: np.ndarray | None = None,
    tilt_deg: np.ndarray | None = None,
    psi_deg: np.ndarray | None = None,
    centre_y_angstrom: np.ndarray | None = None,
    centre_x_angstrom: np.ndarray | None = None,
    log_likelihood: np.ndarray | None = None,
    in_map: np.ndarray | None = None,
    context: Context,
) -> dict[str, Any]:
    """Rotate and shift a map onto another one (``from: {to: STEP}``), on whose grid it is resampled; poses and centres go with it.

    After this step sets that were refined apart have poses in one frame and can be merged, and classes can be compared voxel by voxel.
    The search is that of ``dock``: all orientations and positions at 30 A, then local searches on whitened spectra, and a last
    simplex search. Maps that do not resemble each other are refused, and so is a mirror image: ``hand`` turns it round.
    """
    import torch

    from cryodask.kernels import docking
    from cryodask.kernels.resampling import resample_map

    voxel, own_voxel = float(to_map_pixel_size_angstrom), float(map_pixel_size_angstrom)
    box = to_final_map.shape[0]
    _check(np.asarray(final_map), np.asarray(to_final_map), own_voxel, voxel)
    # the longer of the two, so that neither is cropped while they are still apart
    length = max(box * voxel, final_map.shape[0] * own_voxel)
    finest = max(params.resolution_angstrom or _resolution(half_map, own_voxel), 2.06 * max(voxel, own_voxel))
    size = 2 * int(np.ceil(length / finest * 2.06 / 2.0)) + 4
    coarse = length / size
    fixed, moving = (
        resample_map(torch.from_numpy(np.array(volume, np.float32)), its, size, coarse, cut_angstrom=2.06 * coarse).to(context.device)
        for volume, its in ((to_final_map, voxel), (final_map, own_voxel))
    )
    own, other = docking.dock_both_hands(fixed, moving, coarse, finest, seed=params.seed)
    _check_match(own.white, other.white)
    place = docking.refined(fixed, moving, coarse, finest, own)
    shift_angstrom = place.shift_px.cpu() * coarse

    def moved(volume: np.ndarray) -> np.ndarray:
        wide = max(box, int(np.ceil(final_map.shape[0] * own_voxel / voxel / 2.0)) * 2)
        there = resample_map(
            torch.from_numpy(np.array(volume, np.float32)), own_voxel, wide, voxel, cut_angstrom=2.2 * max(voxel, own_voxel)
        )
        turned = docking.moved_map(there.to(context.device), place.rotation, place.shift_px * (coarse / voxel)).cpu()
        edge = wide // 2 - box // 2
        return turned[edge : edge + box, edge : edge + box, edge : edge + box].float().contiguous().numpy()

    out: dict[str, Any] = {
        "final_map": moved(final_map), "half_map": np.stack([moved(half) for half in half_map]), "map_pixel_size_angstrom": voxel,
        "dock_correlation": place.white, "dock_correlation_mirrored": other.white,
        "dock_rotation": place.rotation.cpu().numpy().T, "dock_shift_angstrom": shift_angstrom.numpy(),
    }  # fmt: skip
    passed = {"log_likelihood": log_likelihood, "in_map": in_map}
    out |= {name: np.asarray(values) for name, values in passed.items() if values is not None}
    if rot_deg is not None and tilt_deg is not None and psi_deg is not None:
        angles, shown_at = turned_poses((rot_deg, tilt_deg, psi_deg), place.rotation.cpu().numpy(), shift_angstrom.numpy())
        out |= dict(zip(_ANGLES, angles))
        for name, centre, by in zip(_CENTRES, (centre_y_angstrom, centre_x_angstrom), shown_at):
            if centre is not None:
                out[name] = np.asarray(centre, np.float64) - by
    return out


def turned_poses(
    angles_deg: tuple[np.ndarray, ...], rotation: np.ndarray, shift_angstrom: np.ndarray
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, np.ndarray]]:
    """Euler angles, degrees, at which the moved map ``M(A (x - t))`` gives the same projections as M at the given ones.

    Also where these show the origin of M, in Angstrom (y, x) from that of the moved map.
    """
    import torch

    from cryodask.kernels.orientations import euler_to_matrix, matrix_to_euler

    poses = euler_to_matrix(*(torch.deg2rad(torch.from_numpy(np.asarray(a, np.float64))) for a in angles_deg))
    turned = poses @ torch.from_numpy(np.array(rotation, np.float64))
    shown = (turned @ torch.from_numpy(np.array(shift_angstrom, np.float64))).numpy()
    return tuple(torch.rad2deg(a).float().numpy() for a in matrix_to_euler(turned)), (shown[:, 1], shown[:, 0])


def _resolution(half_maps: np.ndarray, voxel: float) -> float:
    """Where the FSC of the half-maps, each in its own mask, falls to 0.5, Angstrom; no finer than poses need."""
    import torch

    from cryodask.kernels.docking import FINEST_ANGSTROM
    from cryodask.kernels.fsc import fsc
    from cryodask.kernels.masking import own_solvent_mask

    halves = [torch.from_numpy(np.array(half, np.float32)) for half in half_maps]
    box = halves[0].shape[-1]
    masked = [half * own_solvent_mask(half, voxel, box // 2 - 1) for half in halves]
    fallen = torch.nonzero(fsc(masked[0], masked[1])[1 : box // 2] < 0.5)
    last = int(fallen[0]) if len(fallen) else box // 2 - 1
    return max(box * voxel / max(last, 1), FINEST_ANGSTROM)


def _check(own: np.ndarray, to: np.ndarray, own_voxel: float, voxel: float) -> None:
    """Refuse empty maps, and maps whose voxel sizes cannot belong to one molecule.

    Raises
    ------
    InputError
    """
    for which, volume in (("map", own), ("map of 'to'", to)):
        if not np.isfinite(volume).all() or not volume.std() > 0:
            raise InputError(f"the {which} is empty or contains NaN", "the refinement that made it failed", "check its report")
    lengths = own.shape[0] * own_voxel, to.shape[0] * voxel
    if max(lengths) > 2.0 * _LARGEST_RATIO * min(lengths):
        raise InputError(
            f"the boxes of the maps are {lengths[0]:.0f} and {lengths[1]:.0f} A long",
            "a voxel size is wrong, or they are maps of different things",
            "check the voxel sizes",
        )


def _check_match(own: float, other: float) -> None:
    """Refuse maps that do not resemble each other, and a mirror image.

    Raises
    ------
    InputError
    """
    from cryodask.kernels.docking import LEAST_CORRELATION

    if other >= _MIRRORED * own and other >= LEAST_CORRELATION:
        raise InputError(
            f"the maps have different hands: the correlation is {own:.2f}, with the mirror image {other:.2f}",
            "one of them was made from nothing, and hands are arbitrary there",
            "put  - hand: {flip: true}  before this step",
        )
    if own < LEAST_CORRELATION or (own < _CLEAR and own < _BETTER * other):
        raise InputError(
            f"the maps do not resemble each other: their correlation is {own:.2f}, with the mirror image {other:.2f}",
            "they are maps of different molecules, or one of them is noise",
            "check the maps in the report; set resolution_angstrom to what the worse one has",
        )


@align_maps.sentence
def says(result: Mapping[str, Any]) -> str:
    """How far the map was turned and moved, and how well it fits."""
    turn = np.degrees(np.arccos(np.clip((np.trace(np.asarray(result["dock_rotation"])) - 1.0) / 2.0, -1.0, 1.0)))
    distance = float(np.linalg.norm(np.asarray(result["dock_shift_angstrom"])))
    count = len(np.asarray(result["rot_deg"])) if "rot_deg" in result else 0
    moved = f"the map{f' and {count} poses' if count else ''} turned by {turn:.1f} degrees and moved by {distance:.1f} A"
    return f"{moved}; correlation {float(result['dock_correlation']):.2f}"
