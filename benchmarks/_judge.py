"""What only the truth can say of a map and its poses: docking over both hands, FSC against the truth, pose errors, true poses.

Nothing of this file is ever seen by the algorithms under test. A map V that was refined without a reference has a frame of its own: with
poses A_i R = B_i (B true) it is V(k) = T(R^T k), T the true map. The other hand is the map mirrored through its xy plane, with poses
M A M, M = diag(1, 1, -1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _molecules import MapTransform, Stack
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation
from torch import Tensor

from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.fsc import fsc, half_radius
from cryodask.kernels.half_grid import reconstruct_half
from cryodask.kernels.local_search import grid_of_poses
from cryodask.kernels.maximisation import HalfMaps, crossing
from cryodask.kernels.orientations import euler_to_matrix, healpix_angles, random_rotations
from cryodask.kernels.rows import image_rows, shell_counts, shell_power
from cryodask.kernels.symmetry import symmetry_operators

MIRROR = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
FSC_SHARE, FSC_EDGE_ANGSTROM = 0.45, 10.0
"""Radius of the sphere of all correlations, as a share of the mask's diameter, and its soft edge."""
NEAR_DEG, MATE_DEG = 12.0, 15.0
_TRUSTED_SHARE = 0.2
"""Share of particles within 12 degrees of one common rotation from which that rotation is the docking's start."""
_SAMPLE = 600
_COARSE_ANGSTROM, _FINALISTS = 35.0, 10


# --- poses --------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PoseErrors:
    """Angular errors `(n,)`, degrees, after the common rotation ``rotation``; and the strongest rival orientation."""

    degrees: np.ndarray
    rotation: Tensor
    rival_share: float
    rival_deg: float

    @property
    def share_near(self) -> float:
        """Share of particles within 12 degrees."""
        return float((self.degrees < NEAR_DEG).mean())


def mirrored_poses(rotations: Tensor) -> Tensor:
    """Poses of the mirrored map."""
    return MIRROR @ rotations.double() @ MIRROR


def _cosines(centre: Tensor, relative: Tensor) -> Tensor:
    """Cosine `(c, n)` of the angle between rotations `(c, 3, 3)` and the nearest of each particle's `(g, n, 3, 3)`."""
    best = torch.full((len(centre), relative.shape[1]), -1.0, dtype=centre.dtype)
    for mates in relative:
        best = torch.maximum(best, (centre.reshape(-1, 9) @ mates.reshape(-1, 9).T - 1.0) / 2.0)
    return best


def _densest(relative: Tensor, candidates: Tensor, within_deg: float) -> Tensor:
    """The candidate rotation with most particles around it, then the mean of these."""
    limit = math.cos(math.radians(within_deg))
    some = candidates[torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0))[:_SAMPLE]]
    centre = some[int((_cosines(some, relative) > limit).sum(1).argmax())]
    for _ in range(4):
        cosine = (torch.einsum("ij,gnij->gn", centre, relative) - 1.0) / 2.0
        value, mate = cosine.max(0)
        mates = relative[mate, torch.arange(relative.shape[1])][value > limit]
        u, _, v = torch.linalg.svd(mates.double().sum(0))
        centre = (u @ torch.diag(torch.tensor([1.0, 1.0, float(torch.det(u @ v))], dtype=torch.float64)) @ v).float()
    return centre


