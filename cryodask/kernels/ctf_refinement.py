"""CTF parameters of particles, micrographs and optics groups at known poses, against a map without these particles.

A particle X (shifted to its centre) is a slice a of the map times its CTF, plus noise of power s2 per ring. With x = 2 Re(conj(a) X),
n = |a|^2 and the argument g of the CTF, the log-likelihood is the sum over pixels of ``(x sin g - n sin^2 g) / s2``. Everything that is
fitted follows from sums over one pass:

- defocus of a particle: it changes g by an amount that depends on the ring only, so five ring profiles give the likelihood of any change;
- astigmatism of a micrograph and tetrafoil of a group: Gauss-Newton in g, gradient ``x cos g - n sin 2g``, Hessian ``2 n cos^2 g``;
- beam tilt and trefoil: phase phi that maximises ``2 Re(q exp(-i phi))``, q the sum of ``sin g conj(a) X`` over the group (Zivanov et al.
  2018, eLife 7, e42166; 2020, IUCrJ 7, 253);
- magnification: Gauss-Newton with the gradient of the slice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels import _slices_torch as st
from cryodask.kernels.aberrations import odd_basis
from cryodask.kernels.local_search import pixel_weights
from cryodask.kernels.rows import ImageRows

_LOT = 64
_REACH_ANGSTROM, _STEP_ANGSTROM = 800.0, 25.0
SPREADS_ANGSTROM = np.geomspace(5.0, 800.0, 24)
"""Trial values of the standard deviation of the particles' defocus about the mean of their micrograph."""
_ASTIGMATISM_PRIOR_ANGSTROM = 100.0


def defocus_grid() -> Tensor:
    """Trial changes of a particle's defocus, Angstrom, float64 `(65,)`."""
    return torch.arange(-_REACH_ANGSTROM, _REACH_ANGSTROM + 1.0, _STEP_ANGSTROM, dtype=torch.float64)


