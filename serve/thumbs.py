"""Small pictures for the grid: of a picture, or of the middle of a clip.

The original is decoded in a child process, after its header was checked against the limits, as everywhere where bytes
of strangers are opened; only a few sizes can be asked for, and what was made is kept, up to a number of bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum

from PIL import Image

from ace_core.config import LimitSettings
from ace_core.errors import MediaError
from ace_core.items import Modality
from ace_core.media.causes import Cause
from ace_core.media.decoders import ImageDecoder, VideoDecoder
from ace_core.media.isolate import guarded
from ace_core.segment import StoredItem
from serve.calls import Overloaded
from serve.media import MediaFile, blocks, resolve

MIME = "image/webp"
_THREADS = 2
_MAX_WAITING = 400  # a few pages full
_MAX_SOURCE_BYTES = 64_000_000
_DECODE_SECONDS = 10.0
_KEPT_BYTES = 32_000_000
_QUALITY = 80


class ThumbSize(IntEnum):
    """The longer side of a thumbnail, in pixels."""

    SMALL = 256
    LARGE = 512


@dataclass(frozen=True)
class Thumbnail:
    """An encoded picture, and an ETag that changes when its original does."""

    data: bytes
    etag: str


class Thumbnails:
    """Makes thumbnails on threads of its own, each at most once at a time, and keeps the last ones."""

    def __init__(
        self, limits: LimitSettings, *, kept_bytes: int = _KEPT_BYTES, max_waiting: int = _MAX_WAITING
    ) -> None:
        """Nothing is started before the first thumbnail.

        Args:
            limits: of the corpus' media; a thumbnail may cost less than they allow, never more.
            kept_bytes: size of the cache.
            max_waiting: thumbnails that may be in the making; more are refused.
        """
        tighter = limits.model_copy(
            update={
                "max_bytes": min(limits.max_bytes, _MAX_SOURCE_BYTES),
                "decode_seconds": min(limits.decode_seconds, _DECODE_SECONDS),
            }
        )
        self._max_bytes = tighter.max_bytes
        self._decoders = {
            (Modality.IMAGE, size): guarded(ImageDecoder(tighter, min_side=size)) for size in ThumbSize
        } | dict.fromkeys(((Modality.VIDEO, size) for size in ThumbSize), guarded(VideoDecoder(tighter, frames=1)))
        self._threads = ThreadPoolExecutor(_THREADS, "thumbs")
        self._kept_bytes = kept_bytes
        self._max_waiting = max_waiting
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._size = 0
        self._making: dict[str, asyncio.Task[bytes]] = {}

    async def of(self, item: StoredItem, size: ThumbSize, unless: str | None = None) -> Thumbnail:
        """The thumbnail of an item.

        Args:
            unless: an ``If-None-Match`` header. When it names the thumbnail, ``data`` is empty, and nothing is made.

        Raises:
            MediaError: a sound has none; the original is damaged, or over the limits.
            StoreError: the original is not there, or not below its corpus folder.
            Overloaded: too many are being made.
        """
        if (item.modality, size) not in self._decoders:
            raise MediaError(Cause.NOT_AN_IMAGE, "a sound has no picture")
        file = await asyncio.to_thread(resolve, item.root, item.uri)
        part = f"{file.etag} {item.start_seconds} {item.end_seconds} {size} {_QUALITY}"
        etag = f'"{hashlib.sha256(part.encode()).hexdigest()[:24]}"'
        if unless is not None and etag in unless:
            return Thumbnail(b"", etag)
        data = self._kept.get(etag)
        if data is None:
            task = self._making.get(etag)
            if task is None:
                if len(self._making) >= self._max_waiting:
                    raise Overloaded
                task = self._making[etag] = asyncio.create_task(self._make(etag, file, item, size))
            data = await asyncio.shield(task)  # the others who wait for it must not lose it with the first one
        else:
            self._kept.move_to_end(etag)
        return Thumbnail(data, etag)

    async def _make(self, etag: str, file: MediaFile, item: StoredItem, size: ThumbSize) -> bytes:
        try:
            data = await asyncio.get_running_loop().run_in_executor(self._threads, self._encoded, file, item, size)
        finally:
            del self._making[etag]
        self._kept[etag] = data
        self._size += len(data)
        while self._size > self._kept_bytes:
            self._size -= len(self._kept.popitem(last=False)[1])
        return data

    def _encoded(self, file: MediaFile, item: StoredItem, size: ThumbSize) -> bytes:
        if file.size > self._max_bytes:
            raise MediaError(Cause.TOO_LARGE, f"the file has {file.size} bytes, too many for a thumbnail")
        original = b"".join(blocks(file, 0, file.size - 1))
        pixels = self._decoders[item.modality, size](original, item.start_seconds, item.end_seconds)
        picture = Image.fromarray(pixels[0] if pixels.ndim == 4 else pixels)
        picture.thumbnail((size, size), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        picture.save(out, "WEBP", quality=_QUALITY, method=2)
        return out.getvalue()

    def close(self) -> None:
        """End the threads and the decoding processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for decoder in self._decoders.values():
            if (close := getattr(decoder, "close", None)) is not None:
                close()
