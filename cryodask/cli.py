"""The command line: options and output only. The layers below do the work and are imported when a command needs them."""

from __future__ import annotations

import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cryodask import cli_cluster, cli_dashboard, cli_edits, cli_history, cli_plan, cli_run, cli_storage
from cryodask.cli_history import ProjectArgument, open_project
from cryodask.errors import CryodaskError, ProjectFileError, exit_status
from cryodask.version import VERSION

app = typer.Typer(
    name="cryodask",
    help="Cryo-EM from movies to maps, on Dask.\n\nStart with:  cryodask demo",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Molecules(StrEnum):
    """Molecules of the simulator."""

    beta_galactosidase = "beta-galactosidase"
    clpb = "clpb"


class Containers(StrEnum):
    """Formats in which movies can be simulated."""

    tiff = "tiff"
    mrc = "mrc"
    eer = "eer"


ENDINGS = {Containers.tiff: "tif", Containers.mrc: "mrc", Containers.eer: "eer"}
MoleculeOption = Annotated[Molecules, typer.Option(help="The molecule: beta-galactosidase (D2), or clpb, an asymmetric hexamer (C1).")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"cryodask {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)] = False,
) -> None:
    """Cryo-EM from movies to maps, on Dask. Start with:  cryodask demo"""


app.add_typer(cli_cluster.app)
app.add_typer(cli_edits.app)
app.command()(cli_run.run)
app.command()(cli_run.watch)
app.command()(cli_cluster.submit)
app.command()(cli_plan.plan)
app.command()(cli_dashboard.dashboard)
app.command()(cli_dashboard.password)
app.add_typer(cli_dashboard.facility_app)
app.add_typer(cli_plan.blueprint, name="blueprint")


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the simulated session and its results.")] = Path("demo"),
    molecule: MoleculeOption = Molecules.beta_galactosidase,
    movies: Annotated[int, typer.Option(help="Movies to simulate.", min=2)] = 24,
    seed: Annotated[int, typer.Option(help="Seed of the simulation.")] = 1,
    workers: Annotated[int | None, typer.Option(help="Worker processes; by default one per core.", min=1)] = None,
) -> None:
    """Simulate a small session and process it from movies to map, in a few minutes."""
    from cryodask.demo import run_demo

    run_demo(folder, molecule=molecule.value, movies=movies, seed=seed, workers=workers)


@app.command()
def simulate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for movies, gain and ground truth.")],
    molecule: MoleculeOption = Molecules.beta_galactosidase,
    movies: Annotated[int, typer.Option(help="Movies.", min=1)] = 24,
    size: Annotated[int, typer.Option(help="Rows and columns of a frame.", min=128)] = 1024,
    frames: Annotated[int, typer.Option(help="Frames per movie.", min=1)] = 24,
    particles: Annotated[int, typer.Option(help="Particles per movie.", min=0)] = 40,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same movies.")] = 1,
    container: Annotated[Containers, typer.Option("--format", help="Format of the movies.")] = Containers.tiff,
) -> None:
    """Simulate movies with known ground truth, and write a project file for them."""
    from cryodask.demo import simulate_folder

    path = simulate_folder(
        folder, movies=movies, size=size, frames=frames, particles=particles, seed=seed, ending=ENDINGS[container], molecule=molecule.value
    )
    typer.echo(f"Movies, gain and truth are in {folder}. Process them with:\n  cryodask run {path}")


@app.command()
def info(
    project: ProjectArgument,
    environment: Annotated[
        bool, typer.Option("--environment", help="Show the software versions that each step was computed with.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Show every quarantined exposure, not one of each reason.")] = False,
) -> None:
    """Show what a project contains, stage by stage, and what was quarantined."""
    opened = open_project(project)
    if environment:
        from cryodask.run.made_in import lines

        typer.echo("\n".join(lines({label: opened.generation(label) for label in opened.stages})))
        return
    typer.echo(repr(opened))
    from cryodask.run.events.quarantined import quarantined_lines
    from cryodask.run.events.status import status_sentence
    from cryodask.store.away import away_sentences

    doing = status_sentence(opened.path)
    if doing:
        typer.echo(doing)
    for line in away_sentences(opened.path):
        typer.echo(line)
    failures = opened.failures()
    for line in quarantined_lines(failures, every=every):
        typer.echo(line)
    if len(failures) > 1 and not every:
        typer.echo(f"Every exposure with its message:  cryodask info --all {project}")


