"""Movies: drift, beam-induced motion, radiation damage, counting, gain and defects.

Statistics of the motion follow trajectories that RELION found in EMPIAR-10204 (whole path 13 A over 31 e/A^2, local motion growing
to 1-2 A rms); their form is a velocity that is correlated in space and in exposure (Zivanov, Nakane & Scheres 2019).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.fft
import torch

from cryodask.kernels.dose import amplitude_after_exposure
from cryodask.kernels.warp import stripe_field, stripe_rows, warp_rows
from cryodask.simulate.scene import CountTable

NODES = 9
"""Trajectories are defined on a regular grid of 9 x 9 nodes that spans the image from its first to its last pixel."""
_MARGIN = 64
_STRIPE = 64


def node_positions(shape: tuple[int, int]) -> np.ndarray:
    """Nodes of the grid, `(81, 2)` pixels (row, column), row by row."""
    y, x = np.linspace(0.0, shape[0] - 1.0, NODES), np.linspace(0.0, shape[1] - 1.0, NODES)
    return np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2)


def random_drift(rng: np.random.Generator, frames: int, dose_per_frame: float) -> np.ndarray:
    """Motion of the stage, `(frame, 2)` Angstrom: an initial drift that decays within 3 e/A^2, a slow random walk, and jitter."""
    start = rng.normal(0.0, 1.2, 2)
    wander = rng.normal(0.0, 0.25, 2)
    path, place = [], np.zeros(2)
    for f in range(frames):
        place = place + (start * math.exp(-f * dose_per_frame / 3.0) + wander) * dose_per_frame + rng.normal(0.0, 0.12, 2)
        wander = wander + rng.normal(0.0, 0.05, 2)
        path.append(place)
    return np.array(path)


def random_local_motion(
    rng: np.random.Generator, frames: int, dose_per_frame: float, shape: tuple[int, int], pixel_size_angstrom: float
) -> np.ndarray:
    """Beam-induced motion at the nodes, `(81, frame, 2)` Angstrom.

    Velocity: 0.35 A per e/A^2 with covariance exp(-r / 4000 A) in space and a memory of 8 e/A^2, a burst in the first 2.5 e/A^2,
    and doming about a random centre.
    """
    nodes = node_positions(shape) * pixel_size_angstrom
    distance = np.linalg.norm(nodes[:, None] - nodes[None], axis=2)
    root = np.linalg.cholesky(0.35**2 * np.exp(-distance / 4000.0) + 1e-9 * np.eye(len(nodes)))
    velocity = root @ rng.normal(size=(len(nodes), 2))
    memory = math.exp(-dose_per_frame / 8.0)
    extent = 0.5 * shape[0] * pixel_size_angstrom
    centre = rng.uniform(0.25, 0.75, 2) * np.array(shape) * pixel_size_angstrom
    doming = rng.normal(0.0, 0.8) * (nodes - centre) / extent
    path, place = [], np.zeros_like(velocity)
    for f in range(frames):
        exposure = f * dose_per_frame
        speed = velocity * (1.0 + 3.0 * math.exp(-exposure / 2.5)) + doming * math.exp(-exposure / 4.0)
        place = place + 0.25 * dose_per_frame * speed
        path.append(place)
        velocity = memory * velocity + math.sqrt(1.0 - memory**2) * (root @ rng.normal(size=velocity.shape))
    return np.stack(path, 1)


def random_gain(rng: np.random.Generator, shape: tuple[int, int], smooth: float, pixel: float, dead: int) -> np.ndarray:
    """A gain reference `(y, x)` float32: smooth pattern, pixel pattern (relative standard deviations), ``dead`` pixels 0."""
    k2 = np.fft.fftfreq(shape[0])[:, None] ** 2 + np.fft.rfftfreq(shape[1])[None] ** 2
    width = 0.05 * max(shape)
    pattern = scipy.fft.rfft2(rng.standard_normal(shape, dtype=np.float32)) * np.exp(-2.0 * (math.pi * width) ** 2 * k2)
    pattern[0, 0] = 0.0
    field = scipy.fft.irfft2(pattern, s=shape)
    gain = 1.0 + smooth * field / field.std() + pixel * rng.standard_normal(shape)
    gain = gain.clip(0.5, 2.0).astype(np.float32)
    gain.ravel()[rng.choice(gain.size, dead, replace=False)] = 0.0
    return gain


@dataclass(frozen=True)
class Detector:
    """Gain `(y, x)` and the flat indices and rates (of the mean) of hot pixels."""

    gain: np.ndarray
    hot_pixels: np.ndarray
    hot_rates: np.ndarray


def expose(
    rng: np.random.Generator,
    transform: np.ndarray,
    k: np.ndarray,
    displacement_px: np.ndarray,
    detector: Detector,
    *,
    padded_shape: tuple[int, int],
    mean_count: float,
    dose_per_frame: float,
    pre_exposure: float,
    voltage_kv: float,
    damage: bool = True,
) -> np.ndarray:
    """Count the frames of a movie.

    Parameters
    ----------
    transform, k : `(y, x // 2 + 1)`
        Contrast of the scene (`contrast_transform`) on ``padded_shape``, which is `margin` pixels larger on every side.
    displacement_px : `(81, frame, 2)`
        Displacement of the specimen at the nodes, pixels.
    mean_count : float
        Electrons per pixel and frame.

    Returns
    -------
    ndarray, `(frame, y, x)` uint8

    Notes
    -----
    The scene moves by an 8-tap kernel, longer than the corrector's, so that a correction does not cancel its own errors. Damage is
    of rank 4 in (frame, frequency): four filtered scenes, mixed for each frame.
    """
    frames = displacement_px.shape[1]
    height, width = (n - 2 * _MARGIN for n in padded_shape)
    if damage:
        table_k = np.linspace(0.0, float(k.max()) + 1e-6, 2048)
        middles = pre_exposure + (np.arange(frames) + 0.5) * dose_per_frame
        u, s, vt = np.linalg.svd(amplitude_after_exposure(table_k, middles, voltage_kv), full_matrices=False)
        mixing = (u * s)[:, :4].astype(np.float32)
        filters = [np.interp(k, table_k, row).astype(np.float32) for row in vt[:4]]
        scenes = np.stack([scipy.fft.irfft2(transform * f, s=padded_shape) for f in filters])
    else:
        mixing, scenes = np.ones((frames, 1), np.float32), scipy.fft.irfft2(transform, s=padded_shape)[None]
    flat = torch.from_numpy(scenes.reshape(len(scenes), -1))
    nodes = torch.from_numpy(displacement_px.astype(np.float32)).permute(1, 2, 0).reshape(2 * frames, NODES, NODES)
    fields = stripe_field(-nodes, (height, width), _STRIPE)
    fields = torch.nn.functional.pad(fields, (_MARGIN, _MARGIN), mode="replicate")
    fields = fields.view(frames, 2, fields.shape[1], fields.shape[2])
    with np.errstate(divide="ignore"):
        sensitivity = np.where(detector.gain > 0, np.float32(mean_count) / detector.gain, np.float32(0.0))
    live = sensitivity[sensitivity > 0]
    low, high = (float(np.percentile(live[::17], q)) for q in (0.1, 99.9))
    spread = 5.0 * float(scenes[0].std() * abs(mixing[0, 0]))
    table = CountTable(max(0.0, low * (1.0 - spread)), high * (1.0 + spread))
    movie = np.empty((frames, height, width), np.uint8)
    rates = np.empty((height, width), np.float32)
    hot_rates = mean_count * detector.hot_rates
    for f in range(frames):
        scene = (torch.from_numpy(mixing[f]) @ flat).view(padded_shape)
        for i, (first, last) in enumerate(stripe_rows(height, _STRIPE)):
            moved = warp_rows(scene, None, _MARGIN + first, _MARGIN + last, fields[f, 0, i], fields[f, 1, i], taps=8)
            rates[first:last] = moved[:, _MARGIN : _MARGIN + width].numpy()
        rates += 1.0
        np.maximum(rates, 0.0, out=rates)
        rates *= sensitivity
        movie[f] = np.minimum(table.draw(rng, rates), 255)
        movie[f].ravel()[detector.hot_pixels] = rng.poisson(hot_rates).clip(0, 255)
    movie[:, detector.gain == 0] = 0
    return movie


def padded(shape: tuple[int, int]) -> tuple[int, int]:
    """Size of the scene for a movie of ``shape``: larger by a margin, so that real content moves into view."""
    return shape[0] + 2 * _MARGIN, shape[1] + 2 * _MARGIN


def margin_px() -> int:
    """Position of pixel 0 of the movie in the scene."""
    return _MARGIN
