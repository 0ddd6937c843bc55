"""Stage ``model_map``: agreement of a docked model with its map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.stage import Context, Params, Picture, Resources, Sizes, stage

if TYPE_CHECKING:
    import xarray as xr

_LEAST_INSIDE = 0.9
POOR = 0.5
"""Correlation below which a residue counts as not fitting."""


class ModelMapParams(Params):
    """Parameters of ``model_map``."""

    window_angstrom: float = Field(3.0, gt=0, description="standard deviation of the Gaussian window of the local correlation, Angstrom")
    b_factor_angstrom2: float = Field(100.0, ge=0, description="B factor given to all atoms when the density is computed, A^2")


def _memory(params: ModelMapParams, sizes: Sizes) -> float:
    return 3e8 + 150.0 * sizes["z"] * sizes["y"] * sizes["x"]


@stage(
    version=1,
    shape="whole",
    needs=["final_map", "map_pixel_size_angstrom", "model_file"],
    ports=["map[final]", "model[atoms]"],
    outputs=[],
    gives=["model_fsc", "model_frequency", "model_resolution_angstrom", "residue_name", "residue_correlation"],
    resources=Resources(memory=_memory),
)
def model_map(
    params: ModelMapParams, *, final_map: np.ndarray, map_pixel_size_angstrom: float, model_file: np.ndarray, context: Context
) -> dict[str, Any]:
    """Compare a docked model with its map: FSC under the model's mask, and the local correlation of each residue.

    The density of the model is computed from its atoms. The mask reaches 5 A beyond them, with a soft edge of 8 A; the resolution is where
    the FSC falls below 0.5. The correlation of a residue is that of map and density in a Gaussian window, averaged over its
    atoms: a part of the model that is displaced by 4 A has about 0.2, correct parts have 0.97 (simulated at 4 A).
    """
    import torch

    from cryodask.kernels.fsc import fsc, resolution_at
    from cryodask.kernels.model_scores import at_places, local_correlation, mask_about
    from cryodask.stages._models import atoms_of, density, structure_of

    voxel, box = float(map_pixel_size_angstrom), final_map.shape[0]
    atoms = atoms_of(structure_of(model_file))
    places = atoms.positions / voxel
    inside = float(((places >= 0) & (places <= box - 1)).all(1).mean())
    if inside < _LEAST_INSIDE:
        raise InputError(
            f"{100 * (1 - inside):.0f} % of the model lies outside the map",
            "it has not been docked, or was docked in another map",
            "dock it in this map",
        )
    volume = torch.from_numpy(np.asarray(final_map, np.float32)).to(context.device)
    made = density(atoms, atoms.positions - box // 2 * voxel, box, voxel, params.b_factor_angstrom2)
    own = torch.from_numpy(made).to(context.device)
    mask = mask_about(places, box, voxel).to(context.device)
    curve = fsc(volume * mask, own * mask).cpu()
    local = at_places(local_correlation(volume, own, voxel, sd_angstrom=params.window_angstrom), places)
    count = np.bincount(atoms.residue)
    return {
        "model_fsc": curve.numpy(),
        "model_frequency": np.arange(box // 2 + 1) / (box * voxel),
        "model_resolution_angstrom": resolution_at(curve, 0.5, box, voxel),
        "residue_name": np.array(atoms.residues),
        "residue_correlation": (np.bincount(atoms.residue, np.nan_to_num(local)) / count).astype(np.float32),
    }


@model_map.sentence
def says(result: Mapping[str, Any]) -> str:
    """Resolution, and how many residues do not fit."""
    local = np.asarray(result["residue_correlation"])
    poor = float((local < POOR).mean())
    said = f"model and map agree to {float(result['model_resolution_angstrom']):.1f} A; median residue correlation {np.median(local):.2f}"
    return f"{said}; {100 * poor:.0f} % of the residues do not fit" if poor > 0 else said


@model_map.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """Map-model FSC, and the correlation along each chain."""
    from matplotlib.figure import Figure

    names, local = [str(n) for n in ds["residue_name"].values], ds["residue_correlation"].values
    chains = np.array([name.split()[0] for name in names])
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    top.plot(ds["model_frequency"].values[1:], ds["model_fsc"].values[1:], color="black")
    top.axhline(0.5, color="black", lw=0.6, ls=":")
    top.set(xlabel="spatial frequency, 1/Å", ylabel="map-model FSC", ylim=(-0.1, 1.03))
    for chain in dict.fromkeys(chains):
        at = np.flatnonzero(chains == chain)
        bottom.plot(at, local[at], lw=0.8, label=chain)
    bottom.axhline(POOR, color="black", lw=0.6, ls=":")
    bottom.set(xlabel="residue, chain after chain", ylabel="local correlation", ylim=(-0.3, 1.03))
    if len(set(chains)) <= 12:
        bottom.legend(frameon=False, ncols=12, fontsize=7)
    yield Picture("Model and map", says({str(name): ds[name].values for name in ds.data_vars}) + ".", figure)