@app.command()
def verify(
    project: ProjectArgument,
    repair: Annotated[bool, typer.Option("--repair", help="Invalidate damaged results; the next run recomputes them.")] = False,
) -> None:
    """Reread everything and compare it with its checksums. The exit status is 1 if anything is damaged and not repaired."""
    from cryodask.run.recipe import project_folder
    from cryodask.store.away import away_sentences
    from cryodask.store.broken_files import broken_files, set_aside
    from cryodask.store.lock import ProjectLock

    folder = project_folder(project)
    broken = broken_files(folder)
    for file in broken:
        typer.echo(f"{file}: damaged, it cannot be read")
    if broken and repair:
        with ProjectLock(folder):
            set_aside(broken)
    elif broken:
        typer.echo(f"{len(broken)} problems. Repair them with:  cryodask verify --repair {project}  and run the project again.")
        raise typer.Exit(1)
    if not (folder / "project.json").exists() and broken:
        typer.echo(f"Set aside: {folder / 'project.json'}. Run the project again: its results are found and kept.")
        return
    opened = open_project(project)
    problems = opened.verify()
    for problem in problems:
        typer.echo(problem)
    damaged = [p for p in problems if "harmless" not in p]
    if not damaged and not broken:
        away = away_sentences(opened.path)
        typer.echo("\n".join([*away, f"Everything committed is intact{' or away on purpose' if away else ''}."]))
        return
    if not repair:
        typer.echo(f"{len(damaged)} problems. Repair them with:  cryodask verify --repair {project}  and run the project again.")
        raise typer.Exit(1)
    with opened.lock():
        for item in open_project(project).repair():
            typer.echo(f"invalidated: {item}")
    left = [p for p in open_project(project).verify() if "harmless" not in p]
    if left:
        typer.echo(f"{len(left)} problems are left: {left[0]}")
        raise typer.Exit(1)
    typer.echo("Repaired; nothing was deleted. Run the project again to recompute what is missing.")


for _command in (cli_history.gc, cli_history.history, cli_history.keep, cli_history.compare, cli_history.forget, cli_history.where):
    app.command()(_command)
for _one in (cli_storage.archive, cli_storage.restore, cli_storage.thin, cli_storage.handover, cli_storage.storage):
    app.command()(_one)


