"""A complete session: movies and gain as from a microscope, and the ground truth, in one folder.

::

    folder/movies/movie_0001.tif ...      raw counts
    folder/gain.mrc                       multiplies the counts, in the MRC frame (of EER movies: gain.gain)
    folder/truth/session.json             the parameters
    folder/truth/movie_0001.npz ...       ground truth of each movie, named as in the vocabulary
    folder/truth/map_128_1.77A.mrc ...    the molecule
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import tifffile
import torch
from pydantic import BaseModel, ConfigDict, Field

from cryodask.errors import InputError
from cryodask.formats.movies import write_mrc_movie, write_tiff_movie
from cryodask.formats.mrc import write_mrc
from cryodask.leash import die_with_spawner
from cryodask.simulate.eer import encode_frame, metadata_xml, spread_events, write_eer
from cryodask.simulate.model import MOLECULES, MoleculeName, density_map
from cryodask.simulate.movie import (
    Detector,
    expose,
    margin_px,
    node_positions,
    padded,
    random_drift,
    random_gain,
    random_local_motion,
)
from cryodask.simulate.scene import Optics, Particles, contrast_transform, place_particles


class SessionParams(BaseModel):
    """Everything that a simulated session depends on; the defaults are those of the demo (24 movies)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    molecule: MoleculeName = Field(default="beta-galactosidase", description="beta-galactosidase (D2) or clpb (C1)")
    movies: int = Field(default=24, ge=1, description="number of movies")
    height: int = Field(default=1024, ge=64, description="rows of a frame, pixels")
    width: int = Field(default=1024, ge=64, description="columns of a frame, pixels")
    frames: int = Field(default=24, ge=1, description="frames per movie")
    pixel_size_angstrom: float = Field(default=1.77, gt=0, description="pixel size, Angstrom")
    voltage_kv: float = Field(default=300.0, ge=60, le=400, description="acceleration voltage, kV")
    spherical_aberration_mm: float = Field(default=2.7, ge=0, description="spherical aberration, mm")
    amplitude_contrast: float = Field(default=0.1, ge=0, lt=1, description="amplitude contrast, as a fraction")
    dose_per_frame: float = Field(default=40.0 / 24.0, gt=0, description="exposure per frame, electrons per square Angstrom")
    pre_exposure: float = Field(default=0.0, ge=0, description="exposure before the first frame, electrons per square Angstrom")
    particles: int = Field(default=40, ge=0, description="particles per movie, fewer if there is no room")
    particle_distance_angstrom: float = Field(default=185.0, gt=0, description="smallest distance between particle centres, Angstrom")
    defocus_min_angstrom: float = Field(default=8000.0, gt=0, description="smallest defocus, Angstrom")
    defocus_max_angstrom: float = Field(default=20000.0, gt=0, description="largest defocus, Angstrom")
    astigmatism_max_angstrom: float = Field(default=300.0, ge=0, description="largest astigmatism (u - v), Angstrom")
    envelope_b_angstrom2: float = Field(default=60.0, ge=0, description="envelope exp(-B k^2/4) on amplitudes, square Angstrom")
    signal_amplitude: float = Field(default=0.5**0.5, ge=0, description="factor on the particles' phase: inelastic loss and detector")
    ice_noise_angstrom2: float = Field(default=0.004, ge=0, description="power of the static structure noise of ice, square Angstrom")
    ice_b_angstrom2: float = Field(default=25.0, ge=0, description="its fall-off exp(-B k^2/2), square Angstrom")
    drift: float = Field(default=1.0, ge=0, description="factor on the stage drift (1 = about 13 Angstrom in total)")
    local_motion: float = Field(default=1.0, ge=0, description="factor on the beam-induced motion")
    damage: bool = Field(default=True, description="whether high frequencies fade with exposure")
    gain_smooth: float = Field(default=0.1, ge=0, lt=0.5, description="standard deviation of the gain's smooth pattern")
    gain_pixel: float = Field(default=0.03, ge=0, lt=0.2, description="standard deviation of the gain from pixel to pixel")
    hot_pixels: int = Field(default=20, ge=0, description="hot pixels, at 3 to 15 times the mean count")
    dead_pixels: int = Field(default=5, ge=0, description="dead pixels: no counts, gain 0")
    truth_maps: tuple[tuple[int, float], ...] = Field(
        default=((128, 1.77), (64, 3.54)), description="boxes (voxels) and voxel sizes (Angstrom) of the truth maps"
    )
    format: Literal["tif", "mrc", "eer"] = Field(default="tif", description="container of the movies: LZW TIFF, MRC stack or EER")
    camera_frames: int = Field(default=40, ge=1, le=255, description="camera frames per frame, and most counts of a pixel, in EER movies")
    seed: int = Field(default=1, ge=0, description="seed: movie i of a seed is always the same")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a frame."""
        return self.height, self.width


DEMO = SessionParams()


def movie_name(index: int) -> str:
    """Name of movie ``index`` (from 0) without extension: movie_0001 is the first."""
    return f"movie_{index + 1:04d}"


@dataclass(frozen=True)
class Truth:
    """The ground truth of a session: one row per movie, named as in the vocabulary.

    ``columns``: ``defocus_u_angstrom, defocus_v_angstrom, defocus_angle_deg`` `(movie,)`; ``particle_y, particle_x`` (pixels),
    ``rot_deg, tilt_deg, psi_deg`` `(movie, slot)`, padded with NaN; ``particle_count`` `(movie,)`; ``frame_shift``
    `(movie, frame, 2)`, ``patch_shift`` `(movie, 81, frame, 2)` Angstrom, the specimen's displacement (y, x), each node's mean over
    frames zero; ``patch_position`` `(movie, 81, 2)` pixels. Particle positions are those after a perfect motion correction.
    """

    folder: str
    params: SessionParams
    names: tuple[str, ...]
    columns: dict[str, np.ndarray]


def _rng(params: SessionParams, purpose: int, index: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64([params.seed, purpose, index]))


def session_detector(params: SessionParams) -> Detector:
    """The detector that all movies of a session share."""
    rng = _rng(params, 0)
    gain = random_gain(rng, params.shape, params.gain_smooth, params.gain_pixel, params.dead_pixels)
    live = np.flatnonzero(gain.ravel() > 0)
    hot = rng.choice(live, min(params.hot_pixels, len(live)), replace=False)
    return Detector(gain, hot, rng.uniform(3.0, 15.0, len(hot)))


def simulate_movie(params: SessionParams, index: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Movie ``index`` of a session: frames `(frame, y, x)` uint8 in MRC row order, and its row of the `Truth`.

    The same (seed, index) gives bit-identical movies in any process.
    """
    rng = _rng(params, 1, index)
    pixel, shape = params.pixel_size_angstrom, params.shape
    mean_defocus = rng.uniform(params.defocus_min_angstrom, params.defocus_max_angstrom)
    astigmatism = rng.uniform(0.0, params.astigmatism_max_angstrom)
    optics = Optics(
        pixel_size_angstrom=pixel,
        voltage_kv=params.voltage_kv,
        spherical_aberration_mm=params.spherical_aberration_mm,
        amplitude_contrast=params.amplitude_contrast,
        defocus_u_angstrom=mean_defocus + 0.5 * astigmatism,
        defocus_v_angstrom=mean_defocus - 0.5 * astigmatism,
        defocus_angle_deg=rng.uniform(0.0, 180.0),
        envelope_b_angstrom2=params.envelope_b_angstrom2,
    )
    distance = params.particle_distance_angstrom / pixel
    particles = place_particles(rng, params.particles, shape, distance, 0.5 * distance)
    scene_shape, margin = padded(shape), margin_px()
    in_scene = Particles(particles.y + margin, particles.x + margin, particles.rot_deg, particles.tilt_deg, particles.psi_deg)
    transform, k = contrast_transform(
        rng,
        MOLECULES[params.molecule](),
        in_scene,
        scene_shape,
        optics,
        signal_amplitude=params.signal_amplitude,
        ice_noise_angstrom2=params.ice_noise_angstrom2,
        ice_b_angstrom2=params.ice_b_angstrom2,
    )
    drift = params.drift * random_drift(rng, params.frames, params.dose_per_frame)
    local = params.local_motion * random_local_motion(rng, params.frames, params.dose_per_frame, shape, pixel)
    displacement = drift[None] + local
    displacement -= displacement.mean(1, keepdims=True)
    frames = expose(
        rng,
        transform,
        k,
        displacement / pixel,
        session_detector(params),
        padded_shape=scene_shape,
        mean_count=params.dose_per_frame * pixel**2,
        dose_per_frame=params.dose_per_frame,
        pre_exposure=params.pre_exposure,
        voltage_kv=params.voltage_kv,
        damage=params.damage,
    )
    truth = {
        "defocus_u_angstrom": np.float64(optics.defocus_u_angstrom),
        "defocus_v_angstrom": np.float64(optics.defocus_v_angstrom),
        "defocus_angle_deg": np.float64(optics.defocus_angle_deg),
        "particle_count": np.int64(len(particles)),
        "particle_y": particles.y.astype(np.float32),
        "particle_x": particles.x.astype(np.float32),
        "rot_deg": particles.rot_deg.astype(np.float32),
        "tilt_deg": particles.tilt_deg.astype(np.float32),
        "psi_deg": particles.psi_deg.astype(np.float32),
        "frame_shift": displacement.mean(0).astype(np.float32),
        "patch_position": node_positions(shape).astype(np.float32),
        "patch_shift": displacement.astype(np.float32),
    }
    return frames, {name: np.asarray(value) for name, value in truth.items()}


