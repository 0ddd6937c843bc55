"""Moving images by a smooth displacement field: separable Kaiser-windowed sinc, stripe by stripe, fused with gain and sums.

A stripe of rows has one displacement per column rather than per pixel: over half a stripe real local motion changes by less than
0.02 pixel. Within a stripe all arithmetic runs over contiguous rows that fit the cache, and frames are added to the sums
several at a time as one matrix product, so that no Fourier transform of a frame is ever needed.

Super-resolution frames can be read at every second pixel (``step`` 2): the kernel is then a low-pass as well, twice as long, whose
response (:func:`response`) is divided out of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

TAPS = 6
_BETA = {4: 2.8, 6: 4.0, 8: 6.0}
_STEPS = 2048


@lru_cache(maxsize=8)
def kernel_table(taps: int, device: str = "cpu", step: int = 1) -> Tensor:
    """Weights `(taps * step, 2049)` for reading between pixels, column i for a fraction i / 2048; each column sums to 1.

    Tap t lies at integer ``t - taps * step / 2 + 1`` from the pixel on the left. ``taps`` is 4, 6 or 8, times ``step`` where every
    ``step``-th pixel is read: the cut-off of the sinc is then the Nyquist frequency of what is read.
    """
    half = taps * step // 2
    fraction = torch.arange(_STEPS + 1, dtype=torch.float64) / _STEPS
    distance = fraction[:, None] - torch.arange(1 - half, half + 1, dtype=torch.float64)
    beta = torch.tensor(_BETA[taps], dtype=torch.float64)
    window = torch.i0(beta * torch.sqrt((1.0 - (distance / half) ** 2).clamp(min=0.0))) / torch.i0(beta)
    weights = torch.where(distance.abs() <= half, torch.sinc(distance / step) * window, 0.0)
    return (weights / weights.sum(1, keepdim=True)).T.float().contiguous().to(device)


def response(frequencies: Tensor, step: int, taps: int = TAPS) -> Tensor:
    """Amplitude with which a frequency comes through along one axis if every ``step``-th pixel is read.

    ``frequencies`` are in cycles per pixel that is read, at most 1/2. It falls to 1/2 at the Nyquist frequency. It is the mean over all
    fractions of a pixel, which differ by 0.005 at most.
    """
    device = frequencies.device
    weights = kernel_table(taps, str(device), step)[:, : _STEPS : _STEPS // 64].double()
    half = taps * step // 2
    offset = torch.arange(1 - half, half + 1, device=device)[:, None] - torch.arange(64, device=device) / 64
    waves = torch.cos(2.0 * torch.pi / step * frequencies[:, None, None].double() * offset)
    return (waves * weights).sum(1).mean(1).float()


def upsample_field(nodes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bicubic interpolation of a field given on a regular grid that spans the image from its first to its last pixel.

    Parameters
    ----------
    nodes : `(frame, gy, gx)` float32
    rows, columns : `(r,)` and `(c,)`
        Positions as a fraction of the image, 0 = first and 1 = last pixel.

    Returns
    -------
    Tensor, `(frame, r, c)`
    """
    if nodes.shape[-1] == 1 and nodes.shape[-2] == 1:
        return nodes.expand(-1, len(rows), len(columns))
    along_rows = _cubic_matrix(nodes.shape[-2], rows)
    along_columns = _cubic_matrix(nodes.shape[-1], columns)
    return along_rows @ nodes @ along_columns.T


def _cubic_matrix(count: int, positions: Tensor) -> Tensor:
    """Catmull-Rom weights `(position, node)` with linear extrapolation beyond the ends (exact for linear fields)."""
    at = (positions.clamp(0.0, 1.0) * (count - 1)).double()
    left = at.floor().clamp(max=max(count - 2, 0))
    t = at - left
    weights = torch.stack(
        [
            ((2.0 - t) * t - 1.0) * t / 2.0,
            ((3.0 * t - 5.0) * t * t + 2.0) / 2.0,
            ((4.0 - 3.0 * t) * t + 1.0) * t / 2.0,
            (t - 1.0) * t * t / 2.0,
        ],
        1,
    )
    padded = torch.zeros(len(at), count + 2, dtype=torch.float64, device=positions.device)
    padded.scatter_(1, left.long()[:, None] + torch.arange(4, device=positions.device), weights)
    matrix = padded[:, 1:-1].clone()
    # the node before the first is 2 f0 - f1, the one after the last 2 fn - f(n-1)
    matrix[:, 0] += 2.0 * padded[:, 0]
    matrix[:, 1] -= padded[:, 0]
    matrix[:, -1] += 2.0 * padded[:, -1]
    matrix[:, -2] -= padded[:, -1]
    return matrix.float()


def stripe_rows(height: int, stripe: int) -> list[tuple[int, int]]:
    """First and last (exclusive) row of each stripe."""
    return [(y, min(height, y + stripe)) for y in range(0, height, stripe)]


