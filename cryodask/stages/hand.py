"""Stage ``hand``: the other hand of a map and of the poses that refer to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.stage import Context, Output, Params, Resources, Sizes, stage

_ANGLES = ("rot_deg", "tilt_deg", "psi_deg")


class HandParams(Params):
    """Parameters of ``hand``."""

    flip: bool | Literal["auto"] = Field("auto", description="mirror map and poses; 'auto' follows the docked model")


def _memory(params: HandParams, sizes: Sizes) -> float:
    return 40.0 * sizes["z"] * sizes["y"] * sizes["x"]


@stage(
    version=1,
    shape="whole",
    needs=["final_map", "half_map", "map_pixel_size_angstrom"],
    optional=[*_ANGLES, "centre_y_angstrom", "centre_x_angstrom", "log_likelihood", "in_map", "dock_hand"],
    ports=["map[final, half_maps]", "particles?:particles[pose]", "model?!:model[atoms]"],
    outputs=[
        Output("particles", "particles", ("pose",), on="particles", frame="flipped"),
        Output("map", "map", ("final", "half_maps"), on="map", frame="flipped", drops=("view",)),
    ],
    gives=[
        "final_map", "half_map", "map_pixel_size_angstrom", *_ANGLES, "centre_y_angstrom", "centre_x_angstrom", "log_likelihood", "in_map",
    ],
    resources=Resources(memory=_memory),
)  # fmt: skip
def hand(
    params: HandParams,
    *,
    final_map: np.ndarray,
    half_map: np.ndarray,
    map_pixel_size_angstrom: float,
    rot_deg: np.ndarray | None = None,
    tilt_deg: np.ndarray | None = None,
    psi_deg: np.ndarray | None = None,
    centre_y_angstrom: np.ndarray | None = None,
    centre_x_angstrom: np.ndarray | None = None,
    log_likelihood: np.ndarray | None = None,
    in_map: np.ndarray | None = None,
    dock_hand: str | None = None,
    context: Context,
) -> dict[str, Any]:
    """Mirror a map, its half-maps and the poses of its particles together, so that everything after this step has the other hand.

    The map is mirrored at z = 0 (about voxel n // 2); a pose A becomes M A M with M = diag(1, 1, -1), which gives the same images. Masks
    and models made before are not in the frame of the mirrored map: make the masks and dock the models again. With ``flip: auto`` the given
    docked model (``from: {model: dock}``) decides, and a map that has the correct hand is passed on unchanged.
    """
    import torch

    from cryodask.kernels.docking import mirrored

    flip = params.flip
    if flip == "auto":
        if dock_hand is None or str(dock_hand) == "unknown":
            why = "the docked model does not decide it" if dock_hand is not None else "no docked model is given"
            raise InputError(
                f"the hand of the map is unknown: {why}",
                "",
                "give  from: {model: dock}  with a model that decides the hand, or set hand.flip to true or false",
            )
        flip = str(dock_hand) == "mirrored"
    passed = {
        "centre_y_angstrom": centre_y_angstrom, "centre_x_angstrom": centre_x_angstrom, "log_likelihood": log_likelihood, "in_map": in_map,
    }  # fmt: skip
    out: dict[str, Any] = {name: np.asarray(values) for name, values in passed.items() if values is not None}
    maps = [torch.from_numpy(np.array(volume, np.float32)) for volume in (final_map, *half_map)]
    maps = [mirrored(volume) for volume in maps] if flip else maps
    out |= {
        "final_map": maps[0].numpy(),
        "half_map": torch.stack(maps[1:]).numpy(),
        "map_pixel_size_angstrom": float(map_pixel_size_angstrom),
    }
    if rot_deg is not None and tilt_deg is not None and psi_deg is not None:
        angles = rot_deg, tilt_deg, psi_deg
        out |= dict(zip(_ANGLES, mirrored_angles(*angles) if flip else angles))
    return out


def mirrored_angles(rot_deg: np.ndarray, tilt_deg: np.ndarray, psi_deg: np.ndarray) -> tuple[np.ndarray, ...]:
    """Euler angles, degrees, of the poses at which the mirrored map gives the same projections as the map at the given ones."""
    import torch

    from cryodask.kernels.orientations import euler_to_matrix, matrix_to_euler

    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    poses = euler_to_matrix(*(torch.deg2rad(torch.from_numpy(np.asarray(a, np.float64))) for a in (rot_deg, tilt_deg, psi_deg)))
    return tuple(torch.rad2deg(a).float().numpy() for a in matrix_to_euler(mirror @ poses @ mirror))


@hand.sentence
def says(result: Mapping[str, Any]) -> str:
    """What the new frame contains."""
    count = len(np.asarray(result["rot_deg"])) if "rot_deg" in result else 0
    return f"map{f' and {count} poses' if count else ''} in a new frame; masks and models made before do not belong to it"
