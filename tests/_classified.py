"""Toy classes and components, which people choose from: four averages of particles of a toy extraction, and two coordinates."""

from __future__ import annotations

import numpy as np
from _toy_stages import ToyParams, _Once

from cryodask.stage import Output, stage

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


@stage(
    version=1,
    shape="blocks",
    params=ToyParams,
    needs=["particle_image"],
    gives=["component1", "component2", "component_map", "component_series", "component_agreement", "map_pixel_size_angstrom"],
    outputs=[Output("particles", "particles", ("components",), on="particles")],
)
class toy_components(_Once):
    """Spreads particles along the first of two components, from -2 to 2 times a number."""

    @staticmethod
    def result(params, state, columns):
        count = len(columns["class_number"])
        maps = np.zeros((2, 8, 8, 8), np.float32)
        return {
            "component1": np.linspace(-2, 2, count, dtype=np.float32) * np.float32(params.number),
            "component2": np.zeros(count, np.float32),
            "component_map": maps,
            "component_series": np.repeat(maps[:, None], 5, 1),
            "component_agreement": np.array([0.9, 0.1]),
            "map_pixel_size_angstrom": 3.0,
        }


@stage(
    version=1,
    shape="blocks",
    params=ToyParams,
    needs=["particle_image"],
    gives=["class3d_number", "class_map", "class_half_map", "map_pixel_size_angstrom"],
    ports=["particles[image, pose]"],
    outputs=[
        Output("particles", "particles", ("class3d",), on="particles", partition=True),
        *(Output(f"class{k}", "particles", on="particles", subset=True) for k in (1, 2)),
        *(Output(f"class{k}", "map", ("final", "half_maps"), frame="same") for k in (1, 2)),
    ],
)
class toy_classes3d(_Once):
    """Deals particles to two classes, whose maps are cubes of 1 and 2."""

    @staticmethod
    def result(params, state, columns):
        maps = np.zeros((2, 8, 8, 8), np.float32)
        maps[:, 2:6, 2:6, 2:6] = np.array([1.0, 2.0])[:, None, None, None]
        number = (np.arange(len(columns["class_number"])) % 2 + 1).astype(np.int32)
        return {
            "class3d_number": number,
            "class_map": maps,
            "class_half_map": np.repeat(maps[:, None], 2, 1),
            "map_pixel_size_angstrom": 1.0,
        }
