"""Sizes of every tower, under the field names of the official configuration files.

One frozen dataclass a tower; the defaults are the released full-size model (Nexus-GenV2 +
FLUX.1-dev), `NexusGenConfig.tiny()` is the toy-world model that trains on a laptop. No model file
knows which one it runs. Official sources: `config.json` of Qwen2.5-VL / Nexus-GenV2, `flux/util.py`
of black-forest-labs, the `text_encoder*/config.json` of FLUX.1-dev.
"""

from __future__ import annotations

from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any

LAYERS = {"depth", "depth_single_blocks", "num_layers", "num_hidden_layers", "num_res_blocks"}
MAX_LAYERS = 1000  # a model of more would be built for hours before its file is found not to fit


def fitting(known: Field, value: Any) -> Any:
    """`value` if it is what the field's default is: a number, or a list of sizes, as a tuple.

    ValueError naming the field.
    """
    if isinstance(known.default, tuple):
        whole = isinstance(value, list | tuple) and value and all(map(is_size, value))
        if not whole:
            raise ValueError(f"{known.name} must be a list of whole numbers, got {value!r:.80}")
        return tuple(value)
    if isinstance(known.default, float):
        if type(value) not in (int, float) or not abs(value) < 1e30:
            raise ValueError(f"{known.name} must be a number, got {value!r:.80}")
        return value
    if not is_size(value):
        raise ValueError(f"{known.name} must be a whole number, got {value!r:.80}")
    if known.name in LAYERS and value > MAX_LAYERS:
        raise ValueError(f"{known.name} must be at most {MAX_LAYERS}, got {value}")
    return value


def is_size(value: Any) -> bool:
    """Whether it is a whole number from 0 to 2^31 - 1."""
    return type(value) is int and 0 <= value < 2**31


class FromDict:
    """Build a config from an official JSON object, ignoring the keys that describe other things."""

    @classmethod
    def from_dict(cls, d: dict):
        """The config with the fields that `d` has; the others keep defaults. ValueError for a field
        of another type."""
        known = {f.name: f for f in fields(cls)}
        return cls(**{k: fitting(known[k], v) for k, v in d.items() if k in known})


@dataclass(frozen=True)
class VisionConfig(FromDict):
    """Qwen2.5-VL vision tower (`vision_config` of the official config.json)."""

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)


@dataclass(frozen=True)
class TextConfig(FromDict):
    """Qwen2.5 causal decoder (top level of the official config.json)."""

    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    vocab_size: int = 152064
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    max_position_embeddings: int = 128000

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, d: dict):
        """As `FromDict.from_dict`; the official JSON nests `mrope_section` under `rope_scaling`."""
        section = (d.get("rope_scaling") or {}).get("mrope_section")
        return super().from_dict(d | ({"mrope_section": section} if section else {}))


@dataclass(frozen=True)
class ARConfig(FromDict):
    """The autoregressive half: decoder, vision tower, special token ids, number of image slots."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    image_token_id: int = 151655
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    eos_token_id: int = 151645  # <|im_end|>
    pad_token_id: int = 151643
    num_image_slots: int = 81  # rows of image_prefill_embeds; a square grid of merged tokens

    @property
    def slot_grid(self) -> tuple[int, int, int]:
        """Grid (t, h, w) of a generated image in patches before merging; 81 slots: (1, 18, 18)."""
        side = round(self.num_image_slots**0.5) * self.vision.spatial_merge_size
        return 1, side, side

    @classmethod
    def from_dict(cls, d: dict):
        """Read the official flat config.json (`vision_config` nested), or `to_dict`'s form."""
        own = super().from_dict({k: v for k, v in d.items() if k not in ("text", "vision")})
        text = TextConfig.from_dict(d.get("text", d))
        vision = VisionConfig.from_dict(d.get("vision") or d.get("vision_config") or {})
        return replace(own, text=text, vision=vision)


@dataclass(frozen=True)
class MMDiTConfig(FromDict):
    """FLUX.1-dev double/single-stream transformer (black-forest-labs `FluxParams`)."""

    in_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, int, int] = (16, 56, 56)
    theta: float = 10_000.0
    time_embed_dim: int = 256


