"""xarray Datasets of the store: committed items only, with units and long names on every variable."""

from __future__ import annotations

import json
import uuid
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from cryodask.store.births import accepted
from cryodask.store.journal import decode_value
from cryodask.store.lines import Record
from cryodask.store.shards import Layout
from cryodask.store.table import Table
from cryodask.vocabulary import VARIABLES, Var

if TYPE_CHECKING:
    import pandas as pd

    from cryodask.store.generation import Generation
    from cryodask.store.project import Project


def generation_dataset(generation: Generation, table: Table) -> xr.Dataset:
    """Dataset of a per-exposure generation by micrograph, for the items in ``table``; images only if all have the same size and type."""
    variables: dict[str, Any] = {}
    small = [v for v in generation.gives if v.kind != "bulk" and v.name in {*table.columns, *table.texts}]
    values = {var.name: table[var.name] for var in small}
    longest = max((values[v.name].shape[1] for v in small if v.ragged), default=0)
    for var in small:
        padded = _padded(values[var.name], longest) if var.ragged else values[var.name]
        variables[var.name] = (("micrograph", *var.dims_in(per_item=True)), padded, describe(var))
    attributes = _attrs(generation)
    sizes = set(table.layouts.tolist())
    if len(sizes) > 1:
        attributes["images"] = f"{len(sizes)} sizes or types: project.by_image_size(step) gives one Dataset for each"
    layouts = json.loads(next(iter(sizes), "") or "{}")
    for var in generation.gives if len(sizes) <= 1 else ():
        # a movie that is read in place has no shard
        if var.kind == "bulk" and table.stored[var.name].all():
            stored = _stored_items(generation, var, table.row, longest, generation.layout(var, {"layouts": layouts}))
            variables[var.name] = (("micrograph", *_dims_beside(var, stored.shape[1:], variables)), stored, describe(var))
    coords = {"micrograph": table.name, "row": ("micrograph", table.row)}
    return xr.Dataset(variables, coords, attributes)


def _dims_beside(var: Var, shape: tuple[int, ...], others: dict[str, Any]) -> tuple[str, ...]:
    """Dimensions of a variable; an import has both boxes and micrographs, each with its own rows and columns."""
    lengths = {d: n for dims, values, _ in others.values() for d, n in zip(dims, np.shape(values))}
    return tuple(f"box_{d}" if d in ("y", "x") and lengths.get(d, n) != n else d for d, n in zip(var.dims_in(per_item=True), shape))


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    """Pad ragged columns to a common length with NaN, or -1 for integers."""
    missing = length - values.shape[1]
    if not missing:
        return values
    fill = np.nan if values.dtype.kind == "f" else -1
    return np.pad(values, [(0, 0), (0, missing), *[(0, 0)] * (values.ndim - 2)], constant_values=fill)


def with_acceptance(dataset: xr.Dataset, threshold: float | str | None) -> xr.Dataset:
    """Add ``pick_accepted`` and ``pick_count`` to a birth, according to the threshold of its step."""
    if "pick_score" not in dataset:
        return dataset
    limit = dataset["pick_threshold"].values[:, np.newaxis] if threshold == "auto" and "pick_threshold" in dataset else threshold
    mask = accepted(dataset["pick_score"].values, None if isinstance(limit, str) else limit)
    settled = {"pick_accepted": (("micrograph", "slot"), mask.astype(np.int8)), "pick_count": ("micrograph", mask.sum(1))}
    return dataset.assign({name: (*value, describe(VARIABLES[name])) for name, value in settled.items()})


