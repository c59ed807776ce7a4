"""Initial weights of the tiny models: the little of pre-trained ones that training needs first."""

import torch
from einops import rearrange, repeat
from torch import nn

from ..model.autoregressive import NexusGenAR
from ..model.mmdit import MMDiT
from ..model.projector import ImageEmbeddingMerger
from ..model.rope import apply_rope_half, mrope_cos_sin

COSINE = 0.8  # between a word and its translation
HEAD_OFFSETS = (1, 2), (3, 4)  # tokens back; of the first heads in the first layers


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
def align_translations(words: nn.Embedding, translations: dict[int, list[int]]) -> None:
    """Give each word an embedding of cosine COSINE to its translation's; all keep their scale.

    So what is learned in one language serves the other, as in Qwen, which knows both.
    """
    for word, meaning in translations.items():
        same = words.weight[meaning].sum(0) / len(meaning) ** 0.5
        words.weight[word] = COSINE * same + (1 - COSINE**2) ** 0.5 * words.weight[word]


@torch.no_grad()
def init_value_copy(ar: NexusGenAR) -> None:
    """Attention starts by copying what it attends to, and the head by naming the token at hand.

    W_O is a small W_V^T, the head a small copy of the embeddings (which small Qwen2.5 models
    share). After "mimetic initialization" (arXiv 2305.09828), where W_O W_V is near -1, for vision;
    its W_Q = W_K was measured to be worse here.
    """
    for layer in ar.model.layers:
        attn = layer.self_attn
        nn.init.orthogonal_(attn.v_proj.weight)
        nn.init.zeros_(attn.v_proj.bias)
        groups = attn.o_proj.in_features // attn.v_proj.out_features
        values = rearrange(attn.v_proj.weight, "(H D) C -> H D C", D=attn.head_dim)
        attn.o_proj.weight.copy_(0.25 * repeat(values, "H D C -> C (H G D)", G=groups))
    ar.lm_head.weight.copy_(0.04 * ar.model.embed_tokens.weight)


@torch.no_grad()
def init_previous_token_heads(ar: NexusGenAR, strength: float = 4.0) -> None:
    """Two heads of each of the first two layers start by attending HEAD_OFFSETS tokens back.

    A noun's head then attends to its adjectives: the half of an induction head (arXiv 2209.11895)
    that is learned late. By its bias, the key is the same everywhere, and the query is that key
    rotated back. Between tokens d apart q . k is strength^2 times the sum, over the frequencies f
    of time, of cos(f (d - offset)), greatest at d = offset; the tokens themselves add little yet.
    """
    config = ar.model.config
    rope = config.head_dim, config.rope_theta, config.mrope_section
    key = torch.zeros(config.head_dim)
    key[: config.mrope_section[0]] = strength  # of time, which has the highest frequencies
    for layer, offsets in zip(ar.model.layers, HEAD_OFFSETS, strict=False):
        positions = -torch.tensor(offsets).expand(3, 1, -1)
        query = apply_rope_half(key, *mrope_cos_sin(positions, *rope)).flatten()
        layer.self_attn.q_proj.bias[: len(query)] = query
        layer.self_attn.k_proj.bias[: config.head_dim] = key  # which both heads share


def init_merger(merger: ImageEmbeddingMerger, ar: NexusGenAR) -> None:
    """The AR model's first layer, as the identity: each token starts as its own embedding."""
    merger.layers[0].load_state_dict(ar.model.layers[0].state_dict())
    nn.init.zeros_(merger.layers[0].self_attn.o_proj.weight)
    nn.init.zeros_(merger.layers[0].mlp.down_proj.weight)


def init_mmdit(mmdit: MMDiT) -> MMDiT:
    """adaLN-zero: every block starts as the identity, the velocity as 0."""
    for name, p in mmdit.named_parameters():
        if "mod.lin" in name or "modulation" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(p)
    return mmdit
