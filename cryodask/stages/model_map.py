"""Stage ``model_map``: agreement of a docked model with its map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.stage import Context, Params, Picture, Resources, Sizes, stage
from cryodask.stages._model_pictures import POOR, draw_chains, draw_elements, draw_model_fsc

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor

    from cryodask.stages._models import Atoms

_LEAST_INSIDE = 0.9


class ModelMapParams(Params):
    """Parameters of ``model_map``."""

    window_angstrom: float = Field(3.0, gt=0, description="standard deviation of the Gaussian window of the local correlation, Angstrom")
    b_factor_angstrom2: float = Field(100.0, ge=0, description="B factor given to all atoms when the density is computed, A^2")
    resolution_angstrom: float | None = Field(
        None, gt=0, description="resolution of the map, Angstrom; by default that of its half-maps, else that of the map-model FSC"
    )


def _memory(params: ModelMapParams, sizes: Sizes) -> float:
    return 5e8 + 150.0 * sizes["z"] * sizes["y"] * sizes["x"]


@stage(
    version=2,
    shape="whole",
    needs=["final_map", "map_pixel_size_angstrom", "model_file"],
    optional=["resolution_angstrom", "sharpened_map", "dock_hand"],
    ports=["map[final, fsc?, view?]", "model[atoms]"],
    outputs=[],
    gives=[
        "model_fsc", "model_frequency", "model_resolution_angstrom", "residue_name", "residue_kind", "residue_correlation", "residue_q",
        "residue_q_expected", "atom_residue", "atom_q", "q_resolution_angstrom", "q_missing", "q_map", "element_name", "element_kind",
        "element_first", "element_last", "element_correlation", "element_q", "element_source", "waters_left_out", "hydrogens_left_out",
        "alternates_left_out",
    ],
    resources=Resources(memory=_memory),
)  # fmt: skip
def model_map(
    params: ModelMapParams,
    *,
    final_map: np.ndarray,
    map_pixel_size_angstrom: float,
    model_file: np.ndarray,
    resolution_angstrom: float | None = None,
    sharpened_map: np.ndarray | None = None,
    dock_hand: str | None = None,
    context: Context,
) -> dict[str, Any]:
    """Compare a docked model with its map: FSC under the model's mask; local correlation and Q-score of each residue, helix and strand.

    The density of the model is computed from its atoms. The mask reaches 5 A beyond them, with a soft edge of 8 A; the resolution is where
    the FSC falls below 0.5. The correlation of a residue is that of map and density in a Gaussian window, averaged over its
    atoms: a part of the model that is displaced by 4 A has about 0.2, correct parts have 0.97 (simulated at 4 A).

    Q-scores (Pintilie et al. 2020) say how much the density about each atom looks like that of a resolved one. They are those of the
    sharpened or filtered map, if there is one; maps worse than 4.5 A and models with one atom per residue have none. Beside them is what
    the same model has in a map that agrees with it: the density of the model with the amplitudes that the map has in each shell.

    Waters, hydrogens and second conformations take no part; ligands do. Helices and strands are those of the file's records, in chains
    without any those of the CA atoms (P-SEA, Labesse et al. 1997).
    """
    import torch

    from cryodask.kernels.fsc import fsc, resolution_at
    from cryodask.kernels.model_scores import at_places, local_correlation, mask_about
    from cryodask.stages._model_parts import parts_of, secondary_structure
    from cryodask.stages._models import atoms_of, check_hand, density, structure_of

    check_hand(dock_hand)
    voxel, box = float(map_pixel_size_angstrom), final_map.shape[0]
    structure = structure_of(model_file)
    atoms, parts = atoms_of(structure), parts_of(structure)
    if not np.isfinite(final_map).all() or not np.std(final_map) > 0:
        raise InputError("the map is empty or contains NaN", "the refinement that made it failed", "check its report")
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
    agrees_to = resolution_at(curve, 0.5, box, voxel)
    correlation = per_residue(at_places(local_correlation(volume, own, voxel, sd_angstrom=params.window_angstrom), places), atoms)
    known = params.resolution_angstrom or (float(resolution_angstrom) if resolution_angstrom is not None else float("nan"))
    resolution = max(known if np.isfinite(known) else agrees_to, 2.0 * voxel)
    missing = why_no_q(resolution, parts.only_guides)
    q = expected = np.full(len(atoms.elements), np.nan, np.float32)
    if not missing:
        scored = volume if sharpened_map is None else torch.from_numpy(np.asarray(sharpened_map, np.float32)).to(context.device)
        q, expected = scores(scored, own, mask, voxel, resolution, atoms)
    elements, source = secondary_structure(structure, parts)
    residue_q = per_residue(q, atoms)
    return {
        "model_fsc": curve.numpy(),
        "model_frequency": np.arange(box // 2 + 1) / (box * voxel),
        "model_resolution_angstrom": agrees_to,
        "residue_name": np.array(atoms.residues),
        "residue_kind": parts.kinds,
        "residue_correlation": correlation,
        "residue_q": residue_q,
        "residue_q_expected": per_residue(expected, atoms),
        "atom_residue": atoms.residue.astype(np.int32),
        "atom_q": q,
        "q_resolution_angstrom": resolution,
        "q_missing": missing,
        "q_map": "unsharpened" if sharpened_map is None else "sharpened",
        "element_name": np.array([named(atoms.residues, e.first, e.last) for e in elements], dtype=str),
        "element_kind": np.array([e.kind for e in elements], dtype=str),
        "element_first": np.array([e.first for e in elements], np.int32),
        "element_last": np.array([e.last - 1 for e in elements], np.int32),
        "element_correlation": np.array([correlation[e.first : e.last].mean() for e in elements], np.float32),
        "element_q": np.array([residue_q[e.first : e.last].mean() for e in elements], np.float32),
        "element_source": source,
        "waters_left_out": parts.waters,
        "hydrogens_left_out": parts.hydrogens,
        "alternates_left_out": parts.alternates,
    }


def why_no_q(resolution_angstrom: float, only_guides: bool) -> str:
    """Why Q-scores would mean nothing; empty if they mean something."""
    from cryodask.kernels.q_score import COARSEST_ANGSTROM

    if only_guides:
        return "the model has one atom per residue, and the atoms between them are missing"
    if resolution_angstrom > COARSEST_ANGSTROM:
        return f"at {resolution_angstrom:.1f} A atoms are not resolved; they are computed to {COARSEST_ANGSTROM:g} A"
    return ""


def scores(
    volume: Tensor, own: Tensor, mask: Tensor, voxel_angstrom: float, resolution_angstrom: float, atoms: Atoms
) -> tuple[np.ndarray, np.ndarray]:
    """Q-scores of the atoms in a map `(z, y, x)`, and in the model's density with the map's amplitudes, both `(atom,)`."""
    from cryodask.kernels.model_scores import with_amplitudes_of
    from cryodask.kernels.q_score import q_scores

    agreeing = with_amplitudes_of(volume, own, mask, voxel_angstrom, resolution_angstrom)
    return tuple(q_scores(one.cpu().numpy(), voxel_angstrom, atoms.positions) for one in (volume, agreeing))  # type: ignore[return-value]


def per_residue(values: np.ndarray, atoms: Atoms) -> np.ndarray:
    """Mean over the atoms of each residue `(residue,)` float32; atoms outside the map, which are NaN, count as 0 unless all are NaN."""
    if np.isnan(values).all():
        return np.full(len(atoms.residues), np.nan, np.float32)
    return np.asarray(np.bincount(atoms.residue, np.nan_to_num(values)) / np.bincount(atoms.residue), np.float32)


def named(residues: list[str], first: int, last: int) -> str:
    """Chain, first and last residue number of the residues from row ``first`` to ``last`` - 1: ``A 12-25``."""
    chain, _, start = residues[first].rsplit(" ", 2)
    return f"{chain} {start}-{residues[last - 1].rsplit(' ', 1)[1]}"


@model_map.sentence
def says(result: Mapping[str, Any]) -> str:
    """Resolution, how many residues do not fit, and the Q-score."""
    local = np.asarray(result["residue_correlation"])
    poor = float((local < POOR).mean())
    said = f"model and map agree to {float(result['model_resolution_angstrom']):.1f} A; median residue correlation {np.median(local):.2f}"
    said += f"; {100 * poor:.0f} % of the residues do not fit" if poor > 0 else ""
    if "residue_q" not in result:  # results of version 1
        return said
    if str(result["q_missing"]):
        return f"{said}; no Q-scores: {result['q_missing']}"
    q, expected = (float(np.nanmean(np.asarray(result[name]))) for name in ("residue_q", "residue_q_expected"))
    return f"{said}; mean Q-score {q:.2f} ({expected:.2f} if the map agreed with the model)"


@model_map.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """Map-model FSC; correlation and Q-scores along the chains, with helices and strands; the elements that fit worst."""
    yield draw_model_fsc(ds, says({str(name): ds[name].values for name in ds.data_vars}))
    yield draw_chains(ds)
    if len(ds.get("element_name", ())):
        yield draw_elements(ds)
