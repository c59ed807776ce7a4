"""Fine-tuning on one's own data: the paper's three stages over a file in the message-like format.

The AR model learns understanding, generation and editing in a ratio (1:2:1 in the paper, sections
4.1 and table 4) with the vision tower frozen. The generation decoder reconstructs the assistants'
images from their own embeddings (4.2). The editing decoder learns from the embeddings that the AR
model *predicts*, and from the source's (4.3). Losses: `ar_loss`, `rf_loss`. Official counterparts:
`train_autoregressive_model.sh`, `prepare_embeddataset_for_{gen,edit}.py`, the decoders' configs.

It serves any configuration. Learning rates are a fourth of those that train the tiny model from
nothing; `scale.train` brings its own loop and the paper's learning rates.
"""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import NexusGenConfig
from ..images import center_crop_view, load_image, reference_view, to_latent_image, to_patches
from ..model.autoencoder import AutoEncoder
from ..model.autoregressive import ARLoss, NexusGenAR, prefill_image_slots
from ..model.flow import rf_loss, sample_t, time_shift, training_sigmas, training_weights
from ..model.mmdit import context_ids_editing, context_ids_generation
from ..model.packing import packed_ar_loss
from ..sampling import Context, velocity_field
from ..tokenizer import IMAGE, QwenTokenizer
from ..weights import EditingDecoder, GenerationDecoder
from .data import Shards, cache_embeddings, collate, image_roles
from .lora import add_lora, merge_lora
from .run_folder import RunFolder, barrier, rank_and_size
from .stage import Run, Stage
from .trainer import fit

TASKS = ("understand", "generate", "edit")
RATIO = (1.0, 2.0, 1.0)
ADAMW_ONLY = ("img_in", "final_layer", "time_in", "vector_in", "guidance_in")


def task_of(line: dict) -> str:
    """One of `TASKS`, by the roles in whose turns the images stand."""
    roles = list(image_roles(line["messages"]))
    if "assistant" not in roles:
        return "understand"
    return "edit" if roles[0] == "user" else "generate"


class TaskMixture:
    """Random lines whose tasks have a ratio; a task without lines gives its share to the rest."""

    def __init__(self, lines: Sequence[dict], ratio: Sequence[float] = RATIO):
        self.lines = {task: [x for x in lines if task_of(x) == task] for task in TASKS}
        shares = [r if self.lines[task] else 0.0 for task, r in zip(TASKS, ratio, strict=True)]
        if min(ratio) < 0 or not sum(shares):
            raise ValueError(f"no line of a kind that the ratio {tuple(ratio)} gives a share")
        self.shares = np.array(shares) / sum(shares)

    def draw(self, rng: np.random.Generator, n: int, progress: float = 0.0) -> list[dict]:
        tasks = [self.lines[TASKS[k]] for k in rng.choice(len(TASKS), n, p=self.shares)]
        return [lines[int(rng.integers(len(lines)))] for lines in tasks]


def lines_loss(ar: NexusGenAR, tokenizer, config, lines: list[dict], rng=None) -> ARLoss:
    """Equation 3 on lines, with the vision tower frozen."""
    batch, embeds = collate(lines, tokenizer, config), None
    if grid := tuple(map(tuple, batch.image_grid_thw.tolist())):
        with torch.no_grad():
            embeds = ar.visual(batch.pixel_values.to(ar.visual.patch_embed.proj.weight), grid)
    return embedded_loss(ar, [x["messages"] for x in lines], batch[:3], grid, embeds, rng)


