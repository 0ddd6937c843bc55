"""The map that a refinement starts from: read, checked, brought to the particles' box, masked and cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodask.errors import InputError
from cryodask.formats.mrc import read_map
from cryodask.kernels.fourier import resize_map, soft_sphere
from cryodask.kernels.map_evidence import density_skewness
from cryodask.kernels.projection import cut_map
from cryodask.kernels.resampling import resample_map
from cryodask.stage import ParticleSet
from cryodask.stages._refinement import map_box

if TYPE_CHECKING:
    from cryodask.stages.refine3d import Refine3DParams

_DARK = -0.5
"""Skewness of the density of a box below which its contrast is inverted."""


def start_map(
    params: Refine3DParams, particles: ParticleSet, inputs: dict[str, Any], *, lowpass_angstrom: float, mask_diameter_angstrom: float,
    rings: int,
) -> torch.Tensor:  # fmt: skip
    """Starting map `(z, y, x)` on its own grey scale, without any signal beyond ``rings``."""
    data, voxel, name = _given_map(params, inputs)
    return prepared_map(
        data, voxel, name, particles, lowpass_angstrom=lowpass_angstrom, mask_diameter_angstrom=mask_diameter_angstrom, rings=rings
    )


def prepared_map(
    data: np.ndarray, voxel: float, name: str, particles: ParticleSet, *, lowpass_angstrom: float, mask_diameter_angstrom: float,
    rings: int, dark: bool = False,
) -> torch.Tensor:  # fmt: skip
    """A map called ``name`` at the particles' box, masked and cut at ``rings``; refuses what cannot be a reference.

    ``dark``: whether it may be darker than its surroundings, as maps of junk may be.

    Raises
    ------
    InputError
    """
    voxel = _checked(data, voxel, name, particles)
    box, pixel = particles.box, float(particles.pixel_size_angstrom)
    reference = resample_map(torch.from_numpy(data), voxel, box, pixel, cut_angstrom=lowpass_angstrom / 2)
    if not dark and density_skewness(reference) < _DARK:
        raise InputError(
            f"{name} is darker than its surroundings",
            "the contrast of the map is inverted, or that of the particles that it was made from",
            "multiply it by -1; particles must be white: see the parameter invert of extract",
        )
    sphere = soft_sphere(box, pixel, mask_diameter_angstrom / 2, 12.0)
    outside = reference[sphere == 0]
    reference = (reference - (outside.mean() if outside.numel() else 0.0)) * sphere
    # a soft edge of the low-pass would appear as common signal of the two halves
    return resize_map(cut_map(reference, rings), map_box(rings, box))


def _given_map(params: Refine3DParams, inputs: dict[str, Any]) -> tuple[np.ndarray, float, str]:
    """The starting map as given, its voxel size, and its name in messages."""
    if params.reference is not None:
        data, voxel = read_map(params.reference)
        data = np.array(data, np.float32)
        if data.ndim != 3:
            raise InputError(
                f"{params.reference} is not a three-dimensional map",
                "an image was given as reference",
                "give an MRC map (cubic, voxel size in the header)",
            )
        return data, float(voxel or 0.0), params.reference
    if inputs.get("final_map") is not None:
        return np.array(inputs["final_map"], np.float32), float(inputs["map_pixel_size_angstrom"]), "the starting map"
    raise InputError(
        "refine3d has no map to start from",
        "neither a reference file nor an ab initio map was given",
        "set refine3d.reference to an MRC file, or put ab_initio before refine3d",
    )


def _checked(data: np.ndarray, voxel: float, name: str, particles: ParticleSet) -> float:
    """The voxel size of a map, which must be a cube with finite density."""
    if len(set(data.shape)) != 1:
        raise InputError(
            f"{name} is {' x '.join(map(str, data.shape))} voxels, not a cube",
            "the map was cropped",
            "pad it to a cube, with the molecule at the centre",
        )
    if not np.isfinite(data).all() or data.std() == 0:
        raise InputError(
            f"{name} is empty or contains NaN", "the file is damaged, or a failed run wrote it", "check the map and give another"
        )
    if voxel <= 0:
        if data.shape[0] != particles.box:
            raise InputError(
                f"{name} has no voxel size, and its box is {data.shape[0]}, not {particles.box}",
                "the program that wrote it left the MRC header empty",
                "write the voxel size into the header (for example with relion_image_handler --rescale_angpix or mrcfile)",
            )
        voxel = particles.pixel_size_angstrom
    return voxel
