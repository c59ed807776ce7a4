"""The FLUX VAE: pixels in [-1, 1] <-> latents; full size: 16 channels, a side 8 times smaller.

Equation: encode(x) = (mean(x) - shift) * scale, and decode is its approximate inverse. All other
files see latents that are already shifted and scaled. The paper takes the VAE from FLUX.1-dev,
frozen: rectified flow runs in its latent space.
Official class: `AutoEncoder` of black-forest-labs; attributes are the keys of `ae.safetensors`.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import AutoEncoderConfig

EPS = 1e-6  # of every GroupNorm; torch's default is 1e-5


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))): [B, C, h, w] -> [B, out, h, w]."""

    def __init__(self, config: AutoEncoderConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.num_groups, in_channels, EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)  # keeps h and w
        self.norm2 = nn.GroupNorm(config.num_groups, out_channels, EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels  # otherwise a 1x1 convolution changes the channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class AttnBlock(nn.Module):
    """x + proj(attention(norm(x))), over the whole grid: [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, config: AutoEncoderConfig, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(config.num_groups, channels, EPS)
        self.q = nn.Conv2d(channels, channels, 1)  # a Linear over channels, stored as 1x1
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (rearrange(f(y), "B C h w -> B 1 (h w) C") for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)  # each cell is a token; one head, D = C
        return x + self.proj_out(rearrange(y, "B 1 (h w) C -> B C h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halve the grid by a convolution of stride 2: [B, C, h, w] -> [B, C, h/2, w/2]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(
            F.pad(x, (0, 1, 0, 1))
        )  # as official: right and bottom only  # right and bottom only


class Upsample(nn.Module):
    """Double the grid: nearest neighbor, then a convolution: [B, C, h, w] -> [B, C, 2h, 2w]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def make_level(config: AutoEncoderConfig, channels: int, out: int, depth: int) -> nn.ModuleDict:
    """The res blocks of one resolution, under the released name `block`."""
    widths = [channels] + [out] * (depth - 1)  # the first block changes the number of channels
    blocks = nn.ModuleList(ResnetBlock(config, width, out) for width in widths)
    return nn.ModuleDict({"block": blocks})


def make_middle(config: AutoEncoderConfig, c: int) -> nn.ModuleDict:
    """The blocks at the grid of the latents, in the order in which they run."""
    blocks = ResnetBlock(config, c, c), AttnBlock(config, c), ResnetBlock(config, c, c)
    return nn.ModuleDict(zip(("block_1", "attn_1", "block_2"), blocks, strict=True))


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> moments [B, 2z, h, w]: z channels of mean, then z of log-variance."""

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        widths = [config.ch * m for m in (1, *config.ch_mult)]
        last = len(config.ch_mult) - 1  # the coarsest level, which keeps its grid
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()  # from the finest level to the coarsest
        for i, out in enumerate(widths[1:]):
            self.down.append(make_level(config, widths[i], out, config.num_res_blocks))
            self.down[i]["downsample"] = Downsample(out) if i < last else nn.Identity()
        self.mid = make_middle(config, widths[-1])
        self.norm_out = nn.GroupNorm(config.num_groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # [B, ch, H, W]
        for level in self.down:
            for block in level["block"]:
                x = block(x)
            x = level["downsample"](x)  # last: [B, C, h, w], the grid of the latents
        for block in self.mid.values():
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Unscaled latents [B, z, h, w] -> image [B, 3, H, W]; one block more at every level."""

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        inputs = [*widths[1:], widths[-1]]  # level i receives the output of level i + 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = make_middle(config, widths[-1])
        self.up = nn.ModuleList()
        for i, out in enumerate(widths):
            self.up.append(make_level(config, inputs[i], out, config.num_res_blocks + 1))
            self.up[i]["upsample"] = Upsample(out) if i else nn.Identity()  # 0 has the full grid
        self.norm_out = nn.GroupNorm(config.num_groups, widths[0], EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)  # [B, C, h, w]
        for block in self.mid.values():
            x = block(x)
        for level in reversed(self.up):  # up.0, the finest level, runs last
            for block in level["block"]:
                x = block(x)
            x = level["upsample"](x)  # last: [B, ch, H, W]
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoEncoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] <-> latents [B, z, h, w] of about unit variance."""

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, x: Tensor) -> Tensor:
        """Mean and log-variance [B, 2z, h, w] of the posterior, unscaled."""
        f = self.config.downsample  # a convolution would silently drop a ragged edge
        if x.ndim != 4 or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"H and W of [B, C, H, W] must be multiples of {f}: {tuple(x.shape)}")
        return self.encoder(x)

    def encode(self, x: Tensor) -> Tensor:
        """Image in [-1, 1] -> latents (mean - shift) * scale [B, z, h, w], unsampled."""
        mean = self.moments(x)[:, : self.config.z_channels]  # the rest is the log-variance
        return (mean - self.config.shift_factor) * self.config.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, z, h, w] -> image [B, 3, H, W], raw: about [-1, 1], not clamped."""
        z = self.config.z_channels
        if latents.ndim != 4 or latents.shape[1] != z:
            raise ValueError(f"latents must be [B, {z}, h, w], got {tuple(latents.shape)}")
        return self.decoder(latents / self.config.scale_factor + self.config.shift_factor)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction decode(encode(x)) of an image [B, 3, H, W] in [-1, 1]."""
        return self.decode(self.encode(x))
