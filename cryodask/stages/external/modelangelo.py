"""Stage ``external.modelangelo``: an atomic model built into a map by ModelAngelo."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.formats.mrc import write_mrc
from cryodask.stage import Context, EffortMark, InputFile, Output, Params, Program, Resources, Sizes, stage

MODEL_ANGELO = Program(
    "model_angelo",
    # not the numbers in warnings of the packages that it imports
    version_pattern=r"(?im)(?:model[-_ ]?angelo\S*\s+(?:version\s+)?|^)v?(\d+\.\d+[\w.+-]*)",
    install="install ModelAngelo (github.com/3dem/model-angelo) with its weights, or load its module, where cryodask and its workers start",
)


class ModelAngeloParams(Params):
    """Parameters of stage ``external.modelangelo``."""

    fasta: InputFile | None = Field(None, description="FASTA file with the sequences of the proteins; without one, build_no_seq is run")
    timeout_seconds: Annotated[float, EffortMark] = Field(86400.0, description="time after which the program is killed, s", gt=0)


def _memory(params: ModelAngeloParams, sizes: Sizes) -> float:
    # language model and network; the map is resampled to 1.5 A
    return 2e10 + 50.0 * sizes["z"] * sizes["y"] * sizes["x"]


@stage(
    version=1,
    name="external.modelangelo",
    shape="whole",
    programs=[MODEL_ANGELO],
    needs=["final_map", "map_pixel_size_angstrom"],
    optional=["sharpened_map"],
    ports=["map[final, view?]"],
    outputs=[Output("model", "model", ("atoms",), frame="same")],
    gives=["model_file", "built_residues", "built_chains"],
    resources=Resources(memory=_memory, gpus=1),
)
def modelangelo(
    params: ModelAngeloParams,
    *,
    context: Context,
    final_map: np.ndarray,
    map_pixel_size_angstrom: float,
    sharpened_map: np.ndarray | None = None,
) -> dict[str, Any]:
    """Build an atomic model into a map with ``model_angelo build`` (Jamali et al. 2024).

    The sharpened or filtered map is used if there is one. The map must have the right hand and, its authors say, a resolution better than
    about 4 A. The model that is kept is the one that ModelAngelo has pruned; its B factors are ModelAngelo's confidence from 0 to 100.
    """
    from cryodask.stages._built import built_model, check_map
    from cryodask.stages._model_parts import OTHER, parts_of
    from cryodask.stages._models import bytes_of

    volume, voxel = final_map if sharpened_map is None else sharpened_map, float(map_pixel_size_angstrom)
    check_map(volume)
    write_mrc(context.scratch / "map.mrc", np.asarray(volume, np.float32), voxel)
    if params.fasta is None:
        words: list[str | Path] = ["build_no_seq", "-v", "map.mrc", "-o", "out"]
    else:
        fasta = Path(params.fasta).resolve()
        check_fasta(fasta)
        # version 1 has one option for each kind of polymer
        old = context.programs[MODEL_ANGELO].startswith("0.") if MODEL_ANGELO in context.programs else False
        words = ["build", "-v", "map.mrc", "-f" if old else "-pf", fasta, "-o", "out"]
    context.run(MODEL_ANGELO.name, words, outputs=["out/out.cif"], timeout_seconds=params.timeout_seconds)
    structure = built_model(context.scratch / "out" / "out.cif", "model_angelo", volume.shape[0], voxel)
    parts = parts_of(structure)
    polymer = parts.kinds != OTHER
    return {
        "model_file": bytes_of(structure),
        "built_residues": int(polymer.sum()),
        "built_chains": len(set(parts.chains[polymer].tolist())),
    }


def check_fasta(path: Path) -> None:
    """Refuse a file that is not FASTA.

    Raises
    ------
    InputError
    """
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    sequence = "".join(line for line in lines if not line.startswith(">"))
    if not lines or not lines[0].startswith(">") or not sequence or not all(c.isalpha() or c in "*-" for c in sequence):
        raise InputError(f"{path.name} is not a FASTA file", "", "give a header line that begins with > and a sequence for each chain")


@modelangelo.sentence
def says(result: Mapping[str, Any]) -> str:
    """What was built."""
    return f"{int(result['built_residues'])} residues in {int(result['built_chains'])} chains"
