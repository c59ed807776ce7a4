"""The vision tower at full width with 8 of its 32 layers (7 windowed, 1 full).

Peer: transformers' Qwen2_5_VisionTransformerPretrainedModel on the same weights, sdpa.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nexus_min.config import VisionConfig
from nexus_min.model.vision import QwenViT

from .common import Row, alternate, core_share, difference, dtypes, name_of
from .peers import their_vision

CONFIG = VisionConfig(depth=8, fullatt_block_indexes=(7,))
SIZES = {"504x504": (1, 36, 36), "1000x700": (1, 50, 72)}  # pixels rounded to multiples of 28


def tower_flop(model: QwenViT, grid: tuple[int, int, int]) -> float:
    """FLOP of the Linears and of attention: windows of 64 patches, and the whole image once."""
    patches = grid[0] * grid[1] * grid[2]
    merger = sum(p.numel() for p in model.merger.parameters() if p.ndim == 2)
    linears = sum(p.numel() for p in model.parameters() if p.ndim > 1) - merger + merger / 4
    full = len(model.config.fullatt_block_indexes)
    attended = 64 * (model.config.depth - full) + patches * full
    return 2.0 * patches * (linears + 2 * attended * model.config.hidden_size)


@torch.inference_mode()
def rows() -> Iterator[Row]:
    for dtype in dtypes():
        yield from towers(dtype, 1.25 if dtype == torch.float32 else 1.6)


def towers(dtype: torch.dtype, goal: float) -> Iterator[Row]:
    """Both sizes in one dtype."""
    torch.manual_seed(0)
    model = QwenViT(CONFIG).to(dtype)
    peer = their_vision(model)
    for name, grid in SIZES.items():
        pixels = torch.randn(grid[1] * grid[2], 3 * 2 * 14 * 14).to(dtype)
        ours = lambda: model(pixels, (grid,))  # noqa: B023, E731
        theirs = lambda: peer(pixels, torch.tensor([grid])).pooler_output  # noqa: B023, E731
        error = difference(ours(), theirs())
        times = alternate(ours, theirs, 3)
        flop = tower_flop(model, grid)
        work = f"vision tower, {name}"
        yield Row(work, name_of(dtype), "transformers", *times, goal, error, flop, core_share(ours))
