"""Estimate what full-scale training takes: bytes per GPU and floating-point operations.

    python -m nexus_min.scale.estimate --gpus 8 --micro-batch 1

The stages run on `meta`, where tensors have shapes but no memory. Attention is counted as plain
matrix products, which save more than a fused kernel, so memory is an upper bound. Throughput is
MFU * peak / FLOP per token without recomputed activations. For comparison: 6 P D (P parameters, D
tokens).
"""

import sys
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..cli import Parser, check_least, report_errors
from ..config import NexusGenConfig
from ..model.autoregressive import NexusGenAR, loss_terms
from ..model.mmdit import MMDiT
from ..train import finetune
from ..train.stage import Stage
from ..weights import EditingDecoder, GenerationDecoder, make_adapter, make_merger
from .fsdp import BLOCKS, PRESETS, LossModule, Preset, checkpoint_activations, fsdp_units

TEXT_TOKENS, TEXT_LABELS = 100, 50  # of a sample: assumed
PEAK, MFU = 989e12, 0.4  # FLOP/s of an H100 in dense bf16; the share of it that is used: assumed


class Sample(NamedTuple):
    """The sizes of a training sample."""

    tokens: int  # all that the decoder reads
    labels: int  # text tokens with a label
    slots: int  # image tokens to predict
    sides: tuple[int, ...]  # of its images, in patches