def embedded_loss(
    ar: NexusGenAR, conversations: list, encoded: Sequence[Tensor], grid, embeds, rng=None
) -> ARLoss:
    """Equation 3 on encoded conversations, whose images are given as embeddings [n, C].

    With `rng`, half of the conversations that continue after an image of the assistant read it, as
    a `Chat` does, instead of predicting it.
    """
    ids, labels, slot_mask = encoded
    for slots, messages in zip(slot_mask, conversations, strict=True):
        earlier = sum(m["content"].count(IMAGE) for m in messages[1:-1:2])
        if rng and earlier and rng.random() < 0.5:
            slots[slots.nonzero()[: earlier * ar.config.num_image_slots]] = False
    device = ar.lm_head.weight.device
    ids, labels, slot_mask = (x.to(device) for x in (ids, labels, slot_mask))
    return packed_ar_loss(ar, ids, labels, None, torch.tensor(grid), embeds, slot_mask)


def loss_and_terms(out: ARLoss) -> tuple[Tensor, dict]:
    return out.loss, {"ce": out.ce, "mse": out.mse, "one_minus_cos": out.one_minus_cos}


def autoregressive_stage(
    ar: NexusGenAR,
    tokenizer: QwenTokenizer,
    config: NexusGenConfig,
    mixture: TaskMixture,
    batch: int,
    lora_rank: int = 0,
) -> Stage:
    """Multi-task training with the vision tower frozen, of all weights or by LoRA."""
    ar.visual.requires_grad_(False)
    if lora_rank:
        add_lora(ar.model, lora_rank)

    sources: list[str] = []

    def loss(rng, progress):
        lines = mixture.draw(rng, batch, progress)
        sources[:] = [line["where"] for line in lines if "where" in line]
        return loss_and_terms(lines_loss(ar, tokenizer, config, lines))

    modules, adamw_only = nn.ModuleDict({"ar": ar}), ("embed", "lm_head")
    rates = {"lr": 1e-3, "adamw_lr": 7e-4}
    return Stage("ar", modules, loss, adamw_only=adamw_only, lines=sources, **rates)


# ----------------------------------------------------------------------------- the decoders' stages


def shifted_times(n: int, generator=None, shift: float = 3.0) -> tuple[Tensor, None]:
    """Logit-normal times [n], shifted to noise as the sampler's are; no weights."""
    return time_shift(sample_t(n, generator), shift), None


def official_times(n: int, generator=None) -> tuple[Tensor, Tensor]:
    """One of the official thousand noise levels for the whole batch: [n], and its weight [n]."""
    sigmas, i = training_sigmas(), torch.randint(1000, (1,), generator=generator).expand(n)
    return sigmas[i], training_weights(sigmas)[i]


@dataclass(frozen=True)
class Recipe:
    """How a decoder learns."""

    lr: float = 1.5e-3
    adamw_lr: float = 5e-4
    times: Callable = shifted_times
    cond_noise: float = 0.12  # up to this much noise on the embeddings
    empty_share: float = 0.1  # batches of the generation decoder with the empty prompt, for CFG
    place_share: float = 0.0  # batches of it with embeddings at the places that editing gives them
    distill_share: float = 0.0  # of the stage, at its start, which minimizes `distill` instead


OFFICIAL = Recipe(times=official_times, cond_noise=0.0, empty_share=0.0)
Decoder = GenerationDecoder | EditingDecoder


def decoder_context(
    decoder: Decoder,
    empty: dict,
    config: NexusGenConfig,
    rows: dict,
    is_empty: bool = False,
    is_placed: bool = False,
) -> Context:
    """What the MMDiT attends to: adapted embeddings or the empty prompt; or merged embeddings.

    is_placed: the adapted embeddings have the positions that editing gives them, not zeros.
    """
    if isinstance(decoder, EditingDecoder):
        side = config.reference_size // config.ar.vision.patch_size
        grids = config.ar.slot_grid, (1, side, side)
        txt = decoder.merger(rows["embeds"], grids[0], rows["refs"], grids[1])
        ids = context_ids_editing(*grids, *rows["latents"].shape[-2:])
    else:
        txt = empty["context"] if is_empty else decoder.adapter(rows["embeds"])
        ids = context_ids_generation(txt.shape[1])
        if is_placed and not is_empty:
            ids = context_ids_editing(config.ar.slot_grid, None, *rows["latents"].shape[-2:])
    return Context(txt, ids, empty["pooled"])


