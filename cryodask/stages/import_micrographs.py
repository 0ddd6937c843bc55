"""Stage ``import_micrographs``: motion-corrected micrographs from another program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError, MicrographError
from cryodask.formats.mrc import read_mrc
from cryodask.formats.star import in_micrometres, read_labels, read_optics
from cryodask.stage import Context, Output, Params, SourceFile, stage


class ImportMicrographsParams(Params):
    """Parameters of ``import_micrographs``."""

    star: SourceFile = Field(description="RELION STAR file of motion-corrected micrographs")


def _outputs(params: ImportMicrographsParams) -> tuple[Output, ...]:
    there = Path(getattr(params, "star", "")).is_file()
    ctf = ("ctf",) if not there or {"rlnDefocusU", "rlnDefocusAngle"} & read_labels(params.star, "micrographs", "movies", "") else ()
    sizes = frozenset(g["pixel_size_angstrom"] for g in read_optics(params.star) if "pixel_size_angstrom" in g) if there else frozenset()
    return (Output("exposures", "exposures", ("micrograph", "optics", *ctf), pixel_sizes=sizes),)


@stage(
    version=1,
    needs=["micrograph_path"],
    optional=["defocus_u_angstrom", "defocus_v_angstrom"],
    ports=[],
    outputs=_outputs,
    gives=["micrograph_sum", "micrograph_dw"],
)
def import_micrographs(
    params: ImportMicrographsParams,
    *,
    micrograph_path: str,
    defocus_u_angstrom: float | None = None,
    defocus_v_angstrom: float | None = None,
    context: Context,
) -> dict[str, Any]:
    """Read motion-corrected micrographs (MRC) listed in a STAR file.

    The image is used both as plain and as dose-weighted sum, because the file does not say which of the two it is.
    """
    for name, defocus in (("rlnDefocusU", defocus_u_angstrom), ("rlnDefocusV", defocus_v_angstrom)):
        if defocus is not None and in_micrometres(np.array([defocus])).any():
            raise MicrographError(
                f"{name} of {micrograph_path} is {defocus:g} A in {params.star}.", "it is in micrometres", "write it in Angstrom"
            )
    try:
        image, _ = read_mrc(micrograph_path)
    except InputError as error:
        raise MicrographError(error.what, error.usual_reason, error.way_out) from error
    image = np.asarray(image, np.float32)
    image = image[0] if image.ndim == 3 and len(image) == 1 else image
    if image.ndim != 2:
        raise MicrographError(f"{micrograph_path} has the shape {image.shape}.", "it is a movie or a stack", "list corrected micrographs")
    if not np.isfinite(image).all():
        raise MicrographError(
            f"{micrograph_path} holds {int((~np.isfinite(image)).sum())} pixels that are NaN or infinite.",
            "the program that made it failed on this micrograph",
            "recompute it, or remove it from the STAR file",
        )
    return {"micrograph_sum": image, "micrograph_dw": image}
