"""Two pixels in a byte: mode 101 of MRC, and movies whose header gives the bytes of a row as its width.

SerialEM writes super-resolution counts as bytes of half the width; IMOD, RELION and cisTEM recognise them as below.
"""

from __future__ import annotations

import numpy as np

_SUPER_RESOLUTION = ((7676, 7420), (7680, 7424), (11520, 8184))


def is_super_resolution_packed(byte_columns: int, rows: int) -> bool:
    """Whether an 8-bit image has the size of a packed super-resolution frame: half the width of a K2 or K3 camera's."""
    return any((2 * byte_columns, rows) in ((a, b), (b, a)) for a, b in _SUPER_RESOLUTION)


def unpack(pairs: np.ndarray, columns: int) -> np.ndarray:
    """Bytes `(y, byte)` as pixels `(y, x)` uint8; the first pixel of a pair is in the low bits (IMOD, SerialEM)."""
    pixels = np.empty((pairs.shape[0], 2 * pairs.shape[1]), np.uint8)
    pixels[:, 0::2] = pairs & 15
    pixels[:, 1::2] = pairs >> 4
    return pixels if columns == pixels.shape[1] else np.ascontiguousarray(pixels[:, :columns])
