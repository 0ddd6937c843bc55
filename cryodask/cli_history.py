"""Commands about what a project has computed: its results, single particles, and exposures that were excluded on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

ProjectArgument = Annotated[Path, typer.Argument(metavar="PROJECT", help="Project file (.yaml) or the folder with its results.")]


def open_project(path: Path) -> Any:
    """Open the project in a folder or that of a project file."""
    from cryodask.run.recipe import project_folder
    from cryodask.store.project import Project

    return Project(project_folder(path))


def gc(
    project: ProjectArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    last_results: Annotated[
        bool, typer.Option("--last-results", help="Also remove the last finished result of steps whose current one is unfinished.")
    ] = False,
) -> None:
    """Remove results that no step uses any more. Named results and each step's last finished one stay, with all that they depend on."""
    from cryodask.store.garbage import listed

    opened = open_project(project)
    if dry_run:
        for line in listed(opened.superseded(last_results=last_results)):
            typer.echo(f"would remove {line}")
        return
    with opened.lock():
        opened = open_project(project)  # in the state the previous driver left
        for line in listed(opened.superseded(last_results=last_results)):
            typer.echo(f"removing {line}")
        typer.echo(f"{opened.collect_garbage(last_results=last_results) / 1e6:.1f} MB freed")


def history(
    project: ProjectArgument,
    step: Annotated[str | None, typer.Argument(metavar="STEP", help="Only results of this step.")] = None,
) -> None:
    """List every result that was computed: when, from what, its figures, and its name."""
    from datetime import datetime

    for made in open_project(project).history(step):
        when = datetime.fromtimestamp(made.created).strftime("%Y-%m-%d %H:%M")
        state = ", ".join(made.steps) if made.steps else "superseded"
        figures = ", ".join(f"{n.replace('_', ' ')} {v:.4g}" for n, v in made.figures.items())
        inputs = ", ".join(f"{port} of {' + '.join(refs)}" for port, refs in made.inputs.items() if refs)
        name = f'  "{made.name}"' if made.name else ""
        per_exposure = f"{made.items} exposures" + ("" if made.finished else ", unfinished")
        done = per_exposure if made.per_exposure else "done" if made.finished else "unfinished"
        typer.echo(f"{made.stage}@{made.key}  {when}  {state}  {done}  {figures}{name}")
        typer.echo(f"    from {inputs or 'the inputs'}; {made.params}")


def keep(
    project: ProjectArgument,
    which: Annotated[str, typer.Argument(metavar="STEP[@KEY]", help="A result; without @KEY the current one of the step.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name; an empty string removes the name.")],
) -> None:
    """Name a result, so that gc keeps it and all that it depends on."""
    opened = open_project(project)
    with opened.lock():
        place = open_project(project).keep(which, name).replace("/", "@")
    typer.echo(f"{place} is kept as {name.strip()!r}" if name.strip() else f"{place} no longer has a name")


def compare(
    project: ProjectArgument,
    first: Annotated[str, typer.Argument(metavar="STEP[@KEY]", help="A result, or its name.")],
    second: Annotated[str, typer.Argument(metavar="STEP[@KEY]")],
    plot: Annotated[Path | None, typer.Option(help="Save the FSC curves of both in one plot (PNG, SVG).")] = None,
) -> None:
    """Show the parameters, inputs and figures in which two results differ, and their FSC curves in one plot."""
    opened = open_project(project)
    table = opened.compare(first, second)
    typer.echo(table.to_string() if len(table) else f"{first} and {second} do not differ: parameters, inputs and figures are the same.")
    if plot is not None:
        from cryodask.report import plot_curves

        typer.echo(f"FSC curves: {plot_curves(opened, plot, first, second)}")


def forget(
    project: ProjectArgument,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Exposures, by name.")],
    undo: Annotated[bool, typer.Option("--undo", help="Include them again.")] = False,
) -> None:
    """Exclude exposures from a project. Their results stay, and --undo brings them back."""
    opened = open_project(project)
    with opened.lock():
        changed = open_project(project).forget_exposures(names, undo=undo)
    typer.echo(f"{len(changed)} exposures {'included again' if undo else 'excluded from now on'}")


def where(
    project: ProjectArgument,
    particle: Annotated[str, typer.Argument(metavar="ID", help="birth.row.number, or the integer particle_id.")],
) -> None:
    """Follow one particle through all steps."""
    for step, sentence in open_project(project).where(particle):
        typer.echo(f"{step:<18} {sentence}" if step else sentence)
