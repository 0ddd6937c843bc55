"""Long-lived clusters that several people share: starting, finding, querying and stopping them.

``serving.py`` is the process with the scheduler. All files of a service are in one folder that only its account can read,
``~/.local/state/cryodask/clusters/NAME``: the settings, the authority, the log, and ``scheduler.json``, which says where it is.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from getpass import getuser
from pathlib import Path
from typing import Any

from distributed import Security
from distributed.core import rpc

from cryodask.cluster.access import tls
from cryodask.cluster.service import batch
from cryodask.cluster.service.batch import SubmittedRun, submit
from cryodask.cluster.service.leftovers import Leftovers
from cryodask.cluster.service.whereabouts import (
    Whereabouts,
    address_file,
    encrypted,
    folder_of,
    in_thread,
    known,
    make_passable,
    name_for,
    owner_of,
    settings_of,
    state_folder,
)
from cryodask.cluster.settings import (
    AddressSettings,
    LocalSettings,
    PluginSettings,
    ServiceSettings,
    Settings,
    SlurmSettings,
    read_cluster_file,
)
from cryodask.cluster.slurm import slurm
from cryodask.errors import ClusterError

__all__ = ["Service", "SubmittedRun", "find", "invite", "invited", "known", "name_for", "revoke", "start", "submit"]

_LOOK_SECONDS = 0.2
_ANSWER_SECONDS = 15.0
_WORK_SECONDS = 90.0
_END_SECONDS = 120.0


# --- a service that runs ---------------------------------------------------------------------------------------------------------
class Service:
    """A running service, for its owner or an invited user.

    Attributes
    ----------
    name, address : str
    folder : Path or None
        None for invited users.
    security : Security or None
        For clients of this user; None if nothing is encrypted.
    """

    def __init__(self, name: str, address: str, *, folder: Path | None, security: Security | None) -> None:
        self.name, self.address, self.folder, self.security = name, address, folder, security

    def __repr__(self) -> str:
        return f"<Service {self.name} at {self.address}>"

    def ask(self, what: str, **arguments: Any) -> Any:
        """Send a request to the service; returns its answer.

        Raises
        ------
        ClusterError
            If it does not answer, or refuses this request from this user.
        """

        async def asked() -> Any:
            secrets = self.security.get_connection_args("client") if self.security else {}
            async with rpc(self.address, timeout=_ANSWER_SECONDS, connection_args=secrets) as service:
                return await asyncio.wait_for(getattr(service, what)(**arguments), _WORK_SECONDS)

        with tls.connection_errors(self.address):
            try:
                return in_thread(asked())
            except TimeoutError as error:
                raise ClusterError(
                    f"{self.name} did not answer within {_WORK_SECONDS:.0f} s.",
                    "its machine is overloaded, or its process hangs while ending",
                    "try again; if that does not help, check its log and kill that process",
                ) from error

    def status(self) -> dict[str, Any]:
        """State of the service.

        ``state`` is starting, stands ready (a successor), running, handing over or draining; ``since`` and ``hand_over`` (None if it has
        no end) are seconds since 1970. ``pools`` has the fields of ``PoolStatus``; ``jobs`` the Slurm state, pending reason, node and
        seconds left of each job; ``lanes`` the weight of each lane, its share in the last five minutes, its waiting tasks, its tasks on
        workers, and its clients; ``missing`` is one sentence; ``events`` has the last ten, each with its time.
        """
        now = self.ask("cluster_status")
        if now is None:  # the answer of a closing server
            raise ClusterError(f"{self.name} is ending.", "it was stopped, or is handing over", "try again in a moment")
        return dict(now)

    def scale(self, **jobs: int) -> None:
        """Set the number of jobs of the named pools (for a local cluster: ``workers=4``)."""
        self.ask("cluster_scale", jobs=jobs)

    def usage(self, since: float | None = None, by: tuple[str, ...] = ("lane", "user", "project", "pool")) -> list[dict[str, Any]]:
        """Usage from ``since`` (seconds since 1970) on; invited users see only their own."""
        return list(self.ask("cluster_usage", since=since, by=list(by)))

    def invite(self, user: str, lanes: list[str], *, days: float = 365) -> Path:
        """Make an invitation file for a user, for these lanes (all if none is named)."""
        return invite(self.name, user, lanes, days=days)

    def hand_over(self) -> None:
        """Have the service start its successor, finish running tasks, and end."""
        self.ask("cluster_hand_over")

    def stop(self, *, drain_seconds: float = 0) -> None:
        """Stop the service, after running tasks have finished or ``drain_seconds`` have passed. Returns when everything is gone.

        Raises
        ------
        ClusterError
            If it does not end, or if it has ended but Slurm does not answer, so that jobs may be left.
        """
        folder = self._own_folder("be stopped")
        before = Whereabouts.read(folder / "scheduler.json")
        with suppress(ClusterError) if before and before.life() == "dead" else nullcontext():
            self.ask("cluster_stop", drain_seconds=drain_seconds)
        deadline = time.monotonic() + drain_seconds + _END_SECONDS
        while before is not None and before.lives():
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{self.name} was told to end but is still running (process {before.pid} on {before.host}).",
                    "Slurm does not answer, or a task cannot be interrupted",
                    f"check {folder / 'service.log'}, or kill that process",
                )
            time.sleep(_LOOK_SECONDS)
        if (left := Leftovers.read(folder)) is not None:
            raise left.error(self.name)

    def _own_folder(self, what: str) -> Path:
        if self.folder is None:
            raise ClusterError(f"{self.name} can {what} by its owner only.", "you are an invited user", "ask its owner")
        return self.folder


def find(name: str) -> Service:
    """Find the running service of that name: this account's own, else one that it is invited to.

    Raises
    ------
    ClusterError
        If there is none, or it has ended.
    """
    folder = folder_of(name)
    if not (folder / "settings.json").is_file():
        return _invited(name)
    found = Whereabouts.read(folder / "scheduler.json")
    deadline = time.monotonic() + 60
    while found is not None and (life := found.life()) != "lives":
        following = Whereabouts.read(folder / "successor.json")
        if following is None or not following.lives() or time.monotonic() > deadline:
            if life != "dead":
                raise found.out_of_reach()
            waiting = _on_its_way(folder)
            raise ClusterError(
                f"The cluster {name} has ended: {folder / 'scheduler.json'} names process {found.pid} on {found.host}, which is gone.",
                f"its walltime ended before its successor was ready: {waiting}" if waiting else f"it was killed; its log is in {folder}",
                "wait for it" if waiting else f"restart it with  cryodask cluster start {name}; runs resume where they were",
            )
        time.sleep(_LOOK_SECONDS)  # the successor takes over by itself
        found = Whereabouts.read(folder / "scheduler.json")
    if found is None:
        waiting = _on_its_way(folder)
        reason = f"it is starting: {waiting}" if waiting else "it was stopped, or never started"
        raise ClusterError(f"The cluster {name} is not running.", reason, f"start it with  cryodask cluster start {name}")
    security = tls.security(folder / "authority", found.owner) if found.address.startswith("tls") else None
    return Service(name, found.address, folder=folder, security=security)


def invited() -> list[str]:
    """Names of the clusters to which this account keeps an invitation, and which are not its own."""
    return sorted({path.stem for path in tls.invitation_of("any").parent.glob("*.invite")} - set(known()))


def is_known(name: str) -> bool:
    """Whether this account has a cluster of that name or is invited to one, running or not."""
    if name.endswith(".invite"):
        return Path(name).is_file()
    return (folder_of(name) / "settings.json").is_file() or tls.invitation_of(name).is_file()


def of_file(settings: SlurmSettings | LocalSettings, file: str | Path) -> Service | None:
    """The service that was started from a cluster file; None if none is running and the file does not require one.

    Raises
    ------
    ClusterError
        If the file has a section ``service`` and that service is not running.
    """
    name = name_for(settings, file)
    if settings.service is not None:
        return find(name)
    folder = folder_of(name)
    if not (folder / "settings.json").is_file() or settings_of(folder).model_copy(update={"service": None}) != settings:
        return None
    with suppress(ClusterError):
        return find(name)
    return None


def is_name(where: str) -> bool:
    """Whether this is the name of a service or an invitation, rather than a file."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", where) is not None and where != "local" and not Path(where).is_file()


