"""The base that the paper takes ready-made, at toy width: FLUX's autoencoder, Qwen's tower.

The autoencoder learns to reconstruct images; the tower learns to see by *grounding*, since no
Qwen weights exist at this size: a head that is thrown away reads every cell of the scene out of the
image embeddings.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ..config import NexusGenConfig
from ..model.autoencoder import AutoEncoder, ResnetBlock
from ..model.vision import QwenViT
from ..train.stage import Stage
from .pictures import embed_views, exactness, resize, save_grid, scenes, to_uint8, to_unit
from .world import BACKGROUNDS, COLORS, RADIUS, SHAPES, STYLES, Object, Scene, render

CLASSES = (len(SHAPES), len(COLORS), len(RADIUS))  # of shape, color, size

# ---------------------------------------------------------------- the autoencoder


def init_vae(vae: AutoEncoder) -> AutoEncoder:
    """Residual blocks start as the identity, the posterior narrow."""
    for module in vae.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
    nn.init.constant_(vae.encoder.conv_out.bias.data[vae.config.z_channels :], -5.0)
    return vae.to(memory_format=torch.channels_last)


def vae_stage(vae: AutoEncoder, batch: int) -> Stage:
    """L1 + L2 reconstruction with a small KL term (1e-4) of a sampled latent.

    First crops of full scenes, since edges are hard; then whole images of any number of objects,
    whose group norms differ. Two in five are outlines, which are lost first.
    """

    def loss(rng, progress):
        early = progress < 0.7
        n, least = (batch, 9) if early else (max(1, batch // 4), 1)
        images = [render(s) for s in scenes(rng, n, most=9, least=least, outline=0.4)]
        if early:  # a quarter of each image
            corners = 4 * rng.integers(0, 9, (n, 2))
            images = [x[r : r + 32, c : c + 32] for x, (r, c) in zip(images, corners, strict=True)]
        x = to_unit(images) * 2 - 1
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
            reconstructed = to_uint8(vae.decode(vae.encode(x)))
        save_grid(path, truth=to_uint8(x), decoded=reconstructed)
        return {"exact": exactness(reconstructed, batch_scenes)}

    modules, adamw_only = nn.ModuleDict({"vae": vae}), ("conv_in", "conv_out")
    return Stage("vae", modules, loss, 5e-3, 2e-3, 0.995, adamw_only, sample)


@torch.no_grad()
def latent_statistics(vae: AutoEncoder) -> tuple[float, float]:
    """(scale, shift) that give latents of mean 0 and deviation 1 over random scenes."""
    x = to_unit([render(s) for s in scenes(np.random.default_rng(2), 256)]) * 2 - 1
    mean = vae.moments(x).chunk(2, 1)[0]
    return float(1 / mean.std()), float(mean.mean())


# ---------------------------------------------------------------- the vision tower

PHRASES = np.array([(1, 0, 0), (0, 1, 0), (1, 1, 0), (1, 1, 1)], bool)  # which words are used
GROUNDING_WEIGHTS = {"shape": 3.0, "color": 1.0, "size": 1.0, "background": 0.3, "style": 0.3}
GROUNDING_WEIGHTS |= {f"meant_{name}": 0.5 for name in ("shape", "color", "size", "matches")}
GROUNDING_WEIGHTS |= {"meant_cell": 1.0}
EMBEDDING_NOISE = 0.5  # up to this much, of embeddings of deviation 1


class GroundingHead(nn.Module):
    """Reads scenes out of image embeddings; it is thrown away after pre-training.

    One query per cell reads shape, color, size and jitter, two more read background and style. Each
    embedding redraws its part of the image; only a reference's has texture, for editing.
    Phrases ("small red star") look up their object by one attention, so that a decoder's can. Keys
    carry no position: the generation decoder gets all embeddings at position 0.
    """

    def __init__(self, width: int, dim: int = 128, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(11, dim) * 0.5)
        self.words = nn.ModuleList(nn.Embedding(n + 1, dim) for n in CLASSES)
        self.cells, self.phrase = _Reader(width, dim), _Reader(width, dim)
        classes = {"shape": len(SHAPES) + 1, "color": len(COLORS), "size": len(RADIUS)}
        self.cell = _linears(dim, classes | {"jitter": 2})
        self.whole = _linears(dim, {"background": len(BACKGROUNDS), "style": len(STYLES)})
        self.meant = _linears(dim, classes | {"cell": 9, "matches": 5})
        self.pixels = nn.Linear(width, 8 * 8 * 3)

    def forward(self, tokens: Tensor, phrases: Tensor) -> dict[str, Tensor]:
        """tokens [B, N, C], phrases [B, P, 3] -> predictions by name."""
        x = self.cells(tokens, repeat(self.query, "Q D -> B Q D", B=len(tokens)), self.heads)
        out = {name: layer(x[:, :9]) for name, layer in self.cell.items()}
        out |= {name: self.whole[name](x[:, 9 + i]) for i, name in enumerate(self.whole)}
        query = sum(words(phrases[..., i]) for i, words in enumerate(self.words))
        x = self.phrase(tokens, query, self.heads)
        out |= {f"meant_{name}": layer(x) for name, layer in self.meant.items()}
        return out | {"pixels": self.pixels(tokens)}


class _Reader(nn.Module):
    """Queries that read out of image embeddings: one attention, one MLP."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.kv = nn.Linear(width, 2 * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, tokens: Tensor, query: Tensor, heads: int) -> Tensor:
        """tokens [B, N, C], query [B, Q, D] -> [B, Q, D]."""
        k, v = rearrange(self.kv(tokens), "B N (two H D) -> two B H N D", two=2, H=heads)
        q = rearrange(query, "B Q (H D) -> B H Q D", H=heads)
        x = rearrange(F.scaled_dot_product_attention(q, k, v), "B H Q D -> B Q (H D)")
        x = F.rms_norm(x + query, x.shape[-1:])
        return x + self.mlp(x)


