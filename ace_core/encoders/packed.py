"""Linear layers packed ahead for the short batches of a search.

A query is a dozen tokens: a linear layer then takes as long as its weights take to read and, in PyTorch's own float32
path, to rearrange for every call. FBGEMM (inside PyTorch, x86 CPUs) keeps them in its own layout and in half precision,
and computes in float32: less than half the time, and vectors that agree to about 1e-4, as those of another BLAS would.
So it is no other encoder: identities stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


def can_pack(device: torch.device | str) -> bool:
    """Is this device a CPU that has the packed form?"""
    known = "fbgemm" in torch.backends.quantized.supported_engines
    return torch.device(device).type == "cpu" and known and hasattr(torch.ops.quantized, "linear_prepack_fp16")


class SideBySide(nn.Module):
    """Linear layers that read the same input, as one: their outputs follow each other along the last axis.

    Args:
        linears: layers of one input width; their weights are copied, and packed where the device can.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        weight = torch.cat([x.weight.detach() for x in linears])
        bias = torch.cat([weight.new_zeros(x.out_features) if x.bias is None else x.bias.detach() for x in linears])
        self._packed = None
        if can_pack(weight.device):
            self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias.float())
            weight = weight.to("meta")  # callers ask for its shape and type
        self.weight, self.bias = nn.Buffer(weight), nn.Buffer(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)."""
        if self._packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.quantized.linear_dynamic_fp16(x, self._packed)


def pack_linears(model: nn.Module) -> None:
    """Replace every linear layer of a model that is only read from now on, where its device can."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and can_pack(child.weight.device):  # subclasses may be used in other ways
                setattr(module, name, SideBySide([child]))
