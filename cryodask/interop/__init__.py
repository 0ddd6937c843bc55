"""Exchange with other programs: projects for RELION, and project files from other programs' results."""

from __future__ import annotations

import inspect
from pathlib import Path

from cryodask.errors import ProjectFileError
from cryodask.interop.component_series import export_components
from cryodask.interop.cryosparc import export_cryosparc
from cryodask.interop.emdb import export_emdb
from cryodask.interop.empiar import export_empiar
from cryodask.interop.oscem import export_oscem
from cryodask.interop.refined_optics import ExportWarning
from cryodask.interop.relion import export_relion
from cryodask.interop.start import Session, project_from, project_from_movies
from cryodask.plugins import Plugins
from cryodask.store.project import Project

__all__ = ["OTHERS", "ExportWarning", "Session", "export", "export_cryosparc", "export_relion", "project_from", "project_from_movies"]

_OWN = {
    "relion": export_relion,
    "cryosparc": export_cryosparc,
    "emdb": export_emdb,
    "empiar": export_empiar,
    "oscem": export_oscem,
    "components": export_components,
}


def _refused(name: str, exporter: object) -> str:
    """Why an exporter of another package cannot be used; empty if it can."""
    if name in _OWN or not callable(exporter):
        return (
            f"the name {name} is used by cryodask itself"
            if name in _OWN
            else f"it is a {type(exporter).__name__}, not a function (project, folder)"
        )
    try:
        inspect.signature(exporter).bind("project", "folder")
    except TypeError as error:
        return f"it is called as {name}(project, folder): {error}"
    return ""


OTHERS = Plugins("cryodask.exporters", _refused)
"""Exporters of other packages, by program."""


def export(project: Project, name: str, folder: str | Path) -> list[Path]:
    """Export a project to another program; return the paths written.

    Parameters
    ----------
    name : str
        ``relion``, ``cryosparc``, ``emdb``, ``empiar``, ``oscem``, ``components``, or the name of an exporter of another package (entry
        points of the group ``cryodask.exporters``).

    Raises
    ------
    ProjectFileError
        There is no such exporter.
    """
    if name in _OWN:
        return _OWN[name](project, folder)
    known = OTHERS.load()
    if name not in known:
        raise ProjectFileError(
            f"There is no exporter {name!r}.{OTHERS.hint(name)}", "", f"use one of these: {', '.join([*_OWN, *sorted(known)])}"
        )
    return [Path(path) for path in known[name](project, Path(folder))]
