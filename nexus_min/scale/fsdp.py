"""Full-scale training over weights that are sharded across processes, by PyTorch's FSDP2.

One step is AdamW on the mean gradient of the micro-batches of a global batch; presets are the
paper's table 4. A micro-batch, not a process, is what draws its own numbers and means, so the loss
curve is the same on any number of processes.

Every block is a unit of `fully_shard`, gathered when it computes; the rest, and the loss itself,
are the root. With bf16, units are gathered and compute in bf16; shards, the sums of their gradients
and AdamW's state are fp32: the master weights. Inputs of blocks are kept for the backward pass, all
else in them is computed again. What is frozen, the vision tower, is whole on every card. A
checkpoint is one safetensors file a process (no pickle) and fits any number of processes.

Official: ms-swift for the AR model, DiffSynth-Studio for the decoders (paper, "Implementation
Details"). `fullscale` is the command.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from ..model.decoder import DecoderLayer
from ..model.mmdit import DoubleStreamBlock, SingleStreamBlock
from ..train.trainer import Run, Stage, broadcast, deferred_interrupt, make_rng, world

BLOCKS = (DecoderLayer, DoubleStreamBlock, SingleStreamBlock)
# Units of their own: two tables as large as several blocks, and modulations, which are evaluated
# before their blocks.
APART = ("embed_tokens", "lm_head", "mod.lin", "modulation.lin")
BETAS, CLIP = (0.9, 0.95), 1.0  # the paper does not tell; no weight decay


@dataclass(frozen=True)
class Preset:
    """A column of the paper's table 4."""

    stage: str
    cosine: bool  # or constant, after the warm-up
    batch: int  # samples a step, over all processes
    steps: int
    warmup: int
    ratio: tuple[float, float, float]  # understanding, generation, editing
    lr: float = 1e-5

    def lr_scale(self, step: int) -> float:
        """What the learning rate is multiplied with at `step`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * done)) if self.cosine else 1.0


PRESETS = {
    "ar_pretrain": Preset("ar", True, 512, 100_000, 7500, (1, 2, 1)),
    "ar_aesthetic": Preset("ar", True, 512, 10_000, 800, (1, 2, 1)),
    "generation_decoder": Preset("generation", False, 128, 20_000, 100, (0, 1, 0)),
    "editing_decoder": Preset("editing", False, 128, 10_000, 100, (0, 0, 1)),
}

# --------------------------------------------------------------------------------------- sharding


class Root(nn.Module):
    """A stage's loss as a module: all that it calls and reads is then inside FSDP's root."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.parts, self.loss = stage.modules, stage.loss

    def forward(self, rng, progress: float) -> tuple[Tensor, dict]:
        return self.loss(rng, progress)


def recompute_blocks(root: nn.Module) -> None:
    """Keep of every block only its inputs for the backward pass (activation checkpointing)."""
    for module in root.modules():
        if isinstance(module, BLOCKS):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def units(root: nn.Module) -> Iterator[nn.Module]:
    """What is gathered by itself, inner units first."""
    for name, module in reversed(list(root.named_modules())):
        if isinstance(module, BLOCKS) or name.endswith(APART):
            yield module


def shard(root: nn.Module, device: torch.device, bf16: bool) -> nn.Module:
    """Split what learns over all processes, in fp32, in place; what is frozen stays whole."""
    frozen = {p for p in root.parameters() if not p.requires_grad}
    low = torch.bfloat16 if bf16 else None
    policy = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)
    settings = {"mesh": init_device_mesh(device.type, (world()[1],)), "mp_policy": policy}
    for module in units(root):
        fully_shard(module, **settings)
    fully_shard(root, **settings, ignored_params=frozen)
    root.float()
    for p in frozen:
        p.data = p.data.to(device, low)
    return root


