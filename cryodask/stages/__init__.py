"""The stages, one file each. ``cryodask.stages.motion(dataset, patches=(5, 5))`` is the lazy face of stage ``motion``."""

import importlib
import pkgutil

from cryodask.stage import STAGES

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
# the stage takes the name of its module, so that cryodask.stages.motion is the stage
globals().update(STAGES)
