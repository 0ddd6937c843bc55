"""Commands that run a project and follow a run: ``run`` and ``watch``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cryodask.cli_history import ProjectArgument, open_project
from cryodask.errors import ProjectFileError, Stopped

if TYPE_CHECKING:
    from cryodask.run.selection import Wanted


def run(
    project: Annotated[Path, typer.Argument(metavar="PROJECT.yaml", help="Project file.")],
    until: Annotated[str | None, typer.Option(metavar="STEP", help="Stop after this step.")] = None,
    from_: Annotated[str | None, typer.Option("--from", metavar="STEP", help="Recompute this step and all later ones.")] = None,
    only: Annotated[str | None, typer.Option(metavar="STEP", help="Run this step and nothing else.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, and show what would be computed and why.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every event of the run as a line of JSON; with --dry-run, what it shows.")
    ] = False,
    update: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP", help="Recompute a step that an older version of its stage computed; may be repeated."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Take the project over from another driver, which then stops.")] = False,
    retry_quarantined: Annotated[bool, typer.Option("--retry-quarantined", help="Try quarantined micrographs again.")] = False,
    workers: Annotated[int | None, typer.Option(help="Local worker processes; by default one per core.", min=1)] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Process movies as they arrive, newest first.")] = False,
    until_idle: Annotated[
        float | None, typer.Option(metavar="MINUTES", help="End --watch when nothing has arrived for this long.", min=0)
    ] = None,
    until_movies: Annotated[int | None, typer.Option(metavar="N", help="End --watch when this many movies have arrived.", min=1)] = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="A running cluster or a cluster file; overrides the project file.")
    ] = None,
    lane: Annotated[str | None, typer.Option(help="Lane of the run's tasks; by default live with --watch, else batch.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with status 1 if exposures are quarantined.")] = False,
    same_environment: Annotated[
        bool, typer.Option("--same-environment", help="Refuse to add to results that were computed with other versions.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show every exposure and iteration.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")] = False,
) -> None:
    """Run a project file. Finished results are kept, so the same command also resumes.

    Ctrl-C, or a file called stop in the results, lets the exposures in flight finish and starts nothing else.

    Exit status: 0 done, or waiting for a person; 1 with --strict, exposures are quarantined; 2 the project file, an input or an option is
    wrong; 3 the cluster is gone or has no workers; 4 the project's disk is full or cannot be written; 5 another driver took the project
    over; 130 stopped by a person.
    """
    if not watch and (until_idle is not None or until_movies is not None):
        raise ProjectFileError("--until-idle and --until-movies need --watch.", "", "add --watch")
    from cryodask.run.selection import Wanted
    from cryodask.run.watch import Until

    ends = Until(idle_seconds=None if until_idle is None else 60 * until_idle, movies=until_movies)
    wanted = Wanted(
        until=until,
        start_again_from=from_,
        only=only,
        update=tuple(update or ()),
        watch=ends if watch else None,
        force=force,
        retry_quarantined=retry_quarantined,
        strict=strict,
        same_environment=same_environment,
        cluster=cluster,
        workers=workers,
        lane=lane,
    )
    if dry_run:
        _dry_run(project, wanted, as_json=as_json)
        return
    from cryodask.run.events.progress import JsonLines, Terminal
    from cryodask.run.session import run_session

    try:
        run_session(project, wanted, listen=[JsonLines() if as_json else Terminal(verbosity=verbose - quiet)])
    except (KeyboardInterrupt, Stopped) as error:
        what = error.what if isinstance(error, Stopped) else "\nStopped. Finished results are kept."
        typer.echo(f"{what} Resume with:\n  cryodask run {project}", err=True)
        raise typer.Exit(130) from None


def _dry_run(project: Path, wanted: Wanted, *, as_json: bool) -> None:
    from cryodask.run.preview import lines, preview
    from cryodask.run.recipe import draft_plan

    try:
        plan = draft_plan(project)
    except ProjectFileError as error:
        if not as_json:
            raise
        typer.echo(json.dumps({"steps": [], "problems": [error.problem], "warnings": []}))
        raise typer.Exit(2) from None
    shown = preview(plan, wanted)
    if as_json:
        typer.echo(shown.as_json())
    else:
        typer.echo(f"{plan.file.name} -> {plan.folder}")
        for line in lines(plan, shown):
            typer.echo(line)
    if shown.problems:
        raise typer.Exit(2)


def watch(
    project: ProjectArgument,
    last: Annotated[int, typer.Option(metavar="N", help="Show this many earlier events first.", min=0)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print every event as a line of JSON.")] = False,
) -> None:
    """Follow a run from another terminal until it ends. Ctrl-C does not affect the run."""
    from cryodask.run.events.log import follow
    from cryodask.run.events.progress import JsonLines, text_of
    from cryodask.run.events.status import status_sentence

    folder = open_project(project).path
    show = JsonLines()
    told = ""
    try:
        for event in follow(folder, last):
            if event is None:  # nothing new: is the driver still alive?
                doing = status_sentence(folder)
                if doing.startswith(("its process is gone", "no sign of life")) and doing != told:
                    told = doing
                    typer.echo(doing, err=True)
                time.sleep(0.2)
            elif as_json:
                show(event)
            elif text := text_of(event, every_exposure=True):
                typer.echo(f"{time.strftime('%H:%M:%S', time.localtime(event.time))}  {text}")
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
