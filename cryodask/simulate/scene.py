"""The simulated scene: particles in ice as a contrast image, and micrographs counted from it.

Weak phase object: contrast = -2 CTF x phase (protein dark), times an envelope; static structure noise of the ice passes through
the CTF as the particles do, which is what makes Thon rings. All arrays are in the MRC frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.fft
import torch

from cryodask.kernels.ctf import ctf
from cryodask.kernels.dose import amplitude_after_exposure
from cryodask.kernels.orientations import euler_to_matrix
from cryodask.simulate.model import MOLECULES, Molecule, MoleculeName, phase_transform


@dataclass(frozen=True)
class Optics:
    """Parameters of image formation. ``defocus_angle_deg`` from +x towards +y; the envelope is exp(-B k^2 / 4)."""

    pixel_size_angstrom: float
    voltage_kv: float = 300.0
    spherical_aberration_mm: float = 2.7
    amplitude_contrast: float = 0.1
    defocus_u_angstrom: float = 15000.0
    defocus_v_angstrom: float = 15000.0
    defocus_angle_deg: float = 0.0
    envelope_b_angstrom2: float = 60.0


@dataclass(frozen=True)
class Particles:
    """Positions, pixels (row, column), and orientations, RELION's Euler angles, of particles; each `(particle,)`."""

    y: np.ndarray
    x: np.ndarray
    rot_deg: np.ndarray
    tilt_deg: np.ndarray
    psi_deg: np.ndarray

    def __len__(self) -> int:
        return len(self.y)


def place_particles(rng: np.random.Generator, count: int, shape: tuple[int, int], distance_px: float, margin_px: float) -> Particles:
    """At most ``count`` random positions at least ``distance_px`` apart and ``margin_px`` from the border, views uniform."""
    places = np.empty((0, 2))
    for _ in range(40):
        for place in rng.uniform(margin_px, np.array(shape) - 1.0 - margin_px, (500, 2)):
            if len(places) < count and (((places - place) ** 2).sum(1) >= distance_px**2).all():
                places = np.vstack([places, place])
    n = len(places)
    rot, psi = rng.uniform(-180.0, 180.0, (2, n))
    tilt = np.degrees(np.arccos(rng.uniform(-1.0, 1.0, n)))
    return Particles(places[:, 0], places[:, 1], rot, tilt, psi)


