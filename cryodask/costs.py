"""Cost of a movie and of a particle: measured seconds and bytes, and the arithmetic that scales them to a load.

The numbers are in ``stage_costs.json``, written by ``benchmarks/stage_costs.py``. ``cryodask plan`` and the dry run use them.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any

from cryodask.errors import ProjectFileError

CAMERAS = {"k2": 3838 * 3710 / 1e6, "k3": 5760 * 4092 / 1e6, "k3-super": 11520 * 8184 / 1e6, "falcon": 4096 * 4096 / 1e6}
"""Megapixels per frame."""


@dataclass(frozen=True)
class Load:
    """The load of a facility.

    ``movies_per_hour`` is per microscope. ``movie_megabytes`` overrides the size computed from camera, frames and compression.
    ``box`` and ``scale_to`` are the box sizes of a particle in pixels, before and after downscaling. ``sorted_share`` is the
    fraction of the particles that is refined.
    """

    microscopes: int = 1
    movies_per_hour: float = 300.0
    hours_per_day: float = 24.0
    camera: str = "k3"
    megapixels: float | None = None
    frames: int = 50
    compression: str = "lzw"
    movie_megabytes: float | None = None
    in_place: bool = False
    particles: int = 300
    box: int = 320
    scale_to: int = 160
    sorted_share: float = 0.5
    repeats: int = 2
    days_raw: float = 14.0
    days_results: float = 30.0

    @property
    def frame_megapixels(self) -> float:
        """Megapixels per movie, all frames together."""
        return self.pixels * self.frames

    @property
    def pixels(self) -> float:
        """Megapixels per frame."""
        return self.megapixels or CAMERAS[self.camera]

    def __post_init__(self) -> None:
        if self.megapixels is None and self.camera not in CAMERAS:
            raise ProjectFileError(
                f"There is no camera {self.camera!r}.",
                "",
                f"use {', '.join(CAMERAS)}, or give megapixels",
            )
        if self.compression not in ("lzw", "none"):
            raise ProjectFileError(f"There is no compression {self.compression!r}.", "", "use lzw or none, or give movie_megabytes")
        wrong = [n for n, v in asdict(self).items() if isinstance(v, (int, float)) and not isinstance(v, bool) and not v > 0]
        wrong += [n for n, most in (("hours_per_day", 24), ("sorted_share", 1)) if getattr(self, n) > most]
        if wrong:
            raise ProjectFileError(
                f"{', '.join(wrong)} is out of range.",
                "a value in another unit",
                "use positive numbers, at most 24 hours per day, and shares of at most 1",
            )


@dataclass(frozen=True)
class Assumption:
    """An assumption of the plan, and its source."""

    name: str
    value: str
    source: str


@dataclass(frozen=True)
class StageCost:
    """CPU seconds of one thread: ``fixed`` per movie, plus ``per_unit``."""

    unit: str
    fixed: float
    per_unit: float


@dataclass(frozen=True)
class ParticleCost:
    """CPU seconds of one thread for all iterations of a stage: ``fixed`` per run, ``per_particle``, and ``per_drawn``.

    The last is for passes that use some of the particles, at most ``drawn``.
    """

    fixed: float
    per_particle: float
    per_drawn: float
    drawn: int

    def seconds(self, count: float) -> float:
        """CPU seconds of a run with ``count`` particles."""
        return self.fixed + self.per_particle * count + self.per_drawn * min(count, self.drawn)


@dataclass(frozen=True)
class Costs:
    """Measured seconds and bytes. ``particle_stages``: cost of the stages that take all particles, by box size in pixels.

    ``later_stages``: stages that process each movie again once there is a map; they are no part of live processing.
    """

    source: str
    map_stages: Mapping[str, StageCost]
    particle_stages: Mapping[str, Mapping[int, ParticleCost]]
    bytes: Mapping[str, float]
    memory_megapixels: float
    memory_bytes: float
    notes: tuple[Assumption, ...] = ()
    later_stages: Mapping[str, StageCost] = field(default_factory=dict)

    def movie_seconds(self, load: Load) -> dict[str, float]:
        """CPU seconds per movie, by stage."""
        units = {
            "frame megapixel": load.frame_megapixels,
            "megapixel": load.pixels,
            "particle megapixel": load.particles * load.box**2 / 1e6,
        }
        return {name: cost.fixed + cost.per_unit * units[cost.unit] for name, cost in self.map_stages.items()}

    def particle_seconds(self, stage: str, edge: int, count: float) -> float:
        """CPU seconds of a run with ``count`` particles of ``edge`` pixels.

        A power law in box size through the measured sizes (a constant if there is one), never below the smallest.
        """
        known = self.particle_stages[stage]
        small, large = min(known), max(known)
        first, last = known[small].seconds(count), known[large].seconds(count)
        if last <= first:
            return first
        return first * max(1.0, edge / small) ** (math.log(last / first) / math.log(large / small))


@functools.cache
def measured_costs() -> Costs:
    """Costs measured with the stages of this version (``benchmarks/stage_costs.py``); they are part of the package."""
    data = json.loads(resources.files("cryodask").joinpath("stage_costs.json").read_text())
    return Costs(
        source=f"measured on {data['machine']}; movies {data['movies']}; particles {data['particles']}",
        map_stages={n: _stage_cost(c) for n, c in data["map_stages"].items()},
        later_stages={n: _stage_cost(c) for n, c in data.get("later_stages", {}).items()},
        particle_stages={n: {int(box): _particle_cost(c) for box, c in by_box.items()} for n, by_box in data["particle_stages"].items()},
        bytes=data["bytes"],
        memory_megapixels=data["worker_memory"]["megapixels"],
        memory_bytes=data["worker_memory"]["peak_bytes"],
    )


def _stage_cost(data: Mapping[str, Any]) -> StageCost:
    return StageCost(data["unit"], data["fixed_seconds"], data["seconds_per_unit"])


def _particle_cost(data: Mapping[str, float]) -> ParticleCost:
    return ParticleCost(
        data["fixed_seconds"], data["seconds_per_particle"], data["seconds_per_drawn_particle"], int(data["drawn_particles"])
    )
