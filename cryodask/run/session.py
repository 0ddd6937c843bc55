"""The session function behind the command line, ``cryodask.run_project``, the demo, batch jobs and services.

It checks everything that can be checked, takes the project's lock, finds workers, runs the steps and writes the report, emitting events
all the while (see events.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed import Client

from cryodask.cluster.connect import close, connect
from cryodask.errors import ProjectFileError, Quarantined
from cryodask.report import update_report
from cryodask.run import gains, sources
from cryodask.run.checks import look_ahead
from cryodask.run.events import Events, Listener, RunStarted, whereabouts
from cryodask.run.events.log import EventLog
from cryodask.run.events.progress import LogFile
from cryodask.run.events.reports import Reports
from cryodask.run.events.status import StatusFile
from cryodask.run.execute import Execution
from cryodask.run.recipe import Plan, broken_links, list_movies, make_plan
from cryodask.run.selection import Wanted
from cryodask.run.started import Started
from cryodask.run.stopping import Stop, forget
from cryodask.run.workers import Workers
from cryodask.store.files import disk_errors, write_atomically
from cryodask.store.project import Project
from cryodask.version import VERSION


def run_session(
    project_file: str | os.PathLike[str], wanted: Wanted | None = None, *, client: Client | None = None, listen: Iterable[Listener] = ()
) -> Project:
    """Run a project file. Finished results are kept, so the same call also resumes.

    Parameters
    ----------
    project_file : path
    wanted : Wanted, optional
        Which steps, what to recompute, and which workers.
    client : distributed.Client, optional
        Workers to use; by default those that the project file names are found or started, and left when the run ends.
    listen : iterable of callables
        Called with every event of the run.

    Raises
    ------
    CryodaskError
        Whatever stops a run; everything committed before stays. ``errors.exit_status`` gives the exit status of the command line.
    """
    wanted = wanted or Wanted()
    with Events(listen) as events:
        plan = make_plan(Path(project_file))
        wanted.check(plan)
        if client is not None:  # the workers exist already: the cluster in the project file is ignored
            wanted = replace(wanted, cluster=str(client.scheduler_info()["address"]))
        warnings = check_inputs(plan, wanted)
        with _driving(plan, wanted, events) as project:
            for warning in (*plan.graph.warnings, *warnings):
                events.say(f"warning: {warning}")
            with _workers(plan, wanted, client) as workers:
                _execute(plan, project, workers, events, wanted)
            events.say(f"Report: {update_report(project)}")
            failures = project.failures()
            if wanted.strict and failures:
                many = f"{len(failures)} exposures are" if len(failures) > 1 else "1 exposure is"
                raise Quarantined(
                    f"{many} quarantined.",
                    "",
                    f"see which and why with  cryodask info {plan.folder}",
                )
    return project


def run_plan(plan: Plan, client: Client, *, listen: Iterable[Listener] = (), **wanted: Any) -> Project:
    """Run a plan on the workers of a client, without prior checks and without a report; options as in :class:`Wanted`.

    Raises
    ------
    CryodaskError
        Whatever stops a run; everything committed before stays, and the same call resumes from there.
    """
    asked = Wanted(**wanted)
    asked.check(plan)
    with Events(listen) as events, _driving(plan, asked, events) as project, Workers(lambda: client) as workers:
        _execute(plan, project, workers, events, asked)
    return project


def _execute(plan: Plan, project: Project, workers: Workers, events: Events, wanted: Wanted) -> None:
    with Stop(plan.folder).by_interrupt() as stop, Reports(events) as reports:
        Execution(plan, project, workers, events, wanted, stop, reports).run()


@contextmanager
def _driving(plan: Plan, wanted: Wanted, events: Events) -> Iterator[Project]:
    """Context manager: within, this process is the driver of the project and logs its events there."""
    with Project.create(plan.folder, plan.file.name).lock(force=wanted.force):
        project = Project(plan.folder)  # in the state the previous driver left
        with disk_errors(project.path):
            write_atomically(project.path / "project.yaml", plan.path.read_bytes())
        folder = project.path
        forget(folder)
        _started(plan, wanted).write(folder)
        events.join(EventLog(folder, events.run), StatusFile(folder), LogFile(folder, events.run))
        events.emit(
            RunStarted,
            project=plan.file.name,
            folder=str(plan.folder),
            inputs=_inputs_text(plan, watch=wanted.watch is not None),
            steps=[step.label for step in wanted.steps(plan)],
            version=VERSION,
            **whereabouts(),
        )
        try:
            yield project
        except BaseException as error:
            events.end(error)  # while this process still holds the lock
            raise
        events.end(None)


def _started(plan: Plan, wanted: Wanted) -> Started:
    """How to start this run again: a cluster that has a name or a file is asked for again, a scheduler that has an address is not."""
    cluster = wanted.cluster
    if cluster and ("://" in cluster or not Path(cluster).suffix):
        cluster = None if "://" in cluster else cluster
    elif cluster:
        cluster = str(Path(cluster).absolute())
    return Started(plan.path, wanted.words, wanted.watch is not None, cluster, wanted.lane)


def _workers(plan: Plan, wanted: Wanted, client: Client | None) -> Workers:
    """The workers: those of a given client, or of a cluster that is left at the end."""
    if client is not None:
        return Workers(lambda: client)
    lane = wanted.lane or ("live" if wanted.watch is not None else "batch")
    where, number = wanted.cluster or plan.cluster, wanted.workers or plan.file.workers
    return Workers(lambda: connect(where, workers=number, lane=lane, project=plan.file.name), close)


def _inputs_text(plan: Plan, *, watch: bool) -> str:
    if watch:
        return f"movies {', '.join(str(d.movies) for d in plan.data_sets.values())} as they arrive"
    if not plan.has_movies:
        return "inputs from another program"
    return f"{sum(len(list_movies(plan, name, needed=False)) for name in plan.data_sets)} movies"


def check_inputs(plan: Plan, wanted: Wanted | None = None) -> list[str]:
    """Check folder, lock, inputs, gain, reference and cluster before any worker is started; returns warnings.

    Movies of a watched session are not checked yet.

    Raises
    ------
    CryodaskError
    """
    wanted = wanted or Wanted()
    watch = wanted.watch is not None
    if watch and not plan.has_movies:
        raise ProjectFileError("--watch needs movies.", f"{plan.path} starts from another program's results", "run it without --watch")
    gains.check_gain_files(plan)
    sources.check_files(plan)
    project = Project.create(plan.folder, plan.file.name)
    with project.lock(force=wanted.force):
        pass  # refused now if another driver is working or the folder is read-only
    listing = [] if watch else sources.list_exposures(plan, project)
    sources.check_readable(plan, listing, project)
    ahead = look_ahead(plan, project, listing, wanted.asked)
    if ahead.problems:
        raise ProjectFileError(f"{plan.path}: " + "\n".join(ahead.problems), "", "see the rest with  cryodask run --dry-run")
    return [*ahead.warnings, *([] if watch else broken_links(plan))]