@app.command("import")
def import_(
    results: Annotated[
        Path,
        typer.Argument(
            metavar="RESULTS", help="RELION STAR file or project folder; cryoSPARC .cs or .csg file; folder of CTFFIND text files."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Project file to write.")] = Path("project.yaml"),
) -> None:
    """Write a project file that starts from another program's results: movies, micrographs or particles."""
    from cryodask.interop import project_from

    written = project_from(results, output)
    about = written.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    typer.echo(f"Wrote {written}: {about}.\nCheck it, then:  cryodask run {output}")


@app.command()
def init(
    movies: Annotated[str, typer.Argument(metavar="MOVIES", help="Folder of movies, or a quoted pattern.")],
    voltage: Annotated[float, typer.Option(prompt="Acceleration voltage, kV", help="Acceleration voltage, kV.", min=1)],
    cs: Annotated[float, typer.Option(prompt="Spherical aberration Cs, mm", help="Spherical aberration Cs, mm.", min=0)],
    pixel_size: Annotated[float, typer.Option(prompt="Pixel size of the movies, Angstrom", help="Pixel size, Angstrom.", min=0.01)],
    dose: Annotated[float, typer.Option(prompt="Exposure per frame, e/A^2", help="Exposure per frame, e/A^2.", min=0.0001)],
    diameter: Annotated[float, typer.Option(prompt="Diameter of the particles, Angstrom", help="Diameter, Angstrom.", min=10)],
    gain: Annotated[Path | None, typer.Option(help="Gain reference that multiplies the counts.", exists=True, dir_okay=False)] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Project file to write.")] = Path("project.yaml"),
) -> None:
    """Write a commented project file for a folder of movies; asks for whatever is not given as an option."""
    from cryodask.interop import Session, project_from_movies

    session = Session(voltage, cs, pixel_size, dose, diameter_angstrom=diameter)
    path = project_from_movies(movies, output, session, gain)
    typer.echo(f"Wrote {path}. Check it, then:  cryodask run {path}")


@app.command()
def export(
    project: ProjectArgument,
    relion: Annotated[
        Path | None, typer.Option("--relion", metavar="DIR", help="Folder for RELION 3.1 STAR files, stacks and maps.")
    ] = None,
    cryosparc: Annotated[
        Path | None, typer.Option("--cryosparc", metavar="DIR", help="Folder for a cryoSPARC result group of the particles, and maps.")
    ] = None,
    to: Annotated[
        tuple[str, Path] | None,
        typer.Option(
            "--to",
            metavar="NAME DIR",
            help="emdb: maps and model; empiar: deposition JSON; oscem: metadata; components: series of maps; or an installed exporter.",
        ),
    ] = None,
) -> None:
    """Export a project to other programs: STAR files, particle stacks, class averages, half-maps, map and mask."""
    from cryodask.interop import ExportWarning
    from cryodask.interop import export as write

    wanted = [given for given in (("relion", relion), ("cryosparc", cryosparc), to or ("", None)) if given[1] is not None]
    if len(wanted) != 1:
        what = "No program and folder were" if not wanted else "Several programs were"
        raise ProjectFileError(f"{what} given.", "", "use one of --relion DIR, --cryosparc DIR and --to NAME DIR")
    name, folder = wanted[0]
    with warnings.catch_warnings():
        warnings.simplefilter("always", ExportWarning)
        show = warnings.showwarning

        def shown(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, ExportWarning):
                typer.echo(f"Warning: {message}", err=True)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = shown
        written = write(open_project(project), name, Path(str(folder)))
    for path in written:
        typer.echo(str(path))


@app.command()
def report(
    project: ProjectArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file to write; by default report.html in the project.")
    ] = None,
    url: Annotated[str, typer.Option(metavar="ADDRESS", help="Page of the project in a dashboard, to link to.", show_default=False)] = "",
) -> None:
    """Write the report: one self-contained HTML page."""
    from cryodask.report import write_report

    typer.echo(f"Report: {write_report(open_project(project), output, live=url)}")


@app.command()
def stages(
    name: Annotated[str | None, typer.Argument(metavar="STAGE", help="Explain this stage and its parameters.")] = None,
) -> None:
    """List the stages, or explain one."""
    from cryodask.stage import OTHERS, load_stages

    known = load_stages()
    if name is None:
        wide = max(map(len, known))
        for stage in known.values():
            typer.echo(f"{stage.name:<{wide}} {stage.doc.splitlines()[0]}")
        return
    if name not in known:
        import difflib

        near = difflib.get_close_matches(name, known, n=1)
        raise CryodaskError(
            f"There is no stage {name!r}." + (f" Did you mean {near[0]!r}?" if near else "") + OTHERS.hint(name),
            "",
            "list them with  cryodask stages",
        )
    stage = known[name]
    from cryodask.run.graph.chain import default_outputs

    typer.echo(f"{stage.name} (version {stage.version}, {stage.shape})\n\n{stage.doc}\n")
    for word, parts in (("takes", stage.ports), ("gives", default_outputs(stage))):
        shown = ", ".join(f"{p.name if p.name == p.type else f'{p.name}: {p.type}'}[{', '.join(p.parts)}]" for p in parts)
        typer.echo(f"{word}  {shown or '-'}")
    typer.echo("\nparameters")
    for field, about in stage.params.model_fields.items():
        default = "required" if about.is_required() else f"default {about.get_default(call_default_factory=True)!r}"
        typer.echo(f"  {field:<28} {default:<22} {about.description or ''}")


def main() -> None:
    """Entry point: cryodask's own errors are printed as three sentences, not as a traceback."""
    try:
        app(standalone_mode=True)
    except CryodaskError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(_status(error))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("cryodask"):
            raise
        reason = "cryodask was installed without the packages for image processing, which clusters do not need"
        told = CryodaskError(f"This command needs a package that is not installed: {error}.", reason, 'pip install "cryodask[em]"')
        typer.echo(f"{type(error).__name__}: {told}", err=True)
        sys.exit(2)
    except OSError as error:
        what = f"{error.filename} cannot be read or written" if error.filename else "A file cannot be read or written"
        reason = "it is missing, the disk is full, or this account has no permission"
        told = CryodaskError(f"{what}: {error.strerror or error}.", reason, "check the path, its permissions and the free space")
        typer.echo(f"{type(error).__name__}: {told}", err=True)
        sys.exit(_status(error))


def _status(error: Exception) -> int:
    """Exit status by cause for ``run``, where a supervisor needs it; 1 for all other commands."""
    return exit_status(error) if sys.argv[1:2] == ["run"] else 2


if __name__ == "__main__":
    main()
