"""Particles of a project: extracted by micrograph, shown as one table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.store.datasets import describe
from cryodask.store.generation import Generation
from cryodask.store.journal import decode_value
from cryodask.vocabulary import VARIABLES

if TYPE_CHECKING:
    import xarray as xr

    from cryodask.store.project import Project

CTF_COLUMNS = ("defocus_u_angstrom", "defocus_v_angstrom", "defocus_angle_deg", "phase_shift_deg")
OPTICS = ("voltage_kv", "spherical_aberration_mm", "amplitude_contrast")
ByRow = dict[str, dict[int, float]]


def gather_columns(images: Generation, rows: list[int], per_micrograph: ByRow) -> dict[str, np.ndarray]:
    """Columns of all particles of some micrographs, in order of row and slot.

    ``particle_row, particle_slot, particle_y, particle_x``, optics, and the CTF: the particle's own where an import gave it, else that of
    its micrograph (``per_micrograph[name][row]``).
    """
    records = images.committed()
    counts = [int(records[r]["columns"]["particle_count"]) for r in rows]
    first = records[rows[0]]["columns"] if rows else {}
    columns: dict[str, np.ndarray] = {
        "particle_row": np.repeat(np.array(rows, dtype=np.int64), counts),
        "particle_slot": np.concatenate([np.arange(c, dtype=np.int64) for c in counts] or [np.zeros(0, np.int64)]),
    }
    for name in ("particle_y", "particle_x"):
        columns[name] = np.concatenate([decode_value(records[r]["columns"][name]) for r in rows] or [np.zeros(0)]).astype(np.float64)
    for name in (*CTF_COLUMNS, *OPTICS):
        own = f"particle_{name}"
        if own in first:
            columns[name] = np.concatenate([decode_value(records[r]["columns"][own]) for r in rows]).astype(np.float64)
        elif name in first:
            columns[name] = np.repeat([float(records[r]["columns"][name]) for r in rows], counts)
        elif name in per_micrograph:
            columns[name] = np.repeat([float(per_micrograph[name][r]) for r in rows], counts)
        elif name == "phase_shift_deg":
            columns[name] = np.zeros(sum(counts))
    return columns


def align(row: np.ndarray, slot: np.ndarray, values: np.ndarray, onto_row: np.ndarray, onto_slot: np.ndarray, fill: Any) -> np.ndarray:
    """Values of particles (row, slot) in the order of other particles; ``fill`` where there is none."""
    place_of = {key: i for i, key in enumerate(zip(row.tolist(), slot.tolist()))}
    place = np.array([place_of.get(key, -1) for key in zip(onto_row.tolist(), onto_slot.tolist())], dtype=np.int64)
    out = np.full((len(place), *values.shape[1:]), fill, dtype=values.dtype)
    out[place >= 0] = values[place[place >= 0]]
    return out


def missing_value(dtype: np.dtype) -> Any:
    """What stands for no value: NaN, or -1 for integers."""
    return -1 if dtype.kind in "iu" else np.nan


def particle_dataset(project: Project, label: str | None = None) -> xr.Dataset:
    """All particles of an extraction as one Dataset with dimension ``particle``; see ``Project.particles``."""
    import dask.array as da
    import xarray as xr

    extractions = [s for s in project.stages if "particle_image" in project.generation(s).meta["gives"]]
    if label is None and not extractions:
        return xr.Dataset()
    images = project.generation(label or extractions[-1])
    per_micrograph = _by_micrograph(project)
    needed = {n for n in (*CTF_COLUMNS, *OPTICS) if n in per_micrograph and f"particle_{n}" not in images.meta["gives"]}
    names = {item.row: item.name for item in project.items()}
    rows = [r for r in sorted(images.committed()) if r in names and all(r in per_micrograph[n] for n in needed)]
    columns = gather_columns(images, rows, per_micrograph)
    data: dict[str, Any] = {}
    for name, values in columns.items():
        data[name] = ("particle", values, describe(VARIABLES[name]))
    row, slot = columns["particle_row"], columns["particle_slot"]
    for stage in project.stages:
        generation = project.generation(stage)
        record = generation.committed().get(0) if not generation.meta["per_item"] else None
        if record is None or "particle_row" not in record["shards"]:
            continue
        their_row, their_slot = generation.read(record, "particle_row"), generation.read(record, "particle_slot")
        for name in record["shards"]:
            if VARIABLES[name].per_particle and name not in ("particle_row", "particle_slot"):
                values = generation.read(record, name)
                aligned = align(their_row, their_slot, values, row, slot, missing_value(values.dtype))
                data[name] = ("particle", aligned, describe(VARIABLES[name]))
    dataset = xr.Dataset(data)
    stored = images.dataset()
    if rows and "particle_image" in stored:
        place = {int(r): i for i, r in enumerate(stored["row"].values)}
        stacks = stored["particle_image"].data
        counts = np.bincount(row, minlength=max(rows) + 1)
        pictures = da.concatenate([stacks[place[r], : counts[r]] for r in rows])
        dataset["particle_image"] = (("particle", "y", "x"), pictures, describe(VARIABLES["particle_image"]))
    dataset["micrograph"] = ("particle", np.array([names[int(r)] for r in row], dtype=object))
    if rows:
        dataset.attrs["particle_pixel_size_angstrom"] = float(images.committed()[rows[0]]["columns"]["particle_pixel_size_angstrom"])
    return dataset


def _by_micrograph(project: Project) -> ByRow:
    """CTF and optics by micrograph row: of the latest stage that gives them, else of the inputs."""
    items = project.items()
    out: ByRow = {}
    for name in (*CTF_COLUMNS, *OPTICS):
        given = [s for s in project.stages if name in project.generation(s).meta["gives"] and project.generation(s).meta["per_item"]]
        constant = project.state["constants"].get(name)
        if given:
            records = project.generation(given[-1]).committed()
            out[name] = {r: float(rec["columns"][name]) for r, rec in records.items()}
        elif constant is not None or any(name in i.inputs for i in items):
            out[name] = {i.row: float(v) for i in items if (v := i.inputs.get(name, constant)) is not None}
    return out
