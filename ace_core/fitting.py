"""What every fit shares with its caller: progress, checkpoints, a learning-rate curve, seeds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Checkpoint = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Progress:
    """Where a fit is.

    Attributes:
        stage: "aligner", "kmeans", "rq-vae" or "generator".
        step, total: optimiser steps (iterations of K-Means) done and planned.
        metrics: the latest figures by name.
    """

    stage: str
    step: int
    total: int
    metrics: dict[str, float] = field(default_factory=dict)


def _no_progress(progress: Progress) -> None:
    return None


@dataclass(frozen=True)
class FitHooks:
    """The caller's side of a fit.

    Attributes:
        on_progress: called on every worker after each epoch (and every few steps of the generator).
        save_checkpoint: called on worker 0 with CPU tensors, at most every ``checkpoint_seconds``; None for none.
        resume: tensors that ``save_checkpoint`` once received; the fit continues where they were taken.
        checkpoint_seconds: least time between two checkpoints; 0 saves after every optimiser step.
    """

    on_progress: Callable[[Progress], None] = _no_progress
    save_checkpoint: Callable[[Checkpoint], None] | None = None
    resume: Checkpoint | None = None
    checkpoint_seconds: float = 60.0


class CheckpointClock:
    """Says when a checkpoint is due."""

    def __init__(self, hooks: FitHooks) -> None:
        self._every = hooks.checkpoint_seconds
        self._last = time.monotonic()

    def due(self) -> bool:
        if time.monotonic() - self._last < self._every:
            return False
        self._last = time.monotonic()
        return True


def warmup_cosine(step: int, total: int, warmup: float = 0.05) -> float:
    """Learning-rate factor of step 0..total-1: linear warm-up over ``warmup`` of the steps, then half a cosine to 0."""
    rise = max(1, int(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def generator_for(seed: int, *stream: int) -> torch.Generator:
    """A CPU random generator that depends on the seed and the numbers of its stream, and on nothing else."""
    mixed = seed & 0xFFFFFFFF
    for number in stream:
        mixed = (mixed * 1_000_003 + number + 0x9E3779B9) & 0x7FFFFFFFFFFFFFFF
    return torch.Generator().manual_seed(mixed)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> Checkpoint:
    """The state tensors of an optimiser with one parameter group or more, by flat name."""
    out: Checkpoint = {}
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            out[f"optimizer.{number}.{name}"] = torch.as_tensor(value).detach().clone().cpu()
    return out


def unpack_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Undo :func:`pack_optimizer`."""
    packed = optimizer.state_dict()
    state: dict[int, Checkpoint] = {}
    for key, value in checkpoint.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".", 2)
            state.setdefault(int(number), {})[name] = value
    packed["state"] = state
    optimizer.load_state_dict(packed)
