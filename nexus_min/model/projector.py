"""Image embeddings -> context tokens of the MMDiT, one projector for each decoder.

Generation: an MLP maps the 81 embeddings one by one (figure 1c of the paper). Editing: in one
joint attention layer the 81 target embeddings and the 324 source embeddings see each other; then an
MLP maps all 405 (figure 1d). The output replaces FLUX's T5 states.

Official classes: the `adapter` of Nexus-Gen's generation decoder, `ImageEmbeddingMerger` of its
editing decoder.
"""

import torch
from torch import Tensor, nn

from ..config import TextConfig
from .decoder import DecoderLayer, rotation
from .layers import RMSNorm

BASE_GRID = 72  # official constant: embeddings span 72 / MERGE = 36 positions on each side
MERGE = 2  # patches along one side of an embedding
Grid = tuple[int, int, int]  # (t, h, w) in patches before merging


class GenerationAdapter(nn.Module):
    """Linear, LayerNorm, ReLU, Linear, LayerNorm: [B, N, in_dim] -> [B, N, out_dim]."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.adapter = nn.Sequential(
            nn.Linear(in_dim, out_dim),
            nn.LayerNorm(out_dim, eps=1e-5),
            nn.ReLU(),
            nn.Linear(out_dim, out_dim),
            nn.LayerNorm(out_dim, eps=1e-5),
        )

    def forward(self, embeds: Tensor) -> Tensor:
        return self.adapter(embeds)


def merger_positions(grid: Grid, device=None) -> Tensor:
    """Positions (0, i 72/h, j 72/w) of the embeddings on a grid: [3, 1, N].

    Target and source cover the same range: 9 embeddings in steps of 4, 18 in steps of 2.
    """
    (_, h, w), options = grid, {"dtype": torch.float32, "device": device}
    rows = torch.arange(h // MERGE, **options) * (BASE_GRID / h)
    columns = torch.arange(w // MERGE, **options) * (BASE_GRID / w)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((torch.zeros_like(row), row, column)).reshape(3, 1, -1)


class ImageEmbeddingMerger(nn.Module):
    """One decoder layer *without* mask over [target, source], then an MLP."""

    def __init__(self, config: TextConfig, out_dim: int, expand_ratio: int = 4):
        super().__init__()
        self.config = config
        hidden = out_dim * expand_ratio
        self.layers = nn.ModuleList([DecoderLayer(config)])
        self.projector = nn.Sequential(
            RMSNorm(config.hidden_size),
            nn.Linear(config.hidden_size, hidden),
            RMSNorm(hidden),
            nn.SiLU(),
            nn.Linear(hidden, out_dim),
            RMSNorm(out_dim),
        )

    def forward(
        self,
        embeds: Tensor,
        grid: Grid,
        ref_embeds: Tensor | None = None,
        ref_grid: Grid | None = None,
    ) -> Tensor:
        """Target embeds [B, N, C], source ref_embeds [B, M, C] -> context [B, N (+ M), out_dim]."""
        if (ref_embeds is None) != (ref_grid is None):
            raise ValueError("ref_embeds and ref_grid go together: give both or neither")
        if ref_embeds is not None and len(ref_embeds) != len(embeds):
            raise ValueError(f"{len(ref_embeds)} references for a batch of {len(embeds)}")
        views = [(embeds, grid)]
        if ref_embeds is not None:
            views.append((ref_embeds, ref_grid))
        x = torch.cat([x for x, _ in views], dim=1)  # [B, N + M, C]
        positions = torch.cat([merger_positions(g, x.device) for _, g in views], dim=-1)
        cos, sin = rotation(self.config, positions, x.dtype)
        for layer in self.layers:  # one; attention is full, so target and source see each other
            x = layer(x, cos, sin)
        return self.projector(x)
