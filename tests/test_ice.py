"""Rings of crystalline ice in power spectra of known rings."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from cryodask.kernels.ice import ice_ring_excess
from cryodask.kernels.spectrum import cropped, power_spectrum
from cryodask.simulate import Optics, simulate_micrograph

PIXEL = 0.885


@functools.cache
def simulated(seed: int) -> np.ndarray:
    return simulate_micrograph(shape=(1152, 1152), optics=Optics(pixel_size_angstrom=PIXEL), particles=15, seed=seed).image


def micrograph(spacing: float | None, strength: float, seed: int = 0) -> torch.Tensor:
    """A micrograph of particles in ice with a ring, 0.006 1/A wide, of ``strength`` times the power that is there."""
    image = simulated(seed)
    if spacing is not None:
        k = np.hypot(np.fft.fftfreq(len(image), PIXEL)[:, None], np.fft.rfftfreq(len(image), PIXEL)[None])
        near = np.abs(k - 1 / spacing) < 0.003
        transform = np.fft.rfft2(image)
        other = np.fft.rfft2(np.random.default_rng(seed + 1).normal(size=image.shape))
        transform[near] += other[near] * math.sqrt(strength) * np.abs(transform[near]).std() / np.abs(other[near]).std()
        image = np.fft.irfft2(transform, s=image.shape)
    return torch.from_numpy(image.astype(np.float32))


def strength_of(image: torch.Tensor) -> float:
    return ice_ring_excess(power_spectrum(image, pixel_size_angstrom=PIXEL, tile_angstrom=450.0, finest_angstrom=3.1))


@pytest.mark.parametrize(("spacing", "strength"), [(3.66, 0.5), (3.90, 0.3)])
def test_the_strength_of_a_ring_is_its_power_over_that_of_the_background(spacing: float, strength: float) -> None:
    """The ring fills 0.75 of the band in which it is looked for."""
    assert strength_of(micrograph(spacing, strength)) == pytest.approx(0.75 * strength, abs=0.04)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_micrograph_without_crystals_has_no_ring(seed: int) -> None:
    assert abs(strength_of(micrograph(None, 0.0, seed))) < 0.02


def test_a_ring_elsewhere_is_none() -> None:
    assert strength_of(micrograph(3.44, 0.5)) < 0.02


def test_pixels_too_large_to_show_rings_give_nan() -> None:
    image = torch.randn(400, 400, generator=torch.Generator().manual_seed(0))
    assert math.isnan(ice_ring_excess(power_spectrum(image, pixel_size_angstrom=1.77, tile_angstrom=300.0, finest_angstrom=3.1)))


def test_a_cropped_spectrum_is_the_one_that_was_cut_there() -> None:
    image = torch.randn(500, 460, generator=torch.Generator().manual_seed(0))
    wide, narrow = (power_spectrum(image, pixel_size_angstrom=1.0, tile_angstrom=120.0, finest_angstrom=f).power for f in (2.5, 4.0))
    whole = power_spectrum(image, pixel_size_angstrom=1.0, tile_angstrom=120.0, finest_angstrom=2.5)
    assert wide.shape != narrow.shape
    assert torch.equal(cropped(whole, 4.0).power, narrow)