@dataclass(frozen=True)
class Rings:
    """Pixels that are compared: rings from ``low`` to ``last`` of images `length_angstrom` wide; ``ky, kx`` in 1/Angstrom."""

    low: int
    last: int
    length_angstrom: float

    def plane(self, radius: int, device: str) -> st.Plane:
        """Their pixels in rows up to ``radius``."""
        whole = st.plane_within(self.last, radius, device)
        use = whole.shell >= self.low
        return st.Plane(whole.ky[use], whole.kx[use], whole.place[use], whole.shell[use])

    def frequencies(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Frequencies y and x of the pixels, 1/Angstrom, float64 `(pixel,)`."""
        plane = self.plane(self.last, device)
        return plane.ky.double() / self.length_angstrom, plane.kx.double() / self.length_angstrom


def fit_sums(
    images: ImageRows, rows: Tensor, volume: Tensor, noise_power: Tensor, rotations: Tensor, shifts_px: Tensor, wavelength: Tensor,
    rings: Rings,
) -> dict[str, Tensor]:  # fmt: skip
    """Sums for all fits, over images with one pose each.

    Parameters
    ----------
    images : ImageRows
        At least up to the last ring.
    rows : Tensor, `(n,)`
        Images to use; ``rotations`` `(n, 3, 3)`, ``shifts_px`` `(n, 2)` and ``wavelength`` `(n,)`, Angstrom, are theirs.
    volume : Tensor, `(z, y, x)`
        Of :func:`cryodask.kernels.half_grid.half_volume`: the map of the other half.
    noise_power : Tensor, `(group, shell)`

    Returns
    -------
    dict
        Per particle: ``defocus`` `(n, 65)` log-likelihood of changes on :func:`defocus_grid`; ``astigmatism`` `(n, 5)` gradient and
        Hessian (11, 12, 22) of changes of ``z cos 2t, z sin 2t``, Angstrom; ``magnification`` `(n, 5)` the same of the matrices
        ((1, 0), (0, -1)) and ((0, 1), (1, 0)). Per group and pixel: ``odd`` `(group, pixel)` complex128, q of the module's description;
        ``even`` `(group, 2, pixel)` float64, gradient and Hessian with respect to g. ``residual`` `(n, last + 1)` is the power that
        the model leaves unexplained.
    """
    device = str(rows.device)
    plane, count, groups = rings.plane(images.radius, device), len(rows), len(noise_power)
    ky, kx = rings.frequencies(device)
    of_shell = torch.nn.functional.one_hot(plane.shell, rings.last + 1).float()
    grid = defocus_grid().to(device)
    shells = torch.arange(rings.last + 1, device=device).double() / rings.length_angstrom
    astigmatic = torch.stack([kx * kx - ky * ky, 2.0 * kx * ky]).float()
    out = {
        "defocus": torch.zeros(count, len(grid), dtype=torch.float64, device=device),
        "astigmatism": torch.zeros(count, 5, dtype=torch.float64, device=device),
        "magnification": torch.zeros(count, 5, dtype=torch.float64, device=device),
        "odd": torch.zeros(groups, len(ky), dtype=torch.complex128, device=device),
        "even": torch.zeros(groups, 2, len(ky), dtype=torch.float64, device=device),
        "residual": torch.zeros(count, rings.last + 1, dtype=torch.float64, device=device),
    }
    weights = pixel_weights(noise_power, images.radius).flatten(1)[:, plane.place]
    for lot, group in images.lots(rows, _LOT):
        numbers, weight, poses = images.ctf[rows[lot]], weights[group], rotations[lot].float()
        image = images.part(rows[lot], images.radius).flatten(1)[:, plane.place]
        image = image * st.shift_phases(-shifts_px[lot].float(), plane, images.box)
        value, gradient = st.sliced(volume, poses, plane)
        value, gradient = value * numbers[:, 5, None].float(), gradient * numbers[:, 5, None, None].float()
        argument = st.ctf_argument(numbers, plane.ky, plane.kx)
        # twice the argument needs its own reduction before it is rounded
        sine, cosine = torch.sin(argument).float(), torch.cos(argument).float()
        twice_sine, twice_cosine = 2.0 * sine * cosine, 1.0 - 2.0 * sine * sine
        product = value.conj() * image
        x, n = 2.0 * product.real, value.real.square() + value.imag.square()
        profiles = torch.stack([x * sine, x * cosine, n, n * twice_cosine, n * twice_sine], 1) * weight
        out["defocus"][lot] = _defocus_likelihood((profiles @ of_shell).double(), wavelength[lot], shells, grid)
        slope, bend = (x * cosine - n * twice_sine) * weight, 2.0 * n * cosine * cosine * weight
        per_angstrom = math.pi * wavelength[lot].double()[:, None]
        hessian = torch.stack([astigmatic[0] ** 2, astigmatic[0] * astigmatic[1], astigmatic[1] ** 2])
        # products with two columns are split among threads along the sum, which changes bits: sum row by row
        for column, basis in enumerate(astigmatic):
            out["astigmatism"][lot, column] = (slope * basis).sum(1, dtype=torch.float64) * per_angstrom[:, 0]
        for column, basis in enumerate(hessian, 2):
            out["astigmatism"][lot, column] = (bend * basis).sum(1, dtype=torch.float64) * per_angstrom[:, 0] ** 2
        out["even"][group, 0] += slope.sum(0, dtype=torch.float64)
        out["even"][group, 1] += bend.sum(0, dtype=torch.float64)
        out["odd"][group] += (product * sine * weight).sum(0, dtype=torch.complex128)
        rest = image - value * sine
        out["residual"][lot] = ((rest.real.square() + rest.imag.square()) @ of_shell).double()
        out["magnification"][lot] = _magnification_sums(gradient, poses, plane, sine, rest, weight)
    return out


def _defocus_likelihood(profiles: Tensor, wavelength: Tensor, shells: Tensor, grid: Tensor) -> Tensor:
    """Log-likelihood `(n, change)` of changes of defocus, from five ring profiles `(n, 5, shell)`."""
    out = torch.empty(len(profiles), len(grid), dtype=torch.float64, device=profiles.device)
    for lam in wavelength.unique():
        same = wavelength == lam
        p = profiles[same]
        delta = (math.pi * float(lam)) * grid[:, None] * (shells * shells)[None]
        out[same] = (
            p[:, 0] @ torch.cos(delta).T + p[:, 1] @ torch.sin(delta).T - 0.5 * p[:, 2].sum(1, keepdim=True)
            + 0.5 * (p[:, 3] @ torch.cos(2.0 * delta).T - p[:, 4] @ torch.sin(2.0 * delta).T)
        )  # fmt: skip
    return out


def _magnification_sums(gradient: Tensor, rotations: Tensor, plane: st.Plane, sine: Tensor, rest: Tensor, weight: Tensor) -> Tensor:
    right, up = (torch.einsum("nj,njp->np", rotations[:, i].to(gradient.dtype), gradient) for i in range(2))
    scale = 2.0 * sine  # the volume is padded twice
    first, second = (plane.kx * right - plane.ky * up) * scale, (plane.ky * right + plane.kx * up) * scale
    pairs = (first, rest), (second, rest), (first, first), (first, second), (second, second)
    return torch.stack([((a.conj() * b).real * weight).sum(1, dtype=torch.float64) for a, b in pairs], 1)


# --- solutions ------------------------------------------------------------------------------------------------------------------
def odd_solution(q: Tensor, ky: Tensor, kx: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients `(6,)` of :func:`cryodask.kernels.aberrations.odd_basis`, and their standard deviations.

    Newton's method from zero; frequencies `(pixel,)` in 1/Angstrom. Units of 4 Angstrom keep the equations well conditioned.
    """
    basis = odd_basis(4.0 * ky, 4.0 * kx)
    found = torch.zeros(6, dtype=torch.float64)
    for _ in range(20):
        turned = q * torch.polar(torch.ones_like(ky), -(found[:, None] * basis).sum(0))
        # |q| alone, which far from the solution keeps the steps uphill, counts noise as signal
        hessian = 2.0 * torch.einsum("ip,jp,p->ij", basis, basis, turned.real)
        if not float(torch.linalg.eigvalsh(hessian)[0]) > 0.0:
            hessian = 2.0 * torch.einsum("ip,jp,p->ij", basis, basis, q.abs())
        step = torch.linalg.solve(hessian, 2.0 * (basis * turned.imag).sum(1))
        found = found + step
        if float(step.abs().max()) < 1e-7:
            break
    units = np.array([4.0, 4.0, 64.0, 64.0, 64.0, 64.0])
    return found.numpy() * units, torch.linalg.inv(hessian).diagonal().clamp(min=0.0).sqrt().numpy() * units


def tetrafoil_solution(even: Tensor, ky: Tensor, kx: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Changes `(2,)` of the tetrafoil, Angstrom^4, and their standard deviations, by one Gauss-Newton step."""
    x, y = 4.0 * kx, 4.0 * ky
    difference, product = x * x - y * y, 2.0 * x * y
    basis = torch.stack([difference**2 - product**2, 2.0 * difference * product])
    hessian = torch.einsum("ip,jp,p->ij", basis, basis, even[1])
    step = torch.linalg.solve(hessian, (basis * even[0]).sum(1))
    return step.numpy() * 256.0, torch.linalg.inv(hessian).diagonal().sqrt().numpy() * 256.0


def two_by_two(sums: np.ndarray, prior: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Solutions `(..., 2)` and standard deviations of gradients and Hessians `(..., 5)` (see :func:`fit_sums`).

    ``prior`` is added to the diagonal of the Hessian.
    """
    hessian = np.stack([sums[..., [2, 3]], sums[..., [3, 4]]], -2) + (prior + 1e-30) * np.eye(2)
    step = np.linalg.solve(hessian, sums[..., :2, None])[..., 0]
    return step, np.sqrt(np.clip(np.diagonal(np.linalg.inv(hessian), axis1=-2, axis2=-1), 0.0, None))


def astigmatism_changes(sums: np.ndarray) -> np.ndarray:
    """Changes `(micrograph, 2)` of z cos 2t and z sin 2t, Angstrom, each with a Gaussian prior of 100 Angstrom about no change."""
    return two_by_two(sums, 1.0 / _ASTIGMATISM_PRIOR_ANGSTROM**2)[0]


def magnification_step(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Changes `(2,)` of the magnification and their standard deviations; the sums leave out the factor 2 of gradient and Hessian."""
    step, deviation = two_by_two(sums)
    return step, deviation / math.sqrt(2.0)


# --- defocus of particles --------------------------------------------------------------------------------------------------------
def spread_evidence(likelihood: Tensor, offset: Tensor) -> Tensor:
    """Log evidence `(spread,)` of the spreads of a Gaussian prior, summed over particles.

    ``likelihood`` `(n, 65)` on :func:`defocus_grid`; ``offset`` `(n,)` is the distance of a zero change from the centre of the prior.
    """
    distance = (defocus_grid().to(likelihood.device)[None] + offset[:, None]).square()
    out = []
    for spread in SPREADS_ANGSTROM.tolist():
        prior = torch.log_softmax(-0.5 * distance / spread**2, 1)
        out.append(torch.logsumexp(likelihood + prior, 1).sum())
    return torch.stack(out)


def defocus_changes(likelihood: Tensor, offset: Tensor, spread_angstrom: float) -> tuple[Tensor, Tensor]:
    """Posterior mean of each particle's change of defocus `(n,)`, Angstrom, and its standard deviation."""
    grid = defocus_grid().to(likelihood.device)[None]
    share = torch.softmax(likelihood - 0.5 * (grid + offset[:, None]).square() / spread_angstrom**2, 1)
    mean = (share * grid).sum(1)
    return mean, (share * (grid - mean[:, None]).square()).sum(1).clamp(min=0.0).sqrt()
