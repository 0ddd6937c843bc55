"""Errors that the driver tells in a sentence: Dask's workers do not log them with a traceback as well."""

from __future__ import annotations

import logging
import re

_TOLD: set[str] = set()
_RAISED = re.compile(r"^Exception: *[\"']?(\w+)\(", re.MULTILINE)


def keep_from_log(error: Exception) -> None:
    """Keep errors of this class out of the log of this worker, which the driver receives and tells."""
    _TOLD.add(type(error).__name__)
    logging.getLogger("distributed.worker").addFilter(is_untold)


def is_untold(record: logging.LogRecord) -> bool:
    """Whether a log record is about something else than an error that the driver tells."""
    if "Compute Failed" not in str(record.msg):
        return True
    raised = _RAISED.search(record.getMessage())
    return raised is None or raised[1] not in _TOLD
