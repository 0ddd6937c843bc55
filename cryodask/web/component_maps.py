"""``python -m cryodask.web.component_maps``: maps and pictures of the page of components, computed in a process that ends (see aside.py).

It reads a job as JSON from its input and writes the result to its output. ``coarse``: an ``.npy`` file, mean map and components on a coarse
grid, `(1 + component, z, y, x)`. ``map``: nothing; an MRC file of the map at a point, at ``file``. ``images``: a PNG of particles.
"""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import numpy as np

_ACROSS = 8
_SIDE_PX = 96
_SIGMAS = 3.0


def coarse(job: dict[str, Any]) -> bytes:
    """The mean map and the components of an analysis, low-passed for a grid of ``size`` voxels per side."""
    from cryodask.kernels.regions import low_passed
    from cryodask.store.components import mean_map
    from cryodask.store.generation import Generation

    generation = Generation(job["generation"])
    reader = generation.result_reader("component_map")
    pixel, size = float(job["pixel"]), int(job["size"])

    def small(volume: np.ndarray) -> np.ndarray:
        return low_passed(volume, pixel, 2.0 * pixel * len(volume) / size, size)

    file = io.BytesIO()
    np.save(file, np.stack([small(mean_map(generation)), *(small(one) for one in reader)]))
    return file.getvalue()


def one_map(job: dict[str, Any]) -> bytes:
    """Write the map at a point of the space of components, with all its voxels, to a file."""
    from cryodask.formats.mrc import write_mrc
    from cryodask.store.components import map_at
    from cryodask.store.generation import Generation

    write_mrc(job["file"], map_at(Generation(job["generation"]), job["point"]), float(job["pixel"]))
    return b""


def images(job: dict[str, Any]) -> bytes:
    """Images of some particles of a step side by side, averaged over blocks of pixels, each with a grey scale of its own."""
    from PIL import Image

    from cryodask.kernels.isosurface import reduced
    from cryodask.store.particles import image_places
    from cryodask.store.project import Project
    from cryodask.web.pictures import upright

    project = Project(job["project"])
    ids = np.array(job["ids"], np.int64)
    shown = image_places(project, project.product(job["step"], "particles"), ids).read()
    tiles = []
    for one in shown:
        small = reduced(one[None].repeat(-(-max(one.shape) // _SIDE_PX), 0), _SIDE_PX)[0]
        mean, deviation = float(small.mean()), max(float(small.std()), 1e-20)
        tiles.append(upright(np.clip(128 + (small - mean) * (127 / (_SIGMAS * deviation)), 0, 255).astype(np.uint8)))
    height, width = tiles[0].shape
    rows = -(-len(tiles) // _ACROSS)
    sheet = np.full((rows * (height + 2), _ACROSS * (width + 2)), 255, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = (number // _ACROSS) * (height + 2), (number % _ACROSS) * (width + 2)
        sheet[top : top + height, left : left + width] = tile
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "PNG")
    return file.getvalue()


def main() -> None:
    """Do the job."""
    job = json.load(sys.stdin)
    sys.stdout.buffer.write({"coarse": coarse, "map": one_map, "images": images}[job["do"]](job))


if __name__ == "__main__":
    main()
