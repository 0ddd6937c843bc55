"""Location of services: one folder each, with a file that names the process of the scheduler."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from cryodask.account import state_folder
from cryodask.cluster.access import tls
from cryodask.cluster.settings import AddressSettings, LocalSettings, PluginSettings, SlurmSettings, parse_settings
from cryodask.cluster.slurm import slurm
from cryodask.errors import ClusterError

T = TypeVar("T")
Life = Literal["lives", "dead", "cannot tell"]


def in_thread(waiting: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a thread, which also works inside a running event loop, as in a notebook."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, waiting).result()


@dataclass(frozen=True)
class Whereabouts:
    """``scheduler.json``: the process of a service's scheduler. Dask's own clients can read it as a scheduler file."""

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
        """Read a file; None if there is none.

        Raises
        ------
        ClusterError
            If it exists but cannot be read now, which says nothing about the service.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, TypeError, ValueError) as error:
            raise ClusterError(
                f"{path} cannot be read: {error}",
                "the file system did not answer, or the file was edited",
                "try again; if it is damaged and you know that the service is not running, remove it",
            ) from None

    def write(self, path: Path) -> None:
        """Write the file atomically, readable by this account only."""
        tls.write_secret(path, json.dumps(asdict(self), indent=1))

    def life(self) -> Life:
        """Whether the process is alive: from its start time on this machine, from Slurm, or by a connection elsewhere."""
        if self.host == socket.gethostname().split(".")[0]:
            return "dead" if slurm.owner_is_dead(self.id) else "lives"
        if self.slurm_job and (queue := in_thread(slurm.squeue())) is not None:
            return "lives" if any(job.job_id == self.slurm_job and job.alive for job in queue) else "dead"
        host, _, port = self.address.rpartition("://")[2].rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, ValueError):
            return "cannot tell"  # a firewall, a busy machine and a scheduler on its loopback address look the same from here
        return "lives"

    def lives(self) -> bool:
        """Whether the process is known to be alive."""
        return self.life() == "lives"

    def out_of_reach(self) -> ClusterError:
        """Error if it is unknown whether the service is alive, so that nothing may be removed."""
        where = "try again when Slurm answers" if self.slurm_job else f"run this on {self.host}"
        return ClusterError(
            f"It is unknown whether the cluster {self.cluster} is still running: it was process {self.pid} on {self.host},"
            f" and nothing answers at {self.address}.",
            "Slurm does not answer" if self.slurm_job else "that address is only reachable from there, or that machine is down",
            f"{where}; if you know that it is gone, clean up with  cryodask cluster stop {self.cluster} --force",
        )


# --- where services are kept -----------------------------------------------------------------------------------------------------
def make_passable(folder: Path) -> None:
    """Make a folder and its parents traversable for others whatever the umask, because it contains an address that all may read."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        path.chmod(0o711)


def folder_of(name: str) -> Path:
    """The folder of a service of that name, existing or not."""
    return state_folder() / "clusters" / Path(name).name


def known() -> list[str]:
    """Names of this account's services, running or not."""
    return sorted(path.parent.name for path in (state_folder() / "clusters").glob("*/settings.json"))


def settings_of(folder: Path) -> LocalSettings | SlurmSettings:
    """Settings of the service in a folder."""
    settings = parse_settings(json.loads(tls.read_secret(folder / "settings.json"))["settings"], str(folder / "settings.json"))
    assert not isinstance(settings, AddressSettings | PluginSettings)
    return settings


def owner_of(folder: Path) -> str:
    """Who owns the service in a folder: the name in the owner's certificate."""
    return str(json.loads(tls.read_secret(folder / "settings.json"))["owner"])


def address_file(folder: Path, settings: LocalSettings | SlurmSettings) -> Path:
    """File where invited users find the current address."""
    chosen = settings.service and settings.service.address_file
    return Path(chosen) if chosen else state_folder() / "addresses" / f"{folder.name}.json"


def name_for(settings: SlurmSettings | LocalSettings, file: str | Path) -> str:
    """Name of the service of a cluster file: as set there, else that of the file."""
    return (settings.service and settings.service.name) or re.sub(r"[^A-Za-z0-9_-]+", "-", Path(file).stem)


def encrypted(settings: SlurmSettings | LocalSettings) -> bool:
    """Whether this cluster uses TLS: always if reachable from other machines, else on request."""
    certificates = bool(settings.service and settings.service.certificates)
    return isinstance(settings, SlurmSettings) and (settings.interface != "lo" or certificates)
