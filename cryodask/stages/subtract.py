"""Stage ``subtract``: particle images without the signal of a part of the molecule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError, MicrographError
from cryodask.products import Product
from cryodask.stage import Context, Output, Params, ParticleBlock, Picture, Resources, Sizes, port, stage

if TYPE_CHECKING:
    import xarray as xr

_POSE = ("rot_deg", "tilt_deg", "psi_deg", "origin_y_angstrom", "origin_x_angstrom")
_LEAST_CONTRAST = 0.2


class SubtractParams(Params):
    """Parameters of ``subtract``."""

    contrast: bool = Field(
        True, description="scale the subtracted signal by the contrast of each exposure; false: as strong as the map says, in all of them"
    )


def _check(params: SubtractParams, inputs: dict[str, list[Product]]) -> Iterator[str]:
    particles = inputs["particles"][0]
    if particles.subtracted:
        yield f"signal was already subtracted from the images of {particles.ref}. Take the particles from before {particles.subtracted}."


def _memory(params: SubtractParams, sizes: Sizes) -> float:
    volumes = 4 * 8.0 * 4 * sizes["z"] * sizes["y"] * sizes["x"]
    return 2.5 * volumes + 24.0 * sizes.get("slot", 1000) * sizes["y"] ** 2


@stage(
    version=1,
    needs=["particle_image", "final_map", "map_pixel_size_angstrom", "solvent_mask"],
    optional=["half_map"],
    gives=[
        "particle_id", "particle_image", "particle_y", "particle_x", "particle_count", "particle_pixel_size_angstrom",
        "subtraction_contrast", "subtracted_share",
    ],
    ports=[
        "exposures[ctf, optics, aberrations?]",
        port("particles[image, pose, ctf?]", copies=True),
        "map[final, half_maps?]",
        "mask!:mask[mask]",
    ],
    outputs=[Output("particles", "particles", ("image",), on="particles", subtracted=True)],
    check=_check,
    resources=Resources(memory=_memory),
)  # fmt: skip
def subtract(
    params: SubtractParams,
    *,
    particle_image: ParticleBlock,
    final_map: np.ndarray,
    map_pixel_size_angstrom: float,
    solvent_mask: np.ndarray,
    half_map: np.ndarray | None = None,
    context: Context,
) -> dict[str, Any]:
    """Subtract from each particle image what it shows of the map outside a mask; the mask (``from: {mask: STEP}``) is what remains.

    Each particle gets the projection of its own half-map at its pose, filtered by the FSC of the half-maps, with the CTF of the
    particle and the aberrations of its optics group; the half-sets stay independent. A map without half-maps is subtracted as it is,
    from both half-sets. The projection is scaled by the contrast of the exposure, which is estimated from all its particles. For one
    asymmetric unit of a symmetric molecule, put ``expand`` first and mask that unit: every copy gets an image of its own.

    Ids, half-sets, poses and centres stay. Steps that need whole images refuse the result; ``classify3d`` and ``refine3d`` take it.
    ``classify3d`` with a mask has the same effect without new images, so write these for other programs, or for a refinement of the
    part (Bai et al. 2015, eLife 4, e11182).
    """
    import torch

    from cryodask.kernels import subtraction as sub
    from cryodask.kernels.orientations import euler_to_matrix

    block = particle_image
    images = torch.from_numpy(np.ascontiguousarray(block.images, np.float32))
    count, box = len(images), images.shape[-1]
    own = {
        "particle_id": block.columns["particle_id"], "particle_image": block.images, "particle_y": block.columns["particle_y"],
        "particle_x": block.columns["particle_x"], "particle_count": count, "particle_pixel_size_angstrom": block.pixel_size_angstrom,
    }  # fmt: skip
    if not count:
        return {**own, "subtraction_contrast": float("nan"), "subtracted_share": float("nan")}
    poses = np.stack([np.asarray(block.columns[name], np.float64) for name in _POSE])
    unknown = int((~np.isfinite(poses)).any(0).sum())
    if unknown:
        raise MicrographError(
            f"{unknown} of {count} particles have no pose", "they were not part of the refinement", "take the particles of the refinement"
        )
    pixel = float(block.pixel_size_angstrom)
    volumes, radius = context.keep(
        ("volumes", box, pixel),
        lambda: _volumes(final_map, half_map, float(map_pixel_size_angstrom), solvent_mask, box, pixel, context.device),
    )
    rotations = euler_to_matrix(*(torch.deg2rad(torch.from_numpy(a)) for a in poses[:3])).float().to(context.device)
    shifts = torch.from_numpy(poses[3:].T / pixel).float().to(context.device)
    halves = np.asarray(block.columns["half_set"])
    whole, outside = (torch.zeros(count, box, box // 2 + 1, dtype=torch.complex64, device=context.device) for _ in range(2))
    for half in (0, 1):
        some = torch.from_numpy(np.flatnonzero(halves == half)).to(context.device)
        columns = {name: np.asarray(values)[halves == half] for name, values in block.columns.items()}
        given = rotations[some], shifts[some], columns, pixel, box, radius
        if len(some):
            whole[some], outside[some] = (sub.shown_spectra(volume, *given) for volume in volumes[half])
    spectra = torch.fft.rfft2(torch.fft.ifftshift(images.to(context.device), dim=(-2, -1))) / box
    contrast = sub.contrast_of(spectra, whole) if params.contrast else 1.0
    if contrast < _LEAST_CONTRAST:
        raise MicrographError(
            f"the particles do not look like the map: their contrast is {contrast:.2f} of what the map predicts",
            "the contrast is inverted, or poses and map belong to different refinements",
            "check the map and the particles of this exposure",
        )
    removed = torch.fft.fftshift(torch.fft.irfft2(contrast * outside * box, s=(box, box)), dim=(-2, -1)).cpu()
    shown = float(outside.abs().square().sum() / whole.abs().square().sum().clamp(min=1e-30))
    return {
        **own, "particle_image": (images - removed).numpy(), "subtraction_contrast": contrast, "subtracted_share": shown,
    }  # fmt: skip


def _volumes(
    final_map: np.ndarray, half_maps: np.ndarray | None, voxel: float, mask: np.ndarray, box: int, pixel: float, device: str
) -> tuple[list[Any], int]:
    """For each half-set, the volumes that slices of the whole map and of its part outside the mask are taken from; their last shell.

    Raises
    ------
    InputError
        If the mask leaves everything or nothing.
    """
    import torch

    from cryodask.kernels import subtraction as sub
    from cryodask.kernels.masking import own_solvent_mask
    from cryodask.kernels.resampling import resample_map
    from cryodask.stages._particle_checks import check_mask

    given = np.stack([final_map, final_map]) if half_maps is None else np.asarray(half_maps)
    check_mask(np.asarray(mask, np.float32), given.shape[1:])
    cut = 2.2 * max(pixel, voxel)
    maps = torch.stack([resample_map(torch.from_numpy(np.array(h, np.float32)), voxel, box, pixel, cut_angstrom=cut) for h in given])
    kept = resample_map(torch.from_numpy(np.array(mask, np.float32)), voxel, box, pixel, cut_angstrom=cut).clamp(0.0, 1.0)
    support = own_solvent_mask(maps.mean(0), pixel, box // 2 - 1)
    filtered, last = sub.filtered_half_maps(maps, support)  # equal ones have an FSC of 1: no filter
    share = float((filtered.mean(0) * kept).square().sum() / filtered.mean(0).square().sum().clamp(min=1e-30))
    if share < 1e-4 or share > 1 - 1e-4:
        raise InputError(
            "the mask holds nothing of the map: nothing would be left of the particles" if share < 0.5 else
            "the mask holds the whole molecule: nothing would be subtracted",
            "it was made in the frame of another map, or it is the mask of the molecule",
            "mask the part that is to remain",
        )  # fmt: skip
    radius = max(4, min(last, box // 2 - 2))
    parts = [(half, half * (1.0 - kept)) for half in filtered]
    return [tuple(sub.slice_volume(part.to(device), radius, box) for part in pair) for pair in parts], radius


@subtract.sentence
def says(result: Mapping[str, Any]) -> str:
    """How strong the signal was, and how much of it is gone."""
    contrast, share = np.asarray(result["subtraction_contrast"]), np.asarray(result["subtracted_share"])
    known = np.isfinite(contrast)
    if not known.any():
        return "no particles"
    low, high = np.quantile(contrast[known], [0.05, 0.95])
    return f"{100 * float(np.median(share[known])):.0f} % of the signal subtracted, scaled by {low:.2f} to {high:.2f}"


@subtract.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """Particles after the subtraction, and the contrast of the exposures."""
    from matplotlib.figure import Figure

    from cryodask.stages._map_pictures import draw_montage, montage

    counts = ds["particle_count"].values
    if not counts.sum():
        return
    first = int(np.flatnonzero(counts > 0)[0])
    images = ds["particle_image"].isel(micrograph=first, slot=slice(0, min(8, int(counts[first])))).values
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    draw_montage(upper, montage(list(images), 8)[0], vmin=-3, vmax=4)
    contrast = ds["subtraction_contrast"].values
    lower.hist(contrast[np.isfinite(contrast)], bins=40, color="steelblue")
    lower.set(xlabel="contrast of the exposure relative to the map", ylabel="exposures")
    caption = f"The first particles without the signal outside the mask; {says({n: ds[n].values for n in _SAID})}."
    yield Picture("Signal subtraction", caption, figure)


_SAID = ("subtraction_contrast", "subtracted_share")
