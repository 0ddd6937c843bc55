"""Where it runs: workers, pools, lanes. Knows nothing of cryo-EM, and serves any user of Dask."""

from cryodask.cluster.connect import LaneCluster, close, connect
from cryodask.cluster.fairshare import FairShareScheduler

__all__ = ["FairShareScheduler", "LaneCluster", "close", "connect"]
