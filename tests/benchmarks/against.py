"""Speed of this checkout beside another one: best and median CPU seconds, and the ratio new / old.

    python tests/benchmarks/against.py OLD_TREE [--rounds 3] [--works training]

Fresh processes of both trees take turns on one thread each. CPU time is measured, which other work
on the machine hardly changes. A ratio below 1: this checkout is faster. About four minutes.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

import nexus_min
from nexus_min.config import ARConfig, MMDiTConfig, NexusGenConfig, TextConfig, VisionConfig
from nexus_min.pipeline import NexusGen

HERE = Path(__file__).resolve()
PROMPT = "a red star left of a blue circle"
REPEATS = 4  # of each work in one process


def is_new() -> bool:
    """Whether the tree has folders. An editable install would lend its own to one without."""
    return Path(nexus_min.__file__).with_name("model").exists()


def module(name: str):
    """A file of model/; in old trees it stands in the package itself."""
    return importlib.import_module(f"nexus_min.{'model.' if is_new() else ''}{name}")


def cold() -> Callable:  # import, load and one image
    command = ["-m", "nexus_min", "generate", PROMPT, "--output", "cold.png"]
    return lambda: subprocess.run([sys.executable, *command], check=True, capture_output=True)


def image() -> Callable:
    model = NexusGen.load("tiny")
    return lambda: model.generate(PROMPT, seed=0)


def mmdit(**sizes) -> Callable:
    """One velocity of 256 image tokens and 81 context tokens, random weights like all below."""
    m, config = module("mmdit"), MMDiTConfig(**sizes)
    model = m.MMDiT(config).eval().requires_grad_(False)
    img, txt = torch.randn(1, 256, config.in_channels), torch.randn(1, 81, config.context_in_dim)
    ids, txt_ids = m.image_ids(32, 32), m.context_ids_generation(81)
    t, pooled, guidance = torch.tensor([0.7]), torch.randn(1, config.vec_in_dim), torch.ones(1)
    return lambda: model(img, ids, txt, txt_ids, t, pooled, guidance)


def vision() -> Callable:
    """A windowed and a full block at full width, 336x336 pixels."""
    config = VisionConfig(depth=2, fullatt_block_indexes=(1,))
    model = module("vision").QwenViT(config).eval().requires_grad_(False)
    pixels = torch.randn(24 * 24, 3 * 2 * 14 * 14)
    return lambda: model(pixels, ((1, 24, 24),))


def ar_model(width: int, layers: int):
    """A model whose special tokens end the vocabulary."""
    text = TextConfig(width, 4 * width, layers, 4, 2, vocab_size=4096, mrope_section=(4, 6, 6))
    tower = VisionConfig(1, 64, 64, 2, out_hidden_size=width, fullatt_block_indexes=(0,))
    special = {"image_token_id": 4095, "vision_start_token_id": 4094, "vision_end_token_id": 4093}
    config = ARConfig(text=text, vision=tower, eos_token_id=-1, pad_token_id=-1, **special)
    return module("autoregressive").NexusGenAR(config)


def decode() -> Callable:
    """64 tokens, greedily."""
    model, ids = ar_model(128, 8), torch.arange(32)[None]
    return lambda: [*module("autoregressive").generate(model, ids, max_new_tokens=64)]


def train_step() -> Callable:
    """Loss and gradients of a padded batch: eight replies in text, eight images."""
    model, ar_loss = ar_model(128, 4), module("autoregressive").ar_loss
    n, ids = model.config.num_image_slots, torch.randint(4, 2000, (16, 121))
    labels, slots = ids.clone(), torch.zeros_like(ids, dtype=torch.bool)
    slots[8:, 30 : 30 + n] = True
    ids[slots], ids[:8, 60:] = model.config.image_token_id, 0
    labels[:8, 60:] = labels[:, :20] = -100
    side = model.config.vision.spatial_merge_size * round(n**0.5)
    embeds, grid = torch.randn(8 * n, 128), torch.tensor([[1, side, side]] * 8)
    inputs = {"labels": labels, "slot_mask": slots, "image_embeds": embeds, "image_grid_thw": grid}
    return lambda: ar_loss(model, input_ids=ids, **inputs).loss.backward()


def decoder_steps(name: str) -> Callable:
    """Eight training steps of a decoder of the tiny model, with optimizers and average."""
    toy, config = importlib.import_module("nexus_min.toy.stages"), NexusGenConfig.tiny()
    trainer = importlib.import_module(f"nexus_min.{'train.trainer' if is_new() else 'training'}")
    run_class = importlib.import_module("nexus_min.train.stage").Run if is_new() else trainer.Run
    pool, mmdit = decoder_pool(config), module("mmdit").MMDiT(config.mmdit)
    empty, parts = toy.empty_prompt(config), module("projector")
    adapter = parts.GenerationAdapter(config.ar.text.hidden_size, config.mmdit.context_in_dim)
    merger = parts.ImageEmbeddingMerger(config.ar.text, config.mmdit.context_in_dim)
    is_editing, make = name == "editing", getattr(toy, f"{name}_stage")
    teacher = [adapter.requires_grad_(False)] if is_editing else []
    projector = merger if is_editing else adapter
    if is_new():
        weights = importlib.import_module("nexus_min.weights")
        decoder = getattr(weights, f"{name.title()}Decoder")(mmdit, projector)
        stage = make(toy.PreviewSampler(decoder, None, empty, config), *teacher, pool, 32)
    else:
        stage = make(mmdit, projector, *teacher, empty, pool, None, config, 32)
    stage.sample = None

    def train():
        with tempfile.TemporaryDirectory() as folder:
            trainer.fit(stage, run_class(Path(folder), steps=8, quiet=True))

    return train


def decoder_pool(config: NexusGenConfig) -> dict[str, torch.Tensor]:
    """256 random samples of a decoder: embeddings, those of a source, latents."""
    side = config.image_size // config.autoencoder.downsample
    count = (config.reference_size // config.ar.vision.patch_size // 2) ** 2
    shapes = {"embeds": (config.ar.num_image_slots, config.ar.text.hidden_size)}
    shapes["refs"] = count, config.ar.text.hidden_size
    shapes["latents"] = config.autoencoder.z_channels, side, side
    return {name: torch.randn(256, *shape).half() for name, shape in shapes.items()}


TINY = {"hidden_size": 128, "num_heads": 4, "axes_dim": (8, 12, 12), "context_in_dim": 64}
WORKS = {
    "`python -m nexus_min generate`, cold": cold,
    "generate, shipped model, loaded": image,
    "MMDiT velocity, tiny": partial(mmdit, depth=2, depth_single_blocks=2, **TINY),
    "MMDiT velocity, full width, 1 + 1 blocks": partial(mmdit, depth=1, depth_single_blocks=1),
    "vision tower, full width, 2 blocks": vision,
    "greedy decode, 64 tokens": decode,
    "AR training step, tiny": train_step,
    "generation decoder, 8 training steps": partial(decoder_steps, "generation"),
    "editing decoder, 8 training steps": partial(decoder_steps, "editing"),
}


def cpu_seconds() -> float:
    """CPU time of this process and its children."""
    return time.process_time() + sum(os.times()[2:4])


def measure(part: str) -> dict[str, list[float]]:
    """CPU seconds of every work, in this process; the first run of each is not counted."""
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    for name, make in ((k, v) for k, v in WORKS.items() if part in k):
        torch.manual_seed(0)
        run, times = make(), [cpu_seconds()]
        with torch.set_grad_enabled("training" in name):
            for _ in range(REPEATS + 1):
                run()
                times.append(cpu_seconds())
        found[name] = [b - a for a, b in zip(times[1:], times[2:], strict=False)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old_tree", type=Path, metavar="OLD_TREE")
    parser.add_argument("--works", default="", help="only those whose name has this in it")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each tree")
    args = parser.parse_args()
    old, new, command = {}, {}, [sys.executable, str(HERE), "measure", args.works]
    for tree, times in [(args.old_tree.resolve(), old), (HERE.parents[2], new)] * args.rounds:
        env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        with tempfile.TemporaryDirectory() as folder:
            answer = subprocess.check_output(command, env=env, cwd=folder)
        for name, seconds in json.loads(answer).items():
            times.setdefault(name, []).extend(seconds)
    print("| work, CPU ms | best: old | new | new / old | median: old | new | new / old |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in old:
        pairs = [(1e3 * of(old[name]), 1e3 * of(new[name])) for of in (min, median)]
        cells = [f"{a:.1f} | {b:.1f} | {b / a:.3f}" for a, b in pairs]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[2]))) if sys.argv[1] == "measure" else main()
