"""The stages, one module each. ``cryodask.stages.motion(dataset, patches=(5, 5))`` applies stage ``motion`` lazily to a Dataset.

A stage is named after its module, and the attribute of that name is the stage, not the module. Stages in the package ``external``, which
run other programs, are called ``external.NAME``. Modules are imported on first use: a worker that corrects motion does not load the
refinement.
"""

import importlib
import pkgutil
import sys
from types import ModuleType
from typing import Any

from cryodask.stage import STAGES

NAMES = [m.name for m in pkgutil.iter_modules(__path__) if not (m.name.startswith("_") or m.ispkg)]
NAMES += [f"external.{m.name}" for m in pkgutil.iter_modules([f"{folder}/external" for folder in __path__])]


class _Stages(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Python binds a loaded submodule to its package: bind the stage that it registers instead
        super().__setattr__(name, STAGES.get(name, value) if isinstance(value, ModuleType) else value)

    def __getattr__(self, name: str) -> Any:
        if name not in NAMES:
            raise AttributeError(f"there is no stage {name!r}; there are {', '.join(NAMES)}")
        importlib.import_module(f"{self.__name__}.{name}")
        return self.__dict__[name]

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *NAMES})


sys.modules[__name__].__class__ = _Stages
