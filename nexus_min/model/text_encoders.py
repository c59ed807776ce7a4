"""CLIP-L and T5: the text side of FLUX, which Nexus-Gen needs for empty and negative prompts only.

`CLIPTextModel` turns 77 ids into one pooled vector (added to time and guidance in the modulation),
`T5Encoder` turns 512 ids into context tokens. The positive context of Nexus-Gen comes from its own
projectors; with the default empty prompts both outputs here are constants. No equation of the
paper. Official classes: `CLIPTextModel` and `T5EncoderModel` of transformers 4.49, as DiffSynth 1.1
calls them (no attention mask: padding takes part); attributes are the keys of
`text_encoder/model.safetensors` and `text_encoder_2/*`.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Regex, Tokenizer
from torch import Tensor, nn

from ..config import CLIPConfig, T5Config
from .layers import RMSNorm

# ---- CLIP-L -------------------------------------------------------------------------------------


class CLIPAttention(nn.Module):
    """Causal multi-head self-attention with biases: [B, L, C] -> [B, L, C]."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in "qkv")
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        heads = (rearrange(y, "B L (H D) -> B H L D", H=self.num_heads) for y in projected)
        x = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.out_proj(rearrange(x, "B H L D -> B L (H D)"))


class CLIPLayer(nn.Module):
    """Pre-norm transformer block: [B, L, C] -> [B, L, C]."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        dim, inner = config.hidden_size, config.intermediate_size
        self.layer_norm1 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.self_attn = CLIPAttention(config)
        self.layer_norm2 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, inner), "fc2": nn.Linear(inner, dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        hidden = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](hidden * torch.sigmoid(1.702 * hidden))  # quick_gelu(hidden)


class CLIPTextModel(nn.Module):
    """CLIP-L text model: ids [B, L <= 77] -> pooled [B, C]; no projection after the final norm."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config, dim = config, config.hidden_size
        # the dicts spell the released names, such as text_model.encoder.layers.0
        embeddings = {"token_embedding": nn.Embedding(config.vocab_size, dim)}
        embeddings["position_embedding"] = nn.Embedding(config.max_position_embeddings, dim)
        layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.num_hidden_layers))
        self.text_model = nn.ModuleDict()
        self.text_model["embeddings"] = nn.ModuleDict(embeddings)
        self.text_model["encoder"] = nn.ModuleDict({"layers": layers})
        self.text_model["final_layer_norm"] = nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def hidden_states(self, ids: Tensor) -> list[Tensor]:
        """The embeddings and every layer's output [B, L, C], before the final norm."""
        check_ids("CLIP", ids, self.config.max_position_embeddings)
        tokens, positions = self.text_model["embeddings"].values()
        states = [tokens(ids) + positions.weight[: ids.shape[1]]]
        for layer in self.text_model["encoder"]["layers"]:
            states.append(layer(states[-1]))
        return states

    def forward(self, ids: Tensor) -> Tensor:
        x = self.text_model["final_layer_norm"](self.hidden_states(ids)[-1])
        # pooled: the state at the first end-of-text, which is the largest id
        return x[torch.arange(len(x), device=x.device), ids.argmax(dim=-1)]


# ---- T5 -----------------------------------------------------------------------------------------


def relative_buckets(length: int, num_buckets: int, max_distance: int, device=None) -> Tensor:
    """Bucket of (key - query) for every query and key: [L, L] in [0, num_buckets).

    Half of the buckets serve each sign; half of those hold one distance each, the others grow
    logarithmically up to `max_distance`. Official `T5Attention._relative_position_bucket`.
    """
    half = num_buckets // 2
    exact = half // 2
    position = torch.arange(length, device=device)
    offset = position[None] - position[:, None]
    distance = offset.abs()
    # the clamp avoids log(0); small distances take the other branch
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return half * (offset > 0) + torch.where(distance < exact, distance, far)


