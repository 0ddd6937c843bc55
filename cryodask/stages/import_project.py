"""Stage ``import_project``: exposures and particles of another cryodask project."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError, StoreError
from cryodask.products import columns_of
from cryodask.stage import Context, Output, Params, SourceFile, stage
from cryodask.store.generation import Generation
from cryodask.store.particles import ImagePlaces
from cryodask.store.shards import Layout
from cryodask.vocabulary import VARIABLES

if TYPE_CHECKING:
    from cryodask.store.project import Project
    from cryodask.store.state import ProductRef

EXPOSURE_PARTS: tuple[str, ...] = ("optics", "dose", "micrograph", "ctf")
PARTICLE_PARTS: tuple[str, ...] = ("position", "score", "image", "ctf", "class2d", "alignment2d", "pose")
OF_EXPOSURES = [n for part in EXPOSURE_PARTS for n in columns_of("exposures", part)]
OF_PARTICLES = [
    *("particle_image", "particle_y", "particle_x", "particle_count", "particle_pixel_size_angstrom", "pick_y", "pick_x", "pick_score"),
    *columns_of("particles", "ctf"),
    *("class_number", "class_probability", "class_psi_deg", "class_centre_y_angstrom", "class_centre_x_angstrom", "class_log_likelihood"),
    *("rot_deg", "tilt_deg", "psi_deg", "centre_y_angstrom", "centre_x_angstrom", "log_likelihood"),
]


class ImportProjectParams(Params):
    """Parameters of ``import_project``."""

    project: SourceFile = Field(description="results folder of the other project")
    step: str = Field(description="step of that project whose particles are imported, for example curate")


def opened(params: ImportProjectParams) -> tuple[Project, ProductRef]:
    """The other project, and its particles.

    Raises
    ------
    InputError
        If the step gives none, or is not finished.
    """
    from cryodask.store.project import Project

    try:
        project = Project(params.project)
        ref = project.product(params.step, "particles")
        project.sets.ids(ref)
    except StoreError as error:
        raise InputError(f"{params.project}: {error.what}", error.usual_reason, error.way_out) from error
    return project, ref


def _outputs(params: ImportProjectParams) -> tuple[Output, ...]:
    exposures, particles = EXPOSURE_PARTS, PARTICLE_PARTS
    if (Path(getattr(params, "project", "")) / "project.json").is_file():
        _, ref = opened(params)
        exposures = tuple(p for p in EXPOSURE_PARTS if p in ref.exposures)
        particles = tuple(p for p in PARTICLE_PARTS if p in ref.parts)
    frame = "unknown" if "pose" in particles else ""
    return (Output("exposures", "exposures", exposures), Output("particles", "particles", particles, births=True, frame=frame))


class _NotStored:
    """Placeholder for an image that the other project does not have."""

    def __init__(self, name: str) -> None:
        self.stored, self.shape, self.dtype = False, (8,) * len(VARIABLES[name].dims), np.dtype(np.float32)

    def __len__(self) -> int:
        return 0


@stage(
    version=1,
    needs=["foreign_values"],
    ports=[],
    outputs=_outputs,
    gives=[*OF_EXPOSURES, *OF_PARTICLES],
)
def import_project(params: ImportProjectParams, *, foreign_values: dict[str, Any], context: Context) -> dict[str, Any]:
    """Import the exposures and particles of a step of another project, with their CTF, classes, poses and images.

    A particle is identified by the content of its exposure, how it was picked, its number, and its position: projects that share movies,
    and copies of one project, share their particles. If the numbers of an exposure refer to other positions here (for example because the
    other project used another gain or pixel size), its particles get new ids; they are never joined. Half-sets are kept.
    """
    ids = np.asarray(foreign_values["claimed_id"], np.int64)
    out: dict[str, Any] = {"claimed_id": ids, "claims_by_name": True, "placed": foreign_values.get("placed", True)}
    out |= {name: foreign_values[name] for name in ("claimed_y", "claimed_x") if name in foreign_values}
    out["half_set"] = foreign_values.get("half_set", np.full(len(ids), -1, np.int8))
    for name in (*OF_EXPOSURES, *OF_PARTICLES):
        var = VARIABLES[name]
        if var.kind == "bulk":
            place = foreign_values["bulk"].get(name)
            out[name] = _read(name, place) if place is not None else _NotStored(name)
        elif name in foreign_values:
            out[name] = foreign_values[name]
        elif var.ragged:
            filling = 0 if var.dtype[0] == "i" or name == "pick_score" else np.nan
            out[name] = np.full(len(ids), filling, var.dtype)
        else:
            out[name] = 0 if var.dtype[0] == "i" else np.nan
    out["particle_count"] = len(out["particle_image"])
    return out


def _read(name: str, place: ImagePlaces | tuple[str, int, Layout]) -> np.ndarray:
    """An image of an exposure of the other project, or its particle images, possibly from several extractions."""
    if isinstance(place, ImagePlaces):
        return place.read()
    folder, row, layout = place
    return np.asarray(Generation(Path(folder)).shard(row, name, None, layout).read())