@dataclass(frozen=True)
class AutoEncoderConfig(FromDict):
    """FLUX VAE (black-forest-labs `AutoEncoderParams`)."""

    in_channels: int = 3
    ch: int = 128
    out_ch: int = 3
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    num_groups: int = 32
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    @property
    def downsample(self) -> int:
        """Pixels per latent cell along one side: 8 for FLUX."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class CLIPConfig(FromDict):
    """CLIP-L text model (`text_encoder/config.json`)."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class T5Config(FromDict):
    """T5-XXL encoder (`text_encoder_2/config.json`)."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


@dataclass(frozen=True)
class NexusGenConfig:
    """The whole system: every tower, and the image sizes that tie them together (pixels)."""

    ar: ARConfig = field(default_factory=ARConfig)
    mmdit: MMDiTConfig = field(default_factory=MMDiTConfig)
    autoencoder: AutoEncoderConfig = field(default_factory=AutoEncoderConfig)
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    t5: T5Config = field(default_factory=T5Config)
    image_size: int = 512  # default side of a generated image
    reference_size: int = (
        504  # side at which the editing decoder sees the source: twice the target's
    )
    min_pixels: int = 3136  # bounds of smart_resize for images the AR model reads
    max_pixels: int = 262640
    cfg_scale: float = 3.0  # default of generation; editing always defaults to 1.0
    num_steps: int = 50  # default Euler steps
    repetition_penalty: float = 1.05  # on the logits of text tokens seen before; 1 is off

    @property
    def target_size(self) -> int:
        """Side in pixels of the view that becomes the image slots: 81 slots -> 252."""
        return self.ar.slot_grid[1] * self.ar.vision.patch_size

    @classmethod
    def v2(cls) -> NexusGenConfig:
        """The released Nexus-GenV2 + FLUX.1-dev."""
        return cls()

    @classmethod
    def tiny(cls) -> NexusGenConfig:
        """The toy-world model: 64-px images, 16 slots, 64 reference tokens; `v2` in small."""
        return cls(
            ar=ARConfig(
                text=TextConfig(
                    hidden_size=128,
                    intermediate_size=384,
                    num_hidden_layers=4,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    vocab_size=768,
                    rope_theta=10_000.0,  # most frequencies turn little: words find what they mean
                    mrope_section=(4, 5, 7),
                    max_position_embeddings=2048,
                ),
                vision=VisionConfig(
                    depth=4,
                    hidden_size=128,
                    intermediate_size=256,
                    num_heads=4,
                    window_size=56,
                    out_hidden_size=128,
                    fullatt_block_indexes=(1, 3),
                ),
                num_image_slots=16,
                **TINY_TOKEN_IDS,
            ),
            mmdit=MMDiTConfig(
                in_channels=64,
                vec_in_dim=32,
                context_in_dim=96,
                hidden_size=128,
                mlp_ratio=3.0,
                num_heads=4,
                depth=1,
                depth_single_blocks=4,
                axes_dim=(4, 14, 14),
                theta=0.1,  # 1 to 7 radians a token: a source's embeddings lie half a token apart
            ),
            autoencoder=AutoEncoderConfig(
                ch=16,
                ch_mult=(1, 2, 2, 2),
                num_res_blocks=1,
                z_channels=16,
                num_groups=8,
                scale_factor=1.0,
                shift_factor=0.0,
            ),
            image_size=64,
            reference_size=224,
            min_pixels=112 * 112,
            max_pixels=112 * 112,
            cfg_scale=1.0,
            num_steps=3,  # the embeddings leave little open: more steps draw no better
            repetition_penalty=1.0,  # "a red circle and a red star" repeats itself for good reason
        )

    @classmethod
    def from_dict(cls, d: dict) -> NexusGenConfig:
        """Inverse of `to_dict`; absent parts keep the full-size defaults."""
        parts = {
            "ar": ARConfig,
            "mmdit": MMDiTConfig,
            "autoencoder": AutoEncoderConfig,
            "clip": CLIPConfig,
            "t5": T5Config,
        }
        known = {f.name: f for f in fields(cls)}
        return cls(
            **{
                k: parts[k].from_dict(v) if k in parts else fitting(known[k], v)
                for k, v in d.items()
                if k in known
            }
        )

    def to_dict(self) -> dict:
        """Plain JSON-ready nested dict."""
        return asdict(self)


# Ids the toy tokenizer gives its special tokens: right after 256 bytes + merges, in Qwen's order.
TINY_TOKEN_IDS = {
    "pad_token_id": 746,  # <|endoftext|>
    "eos_token_id": 748,  # <|im_end|>
    "vision_start_token_id": 755,
    "vision_end_token_id": 756,
    "image_token_id": 758,
}
