"""Qwen2.5 causal decoder over embeddings: grouped-query attention, M-RoPE, an explicit cache.

Each layer computes x += attn(norm(x)); x += mlp(norm(x)), where attn = softmax(q k^T / sqrt(D)) v
and M-RoPE (section 2.1 of Qwen2-VL) rotates q and k. In figure 1a of Nexus-Gen this is the
"autoregressive model". Official classes: `Qwen2_5_VLModel`, `Qwen2_5_VLDecoderLayer`,
`Qwen2_5_VLSdpaAttention` (transformers 4.49).

A mask is boolean: True = visible. Right padding needs no mask, causal attention never reaches it.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import TextConfig
from .layers import RMSNorm, SwiGLU
from .rope import apply_rope_half, mrope_cos_sin

# queries [B, H, L, D], keys and values [B, H_kv, S, D] -> [B, H, L, D]
AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]
full_attention: AttentionFn = partial(F.scaled_dot_product_attention, enable_gqa=True)
ALL = slice(None)  # query_rows of a layer that computes every token


class KVCache:
    """Keys (already rotated by RoPE) and values of the tokens so far.

    `QwenDecoder.forward` advances `length` after all layers have written.
    """

    GROWTH = 256  # tokens; growing copies the cache, so it grows in steps

    def __init__(self) -> None:
        self.length = 0  # tokens in the cache, padding included
        self._buffers: list[Tensor] = []  # [2, B, H_kv, capacity, D] for each layer

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, a pair of [B, H_kv, S, D]."""
        return [tuple(buffer[:, :, :, : self.length]) for buffer in self._buffers]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new k, v [B, H_kv, L, D] of a layer; return all of them, [B, H_kv, S + L, D]."""
        past, end = self.length, self.length + k.shape[2]
        with torch.inference_mode(False):  # begun in inference mode, a cache is of use outside
            if layer == len(self._buffers):
                self._buffers.append(k.new_empty(2, *k.shape[:2], end + self.GROWTH, k.shape[3]))
            if self._buffers[layer].shape[3] < end:
                filled = self._buffers[layer][:, :, :, :past]
                self._buffers[layer] = F.pad(filled, (0, 0, 0, end + self.GROWTH - past))
        buffer = self._buffers[layer]
        buffer[0, :, :, past:end], buffer[1, :, :, past:end] = k, v  # in place: no copy of the past
        return buffer[0, :, :, :end], buffer[1, :, :, :end]

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens only."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} tokens to {length}")
        self.length = length


def causal_attention(
    num_queries: int, total: int, padding: Tensor | None = None, device=None
) -> AttentionFn:
    """Make the attention of the last `num_queries` of `total` tokens over themselves and the past.

    padding [B, total] is False or 0 at padded tokens.
    """
    if padding is None and num_queries in (1, total):
        # one query sees everything; for the whole sequence is_causal is faster than a mask
        return partial(full_attention, is_causal=num_queries == total)
    past = total - num_queries
    mask = torch.ones(num_queries, total, dtype=torch.bool, device=device).tril(past)
    if padding is not None:
        # every token sees itself, padded ones too: a row without a visible key would be NaN
        own = mask & ~mask.tril(past - 1)
        mask = (mask & padding.bool()[:, None, None]) | own
    return partial(full_attention, attn_mask=mask)  # [B or 1, 1, num_queries, total]


def rotation(config: TextConfig, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin [B, 1, L, D]: fp32, then cast to the dtype of the activations."""
    sections = config.head_dim, config.rope_theta, config.mrope_section
    cos, sin = (a.unsqueeze(1).to(dtype) for a in mrope_cos_sin(position_ids, *sections))
    return cos, sin


class Attention(nn.Module):
    """Grouped-query attention; q, k and v have biases, o has none."""

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
        attention_fn: AttentionFn = full_attention,
        cache: KVCache | None = None,
        layer: int = 0,
        query_rows: slice | Tensor = ALL,
    ) -> Tensor:
        """x [B, L, C], cos and sin [B, 1, L, D] -> [B, n, C] for the n `query_rows`."""
        # q [B, H, n, D] of the query rows only; k, v [B, H_kv, L, D] of all tokens
        q, k, v = (
            rearrange(proj(rows), "B L (H D) -> B H L D", D=self.head_dim)
            for proj, rows in ((self.q_proj, x[:, query_rows]), (self.k_proj, x), (self.v_proj, x))
        )
        q = apply_rope_half(q, cos[:, :, query_rows], sin[:, :, query_rows])
        k = apply_rope_half(k, cos, sin)
        if cache is not None:  # k is cached rotated: positions are absolute
            k, v = cache.append(layer, k, v)
        return self.o_proj(rearrange(attention_fn(q, k, v), "B H L D -> B L (H D)"))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP. Also used without a mask by the editing merger."""

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
        attention_fn: AttentionFn = full_attention,
        cache: KVCache | None = None,
        layer: int = 0,
        query_rows: slice | Tensor = ALL,
    ) -> Tensor:
        """As `Attention.forward`."""
        attn = self.self_attn(
            self.input_layernorm(x), cos, sin, attention_fn, cache, layer, query_rows
        )
        x = x[:, query_rows] + attn  # [B, n, C]: from here on, only the query rows
        return x + self.mlp(self.post_attention_layernorm(x))


class QwenDecoder(nn.Module):
    """Embeddings and (t, h, w) positions -> hidden states after the final RMSNorm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        if 2 * sum(config.mrope_section) != config.head_dim:  # a half turns by t, h and w
            sections = f"mrope_section {config.mrope_section}"
            raise ValueError(f"{sections} must add up to head_dim / 2 = {config.head_dim // 2}")
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
        num_outputs: int = 0,
    ) -> Tensor:
        """inputs_embeds [B, L, C] of L new tokens, position_ids [3, B, L] -> hidden [B, L, C].

        attention_mask [B, cached + L]: 0 at padding, needed for left padding only.
        cache: read and extended. trace: a list that receives the input of each layer, then hidden.
        num_outputs: compute only the last rows of the top layer, -> [B, num_outputs, C]; 0: all.
        """
        past = cache.length if cache is not None else 0
        x, (B, L, _) = inputs_embeds, inputs_embeds.shape
        total, top = past + L, len(self.layers) - 1
        # a wrong shape here could broadcast unnoticed
        if position_ids.shape != (3, B, L):
            raise ValueError(f"position_ids {tuple(position_ids.shape)} should be {(3, B, L)}")
        if attention_mask is not None and attention_mask.shape != (B, total):
            shape = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask {shape} should be {(B, total)}: {past} cached + {L}")
        cos, sin = rotation(self.config, position_ids, x.dtype)
        attention_fn = causal_attention(L, total, attention_mask, x.device)
        rows = ALL
        for i, layer in enumerate(self.layers):
            if trace is not None:
                trace.append(x)
            if i == top and num_outputs:  # nobody reads the other rows of the top layer
                attention_fn = causal_attention(num_outputs, total, attention_mask, x.device)
                rows = slice(-num_outputs, None)
            x = layer(x, cos, sin, attention_fn, cache, i, rows)
        if cache is not None:
            cache.length = total
        x = self.norm(x)
        if trace is not None:
            trace.append(x)
        return x
