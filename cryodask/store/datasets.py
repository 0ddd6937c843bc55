"""The xarray face of the store: committed items only, units and long names on every variable."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from cryodask.store.journal import decode_value
from cryodask.vocabulary import VARIABLES, Var

if TYPE_CHECKING:
    from cryodask.store.generation import Generation


def generation_dataset(generation: Generation) -> xr.Dataset:
    """Dataset of one generation: with dimension ``micrograph`` for map stages, without for the others."""
    records = generation.committed()
    attrs: dict[str, str] = {k: str(generation.meta[k]) for k in ("label", "stage", "version", "params") if k in generation.meta}
    if not generation.meta["per_item"]:
        return _result_dataset(generation, records.get(0), attrs)
    rows = sorted(records)
    variables: dict[str, Any] = {}
    # a movie that is used where it lies has no shard
    bulk = [v for v in generation.gives if v.kind == "bulk" and all(v.name in records[r]["shards"] for r in rows)]
    lengths = _ragged_lengths(generation, records, rows)
    for var in generation.gives:
        if var.kind != "bulk":
            values = [decode_value(records[r]["columns"][var.name]) for r in rows]
            variables[var.name] = (("micrograph", *var.dims), stack_columns(var, values), describe(var))
    dataset = xr.Dataset(variables)
    if bulk:
        stored = _open_zarr(generation, None)
        chunks = {d: c for v in bulk for d, c in zip(v.dims, _dask_chunks(v))}
        # rows are chosen before the chunks are made: the arrays have room for a million micrographs
        stored = stored[[v.name for v in bulk]].isel(micrograph=rows)
        if "slot" in stored.dims:
            stored = stored.isel(slot=slice(0, max(lengths, default=0)))
        stored = stored.chunk({"micrograph": 1, **chunks})
        dataset = dataset.merge(stored)
    names = [records[r]["name"] for r in rows]
    coords = {
        "micrograph": np.array(names, dtype=object),
        "row": ("micrograph", np.array(rows, dtype=np.int64)),
    }
    return dataset.assign_coords(coords).assign_attrs(attrs)


def _result_dataset(generation: Generation, record: dict[str, Any] | None, attrs: dict[str, str]) -> xr.Dataset:
    if record is None:
        return xr.Dataset(attrs={**attrs, "status": "not finished"})
    variables: dict[str, Any] = {}
    for name, value in record["columns"].items():
        var = VARIABLES[name]
        variables[name] = (var.dims, decode_value(value), describe(var))
    dataset = xr.Dataset(variables)
    if record["shards"]:
        stored = _open_zarr(generation, {})
        dataset = dataset.merge(stored[list(record["shards"])])
    return dataset.assign_attrs(attrs)


def _open_zarr(generation: Generation, chunks: dict[str, int] | None) -> xr.Dataset:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Object at .* is not recognized")  # the journal lies within the group
        return xr.open_zarr(generation.path, consolidated=False, chunks=chunks, mask_and_scale=False)


def _ragged_lengths(generation: Generation, records: dict[int, dict[str, Any]], rows: list[int]) -> list[int]:
    ragged = next((v.name for v in generation.gives if v.kind != "bulk" and v.ragged), None)
    return [records[r]["columns"][ragged]["shape"][0] for r in rows] if ragged else []


def _dask_chunks(var: Var) -> tuple[int, ...]:
    chunk = var.chunk or (0,) * len(var.dims)
    return tuple(-1 if c == 0 or d == "slot" else c for c, d in zip(chunk, var.dims))


def stack_columns(var: Var, values: list[Any]) -> np.ndarray:
    """Columns of many items as one array; those of different lengths are filled with NaN (numbers) or -1 (integers)."""
    if var.dtype == "U":
        return np.array(values, dtype=object)
    arrays = [np.asarray(v, dtype=var.dtype) for v in values]
    if not arrays:
        return np.zeros((0, *(0 for _ in var.dims)), var.dtype)
    shape = tuple(np.max([a.shape for a in arrays], axis=0).astype(int)) if var.dims else ()
    if all(a.shape == shape for a in arrays):
        return np.stack(arrays)
    fill = np.nan if np.dtype(var.dtype).kind == "f" else -1
    out = np.full((len(arrays), *shape), fill, var.dtype)
    for target, a in zip(out, arrays):
        target[tuple(slice(0, n) for n in a.shape)] = a
    return out


def describe(var: Var) -> dict[str, str]:
    """Attributes of a variable."""
    return {"units": var.units, "long_name": var.doc}
