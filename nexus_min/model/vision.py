"""Vision tower: patches -> image embeddings, the space that both halves of Nexus-Gen share.

Equation: x += attn(RMS(x)); x += mlp(RMS(x)) with 2-D RoPE; then 2x2 neighbours merge into one
embedding. Nexus-Gen's vision encoder, Qwen2.5-VL report section 2.1.1: most blocks attend within
windows, a few within the whole image.
Official class: `Qwen2_5_VisionTransformerPretrainedModel` (transformers 4.49).

Two orders of tokens. *Natural*: merged units row by row, the 4 patches of a unit together; so the
image processor writes them, and so the embeddings come out. *Window*: units permuted until each
window is contiguous; the blocks live here. There is no attention mask: segments (windows, images)
of one length are a batch axis, so B images of one size cost a reshape. Frames count as images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nexus_min.config import VisionConfig
from nexus_min.model.layers import RMSNorm, SwiGLU, silu_mul_
from nexus_min.model.rope import apply_rope_half, vision_cos_sin

Grid = Sequence[Sequence[int]]  # (t, h, w) of every image, in patches before merging


class WindowSegments(NamedTuple):
    """Runs of consecutive tokens that attend to each other only, gathered by their length."""

    lengths: tuple[int, ...]  # the distinct lengths
    rows: tuple[Tensor, ...]  # the token rows of each length; empty when there is one length
    restore: Tensor | None  # undoes the concatenation of `rows`


class WindowLayout(NamedTuple):
    """All of a call that depends on the grids alone; tokens in window order."""

    order: Tensor  # [N] natural index of the units in window order
    restore: Tensor  # [N] its inverse
    cos: Tensor  # [P, 1, D] fp32
    sin: Tensor  # [P, 1, D] fp32
    windows: WindowSegments
    images: WindowSegments


def grid_tuple(grid_thw: Tensor | Grid, merge: int = 2) -> tuple[tuple[int, int, int], ...]:
    """[n, 3] tensor or nested sequence -> tuple of (t, h, w).

    Raises ValueError when it is no such table, or h and w are not multiples of `merge`.
    """
    rows = grid_thw.tolist() if isinstance(grid_thw, Tensor) else grid_thw
    if not isinstance(rows, list | tuple) or not rows:
        raise ValueError(f"grid_thw must be [n, 3] with n >= 1, got {rows}")
    for row in rows:
        if not isinstance(row, list | tuple) or len(row) != 3 or min(row) < 1:
            raise ValueError(f"a row of grid_thw must be (t, h, w), each >= 1, got {row}")
        if row[1] % merge or row[2] % merge:
            raise ValueError(f"h and w of grid_thw must be multiples of {merge}, got {row}")
    return tuple(tuple(int(n) for n in row) for row in rows)


def frame_runs(grid: Grid) -> list[tuple[tuple[int, int], int]]:
    """Runs of equal consecutive frames: [((h, w), count), ...]."""
    frames = [(h, w) for t, h, w in grid for _ in range(t)]
    return [(size, len(list(run))) for size, run in groupby(frames)]


def grid_coords(h: int, w: int) -> Tensor:
    """(row, column) of every cell, row by row: [h, w, 2]."""
    axes = torch.arange(h, device="cpu"), torch.arange(w, device="cpu")
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def patch_positions(grid: Grid, merge: int = 2) -> Tensor:
    """(row, column) of all patches in natural order: [P, 2]; official `rot_pos_emb`."""
    positions = []
    for (h, w), count in frame_runs(grid):
        frame = rearrange(grid_coords(h, w), "(h i) (w j) a -> (h w i j) a", i=merge, j=merge)
        positions.append(frame.repeat(count, 1))
    return torch.cat(positions)


def window_index(grid_thw: Tensor | Grid, config: VisionConfig) -> tuple[Tensor, tuple[int, ...]]:
    """Window order of merged units: (index [P/4], number of patches in each window).

    `units[index]` puts natural order into window order; windows go row by row, the right and the
    bottom ones are ragged. Official `get_window_index`. Raises ValueError for an impossible grid.
    """
    merge = config.spatial_merge_size
    side = config.window_size // merge // config.patch_size
    index, lengths, start = [], [], 0
    for (h, w), count in frame_runs(grid_tuple(grid_thw, merge)):
        h, w = h // merge, w // merge
        row, column = (grid_coords(h, w) // side).unbind(-1)
        order = (row * w + column).flatten().argsort(stable=True)  # sort by number of the window
        starts = start + h * w * torch.arange(count, device="cpu")
        index.append((starts[:, None] + order).flatten())
        heights = [min(side, h - top) for top in range(0, h, side)]
        widths = [min(side, w - left) for left in range(0, w, side)]
        lengths += [a * b * merge**2 for a in heights for b in widths] * count
        start += h * w * count
    return torch.cat(index), tuple(lengths)


def make_segments(lengths: Sequence[int], device: torch.device) -> WindowSegments:
    """Group consecutive runs of `lengths` tokens by their length."""
    distinct = tuple(sorted(set(lengths)))
    if len(distinct) == 1:
        return WindowSegments(distinct, (), None)
    token_length = torch.tensor([n for n in lengths for _ in range(n)], device="cpu")
    restore = token_length.argsort(stable=True)  # tokens of the shortest segments come first
    sizes = [n * lengths.count(n) for n in distinct]
    rows = tuple(part.to(device) for part in restore.split(sizes))
    return WindowSegments(distinct, rows, restore.argsort().to(device))


@lru_cache(maxsize=16)
def make_layout(grid: Grid, config: VisionConfig, device: torch.device) -> WindowLayout:
    """Pure function of the grids, remembered: a training loop over one size computes it once."""
    head_dim = config.hidden_size // config.num_heads
    images = tuple(h * w for t, h, w in grid for _ in range(t))
    with torch.inference_mode(False):  # what is remembered must serve a later training step
        order, windows = window_index(grid, config)
        positions = patch_positions(grid, config.spatial_merge_size)
        positions = rearrange(positions, "(N m) a -> N m a", N=len(order))[order].flatten(0, 1)
        cos, sin = vision_cos_sin(positions, head_dim)
        return WindowLayout(
            order=order.to(device),
            restore=order.argsort().to(device),
            cos=cos.unsqueeze(1).to(device),
            sin=sin.unsqueeze(1).to(device),
            windows=make_segments(windows, device),
            images=make_segments(images, device),
        )


def attend(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """Attention within consecutive segments of one length: [N, H, D] -> [N, H*D]."""
    q, k, v = (rearrange(x, "(B L) H D -> B H L D", L=length) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "B H L D -> (B L) (H D)")


def attend_segments(q: Tensor, k: Tensor, v: Tensor, segments: WindowSegments) -> Tensor:
    """Attention within segments, one call for each distinct length: [N, H, D] -> [N, H*D]."""
    if segments.restore is None:
        return attend(q, k, v, segments.lengths[0])
    groups = zip(segments.rows, segments.lengths, strict=True)
    out = torch.cat([attend(q[rows], k[rows], v[rows], length) for rows, length in groups])
    return out.index_select(0, segments.restore)


class PatchEmbed(nn.Module):
    """Linear map of flattened patches; stored as a Conv3d whose kernel is its stride."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)
        return F.linear(patches.to(weight.dtype), weight)


