"""Cores, memory, disks and network that a facility needs for its load, from measured seconds and bytes.

Pure arithmetic on :class:`Load` and :class:`Costs`. Every number that was not measured is an :class:`Assumption`, and is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cryodask.costs import Assumption, Costs, Load, measured_costs
from cryodask.errors import ProjectFileError

SHAPES: dict[str, dict[str, float]] = {
    "preprocessing": {"live": 4, "batch": 1},
    "image-analysis": {"batch": 3, "notebook": 1},
    "mixed": {"live": 4, "batch": 2, "hpda": 1, "learning": 1},
}
"""Blueprints and the weights of their lanes (as in ``configs/blueprints``)."""

_BESIDE = ("hpda", "learning", "notebook")
_GIB = 2**30
_DAY = 86400.0


@dataclass(frozen=True)
class Need:
    """One requirement, and how it was computed."""

    name: str
    value: float
    unit: str
    why: str


@dataclass(frozen=True)
class FacilityPlan:
    """Requirements of a load."""

    load: Load
    blueprint: str
    needs: tuple[Need, ...]
    assumptions: tuple[Assumption, ...]
    movie_seconds: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return next(n.value for n in self.needs if n.name == name)

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON-serialisable data."""
        return asdict(self)


def costs_of_project(path: str | Path) -> tuple[Costs, dict[str, Any]]:
    """Costs measured in a project of the user, and a description of its movies (fields of :class:`Load`).

    The seconds of the stages are the CPU seconds in the records of its items, the bytes are those of its files. What no project records
    (the time for storing, memory, stages that take all particles) stays at cryodask's own measurements; the notes say so.

    Raises
    ------
    ProjectFileError
        If it did not start from movies, or has recorded no seconds.
    """
    from cryodask.run.recipe import project_folder
    from cryodask.store.project import Project

    project, ours = Project(project_folder(path)), measured_costs()
    by_stage = {project.generation(label).meta["stage"]: label for label in reversed(project.stages)}
    records = {name: project.records(label) for name, label in by_stage.items() if name in ours.map_stages}
    timed = {n: [r["cpu_seconds"] for r in found.values() if r["ok"] and "cpu_seconds" in r] for n, found in records.items()}
    if not timed.get("ingest") or not timed.get("motion"):
        raise ProjectFileError(
            f"{path} has no record of what its movies cost.",
            "it starts from another program's results, or no movie is finished yet",
            "leave out --from, or first run a session that starts from movies",
        )
    sizes = project.generation(by_stage["ingest"]).meta["sizes"]
    motion = project.generation(by_stage["motion"]).meta["sizes"]
    frames, pixels = sizes.get("frame", motion.get("frame")), sizes.get("y", motion["y"]) * sizes.get("x", motion["x"]) / 1e6
    load: dict[str, Any] = {"megapixels": pixels, "frames": frames}
    movie_bytes = [i.inputs["size"] for i in project.items() if "size" in i.inputs]
    load |= {"movie_megabytes": _mean(movie_bytes) / 1e6} if movie_bytes else {}
    if "extract" in by_stage:
        params = project.generation(by_stage["extract"]).meta["params"]
        box = params["box"] or round(params["box_angstrom"] / next(iter(project.state.constants.values()))["pixel_size_angstrom"])
        load |= {"box": box, "scale_to": params["scale_to"] or box}
        load["particles"] = max(1, round(len(project.sets.ids(project.product(by_stage["extract"], "particles"))) / len(timed["extract"])))
    here = Load(**load)
    units = {"frame megapixel": here.frame_megapixels, "megapixel": pixels, "particle megapixel": here.particles * here.box**2 / 1e6}
    stages = dict(ours.map_stages)
    for name, seconds in timed.items():
        if seconds and name in stages:
            stages[name] = replace(stages[name], fixed=0.0, per_unit=_mean(seconds) / units[stages[name].unit])
    stored = {
        n: _mean([sum(size for size, _ in r["files"].values()) for r in f.values() if r["ok"] and "files" in r]) for n, f in records.items()
    }
    sizes_of = dict(ours.bytes)
    if stored["ingest"]:
        sizes_of["stored_movie_per_count"] = stored["ingest"] / (here.frame_megapixels * 1e6)
    sizes_of["stored_micrograph_per_pixel"] = sum(stored.get(n, 0.0) for n in ("motion", "ctf", "pick")) / (pixels * 1e6)
    if stored.get("extract"):
        sizes_of["stored_particle_per_pixel"] = stored["extract"] / (here.particles * here.scale_to**2)
    kept = [n for n in stages if not timed.get(n)]
    notes = (
        Assumption(
            f"{', '.join(n for n in timed if timed[n])}", "as in the project", f"CPU seconds and bytes of {len(timed['motion'])} movies"
        ),
        Assumption(f"{', '.join(kept)}, particle stages, memory", "measured by cryodask", "a project does not record them"),
    )
    source = f"project {project.name}; what it does not record: {ours.source}"
    return replace(ours, source=source, map_stages=stages, bytes=sizes_of, notes=notes), load


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def plan_facility(
    load: Load, blueprint: str = "mixed", costs: Costs | None = None, *, busy: float = 0.7, peak: float = 2.0
) -> FacilityPlan:
    """Estimate cores, memory, storage and network for a load.

    Parameters
    ----------
    load : Load
    blueprint : str
        One of :data:`SHAPES`.
    costs : Costs, optional
        By default :func:`measured_costs`.
    busy : float
        Fraction of the time in which a core is busy; the rest is for catching up after pauses, retries, and lost jobs.
    peak : float
        Peak rate of reading and writing relative to the mean.

    Raises
    ------
    ProjectFileError
    """
    if blueprint not in SHAPES:
        raise ProjectFileError(f"There is no blueprint {blueprint!r}.", "", f"use {', '.join(SHAPES)}")
    costs = costs or measured_costs()
    from_movies, analysis = blueprint != "image-analysis", blueprint != "preprocessing"
    per_second = load.microscopes * load.movies_per_hour / 3600.0
    duty = load.hours_per_day / 24.0
    movies_a_day = per_second * _DAY * duty
    particles_a_day = movies_a_day * load.particles

    # --- cores
    movie_seconds = costs.movie_seconds(load) if from_movies else {}
    live = per_second * sum(movie_seconds.values()) / busy
    stages = {"classify2d": 1.0, **({"refine3d": load.sorted_share} if analysis else {})}
    in_a_set = particles_a_day / load.microscopes
    used = {stage: costs.particle_seconds(stage, load.scale_to, share * in_a_set) / in_a_set for stage, share in stages.items()}
    batch = particles_a_day * load.repeats * sum(used.values()) / _DAY / busy
    weights = SHAPES[blueprint]
    beside = sum(w for lane, w in weights.items() if lane in _BESIDE) / sum(weights.values())
    least = live * sum(weights.values()) / weights["live"] if from_movies else 0.0
    cores = math.ceil(max((live + batch) / (1 - beside), least))
    gpus = 1 if "learning" in weights else 0

    # --- memory: one single-threaded worker process per core
    scale = max(1.0, load.pixels / costs.memory_megapixels) if from_movies else 1.0
    worker = math.ceil(costs.memory_bytes * scale / 0.9 * 1.5 / _GIB)

    # --- bytes
    lzw = costs.bytes["lzw_movie_per_count"]
    movie = (
        load.movie_megabytes * 1e6 if load.movie_megabytes else load.frame_megapixels * 1e6 * (lzw if load.compression == "lzw" else 1.0)
    )
    copy = 0.0 if load.in_place else costs.bytes["stored_movie_per_count"] * load.frame_megapixels * 1e6
    sums = costs.bytes["stored_micrograph_per_pixel"] * load.pixels * 1e6
    boxes = costs.bytes["stored_particle_per_pixel"] * load.scale_to**2 * load.particles
    raw_day = movies_a_day * movie if from_movies else 0.0
    kept_day = movies_a_day * ((copy + sums if from_movies else 0.0) + boxes)
    raw, kept = raw_day * load.days_raw, kept_day * load.days_results
    writes = per_second * ((movie + copy + sums if from_movies else 0.0) + boxes)
    reads = (
        per_second * ((movie + copy) if from_movies else 0.0) + particles_a_day / load.particles * boxes * load.repeats * len(stages) / _DAY
    )
    write_rate, read_rate = peak * writes, peak * reads

    by_weight = f"; live's weight alone gives it {weights['live'] / sum(weights.values()):.0%}" if from_movies else ""
    peak_said = f"peak {costs.memory_bytes / _GIB:.2f} GiB at {costs.memory_megapixels:.1f} megapixels"
    work = " + ".join(f"{n} {s:.1f}" for n, s in movie_seconds.items() if s >= 0.05)
    needs = [
        Need("cores for batch", batch, "cores",
            f"{particles_a_day / 1e6:.2f} million particles per day x {load.repeats} x "
            f"{sum(used.values()):.4f} CPU s ({', '.join(f'{n} {s:.4f}' for n, s in used.items())}) / {busy:g}"),
        Need("cores", cores, "cores", f"{beside:.0%} of them for other lanes{by_weight}"),
        Need("GPUs", gpus, "", "for the lane learning; no stage needs one" if gpus else "no stage needs one"),
        Need("memory of a worker", worker, "GiB", f"{peak_said}, x 1.5, a tenth left free"),
        Need("memory", worker * cores, "GiB", "one worker process per core"),
        Need("node-local scratch", 2 * worker * cores, "GiB", "twice the memory, on node-local disks, for spilled results"),
        Need("raw movies", raw / 1e12, "TB", f"{movies_a_day:,.0f} movies per day x {movie / 1e6:.0f} MB x {load.days_raw:g} days"),
        Need("results", kept / 1e12, "TB", f"{kept_day / movies_a_day / 1e6:.0f} MB per movie x {load.days_results:g} days"),
        Need("storage", (raw + kept) / 1e12, "TB", "usable space, without reserve for the file system"),
        Need("writing", write_rate / 1e9, "GB/s", f"movies, their copies, sums, particles; x {peak:g}"),
        Need("reading", read_rate / 1e9, "GB/s", f"movies, their copies, particles in batch; x {peak:g}"),
        Need("network", 8 * (write_rate + read_rate) / 1e9, "Gbit/s", "total, to and from the shared file system; all nodes share it"),
    ]  # fmt: skip
    if from_movies:
        why = f"{per_second:.3f} movies/s x {sum(movie_seconds.values()):.1f} CPU s ({work}) / {busy:g}"
        needs.insert(0, Need("cores for live", live, "cores", why))
    return FacilityPlan(load, blueprint, tuple(needs), _assumptions(load, blueprint, costs, busy, peak), movie_seconds)


