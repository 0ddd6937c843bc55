"""RELION's STAR files, under the names of the vocabulary.

``COLUMNS`` is the table of names. Differences beyond the name are converted: RELION counts half-sets and images
of a stack from 1 (here from 0), and writes optics once per group (here once per row). Tables are those of RELION 3.1 and
later; a table of RELION 3.0 is read if it has its own optics columns, and refused otherwise.
"""

from cryodask.formats.star.head import read_labels, read_optics
from cryodask.formats.star.names import ALIASES, COLUMNS, CRYOSPARC, OPTICS, Column, bare, stem
from cryodask.formats.star.numbers import in_micrometres
from cryodask.formats.star.particles import ParticleTable, read_particle_table
from cryodask.formats.star.read import Columns, find_beside, read_coordinates, read_micrographs, read_particles
from cryodask.formats.star.tables import Tables, read_tables, write_tables
from cryodask.formats.star.write import (
    write_coordinates,
    write_corrected_micrographs,
    write_micrographs_ctf,
    write_motion,
    write_particle_tracks,
    write_particles,
    write_postprocess,
)

__all__ = [
    "ALIASES",
    "COLUMNS",
    "CRYOSPARC",
    "OPTICS",
    "Column",
    "Columns",
    "ParticleTable",
    "Tables",
    "bare",
    "find_beside",
    "in_micrometres",
    "read_coordinates",
    "read_labels",
    "read_micrographs",
    "read_optics",
    "read_particle_table",
    "read_particles",
    "read_tables",
    "stem",
    "write_coordinates",
    "write_corrected_micrographs",
    "write_micrographs_ctf",
    "write_motion",
    "write_particle_tracks",
    "write_particles",
    "write_postprocess",
    "write_tables",
]
