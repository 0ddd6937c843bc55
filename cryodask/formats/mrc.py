"""MRC files: images, stacks, maps and movies (MRC2014, modes 0, 1, 2, 6, 12 and the 4-bit mode 101 of SerialEM).

Arrays are `(y, x)` or `(z, y, x)`, first row first, in whatever order the axes are in the file.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryodask.errors import CryodaskError, InputError
from cryodask.formats.four_bit import unpack
from cryodask.formats.mrc_header import MrcHeader, common_size, read_header

_MODES = {"int8": 0, "int16": 1, "float32": 2, "uint16": 6, "float16": 12}


@dataclass(frozen=True)
class MrcStack:
    """A stack of sections `(z, y, x)`, read one at a time; it keeps no file open and can be pickled.

    Sections are read with plain reads rather than a memory map: a file that shrinks while it is mapped kills
    the process, and mapped pages of a whole movie count as memory of the worker.
    """

    path: str
    header: MrcHeader
    pixel_size_angstrom: float | None
    counts: bool
    error: type[CryodaskError]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(z, y, x), whatever the order of the axes in the file."""
        z, y, x = (self.header.file_shape[i] for i in self.header.order)
        return z, y, x

    @property
    def dtype(self) -> np.dtype:
        """Native dtype of the pixels; uint8 for 4-bit data."""
        return self.header.file_dtype.newbyteorder("=")

    def __getitem__(self, index: int) -> np.ndarray:
        """Section ``index``, `(y, x)`."""
        n = self.shape[0]
        at = index + n if index < 0 else index
        if not 0 <= at < n:
            raise IndexError(index)
        along, first, second = self.header.order
        if along == 0:
            section = self._file_section(at)
        elif along == 1:
            section = np.concatenate([self._rows(s, at, 1) for s in range(self.header.file_shape[0])])
        else:
            section = np.stack([self._file_section(s)[:, at] for s in range(self.header.file_shape[0])])
        return self._checked(np.ascontiguousarray(section.T) if first > second else section)

    def read(self) -> np.ndarray:
        """All sections, `(z, y, x)`."""
        out = np.empty(self.header.file_shape, self.dtype)
        for s in range(len(out)):
            out[s] = self._file_section(s)
        return self._checked(np.ascontiguousarray(out.transpose(self.header.order)))

    def _file_section(self, s: int) -> np.ndarray:
        return self._rows(s, 0, self.header.file_shape[1])

    def _rows(self, s: int, first: int, count: int) -> np.ndarray:
        header = self.header
        start = header.offset + s * header.section_bytes + first * header.row_bytes
        items = count * header.row_bytes // header.file_dtype.itemsize
        data = np.fromfile(self.path, header.file_dtype, items, offset=start)
        if data.size < items:
            raise self.error(f"{self.path}: section {s + 1} of {header.file_shape[0]} ends too early.", "the file shrank", "copy it again")
        return self._pixels(data.reshape(count, -1))

    def _pixels(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the file as pixels."""
        return unpack(rows, self.header.file_shape[2]) if self.header.packed else rows.astype(self.dtype, copy=False)

    def _checked(self, data: np.ndarray) -> np.ndarray:
        """Refuse integers that look unsigned although the mode is a signed one."""
        unknown = not self.header.sign_known or self.dtype == np.int16
        if unknown and data.min() < 0 and ((self.counts and self.dtype == np.int8) or _looks_unsigned(data)):
            most = int(np.iinfo(self.dtype).max)
            raise self.error(
                f"{self.path} has negative values that look like unsigned ones above {most}.",
                "a program wrote unsigned integers without saying so in the header",
                "write it as unsigned 16-bit integers (mode 6), or set IMOD's flag for unsigned bytes",
            )
        return data


def _looks_unsigned(data: np.ndarray) -> bool:
    """Whether the values are continuous where they change sign as unsigned integers do, rather than around zero."""
    quarter = (int(np.iinfo(data.dtype).max) + 1) // 2
    below, above = np.count_nonzero(data < -quarter), np.count_nonzero(data >= quarter)
    near = min(np.count_nonzero(data < 0) - below, np.count_nonzero(data >= 0) - above)
    return bool(min(below, above) > near)


def open_mrc(path: str | Path, error: type[CryodaskError] = InputError, *, counts: bool = False) -> MrcStack:
    """Read the header of an MRC file and check it against the file's size.

    Parameters
    ----------
    path : str or Path
    error : type
        Class of the error to raise: a broken movie concerns one item, a broken reference all of them.
    counts : bool
        The pixels are counts of electrons: bytes that are negative are refused, unless the header says that they are signed.

    Returns
    -------
    MrcStack
        Shape `(z, y, x)`; an image has one section. ``pixel_size_angstrom`` is None if the header has no plausible value.

    Raises
    ------
    error
        If the file is missing, not an MRC file, not as long as its header says, has pixels that are not square, or an unsupported mode.
    """
    path = str(path)
    header = read_header(path, error)
    try:
        pixel = common_size(header.voxel_size_angstrom[1:])
    except ValueError as sizes:
        raise error(f"{path} has pixels of {sizes} A (x, y), which are not square.", "", "correct the header, or resample it") from None
    return MrcStack(path, header, pixel, counts, error)


def read_mrc(path: str | Path, error: type[CryodaskError] = InputError) -> tuple[np.ndarray, float | None]:
    """Read an MRC file.

    Returns
    -------
    data : `(y, x)` for one section, else `(z, y, x)`
        In the dtype of the file; 4-bit data as uint8.
    pixel_size_angstrom : float or None
    """
    stack = open_mrc(path, error)
    return (stack[0] if len(stack) == 1 else stack.read()), stack.pixel_size_angstrom


def read_map(path: str | Path, error: type[CryodaskError] = InputError) -> tuple[np.ndarray, float | None]:
    """Read a map: like `read_mrc`, but its voxels must be cubes with finite values.

    Returns
    -------
    data : `(z, y, x)`
    voxel_size_angstrom : float or None
        None if the header has no value.

    Raises
    ------
    error
        Also if voxel sizes differ between axes, are negative or NaN, if the cell is not orthogonal, or a voxel is NaN or infinite.
    """
    stack = open_mrc(path, error)
    if stack.header.volumes > 1:
        raise error(f"{path} is a stack of {stack.header.volumes} volumes, not one map.", "", "give a file with one of them")
    sizes, angles = stack.header.voxel_size_angstrom, stack.header.cell_angles_deg
    known = tuple(size for size in sizes if size is not None)
    if bad := [size for size in known if not 0.01 < size < 1000.0]:
        raise error(f"{path} has a voxel size of {bad[-1]:g} A in its header.", "the program that wrote it failed", "set it in the header")
    try:
        voxel = common_size(known) if sizes[2] is not None else None
    except ValueError as different:
        raise error(f"{path} has voxels of {different} A (x, y, z), which are not cubes.", "", "resample the map") from None
    if any(angle and not abs(angle - 90.0) < 0.01 for angle in angles):
        raise error(f"{path} has a cell with the angles {angles}.", "it is a crystallographic map", "resample it to an orthogonal cell")
    data = stack[0] if len(stack) == 1 else stack.read()
    if not np.isfinite(data).all():
        raise error(
            f"{path} is not a valid map: {int((~np.isfinite(data)).sum())} of {data.size} voxels are NaN or infinite.",
            "the program that wrote it failed, or the file is damaged",
            "check the map, and give another",
        )
    return data, voxel


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