def pose_errors(estimated: Tensor, true: Tensor, imposed: str, own: str = "C1", *, with_rival: bool = True) -> PoseErrors:
    """Errors of poses `(n, 3, 3)` after the rotation that most particles share.

    ``imposed`` is the point group of the refinement, about the axes of the estimated map; ``own`` is that of the molecule, about the
    axes of the true one, and counts where the refinement imposed none.
    """
    before = torch.from_numpy(np.array(symmetry_operators(imposed)))
    after = torch.from_numpy(np.array(symmetry_operators(own if imposed == "C1" else "C1")))
    relative = torch.einsum("nji,njk->nik", estimated.double(), true.double())
    mates = torch.stack([g.T @ relative @ h for g in before for h in after]).float()
    rotation = _densest(mates, relative.float(), NEAR_DEG)
    degrees = np.degrees(np.arccos(_cosines(rotation[None], mates)[0].double().clamp(-1.0, 1.0).numpy()))
    far = torch.from_numpy(degrees > MATE_DEG)
    rival_share = rival_deg = 0.0
    if with_rival and far.any():
        rival = _densest(mates[:, far], relative[far].float(), MATE_DEG)
        rival_share = float((_cosines(rival[None], mates[:, far])[0] > math.cos(math.radians(MATE_DEG))).float().sum() / len(true))
        orbit = torch.stack([g.T @ rotation.double() @ h for g in before for h in after]).float()[:, None]
        rival_deg = math.degrees(math.acos(float(_cosines(rival[None], orbit)[0, 0].clamp(-1.0, 1.0))))
    return PoseErrors(degrees, rotation, rival_share, rival_deg)


def column_rotations(columns: dict[str, Any]) -> Tensor:
    """Rotations `(n, 3, 3)` of the pose columns of a refinement, or of one of its iterations."""
    if "mode_rotation" in columns:
        return torch.from_numpy(columns["mode_rotation"][:, 0]).double()
    angles = (np.asarray(columns[name], np.float64) for name in ("rot_deg", "tilt_deg", "psi_deg"))
    return euler_to_matrix(*(torch.deg2rad(torch.from_numpy(a)) for a in angles))


# --- maps ---------------------------------------------------------------------------------------------------------------------
def mirrored_map(volume: np.ndarray) -> np.ndarray:
    """The other hand: z to -z about voxel n // 2."""
    return np.ascontiguousarray(np.roll(volume[::-1], 1 - volume.shape[0] % 2, 0))


def placed(truth: MapTransform, box: int, pixel: float, rotation: Tensor | None = None, shift_angstrom: Tensor | None = None) -> np.ndarray:
    """A map on another grid, turned and shifted: T(A (x - t)), `(box, box, box)` float32."""
    rotation = torch.eye(3) if rotation is None else rotation.float()
    shift = torch.zeros(3) if shift_angstrom is None else shift_angstrom.float()
    k = torch.fft.fftfreq(box, pixel)
    kz, ky, kx = torch.meshgrid(k, k, torch.fft.rfftfreq(box, pixel), indexing="ij")
    inside = half_radius(box) < box // 2
    points = torch.stack([kx[inside], ky[inside], kz[inside]], -1)
    turns = (points @ shift) * (-2.0 * math.pi)
    spectrum = torch.zeros(inside.shape, dtype=torch.complex64)
    spectrum[inside] = truth.at(points @ rotation.T) * torch.polar(torch.ones_like(turns), turns)
    return torch.fft.fftshift(torch.fft.irfftn(spectrum, s=(box,) * 3)).numpy() * (truth.voxel / pixel) ** 3


def sphere_fsc(a: np.ndarray, b: np.ndarray, pixel: float, mask_diameter: float) -> np.ndarray:
    """FSC `(shell,)` in a sphere of 0.45 x the mask's diameter with a 10 A edge."""
    mask = soft_sphere(a.shape[0], pixel, FSC_SHARE * mask_diameter, FSC_EDGE_ANGSTROM)
    return fsc(torch.as_tensor(np.ascontiguousarray(a)) * mask, torch.as_tensor(np.ascontiguousarray(b)) * mask).numpy()


def resolution(curve: np.ndarray, length: float, threshold: float = 0.5) -> float:
    """Resolution, Angstrom, where a curve first falls below a threshold from shell 2 on; Nyquist if it never does."""
    low = np.nonzero(curve[2:] < threshold)[0]
    if not len(low):
        return length / (len(curve) - 1)
    below = int(low[0]) + 2
    last, here = max(float(curve[below - 1]), threshold), float(curve[below])
    return length / (below - 1 + (last - threshold) / (last - here))


