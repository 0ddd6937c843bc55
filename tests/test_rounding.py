"""Micrographs rounded to a small part of their noise: what that changes, and what it saves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cryodask.kernels.rounding import PART_OF_NOISE, noise_sd, rounded_to_noise
from cryodask.simulate import Optics, simulate_micrograph
from cryodask.stages.ctf import CtfParams, ctf
from cryodask.stages.pick import PickParams, pick
from cryodask.store.shards import Layout, ShardReader, write_shard


def noisy(sd: float, mean: float, size: int = 512) -> torch.Tensor:
    image = mean + sd * np.random.default_rng(3).standard_normal((size, size))
    image[200:300, 100:220] -= 3 * sd  # a particle, and an edge
    return torch.from_numpy(image.astype(np.float32))


@pytest.mark.parametrize(("sd", "mean"), [(0.7, 1.5), (6.3, 40.0), (250.0, 3e4), (2e-3, 0.0)])
def test_rounding_adds_a_ten_thousandth_of_the_noise_at_every_frequency(sd, mean):
    image = noisy(sd, mean)
    rounded = rounded_to_noise(image)
    assert noise_sd(image) == pytest.approx(sd, rel=0.02)
    step = float(torch.unique(rounded).diff().min())
    assert np.log2(step) == round(np.log2(step))
    assert 0.5 * PART_OF_NOISE * sd * 0.97 < step <= PART_OF_NOISE * sd * 1.03
    added = torch.fft.rfft2((rounded - image).double()).abs() ** 2 / image.numel()
    rings = [float(block.mean()) for block in torch.tensor_split(added.flatten(), 16)]
    assert max(rings) < 1.1e-4 * sd**2  # 1 / (12 * 32^2) = 0.8e-4 of the variance


def test_images_without_noise_are_left_as_they_are():
    flat, ramp = torch.full((64, 64), 7.3), torch.zeros(64, 64)
    ramp[::2] = 0.1
    assert torch.equal(rounded_to_noise(flat), flat)
    assert torch.equal(rounded_to_noise(ramp), ramp)
    assert torch.equal(rounded_to_noise(torch.zeros(1, 1)), torch.zeros(1, 1))


def test_a_rounded_micrograph_takes_a_third_of_the_bytes_and_reads_back_bit_by_bit(tmp_path):
    rounded = rounded_to_noise(noisy(6.3, 40.0)).numpy()
    assert not np.signbit(rounded[rounded == 0]).any()
    layout = Layout.of(rounded.shape, (256, 256), "float32", rounded=True)
    made = write_shard(tmp_path / "shard", layout, rounded)
    assert made.size < 0.35 * rounded.nbytes
    assert (ShardReader(tmp_path / "shard", layout).read(made.crc) == rounded).all()


@pytest.mark.heavy
def test_ctf_and_picks_of_a_rounded_micrograph_are_the_same():
    """Against the scatter of the fit (52 A rms over seeds) and of the picks (0.4 diameters count as found)."""
    optics = Optics(pixel_size_angstrom=1.77, defocus_u_angstrom=13200, defocus_v_angstrom=13000, defocus_angle_deg=20)
    image = simulate_micrograph(shape=(1024, 1024), optics=optics, particles=40, seed=8, signal_amplitude=0.5**0.5).image
    fits, picks = [], []
    for one in (image, rounded_to_noise(torch.from_numpy(image)).numpy()):
        fits.append(
            ctf.process(
                CtfParams(),
                micrograph_sum=one,
                pixel_size_angstrom=1.77,
                voltage_kv=300.0,
                spherical_aberration_mm=2.7,
                amplitude_contrast=0.1,
            )
        )
        found = pick.process(PickParams(diameter_angstrom=180.0), micrograph_dw=one, pixel_size_angstrom=1.77)
        kept = found["pick_score"] >= found["pick_threshold"]
        picks.append(np.stack([found["pick_y"], found["pick_x"]], 1)[kept])
    assert abs(fits[0]["defocus_u_angstrom"] - fits[1]["defocus_u_angstrom"]) < 2
    assert abs(fits[0]["defocus_v_angstrom"] - fits[1]["defocus_v_angstrom"]) < 2
    assert len(picks[0]) == len(picks[1]) >= 25
    away = np.hypot(*(picks[0][:, None] - picks[1][None]).transpose(2, 0, 1)).min(1)
    assert away.max() < 0.1
