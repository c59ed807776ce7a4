"""Four prompts in one call against four calls, with the shipped tiny model; and a cold start.

    python -m tests.benchmarks batch

The prompts differ in length and language; both ways draw the same images. The cold start is a
process of its own that imports, loads and draws: from nothing to an image on the disk's cache.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median

import torch
from PIL import Image

from nexus_min import batch
from nexus_min.images import to_latent_image
from nexus_min.pipeline import NexusGen

from .common import Row, alternate, difference

ROUNDS = 9
PROMPTS = (
    "a red circle",
    "a photo of a large green star on a black background",
    "一个蓝色的正方形",
    "a small yellow triangle left of a purple cross, and a pink circle below them",
)
COLD = "from nexus_min.pipeline import NexusGen; NexusGen.load().generate('a red circle')"


def batched(model: NexusGen, **options) -> Row:
    """Seconds of all four; the ratio is that of images a second."""
    items = [{"task": "generate", "prompt": prompt, **options} for prompt in PROMPTS]

    def together() -> list[Image.Image]:
        return [result.image for result in sorted(batch.run(model, items))]

    def one_by_one() -> list[Image.Image]:
        return [model.generate(p, seed=i, **options) for i, p in enumerate(PROMPTS)]

    images = [
        torch.cat([to_latent_image(x, *x.size[::-1]) for x in run()])
        for run in (together, one_by_one)
    ]
    return Row(
        "4 prompts of mixed lengths in one call" + (", fixed preamble" if options else ""),
        "float32",
        "four calls",
        *alternate(together, one_by_one, ROUNDS),
        goal=1.3,
        error=difference(*images),
    )


def cold_start(rounds: int = 5) -> Row:
    """Median seconds of a new process; nothing to compare with but four seconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", COLD], check=True)
        times.append(time.perf_counter() - start)
    return Row(
        "import and first tiny image, cold process",
        "float32",
        "4 seconds",
        median(times),
        4.0,
        goal=1.0,
        error=0.0,
    )


def rows() -> Iterator[Row]:
    """The batch as it is by default and with the training data's sentence, and the cold start."""
    model = NexusGen.load()
    yield batched(model)
    yield batched(model, fast_preamble=True)
    yield cold_start()
