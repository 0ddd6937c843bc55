"""``cryodask cluster ...`` and ``cryodask submit``: shared clusters and batch runs on the command line."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cryodask.errors import ClusterError, ProjectFileError

app = typer.Typer(
    name="cluster",
    help="A long-lived cluster that several people share.\n\nStart with:  cryodask cluster start CLUSTER.yaml",
    no_args_is_help=True,
    rich_markup_mode=None,
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the cluster.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def start(
    cluster: Annotated[str, typer.Argument(metavar="FILE", help="Cluster file (.yaml), or the name of an earlier cluster.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the cluster; by default service.name in the file, else the file's name.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print every job script that would be submitted.")] = False,
    foreground: Annotated[bool, typer.Option("--foreground", help="Run the service in this process, for systemd and containers.")] = False,
    wait: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for it to answer.")] = 120,
) -> None:
    """Start a long-lived cluster."""
    from cryodask.cluster.service import service
    from cryodask.cluster.settings import AddressSettings, PluginSettings, read_cluster_file

    if cluster == "local":
        raise ProjectFileError(
            "'local' means workers that end with their program, so there is nothing to start.",
            "it is meant for  cryodask run  and  connect()",
            "give a cluster file with  kind: local, such as configs/clusters/local.yaml",
        )
    settings = service.settings_of(service.folder_of(cluster)) if cluster in service.known() else read_cluster_file(cluster)
    if isinstance(settings, PluginSettings):
        raise ProjectFileError(
            f"Workers of kind {settings.kind} end with the program that started them; there is nothing to start.",
            "",
            "give the file to  cryodask run --cluster  or  connect()",
        )
    if isinstance(settings, AddressSettings):
        raise ProjectFileError(
            f"{cluster} names a scheduler that is already running.", "its kind is address", "connect to it; there is nothing to start"
        )
    called = name or (cluster if cluster in service.known() else service.name_for(settings, cluster))
    if dry_run:
        service.refuse_to_start(settings, called)
        _print_scripts(called, settings)
        return
    if foreground:
        with service.prepared(settings, called) as folder:
            pass
        os.execv(sys.executable, [sys.executable, "-m", "cryodask.cluster.service.serving", str(folder)])
    started = service.start(settings, called, wait_seconds=wait)
    now = started.status()
    typer.echo(f"The cluster {called} is running at {started.address}, {_place(now)}.")
    typer.echo(f"  connect:  client = cryodask.connect({called!r}, lane=...)")
    typer.echo(f"  status:   cryodask cluster status {called}, dashboard {now['dashboard']} (use ssh -L from another machine)")
    typer.echo(f"  stop:     cryodask cluster stop {called}")
    if now["missing"]:
        typer.echo(f"No workers yet: {now['missing']}.")


def _print_scripts(name: str, settings: Any) -> None:
    from cryodask.cluster.service import batch, service
    from cryodask.cluster.settings import LocalSettings, ServiceSettings
    from cryodask.cluster.slurm import slurm

    if isinstance(settings, LocalSettings):
        typer.echo(f"# {name} would start worker processes on this machine; there are no job scripts")
        return
    chosen = settings.service or ServiceSettings()
    if chosen.where == "slurm":
        typer.echo(f"# --- the scheduler\n{batch.service_script(service.folder_of(name), chosen)}")
    certificates = service.folder_of(name) / "authority" if service.encrypted(settings) else None
    if certificates and not (certificates / "worker.pem").exists():
        typer.echo("# (without the certificate lines; certificates are made at the first start)\n")
        certificates = None
    for pool in settings.pools:
        script = slurm.job_script(settings, pool, scheduler="SCHEDULER", name=f"{pool}-0", cluster_id="CLUSTER", certificates=certificates)
        typer.echo(f"# --- a job of pool {pool}\n{script}")


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="By default all clusters.")] = None, as_json: JsonOption = False
) -> None:
    """Show pools, jobs, why jobs are pending, and lanes."""
    from cryodask.cluster.service import service

    if name is None:
        _list_all(as_json=as_json)
        return
    now = service.find(name).status()
    if as_json:
        typer.echo(json.dumps(now, indent=1))
    else:
        _show(name, now)


def _list_all(*, as_json: bool) -> None:
    from cryodask.cluster.service import service

    found: dict[str, Any] = {}
    for name in (*service.known(), *service.invited()):
        try:
            found[name] = {"address": service.find(name).address, "says": ""}
        except ClusterError as error:
            found[name] = {"address": None, "says": error.what}
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for name, here in found.items():
        typer.echo(f"{name:<20} {here['address'] or here['says']}")
    if not found:
        typer.echo("There are no clusters. Start one:  cryodask cluster start CLUSTER.yaml")


def _place(now: Mapping[str, Any]) -> str:
    return (f"Slurm job {now['slurm_job']}" if now["slurm_job"] else f"process {now['pid']}") + f" on {now['host']}"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _show(name: str, now: Mapping[str, Any]) -> None:
    handing = f", hands over at {_when(now['hand_over'])}" if now["hand_over"] else ""
    typer.echo(f"{name}: {now['state']} at {now['address']} ({_place(now)}), since {_when(now['since'])}{handing}")
    typer.echo(f"{now['workers']} workers with {now['threads']} threads; dashboard {now['dashboard']}")
    if now["pools"]:
        keys = ("target", "running", "pending", "workers", "lost", "problem")
        pools = [(name, *(pool[key] for key in keys)) for name, pool in now["pools"].items()]
        _table(("pool", "jobs wanted", "running", "pending", "workers", "lost", ""), pools)
    if now["jobs"]:
        columns = ("Slurm job", "job", "state", "reason", "node", "time left")
        _table(columns, [(j["id"], j["job"], j["state"].lower(), _reason(j), j["node"], _clock(j["seconds_left"])) for j in now["jobs"]])
    rows = [
        (lane, f"{seen['weight']:g}", f"{100 * seen['share']:.0f} %", seen["waiting"], seen["running"], seen["clients"])
        for lane, seen in now["lanes"].items()
    ]
    _table(("lane", "weight", "share, last 5 min", "waiting", "on workers", "clients"), rows)
    if now["missing"]:
        typer.echo(f"Missing workers: {now['missing']}.")
    for when, text in now["events"][-5:]:
        typer.echo(f"  {_when(when)}  {text}")


def _reason(job: Mapping[str, Any]) -> str:
    return "" if job["state"] == "RUNNING" else str(job["reason"])


def _clock(seconds: int | None) -> str:
    return "" if seconds is None else f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(str, row))
    # a file or a pipe has no width
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200, soft_wrap=not sys.stdout.isatty()).print(table)


@app.command()
def scale(
    name: NameArgument,
    jobs: Annotated[list[str], typer.Argument(metavar="POOL=JOBS...", help="For example cpu=4 gpu=1; for a local cluster workers=4.")],
) -> None:
    """Change the number of jobs of a pool.

    Workers that leave first move their results to others.
    """
    from cryodask.cluster.service import service

    wanted = {}
    for word in jobs:
        pool, _, count = word.partition("=")
        if not count.isdigit():
            raise ProjectFileError(f"{word!r} does not state a number of jobs.", "", "write it as  cpu=4")
        wanted[pool] = int(count)
    found = service.find(name)
    found.scale(**wanted)
    missing = found.status()["missing"]
    typer.echo(
        f"{name} was asked for {', '.join(f'{count} of {pool}' for pool, count in wanted.items())}" + (f"; {missing}" if missing else "")
    )


@app.command()
def stop(
    name: NameArgument,
    drain: Annotated[float, typer.Option(metavar="SECONDS", help="Wait for running tasks to finish, at most this long.", min=0)] = 0,
    hand_over: Annotated[bool, typer.Option("--hand-over", help="Start a successor first, as at the end of the walltime.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Clean up after a cluster that is known to be gone although its machine cannot be reached.")
    ] = False,
) -> None:
    """Stop a cluster and its jobs.

    If it has died, what it left behind is cleaned up.
    """
    from cryodask.cluster.service import service

    if hand_over:
        service.find(name).hand_over()
        typer.echo(f"{name} starts its successor, lets running tasks finish, and ends. See  cryodask cluster status {name}")
        return
    if name not in service.known():
        service.find(name)  # its error lists the clusters there are
    try:
        found = service.find(name)
    except ClusterError as error:
        left = service.clean_up(name, force=force)
        typer.echo(error.what)
        for what in left:
            typer.echo(f"  {what}")
        return
    found.stop(drain_seconds=drain)
    typer.echo(f"{name} and its jobs have ended.")


@app.command()
def usage(
    name: NameArgument,
    hours: Annotated[float | None, typer.Option(help="Only the last hours.", min=0)] = None,
    by: Annotated[str, typer.Option(help="Columns to group by, separated by commas: lane, user, project, pool.")] = "lane,user",
    hourly: Annotated[bool, typer.Option("--hourly", help="One line per hour (per day before two months ago), from the journal.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show who used how much."""
    from cryodask.cluster.accounting.accounting import read_history, read_usage
    from cryodask.cluster.service import service

    since, keys = None if hours is None else time.time() - 3600 * hours, tuple(part.strip() for part in by.split(",") if part.strip())
    wrong = [key for key in keys if key not in ("lane", "user", "project", "pool")]
    if wrong or not keys:
        raise ProjectFileError(f"Usage cannot be grouped by {by!r}.", "", "use lane, user, project or pool")
    if hourly:
        if name not in service.known():
            service.find(name)  # says which clusters there are
            raise ClusterError(f"The journal of {name} is with the account that started it.", "", "leave out --hourly")
        rows = read_history(service.folder_of(name), since, keys)
    else:
        try:
            rows = service.find(name).usage(since, keys)
        except ClusterError:
            if name not in service.known():
                raise
            rows = read_usage(service.folder_of(name), since, keys)  # the journal of a cluster that has ended
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    from dask.utils import format_bytes

    columns = (*(["from"] if hourly else []), *keys, "task hours", "tasks", "failed", "mean wait s", "results")
    table = [
        (
            *([time.strftime("%Y-%m-%d %H:%M", time.localtime(row["from"]))] if hourly else []),
            *(row[key] for key in keys), f"{row['task_seconds'] / 3600:.3f}", row["tasks"], row["failed"],
            f"{row['waiting_seconds'] / max(1, row['tasks']):.2f}", format_bytes(row["bytes"]),
        )
        for row in rows
    ]  # fmt: skip
    _table(columns, table)


