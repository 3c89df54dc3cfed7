"""The aligner: heads that take text and every modality into one space, where similarity is fair to every item.

*Heads.* One projection head for text and one for each modality, trained with InfoNCE (van den Oord et al. 2018, as in
CLIP: Radford et al. 2021) on captions over frozen features. Real corpora repeat themselves: pairs of a batch that
share a text or an item are positives of each other, never each other's negatives. Heads alone, with exact search,
are the dual tower that evaluations compare with (:meth:`Aligner.tower_text`, :meth:`Aligner.tower_items`).

*Caption memory.* What an item's captions say is content of the index: the vector of a captioned item leans towards
its captions' mean.

*Popularity.* Some items attract every query (hubs), and captioned items attract more than those that nobody
captioned; left alone, the unseen part of a corpus is never found. An item's popularity is the mean similarity of the
nearest 1/64 of a bank of queries (CSLS, Conneau et al. 2018; QB-Norm, Bogolin et al. 2022), plus an offset for
captioned items. How much of all this a modality's items get, validation queries choose
(:mod:`ace_core.corrections`). It is kept as one more coordinate:

    item = [x ; -popularity]      query = [q ; 1]      query · item = q · x - popularity

so identifiers, heads, beams, 8-bit vectors and plain inner products all carry the correction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from ace_core.config import AlignerSettings
from ace_core.errors import StoreError
from ace_core.items import MODALITIES, Modality
from ace_core.popularity import Bank
from ace_core.space import unit_query

MAX_SCALE = 100.0


class _Head(nn.Module):
    """A linear map plus (``hidden`` > 0) a two-layer branch; the sum is L2-normalised by the caller."""

    def __init__(self, width: int, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.linear = nn.Linear(width, dim)
        self.branch = (
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim))
            if hidden
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(x)
        return self.linear(x) if self.branch is None else self.linear(x) + self.branch(x)


class Aligner(nn.Module):
    """Projection heads into the shared space.

    Args:
        text_width: width of the pooled text features.
        item_widths: raw feature width of each modality that the corpus has.
        settings: the space and the heads.
    """

    def __init__(self, text_width: int, item_widths: Mapping[Modality, int], settings: AlignerSettings) -> None:
        super().__init__()
        self.settings = settings
        self.text_width = text_width
        self.item_widths = {Modality(m): int(w) for m, w in item_widths.items()}
        shape = (settings.dim - 1, settings.hidden, settings.dropout)
        self._text = _Head(text_width, *shape)
        self._items = nn.ModuleDict({m.value: _Head(w, *shape) for m, w in self.item_widths.items()})
        self.log_scale = nn.Parameter(torch.tensor(float(np.log(1 / 0.07))))
        self.bank: torch.Tensor
        self.memory_weight: torch.Tensor  # these four: (3,), by modality token; set on validation queries
        self.popularity_weight: torch.Tensor
        self.offset: torch.Tensor
        self.centre: torch.Tensor
        self.register_buffer("bank", torch.zeros(0, settings.dim - 1, dtype=torch.float16))
        self.register_buffer("memory_weight", torch.full((len(MODALITIES),), settings.caption_memory))
        self.register_buffer("popularity_weight", torch.full((len(MODALITIES),), settings.popularity))
        self.register_buffer("offset", torch.zeros(len(MODALITIES)))
        self.register_buffer("centre", torch.zeros(len(MODALITIES)))
        self._measured: tuple[torch.Tensor, Bank] | None = None  # the bank, ready to measure with

    @property
    def dim(self) -> int:
        """D: width of query and item vectors, the popularity coordinate included."""
        return self.settings.dim

    @property
    def scale(self) -> float:
        """The learned inverse temperature: logits are ``scale * similarity``."""
        return float(self.log_scale.detach().exp().clamp(max=MAX_SCALE))

    def tower_text(self, pooled: torch.Tensor) -> torch.Tensor:
        """The text head alone: pooled text features (n, E_p) -> (n, D - 1) float32, L2-normalised."""
        return F.normalize(self._text(F.normalize(pooled.float(), dim=-1)), dim=-1)

    def tower_item(self, modality: Modality, raw: torch.Tensor) -> torch.Tensor:
        """A modality's head alone: raw features (n, d_m) -> (n, D - 1) float32, L2-normalised.

        Raises:
            StoreError: the aligner has no head for this modality.
        """
        if modality.value not in self._items:
            known = ", ".join(m.value for m in self.item_widths)
            raise StoreError(
                f"the aligner was fitted without {modality.value} items (it knows {known})",
                remedy="Fit the aligner, the quantizer and the generator again on a corpus that has them.",
            )
        return F.normalize(self._items[modality.value](F.normalize(raw.float(), dim=-1)), dim=-1)

    def text(self, pooled: torch.Tensor) -> torch.Tensor:
        """Pooled text features (n, E_p) -> query vectors (n, D) float32: L2-normalised, then a 1."""
        return unit_query(F.pad(self.tower_text(pooled), (0, 1)))

    def item(self, modality: Modality, raw: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Raw features of one modality -> item vectors (n, D) float32: L2-normalised, then minus the popularity.

        Args:
            raw: (n, d_m).
            memory: (n, D - 1) mean text vector of each item's captions, zero for an item that has none.
        """
        at = modality.token
        x = self.tower_item(modality, raw)
        captioned = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if memory is not None:
            captioned = memory.square().sum(1) > 0
            weight = self.memory_weight[at] * captioned[:, None]
            x = F.normalize((1 - weight) * x + weight * F.normalize(memory, dim=-1), dim=-1)
        popularity = self.offset[at] * captioned
        if len(self.bank) and float(self.popularity_weight[at]):
            popularity = popularity + self.popularity_weight[at] * self._nearest(x) - self.centre[at]
        return torch.cat((x, -popularity[:, None]), 1)

    def _nearest(self, x: torch.Tensor) -> torch.Tensor:
        if self._measured is None or self._measured[0] is not self.bank:
            self._measured = self.bank, Bank(self.bank)
        return self._measured[1].nearest(x)

    @torch.inference_mode()
    def item_vectors(
        self, features: Mapping[Modality, np.ndarray], captions: CaptionPairs | None = None, batch: int = 4096
    ) -> np.ndarray:
        """All items' vectors (N, D) float32, modalities concatenated in ``MODALITIES`` order.

        Args:
            features: raw features (n_m, d_m) of each modality.
            captions: what the index may know of the items: captions with the rows they belong to. Captions that an
                evaluation asks with must not be among them.
        """
        total = sum(len(f) for f in features.values())
        memory = torch.zeros(total, self.dim - 1)
        if captions is not None and len(captions):
            texts = torch.from_numpy(self.text_vectors(captions.pooled)[:, :-1].copy())
            memory.index_add_(0, torch.from_numpy(np.asarray(captions.rows, np.int64)), texts)
        out, start = [np.empty((0, self.dim), np.float32)], 0
        with _evaluating(self):
            for m in MODALITIES:
                raw = features.get(m, np.empty((0, 1)))
                for i in range(0, len(raw), batch):
                    block = torch.from_numpy(np.asarray(raw[i : i + batch], np.float32))
                    out.append(self.item(m, block, memory[start : start + len(block)]).numpy())
                    start += len(block)
        return np.concatenate(out)

    @torch.inference_mode()
    def text_vectors(self, pooled: np.ndarray, batch: int = 8192) -> np.ndarray:
        """Query vectors (n, D) float32 of pooled text features (n, E_p)."""
        with _evaluating(self):
            parts = [
                self.text(torch.from_numpy(np.asarray(pooled[i : i + batch], np.float32))).numpy()
                for i in range(0, len(pooled), batch)
            ]
        return np.concatenate([np.empty((0, self.dim), np.float32), *parts])

    def save(self, folder: Path) -> None:
        """Write ``aligner.safetensors`` and ``aligner.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous().cpu() for k, v in self.state_dict().items()}, str(folder / "aligner.safetensors"))
        shape = {
            "text_width": self.text_width,
            "item_widths": {m.value: w for m, w in self.item_widths.items()},
            "settings": self.settings.model_dump(mode="json"),
        }
        (folder / "aligner.json").write_text(json.dumps(shape, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Aligner:
        """Read what :meth:`save` wrote, in evaluation mode.

        Raises:
            StoreError: a file is missing or does not fit.
        """
        try:
            shape = json.loads((folder / "aligner.json").read_text())
            widths = {Modality(m): w for m, w in shape["item_widths"].items()}
            aligner = cls(shape["text_width"], widths, AlignerSettings.model_validate(shape["settings"]))
            state = load_file(str(folder / "aligner.safetensors"))
            aligner.bank = state["bank"]
            aligner.load_state_dict(state)
        except (OSError, KeyError, ValueError, RuntimeError) as e:
            raise StoreError(f"cannot read the aligner ({e})", where=folder, remedy="Fit the aligner again.") from None
        return aligner.eval()


@dataclass(frozen=True)
class CaptionPairs:
    """Training captions and the items they belong to.

    Attributes:
        pooled: (P, E_p) float, pooled text features, one row a caption.
        rows: (P,) int64, the caption's item as a row of the corpus (modalities concatenated in MODALITIES order).
    """

    pooled: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
