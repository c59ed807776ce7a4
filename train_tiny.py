"""Train the tiny Nexus-Gen through the paper's stages, on a laptop CPU.

    python train_tiny.py --minutes 30            # everything, from nothing, into runs/tiny
    python train_tiny.py --stage ar --minutes 10 # one stage, on top of what the folder holds

Stages: `vae` (FLUX's, at toy width), `vision` (the tower learns to see by grounding: it stands in for
Qwen2.5-VL's pre-training), `ar` (paper section 4.1, multi-task), `generation` and `editing` (4.2, 4.3).
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from nexus_min.autoencoder import AutoEncoder
from nexus_min.config import NexusGenConfig
from nexus_min.image_processor import patchify
from nexus_min.toy import score
from nexus_min.toy.world import (
    BACKGROUNDS,
    CENTRES,
    COLOURS,
    RADIUS,
    SHAPES,
    STYLES,
    Scene,
    random_scene,
    render,
)
from nexus_min.training import Run, Stage, fit
from nexus_min.vision import QwenViT

DETAIL = 0.4  # share of textured pictures in the base stages


def to_unit(images: list[np.ndarray]) -> Tensor:
    """uint8 pictures -> [B, 3, H, W] in [0, 1]."""
    return rearrange(torch.from_numpy(np.stack(images)), "B h w C -> B C h w").float() / 255


def resize(images: Tensor, size: int) -> Tensor:
    """Bicubic, as PIL does it: [B, 3, H, W] in [0, 1] -> [B, 3, size, size]."""
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)


def to_uint8(images: Tensor) -> np.ndarray:
    """[-1, 1] -> uint8 [B, H, W, 3], truncating as the official code does."""
    pixels = ((images.detach() / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    return rearrange(pixels, "B C h w -> B h w C").numpy()


def save_grid(path: Path, rows: list[np.ndarray], scale: int = 2) -> None:
    """Write a PNG whose rows are strips of equally many pictures uint8 [n, H, W, 3]."""
    strips = [rearrange(r, "n h w C -> h (n w) C") for r in rows]
    image = Image.fromarray(np.concatenate(strips))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


def scenes(rng: np.random.Generator, n: int, detail: float = DETAIL) -> list[Scene]:
    return [random_scene(rng, detail=detail) for _ in range(n)]


# ---------------------------------------------------------------- base: the autoencoder


def vae_stage(vae: AutoEncoder, batch: int) -> Stage:
    """L1 + L2 reconstruction with a whisper of KL; the latent is sampled, so the decoder is robust."""
    vae.to(memory_format=torch.channels_last)

    def loss(rng, progress):
        x = to_unit([render(s) for s in scenes(rng, batch)]) * 2 - 1
        mean, logvar = vae.moments(x.to(memory_format=torch.channels_last)).chunk(2, 1)
        logvar = logvar.clamp(-12, 4)
        z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        error = vae.decoder(z) - x
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        total = error.abs().mean() + 4 * error.square().mean() + 1e-4 * kl
        return total, {"l1": error.abs().mean(), "psnr": -10 * (error.square().mean() / 4).log10()}

    def sample(path):
        x = to_unit([render(s) for s in scenes(np.random.default_rng(1), 10)]) * 2 - 1
        with torch.no_grad():
            save_grid(path, [to_uint8(x), to_uint8(vae.decode(vae.encode(x)))])

    return Stage("vae", nn.ModuleDict({"vae": vae}), loss, lr=2e-3, ema=0.995, sample=sample)


def latent_statistics(vae: AutoEncoder) -> tuple[float, float]:
    """(scale, shift) that give latents of mean 0 and deviation 1 over random scenes."""
    x = to_unit([render(s) for s in scenes(np.random.default_rng(2), 256)]) * 2 - 1
    with torch.no_grad():
        mean = vae.moments(x).chunk(2, 1)[0]
    return float(1 / mean.std()), float(mean.mean())


# ---------------------------------------------------------------- base: the vision tower


class GroundingHead(nn.Module):
    """Thrown away after pre-training: one query per cell reads shape, colour, size and jitter out of
    the image embeddings; two more queries read background and style; each embedding redraws its part
    of the picture, without the texture, at a quarter of its resolution."""

    def __init__(self, width: int, dim: int = 128):
        super().__init__()
        self.query = nn.Parameter(torch.randn(11, dim) * 0.5)
        self.kv = nn.Linear(width, 2 * dim)
        self.heads = 4
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.shape = nn.Linear(dim, len(SHAPES) + 1)
        self.colour = nn.Linear(dim, len(COLOURS))
        self.size = nn.Linear(dim, len(RADIUS))
        self.jitter = nn.Linear(dim, 2)
        self.background = nn.Linear(dim, len(BACKGROUNDS))
        self.style = nn.Linear(dim, len(STYLES))
        self.pixels = nn.Linear(width, 8 * 8 * 3)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens [B, N, C] -> logits by name, and `pixels` [B, N, 192]."""
        k, v = rearrange(self.kv(tokens), "B N (two H D) -> two B H N D", two=2, H=self.heads)
        q = rearrange(self.query, "Q (H D) -> 1 H Q D", H=self.heads).expand(len(tokens), -1, -1, -1)
        x = rearrange(F.scaled_dot_product_attention(q, k, v), "B H Q D -> B Q (H D)")
        x = F.rms_norm(x + self.query, x.shape[-1:])
        x = x + self.mlp(x)
        cells = x[:, :9]
        return {
            "shape": self.shape(cells),
            "colour": self.colour(cells),
            "size": self.size(cells),
            "jitter": self.jitter(cells),
            "background": self.background(x[:, 9]),
            "style": self.style(x[:, 10]),
            "pixels": self.pixels(tokens),
        }


