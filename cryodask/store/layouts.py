"""Sizes and types of a generation's images: one Zarr array for each, so that a project can combine several cameras."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cryodask.errors import MicrographError
from cryodask.store.shards import Layout
from cryodask.vocabulary import SLOTS, Var

_CAPACITY = 1 << 20
"""Number of exposures that an array has room for; unused space costs nothing."""


class Grid(NamedTuple):
    """Lengths of the dimensions of bulk variables, and dtypes of those that depend on the input."""

    sizes: dict[str, int]
    dtypes: dict[str, str]


def layout_on(var: Var, grid: Grid) -> Layout:
    """Layout of a bulk variable in a data set."""
    shape = tuple(grid.sizes.get(f"{var.name}.{d}", grid.sizes.get(d)) for d in var.dims)
    return Layout.of(shape, var.chunk, np.dtype(grid.dtypes.get(var.name, var.dtype)).str, rounded=var.rounded)  # type: ignore[arg-type]


def layout_of_value(var: Var, value: Any) -> Layout:
    """Layout of a value itself."""
    shape = (SLOTS, *value.shape[1:]) if var.dims[0] == "slot" else tuple(value.shape)
    return Layout.of(shape, var.chunk, np.dtype(value.dtype if var.dtype == "input" else var.dtype).str, rounded=var.rounded)


def layout_text(layout: Layout) -> str:
    """Shape and type of a layout, as recorded for a movie that is not stored."""
    return f"{'x'.join(map(str, layout.shape))}.{layout.dtype}"


def name_of_size(var: Var, layout: Layout) -> str:
    """Name of the array for items of another size or type than those of the first data set, as ``movie.40x4092x5760.uint8``."""
    return f"{var.name}.{'x'.join(map(str, layout.shape))}.{np.dtype(layout.dtype).name}"


def create_array(group: Any, name: str, var: Var, layout: Layout) -> None:
    """Create an array in a Zarr group with room for every exposure, one shard each."""
    group.create_array(
        name,
        shape=(_CAPACITY, *layout.shape),
        shards=(1, *layout.padded),
        chunks=(1, *layout.chunk),
        dtype=layout.dtype,
        compressors=layout.zarr_codecs() or None,
        filters=None,
        dimension_names=("micrograph", *var.dims_in(per_item=True)),
        attributes={"units": var.units, "long_name": var.doc},
    )


def check_dimensions(var: Var, value: Any, name: str) -> None:
    """Refuse a value that cannot be in one column with those of other items, because the whole table would become unreadable.

    Raises
    ------
    MicrographError
    """
    found = value.shape if hasattr(value, "shape") else np.shape(value)
    if len(found) != len(var.dims):
        wanted = ", ".join(var.dims) or "a single value"
        raise MicrographError(
            f"{var.name} of {name} has the shape {tuple(found)} instead of {wanted}.",
            "its stage gave no value, or several instead of one",
            "report it with the name of the stage; the other exposures are processed",
        )


def fits(var: Var, value: Any, layout: Layout) -> bool:
    """Whether a value can be stored in a layout without loss."""
    return _has_shape(var, value, layout) and _has_type(value, layout)


def _has_shape(var: Var, value: Any, layout: Layout) -> bool:
    shape = tuple(value.shape)
    return shape == layout.shape or (var.dims[0] == "slot" and shape[1:] == layout.shape[1:] and shape[0] <= layout.shape[0])


def _has_type(value: Any, layout: Layout) -> bool:
    return np.can_cast(value.dtype, layout.dtype, "safe" if np.dtype(layout.dtype).kind in "iu" else "same_kind")


def as_stored(var: Var, layout: Layout, value: Any, name: str) -> Any:
    """Convert a value of exposure ``name`` for writing; a movie is returned unchanged.

    Raises
    ------
    MicrographError
        If it does not fit the layout.
    """
    boxes = var.dims[0] == "slot"
    if boxes and len(value) > layout.shape[0]:
        raise MicrographError(
            f"{name} has {len(value):,} particles; an exposure can hold {layout.shape[0]:,}.",
            "the threshold accepts noise, or all rows of a table name the same micrograph",
            "raise the threshold, or import the particles of each micrograph under its name",
        )
    if not _has_shape(var, value, layout):
        found, usual = tuple(value.shape)[boxes:], layout.shape[boxes:]
        raise MicrographError(
            f"{var.name} of {name} has shape {found}, not {usual} like most of its {'table' if boxes else 'data set'}.",
            "one table has several box sizes" if boxes else "one folder has movies of different cameras, binning or numbers of frames",
            "import each size from a separate table" if boxes else "list them as a separate data set under `inputs`",
        )
    if not _has_type(value, layout):
        raise MicrographError(
            f"{var.name} of {name} has the type {value.dtype}, not {layout.dtype} like most of its data set.",
            "one folder has movies of different cameras or conversions; stored as that type, values would change",
            "list them as a separate data set under `inputs`",
        )
    return np.asarray(value, dtype=layout.dtype) if isinstance(value, np.ndarray) else value
