"""LoRA: fine-tune a few low-rank matrices beside frozen ones, then fold them in.

W' = W + (alpha / r) B A, with A [r, in] random and B [out, r] zero at the start (Hu et al., 2021,
equation 3). For one GPU: only A and B have gradients and optimizer state. The official training
has no counterpart; it fine-tunes all weights.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A frozen Linear and its low-rank correction."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        out, width = linear.weight.shape
        if not 0 < rank <= min(out, width):
            raise ValueError(f"the rank must be 1 to {min(out, width)}, got {rank}")
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        options = {"device": linear.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.randn(rank, width, **options) / width**0.5)
        self.lora_B = nn.Parameter(torch.zeros(out, rank, **options))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return self.linear(x) + self.scale * low


def add_lora(
    model: nn.Module, rank: int = 8, alpha: float = 16.0, targets: Sequence[str] = TARGETS
) -> nn.Module:
    """Freeze `model` and give every Linear whose name is in `targets` a correction, in place."""
    model.requires_grad_(False)
    linears = {k: m for k, m in model.named_modules() if isinstance(m, nn.Linear)}
    linears = {k: m for k, m in linears.items() if k.split(".")[-1] in targets}
    if not linears:
        raise ValueError(f"the model has no Linear named {', '.join(targets)}")
    for name, linear in linears.items():
        model.set_submodule(name, LoRALinear(linear, rank, alpha))
    return model


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Fold all corrections in, in place, in fp32; layers and names are the model's own again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            weight = module.linear.weight
            weight.copy_(weight.float() + module.scale * module.lora_B @ module.lora_A)
            model.set_submodule(name, module.linear)
    return model
