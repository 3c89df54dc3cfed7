"""Captions for media that nobody described, from a transformers checkpoint: BLIP, GIT and any vision-encoder-decoder
for pictures and video frames, speech-to-text classes trained on captions (Whisper and its like) for sounds."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ace_core.config import CaptionSettings, LimitSettings
from ace_core.encoders.checkpoints import load_checkpoint, precision
from ace_core.encoders.protocol import identity_of
from ace_core.errors import SettingsError
from ace_core.items import Modality
from ace_core.media.decoders import AudioDecoder, ImageDecoder, VideoDecoder
from ace_core.media.isolate import guarded


class Captioner:
    """Samples captions of one modality's items.

    Args:
        modality: of the items; videos are captioned by the picture model, one caption a frame.
        device: "cpu" or "cuda".

    Raises:
        SettingsError: no model is set for the modality.
        ModelError: the model cannot be loaded.
    """

    def __init__(
        self, modality: Modality, settings: CaptionSettings, limits: LimitSettings, device: str = "cpu"
    ) -> None:
        import transformers

        name = "audio" if modality is Modality.AUDIO else "image"
        path: str | None = getattr(settings, name)
        if path is None:
            raise SettingsError(
                f"no captioner is set for {modality.value}",
                where=f"caption.{name}",
                remedy="Give the folder or hub name of a captioning model, BLIP for example.",
            )
        if name == "audio":
            loaders: tuple[Any, ...] = (transformers.AutoModelForSpeechSeq2Seq, transformers.AutoFeatureExtractor)
        else:
            loaders = (transformers.AutoModelForImageTextToText, transformers.AutoImageProcessor)
        loaded = load_checkpoint(path, *loaders, transformers.AutoTokenizer, setting=f"caption.{name}")
        self._model, self._processor, self._tokenizer = loaded
        self._modality = modality
        self._settings = settings
        self._device = torch.device(device)
        self._model.to(self._device, dtype=precision(device))
        self.identity = identity_of(self._model.state_dict(), f"caption-{modality.value}", self._processor.to_dict())
        if modality is Modality.AUDIO:
            decoder: Any = AudioDecoder(limits, self._processor.sampling_rate)
        elif modality is Modality.VIDEO:
            decoder = VideoDecoder(limits, settings.per_item)
        else:
            decoder = ImageDecoder(limits)
        self._decoder = guarded(decoder)

    def decode(self, data: bytes, start: float | None = None, end: float | None = None) -> np.ndarray:
        """What :meth:`describe` takes of one file, or of its part from ``start`` to ``end`` seconds.

        Raises:
            MediaError: it cannot be decoded.
        """
        return self._decoder(data, start, end)

    @torch.inference_mode()
    def describe(self, batch: Sequence[np.ndarray], seed: int) -> list[list[str]]:
        """``per_item`` captions of each of n decoded items, sampled; the same for the same batch and seed. Near
        duplicates are still among them: see :func:`distinct`."""
        if not batch:
            return []
        with torch.random.fork_rng(devices=[] if self._device.type == "cpu" else [self._device]):
            torch.manual_seed(seed)
            tokens = self._model.generate(
                **self._inputs(batch),
                do_sample=True,
                temperature=1.0,  # Whisper takes none for "no sampling"
                top_p=self._settings.top_p,
                max_new_tokens=self._settings.max_tokens,
            )
        texts = [" ".join(t.split()) for t in self._tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        k = self._settings.per_item
        return [[text for text in texts[i * k : (i + 1) * k] if text] for i in range(len(batch))]

    def _inputs(self, batch: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """Model inputs, ``per_item`` rows an item: the same picture or sound again, or one frame after the other."""
        if self._modality is Modality.AUDIO:
            rate = self._processor.sampling_rate
            inputs = dict(self._processor(list(batch), sampling_rate=rate, return_tensors="pt"))
        else:
            frames = [f for clip in batch for f in clip] if self._modality is Modality.VIDEO else list(batch)
            pictures = [Image.fromarray(pixels) for pixels in frames]
            inputs = {"pixel_values": self._processor(images=pictures, return_tensors="pt")["pixel_values"]}
        times = 1 if self._modality is Modality.VIDEO else self._settings.per_item
        dtype = self._model.dtype
        return {
            k: v.repeat_interleave(times, dim=0).to(self._device, dtype=dtype if v.is_floating_point() else None)
            for k, v in inputs.items()
        }


def distinct(captions: Sequence[str], vectors: np.ndarray, limit: float) -> list[str]:
    """Captions without near duplicates: the first of those that read the same or mean nearly the same stays.

    Args:
        vectors: (n, d) float, their embeddings, of any length.
        limit: cosine similarity from which two captions are one.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    kept: list[int] = []
    for number, caption in enumerate(captions):
        again = any(plain(captions[k]) == plain(caption) or float(unit[k] @ unit[number]) >= limit for k in kept)
        if not again and plain(caption):
            kept.append(number)
    return [captions[k] for k in kept]


def plain(text: str) -> str:
    """A text without case, punctuation, accents and spacing: what makes two spellings one."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    return " ".join("".join(c if c.isalnum() else " " for c in letters if not unicodedata.combining(c)).split())
