"""Deposition at EMPIAR: the JSON file that its depositor takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cryodask.interop.about import About, Author, Contact, read_about
from cryodask.interop.originals import ImageSet, image_sets
from cryodask.store.files import disk_errors, write_atomically
from cryodask.store.project import Project

_NEEDED = ("title", "authors", "contact", "principal_investigator")
_STRUCTURES_IN_EMDB = 3
_FORMATS = {"MRC": "T1", "MRCS": "T2", "ST": "T1", "TIF": "T3", "TIFF": "T3", "DM3": "T5", "DM4": "T6", "EER": "T9"}
_VOXELS = {"u1": "T1", "i1": "T2", "u2": "T3", "i2": "T4", "u4": "T5", "i4": "T6", "f4": "T7"}


def export_empiar(project: Project, folder: str | Path) -> list[Path]:
    """Write ``empiar.json``, the description of the originals for EMPIAR; people and title come from ``about.yaml``.

    Raises
    ------
    ProjectFileError
        If ``about.yaml`` lacks something that EMPIAR requires.
    """
    path = Path(folder) / "empiar.json"
    about = read_about(project, *_NEEDED, what="EMPIAR")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(entry(project, about), indent=2, ensure_ascii=False))
    return [path]


def entry(project: Project, about: About) -> dict[str, Any]:
    """The entry as EMPIAR's schema has it."""
    assert about.contact is not None
    assert about.principal_investigator is not None
    authors = [{"name": _cited(one), "order_id": number, **_orcid(one)} for number, one in enumerate(about.authors)]
    citation = {
        "authors": [{"name": one["name"], "order_id": one["order_id"]} for one in authors],
        "published": bool(about.doi),
        "j_or_nj_citation": True,
        "title": about.paper or about.title,
        **({"doi": about.doi} if about.doi else {}),
    }
    return {
        "title": about.title,
        "release_date": about.release,
        "experiment_type": _STRUCTURES_IN_EMDB,
        "cross_references": [{"name": name} for name in about.emdb],
        "authors": authors,
        "corresponding_author": _person(about.contact),
        "principal_investigator": [_person(about.principal_investigator)],
        "imagesets": [_image_set(project, one) for one in image_sets(project)],
        "citation": [citation],
    }


def _image_set(project: Project, one: ImageSet) -> dict[str, Any]:
    kind = f"('{_FORMATS[one.suffix]}', '')" if one.suffix in _FORMATS else f"('OT', '{one.suffix or 'UNKNOWN'}')"
    return {
        "name": f"{project.name}: {'movies' if one.multiframe else 'micrographs'} of {one.folder}",
        "directory": f"data/{one.folder.replace('../', '').lstrip('/')}",
        "category": "('T2', '')" if one.multiframe else "('T1', '')",
        "header_format": kind,
        "data_format": kind,
        "num_images_or_tilt_series": one.count,
        "frames_per_image": one.frames,
        "voxel_type": f"('{_VOXELS[one.dtype]}', '')" if one.dtype in _VOXELS else "('OT', 'UNKNOWN')",
        "pixel_width": one.pixel_size_angstrom,
        "pixel_height": one.pixel_size_angstrom,
        "image_width": one.width or None,
        "image_height": one.height or None,
        "details": f"described by cryodask from its project {project.name}",
    }


def _cited(person: Author) -> str:
    initials = "".join(f"{word[0].upper()}." for word in person.first_name.replace("-", " ").split())
    return f"('{person.last_name}', '{initials}')"


def _orcid(person: Author) -> dict[str, str]:
    return {"author_orcid": person.orcid} if person.orcid else {}


def _person(person: Contact) -> dict[str, Any]:
    given = person.model_dump(include={"first_name", "last_name", "organization", "email", "country"})
    return {**given, **_orcid(person)}
