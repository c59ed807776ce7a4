"""The three stages of the paper at toy size: what they learn from, their losses, their images.

Each `*_stage` returns a `training.Stage` (paper, sections 4.1 to 4.3). The AR loss and the
rectified-flow loss are the package's own; what is toy here is the data.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import NexusGenConfig
from ..images import patch_rows
from ..model.autoencoder import AutoEncoder
from ..model.autoregressive import ARLoss, NexusGenAR, prefill_image_slots
from ..model.flow import denoise, rf_loss, sample_t, schedule, time_shift
from ..model.mmdit import MMDiT, context_ids_editing, context_ids_generation
from ..model.packing import packed_ar_loss
from ..model.projector import GenerationAdapter, ImageEmbeddingMerger
from ..model.vision import QwenViT
from ..sampling import Context, velocity_field
from ..tokenizer import IMAGE, QwenTokenizer
from ..train.data import collate
from ..train.trainer import Run, Stage, mixed_precision, world
from .edits import EDITS
from .pictures import (
    agreement,
    embed_views,
    exactness,
    resize,
    save_grid,
    scenes,
    to_uint8,
    to_unit,
)
from .tasks import Example, sample_example
from .world import STYLES, render

POOL = 24_576  # most images embedded once for a decoder stage, over all workers
UND, GEN, EDIT, MULTI_TURN = "understand", "generate", "edit", "multi_turn"
MIXTURE = (UND, GEN, GEN, EDIT)  # 1:2:1, pre-training
FINE_TUNING = (UND, EDIT, GEN, EDIT, UND, GEN, EDIT, MULTI_TURN)  # more of what takes longest
PRETRAINED = 0.4  # of the stage
# of EDITS for the editing decoder: what has to be drawn anew is harder than what is only changed
DRAWING_SHARES = np.array([3, 4, 2, 4, 2, 3, 2]) / 20
TRAINING_SHIFT = 9.0  # of a decoder's times; half of them then lie above 0.9
COND_NOISE = 0.3  # up to this much, on true embeddings: predicted ones bring their own errors


# ---------------------------------------------------------------- the autoregressive model


def toy_line(ex: Example) -> dict:
    """A toy example in the official message-like format, its images drawn."""
    return {"images": [render(s) for s in ex.scenes], "messages": list(ex.messages)}


def ar_batch_loss(
    ar: NexusGenAR,
    tokenizer: QwenTokenizer,
    config: NexusGenConfig,
    batch: list[Example],
    rng: np.random.Generator | None = None,
) -> ARLoss:
    """`packed_ar_loss` of toy examples, through the reader of the message-like format.

    With `rng`, images behind which a conversation goes on are, half of the time, not predicted
    but read, as a `Chat` reads them.
    """
    b = collate([toy_line(ex) for ex in batch], tokenizer, config)
    for slots, ex in zip(b.slot_mask, batch, strict=True):
        earlier = [m["content"].count(IMAGE) for m in ex.messages[1:-1:2]]
        if rng and any(earlier) and rng.random() < 0.5:
            slots[slots.nonzero()[: sum(earlier) * config.ar.num_image_slots]] = False
    with torch.no_grad():
        embeds = ar.visual(b.pixel_values, tuple(map(tuple, b.image_grid_thw.tolist())))
    return packed_ar_loss(ar, b.input_ids, b.labels, None, b.image_grid_thw, embeds, b.slot_mask)


def ar_stage(
    ar: NexusGenAR,
    tokenizer: QwenTokenizer,
    config: NexusGenConfig,
    batch: int,
    painter: Painter | None = None,
) -> Stage:
    """Multi-task training with the vision tower frozen; scenes grow from one object to four.

    Pre-training is followed by fine-tuning on other shares of the tasks, as in the paper.
    """
    ar.visual.requires_grad_(False)

    def loss(rng, progress):
        most = 1 if progress < 0.03 else 2 if progress < 0.1 else 4
        mixture = MIXTURE if progress < PRETRAINED else FINE_TUNING
        found = [sample_example(rng, mixture[i % len(mixture)], most=most) for i in range(batch)]
        out = ar_batch_loss(ar, tokenizer, config, found, rng)
        return out.loss, {"ce": out.ce, "mse": out.mse, "one_minus_cos": out.one_minus_cos}

    def sample(path):
        rng, metrics = np.random.default_rng(4), {}
        for task in dict.fromkeys(MIXTURE):
            found = [sample_example(rng, task, unseen=True) for _ in range(40)]
            with torch.no_grad():
                out = ar_batch_loss(ar, tokenizer, config, found)
            metrics[f"unseen_{task}"] = float(out.ce if task == "understand" else out.mse)
            if task != "understand" and painter:
                drawn = painter.draw(predict_after_reply(ar, tokenizer, config, found))
                wanted = [ex.scenes[-1] for ex in found]
                metrics[f"exact_{task}"] = exactness(drawn, wanted)
                truth = np.stack([render(s) for s in wanted])
                save_grid(path.with_stem(f"{path.stem}_{task}"), [truth[:10], drawn[:10]])
        return metrics

    names = ("embed", "lm_head")
    return Stage(
        "ar",
        nn.ModuleDict({"ar": ar}),
        loss,
        lr=4e-3,
        adamw_lr=3e-3,
        adamw_only=names,
        sample=sample,
    )


@torch.no_grad()
def predict_after_reply(
    ar: NexusGenAR, tokenizer: QwenTokenizer, config: NexusGenConfig, batch: list[Example]
) -> Tensor:
    """Embeddings [B, N, C] of the images asked for, in one pass behind each example's own reply.

    That reply tells rightly what is seen and what will change (teacher forcing);
    `evaluate.predict` lets the model speak for itself.
    """
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
        values, grid = patch_rows(resize(to_unit(pixels), config.target_size))
        embeds = ar.visual(values, tuple(map(tuple, grid.tolist())))
    length = max(map(len, rows))
    pad = config.ar.pad_token_id
    ids = torch.tensor([[pad] * (length - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
    return prefill_image_slots(ar, ids, embeds, grid, mask)


# ---------------------------------------------------------------- the decoders


def empty_prompt(config: NexusGenConfig, length: int = 8) -> dict[str, Tensor]:
    """Stand-ins for CLIP's and T5's constant output for "": a zero vector, fixed random states."""
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, length, config.mmdit.context_in_dim, generator=generator)
    return {"pooled": torch.zeros(1, config.mmdit.vec_in_dim), "context": context}


class Painter:
    """Draws batches of images from embeddings with the generation decoder, for progress."""

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
    """Images that are worth embedding: `per_second` of the stage's budget, at most POOL."""
    return POOL if run.seconds is None else min(POOL, max(256, int(per_second * run.seconds)))


