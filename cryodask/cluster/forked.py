"""Imported by the process from which local workers are forked: imports what their tasks need, which they then share.

Nobody looks for garbage meanwhile, which took an eighth of the time, nor in these objects later: looking writes to the memory that the
workers share (see ``gc.freeze`` in Python's documentation).
"""

from __future__ import annotations

import gc
from contextlib import suppress
from importlib import import_module

# by tasks of the runners; what is not installed is left out
NEEDED = ("distributed", "cryodask.run.map", "cryodask.stages", "torch")

gc.disable()
for _name in NEEDED:
    with suppress(ImportError):
        import_module(_name)
gc.freeze()
gc.enable()
