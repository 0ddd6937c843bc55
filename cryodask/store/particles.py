"""The particles of a step as one Dataset, and access to their images."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.errors import StoreError
from cryodask.store.generation import Generation
from cryodask.store.identity import place_of, row_of, row_runs, same_ids
from cryodask.store.sets import SetReader, runs
from cryodask.vocabulary import CTF_COLUMNS, OPTICS, VARIABLES

if TYPE_CHECKING:
    import xarray as xr

    from cryodask.store.project import Project
    from cryodask.store.state import ProductRef


@dataclass(frozen=True)
class ImagePlaces:
    """Location of the images of some particles: generation, row of the exposure, slot in its shard."""

    images: tuple[Generation, ...]
    row: np.ndarray
    slot: np.ndarray
    giver: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """(particle, y, x)."""
        layout = self.images[0].layout(VARIABLES["particle_image"])
        return (len(self.row), *layout.shape[1:])

    def take(self, index: np.ndarray) -> ImagePlaces:
        """Places of a subset of the particles."""
        return ImagePlaces(self.images, self.row[index], self.slot[index], self.giver[index])

    def read(self) -> np.ndarray:
        """Images `(n, y, x)` float32; each shard is opened once."""
        out = np.empty(self.shape, np.float32)
        shards, which = np.unique(self.giver.astype(np.int64) << 32 | self.row, return_inverse=True)
        for number, shard in enumerate(shards.tolist()):
            reader = self.images[shard >> 32].shard(shard & 0xFFFFFFFF, "particle_image")
            here = np.nonzero(which == number)[0]
            step = reader.layout.chunk[0]
            for slab in np.unique(self.slot[here] // step):
                in_slab = here[self.slot[here] // step == slab]
                out[in_slab] = reader.slab(int(slab))[self.slot[in_slab] % step]
        return out


def image_places(project: Project, ref: ProductRef, ids: np.ndarray) -> ImagePlaces:
    """Locations of the images of some particles of a set.

    Raises
    ------
    StoreError
        If a particle has no image.
    """
    places, found = _known_places(project, ref, ids)
    if not found.all():
        raise StoreError(
            f"{int((~found).sum())} of {len(ids)} particles of {ref.step} have no image in {ref.parts['image']}.",
            "their exposures were re-extracted meanwhile, or quarantined",
            "run the project again",
        )
    return places


def image_givers(project: Project, ref: ProductRef) -> tuple[Generation, ...]:
    """Results that hold the images of a set."""
    place = ref.parts["image"]
    return tuple(project.generation_at(p) for p in project.sets.images(place).givers or (place,))


def image_slots(project: Project, ref: ProductRef, ids: np.ndarray) -> np.ndarray:
    """Where each particle's image is among :func:`image_givers`, `(n,)` int64: giver * 2^32 + slot in its exposure; -1 if there is none."""
    places, found = _known_places(project, ref, ids)
    out = np.full(len(ids), -1, np.int64)
    out[found] = places.giver.astype(np.int64) << 32 | places.slot
    return out


def images_at(givers: tuple[Generation, ...], row: int, slots: np.ndarray) -> np.ndarray:
    """Images `(n, y, x)` float32 of particles of one exposure, from their :func:`image_slots`."""
    return ImagePlaces(givers, np.full(len(slots), row), slots & 0xFFFFFFFF, slots >> 32).read()


def _known_places(project: Project, ref: ProductRef, ids: np.ndarray) -> tuple[ImagePlaces, np.ndarray]:
    """Locations of the images of those particles that have one, and the mask of these."""
    place = ref.parts["image"]
    given, generations = project.sets.images(place), image_givers(project, ref)
    giver = given.giver if given.giver is not None else np.zeros(len(given.ids), np.int16)
    every = ImagePlaces(generations, given.row, given.slot, giver)
    if same_ids(given.ids, ids):
        return every, np.ones(len(ids), bool)
    at = place_of(ids, given.ids)
    found = at >= 0
    return every.take(at if found.all() else at[found]), found


