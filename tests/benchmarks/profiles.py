"""Peak bytes on a GPU and seconds of every memory profile; full size, random bf16 weights.

    python -m tests.benchmarks.profiles           # needs 80 GB of host memory, and a GPU
    python -m tests.benchmarks.profiles --tiny    # the tiny model, also on a CPU: does it work?

One model a line, with the parts that its task needs, through the same `NexusGen` that users call:
a reply about a photograph, an image with classifier-free guidance, an edit without. Seconds a step
are the median of those after the first. Every profile has to draw the same image: the last column
is the largest difference, in levels of 255, from the first profile's of the same weights.
"""

from __future__ import annotations

import argparse
import copy
import lzma
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from nexus_min.config import NexusGenConfig
from nexus_min.model.autoencoder import AutoEncoder
from nexus_min.model.autoregressive import NexusGenAR
from nexus_min.model.mmdit import MMDiT
from nexus_min.model.projector import GenerationAdapter, ImageEmbeddingMerger
from nexus_min.offload import Offloader, Target, memory_needed, to_fp8
from nexus_min.parts import PARTS
from nexus_min.pipeline import NexusGen
from nexus_min.tokenizer import QwenTokenizer
from nexus_min.weights import TINY, EditingDecoder, GenerationDecoder, load_config

from .common import peak_rss, seconds

QWEN = Path(__file__).parents[1] / "golden" / "qwen2.5-vl_tokenizer.json.xz"
T5_TOKENS, BLOCK, REPLY = 512, 1 << 24, 16
TASKS = {
    "understand": ("ar",),
    "generate": ("ar", "generation", "autoencoder"),
    "edit": ("ar", "editing", "autoencoder"),
    "edit, all loaded": PARTS,
}


def on_host(module: nn.Module, block: torch.Tensor) -> nn.Module:
    """A module of `meta` with values: one random block, repeated; ones and zeros for norms."""
    module = module.to(block.dtype).to_empty(device="cpu").eval().requires_grad_(False)
    for name, p in module.named_parameters():
        if p.ndim == 1:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        for part in p.view(-1).split(BLOCK):
            part.copy_(block[: len(part)])
    return module


def make_parts(config: NexusGenConfig, dtype: torch.dtype) -> dict[str, Any]:
    """All parts of a model in host memory."""
    block = (0.02 * torch.randn(BLOCK)).to(dtype)
    width, out = config.ar.text.hidden_size, config.mmdit.context_in_dim
    with torch.device("meta"):
        ar, vae = NexusGenAR(config.ar), AutoEncoder(config.autoencoder)
        drawn = MMDiT(config.mmdit), GenerationAdapter(width, out)
        edited = MMDiT(config.mmdit), ImageEmbeddingMerger(config.ar.text, out)
    return {
        "ar": on_host(ar, block),
        "generation": GenerationDecoder(*(on_host(m, block) for m in drawn)),
        "editing": EditingDecoder(*(on_host(m, block) for m in edited)),
        "autoencoder": on_host(vae, block),
    }


def again(part: Any) -> Any:
    """The same weights under modules of their own, which hooks and moves may change."""
    modules = part if isinstance(part, tuple) else (part,)
    memo = {id(p): nn.Parameter(p.data, False) for m in modules for p in m.parameters()}
    return copy.deepcopy(part, memo)


def read_tokenizer(config: NexusGenConfig, tiny: bool) -> QwenTokenizer:
    """The official one, or the tiny model's."""
    if tiny:
        return QwenTokenizer(TINY / "Nexus-GenV2" / "tokenizer.json")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        file.write_bytes(lzma.decompress(QWEN.read_bytes()))
        return QwenTokenizer(file)


