"""Does a container end where its own structure says? Lenient decoders do not tell: they play what is there."""

from __future__ import annotations

import zlib

_UNKNOWN_SIZES = (0, 0xFFFFFFFF)


def is_cut_short(data: bytes) -> bool:
    """Whether a RIFF (WAV, AVI, WebP), AIFF, MP4/QuickTime, Matroska/WebM, Ogg or GIF file lacks its end.

    Costs a walk over a few top-level headers. Other formats are never called cut short: their decoders notice.
    Streams that were written without knowing their length (size 0 or all ones) are not called cut short either.
    """
    if data[:4] in (b"RIFF", b"RF64", b"FORM"):
        size = int.from_bytes(data[4:8], "big" if data[:4] == b"FORM" else "little")
        return size not in _UNKNOWN_SIZES and size + 8 > len(data) + 1
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return _boxes_cut_short(data)
    if data[:4] == b"\x1aE\xdf\xa3":
        return _matroska_cut_short(data)
    if data[:4] == b"GIF8":
        return _gif_cut_short(data)
    if data[:4] == b"OggS":
        last = data.rfind(b"OggS")
        # Bit 2 of a page's flags says that the stream ends here. (A page may be any of several streams'.)
        return len(data) < last + 27 or not data[last + 5] & 4 or _ogg_page_end(data, last) > len(data)
    return False


def _boxes_cut_short(data: bytes) -> bool:
    position, seen = 0, set()
    while position + 8 <= len(data):
        size, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        seen.add(kind)
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if size == 0:  # "to the end of the file"
            return False
        if size < 8:
            return False  # damaged, not cut
        position += size
    return position > len(data) or b"moov" not in seen


def _vint(data: bytes, position: int) -> tuple[int, int]:
    """Value and width of an EBML length; the value is -1 where the length is 'unknown'."""
    first = data[position] if position < len(data) else 0
    width = 9 - first.bit_length() if first else 9
    raw = int.from_bytes(data[position : position + width], "big") & ((1 << 7 * width) - 1)
    return (-1 if raw == (1 << 7 * width) - 1 else raw), width


def _matroska_cut_short(data: bytes) -> bool:
    header, width = _vint(data, 4)
    segment = 4 + width + header
    if header < 0 or data[segment : segment + 4] != b"\x18S\x80g":
        return False
    size, width = _vint(data, segment + 4)
    return size >= 0 and segment + 4 + width + size > len(data)


def _gif_cut_short(data: bytes) -> bool:
    """GIF: a screen, then extensions and pictures made of sub-blocks, then a semicolon."""

    def colours(flags: int) -> int:
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    try:
        position = 13 + colours(data[10])
        while data[position] != 0x3B:
            if data[position] == 0x2C:
                position += 11 + colours(data[position + 9])
            elif data[position] == 0x21:
                position += 2
            else:
                return False  # damaged, not cut
            while data[position]:
                position += 1 + data[position]
            position += 1
    except IndexError:
        return True
    return False


def bad_png_chunk(data: bytes) -> str | None:
    """The name of a PNG's first chunk that pictures need and whose checksum is wrong: decoders may not look."""
    position = 8
    while position + 12 <= len(data):
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        end = position + 8 + length
        if kind[:1].isupper() and end + 4 <= len(data):
            said = int.from_bytes(data[end : end + 4], "big")
            if zlib.crc32(memoryview(data)[position + 4 : end]) != said:
                return kind.decode("latin-1")
        position = end + 4
    return None


def _ogg_page_end(data: bytes, page: int) -> int:
    count = data[page + 26]
    return page + 27 + count + sum(data[page + 27 : page + 27 + count])
