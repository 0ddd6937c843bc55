"""Files of a deposition at EMDB and PDB: map, half-maps, mask, FSC curve and docked model."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np

from cryodask.errors import ProjectFileError
from cryodask.interop.relion_maps import curves_of, write_maps
from cryodask.store.files import disk_errors, write_atomically
from cryodask.store.project import Project


def export_emdb(project: Project, folder: str | Path) -> list[Path]:
    """Write what a deposition of a map asks for: ``map.mrc``, ``half1.mrc``, ``half2.mrc``, ``mask.mrc``, ``fsc.xml`` and ``model.cif``.

    The map is the last view (sharpened or locally filtered), the unsharpened one besides. The model is the last docked one, in the frame of
    the map. Files whose step was not run are left out.

    Raises
    ------
    ProjectFileError
        If there are no half-maps, which EMDB requires.
    """
    out = Path(folder)
    if project.latest("map", "half_maps") is None:
        raise ProjectFileError("There are no half-maps to deposit.", "no refinement has finished", "run refine3d first")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        written = [path for path in write_maps(project, out) if path.suffix == ".mrc"]
        (out / "postprocess.star").unlink(missing_ok=True)  # RELION's
        curves = curves_of(project)
        if curves is not None:
            frequency = 1.0 / curves["shell_resolution_angstrom"].values
            write_atomically(out / "fsc.xml", fsc_xml(frequency, curves["fsc_corrected"].values, "FSC of the half-maps"))
            written.append(out / "fsc.xml")
        model = project.latest("model", "atoms")
        if model is not None:
            write_atomically(out / "model.cif", np.asarray(project[model]["model_file"].values, np.uint8).tobytes())
            written.append(out / "model.cif")
    return written


def fsc_xml(frequency: np.ndarray, correlation: np.ndarray, title: str) -> str:
    """An FSC curve as EMDB takes it: frequencies in 1/Angstrom, from the first shell on."""
    lines = [f'<fsc title={quoteattr(title)} xaxis="Resolution (A-1)" yaxis="Correlation Coefficient">']
    for x, y in zip(frequency[1:].tolist(), correlation[1:].tolist()):
        lines += ["  <coordinate>", f"    <x>{x:.6f}</x>", f"    <y>{y:.6f}</y>", "  </coordinate>"]
    return "\n".join([*lines, "</fsc>", ""])
