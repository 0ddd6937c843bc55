"""Soft masks: of the region above a threshold, and as a person has drawn them. Without torch, so that pages compute them as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.fft
from scipy import ndimage


def density_threshold(volume: np.ndarray) -> float:
    """Density threshold between molecule and solvent, for a low-pass filtered map `(z, y, x)`.

    The larger of 30 % of the density inside the molecule (median above Otsu's threshold) and 4 standard deviations of the solvent
    (from the median absolute deviation over the inscribed sphere, most of which is solvent). The first applies to good maps, where ripples
    around the molecule exceed the noise; the second to noisy ones.
    """
    n = volume.shape[0]
    x = np.arange(n) - n // 2
    inside = (x * x)[:, None, None] + (x * x)[None, :, None] + x * x <= (n / 2) ** 2
    values = volume[inside].astype(np.float64)
    solvent = float(np.median(values))
    deviation = 1.4826 * float(np.median(np.abs(values - solvent)))
    molecule = float(np.median(values[values > otsu_threshold(values)]))
    return solvent + max(0.3 * (molecule - solvent), 4.0 * deviation)


def otsu_threshold(values: np.ndarray, bins: int = 512) -> float:
    """Threshold that separates ``values`` into two classes of least variance (Otsu 1979); their maximum if all are equal."""
    counts, edges = np.histogram(values, bins)
    centres = 0.5 * (edges[1:] + edges[:-1])
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    best = int(np.nan_to_num(between).argmax())
    # strictly less than the maximum wherever two classes exist, so that the upper class is never empty
    return float(edges[best + 1]) if edges[-1] > edges[0] and best + 1 < bins else float(np.nextafter(values.max(), -np.inf))


@dataclass(frozen=True)
class Drawn:
    """Something drawn into a mask: all places within ``radius_angstrom`` of a line of points, (z, y, x) in Angstrom from the centre of the
    map, its voxel n // 2; a single point is a ball. ``erase``: taken out instead of put in.
    """

    points: tuple[tuple[float, float, float], ...]
    radius_angstrom: float
    erase: bool = False


def soft_mask(
    volume: np.ndarray,
    threshold: float,
    *,
    pixel_size_angstrom: float,
    extend_angstrom: float,
    edge_angstrom: float,
    smallest_share: float = 0.05,
    drawn: Sequence[Drawn] = (),
    centre: float | None = None,
) -> np.ndarray:
    """Soft mask of the region above ``threshold`` in a map `(z, y, x)`, float32 from 0 to 1; all zero if there is none.

    Parameters
    ----------
    extend_angstrom : float
        Distance by which the thresholded region grows.
    edge_angstrom : float
        Width of the raised cosine outside it.
    smallest_share : float
        Regions smaller than this fraction of the largest are dropped.
    drawn : sequence of Drawn
        What is put in and taken out then, in this order. The mask is one half where it was drawn, so that its edge is half inside.
    centre : float, optional
        Voxel from which the places in ``drawn`` are counted, in each dimension; by default n // 2.
    """
    # Angstrom outside the mask: 0 and less is in it, from the width of the edge on nothing is
    outside = _outside(volume > threshold, smallest_share, pixel_size_angstrom) - extend_angstrom
    middle = volume.shape[0] // 2 if centre is None else centre
    for one in drawn:
        _draw(outside, one, pixel_size_angstrom, middle, edge_angstrom)
    # with no edge the ramp becomes a step
    ramp = np.clip(outside / max(edge_angstrom, 1e-6), 0.0, 1.0)
    return (0.5 + 0.5 * np.cos(np.pi * ramp)).astype(np.float32)


def _outside(above: np.ndarray, smallest_share: float, pixel: float) -> np.ndarray:
    """Distance of each voxel from the large regions of a mask, Angstrom, float64; infinite if there is none."""
    labels, count = ndimage.label(above)
    if not count:
        return np.full(above.shape, np.inf)
    sizes = np.bincount(labels.reshape(-1))
    sizes[0] = 0
    core = (sizes >= smallest_share * sizes.max())[labels]
    return np.asarray(ndimage.distance_transform_edt(~core) * pixel)


def _draw(outside: np.ndarray, one: Drawn, pixel: float, centre: float, edge: float) -> None:
    """Put a line into the distances from a mask, or take it out of them, in place."""
    points = np.asarray(one.points, float) / pixel + centre
    reach = (one.radius_angstrom + edge / 2) / pixel
    for a, b in zip(points, points[1:] if len(points) > 1 else points):
        low = np.maximum(np.floor(np.minimum(a, b) - reach), 0).astype(int)
        high = np.minimum(np.ceil(np.maximum(a, b) + reach) + 1, outside.shape).astype(int)
        if (low >= high).any():
            continue
        box = tuple(slice(*pair) for pair in zip(low, high))
        place = np.stack(np.meshgrid(*(np.arange(*pair) for pair in zip(low, high)), indexing="ij"), -1) - a
        along = b - a
        length = float(along @ along)
        share = np.clip(place @ along / length, 0.0, 1.0) if length else np.zeros(place.shape[:-1])
        beyond = np.linalg.norm(place - share[..., None] * along, axis=-1) * pixel - one.radius_angstrom
        if one.erase:
            outside[box] = np.maximum(outside[box], edge / 2 - beyond)
        else:
            outside[box] = np.minimum(outside[box], edge / 2 + beyond)


def low_passed(volume: np.ndarray, pixel_size_angstrom: float, resolution_angstrom: float, size: int | None = None) -> np.ndarray:
    """Low-pass filtered cubic map `(z, y, x)`, float32, with a raised cosine two shells wide at the resolution.

    Parameters
    ----------
    size : int, optional
        Even number of voxels per side of the result, which spans the same length with the same first voxel; frequencies that do not fit
        are cut off. It needs little more memory than the result and a section.
    """
    n = volume.shape[0]
    m = n if size is None else min(size, n)
    z = (np.fft.fftfreq(m) * m).astype(np.float32)
    x = z[: m // 2 + 1]
    kept = np.empty((n, m, m // 2 + 1), np.complex64)
    rows = np.round(z).astype(int) % n
    for i in range(n):
        kept[i] = scipy.fft.rfft2(np.asarray(volume[i], np.float32))[rows, : m // 2 + 1]
    kept = scipy.fft.fft(kept, axis=0, overwrite_x=True)[rows]
    radius = np.sqrt(z[:, None, None] ** 2 + z[:, None] ** 2 + x**2)
    if m < n:
        kept[radius >= m // 2] = 0  # the last frequency stands for two, of which one was cut off
    cut = n * pixel_size_angstrom / resolution_angstrom
    kept *= 0.5 + 0.5 * np.cos(np.float32(np.pi) * np.clip((radius - cut + 1.0) / 2.0, 0.0, 1.0))
    kept *= np.float32((m / n) ** 3)
    return np.asarray(scipy.fft.irfftn(kept, s=(m, m, m), overwrite_x=True), np.float32)
