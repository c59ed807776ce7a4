"""Full-scale training with PyTorch's FSDP2: every process holds a shard of the trained weights.

One step is AdamW on the mean gradient of the micro-batches of a global batch. The random numbers
belong to a micro-batch, so the loss does not depend on the number of processes. Each block is an
FSDP unit, whose weights are gathered while it computes, with bf16 in bf16; weights, gradients and
moments are fp32 shards. Frozen weights (the vision tower) are whole on every GPU.

Official: ms-swift for the AR model, DiffSynth-Studio for the decoders.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from ..model.decoder import DecoderLayer
from ..model.mmdit import DoubleStreamBlock, SingleStreamBlock
from ..train.checkpoint import append_line, deferred_interrupt
from ..train.stage import Run, Stage, make_rng

BLOCKS = (DecoderLayer, DoubleStreamBlock, SingleStreamBlock)
# Two tables as large as several blocks, and modulations, which run before their blocks.
OWN_UNITS = ("embed_tokens", "lm_head", "mod.lin", "modulation.lin")
MOMENTS = ("exp_avg", "exp_avg_sq")  # as AdamW names them
BETAS, MAX_GRAD_NORM = (0.9, 0.95), 1.0  # our choice, without weight decay: table 4 has neither


@dataclass(frozen=True)
class Preset:
    """A column of the paper's table 4."""

    stage: str
    cosine: bool  # the decay after the warm-up; otherwise the rate stays constant
    batch: int  # samples a step, over all processes
    steps: int
    warmup: int
    ratio: tuple[float, float, float]  # understanding, generation, editing
    lr: float = 1e-5

    def lr_scale(self, step: int) -> float:
        """The factor of the learning rate at `step`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * progress)) if self.cosine else 1.0


PRESETS = {
    "ar_pretrain": Preset("ar", True, 512, 100_000, 7500, (1, 2, 1)),
    "ar_aesthetic": Preset("ar", True, 512, 10_000, 800, (1, 2, 1)),
    "generation_decoder": Preset("generation", False, 128, 20_000, 100, (0, 1, 0)),
    "editing_decoder": Preset("editing", False, 128, 10_000, 100, (0, 0, 1)),
}


class LossModule(nn.Module):
    """A stage's loss as a module, so that FSDP's root covers all that the loss calls and reads."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.parts, self.loss = stage.modules, stage.loss

    def forward(self, rng, progress: float) -> tuple[Tensor, dict]:
        return self.loss(rng, progress)


def checkpoint_activations(root: nn.Module) -> None:
    """Save only the inputs of every block for the backward pass, which computes the rest again."""
    for module in root.modules():
        if isinstance(module, BLOCKS):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def fsdp_units(root: nn.Module) -> Iterator[nn.Module]:
    """The modules that are gathered one by one, inner ones first."""
    for name, module in reversed(list(root.named_modules())):
        if isinstance(module, BLOCKS) or name.endswith(OWN_UNITS):
            yield module


def apply_fsdp(root: nn.Module, device: torch.device, bf16: bool) -> None:
    """Shard the trainable weights over all processes, in fp32 and in place."""
    frozen = {p for p in root.parameters() if not p.requires_grad}
    dtype = torch.bfloat16 if bf16 else None
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    settings = {"mesh": mesh, "mp_policy": policy}
    for module in fsdp_units(root):
        fully_shard(module, **settings)
    fully_shard(root, **settings, ignored_params=frozen)
    root.float()
    for p in frozen:
        p.data = p.data.to(device, dtype)


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The unsharded state dict on the CPU of process 0; {} elsewhere."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=options)