def gathered(module: nn.Module) -> dict[str, Tensor]:
    """Its whole state on the CPU of process 0, one tensor after the other; nothing elsewhere."""
    state = {}
    for name, tensor in module.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world()[0] == 0:
            state[name] = whole.detach().cpu()
    return state


# --------------------------------------------------------------------------------------- the loop


class Trainer:
    """A stage over shards: its steps, its checkpoints."""

    def __init__(self, stage: Stage, run: Run, preset: Preset, micro: int, device: torch.device):
        self.stage, self.run, self.preset, self.device = stage, run, preset, device
        self.rank, self.size = world()
        self.count, rest = divmod(preset.batch, micro)  # micro-batches a step
        if rest or self.count % self.size:
            told = f"a batch of {preset.batch} does not divide into micro-batches of {micro}"
            raise ValueError(f"{told} on {self.size} processes; change --batch or --micro")
        self.root = Root(stage)
        recompute_blocks(self.root)
        shard(self.root, device, run.bf16)
        learns = [(k, p) for k, p in self.root.named_parameters() if p.requires_grad]
        self.parameters, self.step = dict(learns), 0
        fused = device.type == "cuda"
        settings = {"lr": preset.lr, "betas": BETAS, "weight_decay": 0.0, "fused": fused}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), **settings)
        for p in self.parameters.values():  # as its first step would, so that all can be restored
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            count = torch.zeros((), device=device if fused else "cpu")
            self.optimizer.state[p] = {"step": count, **moments}

    def take_step(self) -> dict[str, float]:
        """One step on the global batch; its metrics, means over all micro-batches."""
        own, total = range(self.rank, self.count, self.size), 0.0
        for k in own:
            rng = make_rng(self.run.seed, self.stage.name, self.step, k)
            loss, metrics = self.root(rng, self.step / self.preset.steps)
            (loss / len(own)).backward()
            metrics = {"loss": loss, **metrics}
            total += torch.stack([m.detach().float() for m in metrics.values()]) / self.count
        dist.all_reduce(total)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), CLIP).full_tensor()
        numbers = dict(zip(metrics, total.tolist(), strict=True)) | {"grad_norm": float(norm)}
        if not all(map(math.isfinite, numbers.values())):
            batch = (self.run.seed, self.stage.name, self.step, list(own))
            told = f"stage {self.stage.name}, step {self.step}: not finite ({numbers}; "
            told += f"batches of seed, stage, step, parts {batch})"
            dump = self.run.folder / f"{self.stage.name}.nonfinite"
            try:
                self.write(dump)
                told += f"; the last checkpoint is kept, what led here is in {dump}"
            except OSError as error:
                told += f"; {error}"
            raise FloatingPointError(told)
        for group in self.optimizer.param_groups:
            group["lr"] = self.preset.lr * self.preset.lr_scale(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return numbers

    # ---- checkpoints

    @property
    def checkpoints(self) -> list[Path]:
        """Those that are whole, oldest first."""
        return sorted(self.run.folder.glob(f"{self.stage.name}.[0-9]*[0-9]"))

    def state(self) -> dict[str, Tensor]:
        """Master weights and AdamW's moments as shards, and the number of steps done."""
        kinds = {"weight": lambda p: p.detach()}
        kinds |= {n: lambda p, n=n: self.optimizer.state[p][n] for n in ("exp_avg", "exp_avg_sq")}
        tensors = {f"{n}/{k}": of(p) for n, of in kinds.items() for k, p in self.parameters.items()}
        return tensors | {"step": torch.tensor(self.step)}

    def save(self) -> None:
        """A checkpoint; the last two are kept."""
        self.write(self.run.folder / f"{self.stage.name}.{self.step:07d}")
        if self.rank == 0:
            for old in self.checkpoints[:-2]:
                shutil.rmtree(old)

    def write(self, goal: Path) -> None:
        """Every process writes and syncs its shards; the folder gets its name when all are in.

        OSError, one line, when they cannot be written.
        """
        partial_folder = goal.with_suffix(f"{goal.suffix}.partial")
        self.drop_partial()  # of a run that was killed, perhaps on more processes
        writer = dcp.HuggingFaceStorageWriter(str(partial_folder), save_distributed=True)
        try:
            dcp.save(self.state(), storage_writer=writer)
        except dcp.CheckpointException as error:  # the same on every process
            self.drop_partial()
            reason = str(next(iter(error.failures.values()))[0]).split("\n")[0]
            raise OSError(f"cannot write {goal}: {reason}; the last checkpoint is kept") from None
        if self.rank == 0:
            shutil.rmtree(goal, ignore_errors=True)
            os.replace(partial_folder, goal)
        dist.barrier()

    def drop_partial(self) -> None:
        """Remove what was not written to its end."""
        if self.rank == 0:
            for folder in self.run.folder.glob(f"{self.stage.name}.*.partial"):
                shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()

    def restore(self) -> None:
        """Go on from the last checkpoint, whatever number of processes wrote it, if there is one.

        ValueError when a file is broken or missing, or is another model's.
        """
        if not self.checkpoints:
            return
        last, state = self.checkpoints[-1], self.state()
        reader = dcp.HuggingFaceStorageReader(str(last))
        try:
            stored = reader.read_metadata().state_dict_metadata
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            told = f"{last}: not a checkpoint ({error})"
            raise ValueError(f"{told}; delete it to go on from the one before") from None
        wrong = [
            k for k in state.keys() | stored.keys() if not is_whole(stored.get(k), state.get(k))
        ]
        if wrong:
            told = f"{last}: not whole, or another model's: {len(wrong)} tensors, {min(wrong)}"
            raise ValueError(f"{told}; delete it to go on from the one before")
        dcp.load(state, storage_reader=reader)
        self.step = int(state["step"])
        for p in self.parameters.values():
            self.optimizer.state[p]["step"].fill_(self.step)


def is_whole(stored: dcp.TensorStorageMetadata | None, tensor: Tensor | None) -> bool:
    """Whether what is stored is a tensor of that shape, all parts of it."""
    if stored is None or tensor is None:
        return False
    held = sum(part.sizes.numel() for part in stored.chunks)
    return stored.size == tensor.shape and held == tensor.numel()


def fit(
    stage: Stage,
    run: Run,
    preset: Preset,
    micro: int,
    device: torch.device,
    until: int | None = None,
    save_every: int = 500,
) -> None:
    """Train `stage`, in place, to the preset's last step, or to `until`; go on where it was.

    Its loss is that of one micro-batch of `micro` samples. Writes metrics.jsonl and, every
    `save_every` steps, on Ctrl-C and at the end, a checkpoint. ValueError when sizes do not fit;
    FloatingPointError with the step for a loss or gradient that is not finite, the state before it
    dumped; KeyboardInterrupt after Ctrl-C, once all is saved.
    """
    trainer = Trainer(stage, run, preset, micro, device)
    trainer.restore()
    end = preset.steps if until is None else min(until, preset.steps)
    silent = run.quiet or trainer.rank > 0
    bar = {"desc": stage.name, "initial": trainer.step, "total": preset.steps, "disable": silent}
    with tqdm(**bar) as progress, deferred_interrupt() as interrupt:
        while trainer.step < end:
            numbers = {"lr": preset.lr * preset.lr_scale(trainer.step)} | trainer.take_step()
            if trainer.rank == 0:
                log(run.folder, {"stage": stage.name, "step": trainer.step} | numbers)
            progress.set_postfix(loss=numbers["loss"], refresh=False)
            progress.update()
            (stop,) = broadcast(interrupt.heard)
            if stop or trainer.step % save_every == 0 or trainer.step == end:
                trainer.save()
            if stop and trainer.step < end:
                raise KeyboardInterrupt


def log(folder: Path, line: dict) -> None:
    """Append to metrics.jsonl."""
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
