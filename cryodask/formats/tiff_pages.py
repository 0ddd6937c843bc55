"""Directories of the pages of a TIFF file: followed to the end, and compared with each other and with the length of the file."""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass

import tifffile

from cryodask.errors import CryodaskError

_SUBFILE, _WIDTH, _LENGTH, _COMPRESSION, _STRIPS, _STRIP_BYTES = 254, 256, 257, 259, 273, 279
_TILES, _TILE_BYTES = 324, 325
# tags that change pixels; a reader that overlooks a damaged one misreads the page
_ESSENTIAL = frozenset(
    (
        _SUBFILE,
        _WIDTH,
        _LENGTH,
        258,
        _COMPRESSION,
        262,
        266,
        _STRIPS,
        274,
        277,
        278,
        _STRIP_BYTES,
        284,
        317,
        322,
        323,
        _TILES,
        _TILE_BYTES,
        339,
    )
)
_SINGLE = frozenset((_SUBFILE, _WIDTH, _LENGTH, _COMPRESSION, 262, 266, 274, 277, 278, 284, 317, 322, 323))
_INTEGERS = frozenset((3, 4, 16))  # SHORT, LONG, LONG8
_OF_TILES = frozenset((322, 323, _TILES, _TILE_BYTES))
_OPTIONAL = frozenset((_SUBFILE, 266, 274, 284))  # their absence means the same as the only value that is read
_OTHER_IMAGES = frozenset((330, 34665, 34853))
_MOST_BYTES = 1 << 32
_PHOTOMETRIC = {0: "white is zero", 2: "RGB colours", 3: "a palette of colours", 4: "a mask", 5: "CMYK colours", 6: "YCbCr colours"}
_SAMPLES = {1: "unsigned", 2: "signed", 3: "floating-point"}


@dataclass(frozen=True)
class Walked:
    """One page directory: the codes of its essential tags, whether it refers to further images, and its bytes.

    ``values``: the content of every tag: the integer of those that have one, else the place (or the bytes, if they are few) of its data.
    ``counts``: how many values a tag has.
    """

    codes: frozenset[int]
    has_other_images: bool
    directory_bytes: int
    values: dict[int, int]
    counts: dict[int, int]


