"""The three stages of the paper at toy size: what they learn from, and their samples of progress.

Each `*_stage` returns a `train.stage.Stage` (paper, sections 4.1 to 4.3). The losses and the stage
of a decoder are the package's own; only the data are toy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..config import NexusGenConfig
from ..model.autoencoder import AutoEncoder
from ..model.autoregressive import ARLoss, NexusGenAR, prefill_image_slots
from ..model.flow import denoise, schedule
from ..model.vision import QwenViT
from ..sampling import velocity_field
from ..tokenizer import IMAGE, QwenTokenizer
from ..train import finetune
from ..train.data import encode
from ..train.finetune import Recipe, decoder_context
from ..train.stage import Run, Stage, mixed_precision
from .edits import EDITS
from .pictures import agreement, embed_views, exactness, save_grid, scenes, to_uint8, to_unit
from .tasks import Example, rewrite, sample_example
from .world import STYLES, choice, render

POOL = 24_576  # most images that are embedded once for a decoder stage
UND, GEN, EDIT, MULTI_TURN = "understand", "generate", "edit", "multi_turn"
MIXTURE = (UND, GEN, GEN, EDIT)  # 1:2:1, pre-training
FINE_TUNING = (UND, EDIT, GEN, EDIT, UND, GEN, EDIT, MULTI_TURN)  # more of what takes longest
CHUNKS = 16  # of examples that the AR stage learns from at a time
CHUNK = {UND: 16, GEN: 24, EDIT: 16, MULTI_TURN: 8}
PRETRAINED = 0.4  # share of the AR stage before fine-tuning
# Shares of EDITS for the editing decoder: what must be drawn anew is harder than what only changes.
DECODER_EDIT_SHARES = np.array([3, 4, 2, 4, 2, 3, 2]) / 20
# Half of a decoder's training times exceed 0.9. Without this shift, one in twelve exceeds 0.8,
# where the context decides the image: below, the image shows through the noise.
TIMES = partial(finetune.shifted_times, shift=9.0)
# True embeddings get noise; predicted ones bring their own errors. In half of the batches they have
# the places that editing gives them, which costs nothing: without, editing begins with 2.3 times
# the loss.
GENERATION = Recipe(lr=6e-3, adamw_lr=2e-3, times=TIMES, cond_noise=0.3, place_share=0.5)
EDITING = Recipe(lr=6e-3, adamw_lr=2e-3, times=TIMES, cond_noise=0.0, distill_share=0.04)
pad_left = partial(pad_sequence, batch_first=True, padding_side="left")


def toy_line(ex: Example) -> dict:
    """A toy example in the official message-like format, its images rendered."""
    return {"images": [render(s) for s in ex.scenes], "messages": list(ex.messages)}


def ar_batch_loss(ar: NexusGenAR, tokenizer, config, batch: list[Example]) -> ARLoss:
    """Equation 3 on toy examples."""
    return finetune.lines_loss(ar, tokenizer, config, [toy_line(ex) for ex in batch])


class Curriculum:
    """Examples of all tasks, whose images are embedded once and serve in many wordings.

    Scenes grow from one object to four, and the tasks' shares change. A window of CHUNKS chunks of
    examples moves on with progress. What it holds follows from seed and progress alone.
    """

    def __init__(self, ar: NexusGenAR, config: NexusGenConfig, run: Run):
        self.ar, self.config, self.seed, self.chunks = ar, config, run.seed, {}
        self.count = max(1, int(run.steps / 12 if run.steps else run.seconds / 2))

    def draw(
        self, rng: np.random.Generator, n: int, progress: float
    ) -> tuple[list[Example], Tensor]:
        """n examples in new words, and the embeddings [images, N, C] of their scenes."""
        most = 1 if progress < 0.03 else 2 if progress < 0.1 else 4
        first = int(progress * max(0, self.count - CHUNKS))
        window = range(first, min(self.count, first + CHUNKS))
        self.chunks = {k: self.chunks.get(k) or self.make(k) for k in window}
        tasks, picks = cycle(MIXTURE if progress < PRETRAINED else FINE_TUNING), []
        for task in islice(tasks, n):
            for _ in range(100):  # tries
                ex, embeds = choice(rng, self.chunks[choice(rng, window)][task])
                if ex.spec or len(ex.scenes[0].objects) <= most:
                    break
            picks.append((rewrite(rng, ex), embeds))
        examples, embeds = zip(*picks, strict=True)
        return list(examples), torch.cat(embeds)

    @torch.no_grad()
    def make(self, k: int) -> dict[str, list[tuple[Example, Tensor]]]:
        """Examples by task, each with the embeddings of its scenes."""
        rng = np.random.default_rng([self.seed, 7, k])
        chunk = {}
        for task, count in CHUNK.items():
            examples = [sample_example(rng, task) for _ in range(count)]
            images = to_unit([render(scene) for ex in examples for scene in ex.scenes])
            embeds = embed_views(self.ar.visual, images, self.config.target_size)
            parts = embeds.float().split([len(ex.scenes) for ex in examples])
            chunk[task] = list(zip(examples, parts, strict=True))
        return chunk


def ar_stage(
    ar: NexusGenAR,
    tokenizer: QwenTokenizer,
    config: NexusGenConfig,
    batch: int,
    run: Run,
    preview: PreviewSampler | None = None,
) -> Stage:
    """Multi-task training with the vision tower frozen."""
    ar.visual.requires_grad_(False)
    curriculum = Curriculum(ar, config, run)
    side = config.target_size // config.ar.vision.patch_size

    def loss(rng, progress):
        examples, embeds = curriculum.draw(rng, batch, progress)
        conversations, grid = [ex.messages for ex in examples], [(1, side, side)] * len(embeds)
        encoded = encode(conversations, torch.tensor(grid), tokenizer, config)
        out = finetune.embedded_loss(ar, conversations, encoded, grid, embeds.flatten(0, 1), rng)
        return finetune.loss_and_terms(out)

    def sample(path):
        rng, metrics = np.random.default_rng(4), {}
        for task in dict.fromkeys(MIXTURE):
            unseen = [sample_example(rng, task, unseen=True) for _ in range(40)]
            with torch.no_grad():
                out = ar_batch_loss(ar, tokenizer, config, unseen)
            metrics[f"unseen_{task}"] = float(out.ce if task == UND else out.mse)
            if task != UND and preview:
                embeds = predict_after_reply(ar, tokenizer, config, unseen)
                images = preview.sample_images({"embeds": embeds})
                targets = [ex.scenes[-1] for ex in unseen]
                metrics[f"exact_{task}"] = exactness(images, targets)
                rows = {"truth": np.stack([render(s) for s in targets]), "drawn": images}
                if task == EDIT:
                    rows = {"source": np.stack([render(ex.scenes[0]) for ex in unseen])} | rows
                save_grid(path.with_stem(f"{path.stem}_{task}"), **rows)
        return metrics

    modules, adamw_only = nn.ModuleDict({"ar": ar}), ("embed", "lm_head")
    return Stage("ar", modules, loss, 4e-3, 3e-3, adamw_only=adamw_only, sample=sample)


@torch.no_grad()
def predict_after_reply(
    ar: NexusGenAR, tokenizer: QwenTokenizer, config: NexusGenConfig, batch: list[Example]
) -> Tensor:
    """Embeddings [B, N, C] of the target images, in one pass after each example's own reply.

    That reply describes the image rightly (teacher forcing); `evaluate.predict` lets the model
    write its own.
    """
    vision, rows, images = config.ar.vision, [], []
    count = config.max_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2
    for ex in batch:
        user, reply = ex.messages
        ids = tokenizer.encode_chat([user], [count] * (len(ex.scenes) - 1))
        ids += tokenizer.encode(reply["content"].removesuffix(IMAGE))
        rows.append(torch.tensor([*ids, config.ar.vision_start_token_id]))
        images += [render(s) for s in ex.scenes[:-1]]
    embeds = grid = None
    if images:
        embeds = embed_views(ar.visual, to_unit(images), config.target_size).flatten(0, 1)
        side = config.target_size // vision.patch_size
        grid = torch.tensor([(1, side, side)] * len(images))
    ids = pad_left(rows, padding_value=config.ar.pad_token_id)
    mask = pad_left([torch.ones_like(row) for row in rows])
    return prefill_image_slots(ar, ids, embeds, grid, mask)


def empty_prompt(config: NexusGenConfig, length: int = 8) -> dict[str, Tensor]:
    """Stand-ins for CLIP's and T5's constant output for "": a zero vector, fixed random states."""
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, length, config.mmdit.context_in_dim, generator=generator)
    return {"pooled": torch.zeros(1, config.mmdit.vec_in_dim), "context": context}


class PreviewSampler:
    def __init__(
        self, decoder: finetune.Decoder, vae: AutoEncoder, empty: dict, config: NexusGenConfig
    ):
        self.decoder, self.vae, self.empty, self.config = decoder, vae, empty, config

    @torch.no_grad()
    def sample_images(self, rows: dict[str, Tensor]) -> np.ndarray:
        """Images of the rows of a pool, with the default number of steps: uint8 [B, H, W, 3]."""
        context = decoder_context(self.decoder, self.empty, self.config, rows)
        h = w = self.config.image_size // self.config.autoencoder.downsample
        shape = (len(context.txt), self.config.autoencoder.z_channels, h, w)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        field = velocity_field(self.decoder.mmdit, context, h, w)
        *_, last = denoise(field, noise, schedule(self.config.num_steps))
        return to_uint8(self.vae.decode(last.x))

    @torch.no_grad()
    def save(self, path: Path, rows: dict[str, Tensor]) -> dict[str, float]:
        """A grid of true images over sampled ones; the share that the checker reads the same."""
        images, truth = self.sample_images(rows), to_uint8(self.vae.decode(rows["latents"]))
        save_grid(path, truth=truth, drawn=images)
        return {"exact_seen": agreement(images, truth)}


class Pool:
    """Tensors of n samples in memory, with the methods of `data.Shards`."""

    where = ()

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors["embeds"])

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]:
        picks = torch.as_tensor(indices)
        return {name: x[picks].float() for name, x in self.tensors.items()}


def build_pool(run: Run, per_second: int, make: Callable[[np.random.Generator], dict]) -> dict:
    """Tensors of many examples, 64 at a time, in fp16.

    Their number is what is worth its time: `per_second` of the stage's budget, at most POOL.
    """
    n = POOL if run.seconds is None else min(POOL, max(256, int(per_second * run.seconds)))
    count, pool = -(-n // 64), {}
    for k in range(count):
        with mixed_precision(run.bf16):
            tensors = make(np.random.default_rng([run.seed, 99, 0, k]))
        for name, x in tensors.items():
            if k == 0:  # allocated once: joining parts would need twice the memory
                pool[name] = torch.empty(count, *x.shape, dtype=torch.float16)
            pool[name][k] = x
    return {name: x.flatten(0, 1) for name, x in pool.items()}


def reconstruction_pool(
    visual: QwenViT, vae: AutoEncoder, config: NexusGenConfig, run: Run
) -> dict[str, Tensor]:
    """Images as `embeds` [n, N, C] and `latents` [n, z, h, w].

    Most are outlines, which are harder, of two to six objects. One in eight is as prompts describe
    it: a decoder that never saw a small filled shape alone drew up to one in ten as an outline.
    """

    @torch.no_grad()
    def make(rng):
        batch = scenes(rng, 56, 0.15, most=6, least=2, outline=0.7) + scenes(rng, 8, 0.15)
        x = to_unit([render(s) for s in batch])
        embeds = embed_views(visual, x, config.target_size)
        return {"embeds": embeds, "latents": vae.encode(x * 2 - 1)}

    return build_pool(run, 50, make)


def sample_edit(rng: np.random.Generator) -> Example:
    """An edit for the editing decoder: often what is hard to draw, half of them outlines."""
    kind, style = str(rng.choice(EDITS, p=DECODER_EDIT_SHARES)), str(rng.choice(STYLES))
    while (ex := sample_example(rng, "edit", kind)).scenes[1].style != style:
        pass
    return ex


def editing_pool(
    ar: NexusGenAR, vae: AutoEncoder, tokenizer: QwenTokenizer, config: NexusGenConfig, run: Run
) -> dict[str, Tensor]:
    """Edits as predicted `embeds`, the source's `refs` [n, M, C], and the target's `latents`."""

    @torch.no_grad()
    def make(rng):
        batch = [sample_edit(rng) for _ in range(64)]
        source, target = (to_unit([render(ex.scenes[i]) for ex in batch]) for i in (0, 1))
        return {
            "embeds": predict_after_reply(ar, tokenizer, config, batch),
            "refs": embed_views(ar.visual, source, config.reference_size, "bilinear"),
            "latents": vae.encode(target * 2 - 1),
        }

    return build_pool(run, 12, make)


def generation_stage(preview: PreviewSampler, pool: dict[str, Tensor], batch: int) -> Stage:
    """The decoder of `preview` reconstructs images; one batch in ten has the empty prompt (CFG)."""
    return toy_decoder_stage(preview, pool, batch, GENERATION)


def editing_stage(
    preview: PreviewSampler, teacher: nn.Module, pool: dict[str, Tensor], batch: int
) -> Stage:
    """The decoder of `preview` generates the target of an edit.

    First the merger imitates the `teacher`, the generation decoder's adapter, on the target.
    """

    def distill(rows):
        context = decoder_context(preview.decoder, preview.empty, preview.config, rows)
        return F.mse_loss(context.txt[:, : rows["embeds"].shape[1]], teacher(rows["embeds"]))

    return toy_decoder_stage(preview, pool, batch, EDITING, distill)


def toy_decoder_stage(
    preview: PreviewSampler, pool: dict, batch: int, recipe, distill=None
) -> Stage:
    """`finetune.decoder_stage` over a pool, with samples of progress."""
    inputs = preview.decoder, preview.empty, Pool(pool), preview.config, batch
    stage = finetune.decoder_stage(*inputs, recipe, distill)
    return replace(stage, sample=lambda path: preview.save(path, Pool(pool).rows(range(40))))
