"""Trains the generator: captions and virtual queries, soft targets over items, R-Drop, resumable."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ace_core.collective import Collective, LocalCollective, average_gradients, broadcast_parameters
from ace_core.config import GeneratorSettings
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
from ace_core.generator.data import TrainingData, caption_queries, epoch_batches, virtual_queries
from ace_core.generator.losses import item_targets, level_targets, r_drop, soft_cross_entropy
from ace_core.generator.model import Generator
from ace_core.query import QueryBatch

_CLIP = 1.0
_NEAREST = 256  # items that a query's spelling targets are spread over
_REPORT_EVERY = 10


@dataclass(frozen=True)
class TrainingReport:
    """Loss of every optimiser step (steps,), over the whole fit, resumed parts included."""

    losses: tuple[float, ...]

    @property
    def final(self) -> float:
        """Mean loss of the last tenth of the steps."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return float(np.mean(tail)) if tail else float("nan")


class _Corpus:
    """The training data's tables on the device."""

    def __init__(self, data: TrainingData, device: torch.device) -> None:
        self.data = data
        self.device = device
        self.vectors = torch.from_numpy(np.asarray(data.vectors, np.float32)).to(device)
        self.plain = self.vectors
        if data.plain_vectors is not None:
            self.plain = torch.from_numpy(np.asarray(data.plain_vectors, np.float32)).to(device)
        self.codes = torch.from_numpy(data.codes.astype(np.int64)).to(device)
        self.rows = torch.from_numpy(np.asarray(data.rows, np.int64)).to(device)
        queries = torch.from_numpy(np.asarray(data.query_vectors, np.float32)).to(device)
        self.gaps = queries - self.plain[self.rows]
        _, texts = np.unique(data.query_vectors, axis=0, return_inverse=True)
        self.texts = torch.from_numpy(texts.reshape(-1)).to(device)


