"""Small STAR files for tests, as other programs write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.formats.mrc import write_mrc
from cryodask.stage import load_stages

GROUP = {
    "OpticsGroupName": "o", "OpticsGroup": 1, "Voltage": 300, "SphericalAberration": 2.7, "AmplitudeContrast": 0.1,
    "MicrographPixelSize": 1.0, "ImagePixelSize": 2.0, "ImageSize": 32,
}  # fmt: skip
PARTICLE = {
    "ImageName": "1@a.mrcs",
    "MicrographName": "mic/a.mrc",
    "OpticsGroup": 1,
    "DefocusU": 15000,
    "DefocusV": 14000,
    "DefocusAngle": 5,
}
MICROGRAPH = {"MicrographName": "a.mrc", "OpticsGroup": 1, "DefocusU": 15000, "DefocusV": 14000, "DefocusAngle": 5}


def loop(block: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table; its columns are those of the first row."""
    names = list(rows[0])
    head = f"data_{block}\n\nloop_\n" + "".join(f"_rln{n} #{i}\n" for i, n in enumerate(names, 1))
    return head + "".join(" ".join(str(row[n]) for n in names) + "\n" for row in rows) + "\n"


def pairs(block: str, row: Mapping[str, Any]) -> str:
    """A table of one row, written as a list of pairs."""
    return f"data_{block}\n\n" + "".join(f"_rln{n}   {v}\n" for n, v in row.items()) + "\n"


def particles(rows: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]] = (GROUP,)) -> str:
    return loop("optics", groups) + loop("particles", rows)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def stack(path: Path, count: int, box: int = 32, seed: int = 0) -> np.ndarray:
    """A stack of noise with mean 0 and standard deviation 1."""
    images = np.random.default_rng(seed).normal(size=(count, box, box)).astype(np.float32)
    write_mrc(path, images, 2.0, stack=True)
    return images


def imported(star: Path, micrograph: str = "mic/a.mrc", **params: Any) -> dict[str, Any]:
    """What ``import_particles`` gives for a micrograph."""
    stage = load_stages()["import_particles"]
    return stage.process(stage.params(star=str(star), **params), particles_path=str(star), micrograph_name=micrograph)
