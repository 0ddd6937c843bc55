"""Particles, their poses and their 2D classes for RELION."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cryodask.errors import CryodaskError
from cryodask.formats import star
from cryodask.formats.mrc import write_mrc
from cryodask.interop.exposures import Exposures, label_of_particles
from cryodask.interop.refined_optics import warn_of_unconverted, with_refined_optics
from cryodask.interop.relion_micrographs import micrograph_file
from cryodask.store.birthbook import BirthBook
from cryodask.store.claims import birth_marks
from cryodask.store.identity import birth_of, parent_of, row_of
from cryodask.store.project import Project
from cryodask.vocabulary import ABERRATIONS, CTF_COLUMNS, OPTICS

_COLUMNS = (
    *CTF_COLUMNS,
    *OPTICS,
    "particle_y",
    "particle_x",
    "rot_deg",
    "tilt_deg",
    "psi_deg",
    "origin_y_angstrom",
    "origin_x_angstrom",
    "class_number",
    "class_probability",
    "half_set",
    "log_likelihood",
    "ctf_b_factor_angstrom2",
    "ctf_scale_factor",
    "particle_id",
    "cryosparc_uid",
)
_IF_KNOWN = {"class_probability", "log_likelihood", "ctf_b_factor_angstrom2", "ctf_scale_factor"}
"""Columns that are left out if a particle has no value: imported poses have no likelihood."""
_ANGLES = ("rot_deg", "tilt_deg", "psi_deg")


def exported_particles(exposures: Exposures) -> tuple[dict[str, Any], np.ndarray] | None:
    """Columns and images `(particle, y, x)` of the particles to export; None if there are none, or they have no images.

    Poses are as they are stored. ``half_set`` and likelihoods are left out if a particle has none.
    """
    project = exposures.project
    label = label_of_particles(project)
    if label is None or "image" not in project.product(label, "particles").parts:
        return None
    particles = project.particles(label)
    count = int(particles.sizes["particle"])
    if not count:
        return None
    columns: dict[str, Any] = {n: particles[n].values for n in _COLUMNS if n in particles.variables}
    for name in _IF_KNOWN & columns.keys():
        if np.isnan(columns[name]).any():
            del columns[name]
    if "half_set" in columns and (columns["half_set"] < 0).any():
        del columns["half_set"]
    if not np.any(columns.get("cryosparc_uid", 0)):
        columns.pop("cryosparc_uid", None)
    if "class_number" in columns:
        columns["class_number"] = np.maximum(columns["class_number"], 0)
    if "pose" not in project.product(label, "particles").parts and "class_psi_deg" in particles:
        renamed = {"psi_deg": "class_psi_deg", "log_likelihood": "class_log_likelihood"}
        renamed |= {f"origin_{axis}_angstrom": f"class_origin_{axis}_angstrom" for axis in "yx"}
        columns |= {name: particles[old].values for name, old in renamed.items()}
    names = particles["micrograph"].values
    by_name = exposures.optics.get("pixel_size_angstrom", {})
    if by_name:
        columns["pixel_size_angstrom"] = np.array([by_name[n] for n in names])
    columns |= _births(project, particles, columns.get("pixel_size_angstrom"))
    kept = np.array([exposures.kept_optics[n] for n in names], dtype=object)
    columns |= {
        "optics_group_name": np.array([exposures.groups[n] for n in names], dtype=object),
        "relion_optics": with_refined_optics(kept, {n: particles[n].values for n in ABERRATIONS if n in particles.variables}),
        "micrograph_name": np.array([micrograph_file(n) for n in names], dtype=object),
        "image_index": np.arange(count),
        "image_stack": "particles.mrcs",
        "particle_pixel_size_angstrom": float(particles.attrs["particle_pixel_size_angstrom"]),
        "box": int(particles.sizes["x"]),
    }
    return columns, particles["particle_image"].values


def write_particles(exposures: Exposures, out: Path) -> list[Path]:
    """``particles.star`` and ``particles.mrcs``; nothing if the last particles have no images."""
    found = exported_particles(exposures)
    if found is None:
        return []
    columns, images = found
    warn_of_unconverted(columns["relion_optics"], "RELION")
    label = label_of_particles(exposures.project)
    parts = exposures.project.product(label, "particles").parts if label is not None else {}
    if "pose" in parts:
        columns |= _within_the_unit(columns, _point_group(exposures.project, parts["pose"]))
    write_mrc(out / "particles.mrcs", images, columns["particle_pixel_size_angstrom"], stack=True)
    star.write_particles(out / "particles.star", columns)
    return [out / "particles.star", out / "particles.mrcs"]


def write_tracks(exposures: Exposures, out: Path) -> list[Path]:
    """``polish/micrographs/NAME_tracks.star``: the tracks of the particles of a polished micrograph, as relion_motion_refine writes them.

    Displacements of the specimen, Angstrom, from that of the first frame, in the order of ``particles.star``. Nothing if no step polished.
    """
    from cryodask.kernels.particle_motion import field_at

    project = exposures.project
    label = label_of_particles(project)
    polished = [one for one in exposures.givers("field") if "patch_shift_before" in project.generation(one).meta["gives"]]
    if not polished or label is None:
        return []
    particles, written = project.particles(label), []
    names = particles["micrograph"].values
    centre = np.stack([particles[f"centre_{axis}_angstrom"].values for axis in "yx"], -1)
    for one in (d for step in polished for d in project.by_image_size(step)):
        for name in (str(n) for n in one["micrograph"].values):
            here, movie = names == name, one.sel(micrograph=name)
            if not here.any():
                continue
            places = centre[here] / exposures.optics["pixel_size_angstrom"][name]
            tracks = field_at(movie["patch_shift"].values, places, (int(one.sizes["y"]), int(one.sizes["x"])))
            path = out / "polish" / Path(micrograph_file(name)).with_suffix("").with_name(f"{name}_tracks.star")
            path.parent.mkdir(parents=True, exist_ok=True)
            star.write_particle_tracks(path, tracks - tracks[:, :1])
            written.append(path)
    return written


def _within_the_unit(columns: dict[str, Any], group: str) -> dict[str, Any]:
    """Poses within RELION's asymmetric unit, beyond which its local searches lose them."""
    from cryodask.kernels.asymmetric_unit import into_unit

    if not all(name in columns for name in _ANGLES):
        return {}
    rot, tilt, psi = (columns[name] for name in _ANGLES)
    return dict(zip(_ANGLES, into_unit(rot, tilt, psi, group)))


