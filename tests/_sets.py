"""Sets with columns, and the stages that work on them, for their tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cryodask.kernels.orientations import euler_to_matrix, matrix_to_euler
from cryodask.products import Product
from cryodask.stage import SetView, find_stage
from cryodask.store.identity import make_ids

NAMES = ("merge", "consensus", "match", "deduplicate", "select", "select_exposures", "expand", "contract")


def a_set(name: str, ids: Any, **parts: dict[str, Any]) -> SetView:
    """A set with columns, given in the order of ``ids``, whatever that is."""
    ids = np.asarray(ids, np.int64)
    order = np.argsort(ids)
    columns = {part: {n: np.asarray(v)[order] for n, v in given.items()} for part, given in parts.items()}

    def read(wanted: Any) -> dict[str, np.ndarray]:
        return {n: v for part, given in columns.items() if wanted is None or part in wanted for n, v in given.items()}

    return SetView(name, ids[order], tuple(parts), read)


def at(places: Any, half: Any = None) -> dict[str, np.ndarray]:
    places = np.asarray(places, float).reshape(-1, 2)
    half = np.zeros(len(places), np.int8) if half is None else np.asarray(half, np.int8)
    return {"position_y_angstrom": places[:, 0], "position_x_angstrom": places[:, 1], "half_set": half}


def ids_of(birth: int, numbers: Any, row: Any = 1) -> np.ndarray:
    return make_ids(birth, row, np.asarray(numbers))


def posed(rotations: torch.Tensor, **more: Any) -> dict[str, np.ndarray]:
    names = ("rot_deg", "tilt_deg", "psi_deg")
    return {n: torch.rad2deg(a).numpy().astype(np.float32) for n, a in zip(names, matrix_to_euler(rotations.double()))} | more


def matrices(pose: dict[str, np.ndarray]) -> torch.Tensor:
    return euler_to_matrix(*(torch.deg2rad(torch.from_numpy(np.asarray(pose[n], float))) for n in ("rot_deg", "tilt_deg", "psi_deg")))


def run(name: str, params: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    stage = find_stage(name)
    out = stage.functions(stage.params(**params), {port: given if isinstance(given, list) else [given] for port, given in inputs.items()})
    if "particle_id" in out:
        ids, dropped = out["particle_id"], out["dropped_id"]
        assert ids.dtype == np.int64
        assert (np.diff(ids) > 0).all()
        assert out["removal_reason"].dtype == np.int8
        assert len(dropped) == len(out["removal_reason"])
        assert not np.isin(dropped, ids).any()
        assert set(out["removal_reason"].tolist()) <= set(stage.reasons)
    return out


def product(step: str, **more: Any) -> Product:
    values: dict[str, Any] = {"births": frozenset({"pick"}), "sources": frozenset({"motion"}), **more}
    return Product("particles", step, "particles", 0, **values)


def refusals(name: str, params: dict[str, Any], **inputs: Any) -> list[str]:
    stage = find_stage(name)
    given = {port: v if isinstance(v, list) else [v] for port, v in inputs.items()}
    return list(stage.check(stage.params(**params), given))