def _assumptions(load: Load, blueprint: str, costs: Costs, busy: float, peak: float) -> tuple[Assumption, ...]:
    shape = f"{load.megapixels:g} megapixels" if load.megapixels else f"camera {load.camera}, {load.pixels:.1f} megapixels"
    size = (
        "as given"
        if load.movie_megabytes
        else f"{load.compression}; {costs.bytes['lzw_movie_per_count']:.3f} bytes per count with lzw, measured"
    )
    rows = [
        ("seconds and bytes", "see docs/planning.md", costs.source),
        ("other machines", "as fast as that one", "run  python benchmarks/stage_costs.py  on yours, or use --from PROJECT"),
        ("other sizes", "linear in pixels and frames; a power law in the box size", "two sizes of each were measured"),
        ("movies", f"{shape}, {load.frames} frames", "given, or the default"),
        ("bytes of a movie", size, "about one count per pixel and frame"),
        ("copy in the project", "no (in place)" if load.in_place else "yes (chunked)", "stage ingest: storage"),
        ("hours of recording", f"{load.hours_per_day:g} per day", "given, or the worst case"),
        ("particles", f"{load.particles} per micrograph, box {load.box}, kept at {load.scale_to} pixels", "given, or the default"),
        (
            "batch work",
            f"every particle {load.repeats} times, {load.sorted_share:.0%} of them refined",
            "given, or assumed: people rerun their processing",
        ),
        ("sets of particles", "one per microscope and day", "assumed: each has the fixed costs of 2D and 3D once"),
        ("2D and 3D", "a fixed part and one per particle; refinement measured with D2: C1 needs more", "two numbers of particles measured"),
        ("busy", f"{busy:.0%} of a core's time", "assumed: catching up after pauses, lost jobs"),
        ("peaks", f"{peak:g} x the mean of reading and writing", "assumed"),
        ("lanes", ", ".join(f"{n} {w:g}" for n, w in SHAPES[blueprint].items()), f"blueprint {blueprint}"),
        ("GPUs", "none for the stages", "they were measured on CPUs only; mixed assumes one GPU for training"),
        ("kept", f"movies {load.days_raw:g} days, results {load.days_results:g} days", "given, or the default"),
    ]
    return (*(Assumption(*row) for row in rows), *costs.notes)
