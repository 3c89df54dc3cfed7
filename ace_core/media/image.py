"""Pictures: bytes of any common format -> (h, w, 3) RGB."""

from __future__ import annotations

import io
import struct
import threading
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ace_core.config import LimitSettings
from ace_core.errors import MediaError
from ace_core.items import Modality
from ace_core.media.causes import Cause, check_bytes, check_memory, check_pixels
from ace_core.media.kinds import sniffed_modality
from ace_core.media.structure import bad_png_chunk, is_cut_short

# What is opened at all. Pillow knows more formats, among them some that start programs (EPS starts Ghostscript).
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM")
# Pillow's own bomb check is a module global and stricter than a limit that a user may have raised.
_OPENING = threading.Lock()
# Damaged files make Pillow's parsers fail in all of these ways.
_DAMAGE = (OSError, SyntaxError, ValueError, struct.error, zlib.error, IndexError, KeyError, EOFError, TypeError)

# How its messages speak of a file that ends too early.
_CUT_WORDS = ("truncated", "end of file", "not enough")


def decode_image(data: bytes, limits: LimitSettings, min_side: int | None = None) -> np.ndarray:
    """Decode one picture (the first frame of an animated one) upright, on white where it is transparent.

    Args:
        data: the file.
        limits: bytes and pixels (by the header, before any pixel is decoded).
        min_side: the shorter side that is enough. A picture more than twice as large is decoded at a reduced size,
            still at least this large: a giant JPEG costs a fraction.

    Returns:
        (h, w, 3) uint8, RGB.

    Raises:
        MediaError: ``empty``, ``too-large``, ``too-many-pixels``, ``not-an-image``, ``truncated``, ``corrupt`` or
            ``out-of-memory``.
    """
    check_bytes(data, limits)
    try:
        picture = _open(data)
    except UnidentifiedImageError:
        if sniffed_modality(data) is Modality.IMAGE:
            raise _damaged(data, "the header cannot be read") from None
        raise MediaError(Cause.NOT_AN_IMAGE, "the bytes are of no picture format that Pillow knows") from None
    except (*_DAMAGE, MemoryError) as e:
        check_memory(e)
        raise _damaged(data, f"the header cannot be read: {e}") from None
    check_pixels(*picture.size, limits)
    if 0 in picture.size:
        raise MediaError(Cause.CORRUPT, f"the header says {picture.width} x {picture.height} pixels")
    try:
        if min_side is not None and picture.format == "JPEG":
            # Lets the JPEG decoder leave out high frequencies: 1/2, 1/4 or 1/8 of the size, never below min_side.
            picture.draft(None, (min_side, min_side))
        picture.load()
    except (*_DAMAGE, MemoryError) as e:
        check_memory(e)
        raise _damaged(data, f"the {picture.format} cannot be decoded: {e}") from None
    if picture.format == "PNG" and (chunk := bad_png_chunk(data)) is not None:
        raise MediaError(Cause.CORRUPT, f"the checksum of the PNG's chunk {chunk} is wrong")
    if min_side is not None and (factor := min(picture.size) // min_side) > 1 and picture.mode not in ("P", "PA"):
        picture = picture.reduce(factor)
    return np.asarray(_rgb(_upright(picture)))


def resized(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w, 3) uint8 to (height, width, 3) uint8, bicubic with anti-aliasing; the aspect ratio is not kept."""
    if rgb.shape[:2] == (height, width):
        return rgb
    return np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))


def _damaged(data: bytes, found: str) -> MediaError:
    cut = len(data) < 64 or is_cut_short(data) or any(word in found.lower() for word in _CUT_WORDS)
    # A JPEG's decoder may stumble before it reaches the end; the mark that ends it tells.
    cut = cut or (data[:3] == b"\xff\xd8\xff" and not data.rstrip(b"\0\r\n ").endswith(b"\xff\xd9"))
    return MediaError(Cause.TRUNCATED if cut else Cause.CORRUPT, found)


def _open(data: bytes) -> Image.Image:
    with _OPENING:
        Image.init()  # registers the formats; does nothing the second time
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=[f for f in _FORMATS if f in Image.OPEN])
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except _DAMAGE:  # a damaged EXIF block says nothing about the orientation, and the pixels are fine
        return picture


def _rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB: transparency on white, 16-bit and float greys scaled instead of clipped."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I;16") or picture.mode == "I":
        grey = np.asarray(picture).astype(np.float32)
        top = 65535.0 if grey.max(initial=0) > 255 else 255.0
        return Image.fromarray((grey.clip(0, top) * (255.0 / top)).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        grey = np.nan_to_num(np.asarray(picture))
        low, high = float(grey.min(initial=0)), float(grey.max(initial=1))
        return Image.fromarray(((grey - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")
