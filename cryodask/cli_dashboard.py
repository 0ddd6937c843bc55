"""``cryodask dashboard``, ``cryodask facility`` and ``cryodask password``: the pages of projects in a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cryodask.errors import CryodaskError, ProjectFileError

facility_app = typer.Typer(name="facility", help="The set-up of a facility's server.", no_args_is_help=True, rich_markup_mode=None)


def dashboard(
    projects: Annotated[
        list[Path] | None, typer.Argument(metavar="PROJECT...", help="Projects, or folders that contain projects.", show_default=False)
    ] = None,
    facility: Annotated[Path | None, typer.Option(metavar="FACILITY.yaml", help="Serve a facility, with log-in and roles.")] = None,
    port: Annotated[int, typer.Option(help="Port on this machine; 0: any free one.", min=0, max=65535)] = 0,
    token: Annotated[str | None, typer.Option(help="Token in the address; by default a new one.")] = None,
    prefix: Annotated[str, typer.Option(help="Path that a proxy in front of the server passes on, such as /node/c01/8801.")] = "",
) -> None:
    """Show projects in a browser, live: exposures, trends, classes, maps, history.

    Only this machine can reach the address that is printed; the token in it keeps other users of this machine out.
    """
    from cryodask.run.recipe import project_folder

    try:
        from cryodask.web import serving
    except ModuleNotFoundError as error:
        raise CryodaskError(
            f"The dashboard needs a package that is not installed: {error}.",
            "cryodask was installed without the extra for it",
            'pip install "cryodask[facility]"',
        ) from error
    if facility is not None:
        if projects or port or token or prefix:
            raise ProjectFileError("The facility file states what is shown and where; options cannot.", "", "remove the other arguments")
        serving.serve_facility(facility, say=typer.echo)
        return
    serving.serve_own([project_folder(path) for path in projects or [Path()]], port=port, token=token, prefix=prefix, say=typer.echo)


@facility_app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FACILITY.yaml", help="Facility file.")] = Path("facility.yaml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Test a site's set-up: permissions, clocks, file systems, space, port, certificate, log-in, Slurm. The exit status is 2 on problems.

    Run it as the account of the server, on its host.
    """
    from cryodask.web.checking import check_facility

    found = []
    for finding in check_facility(file):
        found.append(finding)
        if not as_json:
            typer.echo(str(finding))
    problems = sum(finding.state == "problem" for finding in found)
    if as_json:
        typer.echo(json.dumps([finding.described() for finding in found], indent=1))
    else:
        typer.echo(f"{problems} problem{'s' if problems != 1 else ''}." if problems else "Everything is as the server needs it.")
    if problems:
        raise typer.Exit(2)


# a group with one command would otherwise be taken for that command
@facility_app.callback()
def facility_options() -> None:
    """The set-up of a facility's server."""


def password(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Password file of a facility; made if there is none.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Log-in name.")],
    password: Annotated[str, typer.Option(prompt=True, hide_input=True, confirmation_prompt=True, help="By default asked for.")],
) -> None:
    """Add a person to the password file of a facility, or change the password."""
    from cryodask.web.passwords import PasswordFile

    PasswordFile(file).write(name, password)
    typer.echo(f"The password of {name} is set in {file}.")
