"""Whether two half-maps are independent: the noise of independent maps does not agree, least of all in the solvent."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels.fsc import fsc, half_shells, shell_sum

_SAME = 0.9999
"""Correlation of a shell from which on both maps have the same values in it."""
_SAME_PHASES = 1.0 - 4.0 * (1.0 - _SAME)
"""Mean cosine of twice the phase differences that goes with it."""
_EMPTY = 1e-9
"""Power of a shell, over that of the strongest, below which rounding decides what it holds."""
_MOST_SMEARED = 1.3
"""Power of the solvent in a shell, over its share of the map's power there, above which it comes from other shells."""
_WEAK_SHARE = 0.4
_FLAT = 1e-6

_MOST_CORRELATION = 0.5
"""Of the noise of maps whose correlation says anything; a standard error comes on top. Half of the mean in each map gives 0.6."""
_LEAST_SHIFTED, _CHANCE = 0.15, 5.0
"""Phase correlation at a shift that is no chance, and the highest of chance, standard errors."""
_SEEN_SHIFT = 0.05
"""Shift from which on it is named, voxels."""
_ZOOM, _ZOOMS = 4.0, 4
"""Steps within a voxel are this many times finer each time: 1/256 of a voxel at last."""
_MOST_AGREEMENT = 0.97
"""Correlation of the finer shells above which maps without solvent cannot be told from copies."""
_BAND, _WIDE_BAND, _LEFT = 0.01, 0.85, 0.1
"""Power of the difference of the maps, over its largest, that a shell within their band has; share of Nyquist of a band that no filter
has cut; and most power of a map beyond its band, over that of its strongest shell."""
_LEAK = 0.6
"""Signal to noise that a low-passed molecule has at most in the solvent into which it reaches, relative to that of the whole map."""


class Independence(NamedTuple):
    """Evidence about a pair of half-maps.

    Parameters
    ----------
    joined : int
        Last shell up to which both maps are the same: 0 if none is, Nyquist if the maps are copies, scaled or filtered; -1 if one is empty.
    noise_correlation, error : float
        Correlation of the solvent in the finer half of the shells beyond, its median; and the standard error of its inverse hyperbolic
        tangent (Fisher, 1915). NaN if the solvent is flat or no shell is left.
    agreement : float
        Correlation of the whole maps in these shells.
    shift_voxels : (z, y, x)
        Shift of the first map against the second at which their phases agree best; 0 where they agree no better than by chance. All else
        was found without it.
    """

    joined: int
    noise_correlation: float
    error: float
    agreement: float
    shift_voxels: tuple[float, float, float] = (0.0, 0.0, 0.0)
    most: float = _MOST_CORRELATION
    """Correlation of the solvent that independent maps can have: more in low-passed ones, whose molecule reaches into the solvent."""
    comparable: bool = True
    """Whether honest maps can agree up to their finest shells: those of low-passed maps, but not those without solvent."""

    @property
    def fault(self) -> str:
        """Why the maps are not, or cannot be shown to be, independent; empty if they are."""
        shift = ", ".join(f"{s:.2f}".rstrip("0").rstrip(".") for s in self.shift_voxels[::-1])
        shifted = f"one is shifted by ({shift}) voxels (x, y, z)"
        fault = self._fault
        return f"{shifted}, and {fault}" if fault and max(map(abs, self.shift_voxels)) > _SEEN_SHIFT else fault

    @property
    def _fault(self) -> str:
        if self.joined < 0:
            return "all voxels of one of them are equal"
        if np.isnan(self.agreement):
            return "they are the same in every shell, up to scale and filters"
        if np.arctanh(min(abs(self.noise_correlation), _SAME)) > np.arctanh(self.most) + self.error:
            return f"the noise of their solvent agrees: its correlation is {self.noise_correlation:.2f}; for independent maps it is 0"
        if not self.comparable and self.agreement > _MOST_AGREEMENT:
            return (
                f"they correlate by {self.agreement:.2f} up to the finest shells, and a mask has removed the solvent, "
                "whose noise would show whether they are independent"
            )
        return ""


