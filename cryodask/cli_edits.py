"""Commands about edits that people make by eye: what they are, which of them runs use, and picks as STAR files."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cryodask.cli_history import ProjectArgument, open_project

if TYPE_CHECKING:
    from cryodask.edits.board import Board

app = typer.Typer(
    name="edits",
    help="Edits made by eye: picks, chosen classes, excluded exposures, masks, regions of components.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


_COUNTED = {"masks": "strokes", "regions": "regions"}
"""Kinds whose state is a mapping, and what of it is counted."""
_ONE_OF = {"masks": "drawn stroke", "regions": "region"}


class Kind(StrEnum):
    """What is edited."""

    picks = "picks"
    classes = "classes"
    exposures = "exposures"
    masks = "masks"
    regions = "regions"


def _board(project: Path) -> Board:
    from cryodask.edits.board import Board

    return Board(open_project(project).path)


def _several(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "es" if what.endswith("s") else "s")


def _who() -> str:
    from getpass import getuser

    return getuser()


@app.command()
def show(project: ProjectArgument) -> None:
    """Show how many edits there are, and which state runs use. The exit status is 1 if the disk has lost some of them."""
    from cryodask.edits.frozen import latest, state_of

    board = _board(project)
    subjects = [
        ("picks", "", "exposure", "with edited picks"),
        *(("classes", place, "kept class", f"of {label}") for label, place in board.classifications().items()),
    ]
    masks = [("masks", place, "drawn stroke", f"on {label}") for label, place in board.maps().items()]
    regions = [("regions", place, "region", f"of {label}") for label, place in board.analyses().items()]
    for kind, of, what, how in (*subjects, ("exposures", "", "exposure", "excluded"), *masks, *regions):
        log = board.log(kind)
        state, used = state_of(log, of), latest(log, of)
        count = len(state[_COUNTED[kind]] if kind in _COUNTED else state)
        by = (
            f"runs use those frozen by {used.who} on {time.strftime('%Y-%m-%d %H:%M', time.localtime(used.time))}"
            if used
            else "nothing frozen"
        )
        newer = "; edited since" if used is not None and used.content != state else ""
        typer.echo(f"{kind:<10} {_several(count, what)} {how}; {by}{newer}")
    damaged = [f"edits/{kind.value}/{line}" for kind in Kind for line in board.log(kind.value).damaged()]
    for line in damaged:
        typer.echo(f"{line}: damaged, it cannot be read; restore the file from a back-up, or repeat the edit")
    if damaged:
        raise typer.Exit(1)


@app.command()
def freeze(
    project: ProjectArgument,
    kind: Annotated[Kind, typer.Argument(metavar="picks|classes|exposures|masks|regions", help="What to use.")],
    of: Annotated[
        str,
        typer.Option(
            metavar="STEP",
            help="The step with the classes, the map of the mask, or the components of the regions; by default the last one.",
        ),
    ] = "",
) -> None:
    """Use the edits as they are now: the next run applies them, also one that is waiting for them."""
    from cryodask.edits.frozen import freeze as freeze_log
    from cryodask.errors import InputError

    board = _board(project)
    place = board.classification(of)[0] if kind is Kind.classes else ""
    if kind in (Kind.masks, Kind.regions):
        what, known = ("map", board.maps()) if kind is Kind.masks else ("analysis of variability", board.analyses())
        place = known.get(of, of if of in known.values() else "") if of else next(iter(known.values()), "")
        if not place:
            raise InputError(f"{board.project().name} has no {what}{f' {of}' if of else ''}.", "", "run it until a step gives one first")
    if kind is Kind.classes and not place:
        raise InputError(
            f"{board.project().name} has no classes{f' of {of}' if of else ''} to choose from.", "", "run it until classify2d first"
        )
    made = freeze_log(board.log(kind.value), _who(), place)
    counted = _COUNTED.get(kind.value, "")
    count = _several(len(made.content[counted]), _ONE_OF[kind.value]) if counted else str(len(made.content))
    typer.echo(f"{kind.value}: {count} frozen as {made.digest}. The next run uses them.")


@app.command()
def export(project: ProjectArgument, folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for NAME.star files.")]) -> None:
    """Write the edited picks as coordinate STAR files."""
    from cryodask.interop.edited_picks import export_picks

    typer.echo(f"Wrote {len(export_picks(_board(project), folder))} files to {folder}.")


@app.command("import")
def import_(
    project: ProjectArgument, folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of NAME.star files.", exists=True)]
) -> None:
    """Edit the picks until they are those of coordinate STAR files, for example as edited in another program."""
    from cryodask.interop.edited_picks import import_edits

    counts = import_edits(_board(project), folder, _who())
    edited = [count for count in counts.values() if count]
    if edited:
        made = f"{_several(sum(edited), 'edit')} in {_several(len(edited), 'exposure')}"
        typer.echo(f"{made}. To use them:  cryodask edits freeze {project} picks")
    else:
        typer.echo(f"The picks of {_several(len(counts), 'exposure')} are already those of the files: nothing was edited.")