def contrast_transform(
    rng: np.random.Generator,
    molecule: Molecule,
    particles: Particles,
    shape: tuple[int, int],
    optics: Optics,
    *,
    signal_amplitude: float,
    ice_noise_angstrom2: float,
    ice_b_angstrom2: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Transform of the contrast before radiation damage.

    Parameters
    ----------
    ice_noise_angstrom2 : float
        Power of the structure noise at low frequency, A^2: the contrast's power is 4 CTF^2 times this times
        exp(-``ice_b_angstrom2`` k^2 / 2). Shot noise at an exposure D has 1 / D.

    Returns
    -------
    contrast : `(y, x // 2 + 1)` complex64
        rfft2 of intensity / mean - 1.
    k : the same shape, float32, 1/Angstrom
    """
    angles = [torch.from_numpy(np.radians(a)) for a in (particles.rot_deg, particles.tilt_deg, particles.psi_deg)]
    rotations = euler_to_matrix(*angles).numpy()
    pixel = optics.pixel_size_angstrom
    wave = phase_transform(molecule, rotations, np.stack([particles.y, particles.x], 1), shape, pixel, optics.voltage_kv)
    wave *= np.float32(signal_amplitude)
    ky = torch.from_numpy(np.fft.fftfreq(shape[0], pixel).astype(np.float32))[:, None]
    kx = torch.from_numpy(np.fft.rfftfreq(shape[1], pixel).astype(np.float32))[None]
    k2 = (ky * ky + kx * kx).numpy()
    if ice_noise_angstrom2 > 0.0:
        ice = scipy.fft.rfft2(rng.standard_normal(shape, dtype=np.float32))
        wave += ice * (math.sqrt(ice_noise_angstrom2) / pixel * np.exp(-0.25 * ice_b_angstrom2 * k2))
    transfer = ctf(
        ky,
        kx,
        defocus_u_angstrom=optics.defocus_u_angstrom,
        defocus_v_angstrom=optics.defocus_v_angstrom,
        defocus_angle_rad=math.radians(optics.defocus_angle_deg),
        voltage_kv=optics.voltage_kv,
        spherical_aberration_mm=optics.spherical_aberration_mm,
        amplitude_contrast=optics.amplitude_contrast,
    ).numpy()
    wave *= -2.0 * transfer * np.exp(-0.25 * optics.envelope_b_angstrom2 * k2)
    wave[0, 0] = 0.0
    return wave, np.sqrt(k2)


class CountTable:
    """Poisson counts from a table of 512 rates x 4096 quantiles, four times as fast as direct sampling.

    Mean and variance are accurate to 1 in 1000; counts rarer than 1 in 8000 at their rate never occur. Rates outside the
    table are sampled exactly.
    """

    RATES, QUANTILES = 512, 4096

    def __init__(self, lowest: float, highest: float) -> None:
        self.lowest, self.step = lowest, (highest - lowest) / (self.RATES - 1)
        rates = lowest + self.step * np.arange(self.RATES)
        most = int(highest + 8.0 * math.sqrt(highest) + 8.0)
        count = np.arange(most + 1)
        log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most + 1)))])
        probability = np.exp(count * np.log(np.maximum(rates, 1e-12))[:, None] - rates[:, None] - log_factorial)
        quantile = (np.arange(self.QUANTILES) + 0.5) / self.QUANTILES
        self.table = np.stack([np.searchsorted(np.cumsum(p), quantile) for p in probability]).clip(0, most)
        self.table = self.table.astype(np.uint8 if most < 256 else np.uint16).ravel()

    def draw(self, rng: np.random.Generator, rates: np.ndarray) -> np.ndarray:
        """Counts of the same shape as ``rates`` (float32)."""
        level = ((rates - np.float32(self.lowest)) * np.float32(1.0 / self.step) + np.float32(0.5)).astype(np.int32)
        outside = (level < 0) | (level >= self.RATES)
        rare = np.flatnonzero(outside) if outside.any() else None
        if rare is not None:
            level.ravel()[rare] = 0
        level <<= 12
        level += rng.integers(0, self.QUANTILES, rates.shape, dtype=np.uint16)
        counts = self.table.take(level)
        if rare is not None:
            exact = rng.poisson(np.maximum(rates.ravel()[rare], 0.0))
            counts.ravel()[rare] = np.minimum(exact, np.iinfo(counts.dtype).max)
        return counts


@dataclass(frozen=True)
class Micrograph:
    """A simulated micrograph and its truth: ``image`` `(y, x)` float32, electrons per pixel; protein dark."""

    image: np.ndarray
    optics: Optics
    particles: Particles
    dose: float


def simulate_micrograph(
    *,
    shape: tuple[int, int] = (4096, 4096),
    optics: Optics | None = None,
    molecule: MoleculeName = "beta-galactosidase",
    particles: int = 200,
    dose: float = 40.0,
    signal_amplitude: float = 1.0,
    ice_noise_angstrom2: float = 0.004,
    ice_b_angstrom2: float = 25.0,
    distance_angstrom: float = 190.0,
    damage: bool = True,
    seed: int = 0,
) -> Micrograph:
    """One dose-summed, motion-free micrograph, for picking and CTF.

    Parameters
    ----------
    shape : (y, x)
        Pixels.
    optics : Optics, optional
        Default: 1 Angstrom per pixel, 300 kV, Cs 2.7 mm, amplitude contrast 0.1, defocus 15,000 A. Its fields ``defocus_u_angstrom,
        defocus_v_angstrom, defocus_angle_deg, pixel_size_angstrom`` are the truth of a CTF fit.
    molecule : str
        A name of :data:`cryodask.simulate.model.MOLECULES`.
    particles : int
        How many to place; fewer if the image is full (`len(result.particles)`).
    dose : float
        Exposure, e/A^2. Counts have the mean dose x pixel^2.
    signal_amplitude : float
        Factor on the phase of the particles (0 = ice alone); 0.7 accounts for inelastic loss and the detector.
    ice_noise_angstrom2, ice_b_angstrom2 : float
        Structure noise of the ice, see `contrast_transform`.
    distance_angstrom : float
        Smallest distance between particle centres.
    damage : bool
        Whether signal fades with exposure (Grant & Grigorieff 2015).
    seed : int
        The same seed gives bit-identical results.

    Returns
    -------
    Micrograph
        ``image``; ``particles.y, .x`` (pixels, MRC frame, 0 = centre of the first pixel), ``.rot_deg, .tilt_deg, .psi_deg``.
    """
    optics = optics or Optics(pixel_size_angstrom=1.0)
    rng = np.random.Generator(np.random.SFC64([seed, 2]))
    pixel = optics.pixel_size_angstrom
    placed = place_particles(rng, particles, shape, distance_angstrom / pixel, 0.5 * distance_angstrom / pixel)
    transform, k = contrast_transform(
        rng,
        MOLECULES[molecule](),
        placed,
        shape,
        optics,
        signal_amplitude=signal_amplitude,
        ice_noise_angstrom2=ice_noise_angstrom2,
        ice_b_angstrom2=ice_b_angstrom2,
    )
    if damage:
        table_k = np.linspace(0.0, float(k.max()), 1024)
        middles = (np.arange(64) + 0.5) * dose / 64
        kept = amplitude_after_exposure(table_k, middles, optics.voltage_kv).mean(0)
        transform *= np.interp(k, table_k, kept).astype(np.float32)
    mean = dose * pixel**2
    rates = (scipy.fft.irfft2(transform, s=shape) + np.float32(1.0)) * np.float32(mean)
    np.maximum(rates, 0.0, out=rates)
    table = CountTable(float(np.percentile(rates[::16], 0.1)), float(np.percentile(rates[::16], 99.9)))
    return Micrograph(table.draw(rng, rates).astype(np.float32), optics, placed, dose)
