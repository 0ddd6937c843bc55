"""Displacements of particles, frame by frame, measured against their reference by Fisher scoring.

A particle p in frame f is cut at the rounded predicted position; e is what rounding left over, in pixels. With its transform X, the
reference V (CTF times slice of the particle's own half-map), the damage a of the frame and the noise power s2 of the ring,

    log L = -sum |X - a V exp(-2 pi i k.e / box)|^2 / s2

over half of Fourier space. The step towards its maximum is the gradient over the EXPECTED curvature, and the variance of the step is one
over that: at the signal of one particle in one frame the observed curvature changes sign.

Transforms are kept as rows, ky = -radius .. radius and kx = 0 .. radius, so that the phases of a shift separate into two factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels.aberrations import NEUTRAL, magnification, odd_phase
from cryodask.kernels.extraction import cut_boxes
from cryodask.kernels.fourier import radius as fourier_radius
from cryodask.kernels.fourier import real_fft2
from cryodask.kernels.projection import PADDING, FourierVolume, fourier_volume, slices
from cryodask.kernels.rows import ctf_numbers, independent, row_shells
from cryodask.kernels.warp import upsample_field

LEAST_AMOUNT = 0.4
"""Particles that show less than this share of the signal expected of them have no say."""
_LEAST_SIGNIFICANCE = 3.0
"""Nor have those whose signal is below this many standard deviations of noise."""
_SILENT = 1e-6
"""What is left of the information of a particle without a say."""
_NYQUIST_MARGIN = 1.1
_LOT = 64


@dataclass(frozen=True)
class Sampling:
    """How particles are cut: ``box`` pixels of frames binned by ``binning``, compared up to ``radius`` (cycles per box).

    ``pixel_size_angstrom``: of a pixel of the movie.
    """

    box: int
    binning: int
    radius: int
    pixel_size_angstrom: float

    @property
    def length_angstrom(self) -> float:
        """Edge of the box."""
        return self.box * self.binning * self.pixel_size_angstrom


def choose_sampling(length_angstrom: float, pixel_size_angstrom: float, finest_angstrom: float) -> Sampling:
    """Sampling of boxes of about ``length_angstrom`` that holds detail up to ``finest_angstrom``.

    Displacements need little detail: in a simulated session 95 % of the information lay below 1 / 8.8 A.
    """
    finest = max(finest_angstrom, 2.0 * _NYQUIST_MARGIN * pixel_size_angstrom)
    binning = max(1, int(finest / (2.0 * _NYQUIST_MARGIN * pixel_size_angstrom)))
    box = 2 * round(length_angstrom / (2.0 * binning * pixel_size_angstrom))
    radius = min(int(box * binning * pixel_size_angstrom / finest), box // 2 - 2)
    return Sampling(box, binning, radius, pixel_size_angstrom)


@dataclass(frozen=True)
class Reference:
    """Transforms of both half-maps, and the edge of their box, Angstrom."""

    volumes: tuple[FourierVolume, FourierVolume]
    length_angstrom: float


def reference(half_map: Tensor, mask: Tensor, fsc: np.ndarray, voxel_angstrom: float, sampling: Sampling) -> Reference:
    """Half-maps `(2, z, y, x)`, masked and weighted by their corrected FSC `(shell,)` (the Wiener filter of a half-map)."""
    box = half_map.shape[-1]
    curve = np.clip(np.nan_to_num(np.asarray(fsc, np.float64)), 0.0, 1.0)
    below = np.flatnonzero(curve[1:] < 0.143)
    curve[1 + (below[0] if len(below) else len(curve)) :] = 0.0
    length = box * voxel_angstrom
    reach = min(math.ceil(sampling.radius * length / sampling.length_angstrom) + 1, box // 2 - 1)
    shells = fourier_radius((box,) * 3, half_map.device)[..., : box // 2 + 1]
    weight = torch.from_numpy(np.interp(shells.cpu().numpy(), np.arange(len(curve)), curve)).to(half_map)
    volumes = [
        fourier_volume(torch.fft.irfftn(torch.fft.rfftn(half * mask) * weight, s=half.shape), reach, sampling.box) for half in half_map
    ]
    return Reference((volumes[0], volumes[1]), length)


def expected_transforms(
    ref: Reference, sampling: Sampling, half: np.ndarray, rotations: Tensor, columns: Mapping[str, np.ndarray]
) -> Tensor:
    """CTF times slice of each particle's own half-map, `(n, 2 radius + 1, radius + 1)` complex64; 0 where a pixel is not to count.

    Parameters
    ----------
    half : `(n,)`
        0 or 1: which half-map the particle is in.
    rotations : `(n, 3, 3)`
    columns : defocus, optics and, where they are known, aberrations of the particles
    """
    radius, device = sampling.radius, rotations.device
    ky, kx = torch.meshgrid(torch.arange(-radius, radius + 1.0), torch.arange(radius + 1.0), indexing="ij")
    reach = (ref.volumes[0].half - 1) / PADDING
    # one per cent is left for anisotropic magnification
    inside = independent(radius) & (1.01 * torch.hypot(ky, kx) * (ref.length_angstrom / sampling.length_angstrom) <= reach)
    y, x = ky[inside].double(), kx[inside].double()
    numbers = torch.from_numpy(ctf_numbers(columns, sampling.length_angstrom))
    # a binned pixel is the mean over its pixels, and its centre lies between theirs
    response = _bin_response(y, sampling) * _bin_response(x, sampling)
    out = torch.zeros(len(rotations), 2 * radius + 1, radius + 1, dtype=torch.complex64, device=device)
    names = ("voltage_kv", "spherical_aberration_mm", *NEUTRAL)
    known = {n: np.broadcast_to(np.asarray(columns[n], np.float64), (len(rotations),)) for n in names if n in columns}
    kinds = np.stack(list(known.values()), 1)
    for kind in np.unique(kinds, axis=0) if len(rotations) else []:
        values = dict(zip(known, kind))
        turned = torch.from_numpy(magnification(values)) @ torch.stack([x, y]) * (ref.length_angstrom / sampling.length_angstrom)
        phase = odd_phase(values, y / sampling.length_angstrom, x / sampling.length_angstrom)
        factor = torch.polar(response, phase).to(torch.complex64).to(device)
        for h in (0, 1):
            for some in torch.from_numpy(np.flatnonzero((kinds == kind).all(1) & (np.asarray(half) == h))).split(_LOT):
                found = slices(ref.volumes[h], rotations[some], turned[1].float().to(device), turned[0].float().to(device))
                out[some[:, None], inside.nonzero()[:, 0], inside.nonzero()[:, 1]] = found * _ctf(numbers[some], y, x).to(device) * factor
    return out


def _bin_response(k: Tensor, sampling: Sampling) -> Tensor:
    turn = math.pi * k / (sampling.box * sampling.binning)
    return torch.where(k == 0, torch.ones_like(k), torch.sin(sampling.binning * turn) / (sampling.binning * torch.sin(turn)))


def _ctf(numbers: Tensor, y: Tensor, x: Tensor) -> Tensor:
    a, b, c, d, e, f, g, h = (n[:, None] for n in numbers.T)
    square = x * x + y * y
    four_fold = g * (x**4 - 6.0 * x * x * y * y + y**4) + h * (4.0 * x**3 * y - 4.0 * x * y**3)
    return (f * torch.sin(a * x * x + b * x * y + c * y * y - d * square * square + e + four_fold)).float()


def field_at(nodes: np.ndarray, positions_px: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A field of nodes `(node, frame, 2)` on a square grid over an image, read at `(n, 2)` pixels: `(n, frame, 2)` float64."""
    edge = math.isqrt(len(nodes))
    grid = torch.from_numpy(np.asarray(nodes, np.float32)).permute(1, 2, 0).reshape(-1, edge, edge)
    at = torch.from_numpy(np.asarray(positions_px, np.float64) / np.maximum(np.array(shape) - 1.0, 1.0)).float()
    # all pairs of a row and a column: cheaper than one interpolation per particle
    pairs = upsample_field(grid, at[:, 0], at[:, 1])
    return pairs.diagonal(dim1=-2, dim2=-1).reshape(nodes.shape[1], 2, len(at)).permute(2, 0, 1).double().numpy()