class T5Attention(nn.Module):
    """Self-attention, no biases, *not* scaled by 1/sqrt(D): [B, L, C] -> [B, L, C]."""

    def __init__(self, config: T5Config, has_bias: bool):
        super().__init__()
        inner, num_buckets = config.num_heads * config.d_kv, config.relative_attention_num_buckets
        self.num_heads = config.num_heads
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in "qkv")
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(num_buckets, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        projected = self.q(x), self.k(x), self.v(x)
        heads = (rearrange(y, "B L (H D) -> B H L D", H=self.num_heads) for y in projected)
        # the bias [1, H, L, L] is all that T5 knows of positions
        x = F.scaled_dot_product_attention(*heads, attn_mask=bias, scale=1.0)
        return self.o(rearrange(x, "B H L D -> B L (H D)"))


class T5GatedMLP(nn.Module):
    """wo(gelu_tanh(wi_0(x)) * wi_1(x)): [B, L, C] -> [B, L, C]."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class T5Block(nn.Module):
    """Pre-norm attention and MLP; only block 0 owns the position bias, which all blocks use."""

    def __init__(self, config: T5Config, has_bias: bool):
        super().__init__()
        # the dicts spell the released names: layer.0.SelfAttention, layer.1.DenseReluDense
        self.layer = nn.ModuleList([nn.ModuleDict(), nn.ModuleDict()])
        self.layer[0]["SelfAttention"] = T5Attention(config, has_bias)
        self.layer[0]["layer_norm"] = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.layer[1]["DenseReluDense"] = T5GatedMLP(config)
        self.layer[1]["layer_norm"] = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, mlp = self.layer
        x = x + attention["SelfAttention"](attention["layer_norm"](x), bias)
        return x + mlp["DenseReluDense"](mlp["layer_norm"](x))


class T5Encoder(nn.Module):
    """T5 encoder: ids [B, L] -> context [B, L, d_model]; attention includes the padding."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        blocks = nn.ModuleList(T5Block(config, i == 0) for i in range(config.num_layers))
        norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.encoder = nn.ModuleDict({"block": blocks, "final_layer_norm": norm})

    def forward(self, ids: Tensor) -> Tensor:
        check_ids("T5", ids)
        blocks, norm = self.encoder.values()
        num_buckets = self.config.relative_attention_num_buckets
        max_distance = self.config.relative_attention_max_distance
        buckets = relative_buckets(ids.shape[1], num_buckets, max_distance, ids.device)
        table = blocks[0].layer[0]["SelfAttention"].relative_attention_bias
        bias = rearrange(table(buckets), "q k H -> 1 H q k")
        x = self.shared(ids)
        for block in blocks:
            x = block(x, bias)
        return norm(x)


# ---- tokenizers ---------------------------------------------------------------------------------


def check_ids(name: str, ids: Tensor, longest: int | None = None) -> None:
    """ValueError unless ids are [B, L], L between 1 and `longest`."""
    if ids.ndim != 2 or not ids.shape[1] or (longest and ids.shape[1] > longest):
        limit = f"1 to {longest}" if longest else "at least 1"
        raise ValueError(f"{name} ids must be [B, L] with L {limit}, got {tuple(ids.shape)}")


# CLIP's words: contractions, runs of letters, single digits, runs of anything else but space.
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def clip_tokenizer(folder: str | Path, length: int = 77) -> Callable[[str], Tensor]:
    """text -> ids [1, length] from `vocab.json` and `merges.txt` of FLUX.1-dev's `tokenizer/`.

    Lower-cased byte-level BPE between start and end of text, padded with the end (49407).
    """
    vocab, merges = (str(existing(folder, name)) for name in ("vocab.json", "merges.txt"))
    bpe = tokenizers.models.BPE.from_file(vocab, merges, end_of_word_suffix="</w>")
    tokenizer = Tokenizer(bpe)  # without special tokens: a prompt that spells one is plain text
    normalizers, pre = tokenizers.normalizers, tokenizers.pre_tokenizers
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    letters = pre.ByteLevel(add_prefix_space=False, use_regex=False)  # bytes as letters
    tokenizer.pre_tokenizer = pre.Sequence([words, letters])
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end)],
    )
    return padded(tokenizer, length, end)


def t5_tokenizer(folder: str | Path, length: int = 512) -> Callable[[str], Tensor]:
    """text -> ids [1, length] from `tokenizer.json` of FLUX.1-dev's `tokenizer_2/`.

    SentencePiece pieces, one `</s>`, then `<pad>`.
    """
    spec = json.loads(existing(folder, "tokenizer.json").read_text("utf-8"))
    special = {token["content"] for token in spec.pop("added_tokens")}
    # A prompt must not spell a special piece. No word contains a space, so a space hides the piece.
    vocab = spec["model"]["vocab"]
    vocab[:] = [(f" {piece}" if piece in special else piece, score) for piece, score in vocab]
    tokenizer = Tokenizer.from_str(json.dumps(spec | {"added_tokens": []}))
    return padded(tokenizer, length, " <pad>")


def existing(folder: str | Path, name: str) -> Path:
    """The path of a tokenizer file; ValueError when it is missing."""
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"tokenizer file {path} is missing")
    return path


def padded(tokenizer: Tokenizer, length: int, pad: str) -> Callable[[str], Tensor]:
    """Truncate and pad every prompt to `length` ids."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    return lambda text: torch.tensor([tokenizer.encode(text).ids], device="cpu")