def stripe_field(nodes: Tensor, shape: tuple[int, int], stripe: int, *, step: int = 1, every_column: int = 1) -> Tensor:
    """Displacements of `upsample_field` at the middle row of each stripe, and at every (or each n-th) column: `(frame, stripe, x)`.

    ``shape`` is that of the frames, and ``stripe`` a number of rows that are read, every ``step``-th of the frames.
    """
    height, width = shape
    device = nodes.device
    middles = torch.tensor([step * (a + b - 1) / 2.0 for a, b in stripe_rows(height // step, stripe)], device=device)
    columns = torch.arange(0, width // every_column * every_column, every_column, device=device, dtype=torch.float32)
    return upsample_field(nodes, middles / max(height - 1, 1), columns / max(width - 1, 1))


def _taps(shift: Tensor, taps: int, step: int) -> tuple[int, Tensor]:
    """First integer offset and weights `(t, x)`, so that the value at x + shift is sum_t weights[t] * input[x + first + t]."""
    whole = torch.floor(shift)
    low, high = int(whole.min()), int(whole.max())
    index = torch.round((shift - whole) * _STEPS).int()
    weights = torch.index_select(kernel_table(taps, str(shift.device), step), 1, index)
    length = len(weights)
    first = low - length // 2 + 1
    if low == high:
        return first, weights
    # where the shift crosses an integer the kernel slides by a pixel: one more tap covers the whole row
    spread = torch.zeros(length + high - low, len(shift), device=shift.device)
    place = (whole.long() - low) + torch.arange(length, device=shift.device)[:, None]
    return first, spread.scatter_(0, place, weights)


def warp_rows(
    image: Tensor, gain: Tensor | None, first: int, last: int, shift_y: Tensor, shift_x: Tensor, taps: int = TAPS, step: int = 1
) -> Tensor:
    """Rows ``first`` to ``last`` of ``image * gain`` read at (step y + shift_y, step x + shift_x).

    Parameters
    ----------
    image : `(y, x)`, any real type
    gain : `(y, x)` float32, optional
        Multiplied in before interpolation.
    shift_y : `(x,)` float32, pixels
        One displacement per column of the image. Outside the image the border pixels are repeated.
    shift_x : `(x // step,)` float32, pixels
        One displacement per column that is read.

    Returns
    -------
    Tensor, `(last - first, x // step)` float32
    """
    height, width = image.shape
    count = last - first
    at_y, weight_y = _taps(shift_y, taps, step)
    at_x, weight_x = _taps(shift_x, taps, step)
    reach = step * (count - 1) + 1
    a, b = step * first + at_y, step * first + at_y + reach + weight_y.shape[0] - 1
    inside_a, inside_b = min(max(a, 0), height - 1), max(min(b, height), 1)
    rows = image[inside_a:inside_b]
    rows = rows.float() if gain is None else rows * gain[inside_a:inside_b]
    if inside_b - inside_a < b - a:
        index = torch.arange(a, b, device=image.device).clamp(0, height - 1) - inside_a
        rows = rows[index]
    left, right = max(0, -at_x), max(0, at_x + weight_x.shape[0] - 1)
    padded = torch.empty(count, left + width + right, device=image.device)
    out = padded[:, left : left + width]
    torch.mul(rows[:reach:step], weight_y[0], out=out)
    for t in range(1, weight_y.shape[0]):
        out.addcmul_(rows[t : t + reach : step], weight_y[t])
    padded[:, :left] = out[:, :1]
    padded[:, left + width :] = out[:, -1:]
    # columns that are read together, side by side
    phases = [padded] if step == 1 else [padded[:, q::step].contiguous() for q in range(step)]

    def read(t: int) -> Tensor:
        at, phase = divmod(left + at_x + t, step)
        return phases[phase][:, at : at + width // step]

    moved = read(0) * weight_x[0]
    for t in range(1, weight_x.shape[0]):
        moved.addcmul_(read(t), weight_x[t])
    return moved


def warp_image(image: Tensor, shift_y: Tensor, shift_x: Tensor, *, stripe: int = 64, taps: int = TAPS) -> Tensor:
    """``image`` read at (y + shift_y, x + shift_x): `(y, x)` float32.

    Parameters
    ----------
    shift_y, shift_x : `(stripe, x)` float32, pixels, from `stripe_field`
    """
    out = torch.empty(image.shape, dtype=torch.float32, device=image.device)
    for i, (first, last) in enumerate(stripe_rows(image.shape[0], stripe)):
        out[first:last] = warp_rows(image, None, first, last, shift_y[i], shift_x[i], taps)
    return out


def add_warped(
    sums: Sequence[Tensor],
    coefficients: Tensor,
    frames: Sequence[Tensor],
    gain: Tensor | None,
    shift_y: Tensor,
    shift_x: Tensor,
    *,
    stripe: int = 32,
    taps: int = TAPS,
    step: int = 1,
) -> None:
    """Add warped frames to several weighted sums at once, in place.

    Parameters
    ----------
    sums : sequence of `(y // step, x // step)` float32
    coefficients : `(sum, frame)` float32
        Weight of each frame in each sum.
    frames : sequence of `(y, x)`, raw counts
        A batch; a few at a time keep the buffer in the cache.
    gain : `(y, x)` float32, optional
    shift_y, shift_x : `(frame, stripe, x)` and `(frame, stripe, x // step)` float32, pixels
        Where the frames are read: the displacement of the specimen.
    """
    height, width = sums[0].shape
    buffer = torch.empty(len(frames), stripe * width, device=sums[0].device)
    for i, (first, last) in enumerate(stripe_rows(height, stripe)):
        size = (last - first) * width
        for f, frame in enumerate(frames):
            buffer[f, :size] = warp_rows(frame, gain, first, last, shift_y[f, i], shift_x[f, i], taps, step).view(-1)
        part = coefficients @ buffer[:, :size]
        for r, one in enumerate(sums):
            one[first:last] += part[r].view(last - first, width)
