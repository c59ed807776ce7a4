"""The base that the paper takes ready-made, at toy width: FLUX's autoencoder, Qwen's tower.

The autoencoder learns to reconstruct pictures; the tower learns to see by *grounding*, since no
Qwen weights exist at this size: a head that is thrown away reads every cell of the scene out of the
image embeddings.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ..autoencoder import AutoEncoder, ResnetBlock
from ..config import NexusGenConfig
from ..training import Stage
from ..vision import QwenViT
from .pictures import embed_views, exactness, resize, save_grid, scenes, to_uint8, to_unit
from .world import BACKGROUNDS, COLOURS, RADIUS, SHAPES, STYLES, Scene, render

# ---------------------------------------------------------------- the autoencoder


def init_vae(vae: AutoEncoder) -> AutoEncoder:
    """Residual blocks start as the identity, the posterior narrow."""
    for module in vae.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
    nn.init.constant_(vae.encoder.conv_out.bias.data[vae.config.z_channels :], -5.0)
    return vae.to(memory_format=torch.channels_last)


def crops(rng: np.random.Generator, images: list[np.ndarray], side: int) -> list[np.ndarray]:
    """A random side x side part of each picture."""
    corners = 4 * rng.integers(0, (64 - side) // 4 + 1, (len(images), 2))
    return [x[r : r + side, c : c + side] for x, (r, c) in zip(images, corners, strict=True)]


def vae_stage(vae: AutoEncoder, batch: int) -> Stage:
    """L1 + L2 reconstruction with a whisper of KL; the latent is sampled, so the decoder is robust.

    Quarter pictures first, four times as many for the same work; whole ones in the last fifth.
    """

    def loss(rng, progress):
        early = progress < 0.8
        images = [render(s) for s in scenes(rng, batch if early else max(1, batch // 4))]
        x = to_unit(crops(rng, images, 32) if early else images) * 2 - 1
        mean, logvar = vae.moments(x.to(memory_format=torch.channels_last)).chunk(2, 1)
        logvar = logvar.clamp(-12, 4)
        z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        error = vae.decoder(z) - x
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        total = error.abs().mean() + 4 * error.square().mean() + 1e-4 * kl
        return total, {"psnr": -10 * (error.square().mean() / 4).log10()}

    def sample(path):
        batch_scenes = scenes(np.random.default_rng(1), 64)
        x = to_unit([render(s) for s in batch_scenes]) * 2 - 1
        with torch.no_grad():
            again = to_uint8(vae.decode(vae.encode(x)))
        save_grid(path, [to_uint8(x)[:10], again[:10]])
        return {"exact": exactness(again, batch_scenes)}

    return Stage(
        "vae",
        nn.ModuleDict({"vae": vae}),
        loss,
        lr=5e-3,
        adamw_lr=2e-3,
        ema=0.995,
        adamw_only=("conv_in", "conv_out"),
        sample=sample,
    )


@torch.no_grad()
def latent_statistics(vae: AutoEncoder) -> tuple[float, float]:
    """(scale, shift) that give latents of mean 0 and deviation 1 over random scenes."""
    x = to_unit([render(s) for s in scenes(np.random.default_rng(2), 256)]) * 2 - 1
    mean = vae.moments(x).chunk(2, 1)[0]
    return float(1 / mean.std()), float(mean.mean())


# ---------------------------------------------------------------- the vision tower


class GroundingHead(nn.Module):
    """Thrown away after pre-training; what it can read is in the embeddings.

    One query per cell reads shape, colour, size and jitter out of the image embeddings, two more
    read background and style, and each embedding redraws its own part of the picture: a reference's
    with its texture, which the editing decoder takes from there, a target's without. Keys carry no
    position: where things are must be in the embeddings, since the generation decoder gets all of
    them at position 0.
    """

    def __init__(self, width: int, dim: int = 128, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(11, dim) * 0.5)
        self.kv = nn.Linear(width, 2 * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        classes = {"shape": len(SHAPES) + 1, "colour": len(COLOURS), "size": len(RADIUS)}
        cell = {k: nn.Linear(dim, n) for k, n in (classes | {"jitter": 2}).items()}
        self.cell = nn.ModuleDict(cell)
        self.background = nn.Linear(dim, len(BACKGROUNDS))
        self.style = nn.Linear(dim, len(STYLES))
        self.pixels = nn.Linear(width, 8 * 8 * 3)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens [B, N, C] -> what each part says, by name."""
        k, v = rearrange(self.kv(tokens), "B N (two H D) -> two B H N D", two=2, H=self.heads)
        q = repeat(self.query, "Q (H D) -> B H Q D", H=self.heads, B=len(tokens))
        x = rearrange(F.scaled_dot_product_attention(q, k, v), "B H Q D -> B Q (H D)")
        x = F.rms_norm(x + self.query, x.shape[-1:])
        x = x + self.mlp(x)
        said = {name: layer(x[:, :9]) for name, layer in self.cell.items()}
        return said | {
            "background": self.background(x[:, 9]),
            "style": self.style(x[:, 10]),
            "pixels": self.pixels(tokens),
        }


