"""Layers that the vision tower, the Qwen decoder and the editing projector share.

Official classes: `Qwen2RMSNorm`, `Qwen2_5_VLMLP`, `Qwen2MLP` (transformers 4.49).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gradients import normalize


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), then times weight: [..., C] -> [..., C]."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # fp32 inside; the cast comes before the weight, as in the official code
        return self.weight * normalize(x.float(), self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): [..., dim] -> [..., dim]. Only the vision tower has biases."""

    def __init__(self, dim: int, hidden: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.is_grad_enabled():
            return self.down_proj(F.silu(gate) * up)
        # in place at inference: saves two allocations of the widest tensors
        return self.down_proj(F.silu(gate, inplace=True).mul_(up))
