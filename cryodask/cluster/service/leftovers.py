"""Jobs of a service that could not be cancelled at its end, because Slurm did not answer: they are cancelled at its next start."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cryodask.cluster.slurm import slurm
from cryodask.errors import ClusterError

_NAME = "jobs-left.json"
_CANCEL_SECONDS = 30.0


@dataclass(frozen=True)
class Leftovers:
    """The id of an ended cluster, and the ids of jobs of it that Slurm may still have."""

    cluster_id: str
    jobs: list[str]

    @classmethod
    def read(cls, folder: Path) -> Leftovers | None:
        """Those noted in the folder of a service; None if there are none."""
        try:
            return cls(**json.loads((folder / _NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Note them in the folder of a service."""
        (folder / _NAME).write_text(json.dumps(asdict(self)), encoding="utf-8")

    def error(self, name: str) -> ClusterError:
        """What the owner of the service ``name`` has to know."""
        return ClusterError(
            f"{name} has ended, but Slurm does not answer: {len(self.jobs)} of its jobs may still be there ({', '.join(self.jobs)}).",
            "its controller is down, or overloaded",
            f"nothing needs to be done: they end within a minute when they find no scheduler, and the next start of {name} cancels "
            f"them; or, when Slurm is back:  scancel {' '.join(self.jobs)}",
        )


async def cancel_leftovers(folder: Path) -> list[str]:
    """Cancel what an earlier process of the service left; returns the ids. What cannot be cancelled stays noted."""
    noted = Leftovers.read(folder)
    if noted is None:
        return []
    left = await slurm.cancel_until_gone(noted.cluster_id, noted.jobs, _CANCEL_SECONDS)
    if left:
        Leftovers(noted.cluster_id, left).write(folder)
        return []
    (folder / _NAME).unlink(missing_ok=True)
    return noted.jobs
