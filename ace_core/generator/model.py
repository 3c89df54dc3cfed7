"""The generator: reads a query, spells identifiers.

Three facts make it spell where the query points instead of what it remembers. Its heads *start as the codebooks*:

    logits_l = scale_l * (q' + delta_l) · C_l'      q' = refine(query),  delta_l from the decoder, both zero at first

so that before any training the sum of log-probabilities of an identifier is scale * q · x̂ less a constant, and
spelling equals exact search over the rebuilt items. Its decoder reads *codewords* (vectors of the shared space), not
learned token embeddings, so that an identifier never seen in training means what its parts mean. And q' is trained
against items, not tokens, which carries over to items that nobody captioned.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from ace_core.config import GeneratorSettings
from ace_core.errors import StoreError
from ace_core.generator.attention import KeysValues
from ace_core.generator.decoder import DecoderLayer, DecoderState, Reading
from ace_core.generator.fusion import CoarseToFineFusion
from ace_core.items import MODALITIES
from ace_core.quantize.quantizer import Quantizer
from ace_core.query import QueryBatch
from ace_core.scoring import Codewords
from ace_core.space import unit_query

_START_SCALE = 20.0


class Generator(nn.Module):
    """Encoder-decoder over frozen text features and frozen codebooks.

    Args:
        settings: width, layers, fusion switches.
        quantizer: its codewords become the heads and the decoder's inputs (as buffers, saved with the model).
        text_width: width E of the text encoder's token features.
        text_layers: number S of text-encoder layers that are fused.
    """

    def __init__(self, settings: GeneratorSettings, quantizer: Quantizer, text_width: int, text_layers: int) -> None:
        super().__init__()
        tables = [torch.from_numpy(quantizer.codewords(level).copy()) for level in range(quantizer.levels)]
        self._build(settings, tables, text_width, text_layers)

    def _build(
        self, settings: GeneratorSettings, tables: list[torch.Tensor], text_width: int, text_layers: int
    ) -> None:
        self.settings, self.text_width, self.text_layers = settings, text_width, text_layers
        self.levels, self.dim = len(tables), tables[0].shape[1]
        self.vocab_sizes = tuple(len(t) for t in tables)
        width = settings.width
        self._codewords = nn.ParameterList(nn.Parameter(t.float(), requires_grad=False) for t in tables)

        self._read_tokens = nn.ModuleList(nn.Linear(text_width, width) for _ in range(text_layers))
        self._read_vector = nn.Linear(self.dim, width)
        self._memory_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(text_layers))
        self._blend = nn.Linear(text_layers * width, width) if settings.coarse_fusion else None

        self._refine_query = nn.Parameter(torch.randn(width) * 0.02)
        self._refine_read = CoarseToFineFusion(
            width, settings.heads, settings.dropout, text_layers,
            coarse=settings.coarse_fusion, fine=settings.fine_fusion,
        )  # fmt: skip
        self._refine_norm = nn.LayerNorm(width)
        self._refine_feed = nn.Sequential(
            nn.Linear(width + self.dim, 2 * width), nn.GELU(), nn.Dropout(settings.dropout)
        )
        self._refine_out = nn.Linear(2 * width, self.dim)

        self.refinement: torch.Tensor  # share of the learned correction, by the modality asked for; set on validation
        self.register_buffer("refinement", torch.ones(len(MODALITIES)))

        self._input = nn.Linear(self.dim, width)
        self._positions = nn.Parameter(torch.randn(self.levels - 1, width) * 0.02)
        self._layers = nn.ModuleList(DecoderLayer(settings, text_layers) for _ in range(settings.layers))
        self._final_norm = nn.LayerNorm(width)
        self._deltas = nn.ModuleList(nn.Linear(width, self.dim - 1) for _ in range(self.levels - 1))
        self._modality = nn.Linear(self.dim, len(MODALITIES))
        self.log_scales = nn.Parameter(torch.full((self.levels,), math.log(_START_SCALE)))
        self._log_item_scale = nn.Parameter(torch.tensor(math.log(_START_SCALE)))
        for zero in (self._refine_out, self._modality, *self._deltas):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    @property
    def _decoder(self) -> list[DecoderLayer]:
        return cast(list[DecoderLayer], list(self._layers))

    # -- reading the query ------------------------------------------------------------------------------------------

    def _memories(self, query: QueryBatch) -> tuple[torch.Tensor | None, list[torch.Tensor], torch.Tensor]:
        """Z, the memories E_1..E_S (n, t, width) and the mask (n, 1, 1, t).

        The query's vector is each memory's first position, so that a virtual query, which has no tokens, is read the
        same way.
        """
        first = self._read_vector(query.vector * math.sqrt(self.dim))[:, None]
        mask = torch.ones(len(query), 1, dtype=torch.bool, device=query.vector.device)
        if query.hidden is None or query.mask is None:
            memories = [norm(first) for norm in self._memory_norms]
        else:
            found = query.hidden.shape[1]
            if found != self.text_layers:
                raise StoreError(
                    f"the generator reads {self.text_layers} text-encoder layers, the query has {found}",
                    where="encoders.text.fusion_layers",
                    remedy="Use the text encoder settings that the generator was fitted with.",
                )
            hidden = query.hidden.to(first.dtype)
            memories = [
                norm(torch.cat((first, read(hidden[:, i])), 1))
                for i, (read, norm) in enumerate(zip(self._read_tokens, self._memory_norms))
            ]
            mask = torch.cat((mask, query.mask), 1)
        z = None if self._blend is None else self._blend(torch.cat(memories, -1))
        return z, memories, mask[:, None, None]

    def _correction(
        self, query: QueryBatch, z: torch.Tensor | None, memories: list[torch.Tensor], mask: torch.Tensor
    ) -> torch.Tensor:
        y = self._refine_query.expand(len(query), 1, -1)
        read = self._refine_norm(y + self._refine_read(y, self._refine_read.project(z, memories), mask)).squeeze(1)
        hidden = self._refine_feed(torch.cat((read, query.vector * math.sqrt(self.dim)), -1))
        return self._refine_out(hidden)

    def correction(self, query: QueryBatch) -> torch.Tensor:
        """What training would add to the queries, (n, D): of it, ``refinement`` is added."""
        return self._correction(query, *self._memories(query))

    def _share(self, vector: torch.Tensor) -> torch.Tensor:
        """(n, 1): the mean of ``refinement`` under what the queries say of the modality that they ask for."""
        with torch.no_grad():
            return self._modality_logits(vector).softmax(-1) @ self.refinement[:, None]

    def refine(self, query: QueryBatch) -> torch.Tensor:
        """The refined query q' (n, D) float32, L2-normalised and then a 1: what similarities are measured with."""
        return self.read(query).vector

    # -- heads ------------------------------------------------------------------------------------------------------

    def _modality_logits(self, vector: torch.Tensor) -> torch.Tensor:
        return self.log_scales[0].exp() * vector @ self._codewords[0].T + self._modality(vector * math.sqrt(self.dim))

    def _level_logits(self, vector: torch.Tensor, level: int) -> torch.Tensor:
        return self.log_scales[level].exp() * (vector.float() @ self._codewords[level].T)

    def _steered(self, vector: torch.Tensor, state: torch.Tensor, level: int) -> torch.Tensor:
        """q' + delta_level of decoder states; the popularity coordinate stays what it is.

        In a search the decoder's delta is shrunk (``generator.steering``): a delta of half its size spells like the
        geometric mean of decoder and heads, and the heads know no item by heart.
        """
        delta = self._deltas[level - 1](state)
        if not self.training:
            delta = self.settings.steering * delta
        return vector + F.pad(delta, (0, 1))

    @property
    def item_scale(self) -> torch.Tensor:
        """The inverse temperature of similarities q' · x."""
        return self._log_item_scale.exp()

    def one_shot(self, query: QueryBatch) -> list[torch.Tensor]:
        """Log-probabilities (n, V_l) of every level's tokens at once, from q' alone.

        All levels share one scale, so that their sum over an identifier ranks items as q' · x̂ does.
        """
        vector = self.refine(query)
        return self.one_shot_of(vector)

    def one_shot_of(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """:meth:`one_shot` of refined queries (n, D); without gradients and on a CPU in 8-bit codewords."""
        if vector.device.type == "cpu" and not torch.is_grad_enabled():
            products = torch.from_numpy(self._short_codewords.products(vector.float().contiguous().numpy()))
        else:
            products = vector @ torch.cat(list(self._codewords)[1:]).T
        sizes = self.vocab_sizes[1:]
        logits = (self.item_scale * products).split(sizes, 1)
        if len(set(sizes)) == 1:
            levels = F.log_softmax(torch.stack(logits, 1), -1).unbind(1)
        else:
            levels = tuple(F.log_softmax(t, -1) for t in logits)
        return [F.log_softmax(self._modality_logits(vector), -1), *levels]

    @cached_property
    def _short_codewords(self) -> Codewords:
        return Codewords([table.detach().cpu().numpy() for table in list(self._codewords)[1:]])

    @cached_property
    def _codeword_sizes(self) -> list[float]:
        """The root mean square of each level's codewords."""
        return [max(float(t.square().mean().sqrt()), 1e-6) for t in self._codewords]

    # -- spelling ---------------------------------------------------------------------------------------------------

    def _inputs(self, codes: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Decoder inputs (n, p, width) of tokens at levels first..first+p-1: their codewords, scaled to unit size."""
        tables = [self._codewords[first + i] for i in range(codes.shape[1])]
        sizes = self._codeword_sizes[first : first + codes.shape[1]]
        words = torch.stack([t[codes[:, i]] / size for i, (t, size) in enumerate(zip(tables, sizes))], 1)
        return self._input(words) + self._positions[first : first + codes.shape[1]]

    def forward(self, query: QueryBatch, codes: torch.Tensor) -> list[torch.Tensor]:
        """Teacher-forced logits.

        Args:
            query: n queries.
            codes: (n, levels) int64 identifiers; the last level is not read.

        Returns:
            Logits of every level, (n, V_l) each, the modality's first. Level l has seen the tokens before l.
        """
        return self.spell(self.read(query), codes)

    def read(self, query: QueryBatch) -> Reading:
        """Read queries, once for any number of :meth:`spell` calls."""
        z, memories, mask = self._memories(query)
        correction = self._correction(query, z, memories, mask)
        vector = unit_query(query.vector + self._share(query.vector) * correction)
        return Reading(vector, z, tuple(memories), mask)

    def spell(self, reading: Reading, codes: torch.Tensor) -> list[torch.Tensor]:
        """:meth:`forward` of queries that were read already."""
        y = self._inputs(codes[:, :-1])
        for layer in self._decoder:
            kept = layer.fusion.project(reading.z, list(reading.memories))
            y = layer(y, layer.own_keys_values(y), kept, reading.mask, 1)
        y = self._final_norm(y)
        vector = reading.vector
        levels = [self._level_logits(self._steered(vector, y[:, i], i + 1), i + 1) for i in range(self.levels - 1)]
        return [self._modality_logits(vector), *levels]

    def start(self, query: QueryBatch) -> DecoderState:
        """Read queries: everything that does not depend on what is spelled is computed here, once."""
        return self.start_of(self.read(query))

    def start_of(self, reading: Reading) -> DecoderState:
        """:meth:`start` with queries that were read already."""
        kept = tuple(layer.fusion.project(reading.z, list(reading.memories)) for layer in self._decoder)
        modality = F.log_softmax(self._modality_logits(reading.vector), -1)
        return DecoderState(reading.vector, modality, kept, reading.mask)

    def step(
        self, state: DecoderState, tokens: torch.Tensor, parents: torch.Tensor | None, level: int
    ) -> tuple[torch.Tensor, DecoderState]:
        """Spell one more token of every beam row.

        Args:
            tokens: (n, B) int64, each row's token at ``level - 1``.
            parents: (n, B) int64, the previous beam row that each row continues; None where rows kept their place
                (and at level 1).
            level: 1..levels-1, the level to score.

        Returns:
            Log-probabilities (n, B, V_level) over all of the level's tokens, and the next state.
        """
        n, beams = tokens.shape
        y, kept = self._decode(state, tokens[..., None], parents, level)
        logits = self._level_logits(self._steered(state.vector[:, None], y.view(n, beams, -1), level), level)
        return F.log_softmax(logits, -1), replace(state, past=kept)

    def score(
        self, state: DecoderState, tokens: torch.Tensor, parents: torch.Tensor | None, level: int
    ) -> torch.Tensor:
        """Log-probabilities of given tokens, several levels in one pass.

        Args:
            tokens: (n, R, m + 1) int64 at levels ``level - 1 .. level + m - 1``; the first is read, the others scored.
            parents: (n, R) int64, the previous beam row that each row continues, as in :meth:`step`.

        Returns:
            (n, R, m), what :meth:`step` would have said of each token. ``state`` is left as it was.
        """
        n, rows, given = tokens.shape
        y, _ = self._decode(state, tokens[..., :-1], parents, level)
        y = y.view(n, rows, given - 1, -1)
        scored = []
        for i in range(given - 1):
            logits = self._level_logits(self._steered(state.vector[:, None], y[:, :, i], level + i), level + i)
            scored.append(F.log_softmax(logits, -1).gather(2, tokens[..., i + 1 : i + 2]))
        return torch.cat(scored, 2)

    def _decode(
        self, state: DecoderState, tokens: torch.Tensor, parents: torch.Tensor | None, level: int
    ) -> tuple[torch.Tensor, tuple[KeysValues, ...]]:
        """Decoder states (n * B, m, width) of tokens (n, B, m) at ``level - 1`` and on, and every layer's cache."""
        n, beams, length = tokens.shape
        y = self._inputs(tokens.reshape(-1, length), level - 1)
        past = state.past
        if past and parents is not None:
            before = past[0].keys.shape[0] // n
            rows = (parents + before * torch.arange(n, device=parents.device)[:, None]).reshape(-1)
            past = tuple(p.select(rows) for p in past)
        kept = []
        for i, layer in enumerate(self._decoder):
            own = layer.own_keys_values(y)
            own = past[i].append(own) if past else own
            kept.append(own)
            y = layer(y, own, state.memory[i], state.mask, beams)
        return self._final_norm(y), tuple(kept)

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write ``generator.safetensors`` and ``generator.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.contiguous().cpu() for k, v in self.state_dict().items()}
        save_file(state, str(folder / "generator.safetensors"))
        shape = {
            "settings": self.settings.model_dump(mode="json"),
            "text_width": self.text_width,
            "text_layers": self.text_layers,
        }
        (folder / "generator.json").write_text(json.dumps(shape, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Generator:
        """Read what :meth:`save` wrote, in evaluation mode.

        Raises:
            StoreError: a file is missing or does not fit.
        """
        try:
            shape = json.loads((folder / "generator.json").read_text())
            state = load_file(str(folder / "generator.safetensors"))
            tables = [state[f"_codewords.{i}"] for i in range(sum(k.startswith("_codewords.") for k in state))]
            model = cls.__new__(cls)
            nn.Module.__init__(model)
            settings = GeneratorSettings.model_validate(shape["settings"])
            model._build(settings, tables, shape["text_width"], shape["text_layers"])
            state["refinement"] = state["refinement"].expand(len(MODALITIES))  # once, one share served all modalities
            model.load_state_dict(state)
        except (OSError, KeyError, IndexError, ValueError, RuntimeError) as e:
            raise StoreError(
                f"cannot read the generator ({e})", where=folder, remedy="Fit the generator again."
            ) from None
        return model.eval()
