"""Particles with poses, for stages that keep these fixed: checks, loading, the mask, and the consensus map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cryodask.errors import InputError
from cryodask.kernels.fourier import resize_map, soft_sphere
from cryodask.kernels.fsc import fsc
from cryodask.kernels.known_poses import Posed
from cryodask.kernels.masking import low_pass
from cryodask.kernels.orientations import euler_to_matrix
from cryodask.kernels.regions import density_threshold
from cryodask.kernels.resampling import resample_map
from cryodask.kernels.rows import image_rows
from cryodask.stage import Context, ParticleBlock, ParticleSet, State
from cryodask.stages import _groups as gr
from cryodask.stages._particle_checks import check_mask, check_particles
from cryodask.stages._refinement import map_box

_POSE = ("rot_deg", "tilt_deg", "psi_deg", "origin_y_angstrom", "origin_x_angstrom")
_LEAST_DENSE_SHARE = 0.02
"""Share of a mask that must hold density of the map."""
_LEAST_AGREEMENT = 0.3
_AGREEMENT_ANGSTROM = 25.0


@dataclass(frozen=True)
class Loaded:
    """Particles of a block; ``rows`` are their images, ``micrograph`` the row of their micrograph in the state."""

    index: np.ndarray
    micrograph: np.ndarray
    posed: Posed

    @property
    def rows(self) -> Any:
        """Their images, as the sums of :mod:`cryodask.stages._groups` expect them."""
        return self.posed.images


def start_of_posed(params: Any, particles: ParticleSet, inputs: Mapping[str, Any], *, fewest: int, what: str) -> State:
    """The part of a state that all stages with fixed poses share; refuses particles, maps and masks that do not fit.

    Raises
    ------
    InputError
    """
    if particles.count < fewest:
        raise InputError(
            f"{particles.count} particles are too few for {what}: at least {fewest} are needed",
            "",
            "pick or keep more particles (classify3d: or ask for fewer classes)",
        )
    check_particles(particles, params.mask_diameter_angstrom)
    check_poses(particles)
    box, pixel = particles.box, float(particles.pixel_size_angstrom)
    length = box * pixel
    rings = min(int(length / params.resolution_angstrom + 1e-6), box // 2 - 2)
    if box % 2:
        raise InputError(f"{what} needs images of an even box, and these have {box} pixels", "", "extract them with an even box")
    if rings < 4:
        raise InputError(
            f"{what} needs four Fourier shells, but at {params.resolution_angstrom:g} A a box of {box} pixels, {length:.0f} A, has {rings}",
            "the box is small, or resolution_angstrom is too coarse",
            "set a finer resolution_angstrom, or extract with a larger box",
        )
    reference = resample_map(
        torch.from_numpy(np.array(inputs["final_map"], np.float32)), float(inputs["map_pixel_size_angstrom"]), box, pixel,
        cut_angstrom=max(params.resolution_angstrom, 2.2 * pixel),
    )  # fmt: skip
    small = map_box(rings + 1, box)
    mask = _mask(inputs, reference, pixel)
    return {
        "iteration": 0, "phase": "power", "done": False, "count": particles.count, "box": box, "length_angstrom": length, "rings": rings,
        "mask_diameter_angstrom": params.mask_diameter_angstrom or 0.75 * length, "given": resize_map(reference, small).numpy(),
        "mask": np.zeros(0, np.float32) if mask is None else resize_map(mask, small).clamp(0.0, 1.0).numpy(),
        "agreement": 1.0, **gr.groups_of_set(particles),
    }  # fmt: skip


def check_poses(particles: ParticleSet) -> None:
    """Refuse particles without poses.

    Raises
    ------
    InputError
    """
    nothing = np.full(particles.count, np.nan)
    known = np.isfinite(np.stack([np.asarray(particles.columns.get(name, nothing), float) for name in _POSE])).all(0)
    if not known.all():
        raise InputError(
            f"{int((~known).sum())} of {particles.count} particles have no pose",
            "they were not part of the refinement that gave the poses",
            "refine these particles first, or take the particles of the refinement (from)",
        )


def _mask(inputs: Mapping[str, Any], reference: torch.Tensor, pixel: float) -> torch.Tensor | None:
    """The mask of the input on the grid of the images; refuses one that is empty, everything, or beside the molecule."""
    given = inputs.get("solvent_mask")
    if given is None:
        return None
    given = np.array(given, np.float32)
    check_mask(given, np.shape(inputs["final_map"]))
    voxel = float(inputs["map_pixel_size_angstrom"])
    mask = resample_map(torch.from_numpy(given), voxel, reference.shape[-1], pixel, cut_angstrom=2.2 * max(pixel, voxel)).clamp(0.0, 1.0)
    total = float(mask.sum())
    if total < 8.0 or float(mask.mean()) > 0.9:
        raise InputError(
            f"the mask fills {100 * float(mask.mean()):.1f} % of the box",
            "its threshold does not suit the map",
            "make a soft mask around the part of the molecule that differs",
        )
    smooth = low_pass(reference, pixel, max(15.0, 2.2 * pixel))
    dense = smooth > density_threshold(smooth.numpy())
    share = float((mask * dense).sum()) / total
    if share < _LEAST_DENSE_SHARE:
        raise InputError(
            f"the mask lies outside the molecule: {100 * share:.1f} % of it holds density of the map",
            "it was made in the frame of another map, or its origin is shifted",
            "look at mask and map together in a viewer",
        )
    return mask


def load(params: Any, state: State, block: ParticleBlock, context: Context) -> Loaded:
    """Half transforms of a block's images, with their poses."""
    images = torch.from_numpy(np.ascontiguousarray(block.images, np.float32)).to(context.device)
    group = torch.from_numpy(gr.noise_group(state, block.columns)).to(context.device)
    rows = image_rows(images, block.columns, kept_radius(state), block.pixel_size_angstrom, group)
    angles = (torch.deg2rad(torch.from_numpy(np.array(block.columns[name], np.float64))) for name in _POSE[:3])
    shifts = torch.from_numpy(np.stack([np.array(block.columns[name], np.float64) for name in _POSE[3:]], 1)) / block.pixel_size_angstrom
    posed = Posed(rows, euler_to_matrix(*angles).float().to(context.device), shifts.float().to(context.device))
    return Loaded(block.index, gr.micrograph_rows(state, block.columns), posed)


