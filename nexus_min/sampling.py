"""How one image is drawn: the settings, what the MMDiT is told, the MMDiT as a velocity field.

v(x_t, t) = v_neg + cfg (v_pos - v_neg), each from one pass of the MMDiT with its own context: the
positive one made of image embeddings, the negative one of T5 states. `flow` and `mmdit` do not know
each other; this file introduces them. Official: `FluxImagePipeline.__call__` of DiffSynth, with the
defaults of Nexus-Gen's `image_generation.py` and `image_editing.py`.

Latents, positions and times stay fp32 whatever the network computes in. Noise is drawn on the CPU,
so that a seed means the same image on every device; the official run draws on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import NexusGenConfig
from .model import flow
from .model.mmdit import PATCH, MMDiT, Modulations, image_ids, patchify, unpatchify
from .tokenizer import check_text

MAX_STEPS = 1000  # no finer than the noise levels of training
MAX_SCALE = 8  # sides of at most 8 times the model's own
MAX_GUIDANCE = 1000  # of either kind; far above what still draws an image


class Context(NamedTuple):
    """What an MMDiT is told about the image."""

    txt: Tensor  # [B, L, context_in_dim]
    txt_ids: Tensor  # [1, L, 3], fp32
    pooled: Tensor  # [B, vec_in_dim]; B of 1 serves every batch

    def like(self, batch: int, weight: Tensor) -> Context:
        """The same for a batch (from one, or from as many), in the dtype and place of `weight`."""
        txt = self.txt.to(weight).expand(batch, -1, -1)
        return Context(txt, self.txt_ids.to(weight.device), self.pooled.to(weight))


@dataclass(frozen=True)
class SamplingParams:
    """How to draw; None takes the model's default.

    height, width: pixels, rounded up to whole image tokens (multiples of 16 at full size).
    num_steps: Euler steps. cfg_scale: classifier-free guidance away from `negative_prompt`, 1 is
    off. guidance: FLUX's distilled guidance, an input of the network. seed: of the noise.
    """

    height: int | None = None
    width: int | None = None
    num_steps: int | None = None
    cfg_scale: float | None = None
    guidance: float = 3.5
    negative_prompt: str = ""
    seed: int = 0

    def resolve(self, config: NexusGenConfig, cfg_scale: float) -> SamplingParams:
        """Fill in the defaults, round the sides up. ValueError naming what is out of range."""
        self.check_types()
        steps = config.num_steps if self.num_steps is None else self.num_steps
        if not 1 <= steps <= MAX_STEPS:
            raise ValueError(f"the number of steps must be 1 to {MAX_STEPS}, got {steps}")
        scale = cfg_scale if self.cfg_scale is None else self.cfg_scale
        for name, value in (("cfg scale", scale), ("guidance", self.guidance)):
            if not 0 <= value <= MAX_GUIDANCE:
                raise ValueError(f"{name} must be 0 to {MAX_GUIDANCE}, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"the seed must be 0 to 2^63 - 1, got {self.seed}")
        height, width = (round_up_side(side, config) for side in (self.height, self.width))
        return replace(self, height=height, width=width, num_steps=steps, cfg_scale=scale)

    def check_types(self) -> None:
        """ValueError naming the first value of another kind: a data file may hold anything."""
        kinds = dict.fromkeys(("height", "width", "num_steps", "seed"), (Integral, "whole number"))
        kinds |= dict.fromkeys(("cfg_scale", "guidance"), (Real, "number"))
        for name, (kind, noun) in kinds.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                raise ValueError(f"{name} must be a {noun}, got {value!r}")
        if not isinstance(self.negative_prompt, str):
            raise ValueError(f"negative_prompt must be a text, got {self.negative_prompt!r}")
        if self.negative_prompt.strip():
            check_text(self.negative_prompt, "negative prompt")

    def latent_shape(self, config: NexusGenConfig) -> tuple[int, int, int, int]:
        """(1, z, h, w) of the latents; for a resolved Sampling."""
        vae = config.autoencoder
        return 1, vae.z_channels, self.height // vae.downsample, self.width // vae.downsample

    def noise(self, config: NexusGenConfig) -> Tensor:
        """x_1 [1, z, h, w], fp32 on the CPU, the same for one seed everywhere."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        return torch.randn(self.latent_shape(config), generator=generator)


class ImageRequest(NamedTuple):
    """An image that the AR model has described and that a decoder is to draw."""

    text: str  # what the model says before it
    embeds: Tensor  # [1, N, C]
    reference: Tensor | None  # [1, M, C] of the source; None: the generation decoder's
    decoder: str  # "generation" or "editing"
    sampling: SamplingParams  # resolved


def round_up_side(side: int | None, config: NexusGenConfig) -> int:
    """Pixels of a side, rounded up to whole image tokens. ValueError when out of range."""
    unit, most = PATCH * config.autoencoder.downsample, MAX_SCALE * config.image_size
    side = config.image_size if side is None else side
    if not 1 <= side <= most:
        raise ValueError(f"height and width must be 1 to {most} pixels for this model, got {side}")
    return -(-side // unit) * unit


def velocity_field(
    mmdit: MMDiT,
    context: Context,
    height: int,
    width: int,
    guidance: float = 3.5,
    times: Sequence[float] = (),
) -> flow.Velocity:
    """The MMDiT as a function of x_t [B, z, height, width] (latent cells) and t [B] alone.

    The modulations of `times` are evaluated at once, ahead; at another t, when it comes.
    """
    weight = mmdit.img_in.weight
    ids = image_ids(height, width), context.txt_ids
    rope = mmdit.rope(*(i.to(weight.device) for i in ids))
    strength = torch.full((1,), guidance, device=weight.device)
    ahead = precompute_modulations(mmdit, context.pooled.to(weight), strength, times)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        txt, _, pooled = context.like(len(x), weight)
        mods = ahead.get(float(t[0])) if ahead else None
        tokens = mmdit(patchify(x).to(weight), None, txt, None, t, pooled, strength, rope, mods)
        return unpatchify(tokens.float(), height, width)

    return velocity


def precompute_modulations(
    mmdit: MMDiT, pooled: Tensor, guidance: Tensor, times: Sequence[float]
) -> dict[float, Modulations]:
    """Time -> modulations, for one pooled vector [1, V]; a batch of them is left to the network."""
    if not times or len(pooled) > 1:
        return {}
    t = torch.tensor(times, dtype=torch.float32, device=pooled.device)
    table = mmdit.modulations(mmdit.condition(t, pooled, guidance))
    return {time: row(table, i) for i, time in enumerate(t.tolist())}


def row(table: Any, i: int) -> Any:
    """Row i of every tensor [N, ...] in nested lists and tuples, kept as [1, ...]."""
    if isinstance(table, Tensor):
        return table[i : i + 1]
    items = [row(item, i) for item in table]
    return type(table)(*items) if hasattr(table, "_fields") else type(table)(items)


def classifier_free_guidance(
    positive: flow.Velocity, negative: flow.Velocity | None, scale: float
) -> flow.Velocity:
    """Classifier-free guidance of two fields; without a negative one, the positive field itself."""
    if negative is None:
        return positive
    return lambda x, t: flow.cfg(negative(x, t), positive(x, t), scale)
