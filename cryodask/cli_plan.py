"""Commands ``plan`` and ``blueprint``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

blueprint = typer.Typer(help="A facility in one file: cluster, folders, lanes and sessions.", no_args_is_help=True, rich_markup_mode=None)

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="Blueprint (.yaml, see configs/blueprints).")]
ProfileOption = Annotated[str | None, typer.Option(metavar="NAME", help="A profile of the blueprint, for example test.")]
FolderOption = Annotated[Path, typer.Option(metavar="DIR", help="Base of the blueprint's relative folders.")]


def plan(
    microscopes: Annotated[int, typer.Option(help="Microscopes that record at the same time.", min=1)] = 1,
    movies_per_hour: Annotated[float, typer.Option(help="Movies per hour and microscope.")] = 300.0,
    blueprint: Annotated[str, typer.Option(help="preprocessing, image-analysis or mixed.")] = "mixed",
    camera: Annotated[str, typer.Option(help="k2, k3, k3-super or falcon.")] = "k3",
    megapixels: Annotated[float | None, typer.Option(help="Megapixels per frame, instead of a camera.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames per movie.")] = None,
    compression: Annotated[str, typer.Option(help="Compression of the camera's files: lzw, or none (one byte per count).")] = "lzw",
    movie_megabytes: Annotated[float | None, typer.Option(help="Size of a movie file, if you know it.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Read movies in place instead of copying them into the project.")] = False,
    particles: Annotated[int | None, typer.Option(help="Particles per micrograph.")] = None,
    box: Annotated[int | None, typer.Option(help="Box size in the micrograph, pixels.")] = None,
    scale_to: Annotated[int | None, typer.Option(help="Box size of the stored images, pixels; by default half the box.")] = None,
    repeats: Annotated[int, typer.Option(help="How often each particle goes through 2D classification and refinement.")] = 2,
    sorted_share: Annotated[float, typer.Option(help="Fraction of the particles that is refined.")] = 0.5,
    hours_per_day: Annotated[float, typer.Option(help="Hours of recording per day.")] = 24.0,
    days_raw: Annotated[float, typer.Option(help="Days for which movies are kept.")] = 14.0,
    days_results: Annotated[float, typer.Option(help="Days for which results are kept.")] = 30.0,
    from_: Annotated[
        Path | None, typer.Option("--from", metavar="PROJECT", help="Use the seconds and bytes measured in this project.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate the cores, memory, disks and network that a facility's load needs, and list the assumptions."""
    from cryodask.costs import Load, measured_costs
    from cryodask.plan import costs_of_project, plan_facility

    costs, known = costs_of_project(from_) if from_ else (measured_costs(), {})
    said: dict[str, Any] = {
        "megapixels": megapixels,
        "frames": frames,
        "movie_megabytes": movie_megabytes,
        "particles": particles,
        "box": box,
        "scale_to": scale_to or ((box + box % 4) // 2 if box else None),
    }
    load = Load(
        microscopes=microscopes,
        movies_per_hour=movies_per_hour,
        hours_per_day=hours_per_day,
        camera=camera,
        compression=compression,
        in_place=in_place,
        sorted_share=sorted_share,
        repeats=repeats,
        days_raw=days_raw,
        days_results=days_results,
        **known | {name: value for name, value in said.items() if value is not None},
    )
    made = plan_facility(load, blueprint, costs)
    if as_json:
        typer.echo(json.dumps(made.as_json(), indent=1))
        return
    what = (
        f"{microscopes} x {movies_per_hour:g} movies per hour"
        if blueprint != "image-analysis"
        else f"particles of {microscopes} x {movies_per_hour:g} movies per hour"
    )
    typer.echo(f"{blueprint}: {what}\n")
    _table(("needed", "", "why"), [(n.name, f"{_short(n.value)} {n.unit}".strip(), n.why) for n in made.needs])
    typer.echo("\nAssumptions:\n")
    _table(("assumed", "", "source"), [(a.name, a.value, a.source) for a in made.assumptions])


@blueprint.command()
def check(file: FileArgument, profile: ProfileOption = None, folder: FolderOption = Path(".")) -> None:
    """Check a blueprint and show what starting it would do: folders, lanes, sessions, and every job script."""
    from cryodask.blueprints import check as checked
    from cryodask.blueprints import read_blueprint

    made = read_blueprint(file, profile, folder)
    typer.echo(f"{made.name}: {made.about}")
    for line in checked(made):
        typer.echo(line)


@blueprint.command()
def start(file: FileArgument, profile: ProfileOption = None, folder: FolderOption = Path(".")) -> None:
    """Create the folders, start the cluster, invite the people, and submit the sessions."""
    from cryodask.blueprints import read_blueprint
    from cryodask.blueprints import start as started

    made = started(read_blueprint(file, profile, folder))
    typer.echo(f"The cluster {made.service.name} is running at {made.service.address}.")
    for person, path in made.invitations.items():
        typer.echo(f"invitation for {person}: {path}")
    for name, run in made.runs.items():
        typer.echo(f"{name}: {run}")
    typer.echo(f"status:  cryodask cluster status {made.service.name}\nstop:    cryodask cluster stop {made.service.name}")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(head))
    for title in head:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
