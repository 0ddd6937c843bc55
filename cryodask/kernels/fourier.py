"""Fourier helpers shared by the kernels.

Real-space origin of images and maps is index n // 2 (RELION). Two-dimensional transforms of particles are DFT / n, so that white
noise of variance s2 per pixel has E|N_k|^2 = s2.
"""

from __future__ import annotations

import math

import scipy.fft
import torch
from torch import Tensor


def frequencies(shape: tuple[int, ...], device: torch.device | str = "cpu") -> list[Tensor]:
    """Integer Fourier indices of a full FFT along each axis, shaped to broadcast (one tensor per axis)."""
    out = []
    for axis, n in enumerate(shape):
        k = torch.fft.fftfreq(n, d=1.0 / n, device=device)
        out.append(k.reshape([-1 if a == axis else 1 for a in range(len(shape))]))
    return out


def radius(shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Length of the integer frequency vector at every point of a full FFT, float32."""
    return torch.sqrt(sum((k * k for k in frequencies(shape, device)), torch.zeros(1, device=device)))


def centred_fft2(images: Tensor) -> Tensor:
    """FFT / n of square images `(..., y, x)` whose origin is n // 2; full complex plane, zero frequency first."""
    return torch.fft.fft2(torch.fft.ifftshift(images, dim=(-2, -1))) / images.shape[-1]


def centred_ifft2(transforms: Tensor) -> Tensor:
    """Inverse of :func:`centred_fft2`, real part."""
    return torch.fft.fftshift(torch.fft.ifft2(transforms).real, dim=(-2, -1)) * transforms.shape[-1]


def resize_images(images: Tensor, size: int) -> Tensor:
    """Crop or pad square images `(..., y, x)` in Fourier space to `(..., size, size)`; the origin stays at n // 2.

    Grey values keep their scale (the mean does not change), so white noise of variance s2 leaves with s2 (size/n)^2.
    """
    n = images.shape[-1]
    if size == n:
        return images
    spectrum = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(images, dim=(-2, -1))), dim=(-2, -1))
    out = _centre_window(spectrum, size, dims=2)
    image = torch.fft.ifft2(torch.fft.ifftshift(out, dim=(-2, -1))).real
    return torch.fft.fftshift(image, dim=(-2, -1)) * (size / n) ** 2


def shift_images(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Shift real images `(particle, y, x)` by ``down, right`` `(particle,)` pixels, fractions included, with a phase ramp.

    Images are periodic: what leaves at one edge enters at the opposite one. At Nyquist only the even part is shifted.
    """
    height, width = images.shape[-2:]
    fy = torch.fft.fftfreq(height, device=images.device)[None, :, None]
    fx = torch.fft.rfftfreq(width, device=images.device)[None, None]
    turns = fy * down.float()[:, None, None] + fx * right.float()[:, None, None]
    return real_ifft2(real_fft2(images) * torch.polar(torch.ones_like(turns), -2 * torch.pi * turns), (height, width))


def resize_map(volume: Tensor, size: int) -> Tensor:
    """Crop or pad a cubic map `(z, y, x)` in Fourier space; density values keep their scale."""
    n = volume.shape[-1]
    if size == n:
        return volume
    out = _centre_window(torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(volume))), size, dims=3)
    return torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(out)).real) * (size / n) ** 3


def _centre_window(array: Tensor, size: int, dims: int) -> Tensor:
    """Cut or zero-pad the last ``dims`` axes about index n // 2; an even crop drops the Nyquist row's lone half."""
    n = array.shape[-1]
    if size < n:
        start = n // 2 - size // 2
        for d in range(1, dims + 1):
            array = array.narrow(-d, start, size)
        if size % 2 == 0:
            array = array.clone()
            for d in range(1, dims + 1):
                array.narrow(-d, 0, 1).zero_()
        return array
    out = torch.zeros(*array.shape[:-dims], *([size] * dims), dtype=array.dtype, device=array.device)
    start = size // 2 - n // 2
    view = out
    for d in range(1, dims + 1):
        view = view.narrow(-d, start, n)
    view.copy_(array)
    return out


def soft_sphere(
    n: int,
    pixel_size_angstrom: float,
    radius_angstrom: float,
    edge_angstrom: float,
    *,
    dims: int = 3,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Mask `(n,) * dims`: 1 inside ``radius_angstrom``, a raised cosine over the next ``edge_angstrom``, then 0."""
    x = (torch.arange(n, device=device) - n // 2).float() * pixel_size_angstrom
    r2 = sum(((x * x).reshape([-1 if a == d else 1 for a in range(dims)]) for d in range(dims)), torch.zeros(1, device=device))
    return 0.5 + 0.5 * torch.cos(math.pi * ((torch.sqrt(r2) - radius_angstrom) / edge_angstrom).clamp(0.0, 1.0))


def smooth_size(n: int) -> int:
    """The least even size >= n with no prime factor above 5: a transform of 3712 costs a third of one of 3710."""
    n += n % 2
    while True:
        rest = n
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        if rest == 1:
            return n
        n += 2


def real_fft2(images: Tensor) -> Tensor:
    """``torch.fft.rfft2`` over the last two axes; on the CPU by pocketfft, which is faster for float32 than torch's MKL."""
    if images.device.type != "cpu":
        return torch.fft.rfft2(images)
    return torch.from_numpy(scipy.fft.rfft2(images.numpy(), workers=1))


def real_ifft2(transforms: Tensor, shape: tuple[int, int], *, overwrite: bool = False) -> Tensor:
    """``torch.fft.irfft2`` over the last two axes to `(..., *shape)`; on the CPU by pocketfft, which may use the memory of its input."""
    if transforms.device.type != "cpu":
        return torch.fft.irfft2(transforms, s=shape)
    return torch.from_numpy(scipy.fft.irfft2(transforms.numpy(), s=shape, workers=1, overwrite_x=overwrite))


def blur(image: Tensor, sigma: float) -> Tensor:
    """A periodic image `(y, x)` convolved with a normal distribution of standard deviation ``sigma``, pixels."""
    ky = torch.fft.fftfreq(image.shape[0], device=image.device)[:, None]
    kx = torch.fft.rfftfreq(image.shape[1], device=image.device)[None]
    return torch.fft.irfft2(torch.fft.rfft2(image) * torch.exp(-2.0 * (math.pi * sigma) ** 2 * (ky * ky + kx * kx)), s=image.shape)