def walk_pages(path: str, error: type[CryodaskError]) -> list[Walked]:
    """Follow the chain of page directories; raise an error if it leads out of the file, to itself, or if a tag occurs twice.

    tifffile stops silently at a broken link, so that a truncated movie would be taken for a shorter one.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        version = struct.unpack(order + "H", head[2:4])[0] if order and len(head) >= 8 else 0
        big = version == 43
        if order is None or version not in (42, 43) or (big and (len(head) < 16 or struct.unpack(order + "HH", head[4:8]) != (8, 0))):
            raise error(f"{path} is not a TIFF file.", "it has another format in spite of its extension", "check the file")
        count_format, entry, link_format = (order + "Q", 20, order + "Q") if big else (order + "H", 12, order + "I")
        count_bytes, link_bytes = struct.calcsize(count_format), struct.calcsize(link_format)
        link = struct.unpack(link_format, head[8:16] if big else head[4:8])[0]
        pages: list[Walked] = []
        seen: set[int] = set()
        while link:
            file.seek(min(link, size))
            raw = file.read(count_bytes)
            entries = struct.unpack(count_format, raw)[0] if len(raw) == count_bytes else 0
            end = link + count_bytes + entries * entry
            if len(raw) < count_bytes or end + link_bytes > size:
                raise error(
                    f"{path} is truncated: page {len(pages) + 1} should begin at byte {link}, the file has {size} bytes.",
                    "the transfer was interrupted, or is not finished yet",
                    "copy it again, or remove it from the folder",
                )
            if link in seen:
                raise error(f"{path} is damaged: its pages lead back to an earlier one.", "", "copy it again, or remove it")
            seen.add(link)
            table = file.read(entries * entry)
            found = list(struct.iter_unpack(order + ("HHQ8s" if big else "HHI4s"), table))
            tags = [(code, kind, count) for code, kind, count, _ in found]
            if wrong := _wrong_tag(tags):
                raise error(f"{path}: page {len(pages) + 1} {wrong}.", "the file is damaged", "copy it again, or remove it")
            codes = {code for code, _, _ in tags}
            values = {code: _value(order, kind, count, raw) for code, kind, count, raw in found}
            counts = {code: count for code, _, count, _ in found}
            pages.append(Walked(frozenset(codes & _ESSENTIAL), bool(codes & _OTHER_IMAGES), end + link_bytes - link, values, counts))
            link = struct.unpack(link_format, file.read(link_bytes))[0]
    if not pages:
        raise error(f"{path} has no pages.", "writing it was interrupted", "copy it again, or remove it")
    return pages


def _value(order: str, kind: int, count: int, raw: bytes) -> int:
    """The integer in an entry, or the place of its data."""
    size = {3: 2, 4: 4}.get(kind, len(raw)) if count == 1 else len(raw)
    return int.from_bytes(raw[:size], "little" if order == "<" else "big")


def _wrong_tag(tags: list[tuple[int, int, int]]) -> str:
    """Why the entries (code, type, count) of a directory are invalid; empty if they are valid."""
    seen: set[int] = set()
    for code, kind, count in tags:
        if code not in _ESSENTIAL:
            continue
        if code in seen:
            return f"has the tag {code} twice"
        seen.add(code)
        if kind not in _INTEGERS:
            return f"has a tag {code} of the type {kind}, which is no integer"
        if code in _SINGLE and count != 1:
            return f"has {count} values in the tag {code}"
    return ""


def check_pages(path: str, tiff: tifffile.TiffFile, walked: list[Walked], error: type[CryodaskError]) -> tifffile.TiffPage:
    """Compare all pages with the first and with the file; return the first.

    Raises
    ------
    error
        If a page cannot be what the directory says, differs from the first, or the file has more data than its pages list.
    """
    size = os.path.getsize(path)
    pages = [page for page in (tiff.pages[i] for i in range(len(walked))) if isinstance(page, tifffile.TiffPage)]
    if len(pages) != len(walked):
        raise error(f"{path} is not a movie: its pages have no directories of their own.", "", "write it as a plain TIFF")
    first = pages[0]
    wanted = _meaning(first)
    starts: set[int] = set()
    used = 16 if tiff.is_bigtiff else 8
    for i, (page, own) in enumerate(zip(pages, walked)):
        where = f"{path}: page {i + 1} of {len(pages)}"
        if other := (own.codes ^ walked[0].codes) - _OPTIONAL:
            verb, has = ("has", "lacks") if min(other) in own.codes else ("lacks", "has")
            raise error(f"{where} {verb} the tag {min(other)} that the first {has}.", "it is damaged, or not a movie", "write it again")
        if refused := _damage(page, own, size):
            raise error(f"{where} {refused}.", "the transfer was interrupted, or the file is damaged", "copy it again, or remove it")
        if refused := _unread(page):
            raise error(f"{where} {refused}.", "another kind of image is among the movies", "remove it, or convert it")
        here = _meaning(page)
        if changed := [f"{name} {value}, the first {wanted[name]}" for name, value in here.items() if value != wanted[name]]:
            raise error(
                f"{where} has the {changed[0]}.",
                "it is not a movie, or has a thumbnail among the frames",
                "write the movie with frames of one size and type",
            )
        if starts.intersection(page.dataoffsets):
            raise error(f"{where} has the data of an earlier page.", "the file is damaged", "copy it again, or remove it")
        if any(sub.shape == page.shape and not sub.is_reduced for sub in page.pages or () if isinstance(sub, tifffile.TiffPage)):
            raise error(f"{where} contains further images of its size.", "frames were stored below a page", "write a page for each frame")
        starts.update(page.dataoffsets)
        used += own.directory_bytes + sum(page.databytecounts) + sum(t.valuebytecount for t in page.tags if t.valuebytecount > 4)
    page_bytes = sum(sum(page.databytecounts) for page in pages) / len(pages)
    # writers align directories and data, which counts where frames of one value are compressed to a few bytes
    padding = 64 + 16 * len(pages)
    if size - used >= max(0.5 * page_bytes, padding) and not any(own.has_other_images for own in walked):
        raise error(
            f"{path} has {size - used} bytes that none of its {len(pages)} pages list.",
            "writing it was interrupted, or a program stored several frames as one page",
            "write it again with a page for each frame",
        )
    return first


def _meaning(page: tifffile.TiffPage) -> dict[str, object]:
    """What must be equal in all pages of a movie."""
    return {
        "size": f"{page.imagewidth} x {page.imagelength}",
        "type": f"{_SAMPLES.get(page.sampleformat, '')} {page.bitspersample} bit",
        "compression": page.compression,
        "photometric interpretation": page.photometric,
        "samples per pixel": page.samplesperpixel,
    }


def _damage(page: tifffile.TiffPage, own: Walked, size: int) -> str:
    """Why a page cannot be what its directory says; empty if it can."""
    lost = own.codes - {tag.code for tag in page.tags}
    if lost:
        return f"has a damaged tag {min(lost)}"
    if own.codes & _OF_TILES and (_STRIPS in own.codes or not own.codes >= _OF_TILES):
        return "has tags of strips and of tiles"
    if _WIDTH not in own.codes or _LENGTH not in own.codes:
        return "has no width or height"
    edges = (page.tilewidth, page.tilelength) if page.is_tiled else (page.rowsperstrip,)
    if min(page.imagewidth, page.imagelength, *edges) < 1:
        return f"is {page.imagewidth} x {page.imagelength} pixels"
    if page.imagewidth * page.imagelength * max(1, page.bitspersample // 8) > _MOST_BYTES:
        return f"is {page.imagewidth} x {page.imagelength} pixels, more than any camera has"
    offsets, counts = page.dataoffsets, page.databytecounts
    segments = math.prod(page.chunked)
    part = "tile" if page.is_tiled else "strip"
    # tifffile cuts longer lists
    listed = [page.tags[c].count for c in own.codes & {_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES}]
    if len(listed) != 2 or any(n != segments for n in (*listed, len(offsets), len(counts))):
        return f"should have {segments} {part}s, but lists {' and '.join(map(str, listed)) or 'none'}"
    absent = [i for i, (o, n) in enumerate(zip(offsets, counts)) if o <= 0 or n <= 0]
    if absent:
        return f"has no data for {part} {absent[0] + 1}: writing was interrupted"
    last = max(o + n for o, n in zip(offsets, counts))
    if last > size:
        return f"is truncated: it ends at byte {last}, the file at {size}"
    if page.compression == 1 and (short := _short(page)) is not None:
        return f"has {counts[short]} bytes in {part} {short + 1}, not as many as its rows"
    return ""


def _short(page: tifffile.TiffPage) -> int | None:
    """The first strip or tile without compression whose length does not match its rows. The last strip may be padded."""
    counts = page.databytecounts
    if page.is_tiled:
        full = page.tilelength * math.ceil(page.tilewidth * page.samplesperpixel * page.bitspersample / 8)
        return next((i for i, n in enumerate(counts) if n != full), None)
    samples = page.samplesperpixel if page.planarconfig == 1 else 1
    row = math.ceil(page.imagewidth * samples * page.bitspersample / 8)
    strips = math.ceil(page.imagelength / page.rowsperstrip)
    for i, n in enumerate(counts):
        needed = row * min(page.rowsperstrip, page.imagelength - i % strips * page.rowsperstrip)
        if n < needed or (n > needed and i % strips < strips - 1):
            return i
    return None


def _unread(page: tifffile.TiffPage) -> str:
    """Why a valid page cannot be used as a movie frame; empty if it can."""
    tags = page.tags
    if page.is_reduced or page.is_mask:
        return "is a thumbnail or a mask"
    if len(page.shape) != 2 or page.samplesperpixel != 1:
        return f"is a colour image ({page.samplesperpixel} samples per pixel)"
    if 262 in tags and page.photometric != 1:
        return f"is not a greyscale image with black as zero, but {_PHOTOMETRIC.get(int(page.photometric), 'of another kind')}"
    if 274 in tags and tags[274].value != 1:
        return f"has the orientation {int(tags[274].value)}, rather than rows from top to bottom"
    if page.dtype is None or page.sampleformat not in _SAMPLES or page.bitspersample == 1:
        return f"has pixels of {page.bitspersample} bit with the sample format {page.sampleformat}"
    return ""
