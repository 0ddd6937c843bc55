"""Toy classes, which people choose from: four averages of particles of a toy extraction."""

from __future__ import annotations

import numpy as np
from _toy_stages import ToyParams, _Once

from cryodask.stage import stage

CLASSIFIED = ["toy_motion", "toy_ctf", "toy_pick", "toy_extract", "toy_averages"]


@stage(
    version=1,
    shape="blocks",
    params=ToyParams,
    needs=["particle_image"],
    gives=["class_number", "class_probability", "class_average", "class_share", "class_resolution_angstrom"],
)
class toy_averages(_Once):
    """Deals particles to four classes in turn; with another number in another turn."""

    @staticmethod
    def result(params, state, columns):
        count = len(columns["class_number"])
        number = ((np.arange(count) + int(params.number)) % 4 + 1).astype(np.int32)
        y, x = np.mgrid[:32, :32]
        averages = [np.exp(-((y - 8 - 4 * k) ** 2 + (x - 20) ** 2) / (8.0 + 9 * k)) for k in range(4)]
        return {
            "class_number": number,
            "class_probability": np.ones(count, np.float32),
            "class_average": np.array(averages, np.float32),
            "class_share": np.bincount(number, minlength=5)[1:].astype(np.float32) / count,
            "class_resolution_angstrom": np.array([8.0, 9.0, 12.0, np.inf], np.float32),
        }
