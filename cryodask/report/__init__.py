"""The report: one self-contained HTML page a project, its sections made by the stages themselves."""

from cryodask.report.page import write_report

__all__ = ["write_report"]
