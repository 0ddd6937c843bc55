"""The report of a project: one self-contained HTML page; and FSC curves of several results in one plot."""

from cryodask.report.curves import plot_curves
from cryodask.report.page import update_report, write_report

__all__ = ["plot_curves", "update_report", "write_report"]
