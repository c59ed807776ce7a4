"""LoRA: fine-tune a few low-rank matrices beside frozen ones, then fold them in.

W' = W + (alpha / r) B A, with A [r, in] random and B [out, r] zero at the start (Hu et al., 2021,
equation 3). For one card: optimiser state and gradients exist for A and B alone. The official
training has no counterpart; it fine-tunes all weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A frozen Linear and its low-rank correction; computed in the Linear's place."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        out, width = linear.weight.shape
        if not 0 < rank <= min(out, width):
            raise ValueError(f"the rank must be 1 to {min(out, width)}, got {rank}")
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        place = {"device": linear.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.randn(rank, width, **place) / width**0.5)
        self.lora_B = nn.Parameter(torch.zeros(out, rank, **place))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return self.linear(x) + self.scale * low

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The Linear with the correction added to its matrix, in fp32 before it is rounded."""
        weight = self.linear.weight
        weight.copy_(weight.float() + self.scale * self.lora_B @ self.lora_A)
        return self.linear


def add_lora(
    model: nn.Module, rank: int = 8, alpha: float = 16.0, targets: Sequence[str] = TARGETS
) -> nn.Module:
    """Freeze `model` and give every Linear whose name is in `targets` a correction, in place.

    ValueError for a rank that does not fit, or when there is no such Linear.
    """
    model.requires_grad_(False)
    found = list(linears(model, nn.Linear, targets))
    if not found:
        raise ValueError(f"the model has no Linear named {', '.join(targets)}")
    for parent, name in found:
        setattr(parent, name, LoRALinear(getattr(parent, name), rank, alpha))
    return model


def merge_lora(model: nn.Module) -> nn.Module:
    """Fold all corrections in, in place: the model has its own layers and names again."""
    for parent, name in list(linears(model, LoRALinear)):
        setattr(parent, name, getattr(parent, name).merged())
    return model


def linears(model: nn.Module, kind: type, names: Sequence[str] | None = None):
    """(module, name of its child) of every child of a kind."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, kind) and (names is None or name in names):
                yield parent, name
