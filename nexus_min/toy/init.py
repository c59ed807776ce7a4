"""How the tiny models begin: with the little of what the paper's pre-trained ones know already."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import nn

from ..model.autoregressive import NexusGenAR
from ..model.mmdit import MMDiT
from ..model.rope import apply_rope_half, mrope_cos_sin

LIKENESS = 0.8  # of a word and its translation, a cosine
LOOKING_BACK = (1, 2), (3, 4)  # tokens; for the first heads of the first layers


def init_ar(ar: NexusGenAR) -> NexusGenAR:
    """Every block starts as the identity; heads start small, vectors at the scale of embeddings."""
    for layer in ar.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    nn.init.normal_(ar.lm_head.weight, std=0.02)
    nn.init.normal_(ar.model.embed_tokens.weight, std=0.5)
    nn.init.normal_(ar.image_prefill_embeds.weight, std=0.5)
    return ar


@torch.no_grad()
def translate(words: nn.Embedding, translations: dict[int, list[int]]) -> None:
    """Let each word begin much as its translation does: what Qwen knows of two languages.

    cos = LIKENESS; all rows keep their scale. What is learnt in one language then serves the other:
    words are found by what they mean long before a tiny model would find that two mean the same.
    """
    for word, meaning in translations.items():
        same = words.weight[meaning].sum(0) / len(meaning) ** 0.5
        words.weight[word] = LIKENESS * same + (1 - LIKENESS**2) ** 0.5 * words.weight[word]


@torch.no_grad()
def ready_to_copy(ar: NexusGenAR) -> None:
    """Let attention begin by handing on what it looks at, and the head by saying what is there.

    W_O is a small W_V^T, the head a small copy of the words (which small Qwen2.5 models share for
    good): most of what is said is looked up somewhere. After "mimetic initialization" (arXiv
    2305.09828), where W_O W_V is near -1, for vision; its W_Q = W_K was measured to be worse here.
    """
    for layer in ar.model.layers:
        attn = layer.self_attn
        nn.init.orthogonal_(attn.v_proj.weight)
        nn.init.zeros_(attn.v_proj.bias)
        groups = attn.o_proj.in_features // attn.v_proj.out_features
        seen = rearrange(attn.v_proj.weight, "(H D) C -> H D C", D=attn.head_dim)
        attn.o_proj.weight.copy_(0.25 * repeat(seen, "H D C -> C (H G D)", G=groups))
    ar.lm_head.weight.copy_(0.04 * ar.model.embed_tokens.weight)


@torch.no_grad()
def ready_to_look_back(ar: NexusGenAR, strength: float = 4.0) -> None:
    """Let two heads of each of the first two layers begin by looking LOOKING_BACK tokens back.

    A noun then knows what was said of it, and what comes next whose it is: the half of looking up
    (an induction head, arXiv 2209.11895) that is learnt late, and that pre-trained models bring. A
    key that is the same everywhere, by its bias, fits best a query that is that key turned back.
    Between tokens d apart q . k is then strength^2 times the sum, over the frequencies f of time,
    of cos(f (d - back)), greatest at d = back; what the tokens are adds little yet.
    """
    config = ar.model.config
    key = torch.zeros(config.head_dim)
    key[: config.mrope_section[0]] = strength  # of time, whose frequencies turn most
    for layer, distances in zip(ar.model.layers, LOOKING_BACK, strict=False):
        queries = []
        for back in distances:
            place = torch.full((3, 1, 1), -back)
            turn = mrope_cos_sin(place, config.head_dim, config.rope_theta, config.mrope_section)
            queries.append(apply_rope_half(key, *turn).flatten())
        query = torch.cat(queries)
        layer.self_attn.q_proj.bias[: len(query)] = query
        layer.self_attn.k_proj.bias[: config.head_dim] = key  # which both heads share


def init_mmdit(mmdit: MMDiT) -> MMDiT:
    """adaLN-zero: every block starts as the identity, the velocity as 0."""
    for name, p in mmdit.named_parameters():
        if "mod.lin" in name or "modulation" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(p)
    return mmdit