def of_word_or_file(where: str | Path) -> tuple[Service | None, Settings | None]:
    """Service and settings of a named cluster; None for what does not exist or cannot be read.

    Raises
    ------
    ClusterError, ProjectFileError
    """
    word = str(where)
    if word == "local":
        return None, LocalSettings()
    if is_name(word) or word.endswith(".invite"):
        found = find(word)
        return found, settings_of(found.folder) if found.folder else None
    settings = read_cluster_file(word)
    if isinstance(settings, AddressSettings | PluginSettings):
        return None, settings
    return of_file(settings, word), settings


def _invited(name: str) -> Service:
    if not name.endswith(".invite") and not tls.invitation_of(name).is_file():
        mine = known()
        raise ClusterError(
            f"There is no cluster {name}" + (f"; there are {', '.join(mine)}." if mine else "."),
            "it was started by another account, or under another name",
            f"start it with  cryodask cluster start CLUSTER.yaml --name {name}, or put your invitation at {tls.invitation_of(name)}",
        )
    invitation = tls.Invitation.read(name)
    return Service(invitation.cluster, invitation.present_address(), folder=None, security=invitation.security())


def _on_its_way(folder: Path) -> str:
    launched = batch.Launched.read(folder)
    return str(launched) if launched is not None and not launched.ended() else ""


