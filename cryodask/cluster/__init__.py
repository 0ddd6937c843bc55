"""Workers, pools and lanes. Independent of cryo-EM; usable with any Dask program."""

from cryodask.cluster.connect import LaneCluster, close, connect
from cryodask.cluster.fairshare import FairShareScheduler

__all__ = ["FairShareScheduler", "LaneCluster", "close", "connect"]
