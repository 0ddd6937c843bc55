"""Particle sets: which particles a stage sees, in which order, and how their images are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cryodask.stage import ParticleBlock, ParticleSet
from cryodask.store.generation import Generation
from cryodask.store.journal import decode_value

# a particle's CTF comes from the particle where an import gave it, else from its micrograph
_CTF_COLUMNS = ("defocus_u_angstrom", "defocus_v_angstrom", "defocus_angle_deg", "phase_shift_deg")
_OPTICS = ("voltage_kv", "spherical_aberration_mm", "amplitude_contrast")


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

    def with_columns(self, columns: dict[str, np.ndarray]) -> StoredParticles:
        """The same particles with further columns."""
        more = ParticleSet(self.set.count, self.set.box, self.set.pixel_size_angstrom, {**self.set.columns, **columns})
        return StoredParticles(more, self.images, self.row, self.slot)

    def align(self, row: np.ndarray, slot: np.ndarray, values: np.ndarray, fill: Any) -> np.ndarray:
        """Values given for other particles (row, slot), brought into the order of this set; ``fill`` where there is none."""
        theirs = {(int(r), int(s)): i for i, (r, s) in enumerate(zip(row, slot))}
        place = np.array([theirs.get((int(r), int(s)), -1) for r, s in zip(self.row, self.slot)], dtype=np.int64)
        out = np.full((self.set.count, *values.shape[1:]), fill, dtype=values.dtype)
        out[place >= 0] = values[place[place >= 0]]
        return out


def collect_particles(images: Generation, rows: list[int], per_micrograph: dict[str, dict[int, float]]) -> StoredParticles:
    """All extracted particles of some micrographs, in order of row and slot.

    Parameters
    ----------
    images : Generation
        Of ``extract`` or ``import_particles``.
    rows : list of int
        Micrographs, in order.
    per_micrograph : dict
        Optics and CTF by micrograph row, for what the particles do not carry themselves.
    """
    records = images.committed()
    counts = [int(records[r]["columns"]["particle_count"]) for r in rows]
    total = sum(counts)
    row = np.repeat(np.array(rows, dtype=np.int64), counts)
    slot = np.concatenate([np.arange(c) for c in counts] or [np.zeros(0, np.int64)]).astype(np.int64)
    columns: dict[str, np.ndarray] = {"micrograph": row}
    for name in (*_CTF_COLUMNS, *_OPTICS):
        own = f"particle_{name}"
        if records and rows and own in records[rows[0]]["columns"]:
            columns[name] = np.concatenate([decode_value(records[r]["columns"][own]) for r in rows]).astype(np.float64)
        elif rows and name in records[rows[0]]["columns"]:
            columns[name] = np.repeat([float(records[r]["columns"][name]) for r in rows], counts)
        elif name in per_micrograph:
            columns[name] = np.repeat([float(per_micrograph[name][r]) for r in rows], counts)
        elif name == "phase_shift_deg":
            columns[name] = np.zeros(total)
    for name in ("particle_y", "particle_x"):
        columns[name] = np.concatenate([decode_value(records[r]["columns"][name]) for r in rows] or [np.zeros(0)]).astype(np.float64)
    columns["half_set"] = (np.arange(total) % 2).astype(np.int8)
    pixel = float(records[rows[0]]["columns"]["particle_pixel_size_angstrom"]) if rows else 0.0
    return StoredParticles(ParticleSet(total, int(images.meta["sizes"]["x"]), pixel, columns), images, row, slot)
