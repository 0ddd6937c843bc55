"""Results of steps over sets as they are stored: whose they are, who was left out and why, and places instead of origins."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from cryodask.products import ORIGINS
from cryodask.run.inputs import EXPOSURE_LACKS, StepInputs
from cryodask.run.recipe import Step
from cryodask.store.files import disk_errors, write_atomically
from cryodask.store.generation import Generation
from cryodask.store.history import generation_folders
from cryodask.store.project import Project

_IDS = "ids.npy"


def settle_result(project: Project, step: Step, inputs: StepInputs, result: dict[str, Any]) -> dict[str, Any]:
    """What is stored of the result of a step over a set of particles.

    ``particle_id`` says whose values they are. A stage that selects gives ``particle_kept`` and ``removal_reason`` for all of its
    particles: those that it keeps are stored as the set, the others with their reasons.
    """
    if inputs.ids is None or not any(kind == "particles" for _, kind in step.outputs):
        return result
    out = {name: value for name, value in result.items() if name not in ("particle_kept", "removal_reason")}
    kept = np.asarray(result.get("particle_kept", np.ones(len(inputs.ids), bool)), bool)
    reason = np.asarray(result.get("removal_reason", np.zeros(len(inputs.ids), np.int8)))
    out["particle_id"] = inputs.ids[kept]
    out["dropped_id"] = np.concatenate([inputs.ids[~kept], inputs.left_out])
    out["removal_reason"] = np.concatenate([reason[~kept], np.full(len(inputs.left_out), EXPOSURE_LACKS)]).astype(np.int8)
    return _placed(project, inputs, out)


def _placed(project: Project, inputs: StepInputs, result: dict[str, Any]) -> dict[str, Any]:
    """Origins against the boxes become places in the exposures: they stay right whatever is cut later."""
    found = [name for name in ORIGINS if name in result]
    if not found or inputs.ref is None or inputs.ids is None:
        return result
    boxes = project.sets.columns(inputs.ref, inputs.ids, ["image"])
    out = {name: value for name, value in result.items() if name not in found}
    for name in found:
        box = boxes.get(f"box_{name[-10]}_angstrom", np.zeros(len(inputs.ids)))
        out[ORIGINS[name]] = box - np.asarray(result[name], np.float64)
    return out


# --- sets that grow while a step works on them -------------------------------------------------------------------------------
def freeze(generation: Generation, ids: np.ndarray) -> None:
    """Note with which particles a step was started, so that it goes on with them whatever comes meanwhile."""
    path = generation.path / _IDS
    if path.exists():
        return
    buffer = io.BytesIO()
    np.save(buffer, ids)
    with disk_errors(generation.path):
        write_atomically(path, buffer.getvalue())


def frozen_ids(project: Project, step: Step, recipe: str, key: str) -> tuple[str, np.ndarray] | None:
    """Key and particles of an unfinished generation of the same recipe, of whose iterations some are done; None if there is none."""
    found = []
    for folder in generation_folders(project.path):
        if folder.parent.name != step.stage.name or folder.name == key or not (folder / _IDS).is_file():
            continue
        generation = project.generation_at(f"{folder.parent.name}/{folder.name}")
        if generation.meta.get("recipe") == recipe and not generation.committed() and any(folder.glob("checkpoints/iteration-*.npz")):
            found.append((generation.meta["created"], folder))
    if not found:
        return None
    folder = max(found)[1]
    return folder.name, np.load(folder / _IDS)