class ShardedState:
    """Sharded weights, AdamW's moments and the number of steps done.

    A checkpoint is a folder with one safetensors file per process; any number of them can read it.
    """

    def __init__(self, stage: Stage, folder: Path, device: torch.device, bf16: bool):
        self.name, self.folder, self.step = stage.name, folder, 0
        self.root = LossModule(stage)
        checkpoint_activations(self.root)
        apply_fsdp(self.root, device, bf16)
        self.parameters = {k: p for k, p in self.root.named_parameters() if p.requires_grad}
        settings = {"betas": BETAS, "weight_decay": 0.0, "fused": device.type == "cuda"}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), **settings)
        # AdamW makes its moments in its first step; `restore` needs them before.
        for p in self.parameters.values():
            steps = torch.zeros((), device=device)
            moments = {name: torch.zeros_like(p) for name in MOMENTS}
            self.optimizer.state[p] = {"step": steps, **moments}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name."""
        tensors = {}
        for name, p in self.parameters.items():
            tensors[f"weight/{name}"] = p.detach()
            tensors |= {f"{m}/{name}": self.optimizer.state[p][m] for m in MOMENTS}
        return tensors | {"step": torch.tensor(self.step)}

    def checkpoints(self) -> list[Path]:
        """All complete checkpoints, oldest first."""
        return sorted(self.folder.glob(f"{self.name}.[0-9]*[0-9]"))

    def save(self, tag: str | None = None) -> None:
        """Write the folder `STAGE.TAG`, by default `STAGE.STEP`; keep the last two STEPs."""
        folder = self.folder / f"{self.name}.{tag or f'{self.step:07d}'}"
        partial_folder = self.folder / f"{self.name}.partial"
        self.delete(partial_folder)  # left by a run that was killed, perhaps on more processes
        writer = dcp.HuggingFaceStorageWriter(str(partial_folder), save_distributed=True)
        try:
            dcp.save(self.tensors(), storage_writer=writer)
        except dcp.CheckpointException as error:  # raised on every process
            self.delete(partial_folder)
            reason = str(next(iter(error.failures.values()))[0]).split("\n")[0]
            raise OSError(f"cannot write {folder}: {reason}; the last checkpoint is kept") from None
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial_folder, folder)  # it is complete
            for old in self.checkpoints()[:-2]:
                shutil.rmtree(old)
        dist.barrier()

    def delete(self, folder: Path) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()

    def restore(self) -> None:
        """Read the last checkpoint, if there is one."""
        if not (checkpoints := self.checkpoints()):
            return
        last, tensors = checkpoints[-1], self.tensors()
        advice = "delete it to resume from the one before"
        reader = dcp.HuggingFaceStorageReader(str(last))
        try:
            stored = reader.read_metadata().state_dict_metadata
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{last}: not a checkpoint ({error}); {advice}") from None
        # The chunks of a tensor are the shards that the processes wrote.
        found = {k: (m.size, sum(c.sizes.numel() for c in m.chunks)) for k, m in stored.items()}
        expected = {k: (t.shape, t.numel()) for k, t in tensors.items()}
        if wrong := {name for name, _ in found.items() ^ expected.items()}:
            reason = f"incomplete, or another model's: {len(wrong)} tensors, {min(wrong)}"
            raise ValueError(f"{last}: {reason}; {advice}")
        dcp.load(tensors, storage_reader=reader)
        self.step = int(tensors["step"])
        for p in self.parameters.values():
            self.optimizer.state[p]["step"].fill_(self.step)

    def raise_nonfinite(self, cause: str) -> NoReturn:
        """Dump the state, which as a checkpoint leads to the same step, and raise an error."""
        dump = f"the last checkpoint is kept, the state is in {self.folder / self.name}.nonfinite"
        try:
            self.save("nonfinite")
        except OSError as error:
            dump = str(error)
        message = f"stage {self.name}, step {self.step}: not finite ({cause}); {dump}"
        raise FloatingPointError(message)


def fit(
    stage: Stage,
    run: Run,
    preset: Preset,
    micro_batch: int,
    device: torch.device,
    until: int | None = None,
    save_every: int = 500,
) -> None:
    """Train `stage` in place, from its last checkpoint to the preset's last step or to `until`.

    Every `save_every` steps, after Ctrl-C and at the end a checkpoint is written.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    if preset.batch % (micro_batch * size):
        message = f"a batch of {preset.batch} does not divide into micro-batches of {micro_batch}"
        raise ValueError(f"{message} on {size} processes; change --batch or --micro-batch")
    num_parts = preset.batch // micro_batch
    parts = range(rank, num_parts, size)  # the micro-batches of this process
    state = ShardedState(stage, run.folder, device, run.bf16)
    state.restore()
    end = preset.steps if until is None else min(until, preset.steps)
    bar = {"desc": stage.name, "initial": state.step, "total": preset.steps}
    with tqdm(**bar, disable=run.quiet or rank > 0) as bar, deferred_interrupt() as interrupt:
        for step in range(state.step, end):
            total = 0.0
            for part in parts:
                rng = make_rng(run.seed, stage.name, step, part)
                loss, metrics = state.root(rng, step / preset.steps)
                (loss / len(parts)).backward()  # FSDP takes the mean over processes
                metrics = {"loss": loss, **metrics}
                total += torch.stack([m.detach().float() for m in metrics.values()]) / num_parts
            dist.all_reduce(total)
            norm = nn.utils.clip_grad_norm_(state.parameters.values(), MAX_GRAD_NORM).full_tensor()
            metrics = dict(zip(metrics, total.tolist(), strict=True)) | {"grad_norm": float(norm)}
            if not all(map(math.isfinite, metrics.values())):
                batches = (run.seed, stage.name, step, list(parts))
                state.raise_nonfinite(f"{metrics}; batches of seed, stage, step, parts {batches}")

            lr = state.optimizer.param_groups[0]["lr"] = preset.lr * preset.lr_scale(step)
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.step = step + 1

            if rank == 0:
                line = {"stage": stage.name, "step": state.step, "lr": lr, **metrics}
                append_line(run.folder / "metrics.jsonl", json.dumps(line))
            bar.set_postfix(loss=metrics["loss"], refresh=False)
            bar.update()
            stop = torch.tensor(int(interrupt.heard))
            dist.broadcast(stop, 0)  # so that all processes stop at the same step
            if stop or state.step % save_every == 0 or state.step == end:
                state.save()
            if stop and state.step < end:
                raise KeyboardInterrupt