@dataclass
class Measurement:
    """What all frames say about the particles of a movie.

    ``products`` `(n, frame, 2 radius + 1, radius + 1)` complex64: a conj(V) X / s2; ``information`` `(n, frame, 2)` float64: expected
    curvature, 1 / pixel^2; ``signal`` `(n,)`: sum of |a V|^2 / s2; ``rest`` `(n, frame, 2)`: e of the prediction, binned pixels;
    ``noise`` `(radius + 1,)` and ``damage`` `(frame, radius + 1)` by ring; ``power`` `(frame, radius + 1)`: sum of |X|^2 over
    particles. Displacements are in pixels of the movie.
    """

    sampling: Sampling
    products: Tensor
    information: np.ndarray
    signal: np.ndarray
    expected: Tensor
    rest: np.ndarray
    noise: Tensor
    damage: Tensor
    power: Tensor

    def _phases(self, change_px: np.ndarray, frame: int) -> tuple[Tensor, Tensor]:
        """Phases `(n, 2 radius + 1)` and `(n, radius + 1)` that move frame ``frame`` by ``change_px`` from the prediction."""
        e = torch.from_numpy(self.rest[:, frame] + change_px[:, frame] / self.sampling.binning).to(self.products.device)
        turn = 2.0 * math.pi / self.sampling.box
        ky = torch.arange(-self.sampling.radius, self.sampling.radius + 1, device=e.device)
        turns = [turn * e[:, :1] * ky, turn * e[:, 1:] * ky[self.sampling.radius :]]
        y, x = (torch.polar(torch.ones_like(t), t).to(torch.complex64) for t in turns)
        return y, x

    def scores(self, change_px: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradient `(n, frame, 2)`, 1 / pixel, and matched signal `(n, frame)` where particles are ``change_px`` off the prediction."""
        n, frames = self.products.shape[:2]
        gradient, matched = np.zeros((n, frames, 2)), np.zeros((n, frames))
        turn = 2.0 * math.pi / (self.sampling.box * self.sampling.binning)
        wx = turn * torch.arange(self.sampling.radius + 1, device=self.products.device)
        wy = turn * torch.arange(-self.sampling.radius, self.sampling.radius + 1, device=self.products.device)
        for f in range(frames):
            y, x = self._phases(change_px, f)
            along = self.products[:, f] @ torch.stack([x, x * wx], -1)
            both = torch.stack([y, y * wy], 1) @ along
            gradient[:, f, 0] = -2.0 * both[:, 1, 0].imag.cpu().double().numpy()
            gradient[:, f, 1] = -2.0 * both[:, 0, 1].imag.cpu().double().numpy()
            matched[:, f] = both[:, 0, 0].real.cpu().double().numpy()
        return gradient, matched

    def correlation_sums(self, change_px: np.ndarray, particles: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sums over some particles by frame and shell: Re conj(V) X, |X|^2 (both `(frame, radius + 1)`) and |V|^2 `(radius + 1,)`."""
        radius = self.sampling.radius
        shells = row_shells(radius).clamp(max=radius).reshape(-1).to(self.products.device)
        frames, some = self.products.shape[1], torch.from_numpy(np.flatnonzero(particles)).to(self.products.device)
        cross, power = np.zeros((frames, radius + 1)), np.zeros((frames, radius + 1))
        back = (self.noise / self.damage).double()
        for f in range(frames):
            y, x = (p[some] for p in self._phases(change_px, f))
            total = (self.products[some, f] * y[:, :, None] * x[:, None]).real.sum(0, dtype=torch.float64).reshape(-1)
            ring = torch.zeros(radius + 1, dtype=torch.float64, device=total.device).index_add_(0, shells, total)
            cross[f] = (ring * back[f]).cpu().numpy()
            power[f] = self.power[f].cpu().numpy()
        square = self.expected[some].abs().square().sum(0, dtype=torch.float64).reshape(-1)
        own = torch.zeros(radius + 1, dtype=torch.float64, device=square.device).index_add_(0, shells, square)
        return cross, power, own.cpu().numpy()


def measure(
    read: Callable[[int], Tensor],
    frames: int,
    gain: Tensor | None,
    expected: Tensor,
    sampling: Sampling,
    centres_px: np.ndarray,
    predicted_px: np.ndarray,
    damage: np.ndarray,
    *,
    invert: bool = True,
) -> Measurement:
    """Cut all particles from all frames and compare them with what is expected of them.

    Parameters
    ----------
    read : callable ``index -> (y, x)`` Tensor
        Repaired counts of a frame, before the gain.
    expected : `(n, 2 radius + 1, radius + 1)`
        From :func:`expected_transforms`.
    centres_px : `(n, 2)`
        Centres in the aligned sum, pixels (y, x).
    predicted_px : `(n, frame, 2)`
        Displacement in each frame that is known so far.
    damage : `(frame, radius + 1)`
        Amplitude left in each frame, by ring.
    invert : bool
        Protein is dark in the movie.

    Notes
    -----
    The reference has one unknown grey scale per movie, that of its particles that fit best: junk must not lower it.
    """
    radius, box, binning = sampling.radius, sampling.box, sampling.binning
    device, n = expected.device, len(centres_px)
    products = torch.empty(n, frames, 2 * radius + 1, radius + 1, dtype=torch.complex64, device=device)
    rest, power = np.zeros((n, frames, 2)), torch.zeros(frames, radius + 1, dtype=torch.float64, device=device)
    shells = row_shells(radius).clamp(max=radius).to(device)
    inside = independent(radius).to(device)
    rows = torch.arange(-radius, radius + 1, device=device) % box
    conjugate = expected.conj()
    # the alternating sign moves the origin to pixel box // 2
    checkered = 1.0 - 2.0 * ((rows[:, None] + torch.arange(radius + 1, device=device)) % 2)
    sign = checkered * ((-1.0 if invert else 1.0) / box)
    for f in range(frames):
        image = binned(read(f), gain, binning)
        # centres of binned pixels lie between those of their pixels
        at = (centres_px + predicted_px[:, f] + 0.5) / binning - 0.5
        whole = np.round(at)
        rest[:, f] = at - whole
        for some in torch.arange(n).split(_LOT):
            where = torch.from_numpy(whole[some.numpy()]).long().to(device)
            boxes = _boxes(image, where, box)
            boxes -= boxes.mean((1, 2), keepdim=True)
            spectrum = real_fft2(boxes)[:, rows, : radius + 1] * sign
            square = spectrum.abs().square().sum(0, dtype=torch.float64)[inside]
            power[f].index_add_(0, shells[inside], square)
            products[some, f] = spectrum * conjugate[some]
    count = torch.bincount(shells[inside], minlength=radius + 1).clamp(min=1)
    noise = (power.mean(0) / (max(n, 1) * count)).float()
    noise = torch.where(noise > 0, noise, torch.ones_like(noise))
    left = torch.from_numpy(np.ascontiguousarray(damage, np.float32)).to(device)
    products *= (left / noise)[:, shells]
    turn = 2.0 * math.pi / (box * binning)
    ky, kx = torch.arange(-radius, radius + 1, device=device) * turn, torch.arange(radius + 1, device=device) * turn
    energy = (expected.abs().square() / noise[shells]).reshape(n, shells.numel())
    square = left.square()[:, shells].reshape(frames, -1)
    curvature = [2.0 * energy @ (square * w.reshape(1, -1)).T for w in ((ky**2)[:, None].expand_as(shells), (kx**2).expand_as(shells))]
    information = torch.stack(curvature, -1).cpu().double().numpy()
    signal = (energy @ square.sum(0)).cpu().double().numpy()
    return Measurement(sampling, products, information, signal, expected, rest, noise, left, power)


def _boxes(image: Tensor, where: Tensor, box: int) -> Tensor:
    """Like `cut_boxes`, but those within the image are copied row by row."""
    first, (height, width) = where - box // 2, image.shape
    inside = ((first >= 0) & (first + box <= torch.tensor([height, width], device=where.device))).all(1)
    out = torch.empty(len(where), box, box, device=image.device)
    for i, (y, x) in enumerate(first.tolist()):
        if inside[i]:
            out[i] = image[y : y + box, x : x + box]
    beyond = torch.nonzero(~inside)[:, 0]
    out[beyond] = cut_boxes(image, where[beyond, 0], where[beyond, 1], box)
    return out


def binned(frame: Tensor, gain: Tensor | None, binning: int) -> Tensor:
    """Mean over ``binning`` x ``binning`` pixels of ``frame * gain``, float32."""
    image = frame.float() if gain is None else frame * gain
    if binning == 1:
        return image
    h, w = image.shape[0] // binning * binning, image.shape[1] // binning * binning
    # sums of whole rows are several times faster than a mean over blocks
    rows = image[0:h:binning].clone()
    for i in range(1, binning):
        rows += image[i:h:binning]
    out = rows[:, 0:w:binning].clone()
    for j in range(1, binning):
        out += rows[:, j:w:binning]
    return out / binning**2


@dataclass(frozen=True)
class Steps:
    """Result of scoring: ``step`` `(n, frame, 2)` pixels with its ``information`` (1 / variance), ``amount`` `(n,)`, ``counts`` `(n,)`."""

    step: np.ndarray
    information: np.ndarray
    amount: np.ndarray
    counts: np.ndarray


def fisher_steps(measured: Measurement, change_px: np.ndarray) -> Steps:
    """Steps from where particles are ``change_px`` `(n, frame, 2)` off their prediction.

    ``amount``: the share of its expected signal that a particle shows, relative to the movie's own grey scale. Particles below 0.4, or
    not above noise, keep a millionth of their information.
    """
    gradient, matched = measured.scores(change_px)
    shown = matched.sum(1)
    scale, counts = grey_scale(shown, measured.signal)
    amount = shown / np.maximum(measured.signal * scale, 1e-30) if scale > 0 else np.zeros(len(shown))
    information = np.maximum(measured.information * scale**2, 1e-30)
    # the gradient is linear in the scale, the curvature quadratic
    step = gradient * scale / information
    silent = ~counts
    step[silent], information[silent] = 0.0, information[silent] * _SILENT
    return Steps(step, information, amount, counts)


def grey_scale(shown: np.ndarray, signal: np.ndarray) -> tuple[float, np.ndarray]:
    """Grey scale of the reference in a movie, and which particles `(n,)` have a say.

    ``shown`` and ``signal`` `(n,)`: matched and expected signal of each particle, of a reference of scale 1. The scale starts from the
    particles that show most, and is then the mean over those that show at least 0.4 of it.
    """
    ratio = shown / np.maximum(signal, 1e-30)
    above_noise = shown > _LEAST_SIGNIFICANCE * np.sqrt(0.5 * np.maximum(signal, 1e-30))
    if not above_noise.any():
        return 0.0, above_noise
    scale = float(np.quantile(ratio[above_noise], 0.75))
    counts = above_noise
    for _ in range(5):
        counts = above_noise & (ratio >= LEAST_AMOUNT * scale)
        scale = float(shown[counts].sum() / signal[counts].sum())
    return scale, above_noise & (ratio >= LEAST_AMOUNT * scale)
