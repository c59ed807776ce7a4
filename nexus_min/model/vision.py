"""Vision tower: patches -> image embeddings, the space that both halves of Nexus-Gen share.

Equation: x += attn(RMS(x)); x += mlp(RMS(x)) with 2-D RoPE; then 2x2 neighbors merge into one
embedding. Most blocks attend within windows, a few within the whole image. This is Nexus-Gen's
vision encoder, section 2.1.1 of the Qwen2.5-VL report.
Official class: `Qwen2_5_VisionTransformerPretrainedModel` (transformers 4.49).

A *unit* is the 2x2 patches that become one embedding; its 4 tokens stay together. The input and
the output have *natural* order: units row by row. The blocks have *window* order: window by window.
Attention runs within *segments* (windows or images); those of one length form a batch, no masks.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import VisionConfig
from .layers import RMSNorm, SwiGLU
from .rope import apply_rope_half, vision_cos_sin

Grids = Sequence[Sequence[int]]  # (t, h, w) of every image, in patches before merging


class WindowSegments(NamedTuple):
    """Windows or images: runs of tokens that attend to each other only, grouped by length."""

    lengths: tuple[int, ...]  # the distinct lengths
    rows: tuple[Tensor | slice, ...]  # for each length: indexes of the tokens in such segments
    restore: Tensor | None  # [N] puts the concatenated `rows` back in order; None for one length


class WindowLayout(NamedTuple):
    """Everything that depends on the grids alone; all but `order` is in window order."""

    order: Tensor  # [N/4] natural index of each unit in window order
    restore: Tensor  # [N/4] its inverse
    cos: Tensor  # [N, 1, D] fp32
    sin: Tensor  # [N, 1, D] fp32
    windows: WindowSegments
    images: WindowSegments


def grid_tuple(grid_thw: Tensor | Grids, merge: int = 2) -> tuple[tuple[int, int, int], ...]:
    """[n, 3] tensor or nested sequence -> tuple of (t, h, w)."""
    rows = grid_thw.tolist() if isinstance(grid_thw, Tensor) else grid_thw
    if not rows or any(not isinstance(r, list | tuple) or len(r) != 3 or min(r) < 1 for r in rows):
        raise ValueError(f"grid_thw must be n >= 1 rows of (t, h, w), each >= 1, got {rows}")
    if any(h % merge or w % merge for _, h, w in rows):
        raise ValueError(f"h and w of grid_thw must be multiples of {merge}, got {rows}")
    return tuple(tuple(int(n) for n in row) for row in rows)


def frame_runs(grid: Grids) -> list[tuple[tuple[int, int], int]]:
    """Consecutive frames of one size and their number, to compute each once: [((h, w), count)]."""
    frames = [(h, w) for t, h, w in grid for _ in range(t)]
    return [(size, len(list(run))) for size, run in groupby(frames)]


def grid_coords(h: int, w: int) -> Tensor:
    """(row, column) of every cell: [h, w, 2]."""
    rows, columns = torch.meshgrid(*(torch.arange(n, device="cpu") for n in (h, w)), indexing="ij")
    return torch.stack((rows, columns), dim=-1)


def patch_positions(grid: Grids, merge: int = 2) -> Tensor:
    """(row, column) of all patches in natural order: [N, 2]; official `rot_pos_emb`."""
    positions = []
    for (h, w), count in frame_runs(grid):
        # (h w) counts units, (i j) the patches within a unit
        frame = rearrange(grid_coords(h, w), "(h i) (w j) a -> (h w i j) a", i=merge, j=merge)
        positions.append(frame.repeat(count, 1))
    return torch.cat(positions)


def window_index(grid_thw: Tensor | Grids, config: VisionConfig) -> tuple[Tensor, tuple[int, ...]]:
    """Window order of merged units: (index [N/4], number of patches in each window).

    `units[index]` puts natural order into window order. Official `get_window_index`.
    """
    merge = config.spatial_merge_size
    side = config.window_size // merge // config.patch_size  # of a window, in units
    index, lengths, start = [], [], 0
    for (h, w), count in frame_runs(grid_tuple(grid_thw, merge)):
        h, w = h // merge, w // merge  # patches -> units
        row, column = (grid_coords(h, w) // side).unbind(-1)  # the window of each unit
        # row * w + column numbers the windows row by row; a stable sort keeps each in natural order
        order = (row * w + column).flatten().argsort(stable=True)
        starts = start + h * w * torch.arange(count, device="cpu")
        index.append((starts[:, None] + order).flatten())
        # the windows at the right and bottom edges may be smaller
        heights, widths = ([min(side, n - i) for i in range(0, n, side)] for n in (h, w))
        lengths += [a * b * merge**2 for a in heights for b in widths] * count
        start += h * w * count
    return torch.cat(index), tuple(lengths)


def make_segments(lengths: Sequence[int], device: torch.device) -> WindowSegments:
    """Group consecutive runs of `lengths` tokens by their length."""
    distinct = tuple(sorted(set(lengths)))
    if len(distinct) == 1:
        return WindowSegments(distinct, (slice(None),), None)  # a reshape makes the batch
    token_length = torch.tensor([n for n in lengths for _ in range(n)], device="cpu")
    order = token_length.argsort(stable=True)  # tokens of the shortest segments come first
    parts = order.split([n * lengths.count(n) for n in distinct])
    rows = tuple(part.to(device) for part in parts)
    return WindowSegments(distinct, rows, order.argsort().to(device))


@lru_cache(maxsize=16)  # a training loop over one image size computes its layout once
def make_layout(grid: Grids, config: VisionConfig, device: torch.device) -> WindowLayout:
    """Window order, RoPE and segments of the grids: a pure function of its arguments."""
    with torch.inference_mode(False):  # a layout from inference must serve a training step
        order, windows = window_index(grid, config)
        positions = patch_positions(grid, config.spatial_merge_size)
        # a token keeps its position in the image, so positions are permuted like the tokens
        positions = rearrange(positions, "(N m) a -> N m a", N=len(order))[order].flatten(0, 1)
        cos, sin = vision_cos_sin(positions, config.hidden_size // config.num_heads)
        images = [h * w for t, h, w in grid for _ in range(t)]
        return WindowLayout(
            order=order.to(device),
            restore=order.argsort().to(device),
            cos=cos.unsqueeze(1).to(device),  # one table for all heads
            sin=sin.unsqueeze(1).to(device),
            windows=make_segments(windows, device),
            images=make_segments(images, device),
        )


# ---- the network ------------------------------------------------------------------------------


def attend_segments(q: Tensor, k: Tensor, v: Tensor, segments: WindowSegments) -> Tensor:
    """Attention within segments, one batch for each distinct length: [N, H, D] -> [N, H*D]."""
    out = []
    for length, rows in zip(segments.lengths, segments.rows, strict=True):
        heads = (rearrange(x[rows], "(B L) H D -> B H L D", L=length) for x in (q, k, v))
        x = F.scaled_dot_product_attention(*heads)
        out.append(rearrange(x, "B H L D -> (B L) (H D)"))
    return out[0] if segments.restore is None else torch.cat(out).index_select(0, segments.restore)


class PatchEmbed(nn.Module):
    """Linear map of flattened patches: [N, 3*2*p*p] -> [N, C]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        # stored as a convolution, but its kernel is its stride: each patch is used once
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)  # [C, 3*2*p*p]
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
        # one call rotates q and k, in fp32: bf16 would round the angles
        qk = apply_rope_half(qk.float(), cos, sin).to(v.dtype)
        return self.proj(attend_segments(*qk.chunk(2, dim=1), v, segments))


