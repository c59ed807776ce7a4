"""The FLUX autoencoder's decoder at full size against diffusers' `AutoencoderKL`, same weights.

    python -m tests.benchmarks autoencoder

A 256x256 image. The peer's weights are views of ours; its encoder, which nothing calls, stays on
`meta`. Operations are those of the convolutions and of the one attention, seen by torch's counter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nexus_min.config import AutoEncoderConfig
from nexus_min.model.autoencoder import AutoEncoder

from .common import Row, alternate, difference, require

SIDE, ROUNDS = 256, 3

# Our names in `decoder` -> the peer's, `{}` for numbers.
NAMES = [
    (r"^mid\.block_(\d)\.", lambda m: f"mid_block.resnets.{int(m[1]) - 1}."),
    (r"^mid\.attn_1\.norm\.", lambda m: "mid_block.attentions.0.group_norm."),
    (r"^mid\.attn_1\.proj_out\.", lambda m: "mid_block.attentions.0.to_out.0."),
    (r"^mid\.attn_1\.([qkv])\.", lambda m: f"mid_block.attentions.0.to_{m[1]}."),
    (r"^up\.(\d)\.block\.", lambda m: f"up_blocks.{3 - int(m[1])}.resnets."),
    (r"^up\.(\d)\.upsample\.", lambda m: f"up_blocks.{3 - int(m[1])}.upsamplers.0."),
    (r"nin_shortcut\.", lambda m: "conv_shortcut."),
    (r"^norm_out\.", lambda m: "conv_norm_out."),
]


def their_weights(ours: AutoEncoder) -> dict[str, Tensor]:
    """Views of the decoder's parameters under diffusers' names; its attention has Linears."""
    found = {}
    for name, value in ours.decoder.state_dict().items():
        for pattern, to in NAMES:
            name = re.sub(pattern, to, name)
        linear = ".to_" in name and name.endswith("weight")
        found[name] = value[:, :, 0, 0] if linear else value
    return found


def random_model() -> AutoEncoder:
    """Ours with random weights, the decoder alone."""
    torch.manual_seed(0)
    return AutoEncoder(AutoEncoderConfig()).eval().requires_grad_(False)


def their_model(ours: AutoEncoder) -> nn.Module:
    """diffusers' autoencoder on our decoder's weights."""
    c, levels = ours.config, len(ours.config.ch_mult)
    with torch.device("meta"):
        model = require("diffusers").AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=[c.ch * m for m in c.ch_mult],
            layers_per_block=c.num_res_blocks,
            latent_channels=c.z_channels,
            norm_num_groups=c.num_groups,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    model.decoder.load_state_dict(their_weights(ours), strict=True, assign=True)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def rows(side: int = SIDE) -> Iterator[Row]:
    """One decoding, from latents as the sampler leaves them."""
    ours = random_model()
    theirs, c = their_model(ours), ours.config
    latents = torch.randn(1, c.z_channels, side // c.downsample, side // c.downsample)

    def run_ours() -> Tensor:
        return ours.decode(latents)

    def run_theirs() -> Tensor:
        return theirs.decode(latents / c.scale_factor + c.shift_factor, return_dict=False)[0]

    with FlopCounterMode(display=False) as counter:
        error = difference(run_ours(), run_theirs())
    yield Row(
        f"VAE decode, {side}x{side}",
        "float32",
        "diffusers AutoencoderKL",
        *alternate(run_ours, run_theirs, ROUNDS),
        goal=1.0,
        error=error,
        flop=counter.get_total_flops() / 2,  # ours and theirs, alike
    )
