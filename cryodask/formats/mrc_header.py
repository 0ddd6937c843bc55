"""What the header of an MRC file says, checked against the length of the file (MRC2014, IMOD's flags).

Every fact that changes the meaning of the data is either applied by the reader (axis order, byte order, sign, packing), returned for
its user to check (voxel sizes, cell, origin), or refused here (complex and colour modes, wrong lengths, invalid axes).
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass

import numpy as np

from cryodask.errors import CryodaskError
from cryodask.formats.four_bit import is_super_resolution_packed
from cryodask.formats.presence import check_file

HEADER_BYTES = 1024
FOUR_BIT = 101
_DTYPES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2", FOUR_BIT: "u1"}
_REFUSED = {
    3: "complex 16-bit integers",
    4: "complex 32-bit floats, a transform",
    7: "32-bit integers",
    16: "RGB colours",
    17: "RGB colours",
}
_OTHER_FORMATS = {
    b"\x1f\x8b": "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ": "compressed with xz",
    b"II*\0": "a TIFF file",
    b"MM\0*": "a TIFF file",
    b"II+\0": "a TIFF file",
    b"MM\0+": "a TIFF file",
    b"\x89HDF": "an HDF5 file",
}
_LARGEST_EDGE = 10**7
_LONGEST_EXTENSION = 1 << 30
_IMOD_STAMP = 1146047817
_IMOD_SIGNED_BYTES, _IMOD_FOUR_BITS = 1, 16
_ROUNDING = 2e-4
"""Relative difference of voxel sizes that rounding explains: four bytes per number, and programs that print five digits."""


@dataclass(frozen=True)
class MrcHeader:
    """Facts of an MRC file.

    Parameters
    ----------
    file_shape : (sections, rows, columns)
        In the order of the file, pixels (not bytes).
    axes : (maps, mapr, mapc)
        Which of x (1), y (2), z (3) runs along sections, rows and columns.
    file_dtype : np.dtype
        Dtype of one element in the file; uint8 for packed pixels.
    packed : bool
        Two pixels per byte.
    sign_known : bool
        False for bytes without IMOD's stamp, which some programs write unsigned.
    offset : int
        First byte of the data.
    voxel_size_angstrom : (z, y, x)
        As the header gives it: cell edge over sampling. None where it is unset; may be negative or NaN.
    origin_angstrom : (z, y, x)
    start : (z, y, x)
        Index of the first voxel in a larger map (nxstart, nystart, nzstart), brought into this order.
    cell_angles_deg : (alpha, beta, gamma)
    volumes : int
        More than one for a stack of volumes (space group 401 and above).
    """

    file_shape: tuple[int, int, int]
    axes: tuple[int, int, int]
    file_dtype: np.dtype
    packed: bool
    sign_known: bool
    offset: int
    voxel_size_angstrom: tuple[float | None, float | None, float | None]
    origin_angstrom: tuple[float, float, float]
    start: tuple[int, int, int]
    cell_angles_deg: tuple[float, float, float]
    volumes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the file."""
        columns = self.file_shape[2]
        return (columns + 1) // 2 if self.packed else columns * self.file_dtype.itemsize

    @property
    def section_bytes(self) -> int:
        """Bytes of one section of the file."""
        return self.file_shape[1] * self.row_bytes

    @property
    def needed_bytes(self) -> int:
        """Length of the file as the header says."""
        return self.offset + self.file_shape[0] * self.section_bytes

    @property
    def order(self) -> tuple[int, int, int]:
        """Axes of the file that are z, y and x: ``data.transpose(order)`` is `(z, y, x)`."""
        return self.axes.index(3), self.axes.index(2), self.axes.index(1)

    @property
    def offset_voxels(self) -> tuple[float, float, float] | None:
        """Where the first voxel lies, `(z, y, x)`: by the origin, or where that is 0 by the start indices (as ChimeraX has it).

        None where this says nothing: the map begins at 0, or is centred at 0 (programs write either for the same map), or has no
        voxel size.
        """
        shape = tuple(self.file_shape[i] for i in self.order)
        origin = [v if math.isfinite(v) else 0.0 for v in self.origin_angstrom]
        if any(origin):
            if not all(self.voxel_size_angstrom):
                return None
            z, y, x = (v / float(size or 1.0) for v, size in zip(origin, self.voxel_size_angstrom))
        else:
            z, y, x = (float(v) for v in self.start)
        usual = all(abs(v) < 1.0 for v in (z, y, x)) or all(abs(v + n / 2) <= 1.0 for v, n in zip((z, y, x), shape))
        return None if usual else (z, y, x)


