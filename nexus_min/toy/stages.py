"""The stages of the tiny model: its batches, its losses and its pictures of progress.

Each `*_stage` returns a `training.Stage` (paper, sections 4.1 to 4.3). The AR loss and the
rectified-flow loss are the package's own; what is toy here is the data, and `vision_stage`, which
grounds the tower in scenes because no Qwen weights exist at this size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor, nn

from ..autoencoder import AutoEncoder, ResnetBlock
from ..autoregressive import ARLoss, NexusGenAR, ar_loss, prefill_image_slots
from ..config import NexusGenConfig
from ..data import collate
from ..flow import denoise, rf_loss, sample_t, schedule
from ..image_processor import patchify
from ..mmdit import MMDiT, context_ids_editing, context_ids_generation
from ..projector import GenerationAdapter, ImageEmbeddingMerger
from ..sampling import Context, velocity_field
from ..tokenizer import IMAGE, QwenTokenizer
from ..training import Run, Stage, world
from ..vision import QwenViT
from . import score
from .tasks import Example, example
from .world import (
    BACKGROUNDS,
    COLOURS,
    RADIUS,
    SHAPES,
    STYLES,
    Scene,
    held_out,
    random_scene,
    render,
)

DETAIL = 0.4  # share of textured pictures in the base stages
POOL = 24_576  # most pictures embedded once for a decoder stage, over all workers
MIXTURE = ("understand", "generate", "generate", "edit")  # 1:2:1
COND_NOISE = 0.12  # up to this much noise on the embeddings a decoder learns from


# ---------------------------------------------------------------- pictures


def to_unit(images: list[np.ndarray]) -> Tensor:
    """uint8 pictures -> [B, 3, H, W] in [0, 1]."""
    return rearrange(torch.from_numpy(np.stack(images)), "B h w C -> B C h w").float() / 255


def resize(images: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """As PIL does it: [B, 3, H, W] in [0, 1] -> [B, 3, size, size]."""
    return F.interpolate(images, size=(size, size), mode=mode, antialias=True).clamp(0, 1)


def to_uint8(images: Tensor) -> np.ndarray:
    """[-1, 1] -> uint8 [B, H, W, 3], truncating as the official code does."""
    pixels = ((images.detach() / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    return rearrange(pixels, "B C h w -> B h w C").numpy()


def save_grid(path: Path, rows: list[np.ndarray], scale: int = 2) -> None:
    """Write a PNG whose rows are strips of equally many pictures uint8 [n, H, W, 3]."""
    image = Image.fromarray(np.concatenate([rearrange(r, "n h w C -> h (n w) C") for r in rows]))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


def scenes(rng: np.random.Generator, n: int, detail: float = DETAIL) -> list[Scene]:
    """n random scenes that are not held out."""
    found: list[Scene] = []
    while len(found) < n:
        scene = random_scene(rng, detail=detail)
        if not held_out(scene.key):
            found.append(scene)
    return found


def embed_views(visual: QwenViT, images: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] -> image embeddings [B, N, C] of their view at `size` px."""
    pixels, grid = patchify(resize(images, size, mode))
    tokens = visual(pixels, tuple(map(tuple, grid.tolist())))
    return rearrange(tokens, "(B N) C -> B N C", B=len(images))


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


def exactness(pictures: np.ndarray, wanted: list[Scene]) -> float:
    """Share of pictures that the checker reads as exactly their scene."""
    readings = score.read(pictures)
    return float(np.mean([r.is_exactly(s) for r, s in zip(readings, wanted, strict=True)]))


