"""Fast paths of training, beside the definitions that they equal (read last).

`packed_ar_loss` equals `autoregressive.ar_loss` to rounding. It lays the rows of a batch one behind
the other without padding, drops the tokens after a row's last supervised position (the decoder is
causal, so they do not affect it), and lets the top layer compute supervised rows only.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autoregressive import (
    IGNORE,
    ARLoss,
    NexusGenAR,
    loss_inputs,
    loss_terms,
    rope_index,
    scatter_rows,
)
from .decoder import QwenDecoder, causal_attention, rotation


class Packed(NamedTuple):
    """Rows of a batch without padding, one behind the other, that do not see each other."""

    lengths: tuple[int, ...]  # tokens of each row
    num_outputs: tuple[int, ...]  # how many at its end the top layer computes

    def output_rows(self, device: torch.device) -> Tensor:
        """Indices of what the top layer computes: [sum(num_outputs)]."""
        rows = zip(accumulate(self.lengths), self.num_outputs, strict=True)
        return torch.cat([torch.arange(end - n, end, device=device) for end, n in rows])

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention row by row; q [1, H, L, D] of all tokens or of the outputs: -> as q."""
        counts = self.lengths if q.shape[2] == k.shape[2] else self.num_outputs
        v = v.to(q.dtype)  # bf16 under autocast: once, not row by row
        parts = (x.split(self.lengths, 2) for x in (k, v))
        rows = zip(counts, self.lengths, q.split(counts, 2), *parts, strict=True)
        out = [causal_attention(n, t, device=q.device)(*qkv) for n, t, *qkv in rows if n]
        return torch.cat(out, dim=2)


def packed_hidden(decoder: QwenDecoder, x: Tensor, position_ids: Tensor, packed: Packed) -> Tensor:
    """x [1, sum(lengths), C], positions [3, 1, sum(lengths)] -> [1, sum(num_outputs), C]."""
    if x.shape[:2] != (1, sum(packed.lengths)):
        shape = tuple(x.shape[:2])
        raise ValueError(f"packed rows of {packed.lengths} tokens do not fill {shape}")
    cos, sin = rotation(decoder.config, position_ids, x.dtype)
    *lower, top = decoder.layers
    for layer in lower:
        x = layer(x, cos, sin, packed.attention)
    rows = packed.output_rows(x.device)
    return decoder.norm(top(x, cos, sin, packed.attention, query_rows=rows))


def packed_ar_loss(
    model: NexusGenAR,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    image_embeds: Tensor | None = None,
    slot_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> ARLoss:
    """`ar_loss` of right-padded rows, packed; with attention_mask only the heads are faster."""
    x, labels, slots, targets = loss_inputs(model, input_ids, labels, image_embeds, slot_mask)
    if position_ids is None:
        position_ids, _ = rope_index(input_ids, image_grid_thw, attention_mask, config=model.config)
    # one before what it predicts
    is_supervised = F.pad((labels != IGNORE)[:, 1:] | slots[:, 1:], (0, 1))
    if attention_mask is None:
        hidden = hidden_at(model.model, x, position_ids, is_supervised)
    else:
        hidden = model.model(x, position_ids, attention_mask)
    hidden, labels, slots = hidden[:, :-1], labels[:, 1:], slots[:, 1:]
    predicted = model.vision_head(gather_rows(hidden, slots))
    rows, labels = gather_rows(hidden, labels != IGNORE), labels[labels != IGNORE]
    rows = F.pad(rows, (0, 0, 0, pad_to_64(len(rows))))
    return loss_terms(model.lm_head(rows)[: len(labels)], labels, predicted, targets)


def hidden_at(decoder: QwenDecoder, x: Tensor, position_ids: Tensor, where: Tensor) -> Tensor:
    """Hidden states [B, L, C] that are right where [B, L] is True, and 0 at most other places."""
    if not where.any():
        where = F.pad(where[:, 1:], (1, 0), value=True)  # other processes wait in every block
    keep = where.flip(1).cumsum(1).flip(1) > 0  # up to a row's last supervised position
    is_output = keep & (where.cumsum(1) > 0)  # from its first one on
    lengths, outputs = (rows.sum(1)[keep[:, 0]].tolist() for rows in (keep, is_output))
    count = sum(outputs)
    # one more row, which sees itself alone and which nobody reads, fills up to a multiple of 64
    extra_outputs = pad_to_64(count)
    extra = extra_outputs + pad_to_64(sum(lengths) + extra_outputs)
    if extra:
        lengths, outputs = [*lengths, extra], [*outputs, extra_outputs]
    rows = F.pad(gather_rows(x, keep), (0, 0, 0, extra))
    positions = F.pad(position_ids[:, keep], (0, extra))
    packed = Packed(tuple(lengths), tuple(outputs))
    hidden = packed_hidden(decoder, rows[None], positions[:, None], packed)
    return scatter_rows(hidden.new_zeros(x.shape), is_output, hidden[0, :count])


def gather_rows(x: Tensor, where: Tensor) -> Tensor:
    """Rows [n, C] of x [B, L, C] where [B, L] is True: `x[where]`, with a faster gradient."""
    return x.flatten(0, 1).index_select(0, where.flatten().nonzero().squeeze(1))


def pad_to_64(rows: int) -> int:
    """Rows missing to a multiple of 64, if there are 512 or more.

    Few sizes recur then, so that oneDNN reuses its compiled kernels.
    """
    return -rows % 64 if rows >= 512 else 0