def sample_of(task: str, config: NexusGenConfig) -> Sample:
    """A sample with one image a turn, the source at the editing decoder's size."""
    vision = config.ar.vision
    source, target = config.reference_size // vision.patch_size, config.ar.slot_grid[1]
    sides = {"understand": (source,), "generate": (target,), "edit": (source, target)}[task]
    image_tokens = sum((side // vision.spatial_merge_size) ** 2 for side in sides)
    slots = 0 if task == "understand" else config.ar.num_image_slots
    return Sample(TEXT_TOKENS + image_tokens, TEXT_LABELS, slots, sides)


def build_ar_stage(config: NexusGenConfig, micro_batch: int, sample: Sample, dtype) -> Stage:
    """The AR stage's tensor operations on equal samples; masks have no values on `meta`."""
    ar = NexusGenAR(config.ar).to(dtype)
    ar.visual.requires_grad_(False)
    vision, slots = config.ar.vision, slice(0, sample.slots)
    columns = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    def loss(rng, progress):
        with torch.no_grad():
            for side in sample.sides:
                grid = [(1, side, side)] * micro_batch
                ar.visual(torch.empty(micro_batch * side * side, columns, dtype=dtype), grid)
        ids = torch.zeros(micro_batch, sample.tokens, dtype=torch.long)
        prefill = ar.image_prefill_embeds(ids[:, slots])
        mask = torch.empty(*ids.shape, 1, dtype=torch.bool)
        x = ar.model.embed_tokens(ids).masked_scatter(mask, prefill)
        # only the supervised positions, at the end; the last token predicts nothing
        n = sample.labels + sample.slots
        hidden = ar.model(x[:, :-1], ids.expand(3, -1, -1)[:, :, :-1], num_outputs=n)
        logits = ar.lm_head(hidden[:, : sample.labels]).flatten(0, 1)
        image = ar.vision_head(hidden[:, slots]).flatten(0, 1)
        labels = ids[:, : sample.labels].flatten()
        return loss_terms(logits, labels, image, torch.empty_like(image)).loss, {}

    return Stage("ar", nn.ModuleDict({"ar": ar}), loss)


class MetaShards:
    """Samples on `meta` with the interface of `data.Shards`."""

    where = ()

    def __init__(self, config: NexusGenConfig):
        width, side = config.ar.text.hidden_size, config.image_size // config.autoencoder.downsample
        source_tokens = sample_of("understand", config).tokens - TEXT_TOKENS
        self.shapes = {
            "embeds": (config.ar.num_image_slots, width),
            "refs": (source_tokens, width),
            "latents": (config.autoencoder.z_channels, side, side),
        }

    def __len__(self) -> int:
        return 1

    def rows(self, indices) -> dict[str, Tensor]:
        return {name: torch.empty(len(indices), *shape) for name, shape in self.shapes.items()}


def build_stage(
    name: str, config: NexusGenConfig, micro_batch: int, task: str, dtype=torch.bfloat16
) -> LossModule:
    """A stage on `meta`: a decoder's own one, or the AR model's with samples of `task`."""
    with torch.device("meta"):
        if name == "ar":
            return LossModule(build_ar_stage(config, micro_batch, sample_of(task, config), dtype))
        mmdit = MMDiT(config.mmdit).to(dtype)

        def rope(*ids: Tensor) -> tuple[Tensor, Tensor]:
            shape = 1, 1, sum(i.shape[1] for i in ids), sum(config.mmdit.axes_dim) // 2
            return torch.empty(shape), torch.empty(shape)

        mmdit.rope = rope  # the method needs the values of positions
        empty, samples = {"pooled": torch.empty(1, config.mmdit.vec_in_dim)}, MetaShards(config)
        if name == "generation":
            decoder = GenerationDecoder(mmdit, make_adapter(config).to(dtype))
        else:
            decoder = EditingDecoder(mmdit, make_merger(config).to(dtype))
        return LossModule(finetune.decoder_stage(decoder, empty, samples, config, micro_batch))


def trainable_params(root: nn.Module) -> int:
    return sum(p.numel() for p in root.parameters() if p.requires_grad)


def flops(root: nn.Module) -> int:
    """Floating-point operations of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        root(np.random.default_rng(0), 0.0)[0].backward()
    return counter.get_total_flops()


def saved_activation_bytes(root: nn.Module) -> int:
    """Bytes that a forward pass saves for the backward pass, without parameters."""
    storages = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        root(np.random.default_rng(0), 0.0)
    parameters = {p.untyped_storage()._cdata for p in root.parameters()}
    return sum(s.nbytes() for address, s in storages.items() if address not in parameters)


def memory(root: nn.Module, gpus: int, bf16: bool) -> dict[str, int]:
    """Bytes per GPU by use. Leaves `root` with checkpointed activations."""
    width, trainable = 2 if bf16 else 4, trainable_params(root)
    frozen = sum(p.numel() for p in root.parameters()) - trainable
    unit_sizes, counted = [], set()
    for unit in fsdp_units(root):  # inner units first: they are not part of the outer ones
        unit_sizes.append(sum(p.numel() for p in unit.parameters() if p not in counted))
        counted |= set(unit.parameters())
    in_root, largest = trainable - sum(unit_sizes), max(unit_sizes)
    blocks = sum(isinstance(module, BLOCKS) for module in root.modules())
    everything = saved_activation_bytes(root)
    checkpoint_activations(root)
    block_inputs = saved_activation_bytes(root)
    return {
        "frozen": width * frozen,
        "weights": 4 * trainable // gpus,
        "gradients": 4 * trainable // gpus,
        "optimizer": 8 * trainable // gpus,
        # the root's weights and gradients; two units and the gradients of one, these also in fp32
        "gathered": width * (2 * in_root + 3 * largest) + 4 * largest,
        "activations": block_inputs + (everything - block_inputs) // blocks,
    }


def throughput(preset: Preset, config: NexusGenConfig) -> dict[str, float]:
    """Means over the preset's mixture of samples: tokens, TFLOP, 6 P D; then the rates of a GPU."""
    means = np.zeros(3)
    for task, ratio in zip(finetune.TASKS, preset.ratio, strict=True):
        if ratio:
            D = sample_of(task, config).tokens
            if preset.stage != "ar":  # an MMDiT reads image and context tokens
                D += (config.image_size // config.autoencoder.downsample // 2) ** 2 - TEXT_TOKENS
            root = build_stage(preset.stage, config, 1, task)
            with torch.device("meta"):
                numbers = D, flops(root), 6 * trainable_params(root) * D
            means += ratio / sum(preset.ratio) * np.array(numbers)
    tokens, total, six_pd = means.tolist()
    rate = MFU * PEAK / total
    numbers = {"tokens": tokens, "TFLOP": total / 1e12, "6PD": six_pd / 1e12}
    return numbers | {"samples_s": rate, "tokens_s": rate * tokens}


def estimate(argv: list[str] | None = None) -> None:
    """Print memory and throughput of every preset at full scale."""
    parser = Parser("nexus_min.scale.estimate", description=__doc__)
    add = parser.add_argument
    add("--gpus", "--cards", type=int, default=8, help="GPUs that share the weights")
    add("--micro-batch", "--micro", type=int, default=1, help="samples that a GPU takes at once")
    args, config = parser.parse_args(argv), NexusGenConfig.v2()
    check_least(args, gpus=1, micro_batch=1)
    for name, preset in PRESETS.items():
        root = build_stage(preset.stage, config, args.micro_batch, "edit")
        with torch.device("meta"):
            sizes = memory(root, args.gpus, True)
        parts = "  ".join(f"{use} {size / 1e9:.1f}" for use, size in sizes.items())
        print(f"{name}: {sum(sizes.values()) / 1e9:.1f} GB per GPU of {args.gpus}  ({parts})")
        numbers = throughput(preset, config)
        days = preset.batch * preset.steps / numbers["samples_s"] / args.gpus / 86400
        rates = "  ".join(f"{k} {v:.1f}" for k, v in numbers.items())
        print(f"  per sample and GPU: {rates}; {days:.1f} days on {args.gpus} GPUs")


if __name__ == "__main__":
    with report_errors("estimate") as status:
        estimate()
    sys.exit(status.code)
