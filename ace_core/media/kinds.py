"""Which modality and MIME type a file has, by its name or by its first bytes."""

from __future__ import annotations

from pathlib import PurePosixPath

from ace_core.items import Modality

_KINDS: dict[str, tuple[Modality, str]] = {
    ".jpg": (Modality.IMAGE, "image/jpeg"),
    ".jpeg": (Modality.IMAGE, "image/jpeg"),
    ".jpe": (Modality.IMAGE, "image/jpeg"),
    ".jfif": (Modality.IMAGE, "image/jpeg"),
    ".png": (Modality.IMAGE, "image/png"),
    ".webp": (Modality.IMAGE, "image/webp"),
    ".gif": (Modality.IMAGE, "image/gif"),
    ".bmp": (Modality.IMAGE, "image/bmp"),
    ".tif": (Modality.IMAGE, "image/tiff"),
    ".tiff": (Modality.IMAGE, "image/tiff"),
    ".avif": (Modality.IMAGE, "image/avif"),
    ".jp2": (Modality.IMAGE, "image/jp2"),
    ".ppm": (Modality.IMAGE, "image/x-portable-pixmap"),
    ".pgm": (Modality.IMAGE, "image/x-portable-graymap"),
    ".wav": (Modality.AUDIO, "audio/wav"),
    ".flac": (Modality.AUDIO, "audio/flac"),
    ".ogg": (Modality.AUDIO, "audio/ogg"),
    ".oga": (Modality.AUDIO, "audio/ogg"),
    ".opus": (Modality.AUDIO, "audio/ogg"),
    ".mp3": (Modality.AUDIO, "audio/mpeg"),
    ".aif": (Modality.AUDIO, "audio/aiff"),
    ".aiff": (Modality.AUDIO, "audio/aiff"),
    ".au": (Modality.AUDIO, "audio/basic"),
    ".m4a": (Modality.AUDIO, "audio/mp4"),
    ".aac": (Modality.AUDIO, "audio/aac"),
    ".wma": (Modality.AUDIO, "audio/x-ms-wma"),
    ".mp4": (Modality.VIDEO, "video/mp4"),
    ".m4v": (Modality.VIDEO, "video/mp4"),
    ".mov": (Modality.VIDEO, "video/quicktime"),
    ".mkv": (Modality.VIDEO, "video/x-matroska"),
    ".webm": (Modality.VIDEO, "video/webm"),
    ".avi": (Modality.VIDEO, "video/x-msvideo"),
    ".mpg": (Modality.VIDEO, "video/mpeg"),
    ".mpeg": (Modality.VIDEO, "video/mpeg"),
    ".m2ts": (Modality.VIDEO, "video/mp2t"),
    ".wmv": (Modality.VIDEO, "video/x-ms-wmv"),
    ".flv": (Modality.VIDEO, "video/x-flv"),
    ".ogv": (Modality.VIDEO, "video/ogg"),
    ".3gp": (Modality.VIDEO, "video/3gpp"),
}

SUFFIXES: frozenset[str] = frozenset(_KINDS)

_SUFFIX_OF_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", ".jpg"),
    (0, b"\x89PNG\r\n\x1a\n", ".png"),
    (0, b"GIF87a", ".gif"),
    (0, b"GIF89a", ".gif"),
    (0, b"II*\0", ".tif"),
    (0, b"MM\0*", ".tif"),
    (8, b"WEBP", ".webp"),
    (8, b"WAVE", ".wav"),
    (8, b"AVI ", ".avi"),
    (8, b"AIFF", ".aiff"),
    (8, b"AIFC", ".aiff"),
    (4, b"ftypavif", ".avif"),
    (4, b"ftypM4A", ".m4a"),
    (4, b"ftypqt", ".mov"),
    (4, b"ftyp", ".mp4"),
    (4, b"moov", ".mov"),
    (4, b"mdat", ".mov"),
    (4, b"wide", ".mov"),
    (0, b"fLaC", ".flac"),
    (28, b"\x80theora", ".ogv"),
    (0, b"OggS", ".ogg"),
    (0, b"ID3", ".mp3"),
    (0, b"\xff\xfb", ".mp3"),
    (0, b"\xff\xf3", ".mp3"),
    (0, b"\xff\xf2", ".mp3"),
    (0, b"\xff\xf1", ".aac"),
    (0, b"\xff\xf9", ".aac"),
    (0, b".snd", ".au"),
    (0, b"FLV\x01", ".flv"),
    (0, b"\0\0\x01\xba", ".mpg"),
    (0, b"\0\0\x01\xb3", ".mpg"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", ".wmv"),
    (0, b"\0\0\0\x0cjP  ", ".jp2"),
)


def modality_of(name: str) -> Modality | None:
    """The modality that a file's name promises, or None when its suffix is not a known kind."""
    kind = _kind_of(name)
    return kind[0] if kind else None


def mime_of(name: str) -> str:
    """The MIME type of a file's name; ``application/octet-stream`` when it is not a known kind."""
    kind = _kind_of(name)
    return kind[1] if kind else "application/octet-stream"


def _kind_of(name: str) -> tuple[Modality, str] | None:
    """By the suffix; of a URL, by that of what is before its query. A file's name may have question marks, too, and a
    URL may be written relative to another."""
    path = name.split("?", 1)[0]
    names = (path,) if "://" in name else (name, path)
    return next((kind for n in names if (kind := _KINDS.get(PurePosixPath(n).suffix.lower()))), None)


def sniff(data: bytes) -> str | None:
    """The suffix (with its dot) that a file's first bytes speak for, or None. Needs 200 bytes at most."""
    head = data[:64]
    for offset, magic, suffix in _SUFFIX_OF_MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return suffix
    if head[:4] == b"\x1aE\xdf\xa3":
        return ".webm" if b"webm" in head else ".mkv"
    if data[:1] == data[188:189] == b"G" or data[4:5] == data[196:197] == b"G":
        return ".m2ts"
    if head[:2] in (b"P3", b"P6", b"P2", b"P5") and head[2:3].isspace():
        return ".ppm"
    if head[:2] == b"BM" and len(data) >= 26 and head[14:18] in (b"\x28\0\0\0", b"\x0c\0\0\0", b"\x7c\0\0\0"):
        return ".bmp"
    return None


def sniffed_modality(data: bytes) -> Modality | None:
    """The modality that a file's first bytes speak for, or None."""
    suffix = sniff(data)
    return None if suffix is None else _KINDS[suffix][0]