def grounding_targets(batch: list[Scene]) -> dict[str, Tensor]:
    """Class ids of each cell [B, 9] (shape 0 = empty, the others -100 there) and picture [B]."""
    want = {k: torch.full((len(batch), 9), -100) for k in ("colour", "size")}
    want |= {"shape": torch.zeros(len(batch), 9).long(), "jitter": torch.zeros(len(batch), 9, 2)}
    for i, scene in enumerate(batch):
        for o in scene.objects:
            want["shape"][i, o.cell] = 1 + SHAPES.index(o.shape)
            want["colour"][i, o.cell] = list(COLOURS).index(o.colour)
            want["size"][i, o.cell] = list(RADIUS).index(o.size)
            want["jitter"][i, o.cell] = torch.tensor([o.dx, o.dy]) / 1.5
    want["background"] = torch.tensor([list(BACKGROUNDS).index(s.background) for s in batch])
    want["style"] = torch.tensor([STYLES.index(s.style) for s in batch])
    return want


GROUNDING_WEIGHTS = {"shape": 3.0, "colour": 1.0, "size": 1.0, "background": 0.3, "style": 0.3}


def grounding_loss(said: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[Tensor, dict]:
    """Weighted cross-entropies + jitter + pixels; and the accuracies where there is an object."""
    there = want["shape"] > 0
    loss = sum(
        weight * F.cross_entropy(said[k].flatten(0, -2), want[k].flatten())
        for k, weight in GROUNDING_WEIGHTS.items()
    )
    jitter = (said["jitter"] - want["jitter"])[there].square().mean()
    pixels = (said["pixels"] - want["pixels"]).square().mean()
    right = {
        f"{k}_acc": (said[k].argmax(-1) == want[k])[there].float().mean()
        for k in ("shape", "colour", "size")
    }
    return loss + 0.5 * jitter + 4 * pixels, {**right, "jitter": jitter, "pixels": pixels}


def vision_stage(visual: QwenViT, config: NexusGenConfig, batch: int) -> Stage:
    """Grounding at the target's resolution, every fifth batch at the reference's."""
    head = GroundingHead(config.ar.vision.out_hidden_size)
    unit = config.ar.vision.patch_size * config.ar.vision.spatial_merge_size

    def loss(rng, progress):
        large = rng.random() < 0.2
        size = config.reference_size if large else config.target_size
        batch_scenes = scenes(rng, max(1, batch // 4) if large else batch)
        said = head(embed_views(visual, to_unit([render(s) for s in batch_scenes]), size))
        want = grounding_targets(batch_scenes)
        shown = batch_scenes if large else [replace(s, texture=None) for s in batch_scenes]
        shown = resize(to_unit([render(s) for s in shown]), 8 * size // unit, "bilinear") * 2 - 1
        want["pixels"] = rearrange(shown, "B C (h p) (w q) -> B (h w) (p q C)", p=8, q=8)
        return grounding_loss(said, want)

    modules = nn.ModuleDict({"visual": visual, "head": head})
    return Stage(
        "vision",
        modules,
        loss,
        lr=5e-3,
        adamw_lr=3e-3,
        ema=0.995,
        adamw_only=("head", "patch_embed"),
    )


@torch.no_grad()
def standardise(visual: QwenViT, config: NexusGenConfig) -> None:
    """Fold mean and deviation of the embeddings into the merger: MSE 1 = predicting the mean."""
    x = to_unit([render(s) for s in scenes(np.random.default_rng(3), 512, 0.0)])
    tokens = embed_views(visual, x, config.target_size).flatten(0, 1)
    last = visual.merger.mlp[2]
    last.weight /= tokens.std(0)[:, None]
    last.bias.copy_((last.bias - tokens.mean(0)) / tokens.std(0))
