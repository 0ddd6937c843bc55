"""Where services are: a folder each, and in it the file that names the process which holds the scheduler."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from cryodask.cluster import slurm, tls
from cryodask.cluster.settings import AddressSettings, LocalSettings, SlurmSettings, parse_settings

T = TypeVar("T")


def in_thread(waiting: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, also where an event loop runs already, as in a notebook."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, waiting).result()


@dataclass(frozen=True)
class Whereabouts:
    """``scheduler.json``: which process holds the scheduler of a service. Dask's own clients can read it as a scheduler file."""

    address: str
    cluster: str
    id: str
    host: str
    pid: int
    since: float
    slurm_job: str | None
    owner: str
    dashboard: str

    @classmethod
    def read(cls, path: Path) -> Whereabouts | None:
        """None where there is no such file, or one that was cut off."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, TypeError, ValueError):
            return None

    def write(self, path: Path) -> None:
        """For this account's eyes alone, and never half."""
        tls.write_secret(path, json.dumps(asdict(self), indent=1))

    def lives(self) -> bool:
        """Whether that process still is: by its start time on this machine, by Slurm's word or by a connection elsewhere."""
        if self.host == socket.gethostname().split(".")[0]:
            return not slurm.owner_is_dead(self.id)
        if self.slurm_job and (queue := in_thread(slurm.squeue())) is not None:
            return any(job.job_id == self.slurm_job and job.alive for job in queue)
        host, port = self.address.split("://")[1].rsplit(":", 1)
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError:
            return False
        return True


# --- where services are kept -----------------------------------------------------------------------------------------------------
def state_folder() -> Path:
    """Where cryodask keeps what outlives a process, for this account."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "cryodask"


def folder_of(name: str) -> Path:
    """The folder of a service of that name, whether there is one or not."""
    return state_folder() / "clusters" / Path(name).name


def known() -> list[str]:
    """Names of this account's services, dead or alive."""
    return sorted(path.parent.name for path in (state_folder() / "clusters").glob("*/settings.json"))


def settings_of(folder: Path) -> LocalSettings | SlurmSettings:
    """Settings of the service in a folder."""
    settings = parse_settings(json.loads(tls.read_secret(folder / "settings.json"))["settings"], str(folder / "settings.json"))
    assert not isinstance(settings, AddressSettings)
    return settings


def owner_of(folder: Path) -> str:
    """Who owns the service in a folder: the name in the owner's certificate."""
    return str(json.loads(tls.read_secret(folder / "settings.json"))["owner"])


def address_file(folder: Path, settings: LocalSettings | SlurmSettings) -> Path:
    """Where those who are invited find the present address."""
    chosen = settings.service and settings.service.address_file
    return Path(chosen).expanduser().absolute() if chosen else state_folder() / "addresses" / f"{folder.name}.json"


def name_for(settings: SlurmSettings | LocalSettings, file: str | Path) -> str:
    """Name of the service that a cluster file describes: as it says, else that of the file."""
    return (settings.service and settings.service.name) or re.sub(r"[^A-Za-z0-9_-]+", "-", Path(file).stem)


def encrypted(settings: SlurmSettings | LocalSettings) -> bool:
    """Whether this cluster speaks TLS: whenever it is reached from other machines, or was asked to."""
    certificates = bool(settings.service and settings.service.certificates)
    return isinstance(settings, SlurmSettings) and (settings.interface != "lo" or certificates)