def particle_columns(
    project: Project, ref: ProductRef, ids: np.ndarray, parts: Iterable[str] | None = None, *, sets: SetReader | None = None
) -> dict[str, np.ndarray]:
    """Columns of the particles of a set: some parts (all if None) without images, optics, and CTF (per particle if available).

    ``sets``: the reader to use, whose memory is its own; by default that of the project, which keeps what it has read.
    """
    sets = sets or project.sets
    out = sets.columns(ref, ids, parts)
    values = sets.of_runs(ref, *row_runs(ids), [*CTF_COLUMNS, *OPTICS])
    for name in CTF_COLUMNS:
        own, theirs = out.get(name), values.get(name)
        if own is not None and theirs is not None:
            out[name] = np.where(np.isfinite(own), own, theirs)
        elif theirs is not None:
            out[name] = theirs
        elif name == "phase_shift_deg" and "defocus_u_angstrom" in {*out, *values}:
            out.setdefault(name, np.zeros(len(ids)))
    out |= {name: values[name] for name in OPTICS if name in values}
    return out


class LazyImages:
    """Images of particles as one array `(particle, y, x)`, for dask."""

    def __init__(self, places: ImagePlaces) -> None:
        self.places = places
        self.shape, self.dtype, self.ndim = places.shape, np.dtype(np.float32), 3

    def __getitem__(self, window: tuple[slice, slice, slice]) -> np.ndarray:
        some = self.places.take(np.arange(len(self.places.row))[window[0]])
        return some.read()[:, window[1], window[2]]


def _lazy(places: ImagePlaces) -> Any:
    """Dask array of the images, one chunk per exposure."""
    import dask.array as da

    _, chunks = runs(places.row)
    layout = (tuple(chunks.tolist()) or (0,), places.shape[1], places.shape[2])
    return da.from_array(LazyImages(places), chunks=layout, name=f"particle_image-{uuid.uuid4().hex}", asarray=False, fancy=False)


def particle_dataset(project: Project, label: str | None = None) -> xr.Dataset:
    """The particles of a step as one Dataset with dimension ``particle``; see ``Project.particles``."""
    import xarray as xr

    from cryodask.store.datasets import describe

    label = label or _last(project)
    if label is None:
        return xr.Dataset()
    ref = project.product(label, "particles")
    ids = project.sets.ids(ref)
    places = None
    if "image" in ref.parts and len(ids):
        # exposures may come or go between two reads of a growing project: keep particles that have an image
        places, found = _known_places(project, ref, ids)
        ids = ids if found.all() else ids[found]
    columns = particle_columns(project, ref, ids)
    if places is not None and "particle_y" in columns and not np.isfinite(columns["particle_y"]).all():
        still = np.isfinite(columns["particle_y"])
        ids, places = ids[still], places.take(np.flatnonzero(still))
        columns = {name: values[still] for name, values in columns.items()}
    half = columns.pop("half_set", np.full(len(ids), -1, np.int8))
    data: dict[str, Any] = {}
    for name, values in columns.items():
        attributes = describe(VARIABLES[name]) if name in VARIABLES else {"units": "angstrom", "long_name": "centre of the box"}
        data[name] = ("particle", values, attributes)
    names = {item.row: item.name for item in project.items()}
    rows = row_of(ids)
    some, counts = row_runs(ids)
    micrograph = np.repeat(np.array([names.get(r, f"row {r}") for r in some.tolist()] or [""], dtype=object)[: len(some)], counts)
    coords = {
        "particle_id": ("particle", ids, describe(VARIABLES["particle_id"])),
        "half_set": ("particle", half, describe(VARIABLES["half_set"])),
        # unconverted, because xarray would read all names to guess their type
        "micrograph": xr.Variable("particle", micrograph, fastpath=True),
        "row": ("particle", rows),
    }
    dataset = xr.Dataset(data, coords)
    if places is not None and len(ids):
        dataset["particle_image"] = (("particle", "y", "x"), _lazy(places), describe(VARIABLES["particle_image"]))
        if "particle_pixel_size_angstrom" in columns:
            dataset.attrs["particle_pixel_size_angstrom"] = float(columns["particle_pixel_size_angstrom"][0])
    return dataset


def _last(project: Project) -> str | None:
    """The last step whose particles are finished (for a per-exposure step: at least some)."""
    for label in reversed(project.stages):
        if project.step(label).product("particles") is not None and project.generation(label).committed():
            return label
    return None
