"""Figures 3 and 4 of the paper at toy scale: how many image tokens?

    python notebooks/figure3.py        # about 14 minutes of one CPU core

One vision tower sees the same images at 56, 112 and 224 px: 4, 16 and 64 embeddings, the toy
counterparts of the paper's 25, 81 and 324. For each count

- a small decoder learns, from nothing, to regress the image's latents from its own embeddings
  (Figure 3: what do they hold?);
- the AR model, its decoder layers those of the model given, its slots and its vision head new,
  learns to predict them from captions (Figure 4: can they be predicted?), and the small decoder
  renders what it predicts.

Data, number of steps, batch and seed are the same for all three. Embeddings are standardized at
each count, so that an error of 1 is that of predicting the mean. Scores are on held-out scenes.
Writes figure3.json (settings, curves, scores) and two strips of images beside it.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import fingerprint
from PIL import Image
from torch import Tensor, nn

from nexus_min.model.autoregressive import NexusGenAR
from nexus_min.model.mmdit import patchify, unpatchify
from nexus_min.pipeline import NexusGen
from nexus_min.toy import score
from nexus_min.toy.pretrain import whiten
from nexus_min.toy.pictures import embed_views, scenes, to_uint8, to_unit
from nexus_min.toy.stages import ar_batch_loss, predict_after_reply
from nexus_min.toy.tasks import sample_example
from nexus_min.toy.world import held_out, jittered, random_scene, render
from nexus_min.train.stage import Run, Stage
from nexus_min.train.trainer import fit

COUNTS = (4, 16, 64)
UNIT = 28  # pixels of a view along one side of an embedding
BATCH, AR_BATCH = 32, 16


class SmallDecoder(nn.Module):
    """One query a latent token reads it out of the embeddings: [B, N, C] -> [B, z, h, w].

    `latents` [1, z, h, w] is an example: its shape alone counts.
    """

    def __init__(self, tokens: int, width: int, latents: Tensor, dim: int = 128, depth: int = 2):
        super().__init__()
        self.side = latents.shape[-2:]
        _, queries, channels = patchify(latents).shape
        self.query = nn.Parameter(torch.randn(queries, dim) * 0.5)
        self.position = nn.Parameter(torch.randn(tokens, dim) * 0.5)
        self.into = nn.Linear(width, dim)
        layer = nn.TransformerDecoderLayer(dim, 4, 3 * dim, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, depth, nn.LayerNorm(dim))
        self.out = nn.Linear(dim, channels)

    def forward(self, embeds: Tensor) -> Tensor:
        memory = self.into(embeds) + self.position
        query = self.query.expand(len(embeds), -1, -1)
        return unpatchify(self.out(self.layers(query, memory)), *self.side)


def at_count(model: NexusGen, tokens: int):
    """(config, AR model) for `tokens` slots: its own scale of embeddings, new slots and head."""
    config = replace(model.config, ar=replace(model.config.ar, num_image_slots=tokens))
    ar, old = NexusGenAR(config.ar), copy.deepcopy(model.ar)
    ar.visual, ar.model, ar.lm_head = old.visual, old.model, old.lm_head
    nn.init.normal_(ar.image_prefill_embeds.weight, std=0.5)
    whiten(ar.visual.requires_grad_(False), config)
    return config, ar


def unseen_scenes(n: int, detail: float) -> list:
    """n held-out scenes, textured with probability `detail`."""
    rng, found = np.random.default_rng(5), []
    while len(found) < n:
        scene = random_scene(rng, detail=detail)
        if held_out(scene.key):
            found.append(scene)
    return found


@torch.no_grad()
def embed(visual, images: list[np.ndarray], size: int) -> Tensor:
    """Embeddings [n, N, C] of many images."""
    parts = [images[i : i + 64] for i in range(0, len(images), 64)]
    return torch.cat([embed_views(visual, to_unit(p), size) for p in parts])


def texture_kept(rendered: np.ndarray, textured: list) -> float:
    """1 - error / error of a plain background, where there is no object: 1 is all, 0 is none."""
    truth = np.stack([render(s) for s in textured]).astype(float)
    plain = np.stack([render(replace(s, texture=None)) for s in textured]).astype(float)
    bare = np.stack([render(replace(s, texture=None, objects=())) for s in textured]) == plain
    error, most = (rendered - truth) ** 2, (plain - truth) ** 2
    return float(1 - error[bare].mean() / most[bare].mean())


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of one name in a run's metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


def train(stage: Stage, steps: int, name: str) -> dict:
    """Train a stage; seconds of CPU, and the curve of `name`."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as position:
        fit(stage, Run(Path(position), steps=steps, sample_every=1e9, save_every=1e9))
        return {"curve": curve(Path(position), name), "cpu_seconds": time.process_time() - start}