def build_pool(n: int, run: Run, make: Callable[[np.random.Generator], dict[str, Tensor]]) -> dict:
    """Tensors of this worker's share of n examples, 64 at a time, in fp16; used many times."""
    rank, size = world()
    count = -(-n // (64 * size))
    pool: dict[str, Tensor] = {}
    for k in range(count):
        with mixed_precision(run.bf16):
            found = make(np.random.default_rng([run.seed, 99, rank, k]))
        for name, x in found.items():
            if k == 0:
                pool[name] = torch.empty(count, *x.shape, dtype=torch.float16)
            pool[name][k] = x
    return {name: x.flatten(0, 1) for name, x in pool.items()}


def reconstruction_pool(
    visual: QwenViT,
    vae: AutoEncoder,
    config: NexusGenConfig,
    run: Run,
    known: tuple[QwenViT, GenerationAdapter] | None = None,
) -> dict[str, Tensor]:
    """Images as `embeds` [n, N, C] and `latents` [n, z, h, w].

    Most are outlines, the harder; with two to six objects each teaches more than one of a prompt.
    One in eight is as prompts ask for it: a decoder that had seen no small filled shape alone
    drew up to one in ten as an outline.

    With the tower and the adapter of another model, also what that adapter `said` of its own
    tower's embeddings: the words that its MMDiT knows.
    """

    @torch.no_grad()
    def make(rng):
        found = scenes(rng, 56, 0.15, most=6, least=2, outline=0.7) + scenes(rng, 8, 0.15)
        x = to_unit([render(s) for s in found])
        embeds = embed_views(visual, x, config.target_size)
        rows = {"embeds": embeds, "latents": vae.encode(x * 2 - 1)}
        if known:
            rows["said"] = known[1](embed_views(known[0], x, config.target_size))
        return rows

    return build_pool(pool_size(run, 50), run, make)


def drawn_edit(rng: np.random.Generator) -> Example:
    """An edit for the editing decoder: what is hard to draw is drawn often, half are outlines."""
    kind, style = str(rng.choice(EDITS, p=DRAWING_SHARES)), str(rng.choice(STYLES))
    while (ex := sample_example(rng, "edit", kind)).scenes[1].style != style:
        pass
    return ex


def editing_pool(
    ar: NexusGenAR, vae: AutoEncoder, tokenizer: QwenTokenizer, config: NexusGenConfig, run: Run
) -> dict:
    """Edits as predicted `embeds`, the source's `refs` [n, M, C], and the target's `latents`."""

    @torch.no_grad()
    def make(rng):
        batch = [drawn_edit(rng) for _ in range(64)]
        source, target = (to_unit([render(ex.scenes[i]) for ex in batch]) for i in (0, 1))
        return {
            "embeds": predict_after_reply(ar, tokenizer, config, batch),
            "refs": embed_views(ar.visual, source, config.reference_size, "bilinear"),
            "latents": vae.encode(target * 2 - 1),
        }

    return build_pool(pool_size(run, 16), run, make)


def draw_rows(
    rng: np.random.Generator, pool: dict, n: int, noise: float = 0.0
) -> tuple[dict[str, Tensor], torch.Generator]:
    """n random rows of a pool in fp32, embeddings with up to `noise`; a generator for the rest."""
    picked = torch.from_numpy(rng.integers(len(pool["embeds"]), size=n))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    rows = {name: x[picked].float() for name, x in pool.items()}
    level = noise * torch.rand(n, 1, 1, generator=generator)
    rows["embeds"] = rows["embeds"] + level * torch.randn(rows["embeds"].shape, generator=generator)
    return rows, generator


def flow_loss(mmdit: MMDiT, context: Context, x0: Tensor, generator: torch.Generator) -> Tensor:
    """`rf_loss` at logit-normal times, shifted to noise further than the sampler's are.

    Unshifted, one time in twelve lies above 0.8, where the context decides what is drawn: below,
    the image shows through the noise, and a decoder learns to read that instead of the context.
    """
    noise = torch.randn(x0.shape, generator=generator)
    t = time_shift(sample_t(len(x0), generator), TRAINING_SHIFT)
    return rf_loss(velocity_field(mmdit, context, *x0.shape[-2:]), x0, noise, t)


@torch.no_grad()
def save_seen(path: Path, vae: AutoEncoder, latents: Tensor, drawn: np.ndarray) -> dict:
    """A grid of what the latents show, over what was drawn; the share that is read alike."""
    truth = to_uint8(vae.decode(latents))
    save_grid(path, [truth[:10], drawn[:10]])
    return {"exact_seen": agreement(drawn, truth)}


IMITATION = 0.04  # of the editing stage; twice that of a generation stage that adapts
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
    """Reconstruct an image from its embeddings; one batch in ten sees the empty prompt (cfg).

    An MMDiT that was trained on another tower learns this one's embeddings first through the
    adapter alone, which imitates what the old adapter `said`.
    """
    painter = Painter(vae, mmdit, adapter, empty, config)

    def loss(rng, progress):
        rows, generator = draw_rows(rng, pool, batch, COND_NOISE)
        if "said" in pool and progress < 2 * IMITATION:
            return F.mse_loss(adapter(rows["embeds"]), rows["said"]), {}
        txt = empty["context"] if rng.random() < 0.1 else adapter(rows["embeds"])
        context = Context(txt, context_ids_generation(txt.shape[1]), empty["pooled"])
        return flow_loss(mmdit, context, rows["latents"], generator), {}

    def sample(path):
        embeds, latents = pool["embeds"][:40].float(), pool["latents"][:40].float()
        return save_seen(path, vae, latents, painter.draw(embeds))

    modules = nn.ModuleDict({"mmdit": mmdit, "adapter": adapter})
    lr = 3e-3 if "said" in pool else 6e-3
    return Stage(
        "generation", modules, loss, lr=lr, adamw_lr=2e-3, adamw_only=ADAMW_ONLY, sample=sample
    )


def editing_stage(
    mmdit: MMDiT,
    merger: ImageEmbeddingMerger,
    adapter: GenerationAdapter,
    empty: dict[str, Tensor],
    pool: dict[str, Tensor],
    vae: AutoEncoder,
    config: NexusGenConfig,
    batch: int,
) -> Stage:
    """Draw the target from its predicted embeddings and the source's at twice the resolution.

    First the merger learns to say what the adapter says of the target, in the words that this
    MMDiT, the generation decoder's, knows already; that takes a few seconds.
    """
    side = config.reference_size // config.ar.vision.patch_size
    grids = config.ar.slot_grid, (1, side, side)

    def context(rows):
        txt = merger(rows["embeds"], grids[0], rows["refs"], grids[1])
        ids = context_ids_editing(*grids, *rows["latents"].shape[-2:])
        return Context(txt, ids, empty["pooled"])

    def loss(rng, progress):
        rows, generator = draw_rows(rng, pool, batch)
        if progress < IMITATION:
            said = context(rows).txt[:, : rows["embeds"].shape[1]]
            return F.mse_loss(said, adapter(rows["embeds"])), {}
        return flow_loss(mmdit, context(rows), rows["latents"], generator), {}

    def sample(path):
        rows = {name: x[:40].float() for name, x in pool.items()}
        with torch.no_grad():
            drawn = paint(mmdit, context(rows), vae, config)
        return save_seen(path, vae, rows["latents"], drawn)

    modules = nn.ModuleDict({"mmdit": mmdit, "merger": merger})
    return Stage(
        "editing", modules, loss, lr=6e-3, adamw_lr=2e-3, adamw_only=ADAMW_ONLY, sample=sample
    )