class Match:
    """Correlation of a map with a turned and shifted true one up to a resolution; every shell of both has the same power."""

    def __init__(self, volume: np.ndarray, pixel: float, truth: MapTransform, finest_angstrom: float, most: int | None = None) -> None:
        box = volume.shape[0]
        self.length = box * pixel
        self.radius = radius = min(int(self.length / finest_angstrom), box // 2 - 1)
        k = torch.arange(-radius, radius + 1)
        kz, ky, kx = torch.meshgrid(k, k, torch.arange(radius + 1), indexing="ij")
        inside = (kx**2 + ky**2 + kz**2 <= (radius + 0.5) ** 2) & ((kx > 0) | ((kx == 0) & ((ky > 0) | ((ky == 0) & (kz > 0)))))
        self.index = torch.stack([kx[inside], ky[inside], kz[inside]], -1)
        if most and len(self.index) > most:
            self.index = self.index[torch.randperm(len(self.index), generator=torch.Generator().manual_seed(1))[:most]]
        spectrum = torch.fft.fftn(torch.fft.ifftshift(torch.as_tensor(np.ascontiguousarray(volume, np.float32))))
        x, y, z = (self.index % box).T
        self.truth, self.points = truth, self.index.float() / self.length
        self.shells = self.index.float().norm(dim=1).round().long()
        values = spectrum[z, y, x]
        self.values = values / self._amplitude(values)[self.shells]
        self.weight = 1.0 / self._amplitude(truth.at(self.points))[self.shells]
        self.norm = self.values.abs().square().sum().sqrt()

    def _amplitude(self, values: Tensor) -> Tensor:
        count = torch.bincount(self.shells, minlength=self.radius + 2).clamp(min=1)
        return (torch.bincount(self.shells, values.abs() ** 2, self.radius + 2) / count).sqrt().clamp(min=1e-20)

    def _turned(self, rotations: Tensor) -> Tensor:
        return self.truth.at(torch.einsum("rij,pj->rpi", rotations, self.points)) * self.weight

    def correlation(self, rotation: Tensor, shift_angstrom: Tensor) -> float:
        """At one placement."""
        turned = self._turned(rotation[None].float())[0]
        turns = (self.points @ shift_angstrom.float()) * (2.0 * math.pi)
        cross = (self.values * turned.conj() * torch.polar(torch.ones_like(turns), turns)).real.sum()
        return float(cross / (turned.abs().square().sum().sqrt() * self.norm))

    def best_shifts(self, rotations: Tensor, chunk: int = 48) -> tuple[Tensor, Tensor]:
        """Highest correlation `(r,)` over all shifts of each rotation, and that shift `(r, 3)` (x, y, z), Angstrom."""
        side = 2 * self.radius + 2
        x, y, z = (self.index % side).T
        edge = self.index[:, 0] == 0
        found, where = [], []
        for some in rotations.float().split(chunk):
            turned = self._turned(some)
            cross = self.values * turned.conj()
            grid = torch.zeros(len(some), side, side, side // 2 + 1, dtype=torch.complex64)
            grid[:, z, y, x] = cross
            grid[:, -z[edge] % side, -y[edge] % side, 0] = cross[:, edge].conj()
            table = torch.fft.irfftn(grid, s=(side,) * 3, dim=(1, 2, 3), norm="forward").flatten(1)
            value, place = table.max(1)
            found.append(value / (2.0 * turned.abs().square().sum(1).sqrt() * self.norm))
            shift = torch.stack([place % side, place // side % side, place // side**2], -1).float()
            where.append(((shift + side / 2) % side - side / 2) * (self.length / side))
        return torch.cat(found), torch.cat(where)

    def refined(self, rotation: Tensor, shift_angstrom: Tensor, step_deg: float, step_angstrom: float) -> tuple[float, Tensor, Tensor]:
        """Nearest maximum of the correlation: its value, rotation and shift (simplex search)."""
        steps = np.array([np.radians(step_deg)] * 3 + [step_angstrom] * 3)

        def place(p: np.ndarray) -> tuple[Tensor, Tensor]:
            turn = torch.from_numpy(Rotation.from_rotvec(p[:3] * steps[:3]).as_matrix()).float()
            return turn @ rotation.float(), shift_angstrom.float() + torch.from_numpy(p[3:] * steps[3:]).float()

        simplex = np.vstack([np.zeros(6), np.eye(6)])
        options = {"initial_simplex": simplex, "maxfev": 250, "xatol": 0.02, "fatol": 1e-5}
        best = minimize(lambda p: -self.correlation(*place(p)), np.zeros(6), method="Nelder-Mead", options=options)
        return (-float(best.fun), *place(best.x))


@dataclass(frozen=True)
class Docking:
    """Where a true map lies in another: T(A (x - t)) in the map, or in its mirror image."""

    correlation: float
    rotation: Tensor
    shift_angstrom: Tensor
    mirrored: bool


def _search(volume: np.ndarray, pixel: float, truth: MapTransform, finest: float) -> tuple[float, Tensor, Tensor]:
    """Docking without any prior knowledge: all rotations at 35 A, then the best of each neighbourhood at finer resolutions."""
    generator = torch.Generator().manual_seed(0)
    rot, tilt = (torch.from_numpy(a) for a in healpix_angles(2))
    psi = torch.arange(24) * (2.0 * math.pi / 24)
    views = euler_to_matrix(rot.repeat_interleave(24), tilt.repeat_interleave(24), psi.double().repeat(len(rot)))
    views = views.float() @ random_rotations(1, generator)[0]
    low = Match(volume, pixel, truth, max(_COARSE_ANGSTROM, finest))
    value, shift = low.best_shifts(views)
    chosen: list[int] = []
    for i in value.argsort(descending=True).tolist():
        if all((torch.trace(views[i] @ views[j].T) - 1) / 2 < math.cos(math.radians(20.0)) for j in chosen):
            chosen.append(i)
        if len(chosen) == _FINALISTS:
            break
    middle = Match(volume, pixel, truth, max(15.0, finest), most=4000)
    found = []
    for i in chosen:
        _, rotation, where = low.refined(views[i], shift[i], 6.0, 3.0)
        found.append(middle.refined(rotation, where, 3.0, 1.5))
    return max(found, key=lambda f: f[0])


def dock(volume: np.ndarray, pixel: float, truth: MapTransform, finest_angstrom: float, errors: dict[bool, PoseErrors]) -> Docking:
    """Place the true map in a map, over both hands; from the poses (by `mirrored`) where they agree, else by search."""
    trusted = {mirrored: e for mirrored, e in errors.items() if e.share_near > _TRUSTED_SHARE}
    hands = [max(trusted, key=lambda mirrored: trusted[mirrored].share_near)] if trusted else [False, True]
    found = []
    for mirrored in hands:
        one = mirrored_map(volume) if mirrored else volume
        fine = Match(one, pixel, truth, finest_angstrom, most=6000)
        if mirrored in trusted:
            rotation = trusted[mirrored].rotation.T
            shift = Match(one, pixel, truth, max(15.0, finest_angstrom)).best_shifts(rotation[None])[1][0]
            start = rotation, shift
        else:
            start = _search(one, pixel, truth, finest_angstrom)[1:]
        value, rotation, shift = fine.refined(*start, 1.5, 1.0)
        value, rotation, shift = fine.refined(rotation, shift, 0.3, 0.3)
        found.append(Docking(value, rotation, shift, mirrored))
    return max(found, key=lambda d: d.correlation)


# --- verdicts -----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Judgement:
    """Figures of a map and its poses; ``placed_truth`` is the true map in the frame of ``volume``, which has the true hand."""

    figures: dict[str, Any]
    curve: np.ndarray
    volume: np.ndarray
    placed_truth: np.ndarray
    degrees: np.ndarray | None


def judge(
    stack: Stack, volume: np.ndarray, pixel: float, reported: float, mask_diameter: float, imposed: str, own: str,
    estimated: Tensor | None,
) -> Judgement:  # fmt: skip
    """Judge a map `(z, y, x)` and its poses `(n, 3, 3)` of all particles of a stack by its truth; junk counts in no pose error."""
    if stack.truth is None:
        raise ValueError("a stack without a true map cannot be judged")
    box = volume.shape[0]
    length = box * pixel
    truth = MapTransform(stack.truth, stack.truth_voxel_angstrom)
    errors: dict[bool, PoseErrors] = {}
    if estimated is not None and stack.poses is not None:
        real = torch.from_numpy(~stack.poses.junk)
        for mirrored in (False, True):
            turned = mirrored_poses(estimated) if mirrored else estimated
            errors[mirrored] = pose_errors(turned[real], stack.poses.rotations[real], imposed, own)
    finest = min(max(8.0, 2.5 * pixel, reported if math.isfinite(reported) else 30.0), 30.0)
    docking = dock(volume, pixel, truth, finest, errors)
    one = mirrored_map(volume) if docking.mirrored else volume
    there = placed(truth, box, pixel, docking.rotation, docking.shift_angstrom)
    curve = sphere_fsc(one, there, pixel, mask_diameter)
    figures: dict[str, Any] = {
        "truth05_angstrom": round(resolution(curve, length), 3),
        "hand": "mirrored" if docking.mirrored else "true",
        "docking_correlation": round(docking.correlation, 3),
    }
    degrees = None
    if errors:
        e = errors[docking.mirrored]
        degrees = e.degrees
        figures |= {
            "median_deg": round(float(np.median(degrees)), 3),
            "share_below_5": round(float((degrees < 5).mean()), 4),
            "share_below_12": round(float((degrees < 12).mean()), 4),
            "share_above_20": round(float((degrees > 20).mean()), 4),
            "rival_share": round(e.rival_share, 4),
            "rival_deg": round(e.rival_deg, 1),
        }
    return Judgement(figures, curve, one, there, degrees)


def true_poses(stack: Stack, mask_diameter: float, symmetry: str) -> tuple[dict[str, float], np.ndarray]:
    """Half-map resolution and truth FSC 0.5 that the true poses give, and the FSC `(shell,)` against the truth; without junk."""
    if stack.poses is None or stack.truth is None:
        raise ValueError("true poses need a stack with poses and a true map")
    box, pixel = stack.particles.box, float(stack.particles.pixel_size_angstrom)
    length, last = box * pixel, box // 2 - 1
    operators = symmetry_operators(symmetry)
    rows = image_rows(torch.from_numpy(np.ascontiguousarray(stack.images, np.float32)), stack.particles.columns, last, pixel)
    # nearly all of the images' power is noise
    noise = (shell_power(rows, last) / len(stack.images) / shell_counts(last)).clamp(min=1e-12).float()
    grids = []
    for half in (0, 1):
        some = torch.from_numpy(np.nonzero((stack.particles.columns["half_set"] == half) & ~stack.poses.junk)[0])
        origins = torch.from_numpy(stack.poses.origins_angstrom / pixel).float()[some]
        grids.append(grid_of_poses(rows, some, noise, stack.poses.rotations[some], origins, last, operators))
    halves = [reconstruct_half(grid, last, box, image_box=box) for grid in grids]
    maps = HalfMaps.of(*halves, inserted=last, common=min(5, last), generator=torch.Generator().manual_seed(0))
    support = maps.support(soft_sphere(box, pixel, 0.95 * mask_diameter / 2, 10.0), len(operators))
    trusted = support.corrected.clamp(1e-4, 0.999)
    trusted[support.last + 1 :] = 1e-4
    final = reconstruct_half(grids[0] + grids[1], last, box, image_box=box, ssnr=2.0 * trusted / (1.0 - trusted)).numpy()
    there = placed(MapTransform(stack.truth, stack.truth_voxel_angstrom), box, pixel)
    curve = sphere_fsc(final, there, pixel, mask_diameter)
    figures = {
        "true_poses_reported_angstrom": round(crossing(support.corrected, length, support.last), 3),
        "true_poses_truth05_angstrom": round(resolution(curve, length), 3),
    }
    return figures, curve
