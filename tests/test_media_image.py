"""Pictures of every mode and every kind of damage, made here."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ace_core.config import LimitSettings
from ace_core.errors import MediaError
from ace_core.items import Modality
from ace_core.media import Cause, decode_image, mime_of, modality_of, sniff
from ace_core.media.image import resized

LIMITS = LimitSettings()
# Pillow warns of damage that these tests make on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def scene(width: int = 64, height: int = 48) -> Image.Image:
    """Left half red, right half blue, a green bar at the top."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = (220, 30, 30)
    pixels[:, width // 2 :] = (30, 30, 220)
    pixels[: height // 6] = (20, 200, 20)
    return Image.fromarray(pixels)


def cause_of(data: bytes, limits: LimitSettings = LIMITS) -> str:
    with pytest.raises(MediaError) as error:
        decode_image(data, limits)
    return error.value.cause


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "JPEG", "WEBP", "JPEG2000"])
def test_formats_decode_to_the_same_picture(kind: str) -> None:
    got = decode_image(saved(scene(), kind, **({"quality": 95} if kind in ("JPEG", "WEBP") else {})), LIMITS)
    assert got.shape == (48, 64, 3) and got.dtype == np.uint8
    assert np.abs(got.astype(int) - np.asarray(scene())).mean() < 6


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    got = decode_image(saved(scene(), "JPEG", quality=95, exif=exif), LIMITS)
    assert got.shape == (64, 48, 3)
    assert got[5, 5, 0] > 150 and got[60, 5, 2] > 150  # red at the top, blue at the bottom
    assert got[20, 46, 1] > 150  # the green bar on the right


