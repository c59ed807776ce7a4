"""Rotary position embeddings: two conventions, three sets of axes, pure functions of positions.

A pair of channels (a, b) at position p and frequency f is rotated by the angle p*f.
- *half-split* (Qwen): channel i is paired with channel i + D/2.
- *interleaved* (FLUX): channel 2i is paired with channel 2i + 1.

The vision tower rotates by (row, column). The decoder rotates by (t, h, w) in sections: M-RoPE,
section 2.1 of Qwen2-VL. FLUX rotates by (index, row, column) in consecutive blocks of channels.

Angles are fp32 or, for FLUX, fp64 as in black-forest-labs `math.py`: bf16 would be off by a radian
from position 256 on. Their cos and sin are at most 1, so the decoder may cast those to bf16.
"""

import torch
from einops import rearrange
from torch import Tensor

FP32 = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults are


def frequencies(dim: int, theta: float, device=None) -> Tensor:
    """theta^(-2i/dim) for i = 0 .. dim/2 - 1, fp32: [dim/2]."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


# ---- half-split: vision tower and decoder ------------------------------------------------------


def apply_rope_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a, b) -> (a, b) cos + (-b, a) sin, for the halves a, b of x [..., D]; cos, sin broadcast."""
    a, b = x.chunk(2, dim=-1)
    rotated = torch.cat((-b, a), dim=-1)
    return (rotated * sin).addcmul_(x, cos)  # the sum reuses the memory of one product


def vision_angles(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> Tensor:
    """positions [N, 2] = (row, column) -> angles [N, D/2]; `Qwen2_5_VisionRotaryEmbedding`."""
    freqs = frequencies(head_dim // 2, theta, positions.device)  # D/4 for each axis
    return rearrange(positions[..., None].float() * freqs, "N a f -> N (a f)")


def vision_cos_sin(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [N, D] of the vision tower, fp32."""
    angles = vision_angles(positions, head_dim).repeat(1, 2)  # the second half repeats the first
    return angles.cos(), angles.sin()


def mrope_cos_sin(
    position_ids: Tensor, head_dim: int, theta: float, mrope_section: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """position_ids [3, B, L] (t, h, w; integer or float) -> cos, sin [B, L, D], fp32.

    Official `apply_multimodal_rotary_pos_emb`.
    """
    freqs = frequencies(head_dim, theta, position_ids.device)
    angles = position_ids[..., None].float() * freqs  # [3, B, L, D/2]
    # the first section of the D/2 frequencies turns by t, the next by h, then w; * 2: both halves
    sections = angles.split(mrope_section, dim=-1)
    angles = torch.cat([section[axis] for axis, section in enumerate(sections)] * 2, dim=-1)
    return angles.cos(), angles.sin()


# ---- interleaved: MMDiT ------------------------------------------------------------------------


def flux_rope(ids: Tensor, axes_dim: tuple[int, ...], theta: float) -> tuple[Tensor, Tensor]:
    """ids [B, N, axes] -> cos, sin [B, 1, N, D/2], fp32, D = sum(axes_dim); official `EmbedND`."""
    ids64 = ids.detach().cpu().double()  # not every device has fp64
    angles = []
    for axis, dim in enumerate(axes_dim):
        freqs = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
        angles.append(ids64[..., axis, None] * freqs)
    angle = torch.cat(angles, dim=-1).unsqueeze(1)
    return angle.cos().float().to(ids.device), angle.sin().float().to(ids.device)


def apply_rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, N, D] in fp32, cast back; cos and sin [B, 1, N, D/2].

    A CPU multiplies complex numbers in one pass. `torch.compile` fuses real numbers only.
    """
    if x.device.type != "cpu":
        return rotate_real(x.float(), cos, sin).to(x.dtype)
    # (a, b) as the complex number a + ib, times e^(i angle)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def rotate_real(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (-b, a) sin in real numbers, on full rows: strided halves a, b would be slower."""
    cos, sin = (r.repeat_interleave(2, dim=-1) for r in (cos, sin))
    a, b = rearrange(x, "... (d two) -> two ... d", two=2)
    return torch.addcmul(x * cos, torch.stack((-b, a), dim=-1).flatten(-2), sin)
