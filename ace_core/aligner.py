"""The aligner: one projection head for text and one for each modality, into a space that they share.

It is trained with InfoNCE (van den Oord et al. 2018, as in CLIP: Radford et al. 2021) on captions, over frozen
features, and is at the same time the dual tower that evaluations compare with. Two things differ from the textbook
loss, because real corpora repeat themselves: pairs of a batch that share a text or an item are positives of each
other, and never each other's negatives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from ace_core.collective import Collective, LocalCollective, average_gradients, broadcast_parameters, share
from ace_core.config import AlignerSettings
from ace_core.errors import CorpusError, StoreError
from ace_core.fitting import FitHooks, Progress, generator_for, warmup_cosine
from ace_core.items import MODALITIES, Modality

_MAX_SCALE = 100.0


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
        self._text = _Head(text_width, settings.dim, settings.hidden, settings.dropout)
        self._items = nn.ModuleDict(
            {m.value: _Head(w, settings.dim, settings.hidden, settings.dropout) for m, w in self.item_widths.items()}
        )
        self.log_scale = nn.Parameter(torch.tensor(float(np.log(1 / 0.07))))

    @property
    def dim(self) -> int:
        return self.settings.dim

    @property
    def scale(self) -> float:
        """The learned inverse temperature: logits are ``scale * cosine``."""
        return float(self.log_scale.detach().exp().clamp(max=_MAX_SCALE))

    def text(self, pooled: torch.Tensor) -> torch.Tensor:
        """Pooled text features (n, E_p) -> query vectors (n, D) float32, L2-normalised."""
        return F.normalize(self._text(F.normalize(pooled.float(), dim=-1)), dim=-1)

    def item(self, modality: Modality, raw: torch.Tensor) -> torch.Tensor:
        """Raw features of one modality (n, d_m) -> item vectors (n, D) float32, L2-normalised.

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

    @torch.inference_mode()
    def item_vectors(self, features: Mapping[Modality, np.ndarray], batch: int = 8192) -> np.ndarray:
        """All items' vectors (N, D) float32, modalities concatenated in ``MODALITIES`` order."""
        was_training = self.training
        self.eval()
        parts = [
            self.item(m, torch.from_numpy(np.asarray(features[m][i : i + batch], dtype=np.float32))).numpy()
            for m in MODALITIES
            if m in features
            for i in range(0, len(features[m]), batch)
        ]
        self.train(was_training)
        return np.concatenate(parts) if parts else np.empty((0, self.dim), np.float32)

    @torch.inference_mode()
    def text_vectors(self, pooled: np.ndarray, batch: int = 8192) -> np.ndarray:
        """Query vectors (n, D) float32 of pooled text features (n, E_p)."""
        was_training = self.training
        self.eval()
        parts = [
            self.text(torch.from_numpy(np.asarray(pooled[i : i + batch], dtype=np.float32))).numpy()
            for i in range(0, len(pooled), batch)
        ]
        self.train(was_training)
        return np.concatenate(parts) if parts else np.empty((0, self.dim), np.float32)

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
            aligner.load_state_dict(load_file(str(folder / "aligner.safetensors")))
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


def info_nce(text: torch.Tensor, items: torch.Tensor, scale: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE with several positives.

    Args:
        text, items: (B, D) L2-normalised, row i of each is a pair.
        scale: inverse temperature.
        same: (B, B) bool, True where text i also describes item j (always on the diagonal).
    """
    logits = scale * text @ items.T
    target = same.float()
    return 0.5 * (
        F.cross_entropy(logits, target / target.sum(1, keepdim=True))
        + F.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
    )


def fit_aligner(
    features: Mapping[Modality, np.ndarray],
    pairs: CaptionPairs,
    settings: AlignerSettings,
    *,
    collective: Collective | None = None,
    hooks: FitHooks | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Aligner, dict[str, float]]:
    """Train the heads; every worker returns the same aligner (on CPU) and the last epoch's figures.

    Args:
        features: raw features (n_m, d_m) of each modality, all of the corpus on every worker.
        pairs: captions to train on, all of them on every worker; each worker takes its share of every batch.

    Raises:
        CorpusError: fewer than two captions.
    """
    collective = collective or LocalCollective()
    hooks = hooks or FitHooks()
    present = [m for m in MODALITIES if m in features and len(features[m])]
    if len(pairs) < 2 or not present:
        raise CorpusError(
            f"there are {len(pairs)} captions to train on",
            remedy="The aligner needs captions of at least some items: add a captions file, or use encoders whose "
            "space is shared with text.",
        )
    torch.manual_seed(seed)
    aligner = Aligner(pairs.pooled.shape[1], {m: features[m].shape[1] for m in present}, settings).to(device)
    broadcast_parameters(aligner, collective)
    offsets = dict(zip(present, np.cumsum([0, *(len(features[m]) for m in present)])))
    tables = {m: torch.from_numpy(np.asarray(features[m], np.float32)).to(device) for m in present}
    pooled = torch.from_numpy(np.asarray(pairs.pooled, np.float32)).to(device)
    rows = torch.from_numpy(np.asarray(pairs.rows, np.int64)).to(device)
    _, text_ids = np.unique(pairs.pooled, axis=0, return_inverse=True)
    texts = torch.from_numpy(text_ids.reshape(-1)).to(device)

    optimizer = torch.optim.AdamW(aligner.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    batch = min(settings.batch_size, len(pairs))
    steps = max(1, len(pairs) // batch)
    total = steps * settings.epochs
    metrics: dict[str, float] = {}
    aligner.train()
    for epoch in range(settings.epochs):
        order = torch.randperm(len(pairs), generator=generator_for(seed, epoch)).to(device)
        losses = []
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * warmup_cosine(epoch * steps + step, total)
            chosen = order[step * batch : (step + 1) * batch][share(batch, collective)]
            items = _item_batch(aligner, tables, offsets, rows[chosen])
            same = (texts[chosen][:, None] == texts[chosen]) | (rows[chosen][:, None] == rows[chosen])
            loss = info_nce(aligner.text(pooled[chosen]), items, aligner.log_scale.exp().clamp(max=_MAX_SCALE), same)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(aligner.parameters(), collective)
            optimizer.step()
            losses.append(loss.detach())
        metrics = {"loss": float(torch.stack(losses).mean()), "scale": aligner.scale}
        hooks.on_progress(Progress("aligner", (epoch + 1) * steps, total, metrics))
    return aligner.cpu().eval(), metrics


def _item_batch(
    aligner: Aligner, tables: dict[Modality, torch.Tensor], offsets: dict[Modality, int], rows: torch.Tensor
) -> torch.Tensor:
    """Vectors (B, D) of items given by corpus row, each through the head of its modality."""
    out = torch.empty(len(rows), aligner.dim, device=rows.device)
    for modality, table in tables.items():
        local = rows - int(offsets[modality])
        mine = (local >= 0) & (local < len(table))
        if bool(mine.any()):
            out = out.index_put((mine.nonzero().squeeze(1),), aligner.item(modality, table[local[mine]]))
    return out
