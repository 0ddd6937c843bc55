"""Parts of the refinement: what is fixed by the sizes, how passes follow one another, noise power, maps and figures of a pass.

All take and return the plain state that the runner transfers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels.fourier import resize_map, soft_sphere
from cryodask.kernels.half_grid import reconstruct_half
from cryodask.kernels.local_search import Climb
from cryodask.kernels.map_evidence import covered, cut_share, fourier_coverage
from cryodask.kernels.masking import own_solvent_mask
from cryodask.kernels.maximisation import Support, crossing
from cryodask.kernels.orientations import random_rotations, small_rotation
from cryodask.kernels.projection import cut_map
from cryodask.kernels.rows import shell_counts
from cryodask.kernels.views import COARSE_RINGS, SCALE_PARTICLES, SCALE_ROUNDS, shift_step_px
from cryodask.stage import Metrics, State, Sums
from cryodask.stages._groups import updated_contrast

SCALE_PARTICLES_OF_FINE_MAPS = 120
DRAWS = 4
DRAWN_BATCH = 250
"""Particles of a half-set between two maps while poses are drawn."""
DRAWN_PASSES, FEWEST_DRAWN_PASSES = 6, 2
DRAWN_PARTICLES = 5000
"""Particles of a half-set that a drawn pass uses at most: 14 Angstrom need no more."""
MEMORY = 3.0
"""Batches that a drawn map remembers."""
MOST_PARTS = 4
"""Maps per pass over all views. Each particle meets a map that knows its last pose in one part only, and maps improve sooner."""
MODES = 4
LOCAL_LEAST_GAIN = 0.3
"""Local passes follow one another, so each may stop a few tenths of a nat short: 2.8 instead of 10 ms per particle at 256 px."""
KEPT_VIEWS = 24
WIDEST_UNIT_ANGSTROM = 190.0
"""Particles larger than this need finer views at the same resolution: the resolutions below are scaled with them."""
DRAWN_ANGSTROM = 14.16
COARSE_ANGSTROM = 16.2
FIRST_CLIMB_ANGSTROM = 11.3
DECISIVE_ANGSTROM = 10.8
"""A pass over all views that has scored this decides. Of nine maps from nothing, right ones had a certainty of 0.81 to 1.00 there, or 0.72
at 1.3 times the noise; a chimera had 0.60."""
CERTAIN_ANYHOW = 0.85
"""Pose certainty that decides at any resolution, for data that end before that: wrong maps had at most 0.64 there."""
SURE = 0.9
"""Pose certainty, in the last part of a pass, from which further passes over all views change nothing."""
STRAY, FOREIGN = 2.0, 3.0
"""Standard deviations by which the log-likelihood of a particle is below the mean if all views and shifts are searched again for it, and
if it is left out of the map because that did not help. Few are so far below: the distribution has its long tail on the other side."""
REACH_STEPS, REACH_OF_MASK = 3.0, 0.06
"""How far views are searched about a particle's last shift: steps of the shifts, or a share of the mask's diameter if that is more."""
FIRST_ANGSTROM = 28.0
"""Low-pass of starting maps, and the resolution beyond which the verdict asks whether detail helps."""
MAP_MARGIN = 8
"""Extra shells in the box of a transferred map: masks broaden spectra, and a tighter box would alias."""
VERDICT_PARTICLES = 120
JUNK_SHARE = 0.125
"""Share of particles that detail does not help, beyond what noise explains, from which they are sorted out: below 0.07 in clean sets."""


@dataclass(frozen=True)
class Sizes:
    """Lengths of a refinement, and the rings that follow from them."""

    box: int
    length_angstrom: float
    mask_diameter_angstrom: float

    @property
    def pixel_size_angstrom(self) -> float:
        return self.length_angstrom / self.box

    @property
    def last(self) -> int:
        """Last shell of the images."""
        return self.box // 2 - 1

    def ring_of(self, resolution_angstrom: float) -> int:
        """Ring of a resolution, scaled with large particles, within the images."""
        unit = max(1.0, self.mask_diameter_angstrom / WIDEST_UNIT_ANGSTROM)
        return max(2, min(round(self.length_angstrom / (resolution_angstrom * unit)), self.last - 1))

    @property
    def beyond(self) -> int:
        """Shells inserted beyond the scored ones: 8, as many as 28 Angstrom in a usual box."""
        return max(8, round(self.length_angstrom / 28.0))


def sizes_of(state: State) -> Sizes:
    """The sizes kept in a state."""
    return Sizes(state["box"], state["length_angstrom"], state["mask_diameter_angstrom"])


def map_box(rings: int, box: int) -> int:
    """Even box size of a map with frequencies up to ``rings``."""
    return min(box, 2 * (rings + MAP_MARGIN))


def inserted_rings(state: State) -> int:
    """Highest shell inserted in this iteration."""
    sizes = sizes_of(state)
    rings = state["rings"]
    if state["phase"] == "draw":
        # one size for the whole phase: every batch then counts alike at all frequencies
        rings = max(state["start_rings"], sizes.ring_of(DRAWN_ANGSTROM))
    return int(min(sizes.last, rings + sizes.beyond))


def kept_radius(state: State) -> int:
    """Highest frequency of the loaded images: a quarter of the box, 7/16 of it, or all; so images are read three times at most."""
    box = state["box"]
    return next(r for r in (min(max(16, box // 4), box // 2 - 1), 7 * box // 16, box // 2 - 1) if r >= inserted_rings(state))


def polar_rings(state: State) -> int:
    """Rings that searches over all views need."""
    sizes = sizes_of(state)
    return int(min(sizes.last, max(state["start_rings"], sizes.ring_of(DRAWN_ANGSTROM), sizes.ring_of(COARSE_ANGSTROM)) + 1))


def climbs(state: State, *, from_views: bool) -> list[Climb]:
    """Ring limits of a local search from views of a grid, or from poses that were optima of the last map."""
    rings = state["rings"]
    if not from_views:
        return [Climb(rings, MODES, 6)]
    sizes = sizes_of(state)
    first = min(sizes.ring_of(FIRST_CLIMB_ANGSTROM), round(state["length_angstrom"] / (0.06 * state["mask_diameter_angstrom"])))
    limits = [r for r in (first, round(1.6 * first)) if r < rings] + [rings]
    if len(limits) == 1:
        return [Climb(rings, MODES, 6)]
    most = [6, MODES] if len(limits) == 2 else [6, MODES, MODES]
    return [Climb(ring, count, steps) for ring, count, steps in zip(limits, most, (4, 5, 5))]


def updated_noise_power(state: State, sums: list[Sums], rate: float = 1.0) -> np.ndarray:
    """Noise power per shell `(group, box / 2)`, from sums over pixels and particles; what is not measured now keeps its value."""
    out = np.array(state["noise_power"])
    power, count = (sum(s[name] for s in sums) for name in ("power", "group_count"))
    radius = power.shape[1] - 1
    fresh = np.maximum(power / np.maximum(count, 1)[:, None] / shell_counts(radius).numpy(), 1e-12)
    known = slice(1, min(radius + 1, out.shape[1]))
    out[:, known] += rate * (count > 0)[:, None] * (fresh[:, known] - out[:, known])
    out[:, 0] = out[:, 1]
    return out


def updated_scale(new: State, sums: list[Sums]) -> tuple[State, Metrics]:
    """The grey scale of the starting map after a round of EM."""
    cross, norm = (sum(s[name] for s in sums) for name in ("cross", "norm"))
    old = new["scale"] or 1.0
    new["scale"] = max(cross / (2.0 * max(norm, 1e-30)), 1e-3 * old) if cross > 0 else 1e-3 * old
    new["round"] += 1
    if new["round"] == SCALE_ROUNDS:
        new["start_maps"] = (new["maps"] * new["scale"]).astype(np.float32)
        new |= beginning(new, new["count"])
    return new, {"phase": "grey scale", "scale": new["scale"]}


def beginning(state: State, count: int) -> State:
    """The part of a state with which the refinement of ``count`` particles begins, after the grey scale is known."""
    parts, sample = parts_of_pass(count)
    return {
        "phase": "draw", "part": 0, "parts": parts, "sample": sample, "drawn_passes": 0, "passes": 0, "stalled": 0,
        "rings": state["start_rings"], "maps": state["start_maps"], "best_rings": 0, "best_log_likelihood": -math.inf,
        "stray_below": -math.inf, "pose_certainty": math.nan, "grids": np.zeros(0, np.float32), "of_pass": [],
    }  # fmt: skip


def every_for_scale(state: State) -> int:
    """Of how many particles one is used for the grey scale: fine maps need fewer particles, and each costs more."""
    wanted = SCALE_PARTICLES if state["rings"] <= COARSE_RINGS else SCALE_PARTICLES_OF_FINE_MAPS
    return max(1, int(state["count"]) // wanted)


def update_shifts(new: State, mean_square: float) -> None:
    """The spread of the shifts per axis, at least 2 Angstrom, and how far the next search reaches."""
    new["shift_sigma_angstrom"] = min(max(math.sqrt(mean_square / 2.0), 2.0), new["shift_range_angstrom"])
    new["reach_angstrom"] = min(3.0 * new["shift_sigma_angstrom"], new["shift_range_angstrom"])


def updated_maps(state: State, grids: list[Tensor], means: list[Tensor], support: Support, inserted: int, rings: int) -> np.ndarray:
    """Maps of the halves for the next iteration: Wiener filtered, solvent flattened by a mask of their own, cut at ``rings``."""
    sizes = sizes_of(state)
    small = map_box(inserted, sizes.box)
    voxel = sizes.length_angstrom / small
    device = grids[0].device
    sphere = soft_sphere(small, voxel, sizes.mask_diameter_angstrom / 2, 12.0, device=device)
    trusted = support.corrected.clamp(1e-4, 0.999)
    trusted[rings + 1 :] = 1e-4
    maps = []
    for grid, mean in zip(grids, means):
        map_ = reconstruct_half(grid, inserted, small, image_box=sizes.box, ssnr=trusted / (1.0 - trusted), mean=mean) * sphere
        map_ = map_ * own_solvent_mask(map_, voxel, rings)
        # low-pass AFTER the masks: their smearing beyond the supported shells would be aligned to and come back as resolution
        maps.append(resize_map(cut_map(map_, rings), map_box(rings, sizes.box)))
    return torch.stack(maps).float().cpu().numpy()


def final_maps(state: State, grids: list[Tensor], means: list[Tensor], support: Support, inserted: int) -> State:
    """Half-maps, combined map and curves of the last iteration, at the box of the particles."""
    box, length = state["box"], state["length_angstrom"]
    trusted = support.corrected.clamp(1e-4, 0.999)
    trusted[support.last + 1 :] = 1e-4
    halves = [reconstruct_half(grid, inserted, box, image_box=box, mean=mean).cpu() for grid, mean in zip(grids, means)]
    joint = grids[0].add_(grids[1])
    final = reconstruct_half(joint, inserted, box, image_box=box, ssnr=2.0 * trusted / (1.0 - trusted), mean=means[0] + means[1]).cpu()
    coverage = fourier_coverage(joint, inserted).cpu()
    seen = covered(support.corrected.cpu(), coverage)
    low = torch.nonzero(seen[2 : support.last + 1] < 0.143)
    return {
        "half_map": torch.stack(halves).float().numpy(),
        "final_map": final.float().numpy(),
        "resolution_angstrom": crossing(seen, length, int(low[0]) + 1 if len(low) else support.last),
        "fourier_coverage": coverage.numpy(),
        "view_coverage": float(coverage[support.last]),
        "cut_share": cut_share(torch.stack(halves), length / box, state["mask_diameter_angstrom"], support.last),
        "fsc_unmasked": support.unmasked.cpu().numpy(),
        "fsc_masked": support.masked.cpu().numpy(),
        "fsc_randomised": support.randomised.cpu().numpy(),
        "fsc_corrected": support.corrected.cpu().numpy(),
    }


def next_phase(state: State, new: State, *, iterations: int) -> None:
    """Which pass follows a pass: drawn ones to 14 Angstrom, over all views until poses are decided and nothing improves, local ones.

    ``new`` has what was measured in the parts of this pass, ``of_pass``.
    """
    sizes = sizes_of(state)
    new["part"] = (state["part"] + 1) % parts_of(state)
    if new["part"]:
        return
    parts, new["of_pass"] = new["of_pass"], []
    if state["phase"] == "draw":
        new["drawn_passes"] = state["drawn_passes"] + 1
        fine_enough = new["rings"] >= sizes.ring_of(DRAWN_ANGSTROM) and new["drawn_passes"] >= FEWEST_DRAWN_PASSES
        if fine_enough or new["drawn_passes"] == DRAWN_PASSES:
            new["phase"] = "global"
        return
    new["passes"] = state["passes"] + 1
    new["contrast"] = updated_contrast(*(sum(part[name] for part in parts) for name in ("cross", "norm")))
    count = max(1, sum(part["count"] for part in parts))
    likelihood, certainty = (sum(part[name] for part in parts) / count for name in ("log_likelihood", "certainty"))
    improved = new["rings"] > state["best_rings"] or likelihood > state["best_log_likelihood"] + 0.01 * abs(likelihood)
    new["best_rings"] = max(new["rings"], state["best_rings"])
    new["best_log_likelihood"] = max(likelihood, state["best_log_likelihood"])
    new["stalled"], new["stray_below"] = 0 if improved else state["stalled"] + 1, -math.inf
    if state["phase"] == "global":
        fine = sizes.ring_of(DECISIVE_ANGSTROM)
        sure = new["certainty"] >= SURE and state["rings"] >= fine
        decisive = sure or min(part["rings"] for part in parts) >= fine or certainty >= CERTAIN_ANYHOW
        if decisive and math.isnan(state["pose_certainty"]):
            # only the first such pass tells: later the certainty rises whether or not the poses are right
            new["pose_certainty"] = new["certainty"] if sure else certainty
        if sure or new["stalled"] >= 2:
            new["phase"], new["stalled"] = "local" if decisive else "verdict", 0
            spread = math.sqrt(max(sum(part["log_likelihood_square"] for part in parts) / count - likelihood**2, 0.0))
            new["stray_below"], new["foreign_below"] = likelihood - STRAY * spread, likelihood - FOREIGN * spread
    elif new["stalled"] >= 1:
        new["phase"] = "verdict"
    if new["passes"] >= iterations:
        new["phase"] = "verdict"


def parts_of(state: State) -> int:
    """Parts of a pass: a new map follows each. Large sets need one map per pass over all views: no particle weighs much in it."""
    if state["phase"] == "draw":
        return int(state["parts"])
    return min(MOST_PARTS, state["parts"]) if state["phase"] == "global" and state["sample"] == 1.0 else 1


def memory_rate(state: State) -> float:
    """Weight of this part in a grid that remembers the parts before it."""
    if state["phase"] == "draw":
        done = state["drawn_passes"] * state["parts"] + state["part"] + 1
        return 1.0 / min(max(1.0, 0.5 * done), MEMORY, max(1, state["parts"]))
    return 1.0 / parts_of(state)


def part_of_pass(uniforms: np.ndarray, parts: int, sample: float) -> np.ndarray:
    """Which part of a drawn pass each particle belongs to, -1: none."""
    return np.where(uniforms < sample, (uniforms / sample * parts).astype(np.int64), -1)


def parts_of_pass(count: int) -> tuple[int, float]:
    """Number of parts of a drawn pass over ``count`` particles, and the share of the particles that it uses."""
    sample = min(1.0, 2.0 * DRAWN_PARTICLES / count)
    return max(1, round(count * sample / 2 / min(DRAWN_BATCH, max(100, count // 4)))), sample


def centred(state: State) -> bool:
    """Whether views are searched about the last shifts: after a pass over all views, which has found a shift for every particle.

    Not for the verdict: with a blurred map shifts spread more widely, and limiting them would bias the comparison against it.
    """
    return state["phase"] == "global" and state["passes"] > 0


def seeks_strays(state: State) -> bool:
    """Whether particles that the map explains badly are searched again, over all views and shifts: in the first local pass."""
    return state["phase"] == "local" and math.isfinite(state["stray_below"])


def reach_px(state: State) -> float:
    """How far the shifts of a search over all views reach from their centres, pixels."""
    sizes = sizes_of(state)
    reach = state["shift_range_angstrom"] if seeks_strays(state) else state["reach_angstrom"]
    whole = reach / sizes.pixel_size_angstrom
    if not centred(state):
        return float(whole)
    step = shift_step_px(coarse_rings(state), sizes.box)
    return float(min(whole, max(REACH_STEPS * step, REACH_OF_MASK * sizes.mask_diameter_angstrom / sizes.pixel_size_angstrom)))


def coarse_rings(state: State) -> int:
    """Rings of the views of a pass."""
    if state["phase"] in ("draw", "scale"):
        return int(state["rings"])
    if state["phase"] in ("verdict", "sort"):
        return int(state["verdict_rings"])
    return min(sizes_of(state).ring_of(COARSE_ANGSTROM), state["rings"])


def grid_turn(state: State, seed: int, half: int, order_of_group: int) -> Tensor:
    """Random rotation `(3, 3)` of the grid of views in this iteration, so that no view is favoured: any, or a small one."""
    generator = torch.Generator().manual_seed(((seed * 1009 + state["iteration"]) * 2 + half) & 0x7FFFFFFF)
    if state["phase"] != "global" and order_of_group == 1:
        return random_rotations(1, generator)[0]
    return small_rotation(0.15 if state["phase"] == "global" else 0.1, generator)
