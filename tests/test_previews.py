"""Previews of micrographs: what they show, how they lie, and that the motion stage writes them without changing anything else."""

from __future__ import annotations

import numpy as np
import pytest

from cryodask.kernels.preview import preview, preview_shape, spectrum_of
from cryodask.stages import motion
from cryodask.store.shards import Layout, write_shard

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize("shape", [(4096, 4096), (4092, 5760), (512, 512), (300, 1100)])
def test_the_longest_side_has_at_most_1024_pixels(shape):
    made = preview(np.random.default_rng(0).poisson(20, shape).astype(np.float32))
    assert made.shape == (2, *preview_shape(*shape))
    assert 512 <= max(made.shape) <= 1024
    assert made.dtype == np.uint8


def test_a_corner_stays_in_its_corner():
    micrograph = np.random.default_rng(0).normal(100, 1, (2048, 2048)).astype(np.float32)
    micrograph[:200, -300:] += 20
    shown = preview(micrograph)[0]
    assert shown[:90, -140:].mean() > 200
    assert shown[200:, :].mean() < 150


def test_the_spectrum_shows_a_wave_at_its_frequency_and_is_symmetric():
    x = np.arange(2048)
    wave = np.sin(2 * np.pi * x / 8)[None] + np.random.default_rng(0).normal(size=(2048, 2048))
    shown = spectrum_of(preview(wave.astype(np.float32)))
    middle = shown.shape[0] // 2
    assert shown[middle, middle + shown.shape[1] // 8] == shown.max()
    assert (shown[1:, 1:] == shown[1:, 1:][::-1, ::-1]).all()


@pytest.mark.parametrize("micrograph", [np.zeros((64, 64)), np.full((100, 90), 7.0)])
def test_a_flat_micrograph_has_a_preview(micrograph):
    assert preview(micrograph.astype(np.float32)).shape[0] == 2


def test_the_file_has_at_most_a_megabyte(tmp_path):
    made = preview(np.random.default_rng(0).poisson(40, (4096, 4096)).astype(np.float32))
    assert write_shard(tmp_path / "shard", Layout.of(made.shape, (1, 0, 0), "uint8"), made).size <= 1_100_000


def test_the_motion_stage_gives_the_preview_of_its_sum(tmp_path):
    from cryodask.stages._motion import corrected

    movie = np.random.default_rng(0).poisson(2.0, (4, 96, 128)).astype(np.uint8)
    given = corrected(
        motion.params(), movie, None, pixel_size_angstrom=1.0, dose_per_frame=1.0, pre_exposure=0.0, voltage_kv=300.0, device="cpu"
    )
    assert (given["micrograph_preview"] == preview(given["micrograph_sum"])).all()
    assert "micrograph_preview" in motion.gives
