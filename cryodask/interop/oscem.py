"""Metadata of a single-particle session in the schema of the Open Standards Community for Electron Microscopy (OSC-EM)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.errors import CryodaskError, InputError
from cryodask.interop.about import About, Author, Contact, read_about
from cryodask.interop.originals import image_sets
from cryodask.store.files import disk_errors, write_atomically
from cryodask.store.identity import rows_in
from cryodask.store.project import Project


def export_oscem(project: Project, folder: str | Path) -> list[Path]:
    """Write ``oscem.json``: acquisition, instrument, people and results of processing; what no file says comes from ``about.yaml``.

    Raises
    ------
    ProjectFileError
        If ``about.yaml`` lacks the microscope or the detector.
    """
    path = Path(folder) / "oscem.json"
    about = read_about(project, "microscope", "detector", what="OSCEM")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(dataset(project, about), indent=2, ensure_ascii=False))
    return [path]


def dataset(project: Project, about: About) -> dict[str, Any]:
    """The metadata as the schema ``EMDatasetSpa`` has them."""
    optics: Mapping[str, Any] = next(iter(project.state.constants.values()), {})
    if not {"pixel_size_angstrom", "voltage_kv"} <= set(optics):
        raise InputError(
            f"{project.name} has no pixel size and voltage, which OSCEM requires.", "it starts from particles", "export one with exposures"
        )
    out = {"acquisition": _acquisition(project, about, optics), "instrument": _instrument(about, optics)}
    people = [person for person in (about.contact, about.principal_investigator) if person is not None]
    if people:
        unique = {(p.last_name, p.first_name): p for p in people}
        out["organizational"] = {"authors": [_author(person) for person in unique.values()]}
    processing = _processing(project, optics)
    return {**out, "processing": processing} if processing else out


def _acquisition(project: Project, about: About, optics: Mapping[str, Any]) -> dict[str, Any]:
    sets = image_sets(project)
    out: dict[str, Any] = {
        "technique": "spa",
        "detectors": [{"name": about.detector}],
        "date_time": _begin(project),
        "binning_camera": {"height": 1, "width": 1},
        "pixel_size": quantity(float(optics["pixel_size_angstrom"]), "Angstrom"),
        "images_generated": sum(one.count for one in sets),
    }
    if sets and sets[0].height:
        out["image_size"] = {"height": sets[0].height, "width": sets[0].width}
    if sets and sets[0].multiframe and sets[0].frames:
        out["frames_per_movie"] = sets[0].frames
        if optics.get("dose_per_frame"):
            out["dose_per_movie"] = quantity(float(optics["dose_per_frame"]) * sets[0].frames, "e-/Angstrom^2")
    return out


def _instrument(about: About, optics: Mapping[str, Any]) -> dict[str, Any]:
    out = {
        "microscope": {"model": about.microscope},
        "illumination": "Flood Beam",
        "imaging": "Bright Field",
        "electron_source": about.electron_source,
        "acceleration_voltage": quantity(float(optics["voltage_kv"]), "kV"),
    }
    if "spherical_aberration_mm" in optics:
        out["cs"] = quantity(float(optics["spherical_aberration_mm"]), "mm")
    return out


def _processing(project: Project, optics: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if any("movie_path" in item.inputs for item in project.items()):
        dose = optics.get("dose_per_frame")
        out["movies"] = {"dose_per_image": quantity(float(dose), "e-/Angstrom^2")} if dose else {}
    if project.latest("exposures", "micrograph") is not None:
        out["micrographs"] = {"number_micrographs": len(project.items())}
    if found := _ctf(project, optics):
        out["ctfs"] = found
    if (label := project.latest("particles")) is not None:
        try:
            ids = project.sets.ids(project.product(label, "particles"))
        except (CryodaskError, KeyError):  # nothing of it is finished
            ids = np.zeros(0, np.int64)
        if len(ids):
            out["coordinates"] = {"number_particles": len(ids), "num_source_micrographs": len(rows_in(ids))}
    if maps := _maps(project):
        out["volumes"] = maps
    return out


def _ctf(project: Project, optics: Mapping[str, Any]) -> dict[str, Any]:
    label = project.latest("exposures", "ctf")
    if label is None:
        return {}
    names = ("defocus_u_angstrom", "defocus_v_angstrom")
    table = project.scalars()
    if not set(names) <= set(table.columns):
        return {}
    mean = table[list(names)].to_numpy(np.float64).mean(1) / 10.0
    mean = mean[np.isfinite(mean)]
    if not len(mean):
        return {}
    least, most, average = (quantity(float(f(mean)), "nm") for f in (np.min, np.max, np.mean))
    out: dict[str, Any] = {"defocus": {"output_min_defocus": least, "output_max_defocus": most, "output_avg_defocus": average}}
    if "amplitude_contrast" in optics:
        out["amplitude_contrast"] = float(optics["amplitude_contrast"])
    return out


def _maps(project: Project) -> list[dict[str, Any]]:
    out = []
    for label in project.stages:
        generation = project.generation(label)
        record = generation.committed().get(0) if not generation.meta["per_item"] else None
        if record is None or "final_map" not in record["shards"]:
            continue
        one: dict[str, Any] = {"volume_type": "final map"}
        resolution = record["columns"].get("resolution_angstrom")
        if isinstance(resolution, int | float) and np.isfinite(resolution):
            one["vol_resolution"] = quantity(float(resolution), "Angstrom")
        if "particle_id" in record["shards"]:
            one["vol_number_particles"] = len(generation.read(record, "particle_id"))
        out.append(one)
    return out


def _begin(project: Project) -> str:
    """When the first original was written, as far as its file says."""
    times = [item.inputs["stat"][0] / 1e9 for item in project.items() if item.inputs.get("stat")]
    began = min(times) if times else min((project.generation(label).meta["created"] for label in project.stages), default=0.0)
    return datetime.fromtimestamp(began, UTC).replace(microsecond=0).isoformat()


def quantity(value: float, unit: str) -> dict[str, Any]:
    """A number with its unit."""
    return {"value": float(value), "unit": unit}


def _author(person: Contact | Author) -> dict[str, Any]:
    out: dict[str, Any] = {"given_name": person.first_name, "family_name": person.last_name}
    if isinstance(person, Contact):
        out |= {"email": person.email, "country": person.country, "type_org": person.kind, "name_org": person.organization}
    return {**out, "orcid": person.orcid} if person.orcid else out
