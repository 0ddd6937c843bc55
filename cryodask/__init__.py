"""cryodask: cryo-EM from movies to maps on Dask.

``open(path)`` gives a finished or growing project, ``connect()`` a Dask client with workers, ``run_project(path)`` carries out a
project file, ``cryodask.stages`` holds the stages as functions on xarray Datasets.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Client

    from cryodask.store.project import Project

__version__ = "0.1.0"
__all__ = ["connect", "open", "run_project"]


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
    return Project(folder)


def connect(where: str | os.PathLike[str] = "local", **options: Any) -> Client:
    """Start or find workers; see :func:`cryodask.cluster.connect.connect`."""
    from cryodask.cluster.connect import connect as connect_

    return connect_(where, **options)


def run_project(path: str | os.PathLike[str], client: Client | None = None, **options: Any) -> Project:
    """Carry out a project file; see :func:`cryodask.run.execute.run_plan` for the options."""
    from cryodask.cluster.connect import close
    from cryodask.run.checks import Asked
    from cryodask.run.execute import check_inputs, run_plan
    from cryodask.run.recipe import make_plan

    plan = make_plan(os.fspath(path))
    # the workers of a client are there already: what the project file says of a cluster does not count
    check_inputs(plan, asked=Asked(cluster=str(client.scheduler_info()["address"])) if client else None)
    own = client is None
    client = client or connect(plan.cluster, workers=plan.file.workers)
    try:
        return run_plan(plan, client, **options)
    finally:
        if own:
            close(client)