def fit_generator(
    generator: Generator,
    data: TrainingData,
    settings: GeneratorSettings,
    *,
    collective: Collective | None = None,
    hooks: FitHooks | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Generator, TrainingReport]:
    """Train; every worker returns the same generator (on CPU, evaluation mode) and loss curve.

    A batch is ``batch_size`` queries over all workers and ``accumulate`` parts; ``virtual_queries`` of them are
    virtual. Without captions all of them are, and queries stay as they are aligned (``refinement`` 0): nothing was
    learned of texts. On a GPU the forward pass runs in bfloat16.
    """
    collective, hooks, device = collective or LocalCollective(), hooks or FitHooks(), torch.device(device)
    torch.manual_seed(seed)
    generator = generator.to(device)
    broadcast_parameters(generator, collective)
    corpus = _Corpus(data, device)
    trained = [p for p in generator.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = _plan(data, settings)
    losses: list[float] = []
    if hooks.resume is not None:
        losses = _restore(generator, optimizer, hooks.resume)
    clock = CheckpointClock(hooks)
    generator.train()
    step = 0
    for epoch in range(settings.epochs):
        batches = list(epoch_batches(data, schedule.captions, seed, epoch)) if schedule.captions else []
        for number in range(schedule.steps):
            if step < len(losses):
                step += 1
                continue
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * warmup_cosine(step, schedule.steps * settings.epochs)
            chosen = batches[number] if batches else np.empty(0, np.int64)
            loss = _optimise(generator, corpus, settings, schedule, chosen, optimizer, collective, seed, step)
            losses.append(loss)
            step += 1
            if step % _REPORT_EVERY == 0 or number + 1 == schedule.steps:
                hooks.on_progress(
                    Progress("generator", step, schedule.steps * settings.epochs, {"loss": loss, "epoch": epoch + 1.0})
                )
            if collective.rank == 0 and hooks.save_checkpoint is not None and clock.due():
                hooks.save_checkpoint(_checkpoint(generator, optimizer, losses))
    if not len(data.rows):
        generator.refinement.zero_()
    return generator.cpu().eval(), TrainingReport(tuple(losses))


@dataclass(frozen=True)
class _Plan:
    """Optimiser steps of an epoch, and captions and virtual queries of a step."""

    steps: int
    captions: int
    virtual: int


def _plan(data: TrainingData, settings: GeneratorSettings) -> _Plan:
    if not len(data.rows):
        return _Plan(max(1, len(data.vectors) // settings.batch_size), 0, settings.batch_size)
    virtual = min(int(settings.batch_size * settings.virtual_queries), settings.batch_size - 1)
    captions = settings.batch_size - virtual
    return _Plan(-(-len(data.rows) // captions), captions, virtual)


def _optimise(
    generator: Generator,
    corpus: _Corpus,
    settings: GeneratorSettings,
    plan: _Plan,
    chosen: np.ndarray,
    optimizer: torch.optim.Optimizer,
    collective: Collective,
    seed: int,
    step: int,
) -> float:
    """One optimiser step over all workers; the mean loss."""
    draw = generator_for(seed, 31, step)
    torch.manual_seed(seed + 1_000_003 * (step + 1) + collective.rank)  # dropout, the same after a resume
    others = torch.randint(len(corpus.vectors), (plan.virtual,), generator=draw)
    candidates = _candidates(corpus, settings, chosen, others, draw)
    draw = generator_for(seed, 37, step, collective.rank)
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=corpus.device)
    parts = settings.accumulate
    for part in range(parts):
        mine = slice(collective.rank * parts + part, None, collective.world_size * parts)
        pieces = []
        if len(chosen[mine]):
            pieces.append(_caption_loss(generator, corpus, settings, chosen[mine], candidates, draw))
        if len(others[mine]):
            pieces.append(_virtual_loss(generator, corpus, settings, others[mine].to(corpus.device), candidates, draw))
        if not pieces:
            continue
        counts = torch.tensor([float(n) for _, n in pieces], device=corpus.device)
        loss = (torch.stack([piece for piece, _ in pieces]) * counts).sum() / counts.sum() / parts
        loss.backward()
        total = total + loss.detach()
    average_gradients(generator.parameters(), collective)
    torch.nn.utils.clip_grad_norm_([p for p in generator.parameters() if p.requires_grad], _CLIP)
    optimizer.step()
    return float(collective.all_reduce(total)) / collective.world_size


def _candidates(
    corpus: _Corpus, settings: GeneratorSettings, chosen: np.ndarray, others: torch.Tensor, draw: torch.Generator
) -> torch.Tensor:
    """Items (C,) that a step's queries choose among: all, or the batch's own and a sample of the rest."""
    n = len(corpus.vectors)
    if n <= settings.candidates:
        return torch.arange(n, device=corpus.device)
    own = torch.cat((torch.from_numpy(corpus.data.rows[chosen].astype(np.int64)), others))
    sample = torch.randint(n, (settings.candidates,), generator=draw)
    return torch.cat((own, sample)).unique().to(corpus.device)


def _caption_loss(
    generator: Generator,
    corpus: _Corpus,
    settings: GeneratorSettings,
    chosen: np.ndarray,
    candidates: torch.Tensor,
    draw: torch.Generator,
) -> tuple[torch.Tensor, int]:
    at = torch.from_numpy(chosen).to(corpus.device)
    own = corpus.rows[at][:, None] == candidates
    twin = (corpus.texts[at][:, None] == corpus.texts[at]).float()  # captions of the batch with the same text
    own = (twin @ own.float()) > 0
    query = caption_queries(corpus.data, chosen, corpus.device)
    return _loss(generator, corpus, settings, query, own, candidates, draw), len(chosen)


def _virtual_loss(
    generator: Generator,
    corpus: _Corpus,
    settings: GeneratorSettings,
    rows: torch.Tensor,
    candidates: torch.Tensor,
    draw: torch.Generator,
) -> tuple[torch.Tensor, int]:
    query = virtual_queries(corpus.vectors, rows, corpus.gaps, settings.virtual_noise, draw)
    return _loss(generator, corpus, settings, query, rows[:, None] == candidates, candidates, draw), len(rows)


def _loss(
    generator: Generator,
    corpus: _Corpus,
    settings: GeneratorSettings,
    query: QueryBatch,
    own: torch.Tensor,
    candidates: torch.Tensor,
    draw: torch.Generator,
) -> torch.Tensor:
    """The item loss of the refined query, the spelling loss of the decoder, R-Drop; mean over the queries.

    The refined query is trained to find the query's own items; the decoder is trained to spell what the refined query
    finds, item by item in proportion (``soft_targets``), and its own items for the rest. What the decoder is asked to
    spell therefore includes items that no caption names: this is what keeps it from preferring those it saw.
    """
    items, plain = corpus.vectors[candidates], corpus.plain[candidates]
    with torch.no_grad():
        base = query.vector @ plain.T
    smoothing = settings.item_smoothing if corpus.data.plain_vectors is not None else 1.0
    find = item_targets(own, base, corpus.data.teacher_scale, smoothing)
    bf16 = torch.autocast(corpus.device.type, torch.bfloat16, enabled=corpus.device.type == "cuda")
    with bf16:
        reading = generator.read(query)
    loss = settings.item_loss * soft_cross_entropy(generator.item_scale * reading.vector @ plain.T, find)

    with torch.no_grad():
        sharp = settings.sharpness * corpus.data.teacher_scale
        spell = item_targets(own, reading.vector @ items.T, sharp, settings.soft_targets)
        near = spell.topk(min(_NEAREST, spell.shape[1]), dim=1)
        spell = near.values / near.values.sum(1, keepdim=True)
        codes = corpus.codes[candidates[near.indices]]
        path = codes[torch.arange(len(codes), device=codes.device), _sample(spell, draw)]
        wanted = level_targets(spell, codes, path, generator.vocab_sizes)
    outputs = []
    for _ in range(2 if settings.r_drop else 1):
        with bf16:
            outputs.append(generator.spell(reading, path))
    spelled = [soft_cross_entropy(a, w) for logits in outputs for a, w in zip(logits, wanted)]
    loss = loss + torch.stack(spelled).sum() / len(outputs)
    if settings.r_drop:
        loss = loss + settings.r_drop * r_drop(*outputs)
    return loss


def _sample(target: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """One candidate (n,) of each distribution (n, C), by inverse cumulative sums (the same draw on any device)."""
    total = target.double().cumsum(1)
    at = torch.rand(len(target), 1, generator=draw, dtype=torch.float64).to(target.device) * total[:, -1:]
    picked = torch.searchsorted(total, at, right=True).squeeze(1)
    return picked.clamp_max(target.shape[1] - 1)


def _checkpoint(generator: Generator, optimizer: torch.optim.Optimizer, losses: list[float]) -> Checkpoint:
    out = {f"model.{k}": v.detach().clone().cpu() for k, v in generator.state_dict().items()}
    return out | pack_optimizer(optimizer) | {"losses": torch.tensor(losses, dtype=torch.float64)}


def _restore(generator: Generator, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> list[float]:
    state = {k.removeprefix("model."): v for k, v in checkpoint.items() if k.startswith("model.")}
    generator.load_state_dict(state)
    unpack_optimizer(optimizer, checkpoint)
    return checkpoint["losses"].tolist()