class VisionAttention(nn.Module):
    """Attention with 2-D RoPE inside segments; official `Qwen2_5_VLVisionSdpaAttention`."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: WindowSegments) -> Tensor:
        heads = rearrange(self.qkv(x), "N (H D) -> N H D", H=3 * self.num_heads)
        qk, v = heads.split([2 * self.num_heads, self.num_heads], dim=1)
        qk = apply_rope_half(qk.float(), cos, sin).to(v.dtype)  # q and k turn together, in fp32
        return self.proj(attend_segments(*qk.chunk(2, dim=1), v, segments))


class VisionMLP(SwiGLU):
    """SwiGLU of [P, C]; in fp32 on a CPU with hidden units as rows of arrays, tokens as columns.

    A token's 3420 hidden units are no multiple of 8 floats, which costs MKL up to a third of its
    speed; tokens are easily made one.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return super().forward(x)
        columns = F.pad(x, (0, 0, 0, -len(x) % 8)).T
        gate, up = (
            torch.addmm(linear.bias[:, None], linear.weight, columns)
            for linear in (self.gate_proj, self.up_proj)
        )
        return self.down_proj(silu_mul_(gate, up).T)[: len(x)]


class VisionBlock(nn.Module):
    """Pre-norm attention and SwiGLU: [P, C] -> [P, C]; official `Qwen2_5_VLVisionBlock`."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size)
        self.norm2 = RMSNorm(config.hidden_size)
        self.attn = VisionAttention(config.hidden_size, config.num_heads)
        self.mlp = VisionMLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: WindowSegments) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, segments)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """RMS per patch, then a two-layer MLP over the 4 patches of a unit: [P, C] -> [P/4, out]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.unit = config.spatial_merge_size**2
        wide = config.hidden_size * self.unit
        self.ln_q = RMSNorm(config.hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, config.out_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(rearrange(self.ln_q(x), "(N m) C -> N (m C)", m=self.unit))


class QwenViT(nn.Module):
    """Images as rows of patches -> one embedding per 2x2 patches.

    Raises ValueError when the sizes of `config` do not divide.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        check_config(config)
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor | Grid) -> Tensor:
        """pixel_values [P, 3*2*14*14] (normalised), grid_thw [n, 3] -> [P/4, out_hidden_size].

        The images of a call lie one behind the other, P = sum(t*h*w), and do not see each other.
        Keep `grid_thw` on the CPU; as a tuple of tuples it is a constant to `torch.compile`.
        Raises ValueError when the shape of `pixel_values` and the grids disagree.
        """
        for _, x in self.stages(pixel_values, self.layout(pixel_values, grid_thw)):
            embeddings = x
        return embeddings

    def hidden_states(self, pixel_values: Tensor, grid_thw: Tensor | Grid) -> dict[str, Tensor]:
        """Every intermediate of `forward` by name, see `stages`."""
        return dict(self.stages(pixel_values, self.layout(pixel_values, grid_thw)))

    def stages(self, pixel_values: Tensor, layout: WindowLayout) -> Iterator[tuple[str, Tensor]]:
        """The forward pass, one (name, tensor) after the other.

        `patch_embed` [P, C] in natural order; `block0`... [P, C] and `merger` [P/4, out] in window
        order (`window_index`); last `merged` [P/4, out] in natural order.
        """
        x = self.patch_embed(pixel_values)
        yield "patch_embed", x
        units = rearrange(x, "(N m) C -> N m C", m=self.merger.unit)
        x = units.index_select(0, layout.order).flatten(0, 1)
        for i, block in enumerate(self.blocks):
            full = i in self.config.fullatt_block_indexes
            x = block(x, layout.cos, layout.sin, layout.images if full else layout.windows)
            yield f"block{i}", x
        x = self.merger(x)
        yield "merger", x
        yield "merged", x.index_select(0, layout.restore)

    def layout(self, pixel_values: Tensor, grid_thw: Tensor | Grid) -> WindowLayout:
        """Window order, RoPE and segments of the grids, once they agree with the pixel rows."""
        grid = grid_tuple(grid_thw, self.config.spatial_merge_size)
        shape = (sum(t * h * w for t, h, w in grid), self.patch_embed.proj.weight[0].numel())
        if tuple(pixel_values.shape) != shape:
            raise ValueError(
                f"pixel_values {tuple(pixel_values.shape)} must be {shape} for grid_thw {grid}"
            )
        return make_layout(grid, self.config, pixel_values.device)


def check_config(config: VisionConfig) -> None:
    """Raise ValueError when the sizes of the tower do not divide."""
    unit = config.patch_size * config.spatial_merge_size
    if config.hidden_size % (4 * config.num_heads):
        sizes = f"hidden_size {config.hidden_size}, num_heads {config.num_heads}"
        raise ValueError(f"the width of a head must be a multiple of 4: {sizes}")
    if config.window_size < unit:
        raise ValueError(f"window_size {config.window_size} px is less than a unit of {unit} px")
    outside = [i for i in config.fullatt_block_indexes if not 0 <= i < config.depth]
    if outside:
        raise ValueError(f"fullatt_block_indexes {outside} lie outside depth {config.depth}")
