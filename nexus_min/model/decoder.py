"""Qwen2.5 causal decoder over embeddings: grouped-query attention, M-RoPE, an explicit cache.

Each layer computes x += attn(norm(x)); x += mlp(norm(x)), with attn = softmax(q k^T / sqrt(D)) v
over q and k turned by M-RoPE (Qwen2-VL section 2.1); Nexus-Gen figure 1a, "autoregressive model".
Official classes: `Qwen2_5_VLModel`, `Qwen2_5_VLDecoderLayer`, `Qwen2_5_VLSdpaAttention`
(transformers 4.49).

A mask is boolean everywhere: True = may be looked at. Right padding needs none: causal attention
never reaches it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import TextConfig
from .layers import RMSNorm, SwiGLU
from .rope import apply_rope_half, mrope_cos_sin

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values -> as queries
ALL = slice(None)


class KVCache:
    """Rotated keys and values of the tokens seen so far, written into room made ahead for more.

    `QwenDecoder.forward` moves `length` on when all layers have written.
    """

    ROOM = 256  # tokens; making room copies what is held, which for every token would show

    def __init__(self) -> None:
        self.length = 0  # tokens held, padding included
        self._rooms: list[Tensor] = []  # [2, B, H_kv, room, D] a layer

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values held, one pair [B, H_kv, S, D] a layer."""
        return [tuple(room[:, :, :, : self.length]) for room in self._rooms]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new k, v [B, H_kv, L, D] of a layer; return all of them, [B, H_kv, S + L, D]."""
        past, end = self.length, self.length + k.shape[2]
        if layer == len(self._rooms):
            self._rooms.append(k.new_empty(2, *k.shape[:2], end + self.ROOM, k.shape[3]))
        if self._rooms[layer].shape[3] < end:
            held = self._rooms[layer][:, :, :, :past]
            self._rooms[layer] = F.pad(held, (0, 0, 0, end + self.ROOM - past))
        room = self._rooms[layer]
        room[0, :, :, past:end], room[1, :, :, past:end] = k, v
        return room[0, :, :, :end], room[1, :, :, :end]

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens. ValueError when fewer are held."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} tokens to {length}")
        self.length = length


def causal_mask(length: int, past: int, padding: Tensor | None, device=None) -> Tensor | None:
    """Mask [B or 1, 1, L, past + L] of L new tokens after `past` cached ones; None = not needed.

    padding [B, past + L] is False at padded tokens. Every token sees itself, padded ones too, since
    a row without a single visible key would be NaN. None for a single token, and for plain causal
    attention from the start (past = 0), for which SDPA has a faster switch.
    """
    if padding is None and (past == 0 or length == 1):
        return None
    earlier = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
    if padding is None:
        return earlier[None, None]
    own = earlier & ~earlier.tril(past - 1)
    return (earlier & padding.bool()[:, None, None]) | own


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v; q [B, H, L, D], k and v [B, H_kv, S, D] -> [B, H, L, D]."""
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True)


def causal(last: int, total: int, padding: Tensor | None = None, device=None) -> Attend:
    """`attend` for the last of `total` tokens; padding [B, total] is False at padded ones."""
    mask = causal_mask(last, total - last, padding, device)
    return partial(attend, mask=mask, is_causal=mask is None and last == total)


