"""The autoregressive peer: transformers' Qwen2.5-VL on our weights, which it shares with ours.

Models of random weights in three sizes, ours; the peer is built without weights and takes ours,
under the names of transformers 5, so both fit in the memory of one.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from nexus_min.config import ARConfig, NexusGenConfig, TextConfig, VisionConfig
from nexus_min.model.autoregressive import NexusGenAR
from nexus_min.model.vision import QwenViT

from .common import require

SMALL_TOWER = VisionConfig(
    depth=1,
    hidden_size=64,
    intermediate_size=64,
    num_heads=2,
    fullatt_block_indexes=(0,),
)
SIZES = {  # name: width, layers, heads, kv heads, MLP, vocabulary
    "30 M": (384, 8, 6, 2, 1536, 16_000),
    "150 M": (768, 12, 12, 4, 3072, 32_000),
    "500 M": (1280, 18, 10, 2, 5120, 32_000),
}


def ar_config(size: str) -> ARConfig:
    """Special tokens at the end of the vocabulary; ends of text out of reach of random weights."""
    if size == "tiny":
        return NexusGenConfig.tiny().ar
    width, layers, heads, kv_heads, mlp, vocabulary = SIZES[size]
    D = width // heads
    text = TextConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        mrope_section=(D // 8, 3 * D // 16, 3 * D // 16),
    )
    return ARConfig(
        text=text,
        vision=replace(SMALL_TOWER, out_hidden_size=width),
        image_token_id=vocabulary - 1,
        vision_start_token_id=vocabulary - 2,
        vision_end_token_id=vocabulary - 3,
        eos_token_id=-1,
        pad_token_id=-1,
    )


def our_ar(config: ARConfig) -> NexusGenAR:
    """Random weights of a trained model's scale: Linears as torch draws them, embeddings 0.02."""
    torch.manual_seed(0)
    model = NexusGenAR(config)
    for embedding in (model.model.embed_tokens, model.image_prefill_embeds):
        torch.nn.init.normal_(embedding.weight, std=0.02)
    return model


def their_text_config(config: TextConfig) -> dict:
    """Ours in transformers' words."""
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "rms_norm_eps", "max_position_embeddings",
    )  # fmt: skip
    rope = {
        "rope_type": "default",
        "rope_theta": config.rope_theta,
        "mrope_section": list(config.mrope_section),
    }
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return {name: getattr(config, name) for name in names} | {"rope_parameters": rope} | none


def their_ar(ours: NexusGenAR):
    """transformers' Qwen2_5_VLForConditionalGeneration on the same storage, sdpa attention."""
    require("transformers")
    from transformers import Qwen2_5_VLConfig
    from transformers import Qwen2_5_VLForConditionalGeneration as Peer

    c = ours.config
    config = Qwen2_5_VLConfig(
        text_config=their_text_config(c.text),
        vision_config=asdict(c.vision),
        image_token_id=c.image_token_id,
        vision_start_token_id=c.vision_start_token_id,
        vision_end_token_id=c.vision_end_token_id,
        attn_implementation="sdpa",
    )
    rename = (("model.", "model.language_model."), ("visual.", "model.visual."))
    weights = {}
    for name, value in ours.named_parameters():
        if not name.startswith(("vision_head", "image_prefill")):
            for old, new in rename:
                name = new + name.removeprefix(old) if name.startswith(old) else name
            weights[name] = value
    peer = adopt(Peer, config, weights)
    text, vision = peer.model.language_model, peer.model.visual
    text.rotary_emb = type(text.rotary_emb)(text.config)
    vision.rotary_pos_emb = type(vision.rotary_pos_emb)(vision.config)
    return peer


def their_vision(ours: QwenViT):
    """transformers' vision tower on the same storage, sdpa attention."""
    require("transformers")
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel as Peer,
    )

    config = Qwen2_5_VLVisionConfig(**asdict(ours.config), attn_implementation="sdpa")
    peer = adopt(Peer, config, dict(ours.named_parameters()))
    peer.rotary_pos_emb = type(peer.rotary_pos_emb)(peer.config)
    return peer


def adopt(Peer, config, weights: dict):
    """The peer's model whose parameters are these very tensors."""
    with torch.device("meta"):
        peer = Peer(config)
    peer.load_state_dict(weights, strict=True, assign=True)
    return peer.eval()
