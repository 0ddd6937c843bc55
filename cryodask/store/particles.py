"""Particles of a project: extracted by micrograph, shown as one table."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.store.datasets import describe
from cryodask.store.generation import Generation
from cryodask.store.table import Table
from cryodask.vocabulary import SLOTS, VARIABLES

if TYPE_CHECKING:
    import xarray as xr

    from cryodask.store.project import Project

CTF_COLUMNS = ("defocus_u_angstrom", "defocus_v_angstrom", "defocus_angle_deg", "phase_shift_deg")
OPTICS = ("voltage_kv", "spherical_aberration_mm", "amplitude_contrast")
_NEEDED = (
    *("particle_count", "particle_y", "particle_x", "particle_pixel_size_angstrom"),
    *(name for n in (*CTF_COLUMNS, *OPTICS) for name in (n, f"particle_{n}")),
)
ByRow = dict[str, dict[int, float]]


def gather_columns(images: Generation, rows: list[int], per_micrograph: ByRow) -> dict[str, np.ndarray]:
    """Columns of all particles of some micrographs, in order of row and slot.

    ``particle_row, particle_slot, particle_y, particle_x``, optics, and the CTF: the particle's own where an import gave it, else that of
    its micrograph (``per_micrograph[name][row]``).
    """
    table = images.table(_NEEDED)
    return _columns(table.take(np.searchsorted(table.row, np.array(rows, dtype=np.int64))), per_micrograph)


def _columns(table: Table, per_micrograph: ByRow) -> dict[str, np.ndarray]:
    rows = table.row.tolist()
    counts = table["particle_count"]
    columns: dict[str, np.ndarray] = {
        "particle_row": np.repeat(table.row, counts),
        "particle_slot": _slots(counts),
        "particle_y": table.columns["particle_y"].flat.astype(np.float64),
        "particle_x": table.columns["particle_x"].flat.astype(np.float64),
    }
    for name in (*CTF_COLUMNS, *OPTICS):
        own = f"particle_{name}"
        if own in table.columns:
            columns[name] = table.columns[own].flat.astype(np.float64)
        elif name in table.columns:
            columns[name] = np.repeat(table[name].astype(np.float64), counts)
        elif name in per_micrograph:
            columns[name] = np.repeat([float(per_micrograph[name][r]) for r in rows], counts)
        elif name == "phase_shift_deg":
            columns[name] = np.zeros(int(counts.sum()))
    return columns


def _slots(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... within every micrograph."""
    starts = np.cumsum(counts) - counts
    return np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(starts, counts)


class ParticleImages:
    """Images of all particles of some micrographs as one array `(particle, y, x)`, for dask."""

    def __init__(self, images: Generation, rows: np.ndarray, counts: np.ndarray) -> None:
        self.images, self.rows, self.counts = images, rows, counts
        layout = images.layout(VARIABLES["particle_image"])
        self.ends = np.cumsum(counts)
        self.shape, self.dtype, self.ndim = (int(counts.sum()), *layout.shape[1:]), np.dtype(layout.dtype), 3

    def __getitem__(self, window: tuple[slice, slice, slice]) -> np.ndarray:
        first, last, _ = window[0].indices(self.shape[0])
        parts = [np.zeros((0, *self.shape[1:]), self.dtype)[(slice(None), *window[1:])]]
        i = int(np.searchsorted(self.ends, first, side="right"))
        while first < last:
            start, end = int(self.ends[i] - self.counts[i]), min(last, int(self.ends[i]))
            reader = self.images.shard(int(self.rows[i]), "particle_image")
            parts.append(reader.window((slice(first - start, end - start), *window[1:])))
            first, i = end, i + 1
        return np.concatenate(parts)

    def lazy(self) -> Any:
        """As a dask array, a chunk a micrograph."""
        import dask.array as da

        chunks = (tuple(self.counts[self.counts > 0].tolist()) or (0,), self.shape[1], self.shape[2])
        return da.from_array(self, chunks=chunks, name=f"particle_image-{uuid.uuid4().hex}", asarray=False, fancy=False)


def align(row: np.ndarray, slot: np.ndarray, values: np.ndarray, onto_row: np.ndarray, onto_slot: np.ndarray, fill: Any) -> np.ndarray:
    """Values of particles (row, slot) in the order of other particles; ``fill`` where there is none."""
    keys, wanted = (r.astype(np.int64) * SLOTS + s.astype(np.int64) for r, s in ((row, slot), (onto_row, onto_slot)))
    order = np.argsort(keys, kind="stable")
    if len(order):
        place = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(order) - 1)]
        place = np.where(keys[place] == wanted, place, -1)
    else:
        place = np.full(len(wanted), -1)
    out = np.full((len(place), *values.shape[1:]), fill, dtype=values.dtype)
    out[place >= 0] = values[place[place >= 0]]
    return out


def missing_value(dtype: np.dtype) -> Any:
    """What stands for no value: NaN, or -1 for integers."""
    return -1 if dtype.kind in "iu" else np.nan


def particle_dataset(project: Project, label: str | None = None) -> xr.Dataset:
    """All particles of an extraction as one Dataset with dimension ``particle``; see ``Project.particles``."""
    import xarray as xr

    extractions = [s for s in project.stages if "particle_image" in project.generation(s).meta["gives"]]
    if label is None and not extractions:
        return xr.Dataset()
    images = project.generation(label or extractions[-1])
    per_micrograph = _by_micrograph(project)
    needed = {n for n in (*CTF_COLUMNS, *OPTICS) if n in per_micrograph and f"particle_{n}" not in images.meta["gives"]}
    shown = project.table(images.meta["label"], _NEEDED)
    shown = shown.take(
        np.array([i for i, r in enumerate(shown.row.tolist()) if all(r in per_micrograph[n] for n in needed)], dtype=np.int64)
    )
    columns = _columns(shown, per_micrograph)
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
    if len(shown):
        pictures = ParticleImages(images, shown.row, shown["particle_count"]).lazy()
        dataset["particle_image"] = (("particle", "y", "x"), pictures, describe(VARIABLES["particle_image"]))
        dataset.attrs["particle_pixel_size_angstrom"] = float(shown["particle_pixel_size_angstrom"][0])
    dataset["micrograph"] = ("particle", np.repeat(shown.name, shown["particle_count"]))
    return dataset


def _by_micrograph(project: Project) -> ByRow:
    """CTF and optics by micrograph row: of the latest stage that gives them, else of the inputs."""
    items = project.items()
    out: ByRow = {}
    for name in (*CTF_COLUMNS, *OPTICS):
        given = [s for s in project.stages if name in project.generation(s).meta["gives"] and project.generation(s).meta["per_item"]]
        constant = project.state["constants"].get(name)
        if given:
            table = project.table(given[-1], [name])
            out[name] = dict(zip(table.row.tolist(), table[name].tolist()))
        elif constant is not None or any(name in i.inputs for i in items):
            out[name] = {i.row: float(v) for i in items if (v := i.inputs.get(name, constant)) is not None}
    return out
