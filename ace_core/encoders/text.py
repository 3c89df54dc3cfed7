"""Text encoders: any transformers text model, and the text towers of CLIP, SigLIP, CLAP and X-CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ace_core.config import TextEncoderSettings
from ace_core.encoders.bert import LeanBert, lean_bert
from ace_core.encoders.checkpoints import MEDIA_PARTS, drop_parts, load_checkpoint, pooled_output
from ace_core.encoders.packed import pack_linears
from ace_core.encoders.protocol import identity_of
from ace_core.encoders.text_batches import BatchedText, check_layers, mean_of_tokens
from ace_core.errors import ModelError


@dataclass(frozen=True)
class TextModel:
    """A checkpoint of transformers opened as a text encoder.

    Attributes:
        whole: the model as it was loaded, all its towers.
        tower: what reads text: ``whole``, or the encoder of an encoder and decoder.
        dual: whether it gives a projected text vector (``get_text_features``).
        depth: number of layers.
        context: tokens that it can read.
        fixed: whether every text is filled up to ``context`` and there is no attention mask: SigLIP is trained so.
    """

    whole: Any
    tower: Any
    tokenizer: Any
    dual: bool
    depth: int
    context: int
    fixed: bool

    @classmethod
    def open(cls, path: str) -> TextModel:
        """Open a local folder or a hub name.

        Raises:
            ModelError: it cannot be had.
        """
        from transformers import AutoModel, AutoTokenizer

        model, tokenizer = load_checkpoint(path, AutoModel, AutoTokenizer, setting="encoders.text.path")
        dual = hasattr(model, "get_text_features")
        tower = model.get_encoder() if not dual and model.config.is_encoder_decoder else model
        config = getattr(tower.config, "text_config", tower.config)
        depth = int(getattr(config, "num_hidden_layers", 0) or getattr(config, "num_layers", 0))
        context = min(int(tokenizer.model_max_length), getattr(config, "max_position_embeddings", 1 << 30))
        return cls(model, tower, tokenizer, dual, depth, context, config.model_type.startswith("siglip"))

    @property
    def pad(self) -> int:
        return self.tokenizer.pad_token_id or 0

    def tokens(self, texts: list[str], longest: int) -> list[list[int]]:
        """Token ids of each text, cut at ``longest``."""
        rows: list[list[int]] = self.tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
        return rows

    def states(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Pooled vectors (n, E_p) and hidden states (n, t, E) of the layers, lowest first, of padded tokens (n, t): a
        dual encoder's own text vector, or the mean of the last layer's token features, which is what all-MiniLM and
        most sentence encoders are trained for."""
        inputs: dict[str, Any] = {"input_ids": ids, "output_hidden_states": True}
        if not self.fixed:
            inputs["attention_mask"] = mask
        output = self.tower.get_text_features(**inputs) if self.dual else self.tower(**inputs)
        if output.hidden_states is None:
            raise ModelError("the text model gives no hidden states", where=type(self.tower).__name__)
        pooled = pooled_output(output) if self.dual else mean_of_tokens(output.last_hidden_state, mask)
        return pooled, output.hidden_states


class TransformersText(BatchedText):
    """A frozen text model of transformers behind the ``TextEncoder`` protocol."""

    def __init__(self, path: str, settings: TextEncoderSettings, device: str = "cpu") -> None:
        model = TextModel.open(path)
        if model.dual:
            drop_parts(model.tower, MEDIA_PARTS)
        check_layers(settings.fusion_layers, model.depth, path)
        self._max_tokens = min(settings.max_tokens, model.context)
        self.identity = identity_of(model.tower.state_dict(), "text", self._max_tokens, settings.fusion_layers)
        tower = model.tower.to(device)
        known = tower.config.to_dict()
        self._lean = lean_bert(tower.state_dict(), known) if not model.dual and LeanBert.fits(known) else None
        if self._lean is None:
            pack_linears(tower)
        # what is not used goes: another tower's weights, those that the lean form has a copy of
        self._opened = replace(model, whole=None, tower=None if self._lean else tower)
        super().__init__(
            layers=settings.fusion_layers,
            device=device,
            pad=model.pad,
            fixed_length=model.context if model.fixed else None,
        )

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return self._opened.tokens(texts, self._max_tokens)

    def _read(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._lean is not None:
            return self._lean(ids, mask, self.layers)
        pooled, states = self._opened.states(ids, mask)
        return F.normalize(pooled.float(), dim=-1), torch.stack(list(states[-self.layers :]), dim=1)