def reconstruction(model: NexusGen, visual, tokens: int, pool: dict, steps: int, cases: int):
    """Figure 3: the small decoder, trained; its scores and images on held-out scenes."""
    size = UNIT * round(tokens**0.5)
    embeds, latents = embed(visual, pool["images"], size), pool["latents"]
    decoder = SmallDecoder(tokens, embeds.shape[-1], latents[:1])

    def loss(rng, progress):
        rows = torch.from_numpy(rng.integers(len(embeds), size=BATCH))
        return (decoder(embeds[rows]) - latents[rows]).square().mean(), {}

    modules = nn.ModuleDict({"decoder": decoder})
    adamw_only = ("query", "position", "into", "out.")
    note = train(Stage("decoder", modules, loss, lr=4e-3, adamw_only=adamw_only), steps, "loss")
    draw = drawer(model, decoder)
    plain, textured = unseen_scenes(cases, 0.0), unseen_scenes(cases // 2, 1.0)
    rendered = draw(embed(visual, [render(s) for s in plain], size))
    grainy = draw(embed(visual, [render(s) for s in textured], size))
    truth = np.stack([render(s) for s in plain])
    note |= {
        "exact": exact(rendered, plain),
        "psnr": float(-10 * np.log10(np.mean((rendered - truth.astype(float)) ** 2) / 255**2)),
        "texture_kept": texture_kept(grainy, textured),
    }
    return note, draw, np.concatenate((rendered[:5], grainy[:5]))


def drawer(model: NexusGen, decoder: SmallDecoder):
    """Embeddings [n, N, C] -> images uint8 [n, 64, 64, 3]."""

    @torch.no_grad()
    def draw(embeds):
        return to_uint8(model.autoencoder.decode(decoder(embeds)))

    return draw


def exact(images: np.ndarray, wanted: list) -> float:
    """Share of images that the checker reads as exactly their scene."""
    pairs = zip(score.read(images), wanted, strict=True)
    return float(np.mean([reading.is_exactly(scene) for reading, scene in pairs]))


def prediction(model: NexusGen, config, ar: NexusGenAR, draw, steps: int, cases: int):
    """Figure 4: the AR model learns captions -> embeddings; its scores and images."""

    def loss(rng, progress):
        out = ar_batch_loss(ar, model.tokenizer, config, captions(rng, AR_BATCH, unseen=False))
        return out.loss, {"mse": out.mse}

    modules, adamw_only = nn.ModuleDict({"ar": ar}), ("embed", "lm_head")
    note = train(Stage("ar", modules, loss, lr=4e-3, adamw_only=adamw_only), steps, "mse")
    found = captions(np.random.default_rng(6), cases, unseen=True)
    with torch.no_grad():
        batches = [found[i : i + 40] for i in range(0, cases, 40)]
        outs = [ar_batch_loss(ar, model.tokenizer, config, b) for b in batches]
        predicted = torch.cat([predict_after_reply(ar, model.tokenizer, config, b) for b in batches])
    rendered, wanted = draw(predicted), [ex.scenes[0] for ex in found]
    counts = [len(reading.scene.objects) for reading in score.read(rendered)]
    note |= {
        "mse": float(np.mean([float(o.mse) for o in outs])),
        "exact": exact(rendered, wanted),
        "too_many": float(
            np.mean([c > len(s.objects) for c, s in zip(counts, wanted, strict=True)])
        ),
        "too_few": float(
            np.mean([c < len(s.objects) for c, s in zip(counts, wanted, strict=True)])
        ),
    }
    return note, rendered[:10], np.stack([render(s) for s in wanted[:10]])


def captions(rng, n: int, unseen: bool) -> list:
    """n examples of the generation task, long captions in English."""
    return [sample_example(rng, "generate", "caption", False, unseen=unseen) for _ in range(n)]


@torch.no_grad()
def make_pool(model: NexusGen, n: int) -> dict:
    """n training images, half of them textured, and their latents."""
    images = [render(s) for s in scenes(np.random.default_rng(0), n, 0.5)]
    parts = [images[i : i + 64] for i in range(0, n, 64)]
    latents = torch.cat([model.autoencoder.encode(to_unit(p) * 2 - 1) for p in parts])
    return {"images": images, "latents": latents}


def moved(rng, objects: tuple) -> tuple:
    """The same objects at other random positions within their cells."""
    return tuple(jittered(rng, o) for o in objects)


@torch.no_grad()
def irreducible(config, visual) -> float:
    """MSE that no caption can predict: variance of the embeddings over the jitter in a cell."""
    rng, errors = np.random.default_rng(7), []
    for scene in unseen_scenes(16, 0.0):
        again = [replace(scene, objects=moved(rng, scene.objects)) for _ in range(12)]
        errors.append(embed(visual, [render(s) for s in again], config.target_size).var(0).mean())
    return float(torch.stack(errors).mean())


def save_strips(path: Path, rows: list[np.ndarray]) -> None:
    """A PNG of rows of images uint8 [n, 64, 64, 3]."""
    Image.fromarray(np.concatenate([np.concatenate([*row], axis=1) for row in rows])).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--images", type=int, default=3072)
    parser.add_argument("--decoder-steps", type=int, default=600)
    parser.add_argument("--ar-steps", type=int, default=400)
    parser.add_argument("--cases", type=int, default=200, help="held-out scenes that are scored")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = NexusGen.load(args.model)
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    settings |= {"batch": BATCH, "ar_batch": AR_BATCH, "seed": 0}
    settings |= {"torch": torch.__version__, "weights": fingerprint(model.ar)}
    result = {"command": "python notebooks/figure3.py", "settings": settings, "tokens": {}}
    pool = make_pool(model, args.images)
    shown = unseen_scenes(5, 0.0) + unseen_scenes(5, 1.0)
    own, predicted_rows = [np.stack([render(s) for s in shown])], []
    for tokens in COUNTS:
        torch.manual_seed(0)
        config, ar = at_count(model, tokens)
        floor = irreducible(config, ar.visual)
        decoder_note, draw, rendered = reconstruction(
            model, ar.visual, tokens, pool, args.decoder_steps, args.cases
        )
        own.append(rendered)
        ar_note, rendered, wanted = prediction(model, config, ar, draw, args.ar_steps, args.cases)
        predicted_rows = [*(predicted_rows or [wanted]), rendered]
        result["tokens"][tokens] = {"floor": floor, "decoder": decoder_note, "ar": ar_note}
        for part, note in (("decoder", decoder_note), ("ar", ar_note)):
            print(
                tokens, part, {k: round(v, 4) for k, v in note.items() if k != "curve"}, flush=True
            )
    result["cpu_minutes"] = time.process_time() / 60
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "figure3.json").write_text(json.dumps(result, indent=1) + "\n")
    save_strips(args.out / "figure3.png", own)
    save_strips(args.out / "figure4.png", predicted_rows)


if __name__ == "__main__":
    main()