def read_header(path: str, error: type[CryodaskError]) -> MrcHeader:
    """Read a header and compare it with the length of the file.

    Raises
    ------
    error
        If the file is not a regular file, of another format, shorter or longer than its header says, or of an unsupported mode.

    Warns
    -----
    UserWarning
        If less than a section of zeros follows the data: padding, which is ignored.
    """
    check_file(path, error, "MRC")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        raw = file.read(HEADER_BYTES)
    header = parse_header(path, raw, size, error)
    _check_length(path, header, size, error)
    return header


def parse_header(path: str, raw: bytes, size: int | None, error: type[CryodaskError]) -> MrcHeader:
    """Interpret the first 1024 bytes of a file with ``size`` bytes; None if its length is not known, because it is compressed.

    Raises
    ------
    error
        If they are not a header, or it cannot be interpreted without the length of the file.
    """
    for magic, name in _OTHER_FORMATS.items():
        if raw.startswith(magic):
            raise error(f"{path} is {name}, not an MRC file.", "", "uncompress or convert it, or give it the extension of its format")
    if len(raw) < HEADER_BYTES and size is not None:
        raise error(f"{path} has {size} bytes, less than an MRC header: it is truncated.", "the transfer was interrupted", "copy it again")
    plausible = [order for order in _byte_orders(raw) if _is_plausible(raw, order)]
    if not plausible:
        raise error(
            f"{path} is not an MRC file: its header is invalid.", "it has another format in spite of its extension", "check the file"
        )
    # sizes of both byte orders may be plausible, and machine stamps are often wrong: the length of the file tells which is right
    read: list[MrcHeader] = []
    refused: list[CryodaskError] = []
    for order in plausible:
        try:
            read += _headers(path, raw, order, size, error)
        except CryodaskError as cause:
            refused.append(cause)
    if not read:
        raise refused[0]
    if size is None and len({h.file_shape for h in read if h.file_dtype == read[0].file_dtype}) > 1:
        raise error(
            f"{path} has pixels of 4 bits, and its header does not say whether its width is in pixels or in bytes.",
            "it is compressed, so that its length is not known",
            "uncompress it",
        )
    return next((h for h in read if h.needed_bytes == size), read[0])


def _byte_orders(raw: bytes) -> tuple[str, str]:
    return (">", "<") if raw[212] == 0x11 else ("<", ">")


def _is_plausible(raw: bytes, order: str) -> bool:
    columns, rows, sections, mode = np.frombuffer(raw, order + "i4", 4)
    return min(columns, rows, sections) > 0 and max(columns, rows, sections) < _LARGEST_EDGE and 0 <= mode < 1000


