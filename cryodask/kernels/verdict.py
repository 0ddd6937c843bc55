"""Whether a refinement has found the molecule: evidence that needs no ground truth, and that aligned noise cannot give.

The correlation of two half-maps cannot tell, because both inherit the errors of their starting map: a chimera of pseudo-symmetry mates
agrees with itself. Two things can. Particles of a right map have one pose that is much likelier than all others; those of a chimera do
not. And particles that a map has never seen become likelier by its detail; by the detail of a wrong map they do not.

Maps that pass can still be wrong in ways of their own, and each has a figure. A map with a wrong point group, or of two molecules, leaves
much of the images' signal unexplained; views from one side leave Fourier space empty; a mask that is too small leaves density outside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CERTAIN = 0.7
"""Least mean share of the likeliest pose. Of runs with known truth, right ones had 0.72 to 1.00, wrong ones at most 0.64 (or a gain below
the next line). It was set on an earlier form of the search, with which right runs had 0.775 and more; no error rate is known."""
LEAST_GAIN = 2.5
LEAST_Z = 6.0
LEAST_EXPLAINED = 0.8
"""Right maps of six molecules had 0.94 to 1.07, one with a sixth of foreign particles 0.84; wrong point groups and halves of two
molecules that passed the lines above, at most 0.71."""
LEAST_COVERAGE = 0.5
"""Views within 30 degrees of one axis reach half of Fourier space."""
MOST_CUT = 0.05
"""Masks of 0.75 of the molecule's diameter left 0.09 and 0.11 outside, those of 0.9 and more 0.02 at most."""
FIGURES = ("pose_certainty", "held_out_gain", "held_out_z", "explained_share", "view_coverage", "cut_share")


@dataclass(frozen=True)
class Evidence:
    """Evidence for and against a map.

    ``pose_certainty``: mean share of the likeliest pose in a particle's posterior, at the first pass over all views that was fine
    enough (NaN: none was). ``held_out_gain``: mean gain of log-likelihood per particle by the detail of the other half's map, over the
    same map cut at the resolution of the start; ``held_out_z``: in standard errors. ``explained_share`` of the particles' signal by the
    map of the other half (NaN: not known, the mask fills the box); ``view_coverage``: share of Fourier space that views reach at the
    resolution of the half-maps; ``cut_share`` of their common power outside the mask.
    """

    pose_certainty: float
    held_out_gain: float
    held_out_z: float
    explained_share: float = math.nan
    view_coverage: float = math.nan
    cut_share: float = math.nan

    @property
    def succeeded(self) -> bool:
        """Whether all of the evidence supports the map."""
        return self.found and not self.objections()

    @property
    def found(self) -> bool:
        """Whether particles have one pose each, and detail helps those that it was not made from."""
        return self.pose_certainty >= CERTAIN and self.held_out_gain >= LEAST_GAIN and self.held_out_z >= LEAST_Z

    def objections(self) -> list[str]:
        """What is wrong with the map or the particles; figures that are not known (NaN) are not held against it."""
        out = []
        if self.cut_share > MOST_CUT:
            out.append(f"{100 * self.cut_share:.0f} % of the density lies outside the mask: mask_diameter_angstrom is too small")
        if self.view_coverage < LEAST_COVERAGE:
            out.append(f"the views reach {100 * self.view_coverage:.0f} % of Fourier space (needed {100 * LEAST_COVERAGE:.0f} %)")
        # of a map that was not found it says nothing new
        if self.found and self.explained_share < LEAST_EXPLAINED:
            out.append(
                f"the map explains {100 * self.explained_share:.0f} % of its particles' signal (needed {100 * LEAST_EXPLAINED:.0f} %): the "
                "point group is too high, or there are several molecules"
            )
        return out

    def sentence(self) -> str:
        """The verdict with its figures, as a sentence."""
        if math.isnan(self.pose_certainty):
            figures = "the particles never agreed on a map fine enough to decide their orientations"
        else:
            figures = (
                f"the likeliest pose of a particle holds {100 * self.pose_certainty:.0f} % of its posterior (needed {100 * CERTAIN:.0f} %)"
                f", detail gains {self.held_out_gain:.1f} nats per unseen particle (needed {LEAST_GAIN:g})"
            )
        said = self.objections() if self.found else [figures, *self.objections()]
        return f"solved: {figures}" if self.succeeded else f"not solved: {'; '.join(said)}"
