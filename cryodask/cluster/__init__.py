"""Workers, pools and lanes. Independent of cryo-EM; usable with any Dask program."""

from cryodask.cluster.connect import close, connect
from cryodask.cluster.fairshare import FairShareScheduler
from cryodask.cluster.local import LaneCluster

__all__ = ["FairShareScheduler", "LaneCluster", "close", "connect"]