def _linears(dim: int, outputs: dict[str, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(dim, n) for name, n in outputs.items()})


def _class_ids(o: Object) -> tuple[int, int, int]:
    return SHAPES.index(o.shape), list(COLORS).index(o.color), list(RADIUS).index(o.size)


def random_phrases(rng: np.random.Generator, batch: list[Scene], n: int) -> Tensor:
    """n phrases a scene as class ids of shape, color, size [B, n, 3]; the last id: no such word.

    Each describes an object of the scene, but one in five has one word changed.
    """
    rows = []
    for scene in batch:
        for _ in range(n):
            ids = np.array(_class_ids(scene.objects[rng.integers(len(scene.objects))]))
            if rng.random() < 0.2:
                i = rng.integers(3)
                ids[i] = rng.integers(CLASSES[i])
            rows.append(np.where(PHRASES[rng.integers(len(PHRASES))], ids, CLASSES))
    return torch.from_numpy(np.stack(rows)).view(len(batch), n, 3)


def grounding_targets(batch: list[Scene], phrases: Tensor) -> dict[str, Tensor]:
    """Class ids of each cell [B, 9] (shape 0 = empty, the others -100 there) and image [B].

    Of each phrase [B, P]: the number of objects that match, and the classes of a single match.
    """
    ids = torch.zeros(len(batch), 9, 3).long()  # shape, color, size of each cell
    jitter, occupied = torch.zeros(len(batch), 9, 2), torch.zeros(len(batch), 9).bool()
    for i, scene in enumerate(batch):
        cells = [o.cell for o in scene.objects]
        ids[i, cells] = torch.tensor([_class_ids(o) for o in scene.objects])
        jitter[i, cells] = torch.tensor([(o.dx, o.dy) for o in scene.objects]) / 1.5
        occupied[i, cells] = True
    shape, color, size = ids.masked_fill(~occupied[..., None], -100).unbind(-1)
    target = {"shape": (shape + 1).clamp_min(0), "color": color, "size": size, "jitter": jitter}
    target["background"] = torch.tensor([list(BACKGROUNDS).index(s.background) for s in batch])
    target["style"] = torch.tensor([STYLES.index(s.style) for s in batch])

    words, objects = phrases[:, :, None], ids[:, None]  # [B, P, 1, 3], [B, 1, 9, 3]
    is_match = ((words == objects) | (words == torch.tensor(CLASSES))).all(-1) & occupied[:, None]
    cell, matches = is_match.int().argmax(-1), is_match.sum(-1)  # [B, P]
    classes = torch.cat((ids, torch.arange(9).expand(len(batch), 9)[..., None]), -1)  # [B, 9, 4]
    meant = classes.gather(1, cell[..., None].expand(-1, -1, 4))
    meant = meant.masked_fill(matches[..., None] != 1, -100).unbind(-1)
    names = ("meant_shape", "meant_color", "meant_size", "meant_cell")
    return target | dict(zip(names, meant, strict=True)) | {"meant_matches": matches.clamp_max(4)}


