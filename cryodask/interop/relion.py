"""Export to RELION 3.1: a folder in which its programs run as in a project of their own."""

from __future__ import annotations

from pathlib import Path

from cryodask.errors import StarError
from cryodask.interop.exposures import Exposures
from cryodask.interop.relion_maps import write_maps
from cryodask.interop.relion_micrographs import write_coordinates, write_micrographs, write_motion
from cryodask.interop.relion_particles import write_classes, write_particles, write_tracks
from cryodask.store.files import disk_errors
from cryodask.store.project import Project


def export_relion(project: Project, folder: str | Path) -> list[Path]:
    """Export a project as RELION 3.1 files; return the paths written.

    ``micrographs_ctf.star`` with ``micrographs/*.mrc``; ``corrected_micrographs.star`` with ``motion/*.star``, links to the movies
    (``movies/*``), the gains as they were applied (``gains/*.mrc``) and their defects; ``coordinates/micrographs/*.star``;
    ``particles.star`` + ``.mrcs`` (the particles of the last refinement with their poses, else those of the last curation, else all),
    ``class_averages.mrcs`` + ``.star``, ``half1.mrc, half2.mrc`` (unmasked, unsharpened), ``map.mrc`` (sharpened where post-processing
    ran), ``mask.mrc``, ``postprocess.star``. After ``polish``: the refined motion, the new images as ``particles.mrcs`` (RELION's shiny
    particles), and the particles' tracks (``polish/micrographs/*_tracks.star``). Everything is in the row order of MRC files. The
    exposures are those that the particles come from, without those that a selection excludes. Poses are mapped into RELION's asymmetric
    unit for the point group of their map: that of the refinement that gave them, or of an ``import_map`` with ``frame_of``.
    """
    out = Path(folder)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        exposures = Exposures.of(project)
        _check_names(exposures)
        written = [*write_micrographs(exposures, out), *write_motion(exposures, out), *write_coordinates(exposures, out)]
        written += [*write_particles(exposures, out), *write_tracks(exposures, out)]
        return [*written, *write_classes(project, out), *write_maps(project, out)]


def _check_names(exposures: Exposures) -> None:
    """Refuse names that RELION cannot read, before anything large is written."""
    bad = [name for name in exposures.items if name.split() != [name] or not name.isprintable() or any(c in name for c in "'\"#")]
    if bad:
        raise StarError(f"RELION cannot read the name {bad[0]!r}.", "it has blanks, quotes or #", "rename the movie; its results stay")