def result_dataset(generation: Generation, record: Record | None) -> xr.Dataset:
    """Dataset of the single result of a blocks, tournament or whole generation."""
    attrs = _attrs(generation)
    if record is None:
        return xr.Dataset(attrs={**attrs, "status": "not finished"})
    variables: dict[str, Any] = {}
    for name, value in record["columns"].items():
        var = VARIABLES[name]
        variables[name] = (var.dims_in(per_item=False), decode_value(value), describe(var))
    dataset = xr.Dataset(variables)
    if record["shards"]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Object at .* is not recognized")  # the journal is inside the group
            stored = xr.open_zarr(generation.path.absolute(), consolidated=False, chunks={}, mask_and_scale=False)
        missing = [name for name in record["shards"] if not generation.shard_of(record, name).exists()]
        # zarr reads a missing shard as zeros
        stored = stored.assign({n: stored[n].copy(data=_unreadable(generation, record, stored[n])) for n in missing})
        dataset = dataset.merge(stored[list(record["shards"])])
    return dataset.assign_attrs(attrs)


class _Missing:
    """An array whose shard is missing: whoever reads it gets the error that says why."""

    def __init__(self, generation: Generation, record: Record, like: xr.DataArray) -> None:
        self.generation, self.record, self.name = generation, record, str(like.name)
        self.shape, self.dtype, self.ndim = like.shape, like.dtype, like.ndim

    def __getitem__(self, window: tuple[slice, ...]) -> np.ndarray:
        out: np.ndarray = self.generation.read(self.record, self.name)[window]
        return out


def _unreadable(generation: Generation, record: Record, like: xr.DataArray) -> Any:
    import dask.array as da

    missing = _Missing(generation, record, like)
    # without meta dask would read it at once
    meta = np.empty((0,) * like.ndim, like.dtype)
    return da.from_array(missing, chunks=-1, name=f"{like.name}-{uuid.uuid4().hex}", asarray=False, fancy=False, meta=meta)


def _attrs(generation: Generation) -> dict[str, str]:
    return {k: str(generation.meta[k]) for k in ("stage", "version", "params") if k in generation.meta}


class StoredItems:
    """Shards of some items as one array `(item, ...)`, for dask. Each item is read from one open file, so it never mixes two versions."""

    def __init__(self, generation: Generation, var: Var, rows: np.ndarray, longest: int, layout: Layout) -> None:
        self.generation, self.name, self.rows, self.layout = generation, var.name, rows, layout
        self.shape = (len(rows), longest if var.ragged else layout.shape[0], *layout.shape[1:])
        self.dtype = np.dtype(layout.dtype)
        self.ndim = len(self.shape)

    def __getitem__(self, window: tuple[slice, ...]) -> np.ndarray:
        readers = [self.generation.shard(int(row), self.name, self.shape[1], self.layout) for row in self.rows[window[0]]]
        return np.stack([reader.window(window[1:]) for reader in readers])


def _stored_items(generation: Generation, var: Var, rows: np.ndarray, longest: int, layout: Layout) -> Any:
    import dask.array as da

    items = StoredItems(generation, var, rows, longest, layout)
    # the name is new each time, because an item may be recommitted.
    # A task reads a whole image, but only a frame of a movie; tiles would make a graph of millions
    chunks = (1, *(1 if d == "frame" else max(n, 1) for d, n in zip(var.dims, items.shape[1:])))
    return da.from_array(items, chunks=chunks, name=f"{var.name}-{uuid.uuid4().hex}", asarray=False, fancy=False)


def describe(var: Var) -> dict[str, str]:
    """Attributes of a variable."""
    return {"units": var.units, "long_name": var.doc}


# --- the whole project -------------------------------------------------------------------------------------------------------
def registry_dataset(project: Project) -> xr.Dataset:
    """The registry, the optics and the gain by micrograph."""
    items = project.items()
    names = {n for item in items for n in item.inputs} | {n for values in project.state.constants.values() for n in values}
    data: dict[str, Any] = {}
    for name in sorted(names & set(VARIABLES)):
        var = VARIABLES[name]
        if not var.dims:
            text = var.dtype == "U"
            values = [project.value_of(item, name) for item in items]
            filled = ["" if text else np.nan] * len(items)
            filled = [f if v is None else v for f, v in zip(filled, values)]
            data[name] = ("micrograph", np.array(filled, dtype=object if text else var.dtype), describe(var))
    gains = set(project.state.gain.values())
    if len(gains) == 1:
        data["gain"] = (VARIABLES["gain"].dims, np.load(project.path / gains.pop()), describe(VARIABLES["gain"]))
    coords = {"micrograph": np.array([i.name for i in items], dtype=object), "row": ("micrograph", [i.row for i in items])}
    return xr.Dataset(data, coords)