def grounding_loss(out: dict[str, Tensor], target: dict[str, Tensor]) -> tuple[Tensor, dict]:
    """Weighted cross-entropies + jitter + pixels; and the accuracies where there is an answer."""
    loss = sum(
        weight * F.cross_entropy(out[k].flatten(0, -2), target[k].flatten())
        for k, weight in GROUNDING_WEIGHTS.items()
    )
    occupied, is_single = target["shape"] > 0, target["meant_cell"] >= 0
    jitter = (out["jitter"] - target["jitter"])[occupied].square().mean()
    pixels = (out["pixels"] - target["pixels"]).square().mean()
    accuracy = {}
    for k in ("shape", "color", "size", "meant_shape", "meant_color", "meant_cell"):
        correct = (out[k].argmax(-1) == target[k])[is_single if "meant" in k else occupied]
        accuracy[f"{k}_acc"] = correct.float().mean()
    return loss + 0.5 * jitter + 4 * pixels, {**accuracy, "jitter": jitter, "pixels": pixels}


def add_noise(tokens: Tensor, most: float) -> Tensor:
    """Embeddings [B, N, C], normalized, under noise of a level of 0 to `most` each.

    What survives it exceeds the AR model's errors, and so is worth predicting.
    """
    mean, std = tokens.mean((0, 1)), tokens.std((0, 1))
    level = most * torch.rand(len(tokens), 1, 1)
    return (tokens - mean) / (std + 1e-6) + level * torch.randn_like(tokens)


def vision_stage(visual: QwenViT, config: NexusGenConfig, batch: int) -> Stage:
    """Grounding at the target's resolution, every fifth batch at the reference's.

    Scenes have up to nine objects, since an image then teaches more.
    """
    head = GroundingHead(config.ar.vision.out_hidden_size)
    unit = config.ar.vision.patch_size * config.ar.vision.spatial_merge_size

    def loss(rng, progress):
        is_reference = rng.random() < 0.2
        size = config.reference_size if is_reference else config.target_size
        batch_scenes = scenes(rng, max(1, batch // 4) if is_reference else batch, most=9)
        phrases = random_phrases(rng, batch_scenes, 8)
        tokens = embed_views(visual, to_unit([render(s) for s in batch_scenes]), size)
        noise = 0.0 if is_reference else EMBEDDING_NOISE * min(1.0, 2 * progress)
        out = head(add_noise(tokens, noise), phrases)
        target = grounding_targets(batch_scenes, phrases)
        if not is_reference:
            batch_scenes = [replace(s, texture=None) for s in batch_scenes]
        images = to_unit([render(s) for s in batch_scenes])
        images = resize(images, 8 * size // unit, "bilinear") * 2 - 1
        target["pixels"] = rearrange(images, "B C (h p) (w q) -> B (h w) (p q C)", p=8, q=8)
        return grounding_loss(out, target)

    modules, adamw_only = (
        nn.ModuleDict({"visual": visual, "head": head}),
        ("head.query", "head.words"),
    )
    return Stage("vision", modules, loss, 8e-3, 8e-3, ema=0.995, adamw_only=adamw_only)


@torch.no_grad()
def whiten(visual: QwenViT, config: NexusGenConfig) -> None:
    """Fold mean and deviation of the embeddings into the merger: MSE 1 = predicting the mean."""
    x = to_unit([render(s) for s in scenes(np.random.default_rng(3), 512, 0.0)])
    tokens = embed_views(visual, x, config.target_size).flatten(0, 1)
    last = visual.merger.mlp[2]
    last.weight /= tokens.std(0)[:, None]
    last.bias.copy_((last.bias - tokens.mean(0)) / tokens.std(0))
