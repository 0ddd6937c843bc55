"""``python -m cryodask.web.masking``: coarse maps and masks, computed in a process that ends, so that the server does not keep its memory.

It reads a job as JSON from its input and writes the result to its output: for a coarse map an ``.npy`` file; for a mask a little-endian
u4, the length of the JSON head (``highest``, ``auto``, ``size``, ``share``), the head, and the mask as bytes, 255 for 1; z, then y, then x.
"""

from __future__ import annotations

import io
import json
import struct
import sys
from typing import Any

import numpy as np

from cryodask.kernels.regions import Drawn, density_threshold, low_passed, soft_mask


def coarse(job: dict[str, Any]) -> bytes:
    """The map of a step, low-passed for a grid of ``size`` voxels per side."""
    from cryodask.store.generation import Generation

    generation, number = Generation(job["generation"]), int(job["number"])
    if number:
        volume = np.asarray(generation.result_reader(job["variable"])[number - 1])
    else:
        volume = np.asarray(generation.read(generation.committed()[0], job["variable"]))
    pixel, size = float(job["pixel"]), int(job["size"])
    file = io.BytesIO()
    np.save(file, low_passed(volume, pixel, 2.0 * pixel * len(volume) / size, size))
    return file.getvalue()


def mask(job: dict[str, Any]) -> bytes:
    """The mask of a coarse map by a recipe of stage ``draw_mask``."""
    small, recipe = np.load(job["coarse"], allow_pickle=False), job["recipe"]
    pixel, voxels = float(job["pixel"]), int(job["voxels"])
    spacing = pixel * voxels / len(small)
    smooth = low_passed(small, spacing, float(job["lowpass"]))
    auto, wanted = density_threshold(smooth), recipe["threshold"]
    made = soft_mask(
        smooth,
        auto if wanted == "auto" else np.inf if wanted == "none" else float(wanted),
        pixel_size_angstrom=spacing,
        # the boundary lies half a voxel beyond the centres of the outermost ones
        extend_angstrom=float(recipe["extend_angstrom"]) + (spacing - pixel) / 2,
        edge_angstrom=float(recipe["edge_angstrom"]),
        drawn=[Drawn(one["points"], float(one["radius_angstrom"]), bool(one["erase"])) for one in recipe["strokes"]],
        centre=(voxels // 2) * pixel / spacing,
    )
    said = {"highest": float(smooth.max()), "auto": auto, "size": len(made), "share": float(made.mean())}
    head = json.dumps(said).encode()
    return struct.pack("<I", len(head)) + head + np.round(255 * made).astype(np.uint8).tobytes()


def main() -> None:
    """Do the job."""
    job = json.load(sys.stdin)
    sys.stdout.buffer.write({"coarse": coarse, "mask": mask}[job["do"]](job))


if __name__ == "__main__":
    main()
