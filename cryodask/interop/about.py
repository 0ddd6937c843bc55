"""What no file of a session says: people, title, licence, sample. A person writes it into ``about.yaml`` beside the project file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cryodask.documents import read_yaml
from cryodask.errors import ProjectFileError
from cryodask.store.project import Project

NAME = "about.yaml"
EXAMPLE = """
title: Beta-galactosidase at 2.2 A
licence: https://creativecommons.org/publicdomain/zero/1.0/
release: HP
authors: [{first_name: Ada, last_name: Lovelace, orcid: 0000-0002-1825-0097}]
contact: {first_name: Ada, last_name: Lovelace, organization: University, email: ada@example.org, country: GB}
principal_investigator: {first_name: Ada, last_name: Lovelace, organization: University, email: ada@example.org, country: GB}
microscope: Titan Krios
detector: K3
"""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Author(_Model):
    """An author of the data."""

    first_name: str
    last_name: str
    orcid: str | None = None


class Contact(Author):
    """A person who answers for the data. ``country``: two letters."""

    organization: str
    email: str
    country: str = Field(pattern="^[A-Z]{2}$")
    kind: Literal["Academic", "Commercial", "Government", "Other"] = "Academic"


class About(_Model):
    """The content of ``about.yaml``.

    ``release``: when EMPIAR publishes the data (RE at once, EP with the entry in EMDB, HP with the paper, HO after a year).
    """

    title: str = ""
    description: str = ""
    licence: str = ""
    release: Literal["RE", "EP", "HP", "HO"] = "HP"
    authors: list[Author] = Field(default_factory=list)
    contact: Contact | None = None
    principal_investigator: Contact | None = None
    emdb: list[str] = Field(default_factory=list)
    paper: str = ""
    doi: str | None = None
    microscope: str = ""
    electron_source: str = "FEG"
    detector: str = ""

    def missing(self, *names: str) -> list[str]:
        """Those of some entries that are empty."""
        return [name for name in names if not getattr(self, name)]


def path_of(project: Project) -> Path:
    """Where the file is, or should be."""
    return project.home / NAME


def read_about(project: Project, *needed: str, what: str = "") -> About:
    """The file of a project; an empty one if there is none and nothing is needed.

    Raises
    ------
    ProjectFileError
        If entries that ``what`` needs are missing, or it is not valid.
    """
    path = path_of(project)
    content = read_yaml(path, "description of a session") if path.exists() else {}
    try:
        about = About.model_validate(content or {})
    except ValidationError as error:
        first = error.errors()[0]
        raise ProjectFileError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}.", "", "fix it and rerun") from None
    if lacking := about.missing(*needed):
        raise ProjectFileError(
            f"{what} needs {', '.join(lacking)}, which {path} does not give.",
            "no file of the session says it",
            f"write it into {path}, such as:{EXAMPLE}",
        )
    return about
