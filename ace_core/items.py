"""Items: what a corpus is made of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum


class Modality(StrEnum):
    """The kind of a media item. Its position in :data:`MODALITIES` is the identifier's first token."""

    IMAGE = "image"
    AUDIO = "audio"
    VIDEO = "video"

    @property
    def token(self) -> int:
        return MODALITIES.index(self)


MODALITIES: tuple[Modality, ...] = (Modality.IMAGE, Modality.AUDIO, Modality.VIDEO)

AttributeValue = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Item:
    """One media file of a corpus, or one segment of a long recording.

    Attributes:
        item_id: unique in the corpus, stable between runs.
        uri: where its bytes are (a path below the corpus root, an absolute path or a URI).
        modality: image, audio or video.
        captions: texts that describe it; may be empty.
        attributes: flat and filterable.
        start_seconds, end_seconds: the part of the file that this item is; None for the whole file.
    """

    item_id: str
    uri: str
    modality: Modality
    captions: tuple[str, ...] = ()
    attributes: dict[str, AttributeValue] = field(default_factory=dict)
    start_seconds: float | None = None
    end_seconds: float | None = None


def content_hash(data: bytes) -> str:
    """What a file's bytes are known by."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
