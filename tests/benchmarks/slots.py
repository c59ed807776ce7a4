"""Text prompt -> all 81 image embeddings: one pass beside one token at a time with a cache.

The official code reads one slot a pass. Peers: the same weights in our own loop, and transformers'
Qwen2.5-VL text model with its `DynamicCache`, driven by `inputs_embeds`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nexus_min.model.autoregressive import (
    NexusGenAR,
    prefill_image_slots,
    prefill_image_slots_loop,
    rope_index,
)

from .common import Row, alternate, core_share, difference, dtypes, name_of
from .language import decoder_flop
from .peers import ar_config, our_ar, their_ar

PROMPT = 40  # tokens of a description of one line, the chat template included


def their_loop(model: NexusGenAR, peer, ids: torch.Tensor) -> torch.Tensor:
    """The official loop over transformers' model: prompt, then one prefill vector a pass."""
    positions, _ = rope_index(ids, config=model.config)
    x, cache, out = peer.model.language_model.embed_tokens(ids), None, []
    side, start = round(model.config.num_image_slots**0.5), ids.shape[1]
    for k, prefill in enumerate(model.image_prefill_embeds.weight):
        step = peer.model.language_model(
            inputs_embeds=x, position_ids=positions, past_key_values=cache, use_cache=True
        )
        out.append(model.vision_head(step.last_hidden_state[:, -1:]))
        cache, x = step.past_key_values, prefill[None, None]
        positions = torch.tensor([start, start + k // side, start + k % side]).view(3, 1, 1)
    return torch.cat(out, dim=1)


@torch.inference_mode()
def rows() -> Iterator[Row]:
    for size in ("30 M", "150 M"):
        for dtype in dtypes():
            yield from all_slots(size, dtype)


def all_slots(size: str, dtype: torch.dtype) -> Iterator[Row]:
    """One pass, beside both loops."""
    model = our_ar(ar_config(size)).to(dtype)
    peer, config = their_ar(model), model.config
    torch.manual_seed(1)
    ids = torch.randint(0, config.text.vocab_size - 16, (1, PROMPT))
    ids[0, -1] = config.vision_start_token_id
    flop = decoder_flop(model, PROMPT + config.num_image_slots - 1)
    core = core_share(lambda: prefill_image_slots(model, ids))
    want = prefill_image_slots(model, ids)
    loops = {
        f"our loop, {size}": lambda: prefill_image_slots_loop(model, ids),
        f"transformers loop, {size}": lambda: their_loop(model, peer, ids),
    }
    for name, loop in loops.items():
        error = difference(want, loop())
        times = alternate(lambda: prefill_image_slots(model, ids), loop, 3)
        yield Row(f"81 slots, {size}", name_of(dtype), name, *times, 10.0, error, flop, core)
