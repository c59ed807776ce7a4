"""Sampling one image: its parameters, the context of the MMDiT, the MMDiT as a velocity field.

v(x_t, t) = v_neg + cfg_scale (v_pos - v_neg); each is one pass of the MMDiT with its own context:
image embeddings for the positive one, T5 states for the negative one. `flow` and `mmdit` do not
know each other; they meet in this file. Official: `FluxImagePipeline.__call__` of DiffSynth, with
the defaults of Nexus-Gen's `image_generation.py` and `image_editing.py`.

Latents, positions and times stay fp32 whatever the dtype of the network. Noise is drawn on the CPU,
so that a seed gives the same image on every device; the official run draws it on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .config import NexusGenConfig
from .model import flow
from .model.mmdit import PATCH, MMDiT, Modulations, image_ids, patchify, unpatchify
from .tokenizer import check_text

MAX_SCALE = 8  # a side is at most 8 times the model's own
RANGES = {  # parameter: kind, least and largest value
    "num_steps": (Integral, 1, 1000),  # training has no more than 1000 noise levels
    "cfg_scale": (Real, 0, 1000),
    "guidance": (Real, 0, 1000),
    "seed": (Integral, 0, 2**63 - 1),
}
TEXT_OPTIONS = ("language", "fast_preamble", "max_new_tokens")  # what `generate` takes besides


def in_range(name: str, value: Any, default: float, limits: tuple = (Integral, 1, 2**31)) -> float:
    """`value`, or `default` for None, as a plain number; a ValueError names a wrong one."""
    kind, low, high = limits
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        noun = "whole number" if kind is Integral else "number"
        raise ValueError(f"{name} must be a {noun} from {low} to {high}, got {value!r}")
    return int(value) if kind is Integral else float(value)


class ChatInputs(NamedTuple):
    """What the AR model reads: a conversation up to the assistant's turn."""

    input_ids: Tensor  # [1, L]
    image_embeds: Tensor | None  # [n, C], all images in reading order
    image_grid_thw: Tensor | None  # [images, 3]


class Context(NamedTuple):
    """What the MMDiT reads about the image."""

    txt: Tensor  # [B, L, context_in_dim]
    txt_ids: Tensor  # [1, L, 3], fp32
    pooled: Tensor  # [B, vec_in_dim]; a batch of one serves every batch


@dataclass(frozen=True)
class SamplingParams:
    """How to sample an image; None takes the model's default."""

    height: int | None = None  # pixels, rounded up to whole image tokens (16 pixels at full size)
    width: int | None = None
    num_steps: int | None = None  # Euler steps
    cfg_scale: float | None = None  # classifier-free guidance away from negative_prompt; 1 is off
    guidance: float | None = 3.5  # FLUX's distilled guidance, an input of the network
    negative_prompt: str | None = ""
    seed: int | None = 0  # of the noise

    @classmethod
    def of(cls, *others: str, **options) -> SamplingParams:
        """From keyword options; a TypeError for a wrong name lists the fields and `others`."""
        valid = [field.name for field in fields(cls)]
        if wrong := [name for name in options if name not in valid]:
            names = ", ".join([*valid, *others])
            raise TypeError(f"unknown option {', '.join(wrong)}; the options are {names}")
        return cls(**options)

    def resolve(self, config: NexusGenConfig, cfg_scale: float) -> SamplingParams:
        """Fill in defaults (cfg_scale: its default), round sides up to tokens, check the ranges."""
        largest = MAX_SCALE * config.image_size
        defaults = SamplingParams(config.image_size, config.image_size, config.num_steps, cfg_scale)
        values = {}
        for name in ("height", "width", "num_steps", "cfg_scale", "guidance", "seed"):
            value, limits = getattr(self, name), RANGES.get(name, (Integral, 1, largest))
            values[name] = in_range(name, value, getattr(defaults, name), limits)
        values["negative_prompt"] = prompt = self.negative_prompt or ""
        if not isinstance(prompt, str):
            raise ValueError(f"negative_prompt must be a text, got {prompt!r}")
        if prompt.strip():
            check_text(prompt, "negative prompt")
        token = PATCH * config.autoencoder.downsample  # pixels along one side
        for side in ("height", "width"):
            values[side] = -(-values[side] // token) * token
        return replace(self, **values)

    def latent_shape(self, config: NexusGenConfig) -> tuple[int, int, int, int]:
        """(1, z, h, w) of the latents, after `resolve`."""
        vae = config.autoencoder
        return 1, vae.z_channels, self.height // vae.downsample, self.width // vae.downsample

    def noise(self, config: NexusGenConfig) -> Tensor:
        """x_1 [1, z, h, w], fp32 on the CPU: the same for a seed everywhere."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        return torch.randn(self.latent_shape(config), generator=generator, **flow.FP32)


class ImageRequest(NamedTuple):
    """An image that the AR model has described and that a decoder is to sample."""

    text: str  # the reply before the image
    embeds: Tensor  # [1, N, C]
    reference: Tensor | None  # [1, M, C] of the source image, for the editing decoder
    decoder: str  # "generation" or "editing"
    sampling: SamplingParams  # resolved


def velocity_field(
    mmdit: MMDiT,
    context: Context,
    height: int,
    width: int,
    guidance: float = 3.5,
    times: Sequence[float] = (),
) -> flow.Velocity:
    """The MMDiT as a function of x_t [B, z, height, width] (latent cells) and t [B] alone.

    times: those of the sampler; their modulations are computed now, all in one call.
    """
    weight = mmdit.img_in.weight  # its device and dtype are the network's
    ids = image_ids(height, width), context.txt_ids
    rope = mmdit.rope(*(i.to(weight.device) for i in ids))
    strength = torch.tensor([guidance], dtype=torch.float32, device=weight.device)
    pooled = context.pooled.to(weight)
    cached = precompute_modulations(mmdit, pooled, strength, times)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        mods = cached.get(float(t[0])) if cached else None  # a sampler has one t for the batch
        if mods is None:
            mods = mmdit.modulations(mmdit.condition(t, pooled, strength))
        txt = context.txt.to(weight).expand(len(x), -1, -1)
        tokens = mmdit.velocity(patchify(x).to(weight), txt, mods, rope)
        return unpatchify(tokens.float(), height, width)

    return velocity


def precompute_modulations(
    mmdit: MMDiT, pooled: Tensor, guidance: Tensor, times: Sequence[float]
) -> dict[float, Modulations]:
    """{t: modulations} for one pooled vector [1, V]; {} for several, as rows are times already."""
    if not times or len(pooled) > 1:
        return {}
    t = torch.tensor(times, dtype=torch.float32, device=pooled.device)
    table = mmdit.modulations(mmdit.condition(t, pooled, guidance))
    # row i of every tensor [N, 1, C] in the nested tuples, kept as [1, 1, C]
    return {time: tree_map(lambda x, i=i: x[i : i + 1], table) for i, time in enumerate(t.tolist())}