def test_damaged_exif_leaves_the_pixels() -> None:
    data = saved(scene(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert decode_image(data, LIMITS).shape == (48, 64, 3)


def test_cmyk_becomes_rgb() -> None:
    got = decode_image(saved(scene().convert("CMYK"), "JPEG", quality=95), LIMITS)
    assert np.abs(got.astype(int) - np.asarray(scene())).mean() < 12


def test_transparency_is_on_white() -> None:
    layer = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    layer.paste((0, 0, 255, 255), (0, 0, 4, 8))
    for data in (
        saved(layer, "PNG"),
        saved(layer.quantize(4), "PNG"),
        saved(layer.convert("LA"), "PNG"),
        saved(layer, "WEBP", lossless=True),
    ):
        got = decode_image(data, LIMITS)
        assert (got[:, 5:] == 255).all()
        assert (got[:, :3] < 255).any(axis=2).all()


def test_palette_with_a_transparent_index_and_greys_with_a_transparent_level() -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0] + [0] * 750)
    assert (decode_image(saved(palette, "PNG", transparency=1), LIMITS) == 255).all()
    assert (decode_image(saved(palette, "GIF"), LIMITS)[0, 0] == (0, 255, 0)).all()
    assert (decode_image(saved(Image.new("L", (4, 4), 9), "PNG", transparency=9), LIMITS) == 255).all()


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16)[None].repeat(4, axis=0)
    got = decode_image(saved(Image.fromarray(ramp), "PNG"), LIMITS)
    assert np.abs(got[0, :, 0].astype(int) - np.arange(256)).max() <= 1
    dark = decode_image(saved(Image.fromarray((ramp // 4).astype(np.uint16)), "TIFF"), LIMITS)
    assert 60 <= dark.max() <= 66
    floats = decode_image(saved(Image.fromarray(np.linspace(0, 3, 16, dtype=np.float32)[None]), "TIFF"), LIMITS)
    assert floats.min() == 0 and floats.max() == 255


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (decode_image(data, LIMITS) == (255, 0, 0)).all()


def test_bilevel_and_grey() -> None:
    assert (decode_image(saved(Image.new("1", (4, 4), 1), "PNG"), LIMITS) == 255).all()
    assert (decode_image(saved(Image.new("L", (4, 4), 77), "PNG"), LIMITS) == 77).all()


def test_min_side_reduces_giants_and_only_giants() -> None:
    giant = scene(1200, 1000)
    for kind in ("JPEG", "PNG"):
        got = decode_image(saved(giant, kind), LIMITS, min_side=100)
        assert 100 <= min(got.shape[:2]) < 200
        small = np.asarray(giant.resize(got.shape[1::-1], Image.Resampling.BOX)).astype(int)
        assert np.abs(got - small).mean() < 6
        assert decode_image(saved(scene(), kind), LIMITS, min_side=100).shape == (48, 64, 3)


def test_resized_is_pillows_bicubic() -> None:
    pixels = np.asarray(scene())
    assert resized(pixels, 48, 64) is pixels
    expected = np.asarray(scene().resize((20, 10), Image.Resampling.BICUBIC))
    assert (resized(pixels, 10, 20) == expected).all()


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_bombs_are_refused_from_the_header() -> None:
    assert cause_of(png_header(60_000, 60_000)) == Cause.TOO_MANY_PIXELS
    # Between Pillow's own limit and ours, either way: ours counts.
    assert cause_of(saved(scene(), "PNG"), LimitSettings(max_pixels=3000)) == Cause.TOO_MANY_PIXELS
    raised = LimitSettings(max_pixels=10**10)
    assert cause_of(png_header(60_000, 60_000), raised) != Cause.TOO_MANY_PIXELS


def test_limit_on_bytes() -> None:
    data = saved(scene(), "PNG")
    assert cause_of(data, LimitSettings(max_bytes=len(data) - 1)) == Cause.TOO_LARGE
    assert decode_image(data, LimitSettings(max_bytes=len(data))).shape == (48, 64, 3)


NOISE = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_cut_files_are_truncated(kind: str, share: float) -> None:
    data = saved(Image.fromarray(NOISE), kind)
    assert cause_of(data[: int(len(data) * share)]) == Cause.TRUNCATED


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", Cause.EMPTY),
        (b"\0" * 5000, Cause.NOT_AN_IMAGE),
        (b"<html><body>404 Not Found</body></html>", Cause.NOT_AN_IMAGE),
        (b"%PDF-1.7\n" + b"x" * 500, Cause.NOT_AN_IMAGE),
        (b"PK\x03\x04" + b"x" * 500, Cause.NOT_AN_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", Cause.NOT_AN_IMAGE),
        (b"RIFF\x24\0\0\0WAVEfmt " + b"\0" * 100, Cause.NOT_AN_IMAGE),
        (np.random.default_rng(1).bytes(4000), Cause.NOT_AN_IMAGE),
        (b"\xff\xd8\xff", Cause.TRUNCATED),
        (b"\x89PNG\r\n\x1a\n", Cause.TRUNCATED),
        (b"GIF89a", Cause.TRUNCATED),
        (b"\xff\xd8\xff\xe0" + b"\0" * 4000, Cause.TRUNCATED),
        (b"\xff\xd8\xff\xe0" + b"\0" * 4000 + b"\xff\xd9", Cause.CORRUPT),
        (b"\x89PNG\r\n\x1a\n" + b"\xaa" * 4000, Cause.CORRUPT),
        (png_header(0, 10), Cause.CORRUPT),
    ],
)
def test_what_is_no_picture(data: bytes, cause: Cause) -> None:
    assert cause_of(data) == cause


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_flipped_bytes_decode_or_are_refused(kind: str) -> None:
    """Whatever bytes are changed: pixels or a MediaError, nothing else."""
    rng = np.random.default_rng(3)
    data = saved(Image.fromarray(NOISE), kind)
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(data)
        for position in rng.integers(0, min(len(data), 2000), 8):
            damaged[position] = rng.integers(0, 256)
        try:
            outcomes.add(decode_image(bytes(damaged), LimitSettings(max_pixels=10_000_000)).ndim)
        except MediaError as e:
            outcomes.add(e.cause)
    assert outcomes <= {3, *Cause}
    assert outcomes & {*Cause}, "the damage was never noticed"


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory error when reading image file")])
@pytest.mark.parametrize("step", ["PIL.Image.open", "PIL.ImageFile.ImageFile.load"])
def test_too_little_memory_is_no_fault_of_the_file(
    monkeypatch: pytest.MonkeyPatch, step: str, error: Exception
) -> None:
    """Python's error, and how Pillow's decoders say it."""

    def starved(*args: object, **kwargs: object) -> None:
        raise error

    data = saved(scene(), "PNG")
    monkeypatch.setattr(step, starved)
    assert cause_of(data) == Cause.OUT_OF_MEMORY


def test_kinds() -> None:
    assert modality_of("a/b/Cat.JPEG") is Modality.IMAGE and mime_of("cat.png") == "image/png"
    assert modality_of("https://host/x.webm?token=1.mp3") is Modality.VIDEO
    assert modality_of("quiz/what is it? 1.jpg") is Modality.IMAGE and mime_of("why?.ogg") == "audio/ogg"
    assert modality_of("300/x.jpg?width=300") is Modality.IMAGE and mime_of("x.png?v=1.2") == "image/png"
    assert modality_of("notes.txt") is None and mime_of("notes.txt") == "application/octet-stream"
    assert sniff(saved(scene(), "WEBP")) == ".webp" and sniff(b"plain text") is None
    assert sniff(saved(scene(), "BMP")) == ".bmp"
