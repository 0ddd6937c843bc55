"""Real particles: 2374 unselected picks of EMPIAR-10204 (junk included), D2, from another group's map at 40 A.

The half-maps of RELION's poses (1459 selected particles) correlate 0.715 and 0.502 at 9.06 and 7.55 A, in a sphere of 95 A. Also
classifies the particles in two dimensions and saves the averages.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import mrcfile
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _stacks import OUT, iterate, ngl_map, read_map, real_stack, sphere_fsc

from cryodask.kernels.resampling import resample_map
from cryodask.stages.refine3d import Refine3DParams, refine3d


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    images, particles = real_stack()
    pixel = particles.pixel_size_angstrom
    seconds = [0.0]

    def watch(state: dict, metrics: dict, columns: dict, cpu: float) -> None:
        seconds[0] = cpu
        if "scored_angstrom" in metrics:
            print(
                f"{cpu:6.1f} s  scored {metrics['scored_angstrom']:5.1f} A  supported {metrics['resolution_angstrom']:5.1f} A  "
                f"shifts {metrics['shift_sigma_angstrom']:.1f} A  certainty {metrics['certainty']:.3f}",
                flush=True,
            )

    start = ngl_map()
    params = Refine3DParams(symmetry="D2", reference=str(start), mask_diameter_angstrom=200.0)
    result, _ = iterate(refine3d, params, images, particles, watch=watch)
    other, voxel = read_map(start)
    ngl = resample_map(torch.from_numpy(other), voxel, 64, pixel, cut_angstrom=2 * pixel).numpy()
    halves = sphere_fsc(*result["half_map"], pixel)
    theirs = sphere_fsc(result["final_map"], ngl, pixel)
    for shell in (10, 15, 20, 22, 25, 28, 30):
        print(f"{64 * pixel / shell:6.2f} A   halves {halves[shell]:.3f}   ngl map {theirs[shell]:.3f}")
    with mrcfile.new(OUT / "real_betagal.mrc", overwrite=True) as f:
        f.set_data(result["final_map"])
        f.voxel_size = pixel
    classify(images, particles)
    print(json.dumps({
        "half_fsc_9_06A": round(float(halves[25]), 4),
        "half_fsc_7_55A": round(float(halves[30]), 4),
        "map_fsc_9_06A": round(float(theirs[25]), 4),
        "cpu_seconds": round(seconds[0], 1),
    }))  # fmt: skip


def classify(images: np.ndarray, particles: object) -> None:
    from cryodask.stages._map_pictures import draw_classes
    from cryodask.stages.classify2d import Classify2DParams, classify2d

    start = time.process_time()
    result, _ = iterate(classify2d, Classify2DParams(classes=30, mask_diameter_angstrom=200.0), images, particles)  # type: ignore[arg-type]
    picture = draw_classes(result["class_average"], result["class_score"], result["class_share"], result["class_resolution_angstrom"])
    picture.figure.savefig(OUT / "real_betagal_classes.png", dpi=120)
    print(f"classify2d: {time.process_time() - start:.1f} CPU s, scores {np.sort(result['class_score'])[::-1].round(2)}")


if __name__ == "__main__":
    main()
