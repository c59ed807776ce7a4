"""The FLUX VAE: pixels in [-1, 1] <-> latents; full size: 16 channels, a side 8 times smaller.

`encode` is x -> (mean(x) - shift) * scale, `decode` its approximate inverse; everything outside
this file sees latents that are already shifted and scaled. The paper takes it over from FLUX.1-dev
unchanged and frozen: rectified flow runs in its latent space. Official class: `AutoEncoder` of
black-forest-labs `flux/modules/autoencoder.py`, whose attribute names are the keys of
`ae.safetensors`; Nexus-Gen takes the mean and draws no sample.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nexus_min.config import AutoEncoderConfig


def group_norm(channels: int, config: AutoEncoderConfig) -> nn.GroupNorm:
    """GroupNorm with the VAE's own epsilon, 1e-6 (torch's default is 1e-5)."""
    return nn.GroupNorm(config.num_groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1 convolution on x when widths differ."""

    def __init__(self, config: AutoEncoderConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, config)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, config)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class AttnBlock(nn.Module):
    """x + proj(attention(norm(x))): one head of all channels, over the whole grid."""

    def __init__(self, config: AutoEncoderConfig, channels: int):
        super().__init__()
        self.norm = group_norm(channels, config)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (
            rearrange(layer(y), "B C h w -> B 1 (h w) C") for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(y, "B 1 (h w) C -> B C h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halve the grid: stride-2 convolution after padding right and bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the grid: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The res blocks of one resolution."""

    def __init__(self, config: AutoEncoderConfig, in_channels: int, out_channels: int, depth: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * depth
        self.block = nn.ModuleList(
            ResnetBlock(config, a, b) for a, b in zip(widths, widths[1:], strict=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class DownLevel(Level):
    """A level of the encoder; all but the coarsest end in `downsample`."""

    def __init__(
        self, config: AutoEncoderConfig, in_channels: int, out_channels: int, downsample: bool
    ):
        super().__init__(config, in_channels, out_channels, config.num_res_blocks)
        self.downsample = Downsample(out_channels) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(super().forward(x))


class UpLevel(Level):
    """A level of the decoder, one res block deeper; all but the finest end in `upsample`."""

    def __init__(
        self, config: AutoEncoderConfig, in_channels: int, out_channels: int, upsample: bool
    ):
        super().__init__(config, in_channels, out_channels, config.num_res_blocks + 1)
        self.upsample = Upsample(out_channels) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(super().forward(x))


class Middle(nn.Module):
    """Residual, attention, residual at the coarsest grid."""

    def __init__(self, config: AutoEncoderConfig, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(config, channels, channels)
        self.attn_1 = AttnBlock(config, channels)
        self.block_2 = ResnetBlock(config, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> moments [B, 2z, h, w]: z channels of mean, then z of log-variance."""

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        widths = [config.ch * m for m in (1, *config.ch_mult)]
        last = len(config.ch_mult) - 1
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(config, widths[i], widths[i + 1], downsample=i < last)
            for i in range(last + 1)
        )
        self.mid = Middle(config, widths[-1])
        self.norm_out = group_norm(widths[-1], config)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Unscaled latents [B, z, h, w] -> image [B, 3, H, W]. `up.0`, the finest, runs last."""

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        inputs = [*widths[1:], widths[-1]]  # level i is fed by level i + 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(config, widths[-1])
        self.up = nn.ModuleList(
            UpLevel(config, inputs[i], widths[i], upsample=i > 0) for i in range(len(widths))
        )
        self.norm_out = group_norm(widths[0], config)
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoEncoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] <-> latents [B, z, h, w] of about unit variance.

    h = H / `config.downsample`, 8 at full size.
    """

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, x: Tensor) -> Tensor:
        """Mean and log-variance [B, 2z, h, w] of the posterior, unscaled.

        Raises ValueError when x is not [B, 3, H, W] with H and W multiples of `config.downsample`.
        """
        f = self.config.downsample
        if x.ndim != 4 or x.shape[1] != self.config.in_channels or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(
                f"image must be [B, {self.config.in_channels}, H, W] with H and W multiples of {f},"
                f" got {tuple(x.shape)}"
            )
        return self.encoder(x)

    def encode(self, x: Tensor) -> Tensor:
        """Image in [-1, 1] -> latents (mean - shift) * scale, unsampled. Raises as `moments`."""
        mean = self.moments(x)[:, : self.config.z_channels]
        return (mean - self.config.shift_factor) * self.config.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, z, h, w] -> image [B, 3, H, W], raw: about [-1, 1], not clamped.

        Raises ValueError when the latents are not 4-D with z channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.config.z_channels:
            raise ValueError(
                f"latents must be [B, {self.config.z_channels}, h, w], got {tuple(latents.shape)}"
            )
        return self.decoder(latents / self.config.scale_factor + self.config.shift_factor)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction decode(encode(x)) of an image [B, 3, H, W] in [-1, 1]."""
        return self.decode(self.encode(x))
