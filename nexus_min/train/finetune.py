"""Fine-tuning on one's own data: the paper's three stages over a file in the message-like format.

The AR model learns understanding, generation and editing in a ratio (1:2:1 in the paper, sections
4.1 and table 4) with the vision tower frozen; the generation decoder reconstructs the images that
assistants show from their own embeddings (4.2); the editing decoder learns from embeddings that the
AR model *predicts*, and the source's (4.3). Losses: `ar_loss`, `rf_loss`. Official counterparts:
`train_autoregressive_model.sh`, `prepare_embeddataset_for_{gen,edit}.py`, the decoders' configs.

Any configuration: nothing here is the tiny model's. Learning rates are a fourth of those that train
the tiny model from nothing; `fullscale` brings its own loop and the paper's.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import NexusGenConfig
from ..images import (
    center_crop_view,
    load_image,
    reference_view,
    to_latent_image,
    to_patches,
)
from ..model.autoencoder import AutoEncoder
from ..model.autoregressive import NexusGenAR, prefill_image_slots
from ..model.flow import rf_loss, sample_t, time_shift, training_sigmas, training_weights
from ..model.mmdit import MMDiT, context_ids_editing, context_ids_generation
from ..model.packing import packed_ar_loss
from ..model.projector import GenerationAdapter, ImageEmbeddingMerger
from ..sampling import Context, velocity_field
from ..tokenizer import QwenTokenizer
from .data import Shards, cache_embeddings, collate, image_roles
from .lora import add_lora, merge_lora
from .trainer import Run, Stage, fit, world

KINDS = ("understand", "generate", "edit")
RATIO = (1.0, 2.0, 1.0)
EMPTY_SHARE = 0.1  # batches of the generation decoder that see the empty prompt, for cfg
COND_NOISE = 0.12  # up to this much noise on the embeddings that a decoder learns from
ADAMW_ONLY = ("img_in", "final_layer", "time_in", "vector_in", "guidance_in")

# ---------------------------------------------------------------------------------- lines by kind


def kind_of(line: dict) -> str:
    """One of `KINDS`: without an image of the assistant; with one; with one after the user's."""
    roles = list(image_roles(line["messages"]))
    if "assistant" not in roles:
        return "understand"
    return "edit" if roles[0] == "user" else "generate"


class Mixture:
    """Lines drawn by kind in a ratio; the share of a kind that has no lines goes to the others."""

    def __init__(self, lines: Sequence[dict], ratio: Sequence[float] = RATIO):
        kinds = [kind_of(line) for line in lines]
        self.lines = lines
        self.places = {k: [i for i, kind in enumerate(kinds) if kind == k] for k in KINDS}
        shares = [r * bool(self.places[k]) for k, r in zip(KINDS, ratio, strict=True)]
        if min(ratio) < 0 or not sum(shares):
            raise ValueError(f"no line of a kind that the ratio {tuple(ratio)} asks for")
        self.shares = np.array(shares) / sum(shares)

    def draw(self, rng: np.random.Generator, n: int) -> list[dict]:
        """n random lines."""
        kinds = rng.choice(len(KINDS), n, p=self.shares)
        return [self.lines[int(rng.choice(self.places[KINDS[k]]))] for k in kinds]


# ---------------------------------------------------------------------------- what decoders read


def embed(ar: NexusGenAR, views: list) -> Tensor:
    """Equal-sized images -> image embeddings [B, N, C]."""
    pixels, grid = to_patches(views)
    tokens = ar.visual(pixels.to(ar.visual.patch_embed.proj.weight), grid)
    return tokens.view(len(views), -1, tokens.shape[-1])


def latents_of(vae: AutoEncoder, image, config: NexusGenConfig) -> Tensor:
    """The centre square of an image as latents [z, h, w]."""
    side = config.image_size
    x = to_latent_image(center_crop_view(image, side), side, side)
    return vae.encode(x.to(vae.decoder.conv_in.weight))[0]


@torch.no_grad()
def generation_sample(ar: NexusGenAR, vae: AutoEncoder, config: NexusGenConfig, image) -> dict:
    """An image's own `embeds` [N, C] and `latents` [z, h, w]."""
    image = load_image(image)
    embeds = embed(ar, [center_crop_view(image, config.target_size)])[0]
    return {"embeds": embeds, "latents": latents_of(vae, image, config)}


@torch.no_grad()
def editing_sample(
    ar: NexusGenAR, vae: AutoEncoder, tokenizer: QwenTokenizer, config: NexusGenConfig, line: dict
) -> dict:
    """Predicted `embeds` of a line's first target, `refs` [M, C] of the image before it."""
    first = list(image_roles(line["messages"])).index("assistant")
    source, target = (load_image(line["images"][i]) for i in (first - 1, first))
    refs = embed(ar, [reference_view(source, config.reference_size)])[0]
    embeds = predicted(ar, tokenizer, config, line, first)
    return {"embeds": embeds, "refs": refs, "latents": latents_of(vae, target, config)}


