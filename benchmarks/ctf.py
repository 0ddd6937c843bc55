"""Accuracy and cost of the CTF fit: 11 real spectra with published values, 6 large and 16 small simulated micrographs.

    python benchmarks/ctf.py [--shared ../shared] [--small 16]

The real spectra are those of RELION's beta-galactosidase tutorial (EMPIAR-10204), as relion_run_motioncorr wrote them, against the
tutorial's CTFFIND values. The simulated ones are cryodask.simulate's.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import mrcfile
import numpy as np
import torch
from matplotlib.figure import Figure

from cryodask.formats.star import read_micrographs
from cryodask.kernels.ctf_cells import lens_of
from cryodask.kernels.ctf_fit import fit_ctf
from cryodask.kernels.spectrum import spectrum_of_amplitudes
from cryodask.simulate import Optics, simulate_micrograph
from cryodask.stages.ctf import CtfParams, ctf


def astigmatism(u: float, v: float, angle_rad: float) -> np.ndarray:
    """(u - v) as a vector of twice the angle, Angstrom."""
    return (u - v) * np.array([math.cos(2 * angle_rad), math.sin(2 * angle_rad)])


def rms(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def real_spectra(folder: Path) -> tuple[list[float], list[float]]:
    """Errors of mean defocus and lengths of the error of the astigmatism vector, Angstrom."""
    official = read_micrographs(folder / "micrographs_ctf_official.star")
    spectra = mrcfile.read(folder / "power_spectra.mrcs.bz2").astype(np.float32)
    lens = lens_of(200.0, 1.4, 0.1)
    defocus, vector = [], []
    for i, amplitude in enumerate(spectra):
        # RELION scales its spectra to about 1.4 A a pixel: 512 pixels of 1.39955 A
        fit = fit_ctf(spectrum_of_amplitudes(torch.from_numpy(amplitude), 1 / (512 * 1.39955)), lens)
        u, v = official["defocus_u_angstrom"][i], official["defocus_v_angstrom"][i]
        angle = math.radians(official["defocus_angle_deg"][i])
        defocus.append(0.5 * (fit.defocus_u_angstrom + fit.defocus_v_angstrom - u - v))
        ours = astigmatism(fit.defocus_u_angstrom, fit.defocus_v_angstrom, fit.defocus_angle_rad)
        vector.append(float(np.hypot(*(ours - astigmatism(u, v, angle)))))
        print(f"  real {i + 21:2d}  defocus {(u + v) / 2:6.0f}  error {defocus[-1]:+5.0f}  vector {vector[-1]:4.0f}  "
              f"fit to {fit.resolution_angstrom:.1f} A  alternative {fit.alternative_score:.2f}")  # fmt: skip
    return defocus, vector


def simulated(
    shape: int, pixels: list[float], defocus: tuple[float, float], most: float, particles: list[int], seed: int, voltages: tuple = (300.0,)
) -> tuple:
    """Errors of mean defocus, of the vector (Angstrom) and CPU seconds of stage ``ctf`` on micrographs of known truth."""
    rng = np.random.default_rng(seed)
    errors, vectors, seconds = [], [], []
    for number, (pixel, count) in enumerate(zip(pixels, particles)):
        mean, length, angle = rng.uniform(*defocus), rng.uniform(0.0, most), rng.uniform(-90.0, 90.0)
        optics = Optics(
            pixel_size_angstrom=pixel,
            defocus_u_angstrom=mean + length / 2,
            defocus_v_angstrom=mean - length / 2,
            defocus_angle_deg=angle,
            voltage_kv=voltages[number % len(voltages)],
        )
        image = simulate_micrograph(shape=(shape, shape), optics=optics, particles=count, seed=seed + number).image
        start = time.process_time()
        out = ctf.process(
            CtfParams(),
            micrograph_sum=image,
            pixel_size_angstrom=pixel,
            voltage_kv=optics.voltage_kv,
            spherical_aberration_mm=optics.spherical_aberration_mm,
            amplitude_contrast=optics.amplitude_contrast,
        )
        seconds.append(time.process_time() - start)
        u, v = out["defocus_u_angstrom"], out["defocus_v_angstrom"]
        errors.append(0.5 * (u + v) - mean)
        ours = astigmatism(u, v, math.radians(out["defocus_angle_deg"]))
        vectors.append(float(np.hypot(*(ours - astigmatism(length, 0.0, math.radians(angle))))))
        print(f"  {optics.voltage_kv:.0f} kV, {shape} px of {pixel:.2f} A, {count:3d} particles  defocus {mean:6.0f}  "
              f"error {errors[-1]:+5.0f}  vector {vectors[-1]:4.0f}  fit to {out['ctf_resolution_angstrom']:.1f} A  "
              f"{seconds[-1]:.2f} s")  # fmt: skip
    return errors, vectors, seconds


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--small", type=int, default=16, help="number of micrographs of 1024 x 1024 pixels")
    parser.add_argument("--voltages", type=int, default=9, help="number of micrographs of 4096 x 4096 pixels at 100, 200 and 300 kV")
    args = parser.parse_args()
    print("11 real spectra, 200 kV, 1.4 A a pixel, against the tutorial's values (Angstrom)")
    real, vector = real_spectra(args.shared / "data" / "betagal_10204")
    print("6 simulated micrographs of 4096 x 4096")
    pixels = [0.85, 1.0, 1.3, 0.85, 1.0, 1.3]
    large, large_vector, seconds = simulated(4096, pixels, (5000, 25000), 600, [60, 100, 140, 180, 220, 250], seed=1000)
    print(f"{args.small} simulated micrographs of 1024 x 1024, 40 particles")
    small, small_vector, small_seconds = simulated(1024, [1.77] * args.small, (8000, 20000), 300, [40] * args.small, seed=2000)
    print(f"{args.voltages} simulated micrographs of 4096 x 4096, 0.35 to 4 um, 100, 200 and 300 kV")
    wide, wide_vector, _ = simulated(
        4096, [1.0] * args.voltages, (3500, 40000), 600, [120] * args.voltages, seed=3000, voltages=(100.0, 200.0, 300.0)
    )
    print(f"real: RMS {rms(real):.0f}, mean {np.mean(real):+.0f}, largest {np.abs(real).max():.0f}, vector RMS {rms(vector):.0f} A")
    print(f"4096: RMS {rms(large):.0f}, vector RMS {rms(large_vector):.0f} A, {np.mean(seconds):.2f} CPU s each")
    print(f"4096, 100 to 300 kV: RMS {rms(wide):.0f}, largest {np.abs(wide).max():.0f}, vector RMS {rms(wide_vector):.0f} A")
    print(f"1024: RMS {rms(small):.0f}, largest {np.abs(small).max():.0f}, vector RMS {rms(small_vector):.0f} A, "
          f"{np.mean(small_seconds):.2f} CPU s each")  # fmt: skip
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for values, label in ((real, "real spectra"), (large, "simulated, 4096"), (small, "simulated, 1024")):
        axes.plot(sorted(values), np.linspace(0, 1, len(values)), "o-", ms=4, label=label)
    axes.set(xlabel="error of the mean defocus, Å", ylabel="share of micrographs below")
    axes.legend(frameon=False)
    out = Path(__file__).parent / "out"
    out.mkdir(exist_ok=True)
    figure.savefig(out / "ctf.png", dpi=110)
    result = {
        "defocus_rms_angstrom": rms(real),
        "defocus_max_error_angstrom": float(np.abs(real).max()),
        "astigmatism_vector_rms_angstrom": rms(vector),
        "simulated_defocus_rms_angstrom": rms(large),
        "simulated_defocus_rms_100_to_300_kv_angstrom": rms(wide),
        "cpu_seconds_each": float(np.mean(seconds)),
    }
    print(json.dumps({k: round(v, 2) for k, v in result.items()}))


if __name__ == "__main__":
    main()
