"""Movie refinement of a simulated session (24 movies of 1024 x 1024 x 24, 40 particles each) against the truth and RELION 3.1.3.

The demo is processed from movies to map; then the motion is refined by stage `polish`, and by relion_motion_refine with two settings
(s_vel / s_div / s_acc 0.2 / 5000 / 2 and 0.5 / 5000 / 2) from the exported project, both with the same poses and half-maps. Compared are
the tracks at the particles (2-D rms, mean over frames removed), the spectral SNR of the particles cut from the dose-weighted micrographs
at their true places (correlation with projections of the true map), and half-maps at the poses of the refinement, 1.77 A a pixel.
`--seed N`, `--folder DIR` of a finished demo of that seed, `--no-relion`.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from _stacks import OUT

import cryodask
from cryodask.cluster.connect import close, connect
from cryodask.demo import run_demo
from cryodask.interop.relion import export_relion
from cryodask.kernels.ctf import electron_wavelength_angstrom
from cryodask.kernels.damage import fit_damage
from cryodask.kernels.expectation import ctf_values
from cryodask.kernels.extraction import cut_boxes
from cryodask.kernels.fourier import real_fft2, resize_map
from cryodask.kernels.orientations import euler_to_matrix
from cryodask.kernels.particle_motion import field_at
from cryodask.kernels.projection import fourier_volume, half_plane, slices
from cryodask.run.session import run_session
from cryodask.simulate import SessionParams, load_truth, simulate_movie
from cryodask.simulate.model import MOLECULES, density_map
from cryodask.simulate.score import TruePoses, corrected_resolution, half_maps_from_poses, match_picks
from cryodask.simulate.session import session_detector
from cryodask.stages._polish_pictures import session_damage
from cryodask.stages.motion import MotionParams, motion
from cryodask.stages.polish import PolishParams, polish

BOX = 160
SETTINGS = ((0.2, 5000, 2), (0.5, 5000, 2))
BANDS = {"20_12A": (20, 12), "12_8A": (12, 8), "8_6A": (8, 6), "6_5A": (6, 5), "5_4A": (5, 4)}


def processed(folder: Path, seed: int) -> Any:
    """The project of a demo with stage `polish` at its end; exported for RELION before."""
    if not (folder / "summary.json").exists():
        run_demo(folder, seed=seed, workers=1)
    if not (folder / "rel" / "particles.star").exists():
        export_relion(cryodask.open(folder / "betagal"), folder / "rel")
    content = yaml.safe_load((folder / "betagal.yaml").read_text())
    steps = [s for s in content["pipeline"] if not {"polish", "extract as full"} & s.keys()]
    unpolished = {"box": BOX, "recentre": True, "from": {"particles": "refine3d"}}
    content["pipeline"] = [*steps, {"extract as full": unpolished}, {"polish": {"box": BOX, "from": {"particles": "refine3d"}}}]
    path = folder / "betagal.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=140))
    client = connect("local", workers=1)
    try:
        return run_session(path, client=client)
    finally:
        close(client)


def relion(folder: Path, setting: tuple[float, float, float], dose: float) -> tuple[dict[str, np.ndarray], float]:
    """Tracks `(n, frame, 2)` (y, x), Angstrom, of each micrograph in the order of particles.star, and CPU seconds per movie."""
    out = f"polish_{setting[0]:g}"
    where = folder / "rel"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    if not list((where / out).rglob("*_tracks.star")):
        (where / out).mkdir(exist_ok=True)
        maps = ["--f", "postprocess.star", "--m1", "half1.mrc", "--m2", "half2.mrc", "--mask", "mask.mrc", "--angpix_ref", "2.95"]
        constants = [word for name, value in zip(("vel", "div", "acc"), setting) for word in (f"--s_{name}", f"{value:g}")]
        command = ["relion_motion_refine", "--i", "particles.star", "--corr_mic", "corrected_micrographs.star", *maps, "--o", f"{out}/"]
        command += ["--fdose", f"{dose:.5f}", *constants, "--window", str(BOX), "--scale", str(BOX), "--j", "1"]
        subprocess.run(command, cwd=where, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    tracks = {p.name.removesuffix("_tracks.star"): _tracks(p) for p in sorted((where / out).rglob("*_tracks.star"))}
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return tracks, seconds / max(len(tracks), 1)


def _tracks(path: Path) -> np.ndarray:
    number = re.compile(r"^\s*(-?[\d.]+(?:e[+-]?\d+)?)\s+(-?[\d.]+(?:e[+-]?\d+)?)\s*$", re.MULTILINE)
    # data_general first, then a block per particle
    blocks = path.read_text().split("data_")[2:]
    return np.array([[(float(y), float(x)) for x, y in number.findall(block)] for block in blocks])


class Movie:
    """The truth about the particles of a micrograph, matched to those of the project."""

    def __init__(self, truth: Any, particles: Any, index: int) -> None:
        self.name, self.pixel, self.shape = truth.names[index], truth.params.pixel_size_angstrom, truth.params.shape
        self.rows = np.flatnonzero(particles["micrograph"].values == self.name)
        self.centre = np.stack([particles[f"centre_{axis}_angstrom"].values[self.rows] for axis in "yx"], -1)
        columns, count = truth.columns, int(truth.columns["particle_count"][index])
        places = np.stack([columns["particle_y"][index], columns["particle_x"][index]], -1)[:count].astype(float)
        found, true = match_picks(self.centre / self.pixel, places, 40.0)
        self.rows, self.centre, self.place = self.rows[found], self.centre[found], places[true]
        self.ids = particles["particle_id"].values[self.rows]
        self.angles = np.stack([columns[f"{a}_deg"][index][true] for a in ("rot", "tilt", "psi")], -1).astype(float)
        self.true_nodes = columns["patch_shift"][index]
        optics = {"voltage_kv": truth.params.voltage_kv, "spherical_aberration_mm": truth.params.spherical_aberration_mm}
        optics |= {"amplitude_contrast": truth.params.amplitude_contrast, "phase_shift_deg": 0.0}
        optics |= {n: float(columns[n][index]) for n in ("defocus_u_angstrom", "defocus_v_angstrom", "defocus_angle_deg")}
        self.ctf = {name: np.full(len(true), value) for name, value in optics.items()}

    def at(self, nodes: np.ndarray) -> np.ndarray:
        """A field at the true places, mean over frames zero."""
        return centred(field_at(nodes, self.place, self.shape))

    def error(self, track: np.ndarray) -> float:
        """Mean square error, A^2."""
        return float(((centred(track) - self.at(self.true_nodes)) ** 2).sum(-1).mean())


def centred(track: np.ndarray) -> np.ndarray:
    return track - track.mean(1, keepdims=True)


class SignalToNoise:
    """Correlation of particles with projections of the true map at their true places, by shell: proportional to the SSNR."""

    def __init__(self, truth: Any) -> None:
        pixel = truth.params.pixel_size_angstrom
        self.plane, self.length = half_plane(BOX // 2 - 1), BOX * pixel
        density = density_map(MOLECULES[truth.params.molecule](), BOX, pixel)
        self.volume = fourier_volume(torch.from_numpy(density), BOX // 2 - 1, BOX)
        self.sums: dict[str, np.ndarray] = {}

    def add(self, name: str, micrograph: np.ndarray, movie: Movie) -> None:
        """Particles of a micrograph."""
        p, whole = self.plane, np.round(movie.place).astype(int)
        angles = torch.deg2rad(torch.from_numpy(movie.angles)).unbind(1)
        true = slices(self.volume, euler_to_matrix(*angles).float(), p.ky, p.kx) * ctf_values(movie.ctf, p.ky, p.kx, self.length)
        image = torch.from_numpy(np.ascontiguousarray(micrograph))
        boxes = -cut_boxes(image, *(torch.from_numpy(w.copy()) for w in whole.T), BOX)
        boxes -= boxes.mean((1, 2), keepdim=True)
        found = real_fft2(torch.fft.ifftshift(boxes, dim=(1, 2)).contiguous())[:, p.ky % BOX, p.kx]
        rest = torch.from_numpy(movie.place - whole).float() * (2 * np.pi / BOX)
        turns = rest[:, :1] * p.ky + rest[:, 1:] * p.kx
        found = found * torch.polar(torch.ones_like(turns), turns)
        parts = ((found * true.conj()).real.sum(0), found.abs().square().sum(0), true.abs().square().sum(0))
        sums = np.stack([torch.bincount(p.shell, v.double(), BOX // 2 + 1).numpy() for v in parts])
        self.sums[name] = self.sums.get(name, 0.0) + sums

    def curve(self, name: str) -> np.ndarray:
        """Squared correlation by shell."""
        cross, one, other = self.sums[name]
        return cross**2 / (one * other + 1e-30)

    def ratio(self, name: str, base: str, band: tuple[float, float]) -> float:
        """Over that of another, in a band of resolution, Angstrom."""
        shells = slice(int(np.ceil(self.length / band[0])), int(self.length / band[1]) + 1)
        return float(self.curve(name)[shells].sum() / self.curve(base)[shells].sum())


def half_map_resolution(project: Any, step: str, voxel: float, symmetry: str = "D2") -> float:
    """Resolution of half-maps from the images of a step at the poses of the refinement."""
    some = project.particles(step).load()
    angles = [torch.deg2rad(torch.from_numpy(some[n].values.astype(np.float64))) for n in ("rot_deg", "tilt_deg", "psi_deg")]
    origins = np.stack([some[f"origin_{axis}_angstrom"].values for axis in "yx"], -1).astype(np.float64)
    names = ("defocus_u_angstrom", "defocus_v_angstrom", "defocus_angle_deg", "voltage_kv", "spherical_aberration_mm", "amplitude_contrast")
    ctf = {n: some[n].values for n in names}
    poses = TruePoses(some["particle_image"].values, euler_to_matrix(*angles), origins, ctf, some["half_set"].values)
    mask = resize_map(torch.from_numpy(project["mask"]["solvent_mask"].values), BOX).clamp(0, 1)
    return corrected_resolution(half_maps_from_poses(poses, voxel, symmetry), mask, voxel)


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--no-relion", action="store_true")
    options = parser.parse_args()
    folder = (options.folder or OUT / f"polish_s{options.seed}").absolute()
    project, truth = processed(folder, options.seed), load_truth(folder)
    figures = compare(project, truth, folder, use_relion=not options.no_relion)
    figures["damage_scale_200kV_as_300kV"] = other_voltage(options.seed + 6)
    print(f"damage scale at 200 kV, analysed as if at 300 kV: {figures['damage_scale_200kV_as_300kV']:.3f} (true: 1.25)")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()} | {"seed": options.seed}))


def compare(project: Any, truth: Any, folder: Path, *, use_relion: bool) -> dict[str, float]:
    """All figures of a processed session; prints the table and saves the plot."""
    motion, polished, particles = project["motion"], project["polish"], project.particles("refine3d").load()
    tracks = {s: relion(folder, s, truth.params.dose_per_frame) for s in SETTINGS} if use_relion else {}
    snr, errors = SignalToNoise(truth), []
    order = None
    for i in range(len(truth.names)):
        movie = Movie(truth, particles, i)
        before, after = (one["patch_shift"].sel(micrograph=movie.name).values for one in (motion, polished))
        row = [movie.error(movie.at(before)), movie.error(movie.at(after))]
        # RELION's tracks are in the order of particles.star, ours of a micrograph
        order = np.argsort(np.argsort(movie.rows))
        row += [movie.error(found[movie.name][order]) for found, _ in tracks.values()]
        errors.append(row)
        for name, one in (("motion", motion), ("polish", polished)):
            snr.add(name, one["micrograph_dw"].sel(micrograph=movie.name).values, movie)
    mean = np.sqrt(np.mean(errors, 0))
    single = np.sqrt(np.array(errors))
    ratios = {name: snr.ratio("polish", "motion", band) for name, band in BANDS.items()}
    voxel = truth.params.pixel_size_angstrom
    resolution = {step: half_map_resolution(project, step, voxel) for step in ("full", "polish")}
    damage = session_damage(polished.load())
    records = project.generation("polish").committed().values()
    seconds = float(np.median([r["cpu_seconds"] for r in records]))
    names = ["motion", "polish", *(f"RELION {s[0]:g}/{s[1]:g}/{s[2]:g}" for s in tracks)]
    for name, value, worse in zip(names, mean, (single > single[:, :1]).sum(0)):
        print(f"{name:22s} error {value:.3f} A, movies worse than before {worse} of {len(single)}")
    print("SSNR relative to motion: " + ", ".join(f"{n.replace('_', '-')} {v:.3f}" for n, v in ratios.items()))
    print(f"half-maps at the same poses: {resolution['full']:.2f} A before, {resolution['polish']:.2f} A after")
    scale, deviation = (damage[0].scale, damage[0].deviation) if damage is not None else (float("nan"), float("nan"))
    print(
        f"damage scale {scale:.3f} +- {deviation:.3f}; CPU s per movie {seconds:.2f}", *(f"RELION {s:.2f}" for _, s in tracks.values() if s)
    )
    plot(single, names, snr)
    best = float(min(mean[2:])) if len(mean) > 2 else float("nan")
    return {
        "error_angstrom": float(mean[1]), "error_over_motion": float(mean[1] / mean[0]), "error_over_relion": float(mean[1] / best),
        "movies_worse": float((single[:, 1] > single[:, 0]).sum()), "ssnr_6_5A": ratios["6_5A"], "ssnr_5_4A": ratios["5_4A"],
        "half_map_gain_angstrom": resolution["full"] - resolution["polish"], "damage_scale": scale, "cpu_seconds_movie": seconds,
    }  # fmt: skip


def other_voltage(seed: int, voltage_kv: float = 200.0, movies: int = 5) -> float:
    """Damage scale of movies simulated at one voltage and analysed as if at 300 kV, with true poses blurred by 2 degrees and 0.8 A."""
    params = SessionParams(movies=movies, seed=seed, voltage_kv=voltage_kv)
    gain, pixel = session_detector(params).gain, params.pixel_size_angstrom
    density = density_map(MOLECULES[params.molecule](), BOX * 3 // 5, pixel / 0.6)
    fsc = 1.0 / (1.0 + (np.arange(BOX * 3 // 10 + 1) / 44.0) ** 12)
    rng, sums = np.random.default_rng(seed), []
    for i in range(movies):
        frames, true = simulate_movie(params, i)
        shared = {"movie": frames, "gain": gain, "pixel_size_angstrom": pixel, "dose_per_frame": params.dose_per_frame}
        before = motion.process(MotionParams(), **shared, voltage_kv=voltage_kv)
        count = len(true["particle_y"])
        place = np.stack([true["particle_y"], true["particle_x"]], -1) * pixel + rng.normal(0, 0.8, (count, 2))
        # the CTF is that of the true voltage: only the damage is taken for another
        same = electron_wavelength_angstrom(voltage_kv) / electron_wavelength_angstrom(300.0)
        optics = {"spherical_aberration_mm": 2.7 * same**3, "amplitude_contrast": 0.1, "phase_shift_deg": 0.0, "voltage_kv": 300.0}
        found = polish.process(
            PolishParams(box=BOX), **shared, **optics,
            **{n: float(true[n]) * same for n in ("defocus_u_angstrom", "defocus_v_angstrom")},
            defocus_angle_deg=float(true["defocus_angle_deg"]),
            **{n: before[n] for n in ("patch_position", "patch_shift", "hot_pixel")},
            **{n: np.asarray(true[n], float) + rng.normal(0, 2.0, count) for n in ("rot_deg", "tilt_deg", "psi_deg")},
            **{f"{n}_{a}_angstrom": place[:, j] for n in ("position", "centre") for j, a in enumerate("yx")},
            particle_id=np.arange(count), half_set=np.arange(count) % 2, final_map=density, half_map=np.stack([density] * 2),
            map_pixel_size_angstrom=pixel / 0.6, fsc_corrected=fsc,
        )  # fmt: skip
        sums.append(found)
    cross, power = (sum(one[n] for one in sums) for n in ("frame_correlation", "reference_power"))
    return fit_damage(np.asarray(cross, float), np.asarray(power), sums[0]["expected_decay"].astype(float)).scale


def plot(errors: np.ndarray, names: list[str], snr: SignalToNoise) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for column, name in zip(errors.T[1:], names[1:]):
        left.plot(errors[:, 0], column, "o", ms=4, label=name)
    left.plot([0, errors.max()], [0, errors.max()], color="black", lw=0.7)
    left.set(xlabel="error of motion, A", ylabel="error after refinement, A", xlim=(0, None), ylim=(0, None))
    left.legend(fontsize=8)
    shells = np.arange(4, BOX // 2)
    smooth = np.ones(5) / 5
    curves = [np.convolve(snr.curve(n)[shells], smooth, "same") for n in ("polish", "motion")]
    right.plot(shells / snr.length, curves[0] / curves[1])
    right.axhline(1.0, color="black", lw=0.7)
    right.set(xlabel="1/A", ylabel="SSNR, polished over before", ylim=(0.8, 1.6))
    OUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT / "polish.png", dpi=120)


if __name__ == "__main__":
    main()
