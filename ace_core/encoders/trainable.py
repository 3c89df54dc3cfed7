"""A text encoder whose last layers, or all of it, are trained: the same model, tokens and pooling as the frozen one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from ace_core.config import TextEncoderSettings
from ace_core.encoders.text import TextModel
from ace_core.errors import SettingsError

BATCH = 128


class TrainableText(nn.Module):
    """Token rows -> pooled vectors, with gradients for the trained part.

    Trained are the last ``layers`` layers and what follows them (norms, projection), with "all" the embeddings and all
    layers; other towers of the model never.

    Args:
        path: local folder or hub name of the model.
        layers: how many of the last layers are trained.

    Raises:
        ModelError: its files cannot be had.
        SettingsError: it has fewer layers.
    """

    def __init__(self, path: str, settings: TextEncoderSettings, layers: int | Literal["all"]) -> None:
        super().__init__()
        self._model = TextModel.open(path)
        self.tower: nn.Module = self._model.tower  # its parameters are this module's
        if layers != "all" and layers > self._model.depth:
            raise SettingsError(
                f"text_tuning.layers is {layers}, the model has {self._model.depth} layers",
                where=path,
                remedy=f"Set it to {self._model.depth} or less, or to all.",
            )
        self._longest = min(settings.max_tokens, self._model.context)
        wanted = set(self._trained(layers))
        for parameter in self._model.whole.parameters():
            parameter.requires_grad_(parameter in wanted)

    def _trained(self, layers: int | Literal["all"]) -> list[nn.Parameter]:
        reading = [self.tower]
        if self._model.dual:
            reading = [getattr(self.tower, n) for n in ("text_model", "text_projection") if hasattr(self.tower, n)]
        found = [parameter for part in reading for parameter in part.parameters()]
        if layers == "all":
            return found
        below: set[nn.Parameter] = set()
        for module in (module for part in reading for module in part.modules()):
            if isinstance(module, nn.Embedding) or type(module).__name__.endswith("Embeddings"):
                below.update(module.parameters())
            elif isinstance(module, nn.ModuleList) and len(module) == self._model.depth:
                below.update(p for layer in module[: self._model.depth - layers] for p in layer.parameters())
        return [parameter for parameter in found if parameter not in below]

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        return self._model.tokens(list(texts), self._longest)

    def forward(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Pooled vectors (n, E_p) float32, L2-normalised, of token rows: computed in batches of similar length."""
        device = next(self.tower.parameters()).device
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        parts = []
        for first in range(0, len(order), BATCH):
            batch = [list(rows[i]) for i in order[first : first + BATCH]]
            longest = self._model.context if self._model.fixed else max(1, max(map(len, batch)))
            ids = torch.tensor([r + [self._model.pad] * (longest - len(r)) for r in batch], device=device)
            mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in batch], device=device)
            parts.append(self._model.states(ids, mask)[0].float())
        back = torch.argsort(torch.tensor(order))
        return F.normalize(torch.cat(parts)[back.to(device)], dim=-1)

    def save(self, folder: Path) -> None:
        """Write an ordinary checkpoint of transformers with its tokenizer."""
        with _silent():
            self._model.whole.save_pretrained(folder)
            self._model.tokenizer.save_pretrained(folder)


@contextmanager
def _silent() -> Iterator[None]:
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()
