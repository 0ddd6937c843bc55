"""Series of maps along the components of variability, as MRC files."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from cryodask.errors import ProjectFileError
from cryodask.formats.mrc import write_mrc
from cryodask.interop.refined_optics import ExportWarning
from cryodask.stages.variability import LEAST_AGREEMENT
from cryodask.store.components import mean_map
from cryodask.store.files import disk_errors, write_atomically
from cryodask.store.project import Project

QUANTILES = (0.05, 0.95)
"""Share of the particles below the first and the last map of a series, as cryoDRGN's ``pc_traversal`` takes them (Zhong et al. 2021)."""
STEPS = 10


def export_components(project: Project, folder: str | Path, *, steps: int = STEPS) -> list[Path]:
    """Write series of maps along each component of the last analysis of variability, for a viewer that steps through them.

    ``STEP_component1_01.mrc`` ... lie at equal distances from the 5 % to the 95 % quantile of the particles' coordinates, the other
    coordinates being 0; ``STEP_series.csv`` lists them.

    Raises
    ------
    ProjectFileError
        If there is no such analysis.
    """
    found = project.latest("particles", "components")
    generation = project.generation(found) if found is not None else None
    if found is None or generation is None or "component_map" not in generation.meta["gives"]:
        raise ProjectFileError("There are no components of variability to export.", "no step variability has finished", "run one first")
    out, record = Path(folder), generation.committed()[0]
    agreement = np.asarray(generation.read(record, "component_agreement"))
    pixel = float(generation.read(record, "map_pixel_size_angstrom"))
    noise = [str(j + 1) for j in np.flatnonzero(~(agreement >= LEAST_AGREEMENT))]
    if noise:
        warnings.warn(
            f"Component {', '.join(noise)} of {found} is noise: the half-sets do not find it independently. Do not interpret its series.",
            ExportWarning,
            stacklevel=2,
        )
    written, lines = [], ["file,component,coordinate"]
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        mean = mean_map(generation)
        components = generation.result_reader("component_map")
        for j in range(len(agreement)):
            coordinates = np.asarray(generation.read(record, f"component{j + 1}"), np.float64)
            low, high = np.nanquantile(coordinates, QUANTILES)
            component = components[j]
            for k, z in enumerate(np.linspace(low, high, steps)):
                path = out / f"{found}_component{j + 1}_{k + 1:02d}.mrc"
                write_mrc(path, mean + np.float32(z) * component, pixel)
                written.append(path)
                lines.append(f"{path.name},{j + 1},{z:.6g}")
        table = out / f"{found}_series.csv"
        write_atomically(table, "\n".join([*lines, ""]))
    return [*written, table]