def predicted(
    ar: NexusGenAR, tokenizer: QwenTokenizer, config: NexusGenConfig, line: dict, first: int
) -> Tensor:
    """The AR model's embeddings [N, C] of the image numbered `first`, from all before it."""
    batch = collate([line], tokenizer, config)
    ids = batch.input_ids[:, : int(batch.slot_mask[0].nonzero()[0])]
    grid = batch.image_grid_thw[:first]
    pixels = batch.pixel_values[: int(grid.prod(1).sum())]
    seen = ar.visual(pixels.to(ar.visual.patch_embed.proj.weight), grid)
    return prefill_image_slots(ar, ids.to(seen.device), seen, grid)[0]


# ------------------------------------------------------------------------------------- the stages


def autoregressive_stage(
    ar: NexusGenAR,
    tokenizer: QwenTokenizer,
    config: NexusGenConfig,
    mixture: Mixture,
    batch: int,
    rank: int = 0,
) -> Stage:
    """Multi-task fine-tuning with the vision tower frozen; equation 3. With a rank, by LoRA."""
    ar.visual.requires_grad_(False)
    if rank:
        add_lora(ar.model, rank)

    def loss(rng, progress):
        lines = mixture.draw(rng, batch)
        stage.lines[:] = [line["where"] for line in lines if "where" in line]
        b, embeds = collate(lines, tokenizer, config), None
        weight = ar.visual.patch_embed.proj.weight
        ids, labels, slots = (x.to(weight.device) for x in b[:3])
        if len(b.pixel_values):
            with torch.no_grad():
                embeds = ar.visual(b.pixel_values.to(weight), b.image_grid_thw)
        out = packed_ar_loss(ar, ids, labels, None, b.image_grid_thw, embeds, slots)
        return out.loss, {"ce": out.ce, "mse": out.mse, "one_minus_cos": out.one_minus_cos}

    modules, names = nn.ModuleDict({"ar": ar}), ("embed", "lm_head")
    stage = Stage("ar", modules, loss, lr=1e-3, adamw_lr=7e-4, adamw_only=names)
    return stage


def generation_stage(
    mmdit: MMDiT,
    adapter: GenerationAdapter,
    empty: dict[str, Tensor],
    samples: Shards,
    batch: int,
    official: bool = False,
) -> Stage:
    """Reconstruct an image from its embeddings; some batches see the empty prompt instead, but
    for the official recipe."""

    def context(rng, rows):
        is_empty = not official and rng.random() < EMPTY_SHARE
        txt = empty["context"] if is_empty else adapter(rows["embeds"])
        return Context(txt, context_ids_generation(txt.shape[1]), empty["pooled"])

    modules = nn.ModuleDict({"mmdit": mmdit, "adapter": adapter})
    return decoder_stage("generation", modules, samples, batch, context, official)


def editing_stage(
    mmdit: MMDiT,
    merger: ImageEmbeddingMerger,
    empty: dict[str, Tensor],
    samples: Shards,
    config: NexusGenConfig,
    batch: int,
    official: bool = False,
) -> Stage:
    """Draw the target from its predicted embeddings and the source's."""
    side = config.reference_size // config.ar.vision.patch_size
    grids = config.ar.slot_grid, (1, side, side)

    def context(rng, rows):
        txt = merger(rows["embeds"], grids[0], rows["refs"], grids[1])
        ids = context_ids_editing(*grids, *rows["latents"].shape[-2:])
        return Context(txt, ids, empty["pooled"])

    modules = nn.ModuleDict({"mmdit": mmdit, "merger": merger})
    return decoder_stage("editing", modules, samples, batch, context, official)


def decoder_stage(
    name: str,
    modules: nn.ModuleDict,
    samples: Shards,
    batch: int,
    context: Callable[[np.random.Generator, dict[str, Tensor]], Context],
    official: bool = False,
) -> Stage:
    """Rectified flow: the official levels and weights, or logit-normal times shifted to noise, as
    the sampler's are, with noisy embeddings. Noise is drawn on the CPU: the same on any device."""

    def loss(rng, progress):
        picks = rng.integers(len(samples), size=batch)
        rows = samples.rows(picks)
        stage.lines[:] = [samples.where[i] for i in picks if samples.where]
        embeds, x0 = rows["embeds"], rows["latents"]
        if not official:
            noise = COND_NOISE * torch.rand(batch, 1, 1) * torch.randn_like(embeds)
            rows["embeds"] = embeds + noise
        t, share = official_times(batch) if official else (time_shift(sample_t(batch)), None)
        weight = modules["mmdit"].img_in.weight
        x0, noise, t = (x.to(weight.device) for x in (x0, torch.randn_like(x0), t))
        given = {name: x.to(weight) for name, x in rows.items()}
        field = velocity_field(modules["mmdit"], context(rng, given), *x0.shape[-2:])
        return rf_loss(field, x0, noise, t, share), {}

    stage = Stage(name, modules, loss, lr=1.5e-3, adamw_lr=5e-4, adamw_only=ADAMW_ONLY)
    return stage


