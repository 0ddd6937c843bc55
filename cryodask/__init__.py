"""cryodask: cryo-EM from movies to maps on Dask.

``open(path)`` opens a finished or growing project, ``connect()`` returns a Dask client with workers, ``run_project(path)`` runs a
project file, and ``cryodask.stages`` holds the stages as functions on xarray Datasets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from cryodask.version import VERSION

if TYPE_CHECKING:
    from distributed import Client

    from cryodask.store.project import Project
    from cryodask.web.widget import PickWidget

__version__ = VERSION
__all__ = ["connect", "open", "pick_widget", "run_project"]


def open(path: str | os.PathLike[str]) -> Project:
    """Open a project: its folder, or its project file.

    Examples
    --------
    >>> project = cryodask.open("betagal")            # doctest: +SKIP
    >>> project["ctf"].defocus_u_angstrom.mean()      # doctest: +SKIP
    """
    from cryodask.store.project import Project

    folder = os.fspath(path)
    if folder.endswith((".yaml", ".yml")):
        from cryodask.run.recipe import project_folder

        folder = os.fspath(project_folder(folder))
    # workers that read lazy Datasets may have another working directory
    return Project(os.path.abspath(folder))


def connect(where: str | os.PathLike[str] = "local", **options: Any) -> Client:
    """Start or find workers; see :func:`cryodask.cluster.connect.connect`."""
    from cryodask.cluster.connect import connect as connect_

    return connect_(where, **options)


def pick_widget(project: Project | str | os.PathLike[str], exposure: str | int) -> PickWidget:
    """Edit the picks of an exposure in a notebook, on the same page as in the dashboard.

    Parameters
    ----------
    project : Project or path
    exposure : str or int
        Its name, or its row.

    Returns
    -------
    PickWidget
        Shown by the notebook; ``widget.freeze()`` is the button "Use these picks". Needs the package ``anywidget``.

    Raises
    ------
    InputError
        If there is no such exposure.
    """
    from cryodask.web.widget import PickWidget

    folder = open(project).path if isinstance(project, str | os.PathLike) else project.path
    return PickWidget(folder, exposure)


def run_project(
    path: str | os.PathLike[str], client: Client | None = None, *, listen: Iterable[Callable[[Any], None]] | None = None, **wanted: Any
) -> Project:
    """Run a project file, as ``cryodask run`` does; finished results are kept.

    Parameters
    ----------
    path : path of the project file
    client : distributed.Client, optional
        Workers to use; by default those that the project file names.
    listen : iterable of callables, optional
        Called with every event of the run (:mod:`cryodask.run.events`); by default, lines and bars on standard output.
    **wanted
        ``until, start_again_from, only, update, watch, force, retry_quarantined, strict, same_environment, cluster,
        workers, lane``: see
        :class:`cryodask.run.selection.Wanted`.

    Raises
    ------
    CryodaskError
        Whatever stops a run. Everything committed before stays, and the same call resumes from there.
    """
    from cryodask.run.events.progress import Terminal
    from cryodask.run.selection import Wanted
    from cryodask.run.session import run_session

    return run_session(path, Wanted(**wanted), client=client, listen=[Terminal()] if listen is None else listen)