def prepare_session(folder: str | Path, params: SessionParams) -> None:
    """Make everything that is common to all movies: the folders, the gain, the truth maps and ``truth/session.json``."""
    folder = Path(folder)
    (folder / "movies").mkdir(parents=True, exist_ok=True)
    (folder / "truth").mkdir(exist_ok=True)
    gain = session_detector(params).gain
    if params.format == "eer":
        tifffile.imwrite(folder / "gain.gain", gain)  # multiplies, with rows as in the movies; an MRC gain would divide
    else:
        write_mrc(folder / "gain.mrc", gain, params.pixel_size_angstrom)
    for box, voxel in params.truth_maps:
        write_mrc(folder / "truth" / f"map_{box}_{voxel:g}A.mrc", density_map(MOLECULES[params.molecule](), box, voxel), voxel)
    (folder / "truth" / "session.json").write_text(json.dumps(params.model_dump(mode="json"), indent=1) + "\n")


def simulate_one(folder: str | Path, params: SessionParams, index: int) -> str:
    """Write movie ``index`` and its truth into a prepared session; returns the movie's path. A pure function of (params, index)."""
    folder, name = Path(folder), movie_name(index)
    frames, truth = simulate_movie(params, index)
    part = folder / "truth" / f".{name}.{os.getpid()}.npz"
    np.savez(part, **truth)  # type: ignore[arg-type]
    os.replace(part, folder / "truth" / f"{name}.npz")
    path = folder / "movies" / f"{name}.{params.format}"
    if params.format == "tif":
        write_tiff_movie(path, frames, params.pixel_size_angstrom)
    elif params.format == "mrc":
        write_mrc_movie(path, frames, params.pixel_size_angstrom)
    else:
        _write_eer_movie(path, frames, params, index)
    return str(path)


