"""Particle sets: which particles a stage sees, in which order, and how their images are read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cryodask.stage import ParticleBlock, ParticleSet
from cryodask.store.generation import Generation
from cryodask.store.particles import ByRow, gather_columns


@dataclass(frozen=True)
class StoredParticles:
    """A particle set and where its images lie. Identity of a particle: micrograph row and slot of the generation ``images``."""

    set: ParticleSet
    images: Generation
    row: np.ndarray
    slot: np.ndarray

    def block(self, index: np.ndarray, half: int = 0) -> ParticleBlock:
        """Some particles with their images, float32."""
        columns = {name: values[index] for name, values in self.set.columns.items()}
        return ParticleBlock(index, self.read_images(index), columns, self.set.pixel_size_angstrom, half)

    def read_images(self, index: np.ndarray) -> np.ndarray:
        """Images `(n, y, x)` of the particles at ``index`` of the set; each shard is opened once."""
        box = self.set.box
        out = np.empty((len(index), box, box), np.float32)
        rows, slots = self.row[index], self.slot[index]
        for row in np.unique(rows):
            reader = self.images.shard(int(row), "particle_image")
            here = np.nonzero(rows == row)[0]
            step = reader.layout.chunk[0]
            for slab in np.unique(slots[here] // step):
                in_slab = here[slots[here] // step == slab]
                out[in_slab] = reader.slab(int(slab))[slots[in_slab] % step]
        return out

    def keep(self, mask: np.ndarray) -> StoredParticles:
        """The particles where ``mask`` is true, order kept; halves are dealt anew only by the stage that needs them."""
        columns = {name: values[mask] for name, values in self.set.columns.items()}
        kept = ParticleSet(int(mask.sum()), self.set.box, self.set.pixel_size_angstrom, columns)
        return StoredParticles(kept, self.images, self.row[mask], self.slot[mask])


def collect_particles(images: Generation, rows: list[int], per_micrograph: ByRow) -> StoredParticles:
    """All extracted particles of some micrographs, in order of row and slot; arguments as :func:`gather_columns`."""
    columns = gather_columns(images, rows, per_micrograph)
    row, slot = columns.pop("particle_row"), columns.pop("particle_slot")
    columns |= {"micrograph": row, "half_set": (np.arange(len(row)) % 2).astype(np.int8)}
    pixel = float(images.committed()[rows[0]]["columns"]["particle_pixel_size_angstrom"]) if rows else 0.0
    return StoredParticles(ParticleSet(len(row), int(images.meta["sizes"]["x"]), pixel, columns), images, row, slot)
