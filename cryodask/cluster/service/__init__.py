"""Long-lived clusters, batch jobs, and the hand-over from one service process to the next."""

from cryodask.cluster.service.batch import submit

__all__ = ["submit"]
