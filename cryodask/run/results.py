"""Results of steps over sets in stored form: ids, particles left out and why, positions instead of origins."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from cryodask.errors import InputError
from cryodask.products import ORIGINS, columns_of
from cryodask.run.inputs import EXPOSURE_LACKS, StepInputs, set_views
from cryodask.run.recipe import Plan, Step
from cryodask.run.refs import united_parts
from cryodask.run.unions import check_images, united_images
from cryodask.stage import SetView
from cryodask.store.files import disk_errors, write_atomically
from cryodask.store.generation import Generation
from cryodask.store.history import generation_folders
from cryodask.store.project import Project
from cryodask.vocabulary import CTF_COLUMNS, VARIABLES

_IDS = "ids.npy"


def settle_result(project: Project, step: Step, inputs: StepInputs, result: dict[str, Any]) -> dict[str, Any]:
    """Convert the result of a step over a set of particles into its stored form.

    ``particle_id`` identifies the particles. A stage that selects gives ``particle_kept`` and ``removal_reason`` for all of its
    particles: those it keeps are stored as the set, the others with their reasons.
    """
    if inputs.ids is None or step.stage.shape == "set" or not any(kind == "particles" for _, kind in step.outputs):
        return result
    out = {name: value for name, value in result.items() if name not in ("particle_kept", "removal_reason")}
    kept = np.asarray(result.get("particle_kept", np.ones(len(inputs.ids), bool)), bool)
    reason = np.asarray(result.get("removal_reason", np.zeros(len(inputs.ids), np.int8)))
    out["particle_id"] = inputs.ids[kept]
    out["dropped_id"] = np.concatenate([inputs.ids[~kept], inputs.left_out])
    out["removal_reason"] = np.concatenate([reason[~kept], np.full(len(inputs.left_out), EXPOSURE_LACKS)]).astype(np.int8)
    return _placed(project, inputs, out)


def _placed(project: Project, inputs: StepInputs, result: dict[str, Any]) -> dict[str, Any]:
    """Convert origins relative to the boxes into positions in the exposures, which stay valid after re-extraction."""
    found = [name for name in ORIGINS if name in result]
    if not found or inputs.ref is None or inputs.ids is None:
        return result
    boxes = project.sets.columns(inputs.ref, inputs.ids, ["image"])
    out = {name: value for name, value in result.items() if name not in found}
    for name in found:
        box = boxes.get(f"box_{name[-10]}_angstrom", np.zeros(len(inputs.ids)))
        out[ORIGINS[name]] = box - np.asarray(result[name], np.float64)
    return out


def stored_variables(step: Step) -> tuple[str, ...]:
    """Variables that a generation of a step over sets stores."""
    gives = step.stage.gives
    if not any(kind == "particles" for _, kind in step.outputs):
        return gives
    united = united_parts(step)
    own = [n for part in united for n in columns_of("particles", part) if VARIABLES[n].ragged or n in _OF_IMAGES]
    return tuple(dict.fromkeys((*gives, "particle_id", "dropped_id", "removal_reason", *own)))


# --- steps that work on sets alone -------------------------------------------------------------------------------------------
_OF_IMAGES = ("particle_pixel_size_angstrom",)
_AS_STORED = {"half_set": "half_set", **{name: f"particle_{name}" for name in CTF_COLUMNS}}


def run_set(plan: Plan, project: Project, inputs: StepInputs, generation: Generation) -> dict[str, Any]:
    """Call a ``set`` stage in this process; returns the stored form of its result."""
    step = inputs.step
    views = set_views(plan, project, inputs)
    result = dict(step.stage.functions(step.params, views))
    check_images(project, inputs)
    if "particle_id" not in result:
        return result
    ids = np.asarray(result["particle_id"], np.int64)
    if not len(ids):
        raise InputError(
            f"Step {step.label} left no particles.", "its limits are too strict, or its sources have none in common", "check its parameters"
        )
    result["dropped_id"] = np.concatenate([np.asarray(result.get("dropped_id", ()), np.int64), inputs.left_out])
    reasons = np.asarray(result.get("removal_reason", ()), np.int8)
    result["removal_reason"] = np.concatenate([reasons, np.full(len(inputs.left_out), EXPOSURE_LACKS, np.int8)])
    united = united_parts(step)
    if united:
        from cryodask.stages.merge import merged_columns

        sets = [view for view in views["particles"] if isinstance(view, SetView)]
        columns = merged_columns(sets, ids, [p for p in united if p != "image"], getattr(step.params, "prefer", None))
        known = {_AS_STORED.get(n, n): v for n, v in columns.items()}
        result |= {n: v for n, v in known.items() if n in stored_variables(step)}
        if "image" in united:
            result |= united_images(project, inputs, ids)
    return result


# --- sets that grow while a step works on them -------------------------------------------------------------------------------
def freeze(generation: Generation, ids: np.ndarray) -> None:
    """Record the particles that a step was started with, so that it resumes with them even if the set grows."""
    path = generation.path / _IDS
    if path.exists():
        return
    buffer = io.BytesIO()
    np.save(buffer, ids)
    with disk_errors(generation.path):
        write_atomically(path, buffer.getvalue())


def started_with(generation: Generation) -> int | None:
    """Number of particles that a step was started with; None if it takes none."""
    path = generation.path / _IDS
    return len(np.load(path, mmap_mode="r")) if path.is_file() else None


def frozen_ids(project: Project, step: Step, recipe: str, key: str) -> tuple[str, np.ndarray] | None:
    """Key and particles of an unfinished generation of the same recipe with finished iterations; None if there is none."""
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


def scalars(metrics: dict[str, Any]) -> dict[str, float | int | str]:
    """The plain numbers and strings among the metrics of an iteration."""
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in metrics.items()}
    return {name: value for name, value in plain.items() if isinstance(value, int | float | str)}


def sentence_of(step: Step, result: dict[str, Any]) -> str:
    """A few words about the result of a finished step: the stage's own, or how many particles it kept."""
    if step.stage.says is not None:
        return step.stage.says(result)
    if len(result.get("dropped_id", ())):
        kept = len(result["particle_id"])
        return f"{kept} of {kept + len(result['dropped_id'])} particles kept"
    return "done"