class Packed(NamedTuple):
    """Rows of a batch without their padding, one behind the other, that do not see each other."""

    lengths: tuple[int, ...]  # tokens of each row
    last: tuple[int, ...]  # how many at its end the top layer computes

    def ends(self, device: torch.device) -> Tensor:
        """Indices of what the top layer computes: [sum(last)]."""
        rows = zip(accumulate(self.lengths), self.last, strict=True)
        return torch.cat([torch.arange(end - n, end, device=device) for end, n in rows])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention row by row; q [1, H, L, D] of all tokens or of the ends: -> as q."""
        last, total = self.lengths if q.shape[2] == k.shape[2] else self.last, self.lengths
        v = v.to(q.dtype)  # bf16 under autocast: once, not row by row
        rows = zip(last, total, q.split(last, 2), k.split(total, 2), v.split(total, 2), strict=True)
        parts = [causal(n, t, device=q.device)(*qkv) for n, t, *qkv in rows if n]
        return torch.cat(parts, dim=2)


class Attention(nn.Module):
    """Grouped-query attention; q, k, v with bias, o without."""

    def __init__(self, config: TextConfig):
        super().__init__()
        width, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(width, config.num_attention_heads * D)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * D)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * D)
        self.o_proj = nn.Linear(config.num_attention_heads * D, width, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Attend = attend,
        cache: KVCache | None = None,
        layer: int = 0,
        new: slice | Tensor = ALL,
    ) -> Tensor:
        """x [B, L, C], cos and sin [B, 1, L, D] -> [B, n, C] of the n `new` tokens."""
        q, k, v = (
            rearrange(proj(seen), "B L (H D) -> B H L D", D=self.head_dim)
            for proj, seen in ((self.q_proj, x[:, new]), (self.k_proj, x), (self.v_proj, x))
        )
        q = apply_rope_half(q, cos[:, :, new], sin[:, :, new])
        k = apply_rope_half(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        return self.o_proj(rearrange(attend(q, k, v), "B H L D -> B L (H D)"))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP; as it is by default, without a mask, the editing merger's."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Attend = attend,
        cache: KVCache | None = None,
        layer: int = 0,
        new: slice | Tensor = ALL,
    ) -> Tensor:
        """x [B, L, C], cos and sin [B, 1, L, D] -> [B, n, C] of the n `new` tokens."""
        seen = self.input_layernorm(x)
        x = x[:, new] + self.self_attn(seen, cos, sin, attend, cache, layer, new)
        return x + self.mlp(self.post_attention_layernorm(x))


class QwenDecoder(nn.Module):
    """Embeddings and their (t, h, w) positions in, final-normed hidden states out."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        trace: list[Tensor] | None = None,
        last: int = 0,
        packed: Packed | None = None,
    ) -> Tensor:
        """Hidden states [B, L, C] of L new tokens, after the final norm.

        inputs_embeds [B, L, C]; position_ids [3, B, L]; attention_mask [B, cached + L], False or 0
        at padding (needed for left padding only); `cache` is read and extended; `trace`, when a
        list is given, receives the input of each layer and the result; with `last`, the top layer
        computes the last rows only: [B, last, C]. With `packed`, B is 1 and its one row holds many
        without padding: [1, sum(packed.last), C]. ValueError when the shapes disagree.
        """
        past = cache.length if cache is not None else 0
        self._check(inputs_embeds, position_ids, attention_mask, past)
        if packed and (cache is not None or attention_mask is not None or last):
            raise ValueError("packed rows go without cache, attention_mask and last")
        if packed and inputs_embeds.shape[:2] != (1, sum(packed.lengths)):
            rows = tuple(inputs_embeds.shape[:2])
            raise ValueError(f"packed rows of {packed.lengths} tokens do not fill {rows}")
        cos, sin = self._rotation(position_ids, inputs_embeds.dtype)
        total = past + inputs_embeds.shape[1]
        x = inputs_embeds
        for i, layer in enumerate(self.layers):
            if trace is not None:
                trace.append(x)
            top = i == len(self.layers) - 1
            count = last if last and top else total - past
            new = packed.ends(x.device) if packed and top else slice(-count, None)
            if i == 0 or top:
                look = packed.attend if packed else causal(count, total, attention_mask, x.device)
            x = layer(x, cos, sin, look, cache, i, new)
        if cache is not None:
            cache.length = total
        x = self.norm(x)
        if trace is not None:
            trace.append(x)
        return x

    def _rotation(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin [B, 1, L, D] in fp32, then cast to the activations' dtype as upstream."""
        c = self.config
        pair = mrope_cos_sin(position_ids, c.head_dim, c.rope_theta, c.mrope_section)
        cos, sin = (rearrange(a, "B L D -> B 1 L D").to(dtype) for a in pair)
        return cos, sin

    def _check(self, x: Tensor, positions: Tensor, mask: Tensor | None, past: int) -> None:
        if x.ndim != 3 or x.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"embeddings {tuple(x.shape)} should be [B, L, {self.config.hidden_size}]"
            )
        B, L, _ = x.shape
        if positions.shape != (3, B, L):
            raise ValueError(f"position_ids {tuple(positions.shape)} should be {(3, B, L)}")
        if mask is not None and mask.shape != (B, past + L):
            want = f"{(B, past + L)}: {past} cached + {L} new"
            raise ValueError(f"attention_mask {tuple(mask.shape)} should be {want}")