def independence(first: Tensor, second: Tensor) -> Independence:
    """Evidence for or against the independence of two half-maps `(z, y, x)` with cubic shape.

    Shells that were joined on purpose are identical from the centre outwards; only those beyond count. Noise is measured in the solvent:
    where the smoothed mean map is weakest within the sphere inscribed in the box. Maps that were low-passed together have no noise
    beyond, so only shells with power in both count.
    """
    maps = torch.stack([first, second]).double()
    spread = maps.amax((1, 2, 3)) - maps.amin((1, 2, 3))
    if not bool((spread > 0).all()):
        return Independence(-1, np.nan, np.nan, np.nan)
    maps = maps - maps.mean((1, 2, 3), keepdim=True)
    whole = fsc(maps[0], maps[1]).abs()
    power = torch.minimum(*(_shell_power(m) for m in maps))
    shells = torch.nonzero(power[1:] > _EMPTY * power[1:].max()).flatten() + 1
    different, phases = shells[whole[shells] < _SAME], _phase_agreement(maps)
    # a filter lowers the correlation where it falls off or changes its sign within a shell, but leaves the phases up to their sign
    if not len(different) or bool((phases[different] >= _SAME_PHASES).all()):
        return Independence(len(whole) - 1, np.nan, np.nan, np.nan)
    shift = _shift(maps, shells)
    if any(shift):
        maps[0] = _moved(maps[0], shift)
        whole = fsc(maps[0], maps[1]).abs()
        different, phases = shells[whole[shells] < _SAME], _phase_agreement(maps)
        if not len(different) or bool((phases[different] >= _SAME_PHASES).all()):
            return Independence(len(whole) - 1, np.nan, np.nan, np.nan, shift)
    joined = int(different[0]) - 1
    beyond = shells[shells > joined + 1]
    finer = beyond[len(beyond) // 2 :] if len(beyond) else different
    agreement = float(whole[finer].median())
    weight = _solvent(maps.sum(0))
    if weight is None:
        return Independence(joined, np.nan, np.nan, agreement, shift, comparable=False)
    inside = [(m - (m * weight).sum() / weight.sum()) * weight for m in maps]
    # where a low-pass filter has left nothing, the edges of the weight smear the shells below
    share = float((weight**2).mean())
    noise = torch.minimum(*(_shell_power(m) for m in inside))
    beyond = beyond[noise[beyond] < _MOST_SMEARED * share * power[beyond]]
    finer = beyond[len(beyond) // 2 :]
    low_passed = _is_low_passed(maps)
    if len(finer) < 2:
        return Independence(joined, np.nan, np.nan, agreement, shift, comparable=low_passed)
    # twice that of independent coefficients: a median, of shells that the weight of the solvent makes depend on each other
    error = 2.0 / np.sqrt(max(2.0 * np.pi * float((finer.double() ** 2).sum()) * share, 1.0))
    most = max(_MOST_CORRELATION, _leaked(float(whole[finer].median()))) if low_passed else _MOST_CORRELATION
    return Independence(joined, float(fsc(*inside)[finer].median()), error, agreement, shift, most)


def _leaked(agreement: float) -> float:
    """Largest correlation in the solvent that a low-passed molecule reaching into it gives, with this correlation of the whole maps."""
    return _LEAK * agreement / (1.0 - agreement + _LEAK * agreement)


def _is_low_passed(maps: Tensor) -> bool:
    """Whether a filter has cut the noise of two maps well below Nyquist.

    Noise is their difference, as they are and with the second map scaled to the first in each shell: a filter of one of them is in one or
    the other. Where a map still has much power, a small difference is agreement and no filter.
    """
    powers = [_shell_power(m)[1:] for m in maps]
    for noise in (_shell_power(maps[0] - maps[1])[1:], powers[0] * (1.0 - fsc(maps[0], maps[1])[1:] ** 2).clamp_min(0.0)):
        band = int(torch.nonzero(noise > _BAND * noise.max()).max()) + 1
        if band >= _WIDE_BAND * len(noise) or any(bool(p[band:].max() > _LEFT * p.max()) for p in powers):
            return False
    return True


def _shift(maps: Tensor, shells: Tensor) -> tuple[float, float, float]:
    """Shift of the first map against the second at which their phases agree best; none if no better than by chance.

    Phase correlation (Kuglin and Hines, 1975), which no filter changes; a copy reaches 1. Its highest point is first found to a voxel,
    where a copy between voxels reaches 0.26 or more, then by ever finer steps around it (Guizar-Sicairos et al., 2008).
    """
    n = maps.shape[-1]
    of, weight = half_shells(n, maps.device)
    used = torch.isin(of, shells.to(of.device))
    cross = torch.fft.rfftn(maps[0]) * torch.fft.rfftn(maps[1]).conj()
    size = cross.abs()
    phases = torch.where(used & (size > 0), cross / size.clamp_min(1e-300), torch.zeros_like(cross))
    correlation = torch.fft.irfftn(phases, s=maps.shape[1:]).abs()
    unshifted = torch.fft.irfftn(used.to(phases.dtype), s=maps.shape[1:])[0, 0, 0]
    best = int(correlation.argmax())
    coefficients = float(unshifted) * n**3
    peak = float(correlation.flatten()[best] / unshifted)
    if peak < _LEAST_SHIFTED + _CHANCE / np.sqrt(max(coefficients, 1.0)):
        return (0.0, 0.0, 0.0)
    voxel = np.array([i - n if i > n // 2 else i for i in np.unravel_index(best, (n, n, n))], float)
    z, y, x = (round(float(s), 3) for s in _between_voxels(phases * weight, voxel, n))
    return z, y, x


def _between_voxels(phases: Tensor, shift: np.ndarray, n: int) -> np.ndarray:
    """The highest point of the correlation near `shift`; `phases` `(z, y, x // 2)` are weighted by their multiplicity."""
    full = torch.fft.fftfreq(n, device=phases.device).double()
    half = torch.fft.rfftfreq(n, device=phases.device).double()
    for zoom in range(1, _ZOOMS + 1):
        steps = torch.arange(-4, 5, dtype=torch.float64, device=phases.device) / _ZOOM**zoom
        waves = [torch.exp(2j * torch.pi * (steps + s)[:, None] * k) for s, k in zip(shift, (full, full, half), strict=True)]
        near = torch.einsum("zyx,ax->zya", phases, waves[2])
        height = torch.einsum("cz,by,zya->cba", waves[0], waves[1], near).real.abs()
        best = int(height.argmax())
        shift = shift + np.array([float(steps[i]) for i in np.unravel_index(best, height.shape)])
    return shift


def _phase_agreement(maps: Tensor) -> Tensor:
    """Mean cosine of twice the phase differences of two maps `(shell,)`: 1 for a copy, whatever signs a filter gives its frequencies.

    Weighted by amplitude, because rounding decides the phases where a filter is 0.
    """
    cross = torch.fft.rfftn(maps[0]) * torch.fft.rfftn(maps[1]).conj()
    shells, weight = half_shells(maps.shape[-1], maps.device)
    size = cross.abs()
    doubled = 2.0 * cross.real**2 / size.clamp_min(1e-300) - size
    return shell_sum(doubled, shells, weight) / shell_sum(size, shells, weight).clamp_min(1e-300)


def _moved(volume: Tensor, shift: tuple[float, float, float]) -> Tensor:
    """The map moved back by `shift`, `(z, y, x)` voxels, periodic."""
    n = volume.shape[-1]
    full = torch.fft.fftfreq(n, device=volume.device).double()
    half = torch.fft.rfftfreq(n, device=volume.device).double()
    angle = shift[0] * full[:, None, None] + shift[1] * full[None, :, None] + shift[2] * half
    return torch.fft.irfftn(torch.fft.rfftn(volume) * torch.exp(2j * torch.pi * angle), s=volume.shape)


def _shell_power(volume: Tensor) -> Tensor:
    shells, weight = half_shells(volume.shape[-1], volume.device)
    transform = torch.fft.rfftn(volume)
    ones = torch.ones_like(transform.real)
    return shell_sum(transform.abs() ** 2, shells, weight) / shell_sum(ones, shells, weight)


def _solvent(total: Tensor) -> Tensor | None:
    """A soft weight `(z, y, x)`: 1 in the weaker half of the sphere inside the box; None if a mask has flattened it."""
    n = total.shape[-1]
    axis = torch.arange(n, dtype=torch.float64, device=total.device) - n // 2
    radius = torch.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis**2)
    sphere = radius < 0.46 * n
    steps = torch.stack([(total - total.roll(1, axis)).abs() for axis in range(3)]).sum(0)
    if float((steps[sphere] <= _FLAT * steps[sphere].max()).double().mean()) > 0.2:
        return None
    strength = _smooth(_smooth(total, 1.5) ** 2, 0.06 * n)
    inside = strength[sphere]
    limit = inside.kthvalue(int(_WEAK_SHARE * len(inside))).values
    return _smooth((sphere & (strength < limit)).double(), 1.5)


def _smooth(volume: Tensor, sigma: float) -> Tensor:
    """A Gaussian filter, periodic."""
    n = volume.shape[-1]
    k = torch.fft.fftfreq(n, device=volume.device).double()
    kx = torch.fft.rfftfreq(n, device=volume.device).double()
    square = (k * k)[:, None, None] + (k * k)[None, :, None] + kx * kx
    return torch.fft.irfftn(torch.fft.rfftn(volume) * torch.exp(-2.0 * (torch.pi * sigma) ** 2 * square), s=volume.shape)
