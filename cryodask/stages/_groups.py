"""Noise power per data set and contrast per micrograph, each shared by its particles.

Data sets differ in camera, dose and scaling, micrographs in the thickness of the ice. Groups and their values are part of the state, so
that every block numbers them alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels.expectation import Particles
from cryodask.kernels.rows import ImageRows, shell_power
from cryodask.stage import ParticleSet, State, Sums

if TYPE_CHECKING:
    from cryodask.stages._refine3d import Loaded

_OF_THE_NOISE = ("data_set", "voltage_kv", "spherical_aberration_mm", "amplitude_contrast")
CONTRAST_SPREAD = 0.2
"""Standard deviation of the prior of a micrograph's contrast about 1."""
_CONTRAST_LIMITS = 0.3, 3.0


def _noise_keys(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    count = len(columns["voltage_kv"])
    return np.stack([np.asarray(columns.get(name, np.zeros(count)), np.float64) for name in _OF_THE_NOISE], 1)


def _micrographs(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.asarray(columns.get("micrograph", np.zeros(len(columns["voltage_kv"]))), np.int64)


def groups_of_set(particles: ParticleSet) -> State:
    """The part of a state that knows the groups of a set: all have the same noise and contrast at first."""
    keys, micrographs = np.unique(_noise_keys(particles.columns), axis=0), np.unique(_micrographs(particles.columns))
    return {
        "noise_groups": keys, "noise_power": np.ones((len(keys), particles.box // 2)),
        "micrographs": micrographs, "contrast": np.ones(len(micrographs)),
    }  # fmt: skip


def noise_group(state: State, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Row of ``noise_groups`` of each particle `(n,)` int64."""
    return (_noise_keys(columns)[:, None] == state["noise_groups"]).all(2).argmax(1)


def micrograph_rows(state: State, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Row of ``micrographs`` of each particle `(n,)` int64."""
    return np.searchsorted(state["micrographs"], _micrographs(columns))


def with_contrast(polar: Particles, rows: ImageRows, contrast: np.ndarray) -> tuple[Particles, ImageRows]:
    """Particles of which each expects its signal ``contrast`` `(n,)` times that of the map."""
    own = torch.from_numpy(contrast).to(rows.ctf)
    return replace(polar, contrast=own.float()), rows.with_contrast(own)


def power_by_group(state: State, rows: ImageRows, radius: int) -> Sums:
    """Sums over images of the power per shell `(group, radius + 1)`, and their number `(group,)`."""
    groups = range(len(state["noise_groups"]))
    members = [torch.nonzero(rows.group == g)[:, 0] for g in groups]
    power = torch.stack([shell_power(rows, radius, some) for some in members])
    return {"power": power.cpu().numpy(), "group_count": np.array([len(some) for some in members])}


def pose_sums(state: State, block: Loaded, rows: Tensor, terms: Tensor, noise_power: Tensor) -> Sums:
    """Sums over particles ``rows`` of what :func:`cryodask.kernels.local_search.shell_terms` gives at their best poses.

    ``power`` `(group, shell)` of the residual, ``group_count`` `(group,)`; ``cross`` and ``norm`` `(micrograph,)`: the log-likelihood of
    a contrast f is 2 f cross - f^2 norm.
    """
    image, cross, model = terms.unbind(1)
    group, ring = block.rows.group[rows], int(state["rings"])
    power = torch.zeros(len(noise_power), image.shape[1], dtype=torch.float64, device=image.device)
    power.index_add_(0, group, image - 2.0 * cross + model)
    weight = 1.0 / noise_power[group, : image.shape[1]].double()
    own = block.rows.ctf[rows, 5]
    of_micrograph = torch.from_numpy(block.micrograph).to(rows.device)[rows]
    out = {"power": power.cpu().numpy(), "group_count": torch.bincount(group, minlength=len(noise_power)).cpu().numpy()}
    for name, values, order in (("cross", cross, 1), ("norm", model, 2)):
        each = (values * weight)[:, 1 : ring + 1].sum(1) / own**order
        total = torch.zeros(len(state["micrographs"]), dtype=torch.float64, device=image.device)
        out[name] = total.index_add_(0, of_micrograph, each).cpu().numpy()
    return out


def updated_contrast(cross: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """Likeliest contrast of each micrograph `(micrograph,)`, with a prior about 1; the mean over the signal is 1.

    All are 1 where the map explains nothing.
    """
    # own maps fit the noise a little, which raises the contrast of all alike
    common = cross.sum() / max(norm.sum(), 1e-30)
    if common < 0.1:
        return np.ones_like(norm)
    prior = 0.5 / CONTRAST_SPREAD**2
    found = np.clip((cross / common + prior) / (norm + prior), *_CONTRAST_LIMITS)
    return np.asarray(found / (found @ norm / norm.sum()))
