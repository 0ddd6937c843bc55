"""Commands about where data are: archive, restore, thinning, hand-over, and what goes when."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryodask.cli_history import ProjectArgument

RowsOption = Annotated[str | None, typer.Option("--rows", metavar="ROWS", help="Only files of these exposures, such as 0-4,7.")]
FacilityOption = Annotated[
    Path | None, typer.Option("--facility", metavar="FILE", help="Facility file with a section `storage`; by default the built-in policy.")
]


def archive(
    project: ProjectArgument,
    to: Annotated[str, typer.Option("--to", metavar="PLACE", help="A folder, or s3://BUCKET/PREFIX.")],
    categories: Annotated[
        str, typer.Option("--categories", help="originals, shards, micrographs, particles, maps; separated by commas.")
    ] = "originals",
    rows: RowsOption = None,
    keep: Annotated[bool, typer.Option("--keep", help="Copy and verify only; nothing is removed here.")] = False,
) -> None:
    """Move files into an archive. A file is removed only after its copy was read back; it stays in .trash for another 24 hours."""
    from cryodask.run.recipe import project_folder
    from cryodask.tiers.archive import archive as run
    from cryodask.tiers.inventory import parse_categories, parse_rows
    from cryodask.tiers.policy import size_text

    wanted, some = parse_categories(categories, ()), parse_rows(rows)
    done = run(project_folder(project), to, wanted, remove=not keep, rows=some, say=typer.echo)
    if done.deleted:
        typer.echo(f"{done.deleted} files deleted that were removed more than 24 hours ago")
    if keep:
        typer.echo(f"{done.kept} files ({size_text(done.bytes)}) copied to {to} and verified")
    else:
        typer.echo(f"{done.removed} files ({size_text(done.bytes)}) verified in {to} and removed here; they are in .trash for 24 hours")
    if done.problems:
        typer.echo(f"{len(done.problems)} files stay because of a problem.")
        raise typer.Exit(1)


def restore(
    project: ProjectArgument,
    what: Annotated[str | None, typer.Option("--what", help="Categories, separated by commas; by default all.")] = None,
    rows: RowsOption = None,
    source: Annotated[str | None, typer.Option("--from", metavar="PLACE", help="Where the archive is now, if it has moved.")] = None,
) -> None:
    """Bring archived files back, with the same bytes. Nothing is recomputed because of it."""
    from cryodask.run.recipe import project_folder
    from cryodask.tiers.archive import restore as run
    from cryodask.tiers.inventory import parse_categories, parse_rows
    from cryodask.tiers.policy import size_text

    wanted = parse_categories(what, ()) if what is not None else None
    done = run(project_folder(project), wanted, rows=parse_rows(rows), source=source, say=typer.echo)
    typer.echo(f"{done.files} files ({size_text(done.bytes)}) restored")
    if done.problems:
        raise typer.Exit(1)


def thin(
    project: ProjectArgument,
    step: Annotated[str, typer.Argument(metavar="STEP", help="A step that gives images by exposure: ingest, motion, extract.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be freed.")] = False,
) -> None:
    """Delete images of a step that can be computed again. A step that needs them recomputes and checks them."""
    from cryodask.run.recipe import project_folder
    from cryodask.tiers.policy import size_text
    from cryodask.tiers.thin import thin as run

    done = run(project_folder(project), step, dry_run=dry_run)
    typer.echo(f"{step}: {done.files} files, {size_text(done.bytes)} {'would be freed' if dry_run else 'freed'}")
    for sentence in done.kept:
        typer.echo(sentence)


def handover(
    project: ProjectArgument,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="Folder for the verified copy.")] = None,
    acknowledge: Annotated[
        str | None, typer.Option("--acknowledge", metavar="WHO", help="Record that this person has the data; retention counts from now.")
    ] = None,
) -> None:
    """Copy a session for its owner, verified, with a manifest for sha256sum -c."""
    from cryodask.errors import ProjectFileError
    from cryodask.run.recipe import project_folder
    from cryodask.tiers.handover import hand_over
    from cryodask.tiers.policy import acknowledge as record
    from cryodask.tiers.policy import size_text

    if to is None and acknowledge is None:
        raise ProjectFileError("No folder was given.", "", "use --to DIR to copy, or --acknowledge WHO when the owner has the data")
    folder = project_folder(project)
    if to is not None:
        done = hand_over(folder, to)
        typer.echo(f"{done.files} files ({size_text(done.bytes)}) copied and verified. Check them any time:")
        typer.echo(f"  cd {to} && sha256sum -c {done.manifest.name}")
        for sentence in done.away:
            typer.echo(sentence)
    if acknowledge is not None:
        record(folder, acknowledge)
        typer.echo(f"Hand-over acknowledged by {acknowledge}.")


def storage(
    projects: Annotated[list[Path], typer.Argument(metavar="PROJECT...", help="Project files or folders.")],
    facility: FacilityOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    announce: Annotated[bool, typer.Option("--announce", help="Record the announcements that are due (14, 7 and 1 days before).")] = False,
    execute: Annotated[bool, typer.Option("--execute", help="Archive and thin what is due and was announced; asks for --confirm.")] = False,
    confirm: Annotated[str | None, typer.Option("--confirm", metavar="SIZE", help="The size that was shown, such as '1.2 GB'.")] = None,
) -> None:
    """Show what lies where, how big it is, and what goes when."""
    import json
    import time

    from cryodask.run.recipe import project_folder
    from cryodask.store.project import Project
    from cryodask.tiers import policy
    from cryodask.tiers.overview import as_dict, lines

    rules = policy.read_storage(facility)
    shown = []
    failed = False
    for folder in map(project_folder, projects):
        if announce:
            for text in policy.announce(folder, rules):
                typer.echo(f"announced: {text}", err=as_json)
        if as_json:
            shown.append(as_dict(Project(folder), rules))
        elif not execute:
            typer.echo("\n".join(lines(Project(folder), rules)))
        if execute:
            failed |= _execute(folder, rules, confirm, time.time())
    if as_json:
        typer.echo(json.dumps(shown, indent=1))
    if failed:
        raise typer.Exit(1)


def _execute(folder: Path, rules: object, confirm: str | None, now: float) -> bool:
    """The two steps: show what goes and its size, then do it. True if something stays because of a problem."""
    from cryodask.store.project import Project
    from cryodask.tiers import policy

    assert isinstance(rules, policy.Storage)
    if confirm is None:
        going = policy.due_now(Project(folder), rules, now)
        for one in going:
            typer.echo(f"{one.then} {one.files} files of {one.category}, {policy.size_text(one.bytes)}")
        size = policy.confirmation(going)
        typer.echo(f"To do it:  cryodask storage {folder} --execute --confirm '{size}'" if going else "Nothing is due.")
        return False
    done = policy.execute(folder, rules, confirm, say=typer.echo, now=now)
    typer.echo(f"{done.removed} files, {policy.size_text(done.bytes)}")
    return bool(done.problems)
