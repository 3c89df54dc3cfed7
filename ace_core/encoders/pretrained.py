"""Any transformers vision, sound or video model behind the ``MediaEncoder`` protocol.

Dual encoders (CLIP, SigLIP, CLAP, X-CLIP) give their projected vector; plain backbones (DINOv2, ViT, wav2vec 2.0,
VideoMAE) the mean of their last layer's token features, for the aligner to project.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ace_core.config import LimitSettings
from ace_core.encoders.checkpoints import TEXT_PARTS, drop_parts, load_checkpoint, pooled_output
from ace_core.encoders.protocol import identity_of, normalised, precision, sampled
from ace_core.errors import SettingsError
from ace_core.items import Modality
from ace_core.media.decoders import AudioDecoder, ImageDecoder, VideoDecoder
from ace_core.media.isolate import guarded

if TYPE_CHECKING:
    from ace_core.media.video import Sampling


class PretrainedEncoder(ABC):
    """What the three modalities have in common: loading, running, pooling."""

    modality: Modality

    def __init__(self, path: str, processor_loader: Any, device: str, *revision: int | str) -> None:
        from transformers import AutoModel

        setting = f"encoders.{self.modality}.path"
        self._model, self._processor = load_checkpoint(path, AutoModel, processor_loader, setting=setting)
        self._device = torch.device(device)
        self._getter = self._find_getter()
        self.shares_text_space = self._getter is not None and hasattr(self._model, "get_text_features")
        drop_parts(self._model, TEXT_PARTS)
        if self._getter is None and self._model.config.is_encoder_decoder:
            self._model = self._model.get_encoder()
        self.identity = identity_of(self._model.state_dict(), str(self.modality), revision, self._processor.to_dict())
        self._model.to(self._device, dtype=precision(device))
        self.dim = self.encode([self._blank()]).shape[1]

    def _find_getter(self) -> str | None:
        name = f"get_{self.modality}_features"
        return name if hasattr(self._model, name) else None

    @abstractmethod
    def _blank(self) -> np.ndarray:
        """An input array of the modality, to find the width of the vectors with."""

    @abstractmethod
    def _inputs(self, batch: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """What the model is called with for these input arrays."""

    def encode(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        """(n, dim) float32, L2-normalised, of n files as ``decoder`` gives them."""
        if not batch:
            return np.empty((0, self.dim), np.float32)
        return normalised(self._features(self._inputs(batch)).float().cpu().numpy())

    @torch.inference_mode()
    def _features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(n, dim) features of processed inputs."""
        moved = {
            k: v.to(self._device, dtype=self._model.dtype if v.is_floating_point() else None) for k, v in inputs.items()
        }
        if self._getter is not None:
            return pooled_output(getattr(self._model, self._getter)(**moved))
        hidden = self._model(**moved).last_hidden_state
        if hidden.ndim == 4:  # a feature map (n, channels, h, w) of a convolutional backbone
            return hidden.mean((2, 3))
        mask = self._token_mask(hidden.shape[1], moved)
        if mask is None:
            return hidden.mean(1)
        weights = mask[:, :, None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)

    def _token_mask(self, tokens: int, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """(n, tokens) bool of the output tokens that are not padding; None if all count."""
        return None


class PretrainedImages(PretrainedEncoder):
    """CLIP, SigLIP and any image backbone."""

    modality = Modality.IMAGE

    def __init__(self, path: str, limits: LimitSettings, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor

        super().__init__(path, AutoImageProcessor, device)
        size = getattr(self._processor, "size", None) or {}
        side = max((v for v in dict(size).values() if isinstance(v, int)), default=0)
        # Twice what the processor shrinks it to: its own filter does the last step.
        self.decoder = guarded(ImageDecoder(limits, min_side=2 * side or None))

    def _blank(self) -> np.ndarray:
        return np.zeros((64, 64, 3), np.uint8)

    def _inputs(self, batch: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        return dict(self._processor(images=[Image.fromarray(pixels) for pixels in batch], return_tensors="pt"))


class PretrainedSounds(PretrainedEncoder):
    """CLAP and any sound backbone (wav2vec 2.0, HuBERT, AST)."""

    modality = Modality.AUDIO

    def __init__(self, path: str, limits: LimitSettings, device: str = "cpu") -> None:
        from transformers import AutoFeatureExtractor

        super().__init__(path, AutoFeatureExtractor, device)
        self.decoder = guarded(AudioDecoder(limits, self._processor.sampling_rate))

    def _blank(self) -> np.ndarray:
        return np.zeros(self._processor.sampling_rate, np.float32)

    def _inputs(self, batch: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        processor = self._processor
        rate = processor.sampling_rate
        batch = [np.pad(samples, (0, max(0, rate // 10 - len(samples)))) for samples in batch]
        if hasattr(processor, "nb_max_samples"):
            # CLAP's extractor takes random parts of a sound longer than this: take its beginning, always the same.
            batch = [samples[: processor.nb_max_samples] for samples in batch]
        extra: dict[str, Any] = {}
        if "attention_mask" in getattr(processor, "model_input_names", ()):
            extra = {"padding": True, "return_attention_mask": True}
        inputs = dict(processor(batch, sampling_rate=rate, return_tensors="pt", **extra))
        if "is_longer" in inputs:
            # It also calls one sound of every batch "longer", at random.
            inputs["is_longer"] = torch.zeros_like(torch.as_tensor(inputs["is_longer"]))
        return inputs

    def _token_mask(self, tokens: int, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        mask = inputs.get("attention_mask")
        if mask is None:
            return None
        if hasattr(self._model, "_get_feature_vector_attention_mask"):
            return self._model._get_feature_vector_attention_mask(tokens, mask).bool()
        return mask.bool() if mask.shape[1] == tokens else None


class PretrainedVideos(PretrainedEncoder):
    """X-CLIP and video backbones; image models (CLIP, SigLIP, DINOv2) frame by frame, averaged."""

    modality = Modality.VIDEO

    def __init__(
        self, path: str, frames: int, limits: LimitSettings, device: str = "cpu", sampling: Sampling = "uniform"
    ) -> None:
        from transformers import AutoImageProcessor

        self._frames = frames
        super().__init__(path, AutoImageProcessor, device, frames, *sampled(sampling))
        self.decoder = guarded(VideoDecoder(limits, frames, sampling=sampling))

    def _find_getter(self) -> str | None:
        config = getattr(self._model.config, "vision_config", self._model.config)
        trained = getattr(config, "num_frames", None)
        self._frame_by_frame = trained is None
        if trained is not None and trained != self._frames:
            raise SettingsError(
                f"encoders.video.frames is {self._frames}, the model takes {trained}",
                where="encoders.video",
                remedy=f"Set encoders.video.frames: {trained}.",
            )
        names = ("get_image_features",) if self._frame_by_frame else ("get_video_features",)
        return next((name for name in names if hasattr(self._model, name)), None)

    def _blank(self) -> np.ndarray:
        return np.zeros((self._frames, 64, 64, 3), np.uint8)

    def _inputs(self, batch: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        frames = [Image.fromarray(frame) for clip in batch for frame in clip]
        pixels = self._processor(images=frames, return_tensors="pt")["pixel_values"]
        if not self._frame_by_frame:
            # Video processors give (1, n * frames, ...) for one list of frames, image processors (n * frames, ...).
            pixels = pixels.reshape(len(batch), self._frames, *pixels.shape[-3:])
        return {"pixel_values": pixels}

    def _features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        features = super()._features(inputs)
        if not self._frame_by_frame:
            return features
        unit = torch.nn.functional.normalize(features.float(), dim=-1)
        return unit.reshape(-1, self._frames, features.shape[-1]).mean(1)