def agreement(drawn: np.ndarray, truth: np.ndarray) -> float:
    """Share of pictures in which the checker reads the same scene as in the true ones."""
    pairs = zip(score.read(drawn), score.read(truth), strict=True)
    return float(np.mean([a.scene.key == b.scene.key for a, b in pairs]))


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
    read background and style, and each embedding redraws its own part of the picture without its
    texture. Keys carry no position: where things are must be in the embeddings, since the
    generation decoder gets all of them at position 0.
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
        plain = to_unit([render(replace(s, texture=None)) for s in batch_scenes])
        plain = resize(plain, 8 * size // unit, "bilinear") * 2 - 1
        want["pixels"] = rearrange(plain, "B C (h p) (w q) -> B (h w) (p q C)", p=8, q=8)
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


# ---------------------------------------------------------------- the autoregressive model


def toy_line(ex: Example) -> dict:
    """A toy example in the official message-like format, its pictures drawn."""
    return {"images": [render(s) for s in ex.scenes], "messages": list(ex.messages)}


def init_ar(ar: NexusGenAR) -> NexusGenAR:
    """Every block starts as the identity; heads start small, vectors at the scale of embeddings."""
    for layer in ar.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    nn.init.normal_(ar.lm_head.weight, std=0.02)
    nn.init.normal_(ar.model.embed_tokens.weight, std=0.5)
    nn.init.normal_(ar.image_prefill_embeds.weight, std=0.5)
    return ar


def ar_batch_loss(
    ar: NexusGenAR, tokenizer: QwenTokenizer, config: NexusGenConfig, batch: list[Example]
) -> ARLoss:
    """`ar_loss` of toy examples, through the reader of the message-like format."""
    b = collate([toy_line(ex) for ex in batch], tokenizer, config)
    with torch.no_grad():
        embeds = ar.visual(b.pixel_values, tuple(map(tuple, b.image_grid_thw.tolist())))
    return ar_loss(ar, b.input_ids, b.labels, None, b.image_grid_thw, embeds, b.slot_mask)


def ar_stage(
    ar: NexusGenAR,
    tokenizer: QwenTokenizer,
    config: NexusGenConfig,
    batch: int,
    painter: Painter | None = None,
) -> Stage:
    """Multi-task training with the vision tower frozen; scenes grow from one object to four."""
    ar.visual.requires_grad_(False)

    def loss(rng, progress):
        most = 1 if progress < 0.03 else 2 if progress < 0.1 else 4
        found = [example(rng, MIXTURE[i % 4], most=most) for i in range(batch)]
        out = ar_batch_loss(ar, tokenizer, config, found)
        return out.loss, {"ce": out.ce, "mse": out.mse, "one_minus_cos": out.one_minus_cos}

    def sample(path):
        rng, metrics = np.random.default_rng(4), {}
        for task in dict.fromkeys(MIXTURE):
            found = [example(rng, task, unseen=True) for _ in range(40)]
            with torch.no_grad():
                out = ar_batch_loss(ar, tokenizer, config, found)
            metrics[f"unseen_{task}"] = float(out.ce if task == "understand" else out.mse)
            if task != "understand" and painter:
                drawn = painter.draw(predict(ar, tokenizer, config, found))
                wanted = [ex.scenes[-1] for ex in found]
                metrics[f"exact_{task}"] = exactness(drawn, wanted)
                truth = np.stack([render(s) for s in wanted])
                save_grid(path.with_stem(f"{path.stem}_{task}"), [truth[:10], drawn[:10]])
        return metrics

    names = ("embed", "lm_head")
    return Stage("ar", nn.ModuleDict({"ar": ar}), loss, lr=4e-3, adamw_only=names, sample=sample)


@torch.no_grad()
def predict(
    ar: NexusGenAR, tokenizer: QwenTokenizer, config: NexusGenConfig, batch: list[Example]
) -> Tensor:
    """Embeddings [B, N, C] of the pictures asked for, after the fixed sentence, in one pass."""
    merge, start = config.ar.vision.spatial_merge_size, config.ar.vision_start_token_id
    rows, pixels = [], []
    for ex in batch:
        user, reply = ex.messages
        view = [render(s) for s in ex.scenes[:-1]]
        counts = [config.max_pixels // (config.ar.vision.patch_size * merge) ** 2] * len(view)
        ids = tokenizer.encode_chat([user], counts)
        rows.append([*ids, *tokenizer.encode(reply["content"].removesuffix(IMAGE)), start])
        pixels += view
    embeds = grid = None
    if pixels:
        values, grid = patchify(resize(to_unit(pixels), config.target_size))
        embeds = ar.visual(values, tuple(map(tuple, grid.tolist())))
    length = max(map(len, rows))
    pad = config.ar.pad_token_id
    ids = torch.tensor([[pad] * (length - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
    return prefill_image_slots(ar, ids, embeds, grid, mask)


# ---------------------------------------------------------------- the decoders


def init_mmdit(mmdit: MMDiT) -> MMDiT:
    """adaLN-zero: every block starts as the identity, the velocity as 0."""
    for name, p in mmdit.named_parameters():
        if "mod.lin" in name or "modulation" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(p)
    return mmdit


def empty_prompt(config: NexusGenConfig, length: int = 8) -> dict[str, Tensor]:
    """Stand-ins for CLIP's and T5's constant output for "": a zero vector, fixed random states."""
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, length, config.mmdit.context_in_dim, generator=generator)
    return {"pooled": torch.zeros(1, config.mmdit.vec_in_dim), "context": context}


class Painter:
    """Draws batches of pictures from embeddings with the generation decoder, for progress."""

    def __init__(self, vae, mmdit, adapter, empty: dict, config: NexusGenConfig):
        self.vae, self.mmdit, self.adapter = vae, mmdit, adapter
        self.empty, self.config = empty, config

    @torch.no_grad()
    def draw(self, embeds: Tensor) -> np.ndarray:
        """[B, N, C] -> uint8 [B, H, W, 3]."""
        txt = self.adapter(embeds)
        context = Context(txt, context_ids_generation(txt.shape[1]), self.empty["pooled"])
        return paint(self.mmdit, context, self.vae, self.config)


@torch.no_grad()
def paint(mmdit: MMDiT, context: Context, vae: AutoEncoder, config: NexusGenConfig) -> np.ndarray:
    """Sample a batch from its context with the default number of steps: uint8 [B, H, W, 3]."""
    h = w = config.image_size // config.autoencoder.downsample
    shape = (len(context.txt), config.autoencoder.z_channels, h, w)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    steps = denoise(velocity_field(mmdit, context, h, w), noise, schedule(config.num_steps))
    return to_uint8(vae.decode(list(steps)[-1].x))


def pool_size(run: Run, per_second: int) -> int:
    """Pictures that are worth embedding: `per_second` of the stage's budget, at most POOL."""
    return POOL if run.seconds is None else min(POOL, max(256, int(per_second * run.seconds)))


def build_pool(n: int, run: Run, make: Callable[[np.random.Generator], dict[str, Tensor]]) -> dict:
    """Tensors of this worker's share of n examples, 64 at a time, in fp16; used many times."""
    rank, size = world()
    parts: dict[str, list[Tensor]] = {}
    for k in range(-(-n // (64 * size))):
        for name, x in make(np.random.default_rng([run.seed, 99, rank, k])).items():
            parts.setdefault(name, []).append(x.half())
    return {name: torch.cat(x) for name, x in parts.items()}


def reconstruction_pool(
    visual: QwenViT, vae: AutoEncoder, config: NexusGenConfig, run: Run
) -> dict[str, Tensor]:
    """Pictures as `embeds` [n, N, C] and `latents` [n, z, h, w]."""

    @torch.no_grad()
    def make(rng):
        x = to_unit([render(s) for s in scenes(rng, 64, 0.15)])
        embeds = embed_views(visual, x, config.target_size)
        return {"embeds": embeds, "latents": vae.encode(x * 2 - 1)}

    return build_pool(pool_size(run, 20), run, make)


def editing_pool(
    ar: NexusGenAR, vae: AutoEncoder, tokenizer: QwenTokenizer, config: NexusGenConfig, run: Run
) -> dict:
    """Edits as predicted `embeds`, the source's `refs` [n, M, C], and the target's `latents`."""

    @torch.no_grad()
    def make(rng):
        batch = [example(rng, "edit") for _ in range(64)]
        source, target = (to_unit([render(ex.scenes[i]) for ex in batch]) for i in (0, 1))
        return {
            "embeds": predict(ar, tokenizer, config, batch),
            "refs": embed_views(ar.visual, source, config.reference_size, "bilinear"),
            "latents": vae.encode(target * 2 - 1),
        }

    return build_pool(pool_size(run, 12), run, make)


def draw_rows(
    rng: np.random.Generator, pool: dict, n: int
) -> tuple[dict[str, Tensor], torch.Generator]:
    """n random rows of a pool in fp32, embeddings lightly noised; a generator for the rest."""
    picked = torch.from_numpy(rng.integers(len(pool["embeds"]), size=n))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    rows = {name: x[picked].float() for name, x in pool.items()}
    level = COND_NOISE * torch.rand(n, 1, 1, generator=generator)
    rows["embeds"] = rows["embeds"] + level * torch.randn(rows["embeds"].shape, generator=generator)
    return rows, generator


def flow_loss(mmdit: MMDiT, context: Context, x0: Tensor, generator: torch.Generator) -> Tensor:
    """`rf_loss` at logit-normal times."""
    noise, t = torch.randn(x0.shape, generator=generator), sample_t(len(x0), generator)
    return rf_loss(velocity_field(mmdit, context, *x0.shape[-2:]), x0, noise, t)


ADAMW_ONLY = ("img_in", "final_layer", "time_in", "vector_in", "guidance_in")


def generation_stage(
    mmdit: MMDiT,
    adapter: GenerationAdapter,
    empty: dict[str, Tensor],
    pool: dict[str, Tensor],
    vae: AutoEncoder,
    config: NexusGenConfig,
    batch: int,
) -> Stage:
    """Reconstruct a picture from its embeddings; one batch in ten sees the empty prompt (cfg)."""
    painter = Painter(vae, mmdit, adapter, empty, config)

    def loss(rng, progress):
        rows, generator = draw_rows(rng, pool, batch)
        txt = empty["context"] if rng.random() < 0.1 else adapter(rows["embeds"])
        context = Context(txt, context_ids_generation(txt.shape[1]), empty["pooled"])
        return flow_loss(mmdit, context, rows["latents"], generator), {}

    def sample(path):
        embeds, latents = pool["embeds"][:40].float(), pool["latents"][:40].float()
        with torch.no_grad():
            truth = to_uint8(vae.decode(latents))
        drawn = painter.draw(embeds)
        save_grid(path, [truth[:10], drawn[:10]])
        return {"exact": agreement(drawn, truth)}

    modules = nn.ModuleDict({"mmdit": mmdit, "adapter": adapter})
    return Stage("generation", modules, loss, lr=8e-3, adamw_only=ADAMW_ONLY, sample=sample)


def editing_stage(
    mmdit: MMDiT,
    merger: ImageEmbeddingMerger,
    empty: dict[str, Tensor],
    pool: dict[str, Tensor],
    vae: AutoEncoder,
    config: NexusGenConfig,
    batch: int,
) -> Stage:
    """Draw the target from its predicted embeddings and the source's at twice the resolution."""
    side = config.reference_size // config.ar.vision.patch_size
    grids = config.ar.slot_grid, (1, side, side)

    def context(rows):
        txt = merger(rows["embeds"], grids[0], rows["refs"], grids[1])
        ids = context_ids_editing(*grids, *rows["latents"].shape[-2:])
        return Context(txt, ids, empty["pooled"])

    def loss(rng, progress):
        rows, generator = draw_rows(rng, pool, batch)
        return flow_loss(mmdit, context(rows), rows["latents"], generator), {}

    def sample(path):
        rows = {name: x[:40].float() for name, x in pool.items()}
        with torch.no_grad():
            truth = to_uint8(vae.decode(rows["latents"]))
            drawn = paint(mmdit, context(rows), vae, config)
        save_grid(path, [truth[:10], drawn[:10]])
        return {"exact": agreement(drawn, truth)}

    modules = nn.ModuleDict({"mmdit": mmdit, "merger": merger})
    return Stage("editing", modules, loss, lr=8e-3, adamw_only=ADAMW_ONLY, sample=sample)
