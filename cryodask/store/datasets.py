"""The xarray face of the store: committed items only, units and long names on every variable."""

from __future__ import annotations

import uuid
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from cryodask.store.journal import decode_value
from cryodask.store.lines import Record
from cryodask.store.table import Table
from cryodask.vocabulary import VARIABLES, Var

if TYPE_CHECKING:
    from cryodask.store.generation import Generation


def generation_dataset(generation: Generation, table: Table) -> xr.Dataset:
    """Dataset of a map generation, by micrograph, of the items in ``table``."""
    variables: dict[str, Any] = {}
    longest = 0
    for var in generation.gives:
        if var.kind == "bulk":
            continue
        values = table[var.name]
        variables[var.name] = (("micrograph", *var.dims), values, describe(var))
        if var.ragged:
            longest = values.shape[1]
    for var in generation.gives:
        # a movie that is used where it lies has no shard
        if var.kind == "bulk" and table.stored[var.name].all():
            variables[var.name] = (("micrograph", *var.dims), _stored_items(generation, var, table.row, longest), describe(var))
    coords = {"micrograph": table.name, "row": ("micrograph", table.row)}
    return xr.Dataset(variables, coords, _attrs(generation))


def result_dataset(generation: Generation, record: Record | None) -> xr.Dataset:
    """Dataset of a blocks, tournament or whole generation: of its one result."""
    attrs = _attrs(generation)
    if record is None:
        return xr.Dataset(attrs={**attrs, "status": "not finished"})
    variables: dict[str, Any] = {}
    for name, value in record["columns"].items():
        var = VARIABLES[name]
        variables[name] = (var.dims, decode_value(value), describe(var))
    dataset = xr.Dataset(variables)
    if record["shards"]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Object at .* is not recognized")  # the journal lies within the group
            stored = xr.open_zarr(generation.path, consolidated=False, chunks={}, mask_and_scale=False)
        dataset = dataset.merge(stored[list(record["shards"])])
    return dataset.assign_attrs(attrs)


def _attrs(generation: Generation) -> dict[str, str]:
    return {k: str(generation.meta[k]) for k in ("label", "stage", "version", "params") if k in generation.meta}


class StoredItems:
    """Shards of some items as one array `(item, ...)`, for dask: every item is read from one open file, so it is never half of two."""

    def __init__(self, generation: Generation, var: Var, rows: np.ndarray, longest: int) -> None:
        self.generation, self.name, self.rows = generation, var.name, rows
        layout = generation.layout(var)
        self.shape = (len(rows), longest if var.ragged else layout.shape[0], *layout.shape[1:])
        self.dtype = np.dtype(layout.dtype)
        self.ndim = len(self.shape)

    def __getitem__(self, window: tuple[slice, ...]) -> np.ndarray:
        readers = [self.generation.shard(int(row), self.name, self.shape[1]) for row in self.rows[window[0]]]
        return np.stack([reader.window(window[1:]) for reader in readers])


def _stored_items(generation: Generation, var: Var, rows: np.ndarray, longest: int) -> Any:
    import dask.array as da

    items = StoredItems(generation, var, rows, longest)
    # the name is new each time, for an item may be committed anew.
    # A task reads a whole image, but only a frame of a movie; tiles would make a graph of millions
    chunks = (1, *(1 if d == "frame" else max(n, 1) for d, n in zip(var.dims, items.shape[1:])))
    return da.from_array(items, chunks=chunks, name=f"{var.name}-{uuid.uuid4().hex}", asarray=False, fancy=False)


def describe(var: Var) -> dict[str, str]:
    """Attributes of a variable."""
    return {"units": var.units, "long_name": var.doc}
