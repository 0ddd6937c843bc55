"""Particle sets as stages see them: ids, order, columns, and reading of images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cryodask.stage import ParticleBlock, ParticleSet
from cryodask.store.particles import ImagePlaces


def particle_block(
    index: np.ndarray, images: np.ndarray, columns: dict[str, np.ndarray], pixel_size_angstrom: float, half: int
) -> ParticleBlock:
    """Some particles, their images corrected for the odd aberrations and the magnification that CTF refinement has found."""
    from cryodask.kernels.aberrations import corrected

    return ParticleBlock(index, *corrected(images, columns, pixel_size_angstrom), pixel_size_angstrom, half)


@dataclass(frozen=True)
class StoredParticles:
    """A particle set and the location of its images; ``ids`` `(n,)` int64, sorted, identify its particles."""

    set: ParticleSet
    ids: np.ndarray
    images: ImagePlaces

    def block(self, index: np.ndarray, half: int = 0) -> ParticleBlock:
        """Some particles with their images, float32."""
        columns = {name: values[index] for name, values in self.set.columns.items()}
        return particle_block(index, self.images.take(index).read(), columns, self.set.pixel_size_angstrom, half)
