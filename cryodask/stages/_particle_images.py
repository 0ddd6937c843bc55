"""Images of imported particles: read from their stacks, and converted to the form that the stages assume."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.errors import MicrographError
from cryodask.formats.mrc import open_mrc
from cryodask.formats.star import find_beside
from cryodask.vocabulary import CTF_COLUMNS, OPTICS

SAME_PIXEL_SIZE = 1.0005
"""Ratio of two pixel sizes up to which they count as one."""
_RING = 0.375
"""Radius outside which the background is measured, in boxes, as in ``extract``."""
_NORMAL_MEAN, _NORMAL_SPREAD = 0.5, 2.0


def imported_images(
    star: str, micrograph: str, rows: Mapping[str, Any], pixel_size_angstrom: float | None, *, invert: bool = False
) -> np.ndarray:
    """Images `(n, y, x)` of the particles of a micrograph, float32, protein white.

    Those that were phase-flipped are flipped back with the CTF of their rows, those whose background is far from mean 0 and standard
    deviation 1 are normalised, and with ``pixel_size_angstrom`` all are scaled to it in Fourier space. ``rows["size"]``: their box in
    pixels, or None for the one that they have. ``invert``: protein is dark in the stacks.

    Raises
    ------
    MicrographError
        If a stack is missing, shorter than the table says, or has another box; if boxes or pixel sizes differ and no scale is asked for;
        if an image is blank or has pixels that are NaN or infinite; if an origin is outside its image.
    """
    images = _read(star, rows)
    blank = 0
    for image in images:
        if not np.isfinite(image).all():
            raise MicrographError(f"Particles of {micrograph} have NaN or infinite pixels.", "the stack is damaged", "extract them again")
        blank += bool(image.std() == 0)
    if blank:
        raise MicrographError(
            f"{blank} of {len(images)} particles of {micrograph} are blank.",
            "the extraction wrote empty boxes",
            "remove them from the STAR file",
        )
    _refuse_repeated(micrograph, images, rows)
    pixel = np.asarray(rows.get("particle_pixel_size_angstrom", np.ones(len(images))), np.float64)
    _check_origins(star, micrograph, rows, np.array([len(image) for image in images]) * pixel)
    kinds = sorted({(len(image), one) for image, one in zip(images, pixel.tolist())})
    size, several = rows.get("size"), len({box for box, _ in kinds}) > 1
    if (size is None and several) or (pixel_size_angstrom is None and pixel.max() > SAME_PIXEL_SIZE * pixel.min()):
        raise MicrographError(
            f"{micrograph} has images of {' and '.join(f'{box} pixels of {one:g} A' for box, one in kinds)}.",
            "the file combines two extractions",
            f"set import_particles: {{pixel_size_angstrom: {pixel.max():g}}} to scale them to the coarsest",
        )
    out: np.ndarray | None = None
    for box, one in kinds:
        here = np.flatnonzero([len(image) == box and its == one for image, its in zip(images, pixel.tolist())])
        stack = np.stack([-images[i] if invert else images[i] for i in here])
        stack = _normalised(_unflipped(stack, {n: np.asarray(v)[here] for n, v in _ctf(rows).items()}, one))
        if size is not None:
            stack = _scaled(stack, one, pixel_size_angstrom or one, int(size))
        out = np.empty((len(images), *stack.shape[1:]), np.float32) if out is None else out
        out[here] = stack
    assert out is not None
    return out


def _refuse_repeated(micrograph: str, images: list[np.ndarray], rows: Mapping[str, Any]) -> None:
    """An image that is there twice would be in both half-sets, whose maps would then agree in its noise."""
    seen: dict[bytes, int] = {}
    pairs = [
        (first, i)
        for i, image in enumerate(images)
        if (first := seen.setdefault(hashlib.blake2b(image.tobytes(), digest_size=16).digest(), i)) != i
    ]
    if pairs:
        one, other = (f"{rows['image_index'][i] + 1}@{rows['stacks'][rows['stack'][i]]}" for i in pairs[0])
        raise MicrographError(
            f"{len(pairs)} of {len(images)} images of {micrograph} are there twice: {one} and {other} are equal to the last bit.",
            "two tables with particles in common were joined, and their stacks written anew",
            "remove one row of each pair from the STAR file",
        )


def _check_origins(star: str, micrograph: str, rows: Mapping[str, Any], length_angstrom: np.ndarray) -> None:
    """A particle is within its image of that length, or its origin is wrong."""
    nothing = np.zeros(len(length_angstrom))
    largest = np.max([np.abs(np.asarray(rows.get(f"origin_{axis}_angstrom", nothing), np.float64)) for axis in "yx"], axis=0)
    outside = np.flatnonzero(largest > length_angstrom / 2)
    if len(outside):
        worst = int(outside[largest[outside].argmax()])
        raise MicrographError(
            f"The origins of {len(outside)} of {len(largest)} particles of {micrograph} in {star} are outside their images: "
            f"up to {largest[worst]:g} A in an image of {length_angstrom[worst]:g} A.",
            "they are in another unit, or the images were extracted again in smaller boxes",
            "correct rlnOriginXAngst and rlnOriginYAngst, or remove these rows",
        )


def stack_beside(name: str, star: str) -> Path:
    """A stack that a STAR file names.

    Raises
    ------
    MicrographError
        If it does not exist.
    """
    path = find_beside(name, Path(star))
    if path is None:
        raise MicrographError(
            f"The stack {name} of {star} does not exist.", "the STAR file was moved without its stacks", "copy them beside it"
        )
    return path


def _read(star: str, rows: Mapping[str, Any]) -> list[np.ndarray]:
    """Each row's image `(y, x)`, as it is in its stack."""
    out: list[Any] = [None] * len(rows["image_index"])
    told = np.asarray(rows["box"]).tolist() if "box" in rows else None
    for code, stack in enumerate(rows["stacks"]):
        path = stack_beside(stack, star)
        frames = open_mrc(path, MicrographError)
        here = np.nonzero(rows["stack"] == code)[0]
        index = rows["image_index"][here]
        if index.max(initial=0) >= len(frames):
            raise MicrographError(
                f"{path} has {len(frames)} images, but {star} refers to number {int(index.max()) + 1}.",
                "the stack is truncated, or belongs to another STAR file",
                "copy it again",
            )
        height, width = frames.shape[1:]
        if height != width:
            raise MicrographError(f"{path} has images of {height} x {width} pixels.", "it is not a stack of particles", "check the path")
        for place, i in zip(here.tolist(), index.tolist()):
            if told is not None and told[place] != width:
                raise MicrographError(
                    f"{path} has boxes of {width} pixels, but rlnImageSize in {star} is {told[place]}.",
                    "the stack belongs to another extraction",
                    "give the STAR file that was written with it",
                )
            out[place] = np.asarray(frames[i], np.float32)
    return out