def kept_radius(state: State) -> int:
    """Highest frequency of the loaded images: one ring beyond the scored ones; all for the last maps."""
    return int(state["box"] // 2 - 1 if state["phase"] == "final" else state["rings"] + 1)


def with_contrast(state: State, block: Loaded) -> Posed:
    """The particles, with the contrast of their micrographs."""
    return block.posed.with_contrast(torch.from_numpy(state["contrast"][block.micrograph]).to(block.posed.images.ctf))


def sphere(state: State, size: int, device: str) -> torch.Tensor:
    """The spherical mask at a working box."""
    radius = state["mask_diameter_angstrom"] / 2
    return soft_sphere(size, state["length_angstrom"] / size, radius, 12.0, device=device)


def agreement_with(state: State, consensus: torch.Tensor) -> float:
    """Mean FSC, to 25 Angstrom, of the given map and the one reconstructed from the particles at their poses."""
    given = torch.from_numpy(state["given"]).to(consensus.device) * sphere(state, consensus.shape[-1], str(consensus.device))
    last = max(3, min(state["rings"], round(state["length_angstrom"] / _AGREEMENT_ANGSTROM)))
    return float(fsc(given, consensus)[2 : last + 1].mean())


def refuse_foreign_poses(state: State) -> None:
    """Refuse poses that do not reproduce the map to which they are said to belong; called by the driver.

    Raises
    ------
    InputError
    """
    if state["agreement"] < _LEAST_AGREEMENT:
        raise InputError(
            f"the particles at their poses do not reproduce the input map: the mean FSC to 25 A is {state['agreement']:.2f}",
            "the poses belong to another frame (mirrored, aligned to another map), or their convention differs",
            "give the map and the poses of one refinement, or refine the particles against this map",
        )
