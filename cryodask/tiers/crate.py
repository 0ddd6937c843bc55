"""RO-Crate: the description that makes a hand-over a research object, with every file, its checksum, the people and the steps.

Written by hand, because it is one loop: https://w3id.org/ro/crate/1.1, with schema.org's ``sha256``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cryodask.interop.about import About
from cryodask.store.project import Project
from cryodask.version import VERSION

NAME = "ro-crate-metadata.json"
_SOFTWARE = "#cryodask"


def crate(project: Project, about: About, files: Iterable[tuple[str, int, str]], folders: Iterable[str] = ()) -> str:
    """The metadata of a crate.

    Parameters
    ----------
    project : Project
    about : About
        People, title and licence.
    files : iterable of (path, bytes, sha256)
        Relative to the root of the crate.
    folders : iterable of str
        Folders that are part of it besides.

    Returns
    -------
    str
        The content of ``ro-crate-metadata.json``.
    """
    entities = [_file(path, size, sha) for path, size, sha in files]
    entities += [{"@id": f"{quote(folder)}/", "@type": "Dataset", "name": folder} for folder in folders]
    people = [_person(one.first_name, one.last_name, one.orcid, number) for number, one in enumerate(about.authors)]
    steps = [_step(project, label) for label in project.stages]
    root: dict[str, Any] = {
        "@id": "./",
        "@type": "Dataset",
        "name": about.title or project.name,
        "description": about.description or f"Movies and results of the cryo-EM session {project.name}",
        "datePublished": datetime.now(UTC).date().isoformat(),
        "license": {"@id": about.licence} if about.licence else "All rights reserved by the owner of the data",
        "hasPart": [_ref(one) for one in entities],
        "mentions": [_ref(one) for one in steps],
    }
    if people:
        root["author"] = [_ref(one) for one in people]
    software = {"@id": _SOFTWARE, "@type": "SoftwareApplication", "name": "cryodask", "version": VERSION, "softwareVersion": VERSION}
    licences = [{"@id": about.licence, "@type": "CreativeWork", "name": about.licence}] if about.licence else []
    descriptor = {
        "@id": NAME,
        "@type": "CreativeWork",
        "conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"},
        "about": {"@id": "./"},
    }
    context = ["https://w3id.org/ro/crate/1.1/context", {"sha256": "http://schema.org/sha256"}]
    graph = [descriptor, root, software, *licences, *people, *steps, *entities]
    return json.dumps({"@context": context, "@graph": graph}, indent=1, ensure_ascii=False)


def _file(path: str, size: int, sha256: str) -> dict[str, Any]:
    return {"@id": quote(path), "@type": "File", "name": Path(path).name, "contentSize": str(size), "sha256": sha256}


def _person(first: str, last: str, orcid: str | None, number: int) -> dict[str, Any]:
    found = f"https://orcid.org/{orcid}" if orcid else f"#author-{number}"
    return {"@id": found, "@type": "Person", "name": f"{first} {last}", "givenName": first, "familyName": last}


def _step(project: Project, label: str) -> dict[str, Any]:
    meta, key = project.generation(label).meta, project.step(label).key
    return {
        "@id": f"#step-{quote(label)}",
        "@type": "CreateAction",
        "name": f"{label}: {meta['stage']}@{key}, version {meta['version']}",
        "description": json.dumps(meta["params"], sort_keys=True),
        "instrument": {"@id": _SOFTWARE},
        "endTime": datetime.fromtimestamp(meta["created"], UTC).isoformat(),
    }


def _ref(entity: dict[str, Any]) -> dict[str, str]:
    return {"@id": entity["@id"]}
