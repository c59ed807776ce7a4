"""Figure 6 of the paper at toy scale: three ways to predict the embeddings of an image.

    python notebooks/figure6.py                      # all of it, into notebooks/data/figure6.json
    python notebooks/figure6.py --steps 50 --pool 256 --out /dev/null        # only to see it run

Two small autoregressive models learn caption -> image embeddings (of the shipped, frozen tower)
from the same images in the same order, from the same first weights, for as many steps. They
differ in what they read at the image positions only:

    naive (figure 2a)      the embedding of the previous slot: the true one in training, the
                           model's own at inference
    prefilled (figure 2b)  learned vectors, in both

so there are three errors on held-out scenes: naive teacher-forced, naive free-running, prefilled.
The whole is done with two kinds of captions of the same images. A *full* one names all but the
exact place of an object in its cell and the texture that half of the backgrounds have; a *vague*
one names shapes and colors only, and leaves places, sizes, background and style open.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import fingerprint
from torch import Tensor

from nexus_min.model.autoregressive import NexusGenAR, rope_index
from nexus_min.config import ARConfig
from nexus_min.model.decoder import KVCache
from nexus_min.pipeline import NexusGen
from nexus_min.toy.pictures import embed_views, to_unit
from nexus_min.toy.init import init_ar
from nexus_min.toy.language import caption, noun_phrase, with_article
from nexus_min.toy.world import Scene, held_out, random_scene, render

CAPTIONS = ("full", "vague")
DETAIL = 0.5  # share of images with a texture
OBJECTS = 2  # at most
DATA = Path(__file__).parent / "data" / "figure6.json"
Data = tuple[Tensor, Tensor, Tensor]  # ids [n, L], mask [n, L], embeddings [n, N, C]


# ------------------------------------------------------------------ the three ways to predict


def positions(ar: NexusGenAR, ids: Tensor, mask: Tensor) -> Tensor:
    """M-RoPE positions [3, B, L] of rows that end with one image each."""
    return rope_index(ids, torch.tensor([ar.config.slot_grid] * len(ids)), mask, config=ar.config)[
        0
    ]


def one_pass(ar: NexusGenAR, ids: Tensor, mask: Tensor, true: Tensor | None = None) -> Tensor:
    """Predictions [B, N, C]: prefilled, or naive teacher-forced with the `true` embeddings."""
    slots = ids == ar.config.image_token_id
    x = ar.embed(ids, None, slots) if true is None else ar.embed(ids, true.flatten(0, 1))
    hidden = ar.model(x, positions(ar, ids, mask), mask)
    N = ar.config.num_image_slots
    return ar.vision_head(hidden[:, -N - 1 : -1])  # each is read one position before its own


@torch.no_grad()
def free_running(ar: NexusGenAR, ids: Tensor, mask: Tensor) -> Tensor:
    """Predictions [B, N, C] of the naive model at inference: each is the next one's input."""
    places, N, cache, out = positions(ar, ids, mask), ar.config.num_image_slots, KVCache(), []
    first = ids.shape[1] - N
    x, start = ar.model.embed_tokens(ids[:, :first]), 0
    for end in range(first, first + N):
        hidden = ar.model(x, places[..., start:end], mask[:, :end], cache)
        x, start = ar.vision_head(hidden[:, -1:]), end
        out.append(x)
    return torch.cat(out, dim=1)


def image_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """The image part of equation 3: 1.5 MSE + 1.5 (1 - cos)."""
    cos = F.cosine_similarity(predicted, true, dim=-1).mean()
    return 1.5 * F.mse_loss(predicted, true) + 1.5 * (1 - cos)


@torch.no_grad()
def errors(naive: NexusGenAR, prefilled: NexusGenAR, data: Data) -> dict[str, list[float]]:
    """MSE per slot [N] of the three, on the same images."""
    ids, mask, true = data
    made = {
        "teacher_forced": one_pass(naive, ids, mask, true),
        "free_running": free_running(naive, ids, mask),
        "prefilled": one_pass(prefilled, ids, mask),
    }
    return {name: mse_per_slot(x, true) for name, x in made.items()}


def mse_per_slot(predicted: Tensor, true: Tensor) -> list[float]:
    """Mean squared error over images and channels: [N]."""
    return [round(x, 5) for x in (predicted - true).square().mean(dim=(0, 2)).tolist()]


# ------------------------------------------------------------------ images and captions


def pick_scenes(rng: np.random.Generator, n: int, unseen: bool) -> list[Scene]:
    """n scenes of one or two objects, of the held-out tenth or of the rest."""
    found: list[Scene] = []
    while len(found) < n:
        scene = random_scene(rng, int(rng.integers(1, OBJECTS + 1)), DETAIL)
        found += [scene] * (held_out(scene.key) == unseen)
    return found


@torch.no_grad()
def embed(model: NexusGen, scenes: list[Scene]) -> Tensor:
    """Embeddings [n, N, C] of the scenes' images, 64 at a time."""
    visual, size = model.ar.visual, model.config.target_size
    parts = [scenes[i : i + 64] for i in range(0, len(scenes), 64)]
    return torch.cat([embed_views(visual, to_unit([render(s) for s in p]), size) for p in parts])


def words(rng: np.random.Generator, scene: Scene, kind: str) -> str:
    """A caption, its objects in random order."""
    if kind == "full":
        return caption(rng, scene, zh=False)
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    return " and ".join(with_article(noun_phrase(o.shape, o.color, None, False)) for o in objects)


