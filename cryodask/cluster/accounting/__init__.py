"""Accounting of worker usage, and the pages that show it."""

from cryodask.cluster.accounting.accounting import Accounting, read_history, read_usage

__all__ = ["Accounting", "read_history", "read_usage"]
