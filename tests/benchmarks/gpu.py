"""The full-size model on a GPU, random bf16 weights, beside our goals.

    python -m tests.benchmarks.gpu              # needs 30 GB of the GPU: one part at a time
    python -m tests.benchmarks.gpu --compile    # the MMDiT's blocks compiled, one graph a kind
    python -m tests.benchmarks.gpu --tiny       # the tiny model, also on a CPU: does it work?

Goals are those of an H200. A share is that of what a large matmul of the same dtype does there.
Without a GPU, and without --tiny, it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nexus_min.config import NexusGenConfig
from nexus_min.model.autoencoder import AutoEncoder
from nexus_min.model.autoregressive import NexusGenAR, generate, prefill_image_slots
from nexus_min.model.mmdit import PATCH, MMDiT, context_ids_generation
from nexus_min.model.projector import GenerationAdapter, ImageEmbeddingMerger
from nexus_min.offload import blocks
from nexus_min.pipeline import NexusGen, sample_images
from nexus_min.sampling import Context, ImageRequest, SamplingParams, velocity_field
from nexus_min.weights import EditingDecoder, GenerationDecoder

from .common import seconds
from .diffusion import flop

T5_TOKENS, PROMPT, REPLY, ORDINARY = 512, 64, 64, 512  # ids below ORDINARY are no special tokens


class Target(NamedTuple):
    """Device and dtype."""

    device: str
    dtype: torch.dtype

    def make(self, build: Callable[[], nn.Module]) -> nn.Module:
        """A module with random weights that was never on the host."""
        with torch.device("meta"):
            module = build().to(self.dtype)
        module = module.to_empty(device=self.device).eval().requires_grad_(False)
        for name, p in module.named_parameters():
            if p.ndim > 1:
                p.normal_(std=0.02)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
        return module

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def timed(self, run: Callable[[], object], rounds: int = 5) -> float:
        """Median seconds until the device is done, after two rounds that are not counted."""
        times = []
        for k in range(rounds + 2):
            start = time.perf_counter()
            run()
            if self.device == "cuda":
                torch.cuda.synchronize()
            if k > 1:
                times.append(time.perf_counter() - start)
        return median(times)

    def ceiling(self) -> float:
        """FLOP a second of a large matmul."""
        n = 8192 if self.device == "cuda" else 1024
        a, b = self.randn(n, n), self.randn(n, n)
        return 2 * n**3 / self.timed(lambda: a @ b)


class Found(NamedTuple):
    """One measurement and its goal."""

    work: str
    seconds: float
    goal: float  # seconds
    flop: float = 0.0
    note: str = ""

    def line(self, ceiling: float) -> str:
        share = f"{self.flop / self.seconds / ceiling:.0%} of the ceiling" if self.flop else ""
        message = f"{self.work}: {seconds(self.seconds)}, goal {seconds(self.goal)}"
        return ", ".join(part for part in (message, share, self.note) if part)


# ---- the MMDiT -----------------------------------------------------------------------------------


def velocity(target: Target, config: NexusGenConfig, mmdit: MMDiT, side: int, text: int) -> tuple:
    """Seconds and operations of one pass at side x side pixels, modulations made ahead."""
    c, cells = config.mmdit, side // config.autoencoder.downsample
    conditioning = Context(
        target.randn(1, text, c.context_in_dim),
        context_ids_generation(text),
        target.randn(1, c.vec_in_dim),
    )
    field = velocity_field(mmdit, conditioning, cells, cells, times=(0.5,))
    x, t = target.randn(1, c.in_channels // PATCH**2, cells, cells).float(), torch.tensor([0.5])
    return target.timed(lambda: field(x, t.to(x.device))), flop(c, (cells // PATCH) ** 2, text)


def steps(target: Target, config: NexusGenConfig, mmdit: MMDiT) -> Iterator[Found]:
    """One pass at twice the model's side, and at its side."""
    side, slots = config.image_size, config.ar.num_image_slots
    for size, text, goal in ((2 * side, T5_TOKENS, 0.110), (side, slots, 0.027)):
        took, work = velocity(target, config, mmdit, size, text)
        yield Found(f"step at {size}x{size}, {text} context tokens", took, goal, work)


