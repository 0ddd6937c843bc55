"""MRC files: images, stacks, maps and movies (MRC2014, modes 0, 1, 2, 6, 12 and the 4-bit mode 101 of SerialEM).

Arrays have the order of the file: first row first, `(y, x)` or `(z, y, x)`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryodask.errors import CryodaskError, InputError

HEADER_BYTES = 1024
FOUR_BIT = 101
_DTYPES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2", FOUR_BIT: "u1"}
_MODES = {"int8": 0, "int16": 1, "float32": 2, "uint16": 6, "float16": 12}
_IMOD_STAMP = 1146047817
_IMOD_SIGNED_BYTES = 1


@dataclass(frozen=True)
class MrcStack:
    """A stack of sections, read one at a time; it keeps no file open and can be pickled.

    Sections are read with plain reads rather than a memory map: a file that shrinks while it is mapped kills
    the process, and mapped pages of a whole movie count as memory of the worker.
    """

    path: str
    shape: tuple[int, int, int]
    dtype: np.dtype
    pixel_size_angstrom: float | None
    offset: int
    file_dtype: np.dtype
    is_volume: bool = False

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def section_bytes(self) -> int:
        """Bytes of one section in the file."""
        _, rows, columns = self.shape
        if self.file_dtype.names:  # two pixels per byte, every row starts at a byte
            return rows * ((columns + 1) // 2)
        return rows * columns * self.file_dtype.itemsize

    def __getitem__(self, index: int) -> np.ndarray:
        """Section ``index``, `(y, x)`."""
        n, rows, columns = self.shape
        at = index + n if index < 0 else index
        if not 0 <= at < n:
            raise IndexError(index)
        four_bit = bool(self.file_dtype.names)
        kind = np.dtype("u1") if four_bit else self.file_dtype
        count = self.section_bytes // kind.itemsize
        data = np.fromfile(self.path, kind, count, offset=self.offset + at * self.section_bytes)
        if data.size < count:
            raise InputError(f"{self.path}: section {at} of {n} ends too early", "the file is truncated", "copy it again")
        if four_bit:
            pairs = data.reshape(rows, -1)
            section = np.empty((rows, 2 * pairs.shape[1]), np.uint8)
            section[:, 0::2] = pairs & 15  # the first pixel of a pair is in the low bits
            section[:, 1::2] = pairs >> 4
            return np.ascontiguousarray(section[:, :columns])
        return data.reshape(rows, columns).astype(self.dtype, copy=False)


_NIBBLES = np.dtype([("pair", "u1")])


def open_mrc(path: str | Path, error: type[CryodaskError] = InputError) -> MrcStack:
    """Read the header of an MRC file and check it against the file's size.

    Parameters
    ----------
    path : str or Path
    error : type
        Class of the error to raise: a broken movie concerns one item, a broken reference all of them.

    Returns
    -------
    MrcStack
        Shape `(z, y, x)`; an image has one section. ``pixel_size_angstrom`` is None if the header has no plausible value.
    """
    path = str(path)
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
    except FileNotFoundError:
        raise error(f"{path} does not exist", "it was moved or renamed", "check the path") from None
    except IsADirectoryError:
        raise error(f"{path} is a folder, not an MRC file", "", "give the path of the file") from None
    if size == 0:
        raise error(f"{path} is empty (0 bytes)", "the transfer has not started, or the disk was full", "copy it again")
    if len(header) < HEADER_BYTES:
        raise error(f"{path} has {size} bytes, less than an MRC header", "the file is truncated", "copy it again")
    order = _byte_order(header)
    if order is None:
        raise error(
            f"{path} is not an MRC file: its header is invalid", "it has another format in spite of its extension", "check the file"
        )
    integers = np.frombuffer(header, order + "i4", 256)
    floats = np.frombuffer(header, order + "f4", 256)
    columns, rows, sections, mode = (int(v) for v in integers[:4])
    if mode not in _DTYPES:
        raise error(
            f"{path} has data mode {mode}, which is not supported",
            "it has complex or colour data",
            f"convert it to one of the modes {sorted(_DTYPES)}",
        )
    file_dtype = _NIBBLES if mode == FOUR_BIT else np.dtype(order + _DTYPES[mode])
    if mode == 0 and integers[38] == _IMOD_STAMP and not integers[39] & _IMOD_SIGNED_BYTES:
        file_dtype = np.dtype("u1")  # IMOD's flag for unsigned bytes, used in SerialEM's movies
    dtype = np.dtype("u1") if mode == FOUR_BIT else file_dtype.newbyteorder("=")
    offset = HEADER_BYTES + max(0, int(integers[23]))
    pixel = float(floats[10]) / float(integers[7]) if integers[7] > 0 else 0.0
    sane = np.isfinite(pixel) and 0.01 < pixel < 1000.0
    volume = int(integers[22]) not in (0, 401) and sections > 1
    stack = MrcStack(path, (sections, rows, columns), dtype, pixel if sane else None, offset, file_dtype, volume)
    needed = offset + sections * stack.section_bytes
    if size < needed:
        whole = max(0, (size - offset) // stack.section_bytes)
        raise error(
            f"{path} is truncated: {size} bytes where its header says {needed} ({whole} of {sections} sections are complete)",
            "the transfer was interrupted, or is not finished yet",
            "copy it again, or remove it from the folder",
        )
    return stack


def _byte_order(header: bytes) -> str | None:
    """'<' or '>', whichever gives plausible sizes (machine stamps are often wrong), or None."""
    for order in ("<", ">"):
        columns, rows, sections, mode = np.frombuffer(header, order + "i4", 4)
        if min(columns, rows, sections) > 0 and max(columns, rows, sections) < 10**7 and 0 <= mode < 1000:
            return order
    return None


def read_mrc(path: str | Path, error: type[CryodaskError] = InputError) -> tuple[np.ndarray, float | None]:
    """Read an MRC file.

    Returns
    -------
    data : `(y, x)` for one section, else `(z, y, x)`
        In the dtype of the file; 4-bit data as uint8.
    pixel_size_angstrom : float or None
    """
    stack = open_mrc(path, error)
    if len(stack) == 1:
        return stack[0], stack.pixel_size_angstrom
    out = np.empty(stack.shape, stack.dtype)
    for i in range(len(stack)):
        out[i] = stack[i]
    return out, stack.pixel_size_angstrom


def mrc_header(shape: tuple[int, ...], dtype: np.dtype, pixel_size_angstrom: float, *, stack: bool, statistics: tuple[float, ...]) -> bytes:
    """The 1024 bytes before the data. ``stack``: images (space group 0) rather than a volume (1); ``statistics``: min, max, mean, sd."""
    sections, rows, columns = (1, *shape) if len(shape) == 2 else shape
    header = np.zeros(256, "<i4")
    real = header.view("<f4")
    header[0:4] = columns, rows, sections, _MODES[dtype.name]
    depth = 1 if stack else sections
    header[7:10] = columns, rows, depth
    real[10:13] = columns * pixel_size_angstrom, rows * pixel_size_angstrom, depth * pixel_size_angstrom
    real[13:16] = 90.0
    header[16:19] = 1, 2, 3
    real[19:22] = statistics[1 - 1], statistics[1], statistics[2]
    header[22] = 0 if stack or sections == 1 else 1
    header[27] = 20140  # version of the format
    header[52] = int.from_bytes(b"MAP ", "little")
    header[53] = int.from_bytes(b"\x44\x44\x00\x00", "little")  # little-endian
    real[54] = statistics[3]
    return header.tobytes()


def write_mrc(path: str | Path, data: np.ndarray, pixel_size_angstrom: float, *, stack: bool = False) -> None:
    """Write an image `(y, x)`, a map `(z, y, x)` or, with ``stack``, a stack of images.

    float64, int32 and int64 are stored as float32 (MRC has no mode for them), uint8 as int16 if a value exceeds 127.
    The file appears under its name only when it is complete.
    """
    path = Path(path)
    array = np.asarray(data)
    if array.ndim not in (2, 3):
        raise ValueError(f"MRC holds images and stacks or maps, not arrays of {array.ndim} dimensions")
    if array.dtype == np.uint8 or array.dtype == bool:
        array = array.astype(np.int8 if array.size == 0 or array.max() < 128 else np.int16)
    elif array.dtype.name not in _MODES:
        array = array.astype(np.float32)
    array = np.ascontiguousarray(array)
    mean = float(array.mean(dtype=np.float64))
    spread = float(np.sqrt(np.mean([np.mean((s.astype(np.float64) - mean) ** 2) for s in np.atleast_3d(array.T).T])))
    statistics = (float(array.min()), float(array.max()), mean, spread)
    if sys.byteorder == "big":
        array = array.astype(array.dtype.newbyteorder("<"))
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "wb") as file:
        file.write(mrc_header(array.shape, np.dtype(array.dtype.name), pixel_size_angstrom, stack=stack, statistics=statistics))
        array.tofile(file)
    os.replace(part, path)