def _headers(path: str, raw: bytes, order: str, size: int | None, error: type[CryodaskError]) -> list[MrcHeader]:
    """What a header can mean in one byte order: bytes that are marked as packed have the width of the image, or half of it."""
    integers, floats = np.frombuffer(raw, order + "i4", 256), np.frombuffer(raw, order + "f4", 256)
    columns, rows, sections, mode = (int(v) for v in integers[:4])
    if mode not in _DTYPES:
        raise error(
            f"{path} has data mode {mode} ({_REFUSED.get(mode, 'unknown')}), which is not supported.",
            "",
            f"convert it to one of the modes {', '.join(map(str, sorted(_DTYPES)))}",
        )
    extended = int(integers[23])
    if extended < 0 or HEADER_BYTES + extended > (_LONGEST_EXTENSION if size is None else size):
        raise error(
            f"{path} has {'few' if size is None else size} bytes, but its header announces an extended header of {extended} bytes.",
            "the header is damaged, or the file is truncated",
            "copy it again",
        )
    axes = (int(integers[18]), int(integers[17]), int(integers[16]))
    if axes == (0, 0, 0):  # unset, as in files from before the axes were in the header
        axes = (3, 2, 1)
    if sorted(axes) != [1, 2, 3]:
        raise error(
            f"{path} has invalid axes in its header (mapc, mapr, maps = {axes[2]}, {axes[1]}, {axes[0]}).",
            "",
            "set them to 1, 2, 3 if columns, rows and sections are x, y and z",
        )
    stamped = integers[38] == _IMOD_STAMP
    flags = int(integers[39]) if stamped else 0
    kind = np.dtype(order + _DTYPES[mode])
    if mode == 0 and _has_unsigned_bytes(stamped, flags, float(floats[19]), float(floats[20])):
        kind = np.dtype("u1")
    labelled = integers[55] == 1 and b"4 bits packed" in raw[224:304] and is_super_resolution_packed(columns, rows)
    half_width = mode == 0 and (bool(flags & _IMOD_FOUR_BITS) or labelled)
    if half_width and kind != np.dtype("u1"):
        raise error(f"{path} has 4-bit pixels packed in signed bytes.", "its flags contradict each other", "convert it with IMOD")
    voxel = [_over(float(floats[10 + i]), int(integers[7 + i])) for i in (2, 1, 0)]
    if integers[9] == 1 and (sections, rows, columns)[axes.index(3)] > 1:  # images, not a volume: no size along z
        voxel[0] = None

    def made(width: int, packed: bool) -> MrcHeader:
        # IMOD halves the width, and the sampling with it
        x = _over(float(floats[10]), 2 * int(integers[7])) if half_width and width != columns and integers[7] != columns else voxel[2]
        return MrcHeader(
            file_shape=(sections, rows, width),
            axes=axes,
            file_dtype=np.dtype("u1") if packed else kind,
            packed=packed,
            sign_known=mode != 0 or bool(stamped) or kind == np.dtype("u1"),
            offset=HEADER_BYTES + extended,
            voxel_size_angstrom=(voxel[0], voxel[1], x),
            origin_angstrom=(float(floats[51]), float(floats[50]), float(floats[49])),
            start=(int(integers[4 + 2 - axes.index(3)]), int(integers[4 + 2 - axes.index(2)]), int(integers[4 + 2 - axes.index(1)])),
            cell_angles_deg=(float(floats[13]), float(floats[14]), float(floats[15])),
            volumes=max(1, sections // int(integers[9])) if 401 <= integers[22] <= 630 and integers[9] > 0 else 1,
        )

    if half_width:
        return [made(2 * columns, True), made(columns, True)]
    return [made(columns, mode == FOUR_BIT)]


def _has_unsigned_bytes(stamped: bool, flags: int, least: float, largest: float) -> bool:
    """IMOD's rule: its flag if there is a stamp; else unsigned only if the header's minimum and maximum are of unsigned bytes."""
    return not flags & _IMOD_SIGNED_BYTES if stamped else least >= 0 and 128 <= largest <= 255


def _over(edge: float, samples: int) -> float | None:
    return edge / samples if samples > 0 and edge != 0 else None


def _check_length(path: str, header: MrcHeader, size: int, error: type[CryodaskError]) -> None:
    sections = header.file_shape[0]
    surplus = size - header.needed_bytes
    if surplus < 0:
        whole = max(0, (size - header.offset) // header.section_bytes)
        raise error(
            f"{path} is truncated: {size} bytes where its header says {header.needed_bytes} ({whole} of {sections} sections are complete).",
            "the transfer was interrupted, or is not finished yet",
            "copy it again, or remove it from the folder",
        )
    if surplus == 0:
        return
    more, rest = divmod(surplus, header.section_bytes)
    if more == 0 and _is_zero(path, header.needed_bytes):
        warnings.warn(f"{path} ends with {surplus} zero bytes after its {sections} sections; they are ignored.", stacklevel=2)
        return
    raise error(
        f"{path} is longer than its header says: {size} bytes instead of {header.needed_bytes}"
        + (f"; {more} more sections follow the {sections} of the header." if more and not rest else "."),
        "the header was not updated when the last sections were written" if more and not rest else "the header is damaged",
        "correct the header (nx, ny, nz, mode, nsymbt), or copy the file again",
    )


def _is_zero(path: str, start: int) -> bool:
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(1 << 20):
            if any(block):
                return False
    return True


def common_size(sizes: list[float | None] | tuple[float | None, ...], tolerance: float = 1e-3) -> float | None:
    """The size that all axes share, or None if one of them is unset or implausible.

    Raises
    ------
    ValueError
        If they are plausible and differ by more than the relative ``tolerance``.
    """
    known = [size for size in sizes if size is not None and math.isfinite(size) and 0.01 < size < 1000.0]
    if known and max(known) > (1.0 + tolerance) * min(known):
        raise ValueError(" x ".join(f"{size:.5g}" for size in reversed(known)))
    return known[-1] if len(known) == len(sizes) else None


def is_same_size(one: float, other: float) -> bool:
    """Whether two voxel sizes are equal but for rounding."""
    return abs(one - other) <= _ROUNDING * max(abs(one), abs(other))
