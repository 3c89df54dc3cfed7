"""Fits the aligner: InfoNCE on captions, then the corrections of items; resumable."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch.nn import functional as F

from ace_core.aligner import MAX_SCALE, Aligner, CaptionPairs
from ace_core.collective import Collective, LocalCollective, average_gradients, broadcast_parameters, share
from ace_core.config import AlignerSettings
from ace_core.corrections import fit_corrections
from ace_core.errors import CorpusError
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


def fit_aligner(
    features: Mapping[Modality, np.ndarray],
    pairs: CaptionPairs,
    settings: AlignerSettings,
    *,
    validation: CaptionPairs | None = None,
    collective: Collective | None = None,
    hooks: FitHooks | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Aligner, dict[str, float]]:
    """Train the heads; every worker returns the same aligner (on CPU) and the last epoch's figures.

    Args:
        features: raw features (n_m, d_m) of each modality, all of the corpus on every worker.
        pairs: captions to train on, all of them on every worker; each worker takes its share of every batch.
        validation: held-out captions, both of items in ``pairs`` and of items that are not; they choose the
            corrections (:mod:`ace_core.corrections`).

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
    done = 0 if hooks.resume is None else _restore(aligner, optimizer, hooks.resume)
    clock = CheckpointClock(hooks)
    aligner.train()
    for epoch in range(done // steps, settings.epochs):
        order = torch.randperm(len(pairs), generator=generator_for(seed, epoch)).to(device)
        losses = []
        for step in range(done - epoch * steps if epoch == done // steps else 0, steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * warmup_cosine(epoch * steps + step, total)
            chosen = order[step * batch : (step + 1) * batch][share(batch, collective)]
            items = _item_batch(aligner, tables, offsets, rows[chosen])
            same = (texts[chosen][:, None] == texts[chosen]) | (rows[chosen][:, None] == rows[chosen])
            loss = info_nce(
                aligner.tower_text(pooled[chosen]), items, aligner.log_scale.exp().clamp(max=MAX_SCALE), same
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(aligner.parameters(), collective)
            optimizer.step()
            losses.append(loss.detach())
            now = epoch * steps + step + 1
            if collective.rank == 0 and hooks.save_checkpoint is not None and now < total and clock.due():
                hooks.save_checkpoint(_checkpoint(aligner, optimizer, now))
        metrics = {"loss": float(torch.stack(losses).mean()), "scale": aligner.scale}
        hooks.on_progress(Progress("aligner", (epoch + 1) * steps, total, metrics))
    aligner = aligner.cpu().eval()
    return aligner, metrics | fit_corrections(aligner, features, pairs, validation, seed)


def _checkpoint(aligner: Aligner, optimizer: torch.optim.Optimizer, done: int) -> Checkpoint:
    out = {f"model.{name}": p.detach().clone().cpu() for name, p in aligner.named_parameters()}
    return out | pack_optimizer(optimizer) | {"done": torch.tensor(done), "random": torch.get_rng_state()}


def _restore(aligner: Aligner, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> int:
    """Go back to a checkpoint; returns the steps that were done."""
    with torch.no_grad():
        for name, parameter in aligner.named_parameters():
            parameter.copy_(checkpoint[f"model.{name}"])
    unpack_optimizer(optimizer, checkpoint)
    torch.set_rng_state(checkpoint["random"])  # dropout goes on as it would have
    return int(checkpoint["done"])


def _item_batch(
    aligner: Aligner, tables: dict[Modality, torch.Tensor], offsets: dict[Modality, int], rows: torch.Tensor
) -> torch.Tensor:
    """Vectors (B, D) of items given by corpus row, each through the head of its modality."""
    out = torch.empty(len(rows), aligner.dim - 1, device=rows.device)
    for modality, table in tables.items():
        local = rows - int(offsets[modality])
        mine = (local >= 0) & (local < len(table))
        if bool(mine.any()):
            out = out.index_put((mine.nonzero().squeeze(1),), aligner.tower_item(modality, table[local[mine]]))
    return out
