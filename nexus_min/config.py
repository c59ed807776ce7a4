"""Sizes of every network ("tower"), under the field names of the official configuration files.

The defaults are `NexusGenConfig.v2()`, the released Nexus-GenV2 + FLUX.1-dev; the toy-world model
`NexusGenConfig.tiny()` trains on a laptop. No model file knows which one it runs.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, asdict, dataclass, field, fields

LAYERS = {"depth", "depth_single_blocks", "num_layers", "num_hidden_layers", "num_res_blocks"}


def parse_field(spec: Field, value: object) -> object:
    """A JSON value, checked against the default of its field."""
    if spec.default is MISSING:
        return spec.default_factory.from_dict(value)  # the config of a tower
    kind = type(spec.default)
    numbers = value if kind is tuple and isinstance(value, list | tuple) and value else [value]
    limit = 1000 if spec.name in LAYERS else 2**31 - 1  # more layers would take hours to build
    if kind is float and not (type(value) in (int, float) and abs(value) < 1e30):
        raise ValueError(f"{spec.name} must be a number, got {value!r:.80}")
    if kind is not float and not all(type(n) is int and 0 <= n <= limit for n in numbers):
        raise ValueError(f"{spec.name} must be whole numbers from 0 to {limit}, got {value!r:.80}")
    return tuple(numbers) if kind is tuple else value


class Config:
    """Base of the dataclasses below: from and to nested dicts (JSON)."""

    @classmethod
    def from_dict(cls, d: dict):
        """The config with the fields that `d` has; its other keys are ignored."""
        d = {**d, **(d.get("rope_scaling") or {})}  # the official JSON nests `mrope_section` there
        return cls(**{f.name: parse_field(f, d[f.name]) for f in fields(cls) if f.name in d})

    def to_dict(self) -> dict:
        """Nested dict of plain values, ready for JSON; `from_dict` is the inverse."""
        return asdict(self)


@dataclass(frozen=True)
class VisionConfig(Config):
    """Qwen2.5-VL vision tower (`vision_config` of the official config.json)."""

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14  # pixels
    spatial_merge_size: int = 2  # 2 x 2 patches become one embedding
    temporal_patch_size: int = 2  # frames; an image is repeated
    window_size: int = 112  # pixels
    out_hidden_size: int = 3584  # the width of the decoder
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)  # the others attend within windows


@dataclass(frozen=True)
class TextConfig(Config):
    """Qwen2.5 causal decoder (top level of the official config.json)."""

    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4  # each serves 7 query heads
    vocab_size: int = 152064
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)  # (t, h, w); the sum is head_dim / 2
    max_position_embeddings: int = 128000

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ARConfig(Config):
    """The autoregressive half: decoder, vision tower, special token ids, number of image slots."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    image_token_id: int = 151655
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    eos_token_id: int = 151645  # <|im_end|>
    pad_token_id: int = 151643
    num_image_slots: int = 81  # rows of image_prefill_embeds: a square grid of merged tokens

    @property
    def slot_grid(self) -> tuple[int, int, int]:
        """Grid (t, h, w) of a generated image in patches before merging; 81 slots: (1, 18, 18)."""
        side = round(self.num_image_slots**0.5) * self.vision.spatial_merge_size
        return 1, side, side

    @classmethod
    def from_dict(cls, d: dict):  # the official JSON has the decoder's fields at the top level
        return super().from_dict({"text": d, "vision": d.get("vision_config", {}), **d})


@dataclass(frozen=True)
class MMDiTConfig(Config):
    """FLUX.1-dev double/single-stream transformer (black-forest-labs `FluxParams`)."""

    in_channels: int = 64  # of a token: 2 x 2 latent cells of 16 channels
    vec_in_dim: int = 768  # pooled CLIP vector
    context_in_dim: int = 4096  # width of T5, and of Nexus-Gen's projectors
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19  # double blocks
    depth_single_blocks: int = 38
    axes_dim: tuple[int, int, int] = (16, 56, 56)  # RoPE of (index, row, column)
    theta: float = 10_000.0
    time_embed_dim: int = 256


@dataclass(frozen=True)
class AutoEncoderConfig(Config):
    """FLUX VAE (black-forest-labs `AutoEncoderParams`)."""

    in_channels: int = 3
    ch: int = 128
    out_ch: int = 3
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)  # channels of each level, in multiples of `ch`
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
class CLIPConfig(Config):
    """CLIP-L text model (`text_encoder/config.json`)."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class T5Config(Config):
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


TINY_TOKEN_IDS = {  # the special tokens follow 256 bytes and the merges, in Qwen's order
    "pad_token_id": 1450,  # <|endoftext|>
    "eos_token_id": 1452,  # <|im_end|>
    "vision_start_token_id": 1459,
    "vision_end_token_id": 1460,
    "image_token_id": 1462,
}


@dataclass(frozen=True)
class NexusGenConfig(Config):
    """The whole system: every tower, and the image sizes that tie them together (pixels)."""

    ar: ARConfig = field(default_factory=ARConfig)
    mmdit: MMDiTConfig = field(default_factory=MMDiTConfig)
    autoencoder: AutoEncoderConfig = field(default_factory=AutoEncoderConfig)
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    t5: T5Config = field(default_factory=T5Config)
    image_size: int = 512  # default side of a generated image
    reference_size: int = 504  # side of the source image for the editing decoder: 324 embeddings
    min_pixels: int = 3136  # bounds of smart_resize for images that the AR model reads
    max_pixels: int = 262640
    cfg_scale: float = 3.0  # default of generation; the default of editing is always 1.0
    num_steps: int = 50  # default number of Euler steps
    repetition_penalty: float = 1.05  # on the logits of text tokens in the sequence; 1 is off

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
        """The toy-world model: 64-px images, 16 slots, 64 reference tokens; it has every branch."""
        text = TextConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,  # each serves 2 query heads
            vocab_size=1472,
            rope_theta=10_000.0,  # most frequencies are low, so attention can go by content
            mrope_section=(4, 5, 7),  # unequal, so that a test notices swapped axes
            max_position_embeddings=2048,
        )
        vision = VisionConfig(
            depth=4,
            hidden_size=128,
            intermediate_size=256,
            num_heads=4,
            window_size=56,  # a 112-px image has 4 windows
            out_hidden_size=128,
            fullatt_block_indexes=(1, 3),
        )
        return cls(
            ar=ARConfig(text=text, vision=vision, num_image_slots=16, **TINY_TOKEN_IDS),
            mmdit=MMDiTConfig(
                vec_in_dim=32,
                context_in_dim=96,  # unlike the width of the decoder, as at full size
                hidden_size=128,
                mlp_ratio=3.0,
                num_heads=4,
                depth=1,
                depth_single_blocks=4,
                axes_dim=(4, 14, 14),
                theta=0.1,  # 1 to 7 radians a token: a source's embeddings are half a token apart
            ),
            autoencoder=AutoEncoderConfig(
                ch=16,
                ch_mult=(1, 2, 2, 2),
                num_res_blocks=1,
                num_groups=8,
                scale_factor=1.0,  # training replaces both factors by measured ones
                shift_factor=0.0,
            ),
            image_size=64,
            reference_size=224,
            min_pixels=112 * 112,  # equal bounds: each image becomes 16 embeddings
            max_pixels=112 * 112,
            cfg_scale=1.0,
            num_steps=3,  # the embeddings leave little open: more steps draw no better
            repetition_penalty=1.0,  # "a red circle and a red star" repeats words on purpose
        )
