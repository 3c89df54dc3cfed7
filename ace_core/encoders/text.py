"""Text encoders: any transformers text model, and the text towers of CLIP, SigLIP, CLAP and X-CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ace_core.config import TextEncoderSettings
from ace_core.encoders.bert import LeanBert
from ace_core.encoders.checkpoints import MEDIA_PARTS, drop_parts, load_checkpoint, pooled_output
from ace_core.encoders.packed import pack_linears
from ace_core.encoders.protocol import identity_of
from ace_core.encoders.text_batches import BatchedText, check_layers, mean_of_tokens
from ace_core.errors import ModelError


class TransformersText(BatchedText):
    """A text model of transformers behind the ``TextEncoder`` protocol.

    A dual encoder (one with ``get_text_features``) gives its projected text vector; any other model the mean of its
    last layer's token features, which is what all-MiniLM and most sentence encoders are trained for.
    """

    def __init__(self, path: str, settings: TextEncoderSettings, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        model, self._tokenizer = load_checkpoint(path, AutoModel, AutoTokenizer, setting="encoders.text.path")
        self._dual = hasattr(model, "get_text_features")
        if self._dual:
            drop_parts(model, MEDIA_PARTS)
        elif model.config.is_encoder_decoder:
            model = model.get_encoder()
        config = getattr(model.config, "text_config", model.config)
        depth = int(getattr(config, "num_hidden_layers", 0) or getattr(config, "num_layers", 0))
        check_layers(settings.fusion_layers, depth, path)
        context = min(int(self._tokenizer.model_max_length), getattr(config, "max_position_embeddings", 1 << 30))
        self._max_tokens = min(settings.max_tokens, context)
        self.identity = identity_of(model.state_dict(), "text", self._max_tokens, settings.fusion_layers)
        model = model.to(device)
        known = model.config.to_dict()
        self._lean = LeanBert(model.state_dict(), known) if not self._dual and LeanBert.fits(known) else None
        self._model = None if self._lean else model
        if self._lean is None:
            pack_linears(model)
        # SigLIP is trained on texts padded to its full context, and has no attention mask.
        self._masked = not config.model_type.startswith("siglip")
        super().__init__(
            layers=settings.fusion_layers,
            device=device,
            pad=self._tokenizer.pad_token_id or 0,
            fixed_length=None if self._masked else context,
        )

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        rows: list[list[int]] = self._tokenizer(texts, truncation=True, max_length=self._max_tokens)["input_ids"]
        return rows

    def _states(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        if self._lean is not None:
            states = self._lean(ids, mask)
            return mean_of_tokens(states[-1], mask), states
        inputs: dict[str, Any] = {"input_ids": ids, "output_hidden_states": True}
        if self._masked:
            inputs["attention_mask"] = mask
        assert self._model is not None
        output = self._model.get_text_features(**inputs) if self._dual else self._model(**inputs)
        if output.hidden_states is None:
            raise ModelError("the text model gives no hidden states", where=type(self._model).__name__)
        pooled = pooled_output(output) if self._dual else mean_of_tokens(output.last_hidden_state, mask)
        return pooled, output.hidden_states