def _ctf(rows: Mapping[str, Any]) -> dict[str, Any]:
    """The CTF parameters of each row, and whether its image was phase-flipped."""
    count = len(rows["image_index"])
    out = {name: rows.get(name, np.zeros(count)) for name in (*CTF_COLUMNS, *OPTICS, "phase_flipped")}
    return out if "defocus_v_angstrom" in rows else {**out, "defocus_v_angstrom": out["defocus_u_angstrom"]}


def _unflipped(images: np.ndarray, ctf_of: Mapping[str, np.ndarray], pixel_size_angstrom: float) -> np.ndarray:
    """Images that were multiplied by the sign of their CTF are multiplied by it again."""
    flipped = np.flatnonzero(ctf_of["phase_flipped"])
    if not len(flipped):
        return images
    import torch

    from cryodask.kernels.ctf import ctf
    from cryodask.kernels.fourier import frequencies

    def column(name: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(ctf_of[name], np.float64)[flipped])[:, None, None]

    box = images.shape[-1]
    ky, kx = (k.double() / (box * pixel_size_angstrom) for k in frequencies((box, box)))
    values = ctf(
        ky[None],
        kx[None],
        defocus_angle_rad=torch.deg2rad(column("defocus_angle_deg")),
        phase_shift_rad=torch.deg2rad(column("phase_shift_deg")),
        **{name: column(name) for name in ("defocus_u_angstrom", "defocus_v_angstrom", *OPTICS)},
    )
    spectrum = torch.fft.fft2(torch.from_numpy(images[flipped]).double())
    out = images.copy()
    out[flipped] = torch.fft.ifft2(spectrum * torch.where(values < 0, -1.0, 1.0)).real.float().numpy()
    return out


def _normalised(images: np.ndarray) -> np.ndarray:
    """Images whose background has about mean 0 and standard deviation 1 stay as they are; others are normalised to it."""
    box = images.shape[-1]
    offset = np.arange(box) - box // 2
    ring = images[:, np.hypot(offset[:, None], offset) > _RING * box]
    mean, spread = np.median(ring.mean(1)), np.median(ring.std(1))
    if abs(mean) <= _NORMAL_MEAN and 1.0 / _NORMAL_SPREAD <= spread <= _NORMAL_SPREAD:
        return images
    import torch

    from cryodask.kernels.extraction import normalise_background

    return normalise_background(torch.from_numpy(images), _RING * box, ramp=False).numpy()


def _scaled(images: np.ndarray, pixel_size_angstrom: float, wanted_angstrom: float, size: int) -> np.ndarray:
    """Images `(n, size, size)` of another pixel size, their centres still at n // 2, their background normalised again.

    Where they are smaller than that they are mirrored at their edges, as micrographs are in ``extract``.
    """
    box = images.shape[-1]
    same = 1.0 / SAME_PIXEL_SIZE < wanted_angstrom / pixel_size_angstrom < SAME_PIXEL_SIZE
    if same and size == box:
        return images
    import torch

    from cryodask.kernels.extraction import normalise_background
    from cryodask.kernels.fourier import resize_images
    from cryodask.stages.extract import common_scale

    whole = 2 * math.floor(box * pixel_size_angstrom / wanted_angstrom / 2 + 1e-3)
    if size > whole:
        before = size // 2 - whole // 2
        inner = images if same and whole == box else _scaled(images, pixel_size_angstrom, wanted_angstrom, whole)
        wider = np.pad(inner, ((0, 0), *((before, size - whole - before),) * 2), mode="symmetric")
        return normalise_background(torch.from_numpy(wider), _RING * size, ramp=False).numpy()
    cut, reduced = (size, size) if same else common_scale(pixel_size_angstrom, wanted_angstrom, size)
    # the ratio of integers may need a box that is larger than the images: their background has mean 0
    wide = np.zeros((len(images), cut, cut), np.float32)
    shared = min(box, cut)
    there, here = (slice(n // 2 - shared // 2, n // 2 - shared // 2 + shared) for n in (cut, box))
    wide[:, there, there] = images[:, here, here]
    edge = reduced // 2 - size // 2
    small = resize_images(torch.from_numpy(wide), reduced)[:, edge : edge + size, edge : edge + size]
    return normalise_background(small.contiguous(), _RING * size, ramp=False).numpy()
