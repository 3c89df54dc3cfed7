"""What the fits need of a group of workers: their rank, sums over all of them, one worker's tensor for all.

The fits in this package do not know Ray. One process passes :class:`LocalCollective`; workers that share a
``torch.distributed`` process group (gloo on CPU, NCCL on GPU) pass :class:`TorchCollective`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.distributed as dist

from ace_core.errors import SettingsError


class Collective(Protocol):
    """A group of ``world_size`` workers seen from worker ``rank``. Every worker must make the same calls in order."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The element-wise sum over all workers, as a new tensor; the argument is left alone."""

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Worker 0's tensor on every worker; the others pass one of equal shape and dtype."""


class LocalCollective:
    """A group of one."""

    rank = 0
    world_size = 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class TorchCollective:
    """The default process group of ``torch.distributed``.

    Raises:
        SettingsError: no process group was initialised in this process.
    """

    def __init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise SettingsError(
                "there is no torch.distributed process group",
                remedy="Call torch.distributed.init_process_group first, or pass LocalCollective().",
            )
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.detach().to(self._device, copy=True).contiguous()
        dist.all_reduce(moved)
        return moved.to(tensor.device)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.detach().to(self._device, copy=True).contiguous()
        dist.broadcast(moved, src=0)
        return moved.to(tensor.device)


def share(rows: int, collective: Collective) -> slice:
    """The rows of ``range(rows)`` that belong to this worker: every ``world_size``-th, starting at its rank."""
    return slice(collective.rank, rows, collective.world_size)


def average_gradients(parameters: Iterable[torch.nn.Parameter], collective: Collective) -> None:
    """Replace every gradient by its mean over the workers, in one flat all-reduce (a missing gradient counts as 0)."""
    if collective.world_size == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in trained])
    flat = collective.all_reduce(flat) / collective.world_size
    for p, part in zip(trained, flat.split([p.numel() for p in trained])):
        p.grad = part.view_as(p)


def broadcast_parameters(module: torch.nn.Module, collective: Collective) -> None:
    """Give every worker worker 0's parameters and buffers."""
    if collective.world_size == 1:
        return
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(collective.broadcast(tensor))
