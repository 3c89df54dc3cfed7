"""Contrastive training of the two heads, whatever the text features come from: a table, or an encoder that is trained
as well. Resumable, the same over any number of workers but for rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ace_core.aligner import MAX_SCALE, Aligner
from ace_core.collective import Collective, average_gradients, broadcast_parameters, share
from ace_core.fitting import (
    Checkpoint,
    CheckpointClock,
    FitHooks,
    Progress,
    generator_for,
    pack_optimizer,
    unpack_optimizer,
    warmup_cosine,
)
from ace_core.items import MODALITIES, Modality


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


@dataclass(frozen=True)
class Pairing:
    """What is brought together.

    Attributes:
        features: raw features (n_m, d_m) of each modality, all of the corpus.
        rows: (P,) int64, the item that each caption describes, modalities concatenated in MODALITIES order.
        texts: (P,) int64, equal for captions of equal words.
    """

    features: Mapping[Modality, np.ndarray]
    rows: np.ndarray
    texts: np.ndarray


def train_contrast(
    stage: str,
    module: nn.Module,
    aligner: Aligner,
    pooled: Callable[[torch.Tensor], torch.Tensor],
    pairing: Pairing,
    groups: list[dict[str, Any]],
    *,
    epochs: int,
    batch_size: int,
    collective: Collective,
    hooks: FitHooks,
    seed: int,
    device: torch.device | str,
) -> dict[str, float]:
    """Train in place; every worker ends with the same parameters. Returns the last epoch's figures.

    Args:
        stage: its name in progress.
        module: everything that is trained, the aligner among it.
        pooled: text features (B, E_p) of captions (B,) int64.
        groups: parameters of AdamW with the ``lr`` that the learning-rate curve starts from.
        batch_size: captions of an optimiser step, over all workers.
    """
    broadcast_parameters(module, collective)
    present = [m for m in MODALITIES if m in pairing.features and len(pairing.features[m])]
    starts = dict(zip(present, np.cumsum([0, *(len(pairing.features[m]) for m in present)]).tolist()))
    tables = {m: torch.from_numpy(np.asarray(pairing.features[m], np.float32)).to(device) for m in present}
    rows = torch.from_numpy(np.asarray(pairing.rows, np.int64)).to(device)
    texts = torch.from_numpy(np.asarray(pairing.texts, np.int64)).to(device)
    optimizer = torch.optim.AdamW(groups)
    rates = [group["lr"] for group in groups]
    batch = min(batch_size, len(rows))
    steps = max(1, len(rows) // batch)
    total = steps * epochs
    metrics: dict[str, float] = {}
    done = 0 if hooks.resume is None else _restore(module, optimizer, hooks.resume)
    clock = CheckpointClock(hooks)
    module.train()
    for epoch in range(done // steps, epochs):
        order = torch.randperm(len(rows), generator=generator_for(seed, epoch)).to(device)
        losses = []
        for step in range(done - epoch * steps if epoch == done // steps else 0, steps):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * warmup_cosine(epoch * steps + step, total)
            chosen = order[step * batch : (step + 1) * batch][share(batch, collective)]
            items = _item_batch(aligner, tables, starts, rows[chosen])
            same = (texts[chosen][:, None] == texts[chosen]) | (rows[chosen][:, None] == rows[chosen])
            scale = aligner.log_scale.exp().clamp(max=MAX_SCALE)
            loss = info_nce(aligner.tower_text(pooled(chosen)), items, scale, same)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(module.parameters(), collective)
            optimizer.step()
            losses.append(loss.detach())
            now = epoch * steps + step + 1
            if collective.rank == 0 and hooks.save_checkpoint is not None and now < total and clock.due():
                hooks.save_checkpoint(_checkpoint(module, optimizer, now))
        metrics = {"loss": float(torch.stack(losses).mean()), "scale": aligner.scale}
        hooks.on_progress(Progress(stage, (epoch + 1) * steps, total, metrics))
    module.cpu().eval()
    return metrics


def _checkpoint(module: nn.Module, optimizer: torch.optim.Optimizer, done: int) -> Checkpoint:
    trained = {f"model.{name}": p.detach().clone().cpu() for name, p in module.named_parameters() if p.requires_grad}
    return trained | pack_optimizer(optimizer) | {"done": torch.tensor(done), "random": torch.get_rng_state()}


def _restore(module: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> int:
    """Go back to a checkpoint; returns the steps that were done."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(checkpoint[f"model.{name}"])
    unpack_optimizer(optimizer, checkpoint)
    torch.set_rng_state(checkpoint["random"])  # dropout goes on as it would have
    return int(checkpoint["done"])


def _item_batch(
    aligner: Aligner, tables: dict[Modality, torch.Tensor], starts: dict[Modality, int], rows: torch.Tensor
) -> torch.Tensor:
    """Vectors (B, D - 1) of items given by corpus row, each through the head of its modality."""
    out = torch.empty(len(rows), aligner.dim - 1, device=rows.device)
    for modality, table in tables.items():
        local = rows - starts[modality]
        mine = (local >= 0) & (local < len(table))
        if bool(mine.any()):
            out = out.index_put((mine.nonzero().squeeze(1),), aligner.tower_item(modality, table[local[mine]]))
    return out