def images(target: Target, config: NexusGenConfig, mmdit: MMDiT) -> Iterator[Found]:
    """Generation with CFG and editing without, from embeddings to an image on the host."""
    c, width, slots = config.mmdit, config.ar.text.hidden_size, config.ar.num_image_slots
    adapter = target.make(lambda: GenerationAdapter(width, c.context_in_dim))
    merger = target.make(lambda: ImageEmbeddingMerger(config.ar.text, c.context_in_dim))
    model = NexusGen(
        config,
        autoencoder=target.make(lambda: AutoEncoder(config.autoencoder)),
        generation=GenerationDecoder(mmdit, adapter),
        editing=EditingDecoder(mmdit, merger),
        empty_prompt={
            "pooled": target.randn(1, c.vec_in_dim),
            "context": target.randn(1, T5_TOKENS, c.context_in_dim),
        },
    )
    grid = config.reference_size // config.ar.vision.patch_size // 2
    reference = target.randn(1, grid**2, width)
    for name, source, scale, goal in (
        ("generation", None, 3.0, 3.3),
        ("editing", reference, 1.0, 1.9),
    ):
        settings = SamplingParams().resolve(config, scale)  # 50 steps at full size
        request = ImageRequest("", target.randn(1, slots, width), source, name, settings)
        took = target.timed(lambda d=request: list(sample_images(model, [d])), rounds=1)
        side = config.image_size
        what = f"{name} at {side}x{side}, {settings.num_steps} steps, cfg {scale:g}"
        yield Found(what, took, goal)


# ---- the AR model --------------------------------------------------------------------------------


def language(target: Target, config: NexusGenConfig) -> Iterator[Found]:
    """All slots in one pass, and a reply token by token."""
    ar = target.make(lambda: NexusGenAR(config.ar))
    ids = torch.randint(0, ORDINARY, (1, PROMPT), device=target.device)
    start = ids.new_tensor([[config.ar.vision_start_token_id]])
    prompt = torch.cat((ids, start), dim=1)
    took = target.timed(lambda: prefill_image_slots(ar, prompt))
    size = sum(p.numel() for p in ar.model.layers.parameters())
    work = 2 * size * (PROMPT + 1 + config.ar.num_image_slots)
    yield Found(f"slots pass, prompt of {PROMPT} tokens", took, 0.015, work)

    def reply() -> None:
        sample = lambda logits: logits[:ORDINARY].argmax()  # noqa: E731, never the end
        assert len(list(generate(ar, ids, max_new_tokens=REPLY, sample=sample))) == REPLY

    took = target.timed(reply, rounds=2)
    rate = f"{REPLY / took:.0f} tokens/s, prompt included"
    yield Found(f"greedy reply of {REPLY} tokens", took, REPLY / 230, note=rate)


def found(target: Target, config: NexusGenConfig, compiled: bool) -> Iterator[Found]:
    """Every measurement; the MMDiT is freed before the AR model is made."""
    mmdit = target.make(lambda: MMDiT(config.mmdit))
    if compiled:
        for block in blocks(mmdit):
            block.compile()
    yield from steps(target, config, mmdit)
    yield from images(target, config, mmdit)
    del mmdit
    yield from language(target, config)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="the tiny model, also on a CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile each kind of block")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and not args.tiny:
        print("no GPU here: nothing measured (--tiny runs the same code on the CPU)")
        return
    target = Target("cuda", torch.bfloat16) if gpu else Target("cpu", torch.float32)
    print(torch.cuda.get_device_name() if gpu else "CPU: times say nothing about the goals")
    ceiling = target.ceiling()
    print(f"ceiling: {ceiling / 1e12:.3g} TFLOP/s, {target.dtype}")
    config = NexusGenConfig.tiny() if args.tiny else NexusGenConfig.v2()
    for one in found(target, config, args.compile):
        print(one.line(ceiling), flush=True)


if __name__ == "__main__":
    main()