def decoder_stage(
    decoder: Decoder,
    empty: dict[str, Tensor],
    samples: Shards,
    config: NexusGenConfig,
    batch: int,
    recipe: Recipe = OFFICIAL,
    distill: Callable[[dict[str, Tensor]], Tensor] | None = None,
) -> Stage:
    """Rectified flow of a decoder: images from their embeddings, or edits from predicted ones.

    samples: `Shards`, or what has its methods; distill: rows -> another loss, for the start.
    """

    sources: list[str] = []  # not `stage.lines`: a cycle would keep the samples after the stage

    def loss(rng, progress):
        picks = rng.integers(len(samples), size=batch)
        sources[:] = [samples.where[i] for i in picks if samples.where]
        rows = samples.rows(picks)
        x0, embeds = rows["latents"], rows["embeds"]
        # A generator on the CPU makes the same noise for every device.
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        level = recipe.cond_noise * torch.rand(batch, 1, 1, generator=generator)
        rows["embeds"] = embeds + level * torch.randn(embeds.shape, generator=generator)
        weight = decoder.mmdit.img_in.weight
        rows = {key: x.to(weight) for key, x in rows.items()}
        if progress < recipe.distill_share:
            return distill(rows), {}
        noise = torch.randn(x0.shape, generator=generator)
        t, weights = recipe.times(batch, generator)
        x0, noise, t = (x.to(weight.device) for x in (x0, noise, t))
        is_empty, is_placed = (rng.random() < x for x in (recipe.empty_share, recipe.place_share))
        context = decoder_context(decoder, empty, config, rows, is_empty, is_placed)
        field = velocity_field(decoder.mmdit, context, *x0.shape[-2:])
        return rf_loss(field, x0, noise, t, weights), {}

    name = "editing" if isinstance(decoder, EditingDecoder) else "generation"
    modules = nn.ModuleDict(decoder._asdict())
    rates = {"lr": recipe.lr, "adamw_lr": recipe.adamw_lr}
    return Stage(name, modules, loss, adamw_only=ADAMW_ONLY, lines=sources, **rates)


# ------------------------------------------------------------------------ what decoders learn from


@torch.no_grad()
def generation_sample(ar: NexusGenAR, vae: AutoEncoder, config: NexusGenConfig, image) -> dict:
    """An image's own `embeds` [N, C] and `latents` [z, h, w]."""
    image = load_image(image)
    embeds = embed(ar, center_crop_view(image, config.target_size))
    return {"embeds": embeds, "latents": encode_square(vae, image, config)}


@torch.no_grad()
def editing_sample(
    ar: NexusGenAR, vae: AutoEncoder, tokenizer: QwenTokenizer, config: NexusGenConfig, line: dict
) -> dict:
    """Predicted `embeds` of a line's first target, `refs` [M, C] of the image before it."""
    first = list(image_roles(line["messages"])).index("assistant")
    source, target = (load_image(line["images"][i]) for i in (first - 1, first))
    # The target is predicted from all that precedes it.
    batch = collate([line], tokenizer, config)
    ids, grid = batch.input_ids[:, : batch.slot_mask[0].nonzero()[0]], batch.image_grid_thw[:first]
    pixels = batch.pixel_values[: grid.prod(1).sum()]
    known = ar.visual(pixels.to(ar.visual.patch_embed.proj.weight), grid)
    embeds = prefill_image_slots(ar, ids.to(known.device), known, grid)[0]
    refs = embed(ar, reference_view(source, config.reference_size))
    return {"embeds": embeds, "refs": refs, "latents": encode_square(vae, target, config)}


def embed(ar: NexusGenAR, view) -> Tensor:
    """An image of the final size -> image embeddings [N, C]."""
    pixels, grid = to_patches(view)
    return ar.visual(pixels.to(ar.visual.patch_embed.proj.weight), grid)


