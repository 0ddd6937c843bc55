"""Stage ``external.phenix_real_space_refine``: a docked model refined against its map by Phenix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError, ProgramError
from cryodask.formats.mrc import write_mrc
from cryodask.stage import Context, EffortMark, InputFile, Output, Params, Program, Resources, Sizes, stage

PHENIX = Program(
    "phenix.real_space_refine",
    version_arguments=(),
    version_pattern=r"[Vv]ersion[ .:]*(\S+)",
    install="install Phenix (phenix-online.org) and source its phenix_env.sh, or load its module, where cryodask and its workers start",
    version_program="phenix.version",
)
_LARGEST_MOVEMENT_ANGSTROM = 15.0


class PhenixRealSpaceRefineParams(Params):
    """Parameters of stage ``external.phenix_real_space_refine``."""

    resolution_angstrom: float | None = Field(None, gt=0, description="resolution of the map, Angstrom; by default that of its half-maps")
    macro_cycles: int = Field(5, ge=1, description="macro-cycles of the refinement")
    restraints: InputFile | None = Field(None, description="CIF file with the restraints of ligands")
    settings: InputFile | None = Field(None, description="Phenix parameter file (.eff, .phil) with further settings")
    timeout_seconds: Annotated[float, EffortMark] = Field(86400.0, description="time after which the program is killed, s", gt=0)


def _memory(params: PhenixRealSpaceRefineParams, sizes: Sizes) -> float:
    # several copies of the map in double precision, restraints and atoms
    return 4e9 + 100.0 * sizes["z"] * sizes["y"] * sizes["x"]


@stage(
    version=1,
    name="external.phenix_real_space_refine",
    shape="whole",
    programs=[PHENIX],
    needs=["final_map", "map_pixel_size_angstrom", "model_file"],
    optional=["resolution_angstrom", "sharpened_map", "dock_hand"],
    ports=["map[final, fsc?, view?]", "model[atoms]"],
    outputs=[Output("model", "model", ("atoms",), frame="same")],
    gives=["model_file", "moved_angstrom"],
    resources=Resources(memory=_memory),
)
def phenix_real_space_refine(
    params: PhenixRealSpaceRefineParams,
    *,
    context: Context,
    final_map: np.ndarray,
    map_pixel_size_angstrom: float,
    model_file: np.ndarray,
    resolution_angstrom: float | None = None,
    sharpened_map: np.ndarray | None = None,
    dock_hand: str | None = None,
) -> dict[str, Any]:
    """Refine a docked model against its map with ``phenix.real_space_refine`` (Afonine et al. 2018).

    The sharpened or filtered map is used if there is one. All other settings are Phenix's defaults, or those of the file ``settings``.
    Compare the models before and after it with `model_map`.
    """
    import gemmi

    from cryodask.stages._built import built_model, check_map, rms_movement
    from cryodask.stages._models import bytes_of, check_hand, structure_of

    check_hand(dock_hand)
    volume, voxel = final_map if sharpened_map is None else sharpened_map, float(map_pixel_size_angstrom)
    check_map(volume)
    known = params.resolution_angstrom or (float(resolution_angstrom) if resolution_angstrom is not None else float("nan"))
    if not np.isfinite(known):
        raise InputError(
            "the resolution of the map is unknown",
            "it has no half-maps, or its refinement has not succeeded",
            "set external.phenix_real_space_refine.resolution_angstrom",
        )
    write_mrc(context.scratch / "map.mrc", np.asarray(volume, np.float32), voxel)
    before = structure_of(model_file)
    # Phenix compares the cell of the model with that of the map
    depth, height, width = (n * voxel for n in volume.shape)
    before.cell = gemmi.UnitCell(width, height, depth, 90.0, 90.0, 90.0)
    before.spacegroup_hm = "P 1"
    (context.scratch / "model.cif").write_bytes(bytes_of(before).tobytes())
    files = [Path(f).resolve() for f in (params.restraints, params.settings) if f is not None]
    options = [f"resolution={known:.3f}", f"macro_cycles={params.macro_cycles}", f"nproc={context.threads}"]
    context.run(PHENIX.name, ["model.cif", "map.mrc", *files, *options], timeout_seconds=params.timeout_seconds)
    after = built_model(_written(context.scratch), PHENIX.name, volume.shape[0], voxel)
    moved = rms_movement(before, after)
    if not moved <= _LARGEST_MOVEMENT_ANGSTROM:
        said = "has no atom of the given one" if np.isnan(moved) else f"lies {moved:.0f} A from the given one"
        raise ProgramError(f"the model that {PHENIX.name} wrote {said}", "", "check its output in the folder logs of the result")
    return {"model_file": bytes_of(after), "moved_angstrom": moved}


def _written(folder: Path) -> Path:
    """The refined model; Phenix numbers its files, and writes PDB files as well where the model fits into one."""
    for ending in ("cif", "pdb"):
        found = sorted(folder.glob(f"*real_space_refined*.{ending}"))
        if found:
            return found[-1]
    raise ProgramError(
        f"{PHENIX.name} exited with status 0, but wrote no refined model",
        "this version of Phenix names its files differently",
        "check its output in the folder logs of the result",
    )


@phenix_real_space_refine.sentence
def says(result: Mapping[str, Any]) -> str:
    """How far the atoms were moved."""
    return f"atoms moved by {float(result['moved_angstrom']):.2f} A (root mean square)"