def joined_dataset(project: Project) -> xr.Dataset:
    """All per-exposure steps by micrograph; see ``Project.joined``."""
    labels = [label for label in project.stages if project.generation(label).meta["per_item"]]
    registry = registry_dataset(project)
    tables = {label: project.table(label, ()).row for label in labels}
    some = np.unique(np.concatenate([*tables.values(), np.zeros(0, np.int64)]))
    registry = registry.isel(micrograph=np.flatnonzero(np.isin(registry["row"].values, some)))
    parts = [registry]
    for label in labels:
        if not len(tables[label]):
            continue
        dataset = project[label]
        if "particle_image" in dataset and "y" in dataset["particle_image"].dims:
            dataset = dataset.rename({"y": "box_y", "x": "box_x"})
        dataset = dataset.drop_vars([v for p in parts for v in p.data_vars if v in dataset.data_vars])
        parts.append(_spread(dataset.rename({dim: f"{label}_{dim}" for dim in _other_dims(dataset, parts)}), registry))
    return xr.merge(parts, join="exact", compat="override", combine_attrs="drop")


def _other_dims(dataset: xr.Dataset, parts: list[xr.Dataset]) -> list[str]:
    """Dimensions of a step that are not those of the same name in earlier ones: slots, and those of another length or index."""

    def differs(part: xr.Dataset, dim: str) -> bool:
        other = dim in dataset.indexes and dim in part.indexes and not dataset.indexes[dim].equals(part.indexes[dim])
        return dim == "slot" or part.sizes[dim] != dataset.sizes[dim] or other

    dims = [str(dim) for dim in dataset.dims if dim != "micrograph"]
    return [dim for dim in dims if any(dim in part.dims and differs(part, dim) for part in parts)]


def _spread(dataset: xr.Dataset, registry: xr.Dataset) -> xr.Dataset:
    """A step's Dataset extended to all micrographs: NaN, -1 or an empty string for those it has not processed."""
    if np.array_equal(dataset["micrograph"].values, registry["micrograph"].values):
        return dataset
    kinds = {str(n): v.dtype.kind for n, v in dataset.variables.items()}
    fills = {n: "" if k == "O" else np.nan if k == "f" else -1 for n, k in kinds.items() if n not in ("micrograph", "row")}
    fills |= {n: {"u": 0, "b": False, "c": np.nan}[k] for n, k in kinds.items() if k in "ubc"}
    out = dataset.drop_vars("row").reindex(micrograph=registry["micrograph"], fill_value=fills)
    return out.assign_coords(row=("micrograph", registry["row"].values))


def scalar_table(project: Project) -> pd.DataFrame:
    """One row per exposure with every number of every per-exposure step; a name given by two steps becomes ``STEP.NAME``."""
    import pandas as pd

    registry = registry_dataset(project)
    columns = {n: v.values for n, v in registry.data_vars.items() if v.dims == ("micrograph",)}
    out = pd.DataFrame({"row": registry["row"].values, **columns}, index=pd.Index(registry["micrograph"].values, name="micrograph"))
    for label in project.stages:
        generation = project.generation(label)
        if not generation.meta["per_item"]:
            continue
        names = [v.name for v in generation.gives if v.kind != "bulk" and not v.dims]
        table = project.table(label, names)
        for name in names:
            out[name if name not in out else f"{label}.{name}"] = pd.Series(table[name], index=table.name)
    return out
