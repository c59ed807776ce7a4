"""Text in, text out: a prompt of 512 tokens until its first token, and 128 tokens read greedily.

Peer: transformers `generate` on the same weights, sdpa, `DynamicCache`; both with the official
repetition penalty of 1.05. The tokens must be the same ones: "difference" is the share that is not.
A step of decoding reads every weight once and does two FLOP with it: the note gives bytes a second
beside what a large copy moves, since the ceiling of matmuls tells nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from nexus_min.model.autoregressive import NexusGenAR, generate

from .common import Row, alternate, copy_speed, core_share, dtypes, name_of
from .peers import ar_config, our_ar, their_ar

PROMPT, TOKENS = 512, 128
ROUNDS = {"150 M": (4, 2), "500 M": (3, 1)}  # of prefill, of decoding


def decoder_flop(model: NexusGenAR, tokens: int) -> float:
    """FLOP of the layers' Linears and of causal attention over `tokens` from the start."""
    text = model.config.text
    linears = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    attention = text.num_hidden_layers * tokens * text.hidden_size
    return 2.0 * tokens * (linears + attention)


def read_bytes(model: NexusGenAR) -> float:
    """Bytes of the weights that one step of decoding reads."""
    parts = (model.model.layers, model.lm_head)
    return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())


def ours(model: NexusGenAR, ids: torch.Tensor, tokens: int) -> list[int]:
    return [token for _, token in generate(model, ids, max_new_tokens=tokens)]


def theirs(peer, ids: torch.Tensor, tokens: int) -> list[int]:
    out = peer.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        repetition_penalty=1.05,
        suppress_tokens=[peer.config.vision_end_token_id, peer.config.image_token_id],
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist()


def unlike(a: list[int], b: list[int]) -> float:
    """Share of the tokens that differ."""
    return sum(x != y for x, y in zip(a, b, strict=True)) / len(a)


def rows() -> Iterator[Row]:
    for size in ROUNDS:
        for dtype in dtypes():
            yield from prefill_and_decode(size, dtype, 1.1 if dtype == torch.float32 else 1.5)


def prefill_and_decode(size: str, dtype: torch.dtype, goal: float) -> Iterator[Row]:
    """A prompt until its first token; then, by difference, the tokens that follow."""
    model, (prefills, decodes) = our_ar(ar_config(size)).to(dtype), ROUNDS[size]
    peer, name = their_ar(model), f"transformers generate, {size}"
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.text.vocab_size - 16, (1, PROMPT))
    tokens_of: dict[str, list[int]] = {}

    def run_ours(tokens: int) -> None:
        tokens_of["ours"] = ours(model, ids, tokens)

    def run_theirs(tokens: int) -> None:
        tokens_of["theirs"] = theirs(peer, ids, tokens)

    both, kind = (run_ours, run_theirs), name_of(dtype)
    run_ours(1), run_theirs(1)
    first = alternate(*(partial(run, 1) for run in both), prefills)
    error, flop = unlike(*tokens_of.values()), decoder_flop(model, PROMPT)
    core = core_share(partial(run_ours, 1))
    yield Row(f"prefill, {PROMPT} tokens", kind, name, *first, goal, error, flop, core)
    whole = alternate(*(partial(run, TOKENS) for run in both), decodes)
    a, b = (all_ - one for all_, one in zip(whole, first, strict=True))
    speed = read_bytes(model) * (TOKENS - 1) / a
    note = f"{speed / 1e9:.0f} GB/s of weights; a copy moves {copy_speed() / 1e9:.0f} GB/s"
    work, error = f"greedy decode, {TOKENS} tokens", unlike(*tokens_of.values())
    yield Row(work, kind, name, a, b, goal, error, note=note)
