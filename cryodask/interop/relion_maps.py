"""Half-maps, map, mask and curves for RELION."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cryodask.formats import star
from cryodask.formats.mrc import write_mrc
from cryodask.store.project import Project

if TYPE_CHECKING:
    import xarray as xr


def write_maps(project: Project, out: Path) -> list[Path]:
    """Half-maps, and the map, mask and curves that the last steps gave."""
    written = []
    halves, mask, post = (project.latest(*p) for p in (("map", "half_maps"), ("mask", "mask"), ("map", "view")))
    pixel = 0.0
    if halves is not None:
        maps = project[halves].load()
        pixel = float(maps["map_pixel_size_angstrom"])
        for i in (0, 1):
            write_mrc(out / f"half{i + 1}.mrc", maps["half_map"].values[i], pixel)
            written.append(out / f"half{i + 1}.mrc")
        whole = maps["half_map"].values.mean(0)
        name = "map.mrc" if post is None else "map_unsharpened.mrc"
        write_mrc(out / name, whole, pixel)
        written.append(out / name)
    if mask is not None:
        write_mrc(out / "mask.mrc", project[mask]["solvent_mask"].values, pixel)
        written.append(out / "mask.mrc")
    if post is not None:
        write_mrc(out / "map.mrc", project[post]["sharpened_map"].values, pixel)
        written.append(out / "map.mrc")
    curves = curves_of(project)
    if curves is not None:
        star.write_postprocess(
            out / "postprocess.star",
            shell_resolution_angstrom=curves["shell_resolution_angstrom"].values,
            fsc_unmasked=curves["fsc_unmasked"].values,
            fsc_masked=curves["fsc_masked"].values,
            fsc_randomised=curves["fsc_randomised"].values,
            fsc_corrected=curves["fsc_corrected"].values,
            resolution_angstrom=float(curves["resolution_angstrom"]),
            b_factor_angstrom2=float(curves["b_factor_angstrom2"]),
        )
        written.append(out / "postprocess.star")
    return written


def curves_of(project: Project) -> xr.Dataset | None:
    """Result of the last step that has measured FSC curves of masked half-maps with a B-factor (post-processing); None if there is none."""
    for label in reversed(project.stages):
        gives = project.generation(label).meta["gives"]
        if "fsc_corrected" in gives and "b_factor_angstrom2" in gives and project.generation(label).committed():
            return project[label].load()
    return None