def grounding_targets(batch: list[Scene]) -> dict[str, Tensor]:
    """What the head should say: class ids [B, 9] (shape 0 = empty, others -100 there), etc."""
    B = len(batch)
    out = {k: torch.full((B, 9), -100) for k in ("colour", "size")}
    out["shape"] = torch.zeros(B, 9, dtype=torch.long)
    out["jitter"] = torch.zeros(B, 9, 2)
    for i, scene in enumerate(batch):
        for o in scene.objects:
            out["shape"][i, o.cell] = 1 + SHAPES.index(o.shape)
            out["colour"][i, o.cell] = list(COLOURS).index(o.colour)
            out["size"][i, o.cell] = list(RADIUS).index(o.size)
            out["jitter"][i, o.cell] = torch.tensor([o.dx, o.dy]) / 1.5
    out["background"] = torch.tensor([list(BACKGROUNDS).index(s.background) for s in batch])
    out["style"] = torch.tensor([STYLES.index(s.style) for s in batch])
    return out


def grounding_loss(said: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[Tensor, dict]:
    there = want["shape"] > 0
    ce = {
        k: F.cross_entropy(said[k].flatten(0, -2), want[k].flatten())
        for k in ("shape", "colour", "size", "background", "style")
    }
    jitter = (said["jitter"] - want["jitter"])[there].square().mean()
    pixels = (said["pixels"] - want["pixels"]).square().mean()
    right = {f"{k}_acc": (said[k].argmax(-1) == want[k])[there].float().mean() for k in ("shape", "colour", "size")}
    loss = 3 * ce["shape"] + ce["colour"] + ce["size"] + 0.3 * ce["background"] + 0.3 * ce["style"] + 0.5 * jitter + pixels
    return loss, {**right, "jitter": jitter, "pixels": pixels}


def vision_stage(visual: QwenViT, config: NexusGenConfig, batch: int) -> Stage:
    """Grounding at the target's resolution, every fifth batch at the reference's."""
    head = GroundingHead(config.ar.vision.out_hidden_size)
    small, large = config.target_size, config.reference_size

    def loss(rng, progress):
        big = rng.random() < 0.2
        n, side = (max(1, batch // 4), large) if big else (batch, small)
        batch_scenes = scenes(rng, n)
        want = grounding_targets(batch_scenes)
        plain = to_unit([render(replace(s, texture=None)) for s in batch_scenes]) * 2 - 1
        view = resize(to_unit([render(s) for s in batch_scenes]), side)
        pixel_values, grid = patchify(view)
        tokens = rearrange(visual(pixel_values, grid), "(B N) C -> B N C", B=n)
        grid_side = side // 28
        plain = F.interpolate(plain, size=(8 * grid_side,) * 2, mode="bilinear", antialias=True)
        want["pixels"] = rearrange(plain, "B C (h p) (w q) -> B (h w) (p q C)", p=8, q=8)
        return grounding_loss(head(tokens), want)

    modules = nn.ModuleDict({"visual": visual, "head": head})
    return Stage("vision", modules, loss, ema=0.995, adamw_only=("head", "patch_embed"))


def embed_views(visual: QwenViT, images: Tensor, size: int) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] -> image embeddings [B, N, C] of their view at `size` px."""
    pixel_values, grid = patchify(resize(images, size))
    return rearrange(visual(pixel_values, grid), "(B N) C -> B N C", B=len(images))


@torch.no_grad()
def standardise(visual: QwenViT, config: NexusGenConfig) -> None:
    """Fold mean and deviation of the embeddings into the merger, so that MSE 1 = predicting the mean."""
    x = to_unit([render(s) for s in scenes(np.random.default_rng(3), 512, 0.0)])
    tokens = embed_views(visual, x, config.target_size).flatten(0, 1)
    last = visual.merger.mlp[2]
    last.weight /= tokens.std(0)[:, None]
    last.bias.copy_((last.bias - tokens.mean(0)) / tokens.std(0))


# ---------------------------------------------------------------- driver (development)


def launch(fn, workers: int, *args) -> None:
    """Run fn(*args) in `workers` processes of one thread each that average their gradients."""
    if workers == 1:
        return fn(*args)
    store = tempfile.mktemp(prefix="nexus_min_store_")
    torch.multiprocessing.spawn(_worker, args=(workers, store, fn, args), nprocs=workers)


def _worker(rank: int, workers: int, store: str, fn, args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
    fn(*args)
    dist.destroy_process_group()


def base(folder: str, which: str, minutes: float, workers: int) -> None:
    config = NexusGenConfig.tiny()
    torch.manual_seed(0)
    run = Run(Path(folder), seconds=minutes * 60)
    if which == "vae":
        print(fit(vae_stage(AutoEncoder(config.autoencoder), 16 // workers), run))
    else:
        print(fit(vision_stage(QwenViT(config.ar.vision), config, 32 // workers), run))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default="runs/dev")
    a = parser.parse_args()
    launch(base, a.workers, a.out, a.stage, a.minutes, a.workers)