def _point_group(project: Project, places: str) -> str:
    """Point group of the map to which poses of some generations refer; C1 where it is unknown."""
    steps = project.state.steps
    labels = {step.place: label for label, step in steps.items()}
    maps = {step.params.get("frame_of"): step.params.get("symmetry") for step in steps.values() if step.stage == "import_map"}
    found = set()
    for place in places.split("|"):
        label = labels.get(place, "")
        params = steps[label].params if label else {}
        if label and steps[label].stage == "import_project":
            found.add(maps.get(label) or _foreign_point_group(project.home / params["project"], params["step"]))
        elif label and steps[label].stage == "polish":
            # it passes poses on
            found.add(_point_group(project, steps[label].inputs["particles"][0].parts["pose"]))
        else:
            found.add(params.get("symmetry") or maps.get(label))
    return str(found.pop() or "C1") if len(found) == 1 else "C1"


def _foreign_point_group(folder: Path, label: str) -> str | None:
    """That of an imported project, if it is still there."""
    try:
        project = Project(folder)
        return _point_group(project, project.product(label, "particles").parts["pose"])
    except (CryodaskError, KeyError):
        return None


def _births(project: Project, particles: Any, pixel: np.ndarray | None) -> dict[str, np.ndarray]:
    """Positions at birth, pixels. They prove that an id in a reimported STAR file belongs to this project."""
    if "position_y_angstrom" in particles and pixel is not None:
        return {f"birth_{axis}": particles[f"position_{axis}_angstrom"].values / pixel for axis in "yx"}
    ids, book = parent_of(particles["particle_id"].values), BirthBook(project)
    marks: dict[int, tuple[float, float]] = {}
    for birth, row in sorted(set(zip(birth_of(ids).tolist(), row_of(ids).tolist()))):
        known = book.at(row, birth)
        marks.update(zip(known["particle_id"].tolist(), zip(*birth_marks(known["pick_y"], known["pick_x"], known["natural_key"]))))
    found = np.array([marks.get(one, (np.nan, np.nan)) for one in ids.tolist()], np.float64).reshape(-1, 2)
    return {"birth_y": found[:, 0], "birth_x": found[:, 1]} if np.isfinite(found).all() else {}


def write_classes(project: Project, out: Path) -> list[Path]:
    """``class_averages.mrcs`` and ``.star``, of the last classification."""
    label = project.latest("classes", "averages")
    if label is None:
        return []
    classes = project[label].load()
    pixel = float(project.particles(label).attrs["particle_pixel_size_angstrom"])
    write_mrc(out / "class_averages.mrcs", classes["class_average"].values, pixel, stack=True)
    count = classes.sizes["class"]
    table: dict[str, Any] = {"rlnReferenceImage": [f"{i + 1:06d}@class_averages.mrcs" for i in range(count)]}
    table["rlnClassDistribution"] = classes["class_share"].values
    if "class_resolution_angstrom" in classes:
        table["rlnEstimatedResolution"] = classes["class_resolution_angstrom"].values
    if "class_score" in classes:
        table["rlnClassScore"] = classes["class_score"].values
    import pandas as pd

    star.write_tables(out / "class_averages.star", {"model_classes": pd.DataFrame(table)})
    return [out / "class_averages.mrcs", out / "class_averages.star"]
