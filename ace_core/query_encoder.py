"""What comes in becomes queries: texts, files and items of the corpus, as the generator reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ace_core.aligner import Aligner
from ace_core.config import LimitSettings
from ace_core.encoders import MediaEncoder, TextEncoder, load_media_encoder, load_text_encoder
from ace_core.errors import QueryError, StoreError
from ace_core.items import Modality, content_hash
from ace_core.quantize.quantizer import Quantizer
from ace_core.query import Example, QueryBatch, SearchRequest
from ace_core.snapshot import Snapshot
from ace_core.space import unit_query


class QueryEncoder:
    """The encoders of a snapshot, and its aligner.

    Args:
        text_encoder: a loaded encoder to reuse, if it is the snapshot's.

    Raises:
        ModelError: the text encoder cannot be had here.
        StoreError: it is not the one that the snapshot was made with.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        aligner: Aligner,
        quantizer: Quantizer,
        *,
        limits: LimitSettings,
        device: str,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        wanted = snapshot.manifest.encoder_identities["text"]
        if text_encoder is None or text_encoder.identity != wanted:
            text_encoder = load_text_encoder(snapshot.text_encoder, device)
        _same_encoder("text", text_encoder.identity, wanted, snapshot)
        self.text_encoder = text_encoder
        self._snapshot = snapshot
        self._aligner = aligner.to(device).eval()
        self._quantizer = quantizer
        self._limits = limits
        self._device = device
        self._media_encoders: dict[Modality, MediaEncoder] = {}

    def batch(self, requests: Sequence[SearchRequest]) -> QueryBatch:
        """Texts are encoded, vectors enter as virtual queries: both in one batch, in the order of the requests."""
        texts = [r.text for r in requests if r.vector is None]
        if any(text is None for text in texts):
            raise QueryError("the request has neither text nor vector")
        if not texts:
            vectors = np.stack([np.asarray(r.vector, np.float32) for r in requests])
            return QueryBatch(torch.from_numpy(vectors).to(self._device))
        encoded = self.of_texts([text for text in texts if text is not None])
        if len(texts) == len(requests):
            return encoded
        assert encoded.hidden is not None and encoded.mask is not None
        is_text = torch.tensor([r.vector is None for r in requests], device=encoded.vector.device)
        whole = []
        for rows in (encoded.vector, encoded.hidden, encoded.mask):
            out = rows.new_zeros((len(requests), *rows.shape[1:]))
            out[is_text] = rows
            whole.append(out)
        given = np.stack([np.asarray(r.vector, np.float32) for r in requests if r.vector is not None])
        whole[0][~is_text] = torch.from_numpy(given).to(encoded.vector)
        # A query whose mask is all False has no token to look at: a virtual query, like one with hidden=None.
        return QueryBatch(*whole)

    def of_texts(self, texts: Sequence[str]) -> QueryBatch:
        """Texts as the generator reads them.

        Raises:
            QueryError: a text is empty, or is no text.
        """
        for text in texts:
            if not text.strip():
                raise QueryError("the query is empty", remedy="Describe what to look for.")
            if any("\ud800" <= character <= "\udfff" for character in text):  # as a terminal hands on stray bytes
                raise QueryError(
                    f"the query {text!a} has bytes that are no UTF-8", remedy="Type it, or save it, as UTF-8."
                )
        features = self.text_encoder.encode(list(texts))
        with torch.inference_mode():
            vector = self._aligner.text(features.pooled.to(self._device))
        return QueryBatch(vector, features.hidden, features.mask).to(self._device)

    def example_of_item(self, item_id: str) -> Example | None:
        """An indexed item as a query, to find more like it; None if there is no such item."""
        found = self._snapshot.find(item_id)
        return None if found is None else self._example([found])

    def example_of_file(self, modality: Modality, data: bytes) -> Example:
        """A file's bytes as a query, to search by example.

        A file of the corpus is its own item there, with what its captions say (the mean of its segments, where it was
        cut); any other is encoded.

        Raises:
            MediaError, ModelError: as :meth:`encode_media`.
        """
        own = self._snapshot.find_content(content_hash(data))
        return self._example(own) if own else Example(self.encode_media(modality, data))

    def _example(self, items: list[tuple[int, int]]) -> Example:
        vectors = [
            self._snapshot.segments[number].gallery.vectors(np.array([row]), self._quantizer)[0]
            for number, row in items
        ]
        return Example(_as_query(torch.from_numpy(np.mean(vectors, axis=0, keepdims=True))), tuple(items))

    def encode_media(self, modality: Modality, data: bytes) -> np.ndarray:
        """A file's bytes as a (D,) float32 query vector, from its content alone.

        Raises:
            MediaError: it cannot be decoded.
            ModelError: the modality's encoder cannot be had here.
        """
        encoder = self._media_encoder(modality)
        raw = encoder.encode([encoder.decoder(data)])
        with torch.inference_mode():
            return _as_query(self._aligner.item(modality, torch.from_numpy(raw).to(self._device)))

    def _media_encoder(self, modality: Modality) -> MediaEncoder:
        if modality not in self._media_encoders:
            wanted = self._snapshot.manifest.encoder_identities.get(modality)
            if wanted is None:
                raise QueryError(
                    f"the snapshot has no {modality} items, so it names no {modality} encoder",
                    remedy="Search by a file of a modality that the corpus holds.",
                )
            settings = self._snapshot.manifest.encoders.media(modality)
            encoder = load_media_encoder(modality, settings, self._limits, self._device)
            _same_encoder(modality, encoder.identity, wanted, self._snapshot)
            self._media_encoders[modality] = encoder
        return self._media_encoders[modality]


def _as_query(item: torch.Tensor) -> np.ndarray:
    """An item's vector (1, D) as a virtual query (D,)."""
    return unit_query(item.float().cpu())[0].numpy()


def _same_encoder(what: str, found: str, wanted: str, snapshot: Snapshot) -> None:
    if found != wanted:
        raise StoreError(
            f"snapshot {snapshot.id} was made with {what} encoder {wanted}, the one here is {found}",
            where=f"encoders.{what}",
            remedy="Install the model it was made with, or ingest and fit again.",
        )