@app.command()
def invite(
    name: NameArgument,
    user: Annotated[str, typer.Argument(metavar="USER", help="Account name.")],
    lanes: Annotated[
        str, typer.Option(help="Lanes they may use, separated by commas; by default all. The first is their default lane.")
    ] = "",
    days: Annotated[float, typer.Option(help="How long the invitation is valid.", min=0)] = 365,
    role: Annotated[str, typer.Option(help="user, or viewer: one who sees states and usage, and submits nothing.")] = "user",
    revoke: Annotated[bool, typer.Option("--revoke", help="Revoke the invitation instead.")] = False,
    cancel_work: Annotated[bool, typer.Option("--cancel-work", help="With --revoke: also cancel the tasks of that user.")] = False,
) -> None:
    """Make an invitation file that gives a user access, or revoke it."""
    from cryodask.cluster.service import service

    if role not in ("user", "viewer"):
        raise ProjectFileError(f"There is no role {role!r}.", "", "use user or viewer")
    if cancel_work and not revoke:
        raise ProjectFileError("--cancel-work cancels the work of somebody whose invitation is revoked.", "", "use it with --revoke")
    if revoke:
        cancelled = service.revoke(name, user, cancel_work=cancel_work)
        typer.echo(f"{user} no longer has access to {name}." + (f" {cancelled} tasks were cancelled." if cancel_work else ""))
        return
    path = service.invite(name, user, [lane.strip() for lane in lanes.split(",") if lane.strip()], days=days, role=role)  # type: ignore[arg-type]
    typer.echo(
        f"{path}\nTreat this file as a password. {user} keeps it as ~/.config/cryodask/{name}.invite (mode 600), and then connects with\n"
    )
    typer.echo(f"  client = cryodask.connect({name!r})")


