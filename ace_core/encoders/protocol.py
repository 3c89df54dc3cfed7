"""What every encoder offers: one protocol for media, one for text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ace_core.items import Modality
from ace_core.manifest import fingerprint
from ace_core.media.decoders import Decoder
from ace_core.media.isolate import IsolatedDecoder

if TYPE_CHECKING:  # sounds can be encoded without, and it takes longer to load than hundreds of them
    import torch


@dataclass(frozen=True)
class TextFeatures:
    """n texts as a frozen text encoder sees them; CPU tensors that may take part in a training step.

    Attributes:
        pooled: (n, E_p) float32, L2-normalised.
        hidden: (n, S, T, E) float32, token features of the last S layers, lowest first; zero at padding.
        mask: (n, T) bool, True at real tokens (each text has one at least).
    """

    pooled: torch.Tensor
    hidden: torch.Tensor
    mask: torch.Tensor

    def __len__(self) -> int:
        return self.pooled.shape[0]


class TextEncoder(Protocol):
    """A frozen text encoder.

    Attributes:
        dim: width E_p of the pooled vector.
        width: width E of the token features.
        layers: number S of layers whose token features are given.
        identity: hash of the weights and of every setting that changes a vector.
    """

    @property
    def dim(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def identity(self) -> str: ...

    def encode(self, texts: Sequence[str]) -> TextFeatures: ...


class MediaEncoder(Protocol):
    """A frozen encoder of one modality.

    Attributes:
        modality: what it encodes.
        dim: width d_m of its vectors.
        identity: hash of the weights and of every setting that changes a vector.
        shares_text_space: whether its vectors can be compared with those of its own text tower.
        decoder: makes an input of ``encode`` of a file, or of its part from .. to .. seconds (pictures have no parts);
            raises MediaError where it cannot.
    """

    @property
    def modality(self) -> Modality: ...
    @property
    def dim(self) -> int: ...
    @property
    def identity(self) -> str: ...
    @property
    def shares_text_space(self) -> bool: ...
    @property
    def decoder(self) -> Decoder | IsolatedDecoder: ...

    def encode(self, batch: Sequence[Any]) -> np.ndarray:
        """(n, d_m) float32, L2-normalised, of n inputs."""
        ...


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length, float32; a zero row stays zero."""
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def precision(device: str) -> torch.dtype:
    """bfloat16 on a GPU, float32 on the CPU."""
    import torch

    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def sampled(sampling: str) -> tuple[str, ...]:
    """What the sampling of frames adds to an encoder's identity."""
    return () if sampling == "uniform" else (sampling,)


def identity_of(weights: Mapping[str, torch.Tensor], *settings: Any) -> str:
    """Twelve hex digits that change with any weight or any of ``settings`` (which must be JSON)."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return fingerprint(digest.hexdigest(), *settings)