def official_times(batch: int) -> tuple[Tensor, Tensor]:
    """One of the official thousand noise levels for the whole batch: [B], and its weight [B]."""
    sigmas, i = training_sigmas(), torch.randint(1000, (1,)).expand(batch)
    return sigmas[i], training_weights(sigmas)[i]


# ------------------------------------------------------------------------------- the stages, whole


@dataclass(frozen=True)
class Own:
    """What a stage learns from, and how."""

    lines: list[dict]  # their images as paths
    ratio: tuple[float, ...] = RATIO
    batch: int = 32
    per_shard: int = 256
    rank: int = 0  # of LoRA for the AR model; 0: all weights
    official: bool = False  # the decoders' times and weights; no noise on what they are told


Fit = Callable[[Stage, Run], Any]  # a loop: `training.fit`, or that of `fullscale`


def train_generation_decoder(folder: Any, own: Own, run: Run, fit: Fit = fit) -> None:
    """Train the generation decoder of `folder` (a `train_tiny.Folder`) on all targets; save it."""
    started, samples = time.perf_counter(), generation_samples(folder, own, run)
    mmdit, adapter = folder.generation()
    settings = (folder.empty_prompt(), samples, own.batch, own.official)
    stage = generation_stage(mmdit, adapter, *settings)
    fit(stage, run.less(time.perf_counter() - started))
    folder.save(folder.config, generation=(mmdit, adapter))


def generation_samples(folder: Any, own: Own, run: Run) -> Shards:
    """The embeddings and latents of all images of assistants; the models that make them go."""
    config, ar, vae = folder.config, folder.ar(), folder.vae()
    pictures = [
        {"images": [image], "where": line["where"]}
        for line in own.lines
        for image, role in zip(line["images"], image_roles(line["messages"]), strict=True)
        if role == "assistant"
    ]

    def make(picture: dict) -> dict:
        return generation_sample(ar, vae, config, *picture["images"])

    return cached("generation", pictures, make, (ar.visual, vae), own, run)


def train_autoregressive(folder: Any, own: Own, run: Run, fit: Fit = fit) -> None:
    """Train the AR model of `folder` on all kinds of lines, mixed; save it."""
    ar, mixture = folder.ar(), Mixture(own.lines, own.ratio)
    settings = (folder.config, mixture, own.batch, own.rank)
    fit(autoregressive_stage(ar, folder.tokenizer(), *settings), run)
    merge_lora(ar)
    folder.save(folder.config, ar=ar)


def train_editing_decoder(folder: Any, own: Own, run: Run, fit: Fit = fit) -> None:
    """Train the editing decoder of `folder` on what its AR model, as it is now, predicts."""
    started, samples = time.perf_counter(), editing_samples(folder, own, run)
    mmdit, merger = folder.editing()
    settings = (folder.empty_prompt(), samples, folder.config, own.batch, own.official)
    stage = editing_stage(mmdit, merger, *settings)
    fit(stage, run.less(time.perf_counter() - started))
    folder.save(folder.config, editing=(mmdit, merger))


def editing_samples(folder: Any, own: Own, run: Run) -> Shards:
    """What the AR model predicts for all edits, and the sources; the models that make them go."""
    config, ar, vae = folder.config, folder.ar(), folder.vae()
    edits = [line for line in own.lines if kind_of(line) == "edit"]
    make = partial(editing_sample, ar, vae, folder.tokenizer(), config)
    return cached("editing", edits, make, (ar, vae), own, run)


TRAIN = {
    "generation": train_generation_decoder,
    "ar": train_autoregressive,
    "editing": train_editing_decoder,
}
LEARNS_FROM = {"generation": ("generate", "edit"), "ar": KINDS, "editing": ("edit",)}


def stages(lines: Sequence[dict], chosen: str = "all") -> tuple[str, ...]:
    """The stages that the kinds of lines allow. ValueError when the chosen one has none."""
    kinds = {kind_of(line) for line in lines}
    found = [n for n in TRAIN if chosen in ("all", n) and kinds & set(LEARNS_FROM[n])]
    if not found:
        raise ValueError(f"the data hold no lines that the stage {chosen} learns from")
    return tuple(found)


def cached(
    name: str,
    samples: list[dict],
    make: Callable,
    models: tuple[nn.Module, ...],
    own: Own,
    run: Run,
) -> Shards:
    """The tensors of samples, computed by all processes together; again when anything changed."""
    paths = [p for s in samples for p in s["images"]]
    files = [(str(p), os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in paths]
    weights = [float(x.float().sum()) for m in models for x in m.state_dict().values()]
    stamp = hashlib.sha256(repr((samples, files, weights)).encode()).hexdigest()
    settings = {"per_shard": own.per_shard, "share": world(), "quiet": run.quiet}
    paths = cache_embeddings(run.folder / "cache" / name, samples, make, stamp, **settings)
    if dist.is_initialized():
        dist.barrier()
    return Shards(paths, [s["where"] for s in samples])
