"""Poses by Levenberg-Marquardt: candidates climb to the optimum of the log-likelihood, ring limit by ring limit; the best stay.

A grid of views fine enough for 4 Angstrom costs twenty times as much and is less exact (0.52 against 0.23 degrees at 128 px). The normal
equations of Gauss and Newton use the gradient of the slice; at the optimum they give the width of a mode, and so its weight (Laplace).
Compiled by numba on CPUs where it is installed (extra ``compiled``); else, and on GPUs, in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels import _slices_torch
from cryodask.kernels.compiled import compiled
from cryodask.kernels.half_grid import empty_half_grid, fold_half_grid
from cryodask.kernels.rows import ImageRows, row_shells

_LOT = 64
NATS = 25.0
"""Candidates this much below the best are dropped."""
_WIDEST_DRAW = 0.4
"""Radians; a wider Gaussian says that the pose is unknown."""
LEAST_SHARE = 0.01
"""Modes with a smaller share of the posterior are not inserted."""


@dataclass(frozen=True)
class Climb:
    """One ring limit of the search: highest ring, candidates that go on, and steps at most."""

    ring: int
    most: int
    steps: int


@dataclass(frozen=True)
class Candidates:
    """Start poses: ``rotations`` `(n, candidate, 3, 3)`, ``shifts_px`` `(n, candidate, 2)` (y, x); the first ``count`` `(n,)` are meant."""

    rotations: Tensor
    shifts_px: Tensor
    count: Tensor


@dataclass(frozen=True)
class Modes:
    """Optima of the posterior, likeliest first: ``rotations`` `(n, mode, 3, 3)`, ``shifts_px`` `(n, mode, 2)`, ``count`` `(n,)`;
    ``score`` the log posterior and ``evidence`` that of the whole mode (Laplace), `(n, mode)` float64; ``factor`` `(n, mode, 5, 5)`
    the Cholesky factor of minus the Hessian (rotations about the image's x, y, z axis in radians, shifts y, x in pixels).
    """

    rotations: Tensor
    shifts_px: Tensor
    count: Tensor
    score: Tensor
    evidence: Tensor
    factor: Tensor

    @property
    def shares(self) -> Tensor:
        """Share of each mode in the posterior `(n, mode)` float32; 0 where there is none."""
        return torch.softmax(self._of_modes(), 1).float()

    @property
    def total(self) -> Tensor:
        """Log evidence of all modes `(n,)` float64."""
        return torch.logsumexp(self._of_modes(), 1)

    def draw(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Poses drawn from the posterior: rotations `(n, draw, 3, 3)`, shifts `(n, draw, 2)`; ``uniforms`` `(n, draw, 6)` in [0, 1).

        A mode by its share, then a place in its Gaussian (Laplace), whose rotations end at 0.4 radians.
        """
        n, draws, _ = uniforms.shape
        shares = self.shares.double().cumsum(1)
        mode = torch.searchsorted(shares, (uniforms[..., 0] * shares[:, -1:]).contiguous()).clamp(max=shares.shape[1] - 1)
        normal = torch.special.ndtri(uniforms[..., 1:].clamp(1e-12, 1.0 - 1e-12))
        factor = self.factor.gather(1, mode[..., None, None].expand(-1, -1, 5, 5))
        off = torch.linalg.solve_triangular(factor.transpose(2, 3), normal[..., None], upper=True)[..., 0]
        turn = off[..., :3] * (_WIDEST_DRAW / off[..., :3].norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
        rotation = self.rotations.gather(1, mode[..., None, None].expand(-1, -1, 3, 3)).double()
        rotation = _slices_torch.turned(turn.reshape(-1, 3), rotation.reshape(-1, 3, 3)).reshape(n, draws, 3, 3)
        shift = self.shifts_px.gather(1, mode[..., None].expand(-1, -1, 2)) + off[..., 3:]
        return rotation.float(), shift.float()

    def _of_modes(self) -> Tensor:
        there = torch.arange(self.evidence.shape[1], device=self.count.device)[None] < self.count[:, None]
        return torch.where(there, self.evidence, -torch.inf)


def _kernels(images: ImageRows, name: str = "insertion") -> Any:
    return compiled(name, images.values.device)


def pixel_weights(noise_power: Tensor, radius: int) -> Tensor:
    """1 / noise power of the pixels of rows up to ``radius``, float32 `(group, row, column)`.

    ``noise_power`` is `(group, shell)`, or `(shell,)` of a single group.
    """
    shells = row_shells(radius, str(noise_power.device)).clamp(max=noise_power.shape[-1] - 1)
    return (1.0 / torch.atleast_2d(noise_power)[:, shells]).float()


def climb(
    images: ImageRows, rows: Tensor, volume: Tensor, noise_power: Tensor, start: Candidates, levels: Sequence[Climb], *,
    sigma_px: float, operators: np.ndarray, modes: int, nats: float = NATS, least_gain: float = 0.02,
) -> Modes:  # fmt: skip
    """The best optima near some start poses.

    Parameters
    ----------
    images : ImageRows
        At least up to the highest ring.
    rows : Tensor, `(n,)`
        Images that are searched.
    volume : Tensor, `(z, y, x)`
        Of :func:`cryodask.kernels.half_grid.half_volume`, for frequencies up to the highest ring + 1.
    start : Candidates
        Of these rows.
    sigma_px : float
        Spread of the Gaussian prior of the shifts, per axis.
    modes : int
        Number of optima that are returned at most; optima less than 2 degrees apart modulo ``operators`` are one.
    least_gain : float
        A step that is expected to gain less log-likelihood is the last one.
    """
    radius = levels[-1].ring
    weight = pixel_weights(noise_power, radius)
    rings, most, steps = ([getattr(level, name) for level in levels] for name in ("ring", "most", "steps"))
    prior = 1.0 / sigma_px**2
    kernels = _kernels(images, "slices")
    flat = None if kernels is None else torch.view_as_real(volume).reshape(-1).numpy()
    n, device = len(rows), rows.device
    found = (
        torch.eye(3, device=device).repeat(n, modes, 1, 1), torch.zeros(n, modes, 2, device=device),
        torch.zeros(n, modes, dtype=torch.float64, device=device), torch.zeros(n, modes, dtype=torch.float64, device=device),
        torch.zeros(n, dtype=torch.int64, device=device), torch.eye(5, dtype=torch.float64, device=device).repeat(n, modes, 1, 1),
    )  # fmt: skip
    for lot, group in images.lots(rows, _LOT):
        some = images.part(rows[lot], radius)
        numbers = images.ctf[rows[lot]]
        begin = start.rotations[lot], start.shifts_px[lot], start.count[lot]
        if kernels is None:
            turns = torch.tensor(np.array(operators), device=device)
            out: tuple[Tensor, ...] = _slices_torch.search(
                volume, some, numbers, radius, weight[group], *begin, images.box, rings, most, steps, least_gain, nats, prior, turns, modes
            )
        else:
            out = tuple(values[lot] for values in found)
            kernels.search(
                flat, volume.shape[2] - 1, some.numpy(), numbers.numpy(), radius, weight[group].numpy(),
                *(t.numpy() for t in begin), float(images.box), np.array(rings), np.array(most), np.array(steps), least_gain, nats, prior,
                np.array(operators, np.float64), *(t.numpy() for t in out),
            )  # fmt: skip
        for values, fresh in zip(found, out):
            values[lot] = fresh
    rotations, shifts, score, evidence, count, factor = found
    return Modes(rotations, shifts, count, score, evidence, factor)


def insert(
    images: ImageRows, rows: Tensor, grid: Tensor, radius: int, noise_power: Tensor, rotations: Tensor, shifts_px: Tensor, shares: Tensor,
    *, least: float = LEAST_SHARE,
) -> None:  # fmt: skip
    """Add the images' slices at weighted poses `(n, pose, ...)` to a half grid, in place; shares below ``least`` are left out."""
    weight = pixel_weights(noise_power, radius)
    kernels = _kernels(images)
    for lot, group in images.lots(rows, _LOT):
        some, numbers = images.part(rows[lot], radius), images.ctf[rows[lot]]
        poses = rotations[lot], shifts_px[lot], shares[lot]
        if kernels is None:
            _slices_torch.insert(grid, some, numbers, radius, weight[group], *poses, images.box, least)
        else:
            kernels.insert(
                grid.view(-1).numpy(), grid.shape[2] - 1, some.numpy(), numbers.numpy(), radius, weight[group].numpy(),
                *(t.contiguous().numpy() for t in poses), float(images.box), least,
            )  # fmt: skip


def residual_power(images: ImageRows, rows: Tensor, volume: Tensor, rotations: Tensor, shifts_px: Tensor, ring: int, radius: int) -> Tensor:
    """Sums over shells of |image - model|^2 at one pose each, `(n, radius + 1)` float64; beyond ``ring`` the model is zero."""
    image, cross, model = shell_terms(images, rows, volume, rotations, shifts_px, ring, radius).unbind(1)
    return image - 2.0 * cross + model


def shell_terms(images: ImageRows, rows: Tensor, volume: Tensor, rotations: Tensor, shifts_px: Tensor, ring: int, radius: int) -> Tensor:
    """Sums over shells of |image|^2, of Re(conj(model) image) and of |model|^2 at one pose each, `(n, 3, radius + 1)` float64.

    Beyond ``ring`` the model is zero.
    """
    kernels = _kernels(images)
    parts = []
    for lot in torch.arange(len(rows), device=rows.device).split(_LOT):
        some, numbers = images.part(rows[lot], radius), images.ctf[rows[lot]]
        poses = rotations[lot], shifts_px[lot]
        if kernels is None:
            parts.append(_slices_torch.shell_terms(volume, some, numbers, radius, *poses, images.box, ring))
        else:
            out = np.zeros((len(lot), 3, radius + 2))
            kernels.shell_terms(
                volume.numpy(), volume.shape[2] - 1, some.numpy(), numbers.numpy(), radius, *(t.contiguous().numpy() for t in poses),
                float(images.box), ring, out,
            )  # fmt: skip
            parts.append(torch.from_numpy(out[..., : radius + 1]))
    return torch.cat(parts) if parts else torch.zeros(0, 3, radius + 1, dtype=torch.float64, device=rows.device)


def grid_of_poses(
    images: ImageRows, rows: Tensor, noise_power: Tensor, rotations: Tensor, shifts_px: Tensor, radius: int, operators: np.ndarray
) -> Tensor:
    """Folded half grid of images `(n,)` with one known pose each; :func:`cryodask.kernels.half_grid.reconstruct_half` makes it a map."""
    grid = empty_half_grid(radius, str(rows.device))
    shares = torch.ones(len(rows), 1, device=rows.device)
    insert(images, rows, grid, radius, noise_power, rotations[:, None].float(), shifts_px[:, None].float(), shares)
    return fold_half_grid(grid, operators)