def invite(name: str, user: str, lanes: list[str], *, days: float = 365, role: tls.PersonRole = "user") -> Path:
    """Make an invitation file for a service of this account, running or not.

    Raises
    ------
    ClusterError
    """
    authority = authority_of(name)
    folder = folder_of(name)
    found, settings = Whereabouts.read(folder / "scheduler.json"), settings_of(folder)
    unknown = [lane for lane in lanes if settings.lanes and lane not in settings.lanes]
    if unknown:
        raise ClusterError(f"{name} has no lane {unknown[0]!r}.", "", f"its lanes are {', '.join(settings.lanes)}")
    where = address_file(folder, settings)
    address = found.address if found else "tls://not-started:0"
    return authority.invite(user, lanes, address=address, days=days, address_file=str(where), role=role)


def revoke(name: str, user: str, *, cancel_work: bool = False) -> int:
    """Revoke an invitation to a service of this account, running or not; returns how many tasks were cancelled.

    Raises
    ------
    ClusterError
    """
    authority_of(name).revoke(user)
    found = Whereabouts.read(folder_of(name) / "scheduler.json")
    if not cancel_work or found is None or not found.lives():
        return 0
    return int(find(name).ask("cancel_work", user=user))


def authority_of(name: str) -> tls.Authority:
    """The authority that signs the certificates of a service of this account."""
    folder = folder_of(name) / "authority"
    if not (folder / "ca.pem").exists():
        raise ClusterError(
            f"{name} has no certificates, so nobody can be invited.",
            "it listens on the loopback address only, where certificates are not needed, or was never started",
            "set  interface:  in the cluster file, or  service: {certificates: true}  on a machine that several people use",
        )
    return tls.Authority.open(folder)


# --- starting --------------------------------------------------------------------------------------------------------------------
def start(settings: SlurmSettings | LocalSettings, name: str, *, wait_seconds: float = 120) -> Service:
    """Start a service detached from this process; returns when it answers.

    Raises
    ------
    ClusterError
        If one of that name is running, or the new one does not answer in time, with the reason.
    """
    with prepared(settings, name) as folder:
        before = Whereabouts.read(folder / "scheduler.json")
        launched = batch.launch(folder, settings)
        launched.write(folder)
        deadline = time.monotonic() + wait_seconds
        while (found := Whereabouts.read(folder / "scheduler.json")) is None or (before and found.id == before.id):
            ended = launched.ended()
            if (failed := folder / "failed.json").exists():
                what, reason, way_out = json.loads(failed.read_text())
                raise ClusterError(what, reason, way_out)
            if ended:
                raise ClusterError(
                    f"The cluster {name} ended while starting: {batch.last_words(launched.log)}",
                    "the environment or the settings do not match the machine",
                    f"check {launched.log}",
                )
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"The cluster {name} does not answer after {wait_seconds:.0f} s: {launched}.",
                    "the queue is full, or the machine is slow",
                    f"check again with  cryodask cluster status {name}; it continues to start",
                )
            time.sleep(_LOOK_SECONDS)
    return find(name)


