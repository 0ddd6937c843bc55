"""Maps at points of the space of components: the mean map plus the components times their coordinates.

The pages make them in a process for each, so nothing is imported here that takes longer than that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cryodask.store.generation import Generation


def mean_map(generation: Generation) -> np.ndarray:
    """The mean map `(z, y, x)` of an analysis of variability: its particles at the origin of the space of components."""
    reader = generation.result_reader("component_series")
    middle = reader.shape[1] // 2
    # one map of the series: all of them together can be larger than the memory
    window = (slice(0, 1), slice(middle, middle + 1), *(slice(None),) * 3)
    return np.asarray(reader.window(window)[0, 0], np.float32)


def map_at(generation: Generation, point: Sequence[float]) -> np.ndarray:
    """The map `(z, y, x)`, float32, at coordinates along the components, in standard deviations; those that are left out are 0."""
    out = mean_map(generation)
    reader = generation.result_reader("component_map")
    for number, z in enumerate(point):
        if z:
            out += np.float32(z) * reader[number]
    return out