def encode(model: NexusGen, rng: np.random.Generator, scenes: list[Scene], kind: str) -> Data:
    """Captions, vision_start and image tokens, padded on the left; and the true embeddings."""
    config = model.config.ar
    tail = [config.vision_start_token_id] + [config.image_token_id] * config.num_image_slots
    rows = [model.tokenizer.encode(words(rng, s, kind)) + tail for s in scenes]
    length = max(map(len, rows))
    ids = torch.tensor([[config.pad_token_id] * (length - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
    return ids, mask, embed(model, scenes)


def again(rng: np.random.Generator, scene: Scene, kind: str) -> Scene:
    """Another scene with the same caption."""
    new = random_scene(rng, len(scene.objects), DETAIL)
    pairs = zip(new.objects, scene.objects, strict=True)
    if kind == "vague":
        objects = tuple(replace(n, shape=o.shape, color=o.color) for n, o in pairs)
        return replace(new, objects=objects)
    objects = tuple(replace(o, dx=n.dx, dy=n.dy) for n, o in pairs)
    return replace(scene, objects=objects, texture=new.texture)


@torch.no_grad()
def floor(model: NexusGen, rng: np.random.Generator, kind: str, n: int = 24) -> list[float]:
    """MSE per slot of the best guess from the caption alone: the variance that it leaves open."""
    scenes = pick_scenes(rng, n, unseen=True)
    same = [embed(model, [again(rng, scene, kind) for _ in range(16)]) for scene in scenes]
    rest = torch.stack([x.var(dim=0).mean(dim=-1) for x in same]).mean(dim=0)
    return [round(x, 5) for x in rest.tolist()]


# ------------------------------------------------------------------ training


def small(config: ARConfig, layers: int, mlp: int) -> ARConfig:
    """The tiny model's configuration with a smaller decoder."""
    text = replace(config.text, num_hidden_layers=layers, intermediate_size=mlp)
    return replace(config, text=text)


def make(config: ARConfig, seed: int) -> NexusGenAR:
    """A fresh model, the same for one seed."""
    torch.manual_seed(seed)
    return init_ar(NexusGenAR(config))


def optimizer(ar: NexusGenAR, lr: float) -> torch.optim.AdamW:
    """AdamW on all but the frozen tower and the unused text head."""
    parts = ar.model, ar.vision_head, ar.image_prefill_embeds
    weights = [p for part in parts for p in part.parameters()]
    return torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)


def train(models: dict[str, NexusGenAR], data: Data, steps: int, batch: int, lr: float, seed: int):
    """Both models a step at a time on the same batches; yields the number of steps done."""
    ids, mask, true = data
    tools = {name: optimizer(ar, lr) for name, ar in models.items()}
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(ids), (batch,), generator=generator)
        for name, ar in models.items():
            tools[name].param_groups[0]["lr"] = lr * lr_scale(step, steps)
            tools[name].zero_grad()
            seen = true[rows] if name == "naive" else None
            image_loss(one_pass(ar, ids[rows], mask[rows], seen), true[rows]).backward()
            tools[name].step()
        yield step + 1


def lr_scale(step: int, steps: int) -> float:
    """Warm-up over 50 steps, constant, then linear to zero over the last 40 %."""
    return min(1, (step + 1) / 50, (steps - step) / (0.4 * steps))


def compare(model: NexusGen, kind: str, seed: int, args: argparse.Namespace) -> dict:
    """Train both models on one kind of captions: curves of the three errors, the last per slot."""
    rng = np.random.default_rng(seed)
    scenes = [pick_scenes(rng, n, unseen=u) for n, u in ((args.pool, False), (args.test, True))]
    data, unseen = (encode(model, rng, part, kind) for part in scenes)
    mean = data[2].mean(dim=0, keepdim=True)
    config = small(model.config.ar, args.layers, args.mlp)
    models = {name: make(config, seed) for name in ("naive", "prefilled")}
    curve, start = [], time.process_time()
    for step in train(models, data, args.steps, args.batch, args.lr, seed):
        if step % (args.steps // 5) == 0:
            per_slot = errors(models["naive"], models["prefilled"], unseen)
            means = {name: round(float(np.mean(x)), 5) for name, x in per_slot.items()}
            curve.append({"step": step} | means)
            print(kind, seed, curve[-1], f"{time.process_time() - start:.0f} s", flush=True)
    return {
        "captions": kind,
        "seed": seed,
        "curve": curve,
        "per_slot": per_slot,
        "mean_picture": mse_per_slot(mean, unseen[2]),
        "floor": floor(model, np.random.default_rng([seed, 1]), kind),
        "cpu_seconds": round(time.process_time() - start),
    }


def main() -> None:
    """Read the command line, run every kind of captions and seed, write the log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--mlp", type=int, default=192, help="width of the MLP")
    parser.add_argument("--pool", type=int, default=2048, help="training images")
    parser.add_argument("--test", type=int, default=128, help="held-out images")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--captions", nargs="+", default=list(CAPTIONS), choices=list(CAPTIONS))
    parser.add_argument("--out", type=Path, default=DATA)
    args = parser.parse_args()
    model = NexusGen.load("tiny", parts=("ar",))
    settings = {k: v for k, v in vars(args).items() if k != "out"} | {"torch": torch.__version__}
    settings["tower"] = fingerprint(model.ar.visual)
    log = {"command": "python notebooks/figure6.py", "settings": settings, "runs": []}
    for kind in args.captions:
        for seed in args.seeds:
            log["runs"].append(compare(model, kind, seed, args))
            args.out.write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
