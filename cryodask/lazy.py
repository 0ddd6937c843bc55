"""Per-exposure stages as lazy functions on xarray Datasets, bit-identical to the results of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.errors import MicrographError
from cryodask.vocabulary import SLOTS, VARIABLES, Var

if TYPE_CHECKING:
    import xarray as xr

_RAGGED = ("slot", "left_out", "defect")
"""Dimensions whose length differs from micrograph to micrograph."""


def apply_lazily(made: Any, dataset: xr.Dataset, params: Any) -> xr.Dataset:
    """Apply a per-exposure stage to each micrograph of a Dataset; returns a lazy Dataset of its outputs.

    The particles of an exposure come from ``particle_id, position_y_angstrom, position_x_angstrom`` of the Dataset, or from its picks.
    """
    import xarray as xr

    if made.shape != "map":
        raise TypeError(f"{made.name} is a {made.shape} stage and cannot be applied to a Dataset; run it with cryodask.run_project()")
    if "particle_image" in made.needs:
        raise TypeError(
            f"{made.name} takes the particles of an exposure with their images, not a Dataset; run it with cryodask.run_project()"
        )
    if "position_y_angstrom" in made.needs and "position_y_angstrom" not in dataset and "pick_y" in dataset:
        dataset = _with_positions(dataset)
    names = [n for n in (*made.needs, *made.optional) if n in dataset]
    missing = [n for n in made.needs if n not in dataset]
    if missing:
        raise KeyError(
            f"{made.name} needs {', '.join(missing)}, which the Dataset lacks; project.joined() has the outputs of all earlier stages"
        )
    own = {d: n for name in names for d, n in zip(VARIABLES[name].dims, dataset[name].shape[-len(VARIABLES[name].dims) :])}
    sizes = {**own, **made.sizes(params, own)}
    outs = made.gives_variables()
    # one item shows what the definition leaves open: lengths, and the dtype of variables stored with the dtype of the input
    dtypes = {v.name: "O" if v.dtype == "U" else v.dtype for v in outs}  # numpy would cut texts to one character
    if "input" in dtypes.values() or any(d not in sizes for v in outs for d in v.dims):
        first = dataset[names].isel(micrograph=0) if "micrograph" in dataset.dims else dataset[names]
        given = made.process(params, **_whole_ones({n: _plain(first[n].values) for n in names}))
        sizes |= {d: k for v in outs for d, k in zip(v.dims_in(per_item=True), np.shape(given[v.name]))}
    sizes |= dict.fromkeys(_RAGGED, SLOTS)
    if "input" in dtypes.values():
        dtypes |= {name: given[name].dtype.str for name, dtype in dtypes.items() if dtype == "input"}

    def one(*arrays: Any) -> tuple[np.ndarray, ...] | np.ndarray:
        given = made.process(params, **_whole_ones(dict(zip(names, map(_plain, arrays)))))
        shapes = [tuple(sizes[d] for d in v.dims_in(per_item=True)) for v in outs]
        found = tuple(_filled(v, np.asarray(given[v.name], dtypes[v.name]), shape) for v, shape in zip(outs, shapes))
        return found if len(found) > 1 else found[0]  # numpy.vectorize treats a 1-tuple as a value

    inputs = []
    for name in names:
        core = {d: -1 for d in dataset[name].dims if d != "micrograph"}
        array = dataset[name]
        inputs.append(array.chunk({**core, **({"micrograph": 1} if "micrograph" in array.dims else {})}))
    # output core dimensions get separate names, so that a stage may change the size of y and x
    results = xr.apply_ufunc(
        one,
        *inputs,
        input_core_dims=[[d for d in dataset[n].dims if d != "micrograph"] for n in names],
        output_core_dims=[[f"_{d}" for d in v.dims_in(per_item=True)] for v in outs],
        output_dtypes=[np.dtype(dtypes[v.name]) for v in outs],
        dask="parallelized",
        vectorize=True,
        dask_gufunc_kwargs={"output_sizes": {f"_{d}": sizes[d] for v in outs for d in v.dims_in(per_item=True)}},
    )
    results = results if isinstance(results, tuple) else (results,)
    return xr.Dataset(
        {v.name: _named(v, r) for v, r in zip(outs, results)},
        attrs={"stage": made.name, "version": made.version, "params": params.model_dump_json()},
    )


def _named(var: Var, array: xr.DataArray) -> xr.DataArray:
    return array.rename({f"_{d}": d for d in var.dims_in(per_item=True)}).assign_attrs(units=var.units, long_name=var.doc)


def _with_positions(dataset: xr.Dataset) -> xr.Dataset:
    """Picks as particles: accepted ones keep their slot, the others become NaN (id -1) and are ignored."""
    accepted = dataset["pick_accepted"] > 0 if "pick_accepted" in dataset else dataset["pick_y"].notnull()
    places = {
        f"position_{axis}_angstrom": (dataset[f"pick_{axis}"].astype(np.float64) * dataset["pixel_size_angstrom"]).where(accepted)
        for axis in "yx"
    }
    ids = dataset["particle_id"] if "particle_id" in dataset else accepted.cumsum(str(accepted.dims[-1])) - 1
    return dataset.assign(places).assign(particle_id=ids.where(accepted, -1).astype(np.int64))


def _whole_ones(values: dict[str, Any]) -> dict[str, Any]:
    """Remove the padding of ragged columns, and sort particles by id."""
    if "particle_id" not in values:
        return values
    there = np.flatnonzero(np.asarray(values["particle_id"]) >= 0)
    order = there[np.argsort(np.asarray(values["particle_id"])[there], kind="stable")]
    return {n: v[order] if n in VARIABLES and VARIABLES[n].ragged else v for n, v in values.items()}


def _plain(value: Any) -> Any:
    """Scalars as Python types; arrays writable, because torch refuses read-only ones."""
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else np.require(array, requirements="W")


def _filled(var: Var, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Pad a ragged output to the length of its dimension with NaN, or -1 for integers."""
    if array.shape == shape:
        return array
    if next(iter(var.dims_in(per_item=True)), "") not in _RAGGED or array.shape[1:] != shape[1:]:
        raise MicrographError(
            f"{var.name} has shape {array.shape} here and {shape} for the first micrograph.",
            "the Dataset mixes movies of different cameras, binning or numbers of frames",
            "select movies of one kind",
        )
    out = np.full(shape, np.nan if array.dtype.kind == "f" else -1, array.dtype)
    out[tuple(slice(0, n) for n in array.shape)] = array
    return out