class VisionBlock(nn.Module):
    """Pre-norm attention and SwiGLU: [N, C] -> [N, C]; official `Qwen2_5_VLVisionBlock`."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size)
        self.norm2 = RMSNorm(config.hidden_size)
        self.attn = VisionAttention(config.hidden_size, config.num_heads)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: WindowSegments) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, segments)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """RMS per patch, then a two-layer MLP over the 4 patches of a unit: [N, C] -> [N/4, out]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.unit = config.spatial_merge_size**2
        wide = config.hidden_size * self.unit
        self.ln_q = RMSNorm(config.hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, config.out_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        # the patches of a unit are neighbors in both orders, so a reshape merges them
        return self.mlp(rearrange(self.ln_q(x), "(N m) C -> N (m C)", m=self.unit))


class QwenViT(nn.Module):
    """Images as rows of patches -> one embedding per 2x2 patches."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        if config.window_size < config.patch_size * config.spatial_merge_size:
            raise ValueError(f"window_size {config.window_size} is less than 2 x 2 patches")
        if not {*config.fullatt_block_indexes} <= {*range(config.depth)}:
            raise ValueError(f"fullatt_block_indexes must be block numbers below {config.depth}")
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor | Grids) -> Tensor:
        """pixel_values [N, 3*2*14*14] (normalized), grid_thw [n, 3] -> [N/4, out_hidden_size].

        Images are concatenated, N = sum(t*h*w). A tuple `grid_thw` is a constant to torch.compile.
        """
        for _, x in self.stages(pixel_values, grid_thw):
            embeddings = x
        return embeddings

    def hidden_states(self, pixel_values: Tensor, grid_thw: Tensor | Grids) -> dict[str, Tensor]:
        """Every intermediate of `forward` by name, see `stages`."""
        return dict(self.stages(pixel_values, grid_thw))

    def stages(
        self, pixel_values: Tensor, grid_thw: Tensor | Grids
    ) -> Iterator[tuple[str, Tensor]]:
        """The forward pass as (name, tensor) pairs; the last pair holds the embeddings."""
        layout = self.layout(pixel_values, grid_thw)
        x = self.patch_embed(pixel_values)
        yield "patch_embed", x  # [N, C] in natural order
        units = rearrange(x, "(N m) C -> N m C", m=self.merger.unit)
        x = units.index_select(0, layout.order).flatten(0, 1)
        for i, block in enumerate(self.blocks):
            is_full = i in self.config.fullatt_block_indexes
            x = block(x, layout.cos, layout.sin, layout.images if is_full else layout.windows)
            yield f"block{i}", x  # [N, C] in window order
        x = self.merger(x)
        yield "merger", x  # [N/4, out] in window order
        yield "merged", x.index_select(0, layout.restore)  # [N/4, out] in natural order

    def layout(self, pixel_values: Tensor, grid_thw: Tensor | Grids) -> WindowLayout:
        """Window order, RoPE and segments of the grids, after a check of the number of rows."""
        grid = grid_tuple(grid_thw, self.config.spatial_merge_size)
        shape = (sum(t * h * w for t, h, w in grid), self.patch_embed.proj.weight[0].numel())
        if (actual := tuple(pixel_values.shape)) != shape:
            raise ValueError(f"pixel_values {actual} must be {shape} for grid_thw {grid}")
        is_real = type(torch.empty(0, device="cpu")) is Tensor  # under a trace, values are missing
        make = make_layout if is_real else make_layout.__wrapped__
        return make(grid, self.config, pixel_values.device)
