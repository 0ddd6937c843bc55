"""Stage ``dock``: an atomic model is docked in a map, which decides the hand of the map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.stage import Context, Output, Params, Picture, Resources, Sizes, stage

if TYPE_CHECKING:
    import xarray as xr

_VOXELS_PER_RESOLUTION = 2.06
_LARGEST_SHARE = 0.98
_B_FACTOR_A2 = 60.0


class DockParams(Params):
    """Parameters of ``dock``."""

    resolution_angstrom: float | None = Field(None, gt=0, description="resolution of the map, Angstrom; by default that of its half-maps")
    seed: int = Field(0, ge=0, description="seed of the search")


def _memory(params: DockParams, sizes: Sizes) -> float:
    return 3e8 + 40.0 * sizes["z"] * sizes["y"] * sizes["x"]


@stage(
    version=1,
    shape="whole",
    needs=["final_map", "map_pixel_size_angstrom", "model_file"],
    optional=["resolution_angstrom"],
    ports=["map[final, fsc?]", "model[atoms]"],
    outputs=[Output("model", "model", ("atoms",), frame="same")],
    gives=[
        "model_file", "dock_hand", "dock_correlation", "dock_correlation_mirrored", "dock_resolution_angstrom", "dock_rotation",
        "dock_shift_angstrom",
    ],
    resources=Resources(memory=_memory),
)  # fmt: skip
def dock(
    params: DockParams,
    *,
    final_map: np.ndarray,
    map_pixel_size_angstrom: float,
    model_file: np.ndarray,
    resolution_angstrom: float | None = None,
    context: Context,
) -> dict[str, Any]:
    """Place an atomic model in a map, and decide the hand of the map.

    The model's density is docked in the map and in its mirror image, in all orientations and positions: a grid of 4608 orientations at
    30 A with all positions by FFT, then local searches from the best ones at 15 A and at the map's resolution (not beyond 7.3 A). The
    deciding correlation is of whitened spectra. The hand is decided if one correlation is at least twice the other and at least 0.25,
    and the map is no worse than 12 A; otherwise it is "unknown", as it also is with another molecule, a poor map or a symmetric shape.
    If the map has the wrong hand, the model is placed in the mirror image: let `hand` mirror map and poses, and dock again after it.
    """
    import torch

    from cryodask.kernels.docking import FINEST_ANGSTROM, decided_hand, dock_both_hands
    from cryodask.kernels.resampling import resample_map
    from cryodask.stages._models import atoms_of, density, moved_file, structure_of

    voxel, box = float(map_pixel_size_angstrom), final_map.shape[0]
    volume = np.asarray(final_map, np.float32)
    if not np.isfinite(volume).all() or not volume.std() > 0:
        raise InputError("the map is empty or contains NaN", "the refinement that made it failed", "check its report")
    known = params.resolution_angstrom or (float(resolution_angstrom) if resolution_angstrom is not None else float("nan"))
    if not np.isfinite(known):
        raise InputError(
            "the resolution of the map is unknown",
            "it has no half-maps, or its refinement has not succeeded",
            "set dock.resolution_angstrom",
        )
    resolution = max(known, 2.1 * voxel)
    length = box * voxel
    atoms = atoms_of(structure_of(model_file))
    centre = atoms.positions.mean(0)
    reach = float(np.linalg.norm(atoms.positions - centre, axis=1).max())
    if 2.0 * reach > _LARGEST_SHARE * np.sqrt(3.0) * length:
        raise InputError(
            f"a model of {2 * reach:.0f} A does not fit into a map of {length:.0f} A",
            "the map was cropped, its voxel size is wrong, or the model is a whole crystal or another assembly",
            "check the voxel size, and import_model.assembly",
        )
    # no finer than needed: a box of 64 voxels takes seconds
    small = 2 * int(np.ceil(length / max(resolution, FINEST_ANGSTROM) * _VOXELS_PER_RESOLUTION / 2.0)) + 4
    small = min(small, box - box % 2)
    coarse = length / small
    fixed = resample_map(torch.from_numpy(volume), voxel, small, coarse, cut_angstrom=2.0 * coarse)
    moving = torch.from_numpy(density(atoms, atoms.positions - centre, small, coarse, _B_FACTOR_A2))
    own, other = dock_both_hands(
        fixed.to(context.device), moving.to(context.device), coarse, max(resolution, 2.06 * coarse), seed=params.seed
    )
    hand = decided_hand(own.white, other.white, resolution)
    best = other if hand == "mirrored" else own if hand == "right" or own.white >= other.white else other
    rotation = best.rotation.cpu().numpy().T
    shift = best.shift_px.cpu().numpy() * coarse + box // 2 * voxel - rotation @ centre
    return {
        "model_file": moved_file(model_file, rotation, shift),
        "dock_hand": hand,
        "dock_correlation": own.white,
        "dock_correlation_mirrored": other.white,
        "dock_resolution_angstrom": resolution,
        "dock_rotation": rotation,
        "dock_shift_angstrom": shift,
    }


@dock.sentence
def says(result: Mapping[str, Any]) -> str:
    """The hand and the correlations."""
    from cryodask.kernels.docking import COARSEST_HAND_ANGSTROM, LEAST_CORRELATION

    own, other = float(result["dock_correlation"]), float(result["dock_correlation_mirrored"])
    figures = f"correlation {own:.2f}, with the mirror image {other:.2f}"
    hand, resolution = str(result["dock_hand"]), float(result["dock_resolution_angstrom"])
    if hand == "right":
        return f"the model fits: the map has the correct hand ({figures})"
    if hand == "mirrored":
        return f"the model fits the mirror image: the map has the wrong hand ({figures}); add  - hand: {{from: {{model: dock}}}}"
    if resolution > COARSEST_HAND_ANGSTROM:
        return f"handedness is undetermined at {resolution:.1f} A ({figures})"
    if max(own, other) < LEAST_CORRELATION:
        return f"the model does not fit: another molecule, another state, or a poor map ({figures})"
    return f"handedness is undetermined: neither hand fits clearly better ({figures})"


@dock.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """Correlations of both hands."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 1.6), layout="constrained")
    axes = figure.subplots()
    values = [float(ds["dock_correlation"]), float(ds["dock_correlation_mirrored"])]
    fits = {"right": 0, "mirrored": 1}.get(str(ds["dock_hand"].values))
    bars = axes.barh(["map", "mirror image"], values, color=["steelblue" if i == fits else "#bbbbbb" for i in range(2)])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set(xlabel="correlation of whitened spectra", xlim=(min(0.0, *values), 1.12), xticks=np.linspace(0, 1, 6))
    axes.invert_yaxis()
    yield Picture("Docking", says({str(name): ds[name].values for name in ds.data_vars if str(name).startswith("dock_")}), figure)
