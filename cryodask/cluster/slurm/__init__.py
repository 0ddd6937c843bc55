"""Workers as Slurm jobs: job scripts, the queue, and pools that scale with the work."""

from cryodask.cluster.slurm.slurm import pool_job_class

__all__ = ["pool_job_class"]
