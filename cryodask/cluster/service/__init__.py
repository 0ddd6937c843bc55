"""Clusters that outlive the command that started them, batch jobs, and one service process after another."""

from cryodask.cluster.service.batch import submit

__all__ = ["submit"]
