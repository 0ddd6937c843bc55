"""A small molecule in two states, with simulated particles at known poses, for the stages that work at fixed poses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from _particles import blob_map, ctf_columns, project

from cryodask.kernels.orientations import matrix_to_euler, random_rotations
from cryodask.stage import ParticleSet

BOX, PIXEL = 32, 6.0


def blob(place: tuple[float, float, float], height: float = 2.5, width: float = 2.0) -> torch.Tensor:
    """A Gaussian at a place (z, y, x) in pixels from the centre."""
    c = torch.arange(BOX).float() - BOX // 2
    z, y, x = torch.meshgrid(c, c, c, indexing="ij")
    square = sum((a - p) ** 2 for a, p in zip((z, y, x), place))
    return height * torch.exp(-square / (2 * width**2))  # type: ignore[operator]


def posed(particles: ParticleSet, rotations: torch.Tensor, origins_px: np.ndarray) -> ParticleSet:
    """The set with poses as columns."""
    angles = (np.degrees(a.numpy()) for a in matrix_to_euler(rotations.double()))
    columns = dict(zip(("rot_deg", "tilt_deg", "psi_deg"), angles))
    columns |= {f"origin_{axis}_angstrom": origins_px[:, i] * particles.pixel_size_angstrom for i, axis in enumerate("yx")}
    return replace(particles, columns={**particles.columns, **columns})


def two_states(count: int = 500, share: float = 0.4, noise: float = 1.0, seed: int = 5) -> SimpleNamespace:
    """Particles of which ``share`` have a blob in another place; white noise of unit standard deviation times ``noise``."""
    body = blob_map(BOX, blobs=8, reach=0.25, width_px=2.0)
    here, there = (0.0, 4.0, 8.0), (0.0, -4.0, 8.0)
    maps = [body + blob(here), body + blob(there)]
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < share).astype(int)
    rotations = random_rotations(count, torch.Generator().manual_seed(seed))
    origins = rng.normal(0.0, 0.7, (count, 2))
    columns = ctf_columns(count, seed)
    images = np.zeros((count, BOX, BOX), np.float32)
    for k, one in enumerate(maps):
        rows = np.nonzero(labels == k)[0]
        if not len(rows):
            continue
        own = {name: values[rows] for name, values in columns.items()}
        images[rows] = project(one, rotations[rows], torch.from_numpy(origins[rows]).float(), own, PIXEL)
    scale = float(0.5 / images.std())
    images *= scale
    images += noise * rng.standard_normal(images.shape).astype(np.float32)
    particles = posed(ParticleSet(count, BOX, PIXEL, columns), rotations, origins)
    mask = (blob(here, 1.0, 3.5) + blob(there, 1.0, 3.5)).clamp(0, 1)
    return SimpleNamespace(
        images=images, particles=particles, labels=labels, maps=[m * scale for m in maps], rotations=rotations, origins=origins,
        mask=mask.numpy(), body=body,
    )  # fmt: skip


def inputs_of(some: SimpleNamespace, *, mask: Any = None) -> dict[str, Any]:
    """The other inputs of a stage: the mean map, perhaps a mask."""
    mean = 0.6 * some.maps[0] + 0.4 * some.maps[1]
    return {"final_map": mean.numpy(), "map_pixel_size_angstrom": PIXEL, **({} if mask is None else {"solvent_mask": mask})}


def write_project(folder: Any, some: SimpleNamespace, pipeline: list[Any], name: str = "p") -> Any:
    """A project file with the particles and their poses as a STAR file, the mean map and the mask; returns the path."""
    import pandas as pd
    import starfile
    import yaml

    from cryodask.formats.mrc import write_mrc

    write_mrc(folder / "particles.mrcs", some.images, PIXEL)
    write_mrc(folder / "map.mrc", inputs_of(some)["final_map"], PIXEL)
    write_mrc(folder / "mask.mrc", some.mask, PIXEL)
    columns, count = some.particles.columns, len(some.labels)
    optics = {"rlnOpticsGroupName": ["og1"], "rlnOpticsGroup": [1], "rlnVoltage": [300.0], "rlnSphericalAberration": [2.7],
              "rlnAmplitudeContrast": [0.1], "rlnImagePixelSize": [PIXEL], "rlnImageSize": [BOX],
              "rlnImageDimensionality": [2]}  # fmt: skip
    rows = {
        "rlnImageName": [f"{i + 1:06d}@particles.mrcs" for i in range(count)], "rlnMicrographName": "m.mrc", "rlnOpticsGroup": 1,
        "rlnCoordinateX": 100.0 + np.arange(count), "rlnCoordinateY": 100.0, "rlnRandomSubset": 1 + np.arange(count) % 2,
        "rlnDefocusU": columns["defocus_u_angstrom"], "rlnDefocusV": columns["defocus_v_angstrom"],
        "rlnDefocusAngle": columns["defocus_angle_deg"], "rlnAngleRot": columns["rot_deg"], "rlnAngleTilt": columns["tilt_deg"],
        "rlnAnglePsi": columns["psi_deg"], "rlnOriginYAngst": columns["origin_y_angstrom"], "rlnOriginXAngst": columns["origin_x_angstrom"],
    }  # fmt: skip
    starfile.write({"optics": pd.DataFrame(optics), "particles": pd.DataFrame(rows)}, folder / "particles.star", overwrite=True)
    steps: list[Any] = [
        {"import_particles": {"star": "particles.star"}},
        {"import_map": {"file": "map.mrc", "symmetry": "C1", "frame_of": "import_particles"}},
        {"import_mask": {"file": "mask.mrc"}},
        *pipeline,
    ]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, "pipeline": steps}))
    return path
