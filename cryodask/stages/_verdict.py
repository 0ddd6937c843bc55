"""The verdict of a refinement: its evidence summed over blocks, and the state that follows from it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from cryodask.errors import InputError
from cryodask.kernels.local_search import Candidates, Climb, climb
from cryodask.kernels.rows import ImageRows
from cryodask.kernels.signal_share import Models, explained_share, has_surroundings, signal_products
from cryodask.kernels.verdict import LEAST_Z, Evidence
from cryodask.stage import Columns, Metrics, State, Sums
from cryodask.stages._refinement import JUNK_SHARE, sizes_of

_EXPLAINED_PARTICLES, _STEPS = 500, 6


def explained_sums(
    state: State, images: ImageRows, own: torch.Tensor, other: torch.Tensor, noise_power: torch.Tensor, operators: np.ndarray,
    columns: Columns, lottery: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Products of images and maps of both halves, `(5, shell)`, for particles with a small number in the ``lottery``.

    For the map of the other half, poses are refined once more: the halves may have drifted apart by a few degrees.
    """
    sizes, radius, device = sizes_of(state), int(state["rings"]), images.values.device
    if not has_surroundings(sizes.length_angstrom, sizes.mask_diameter_angstrom):
        return np.zeros((5, radius + 1))
    chosen = np.nonzero((lottery < _EXPLAINED_PARTICLES / state["count"]) & columns["in_map"])[0]
    rows = torch.from_numpy(chosen).to(device)
    start = Candidates(
        torch.from_numpy(columns["mode_rotation"][chosen, :1]).to(device),
        torch.from_numpy(columns["mode_origin_angstrom"][chosen, :1] / sizes.pixel_size_angstrom).to(device),
        torch.ones(len(chosen), dtype=torch.int64, device=device),
    )
    poses = climb(
        images, rows, other, noise_power, start, [Climb(radius, 1, _STEPS)],
        sigma_px=state["shift_sigma_angstrom"] / sizes.pixel_size_angstrom, operators=operators, modes=1,
    )  # fmt: skip
    products = signal_products(
        images, rows, Models(other, poses.rotations[:, 0], poses.shifts_px[:, 0]),
        Models(own, start.rotations[:, 0], start.shifts_px[:, 0]), radius=radius, pixel_size_angstrom=sizes.pixel_size_angstrom,
        mask_diameter_angstrom=sizes.mask_diameter_angstrom,
    )  # fmt: skip
    return products.cpu().numpy()


def gain_sums(gain: torch.Tensor) -> Sums:
    """Number, sum and sum of squares of gains of log evidence `(particle,)`."""
    return {"tested": len(gain), "gain": float(gain.double().sum()), "gain_square": float(gain.double().square().sum())}


def mean_gain(sums: list[Sums]) -> tuple[int, float, float]:
    """Number of gains, their mean, and the mean in standard errors."""
    tested = max(1, sum(s["tested"] for s in sums))
    gain, square = (sum(s[name] for s in sums) / tested for name in ("gain", "gain_square"))
    return tested, gain, gain / (math.sqrt(max(square - gain * gain, 0.0) / tested) + 1e-9)


def refuse_inverted(state: State) -> None:
    """Refuse particles that the inverted starting map explains better than the map: mean gain by the map, and in standard errors.

    Raises
    ------
    InputError
    """
    gain, z = state.get("gain_of_contrast", (0.0, 0.0))
    if z < -LEAST_Z:
        raise InputError(
            f"the particles are darker than their surroundings: the inverted starting map explains them better, by {-gain:.1f} nats each",
            "the contrast of the images is inverted",
            "extract them with invert, or multiply their stacks by -1",
        )


def unhelped_by_noise(gain: float) -> float:
    """Share of right particles that detail does not help, by chance: a log-likelihood ratio of mean g has a variance of 2 g."""
    return 0.5 * math.erfc(math.sqrt(max(gain, 0.0)) / 2.0)


def judged(new: State, sums: list[Sums]) -> tuple[State, Metrics]:
    """The verdict on the final maps; without its support the resolution is that of the start."""
    tested, gain, z = mean_gain(sums)
    figures: dict[str, Any] = {
        "pose_certainty": new["pose_certainty"],
        "held_out_gain": gain,
        "held_out_z": z,
        "explained_share": explained_share(sum(s["products"] for s in sums), new["noise_power"].mean(0)),
        **{name: new[name] for name in ("view_coverage", "cut_share")},
    }
    succeeded = Evidence(**figures).succeeded
    new |= {"succeeded": succeeded, **figures, "done": True}
    unhelped = sum(s["unhelped"] for s in sums) / tested
    junk = unhelped - unhelped_by_noise(gain) > JUNK_SHARE and unhelped < 1.0 - JUNK_SHARE
    if junk and not new["sorted"] and not math.isnan(new["pose_certainty"]):
        return {**new, "phase": "sort", "done": False}, {"phase": "verdict", "unhelped": unhelped}
    if not succeeded:
        new["resolution_angstrom"] = new["length_angstrom"] / new["start_rings"]
    return new, {"phase": "verdict", "succeeded": succeeded, **figures}