def _write_eer_movie(path: Path, frames: np.ndarray, params: SessionParams, index: int) -> None:
    """A movie whose frames are fractions of ``camera_frames`` camera frames."""
    rng, pixel = _rng(params, 2, index), params.pixel_size_angstrom
    recorded = len(frames) * params.camera_frames
    metadata = metadata_xml(
        {
            "numberOfFrames": (recorded, ""),
            "sensorPixelSize.height": (f"{pixel * 1e-10:.6g}", "m"),
            "sensorPixelSize.width": (f"{pixel * 1e-10:.6g}", "m"),
            "totalDose": (f"{len(frames) * params.dose_per_frame * pixel**2:.6g}", "e/pixel"),
        }
    )
    streams = (encode_frame(events, frame.size) for frame in frames for events in spread_events(rng, frame, params.camera_frames))
    write_eer(path, streams, params.shape, metadata=metadata)


def simulate_session(
    folder: str | Path, params: SessionParams = DEMO, progress: Callable[[int, int], None] | None = None, processes: int = 1
) -> Truth:
    """Write a session and return its truth.

    Parameters
    ----------
    folder : str or Path
        Created if needed; movies of the same name are overwritten.
    progress : callable ``(done, total)``, optional
        Called after each movie.
    processes : int
        Number of processes; the files do not depend on it.
    """
    prepare_session(folder, params)
    if progress:
        progress(0, params.movies)
    if processes <= 1:
        for index in range(params.movies):
            simulate_one(folder, params, index)
            if progress:
                progress(index + 1, params.movies)
        return load_truth(folder)
    # spawned, because forking a process that runs torch or Dask threads can hang
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_begin) as pool:
        waiting = [pool.submit(simulate_one, str(folder), params, index) for index in range(params.movies)]
        for done, future in enumerate(as_completed(waiting), 1):
            future.result()
            if progress:
                progress(done, params.movies)
    return load_truth(folder)


def _begin() -> None:
    die_with_spawner()
    torch.set_num_threads(1)


def load_truth(folder: str | Path) -> Truth:
    """Read the truth of a simulated session from its folder."""
    truth = Path(folder) / "truth"
    if not (truth / "session.json").exists():
        raise InputError(f"{folder} is not a simulated session", "truth/session.json is missing", "simulate it again")
    params = SessionParams.model_validate_json((truth / "session.json").read_text())
    names = tuple(p.stem for p in sorted(truth.glob("movie_*.npz")))
    rows = []
    for name in names:
        with np.load(truth / f"{name}.npz") as stored:
            rows.append({key: stored[key] for key in stored.files})
    columns = {}
    for key in rows[0] if rows else ():
        longest = max(row[key].shape for row in rows)
        padded_rows = [
            np.pad(row[key], [(0, n - m) for n, m in zip(longest, row[key].shape)], constant_values=np.nan)
            if row[key].shape != longest
            else row[key]
            for row in rows
        ]
        columns[key] = np.stack(padded_rows)
    return Truth(str(folder), params, names, columns)
