"""Where it runs. Knows nothing of cryo-EM."""

from cryodask.cluster.connect import connect

__all__ = ["connect"]