@contextmanager
def prepared(settings: SlurmSettings | LocalSettings, name: str) -> Iterator[Path]:
    """Context manager: the folder of a service that is not running, with settings and authority, locked against other starts.

    Raises
    ------
    ClusterError
    """
    refuse_to_start(settings, name)
    service = settings.service or ServiceSettings()
    state = state_folder()
    make_passable(state)
    state.chmod(state.stat().st_mode & 0o777 | 0o011)  # possibly created by another command with a restrictive umask
    folder = folder_of(name)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    with open(os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600), encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ClusterError(
                f"The cluster {name} is being started.", "another command is starting it", f"check with  cryodask cluster status {name}"
            ) from None
        _refuse_two(folder, name)
        (folder / "failed.json").unlink(missing_ok=True)
        owner = owner_of(folder) if (folder / "settings.json").exists() else getuser()
        content = {"owner": owner, "settings": settings.model_dump(mode="json") | {"service": service.model_dump(mode="json")}}
        tls.write_secret(folder / "settings.json", json.dumps(content, indent=1))
        if encrypted(settings) and not (folder / "authority" / "ca.pem").exists():
            tls.Authority.create(folder / "authority", owner=owner, cluster=name)
        yield folder


def refuse_to_start(settings: SlurmSettings | LocalSettings, name: str) -> None:
    """Refuse settings and names that are not valid for a service.

    Raises
    ------
    ClusterError
    """
    if isinstance(settings, SlurmSettings) and settings.single_allocation:
        raise ClusterError(
            "A cluster file with single_allocation describes one batch job.",
            "it cannot be shared",
            "leave out single_allocation, or use  cryodask submit PROJECT.yaml --cluster FILE",
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ClusterError(
            f"{name!r} cannot be the name of a cluster.",
            "it is a path, or has a character that is not allowed",
            "use letters, digits, _ and -",
        )


def _refuse_two(folder: Path, name: str) -> None:
    found, waiting = Whereabouts.read(folder / "scheduler.json"), batch.Launched.read(folder)
    life = found.life() if found is not None else "dead"
    if found is not None and life == "cannot tell":
        raise found.out_of_reach()
    if found is not None and life == "lives":
        runs = f"has been running since {time.strftime('%Y-%m-%d %H:%M', time.localtime(found.since))} at {found.address}"
    elif waiting is not None and waiting.job and not waiting.ended():
        runs = f"is starting: {waiting}"
    else:
        return
    raise ClusterError(f"The cluster {name} {runs}.", "it was started before", f"use it, or stop it with  cryodask cluster stop {name}")


def clean_up(name: str, *, force: bool = False) -> list[str]:
    """Clean up after a service that has ended: its files, and its jobs in Slurm's queue. Returns what was removed, as sentences.

    Raises
    ------
    ClusterError
        If it is alive, or if that cannot be decided from this machine and ``force`` is not set. Nothing is done then.
    """
    folder, words = folder_of(name), []
    left = {file: found for file in ("scheduler.json", "successor.json") if (found := Whereabouts.read(folder / file)) is not None}
    for found in left.values():
        life = found.life()
        if life == "cannot tell" and not force:
            raise found.out_of_reach()
        if life == "lives":
            raise ClusterError(
                f"The cluster {name} is still running: process {found.pid} on {found.host}.",
                "it has just been started, or its successor is about to take over",
                f"check with  cryodask cluster status {name}",
            )
    slurm_too = bool(left) and isinstance(settings_of(folder), SlurmSettings)
    if slurm_too and in_thread(slurm.squeue()) is None:
        raise ClusterError(f"The jobs of {name} cannot be cancelled: Slurm does not answer.", "its controller is down", "try again later")
    for file, found in left.items():
        words += [f"job {job} cancelled" for job in in_thread(slurm.cancel_of(found.id))]
        (folder / file).unlink()
        words.append(f"{folder / file} removed")
    waiting = batch.Launched.read(folder)
    if waiting is not None and not waiting.ended():
        waiting.end()
        words.append(f"{waiting} ended")
    return words