def encode_square(vae: AutoEncoder, image, config: NexusGenConfig) -> Tensor:
    """The center square of an image as latents [z, h, w]."""
    side = config.image_size
    x = to_latent_image(center_crop_view(image, side), side, side)
    return vae.encode(x.to(vae.decoder.conv_in.weight))[0]


# ------------------------------------------------------------------------ a stage from end to end


@dataclass(frozen=True)
class FinetuneData:
    lines: list[dict]  # with paths of images
    ratio: tuple[float, ...] = RATIO
    batch: int = 32
    per_shard: int = 256
    lora_rank: int = 0  # for the AR model; 0: all weights learn
    official: bool = False  # the decoders' times and weights, without noise on the embeddings


Fit = Callable[[Stage, Run], Any]  # the loop: `trainer.fit`, or that of `scale.fsdp`


def train_ar(folder: RunFolder, data: FinetuneData, run: Run, fit: Fit = fit) -> None:
    """Train the AR model of `folder` on the lines of all tasks, mixed, and save it."""
    ar, mixture = folder.ar(), TaskMixture(data.lines, data.ratio)
    inputs = ar, folder.tokenizer(), folder.config, mixture, data.batch
    fit(autoregressive_stage(*inputs, data.lora_rank), run)
    merge_lora(ar)
    folder.save(folder.config, ar=ar)


def train_decoder(name: str, folder: RunFolder, data: FinetuneData, run: Run, fit: Fit = fit):
    """Train a decoder of `folder` on what the AR model makes of the lines, and save it."""
    started = time.perf_counter()
    samples = embed_lines(name, folder, data, run)
    decoder = folder.generation() if name == "generation" else folder.editing()
    inputs = decoder, folder.empty_prompt(), samples, folder.config, data.batch
    recipe = OFFICIAL if data.official else Recipe()
    fit(decoder_stage(*inputs, recipe), run.after(time.perf_counter() - started))
    folder.save(folder.config, **{name: decoder})


def embed_lines(name: str, folder: RunFolder, data: FinetuneData, run: Run) -> Shards:
    """A decoder's samples, made by all processes; cached until files or models change.

    For the generation decoder all images of the assistant, for the editing decoder all edits.
    """
    config, ar, vae = folder.config, folder.ar(), folder.vae()
    if name == "generation":
        models = ar.visual, vae
        items = [
            {"images": [image], "where": line["where"]}
            for line in data.lines
            for image, role in zip(line["images"], image_roles(line["messages"]), strict=True)
            if role == "assistant"
        ]

        def make(item: dict) -> dict:
            return generation_sample(ar, vae, config, *item["images"])

    else:
        models, items = (ar, vae), [line for line in data.lines if task_of(line) == "edit"]
        make = partial(editing_sample, ar, vae, folder.tokenizer(), config)
    paths = [path for item in items for path in item["images"]]
    files = [(str(p), os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in paths]
    weights = [float(x.float().sum()) for m in models for x in m.state_dict().values()]
    stamp = hashlib.sha256(repr((items, files, weights)).encode()).hexdigest()
    settings = {"per_shard": data.per_shard, "share": rank_and_size(), "quiet": run.quiet}
    shards = cache_embeddings(run.folder / "cache" / name, items, make, stamp, **settings)
    barrier()
    return Shards(shards, [item["where"] for item in items])


TRAIN = {name: partial(train_decoder, name) for name in ("generation", "editing")}
TRAIN["ar"] = train_ar
LEARNS_FROM = {"generation": ("generate", "edit"), "ar": TASKS, "editing": ("edit",)}


def stages(lines: Sequence[dict], chosen: str = "all") -> tuple[str, ...]:
    """The stages that the tasks of the lines allow."""
    tasks = {task_of(line) for line in lines}
    found = [n for n, x in LEARNS_FROM.items() if chosen in ("all", n) and tasks & set(x)]
    if not found:
        raise ValueError(f"the data hold no lines that the stage {chosen} learns from")
    return tuple(found)
