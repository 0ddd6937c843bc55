"""Whether a refinement has found the molecule: evidence that needs no truth, and cannot be had by aligning noise.

The correlation of two half-maps cannot tell, because both inherit the errors of their common start: a chimera of pseudo-symmetry mates
agrees with itself. Two things can. Particles of a right map have one pose that is much likelier than all others; those of a chimera do
not. And particles that a map has never seen become likelier by its detail; by the detail of a wrong map they do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CERTAIN = 0.7
"""Least mean share of the likeliest pose. Of 23 runs with known truth, right ones had 0.775 to 1.00, wrong ones at most 0.64 (or a gain
below the next line); the threshold was set on these runs."""
LEAST_GAIN = 2.5
LEAST_Z = 6.0


@dataclass(frozen=True)
class Evidence:
    """What speaks for a map.

    ``pose_certainty``: mean share of the likeliest pose in a particle's posterior, at the first pass over all views that was fine
    enough (NaN: none was). ``gain``: mean gain of log-likelihood per particle by the detail of the other half's map, over the same map
    cut at the resolution of the start; ``z``: in standard errors.
    """

    pose_certainty: float
    gain: float
    z: float

    @property
    def succeeded(self) -> bool:
        """Whether all of it speaks for the map."""
        return self.pose_certainty >= CERTAIN and self.gain >= LEAST_GAIN and self.z >= LEAST_Z

    def sentence(self) -> str:
        """The verdict with its figures, for people."""
        if math.isnan(self.pose_certainty):
            return "not solved: the particles never agreed on a map fine enough to decide their orientations"
        figures = (
            f"the likeliest pose of a particle holds {100 * self.pose_certainty:.0f} % of its posterior (needed {100 * CERTAIN:.0f} %), "
            f"detail gains {self.gain:.1f} nats per unseen particle (needed {LEAST_GAIN:g})"
        )
        return f"{'solved' if self.succeeded else 'not solved'}: {figures}"