def submit(
    project: Annotated[Path, typer.Argument(metavar="PROJECT.yaml", help="Project file.")],
    cluster: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="A running cluster or a cluster file; by default the one in the project file.")
    ] = None,
    lane: Annotated[str | None, typer.Option(help="Lane of the run's tasks; by default live with --watch, else batch.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Process movies as they arrive, newest first.")] = False,
    until_idle: Annotated[
        float | None, typer.Option(metavar="MINUTES", help="End --watch when nothing has arrived for this long.", min=0)
    ] = None,
    until_movies: Annotated[int | None, typer.Option(metavar="N", help="End --watch when this many movies have arrived.", min=1)] = None,
    until: Annotated[str | None, typer.Option(metavar="STEP", help="Stop after this step.")] = None,
    partition: Annotated[
        str | None, typer.Option(help="Partition of the driver job; by default the one under driver: in the cluster file.")
    ] = None,
    walltime: Annotated[str | None, typer.Option(metavar="H:MM:SS", help="Walltime of the driver job.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job script.")] = False,
) -> None:
    """Submit a run to Slurm: a job drives it on the workers of a cluster, and continues when the cluster hands over."""
    from cryodask.cluster.service import service
    from cryodask.cluster.settings import JobSettings, SlurmSettings, changed_job
    from cryodask.run.recipe import make_plan
    from cryodask.run.selection import Wanted
    from cryodask.run.watch import Until

    if not watch and (until_idle is not None or until_movies is not None):
        raise ProjectFileError("--until-idle and --until-movies need --watch.", "", "add --watch")
    plan = make_plan(project)
    where = cluster or plan.cluster
    ends = Until(idle_seconds=None if until_idle is None else 60 * until_idle, movies=until_movies)
    wanted = Wanted(until=until, watch=ends if watch else None)
    wanted.check(plan)
    lane = lane or ("live" if watch else "batch")
    given = {key: value for key, value in (("partition", partition), ("walltime", walltime)) if value}
    job = None
    if given:
        _, settings = service.of_word_or_file(where)
        base = settings.driver if isinstance(settings, SlurmSettings) else JobSettings()
        job = changed_job(base, **given)
    driver = [sys.executable, "-m", "cryodask.cli", "run", str(project.absolute())]
    command = [*driver, "--cluster", "{cluster}", "--lane", "{lane}", *wanted.words]
    sent = service.submit(command, where, lane=lane, name=plan.file.name, job=job, dry_run=dry_run)
    if dry_run:
        typer.echo(sent.script)
        return
    typer.echo(f"{sent}\n  results: cryodask info {project}")
