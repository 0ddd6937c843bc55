"""Stage ``import_model``: an atomic model from a file."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from cryodask.stage import Context, InputFile, Output, Params, stage


class ImportModelParams(Params):
    """Parameters of ``import_model``."""

    file: InputFile = Field(description="an atomic model, PDB or mmCIF, optionally compressed (.gz)")
    assembly: str | None = Field(None, description="name of the biological assembly to build; by default the atoms are taken as they are")


@stage(version=1, shape="whole", needs=[], outputs=[Output("model", "model", ("atoms",), frame="unknown")], gives=["model_file"])
def import_model(params: ImportModelParams, *, context: Context) -> dict[str, Any]:
    """Read an atomic model (only the first in the file is kept). It is not in the frame of a map until `dock` has placed it."""
    from cryodask.stages._models import read_model

    return {"model_file": read_model(params.file, params.assembly)}
