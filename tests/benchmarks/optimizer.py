"""A Muon step over the tiny AR model's matrices: ours in fp32 beside `torch.optim.Muon`.

    python tests/benchmarks/optimizer.py

One process, one thread, in turn; medians and ratios. torch's always computes in bf16.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import nn

from nexus_min.config import NexusGenConfig
from nexus_min.model.autoregressive import NexusGenAR
from nexus_min.train.optim import Muon

ROUNDS = 9


def matrices() -> list[nn.Parameter]:
    torch.manual_seed(0)
    layers = NexusGenAR(NexusGenConfig.tiny().ar).model.layers
    found = [p for p in layers.parameters() if p.ndim == 2]
    for p in found:
        p.grad = torch.randn_like(p)
    return found


def main() -> None:
    torch.set_num_threads(1)
    makers = {
        "ours": lambda ps: Muon(ps, 4e-3),
        "torch.optim.Muon": lambda ps: torch.optim.Muon(ps, 4e-3),
    }
    optimizers = {name: make(matrices()) for name, make in makers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(1 + ROUNDS):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - start)
    base = median(seconds["torch.optim.Muon"][1:])
    for name, values in seconds.items():
        middle = median(values[1:])
        print(f"{name:18s} {1e3 * middle:8.1f} ms   {base / middle:5.1f}x as fast as torch's")


if __name__ == "__main__":
    main()