class Found(NamedTuple):
    """What one task took under one profile."""

    profile: str
    task: str
    weights: float  # GB, as `offload.memory_needed` says
    peak: float  # GB on the device
    arrival: float  # seconds until the model is placed
    total: float  # seconds of the task
    step: float | None  # seconds
    image: np.ndarray | None

    def line(self, first: np.ndarray | None) -> str:
        differs = ""
        if self.image is not None:
            differs = f"{np.abs(self.image.astype(int) - first.astype(int)).max()}"
        step = "" if self.step is None else seconds(self.step)
        cells = (
            self.profile, self.task, f"{self.weights:.1f}", f"{self.peak:.1f}",
            seconds(self.arrival), seconds(self.total), step, differs,
        )  # fmt: skip
        return "| " + " | ".join(cells) + " |"


HEADER = (
    "| profile | task | weights, GB | peak, GB | placed in | task | step | differs |\n"
    "|---|---|---|---|---|---|---|---|"
)


def wait(target: Target) -> float:
    """The time when the device is done."""
    if target.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def work(model: NexusGen, task: str, photo: Image.Image, steps: int) -> tuple:
    """The task's image, or None, and the times at which its steps were done."""
    target, times = model.offloader.target, []
    if task == "understand":
        model.understand(photo, "What is in the image?", max_new_tokens=REPLY)
        return None, times
    options = {"num_steps": steps, "fast_preamble": True}
    if task == "generate":
        events = model.generate_steps("a cat in the snow", **options)
    else:
        events = model.edit_steps(photo, "Make the cat black.", **options)
    image = None
    for kind, value in events:
        if kind == "step":
            times.append(wait(target))
        elif kind == "image":
            image = np.asarray(value)
    return image, times


def measure(name: str, task: str, model: NexusGen, target: Target, steps: int) -> Found:
    """One task under one profile, which leaves nothing on the device."""
    profile, gpu = name.split(",")[0], target.device.type == "cuda"
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 1000, 3), np.uint8))
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    parts = {part: getattr(model, part) for part in TASKS[task]}
    weights, start = memory_needed(parts, target.dtype)[profile], wait(target)
    model.offloader = Offloader(profile, parts, target)
    placed = wait(target)
    image, times = work(model, task, photo, steps)
    done = wait(target)
    peak = torch.cuda.max_memory_allocated() if gpu else 0
    step = median(b - a for a, b in pairwise(times)) if times else None
    model.offloader.offload_all()
    return Found(name, task, weights / 1e9, peak / 1e9, placed - start, done - placed, step, image)


def lines(config: NexusGenConfig, target: Target, steps: int, tiny: bool) -> Iterator[str]:
    """A line for every profile and task, in bf16 and then with the decoders in fp8."""
    parts, c = make_parts(config, target.dtype), config.mmdit
    empty = {
        "pooled": torch.randn(1, c.vec_in_dim),
        "context": torch.randn(1, T5_TOKENS, c.context_in_dim),
    }
    empty = {name: x.to(*target) for name, x in empty.items()}
    model = NexusGen(config, read_tokenizer(config, tiny), empty_prompt=empty)
    for fp8 in (False, True):
        if fp8:
            for decoder in ("generation", "editing"):
                to_fp8(parts[decoder].mmdit)
        first: dict[str, np.ndarray] = {}
        for profile in ("resident", "staged", "stream"):
            name = f"{profile}, fp8" if fp8 else profile
            for task, wanted in TASKS.items():
                if (wanted == PARTS and profile != "resident") or (fp8 and task == "understand"):
                    continue  # the same as another line
                own = replace(model, **{part: again(parts[part]) for part in wanted})
                found = measure(name, task, own, target, steps)
                del own
                yield found.line(first.setdefault(task, found.image))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="the tiny model, also on a CPU")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="of each image")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first is not counted")
    gpu = torch.cuda.is_available()
    if not gpu and not args.tiny:
        print("no GPU here: nothing measured (--tiny runs the same code on the CPU)")
        return
    target = Target(
        torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32
    )
    print(torch.cuda.get_device_name() if gpu else "CPU: no peaks", f"torch {torch.__version__}")
    config = load_config(TINY) if args.tiny else NexusGenConfig.v2()
    print(HEADER)
    for line in lines(config, target, args.steps, args.tiny):
        print(line, flush=True)
    print(f"peak RSS of the host: {peak_rss() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
