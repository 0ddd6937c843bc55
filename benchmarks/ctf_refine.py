"""CTF refinement of 1200 simulated particles whose CTF is known wrongly, against the truth and against RELION 3.1.3.

Beta-galactosidase (D2), 128 px of 1.77 A, physical noise, true poses. Each particle's defocus is off by up to 300 A; the microscope has
beam tilt, trefoil and an anisotropic magnification that nothing knows of. RELION's three fits run one after the other (magnification, beam
tilt and trefoil, defocus) on the same images and half-maps. `--seeds 1 2 3`, `--no-relion`.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import starfile
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _molecules import MOLECULES, REFERENCE_PIXEL, STACKS, MapTransform, density, random_columns, read_atoms, reference_noise
from _stacks import OUT, iterate

from cryodask.formats.mrc import write_mrc
from cryodask.kernels.expectation import ctf_values
from cryodask.kernels.half_grid import reconstruct_half
from cryodask.kernels.local_search import grid_of_poses
from cryodask.kernels.orientations import matrix_to_euler, random_rotations
from cryodask.kernels.rows import image_rows
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.stage import ParticleSet
from cryodask.stages.ctf_refine import CtfRefineParams, ctf_refine

BOX, PIXEL, COUNT = 128, 1.77, 1200
TILT_MRAD = (-0.30, 0.15)  # in RELION's sign
TREFOIL_ANGSTROM3 = 0.6 * 4.0**3
TREFOIL_AT_4A = 4.0**-3
MAGNIFICATION = np.array([[1.005, 0.003], [0.003, 0.995]])


def simulate(seed: int) -> tuple[np.ndarray, ParticleSet, np.ndarray, np.ndarray]:
    """Images, their set with the wrong CTF and the true poses, the true map and the errors of the defocus, Angstrom."""
    rotations = random_rotations(COUNT, torch.Generator().manual_seed(seed))
    rng = np.random.default_rng(seed)
    off = rng.uniform(-300.0, 300.0, COUNT)
    columns = random_columns(COUNT, seed + 1)
    # all particles of a micrograph have its defocus, but for the error
    for name in ("defocus_u_angstrom", "defocus_v_angstrom"):
        first = np.unique(columns["micrograph"], return_index=True)[1]
        columns[name] = columns[name][first][np.searchsorted(np.unique(columns["micrograph"]), columns["micrograph"])]
    origins = rng.normal(0.0, 2.0, (COUNT, 2))
    truth = density(*read_atoms(MOLECULES["5a1a"]), BOX, PIXEL, 80.0) / (reference_noise() * (REFERENCE_PIXEL / PIXEL) ** 2)
    angles = [np.degrees(a.numpy()) for a in matrix_to_euler(rotations.double())]
    posed = dict(zip(("rot_deg", "tilt_deg", "psi_deg"), angles))
    posed |= {f"origin_{axis}_angstrom": origins[:, i] * PIXEL for i, axis in enumerate("yx")}
    particles = ParticleSet(COUNT, BOX, PIXEL, columns | posed)
    stack = STACKS / f"ctf_refine_s{seed}.npy"
    if not stack.exists():
        stack.parent.mkdir(parents=True, exist_ok=True)
        real = {name: columns[name] + off for name in ("defocus_u_angstrom", "defocus_v_angstrom")}
        np.save(stack, _images(truth, rotations, origins, columns | real, seed))
    return np.load(stack), particles, truth, off


def _images(truth: np.ndarray, rotations: torch.Tensor, origins_px: np.ndarray, columns: dict[str, np.ndarray], seed: int) -> np.ndarray:
    transform, length = MapTransform(truth, PIXEL, 0.5 / PIXEL), BOX * PIXEL
    ky, kx = torch.meshgrid(torch.fft.fftfreq(BOX, 1 / BOX), torch.arange(BOX // 2 + 1).float(), indexing="ij")
    inside = ky**2 + kx**2 <= (BOX // 2 - 1) ** 2
    ky, kx = ky[inside], kx[inside]
    x, y = kx.double() / length, ky.double() / length
    wavelength = 0.0196875
    phase = -2.0 * np.pi * 2.7e7 * wavelength**2 * (x * x + y * y) * (x * TILT_MRAD[0] + y * TILT_MRAD[1]) * 1e-3
    phase = (phase + TREFOIL_ANGSTROM3 * (x**3 - 3.0 * x * y * y)).float()
    plane = torch.stack([kx, ky], -1) @ torch.from_numpy(MAGNIFICATION.T).float() / length
    out = np.empty((COUNT, BOX, BOX), np.float32)
    for start in range(0, COUNT, 100):
        rows = slice(start, start + 100)
        values = transform.at(torch.einsum("nji,pj->npi", rotations[rows, :2].float(), plane))
        values = values * ctf_values({name: column[rows] for name, column in columns.items()}, ky, kx, length)
        shift = torch.as_tensor(origins_px[rows], dtype=torch.float32)
        turns = (shift[:, :1] * ky + shift[:, 1:] * kx) * (2.0 * np.pi / BOX)
        spectrum = torch.zeros(len(values), *inside.shape, dtype=torch.complex64)
        spectrum[:, inside] = values * torch.polar(torch.ones_like(turns), turns + phase)
        out[rows] = torch.fft.fftshift(torch.fft.irfft2(spectrum, s=(BOX, BOX)), dim=(-2, -1)).numpy()
    return out + np.random.default_rng(seed + 3).standard_normal(out.shape, dtype=np.float32)


def ours(seed: int) -> dict[str, float]:
    """Figures of one run of the stage."""
    images, particles, _, off = simulate(seed)
    before = time.process_time()
    result, _ = iterate(ctf_refine, CtfRefineParams(symmetry="D2"), images, particles, {"map_pixel_size_angstrom": PIXEL})
    seconds = time.process_time() - before
    value, deviation = result["aberration_value"][0], result["aberration_deviation"][0]
    matrix = np.array([[value[6], value[7]], [value[7], value[8]]])
    shell = round(BOX * PIXEL / 4.5)
    error = result["defocus_change_angstrom"] - off
    return {
        "defocus_rms_angstrom": float(np.sqrt((error**2).mean())),
        "magnification_error": float(np.abs(matrix - MAGNIFICATION).max()),
        "tilt_error_sd": float(np.max(np.abs(value[:2] - np.array(TILT_MRAD)) / deviation[:2])),
        "trefoil_error_rad": float(np.hypot(value[2] - TREFOIL_ANGSTROM3, value[3]) * TREFOIL_AT_4A),
        "half_fsc_4_5A": float(result["fsc_after"][shell]),
        "half_fsc_4_5A_before": float(result["fsc_before"][shell]),
        "spread_angstrom": result["defocus_spread_angstrom"],
        "cpu_seconds": seconds,
    }, result, off  # fmt: skip


def relion(seed: int) -> dict[str, float]:
    """Figures of RELION's fits, chained, with the CPU seconds of all its processes."""
    images, particles, _, off = simulate(seed)
    folder = OUT / f"ctf_refine_relion_s{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "out").mkdir(parents=True)
    columns = particles.columns
    rows = image_rows(torch.from_numpy(images), columns, BOX // 2 - 2, PIXEL)
    angles = [torch.deg2rad(torch.from_numpy(columns[name])) for name in ("rot_deg", "tilt_deg", "psi_deg")]
    from cryodask.kernels.orientations import euler_to_matrix

    poses, shifts = euler_to_matrix(*angles), torch.from_numpy(np.stack([columns[f"origin_{a}_angstrom"] for a in "yx"], -1) / PIXEL)
    for half in (0, 1):
        own = torch.from_numpy(np.flatnonzero(columns["half_set"] == half))
        grid = grid_of_poses(rows, own, torch.ones(BOX // 2), poses[own], shifts[own], BOX // 2 - 2, symmetry_operators("D2"))
        write_mrc(folder / f"half{half + 1}_class001_unfil.mrc", reconstruct_half(grid, BOX // 2 - 2, BOX, image_box=BOX).numpy(), PIXEL)
    from cryodask.kernels.fourier import soft_sphere

    write_mrc(folder / "mask.mrc", soft_sphere(BOX, PIXEL, 95.0, 10.0).numpy(), PIXEL)
    write_mrc(folder / "particles.mrcs", images, PIXEL, stack=True)
    optics = {
        "rlnOpticsGroupName": "og1", "rlnOpticsGroup": 1, "rlnVoltage": 300.0, "rlnSphericalAberration": 2.7, "rlnAmplitudeContrast": 0.1,
        "rlnImagePixelSize": PIXEL, "rlnImageSize": BOX, "rlnImageDimensionality": 2, "rlnMicrographOriginalPixelSize": PIXEL,
    }  # fmt: skip
    table = pd.DataFrame({
        "rlnImageName": [f"{i + 1:06d}@particles.mrcs" for i in range(COUNT)],
        "rlnMicrographName": [f"mic{m:03d}.mrc" for m in columns["micrograph"]],
        "rlnOpticsGroup": 1, "rlnDefocusU": columns["defocus_u_angstrom"], "rlnDefocusV": columns["defocus_v_angstrom"],
        "rlnDefocusAngle": columns["defocus_angle_deg"], "rlnAngleRot": columns["rot_deg"], "rlnAngleTilt": columns["tilt_deg"],
        "rlnAnglePsi": columns["psi_deg"], "rlnOriginXAngst": columns["origin_x_angstrom"], "rlnOriginYAngst": columns["origin_y_angstrom"],
        "rlnRandomSubset": 1 + columns["half_set"],
    })  # fmt: skip
    starfile.write({"optics": pd.DataFrame([optics]), "particles": table}, folder / "start.star")
    halves = ["half1_class001_unfil.mrc", "half2_class001_unfil.mrc"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)

    def run(*words: str) -> None:
        subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    run("relion_postprocess", "--i", halves[0], "--i2", halves[1], "--mask", "mask.mrc", "--o", "out/pp", "--angpix", str(PIXEL))
    star = "start.star"
    for name, fit in (
        ("mag", ("--fit_aniso", "--kmin_mag", "20")),
        ("tilt", ("--fit_beamtilt", "--kmin_tilt", "20", "--odd_aberr_max_n", "3")),
        ("defocus", ("--fit_defocus", "--kmin_defocus", "20", "--fit_mode", "fpfff")),
    ):
        (folder / name).mkdir()
        maps = ("--f", "out/pp.star", "--m1", halves[0], "--m2", halves[1], "--mask", "mask.mrc")
        run("relion_ctf_refine", "--i", star, *maps, "--o", f"{name}/", *fit)
        star = f"{name}/particles_ctf_refine.star"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = starfile.read(folder / star, always_dict=True)
    optics_found, rows_found = found["optics"].iloc[0], found["particles"].sort_values("rlnImageName")
    change = (rows_found[["rlnDefocusU", "rlnDefocusV"]].to_numpy(float).mean(1)) - (
        columns["defocus_u_angstrom"] + columns["defocus_v_angstrom"]
    ) / 2.0
    matrix = np.array([[float(optics_found.get(f"rlnMagMat{i}{j}", i == j)) for j in (0, 1)] for i in (0, 1)])
    tilt = np.array([float(optics_found.get(f"rlnBeamTilt{axis}", 0.0)) for axis in "XY"])
    odd = np.array([float(v) for v in str(optics_found.get("rlnOddZernike", "[0,0,0,0,0,0]")).strip("[]").split(",")])
    return {
        "relion_defocus_rms_angstrom": float(np.sqrt(((change - off) ** 2).mean())),
        "relion_magnification_error": float(np.abs(matrix - MAGNIFICATION).max()),
        "relion_tilt_error_mrad": float(np.abs(tilt - np.array(TILT_MRAD)).max()),
        "relion_trefoil_error_rad": float(np.hypot(odd[5] - TREFOIL_ANGSTROM3, odd[2]) * TREFOIL_AT_4A) if len(odd) == 6 else float("nan"),
        "relion_cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[21])
    parser.add_argument("--no-relion", action="store_true")
    options = parser.parse_args()
    table = []
    for seed in options.seeds:
        figures, result, off = ours(seed)
        if not options.no_relion and shutil.which("relion_ctf_refine"):
            figures |= relion(seed)
        table.append(figures)
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)
    plot(result, off)
    worst = {name: (min if "fsc" in name else max)(row[name] for row in table) for name in table[0]}
    print(json.dumps({name: round(value, 5) for name, value in worst.items()} | {"seeds": len(table)}))


def plot(result: dict[str, np.ndarray], off: np.ndarray) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.scatter(off, result["defocus_change_angstrom"], s=3)
    left.plot([-300, 300], [-300, 300], color="black", lw=0.7)
    left.set(xlabel="true change of defocus, A", ylabel="refined change, A")
    frequency = result["refinement_frequency"]
    right.plot(frequency[1:], result["fsc_before"][1:], label="before")
    right.plot(frequency[1:], result["fsc_after"][1:], label="after")
    right.set(xlabel="1/A", ylabel="FSC of the half-maps")
    right.legend()
    figure.savefig(OUT / "ctf_refine.png", dpi=120)


if __name__ == "__main__":
    main()
