"""What full-scale training takes: bytes a card and floating-point operations, counted on `meta`.

    python -m nexus_min.scale.estimate --cards 8 --micro 1

Nothing here was measured on a GPU. Bytes a card of N that learns P parameters: 4P/N of fp32
weights, 4P/N of gradients, 8P/N of AdamW's moments; what is frozen, whole, in bf16; gathered units;
and what the forward pass keeps. Those, and the operations, are counted while the stages' own code
runs on tensors without memory. Attention is counted as plain products, which hold more than a
fused kernel: an upper bound. Tokens a second = MFU * peak / (operations a token), without
what is computed twice; 6 P D (D tokens) is printed beside the count.

The plan past one machine. Engine: PyTorch's own, FSDP2 over NCCL, as on one machine; nothing
home-made. Sharding: HSDP, a 2-D mesh of `fully_shard`: weights split over the 8 cards of a machine,
whose NVLink carries the gathers, and replicated over machines, between which only a 1/8 of the
gradients is averaged once a step (with gradients summed over micro-batches first). Table 4's batch
of 512 then takes up to 512 cards at one sample each. Tensor or pipeline parallelism is not needed
at these sizes: a block is 0.2 to 0.5 GB in bf16. Checkpoints and micro-batches do not change.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..config import NexusGenConfig
from ..model.autoregressive import NexusGenAR
from ..model.mmdit import MMDiT
from ..model.projector import GenerationAdapter, ImageEmbeddingMerger
from ..train import finetune
from ..train.trainer import Stage
from .fsdp import BLOCKS, PRESETS, Preset, Root, recompute_blocks, units

TEXT, LEARNED = 100, 50  # tokens of text of a sample, and those with a label: assumed
PEAK, MFU = 989e12, 0.4  # of an H100 in bf16, dense; the share of it that is used: assumed


class Sample(NamedTuple):
    """How long a line of a kind is."""

    tokens: int  # all that the decoder reads
    learned: int  # of text
    slots: int
    sides: tuple[int, ...]  # of its images, in patches


def sample_of(kind: str, config: NexusGenConfig) -> Sample:
    """A line with one image a turn, the source at the editing decoder's size."""
    vision = config.ar.vision
    side, slot_side = config.reference_size // vision.patch_size, config.ar.slot_grid[1]
    sides = {"understand": (side,), "generate": (slot_side,), "edit": (side, slot_side)}[kind]
    seen = sum((s // vision.spatial_merge_size) ** 2 for s in sides)
    slots = 0 if kind == "understand" else config.ar.num_image_slots
    return Sample(TEXT + seen, LEARNED, slots, sides)


def autoregressive_work(config: NexusGenConfig, micro: int, sample: Sample, dtype) -> Stage:
    """The AR stage's tensor work on `micro` equal lines, on `meta`, where masks have no values."""
    ar = NexusGenAR(config.ar).to(dtype)
    ar.visual.requires_grad_(False)
    vision, slots = config.ar.vision, slice(0, sample.slots)
    columns = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    def loss(rng, progress):
        with torch.no_grad():
            for side in sample.sides:
                grid = [(1, side, side)] * micro
                ar.visual(torch.empty(micro * side * side, columns, dtype=dtype), grid)
        ids = torch.zeros(micro, sample.tokens, dtype=torch.long)
        x = ar.model.embed_tokens(ids)
        prefill = ar.image_prefill_embeds(ids[:, slots])
        x = x.masked_scatter(torch.empty(*ids.shape, 1, dtype=torch.bool), prefill)
        replies = sample.learned + sample.slots  # at the end; the last token predicts nothing
        hidden = ar.model(x[:, :-1], ids.expand(3, -1, -1)[:, :, :-1], last=replies)
        logits = ar.lm_head(hidden[:, : sample.learned]).float().flatten(0, 1)
        ce = F.cross_entropy(logits, ids[:, : sample.learned].flatten())
        image = ar.vision_head(hidden[:, slots]).float()
        if not sample.slots:
            return ce + image.sum(), {}
        cos = F.cosine_similarity(image, torch.empty_like(image), dim=-1)
        return ce + F.mse_loss(image, torch.empty_like(image)) - cos.mean(), {}

    return Stage("ar", nn.ModuleDict({"ar": ar}), loss)


class Rows:
    """`micro` cached samples, on `meta`, as `data.Shards` gives them."""

    where = ()

    def __init__(self, config: NexusGenConfig):
        self.width, self.config = config.ar.text.hidden_size, config

    def __len__(self) -> int:
        return 1

    def rows(self, indices) -> dict[str, Tensor]:
        """embeds [n, N, C], refs [n, M, C], latents [n, z, h, w], all without memory."""
        c, n = self.config, len(indices)
        cells = c.image_size // c.autoencoder.downsample
        seen = sample_of("understand", c).tokens - TEXT
        sizes = {"embeds": (c.ar.num_image_slots, self.width), "refs": (seen, self.width)}
        sizes["latents"] = (c.autoencoder.z_channels, cells, cells)
        return {name: torch.empty(n, *size) for name, size in sizes.items()}


def decoder_work(name: str, config: NexusGenConfig, micro: int, dtype) -> Stage:
    """The stage of a decoder itself, on `meta`."""
    mmdit, out = MMDiT(config.mmdit).to(dtype), config.mmdit.context_in_dim

    def rope(*ids: Tensor) -> tuple[Tensor, Tensor]:  # in place of what reads the positions
        size = sum(i.shape[1] for i in ids), sum(config.mmdit.axes_dim) // 2
        return torch.empty(1, 1, *size), torch.empty(1, 1, *size)

    mmdit.rope = rope
    empty = {"pooled": torch.empty(1, config.mmdit.vec_in_dim)}
    if name == "generation":
        adapter = GenerationAdapter(config.ar.text.hidden_size, out).to(dtype)
        return finetune.generation_stage(mmdit, adapter, empty, Rows(config), micro, True)
    merger = ImageEmbeddingMerger(config.ar.text, out).to(dtype)
    return finetune.editing_stage(mmdit, merger, empty, Rows(config), config, micro, True)


def kept(root: nn.Module) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters left out."""
    known = {p.untyped_storage()._cdata for p in root.parameters()}
    storages = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = root(np.random.default_rng(0), 0.0)
    total = sum(s.nbytes() for k, s in storages.items() if k not in known)
    del result
    return total


def unit_sizes(root: nn.Module) -> list[int]:
    """Parameters of each unit, those of units within it left out."""
    sizes, known = [], set()
    for unit in units(root):
        sizes.append(sum(p.numel() for p in unit.parameters() if p not in known))
        known |= set(unit.parameters())
    return sizes


def learning(root: nn.Module) -> int:
    """Parameters that learn."""
    return sum(p.numel() for p in root.parameters() if p.requires_grad)


def memory(root: nn.Module, cards: int, bf16: bool) -> dict[str, int]:
    """Bytes a card by what holds them; `root` then recomputes its blocks."""
    low, count = 2 if bf16 else 4, learning(root)
    frozen = sum(p.numel() for p in root.parameters()) - count
    sizes = unit_sizes(root)
    largest, rest = max(sizes), count - sum(sizes)
    blocks = sum(isinstance(module, BLOCKS) for module in root.modules())
    everything = kept(root)
    recompute_blocks(root)
    inputs = kept(root)
    return {
        "frozen": low * frozen,
        "weights": 4 * count // cards,
        "gradients": 4 * count // cards,
        "optimizer": 8 * count // cards,
        # root's weights and gradients; two units, of one its gradients, these once more in fp32
        "gathered": low * (2 * rest + 3 * largest) + 4 * largest,
        "activations": inputs + (everything - inputs) // blocks,
    }


def operations(root: nn.Module) -> int:
    """Floating-point operations of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        root(np.random.default_rng(0), 0.0)[0].backward()
    return counter.get_total_flops()


def work(stage: str, config: NexusGenConfig, micro: int, kind: str, dtype=torch.bfloat16) -> Root:
    """A stage on `meta`; `kind` of lines is for the AR model's."""
    with torch.device("meta"):
        if stage != "ar":
            return Root(decoder_work(stage, config, micro, dtype))
        return Root(autoregressive_work(config, micro, sample_of(kind, config), dtype))


def tokens_of(stage: str, config: NexusGenConfig, kind: str) -> int:
    """Tokens of a sample: what the AR model reads, or an MMDiT's image and context tokens."""
    if stage == "ar":
        return sample_of(kind, config).tokens
    image = (config.image_size // config.autoencoder.downsample // 2) ** 2
    sides = "generate" if stage == "generation" else "edit"
    return image + sample_of(sides, config).tokens - TEXT


def throughput(preset: Preset, config: NexusGenConfig) -> dict[str, float]:
    """Means over the preset's mixture, a sample: tokens, operations, 6 P D; then a card's rates."""
    shares = [(k, r / sum(preset.ratio)) for k, r in zip(finetune.KINDS, preset.ratio, strict=True)]
    tokens = sixpd = done = 0.0
    with torch.device("meta"):
        for kind, share in shares:
            if share:
                root, D = work(preset.stage, config, 1, kind), tokens_of(preset.stage, config, kind)
                tokens, done = tokens + share * D, done + share * operations(root)
                sixpd += share * 6 * learning(root) * D
    rate = MFU * PEAK / done
    numbers = {"tokens": tokens, "TFLOP": done / 1e12, "6PD": sixpd / 1e12}
    return numbers | {"samples_s": rate, "tokens_s": rate * tokens}


def main(argv: list[str] | None = None) -> int:
    """Print both tables for all presets at full scale."""
    parser = argparse.ArgumentParser("nexus_min.scale.estimate", description=__doc__.split("\n")[0])
    parser.add_argument("--cards", type=int, default=8)
    parser.add_argument("--micro", type=int, default=1)
    args, config = parser.parse_args(argv), NexusGenConfig.v2()
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            need = memory(work(preset.stage, config, args.micro, "edit"), args.cards, True)
        parts = "  ".join(f"{k} {v / 1e9:.1f}" for k, v in need.items())
        print(f"{name}: {sum(need.values()) / 1e9:.1f} GB a card of {args.cards}  ({parts})")
        numbers = throughput(preset, config)
        days = preset.batch * preset.steps / numbers["samples_s"] / args.cards / 86400
        told = "  ".join(f"{k} {v:.1f}" for k, v in numbers.items())
        print(f"  a sample and a card: {told}; {days:.1f} days on {args.cards} cards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
