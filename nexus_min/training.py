"""Training: one loop for every stage of the paper, over any configuration.

A stage is a set of trainable modules and a function that returns the loss of one batch. The loop adds what
all stages share: Muon on the hidden matrices and AdamW on the rest, warm-up / constant / linear decay, an
exponential moving average of the weights, data parallelism over processes, metrics, sample grids, checkpoints
and resume. Batches are a pure function of (seed, stage, step, rank), so there is no data position to save.

Losses: the AR model's is `autoregressive.ar_loss` (paper section 3.2, lambdas 3, 1.5, 1.5); both decoders'
is `flow.rf_loss` (official `train_generation_decoder` / `train_editing_decoder`).
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

log = logging.getLogger(__name__)
DECAY = 0.4  # the last part of every stage, over which the learning rate falls to zero
WARMUP = 50  # steps


@dataclass
class Stage:
    """What one stage trains: modules, the loss of a batch, and how to draw samples of progress.

    `loss(rng, progress)` returns the scalar to minimise and a dict of floats or tensors to log; `progress`
    runs from 0 to 1. `sample(path)` writes a PNG and returns
    numbers to log. Muon leaves out parameters whose name holds a word of
    `adamw_only` (embeddings, heads, first and last layers).
    """

    name: str
    modules: nn.ModuleDict
    loss: Callable[[np.random.Generator, float], tuple[Tensor, dict]]
    lr: float = 3e-3
    adamw_lr: float | None = None
    ema: float = 0.998
    adamw_only: tuple[str, ...] = ()
    sample: Callable[[Path], dict[str, float]] | None = None


@dataclass
class Run:
    """Where and how long: a folder, a seed, and either seconds or steps for the stage at hand."""

    folder: Path
    seed: int = 0
    seconds: float | None = None
    steps: int | None = None
    sample_every: float = 60.0  # seconds between sample grids
    save_every: float = 60.0  # seconds between checkpoints
    quiet: bool = False
    bf16: bool = False  # bf16 matrix products in training, over fp32 weights

    def less(self, seconds: float) -> Run:
        """The same run with `seconds` of its budget already spent."""
        return self if self.seconds is None else replace(self, seconds=max(1.0, self.seconds - seconds))


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) when not distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def make_optimizers(stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices (and convolutions, as matrices), AdamW for everything else."""
    matrices, others = [], []
    for name, p in stage.modules.named_parameters():
        if not p.requires_grad:
            continue
        p.grad = torch.zeros_like(p)  # kept for good: `as_matrix` shares it
        if p.ndim < 2 or any(word in name for word in stage.adamw_only):
            others.append(p)
        else:
            matrices.append(p if p.ndim == 2 else as_matrix(p))
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices, lr=stage.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            )
        )
    if others:
        lr = stage.adamw_lr or stage.lr
        optimizers.append(torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def as_matrix(kernel: nn.Parameter) -> nn.Parameter:
    """A convolution's kernel [O, I, h, w] as a matrix [O, I*h*w] that shares its memory and gradient."""
    last = kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()

    def flat(x: Tensor) -> Tensor:
        return (x.permute(0, 2, 3, 1) if last else x).flatten(1)

    matrix = nn.Parameter(flat(kernel.data))
    matrix.grad = flat(kernel.grad)
    if matrix.data_ptr() != kernel.data_ptr() or matrix.grad.data_ptr() != kernel.grad.data_ptr():
        raise ValueError(f"a kernel of {tuple(kernel.shape)} cannot be viewed as a matrix")
    return matrix


def average_over_ranks(parameters: list[nn.Parameter], numbers: Tensor) -> Tensor:
    """Average gradients in place over processes, together with `numbers` [n], which is returned averaged."""
    _, size = world()
    if size == 1:
        return numbers
    grads = [p.grad for p in parameters]
    flat = torch.cat([numbers, *[g.reshape(-1) for g in grads]])
    dist.all_reduce(flat)
    flat /= size
    offset = len(numbers)
    for g in grads:
        g.copy_(flat[offset : offset + g.numel()].view_as(g))
        offset += g.numel()
    return flat[: len(numbers)]


class Checkpoint:
    """The complete state of a stage in one file: weights, average, optimisers, step, clock.

    Written to a temporary file and renamed, so a reader sees the old or the new state, never half of one.
    """

    def __init__(self, path: Path):
        self.path = path

    def save(self, state: dict) -> None:
        """Write atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tmp = self.path.with_suffix(".tmp")
        with open(tmp, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, self.path)

    def load(self) -> dict | None:
        """The saved state, or None when there is none. Only tensors and plain values are unpickled."""
        if not self.path.exists():
            return None
        return torch.load(self.path, weights_only=True, map_location="cpu")


class Clock:
    """Progress of a stage in [0, 1], from steps or from seconds.

    With a budget in seconds the constant phase lasts until 1 - DECAY of it is spent; the number of decay
    steps is then fixed from the rate seen so far, so a stage ends on time and its schedule is in steps.
    """

    def __init__(self, run: Run):
        self.seconds, self.total = run.seconds, run.steps
        if (self.seconds is None) == (self.total is None):
            raise ValueError("give a stage either seconds or steps")
        self.elapsed, self.step = 0.0, 0

    def progress(self) -> float:
        """Fraction of the stage done."""
        if self.total is not None:
            return min(1.0, self.step / max(1, self.total))
        return min(1.0 - DECAY, self.elapsed / self.seconds)

    def lr_scale(self) -> float:
        """Learning-rate multiplier: linear warm-up, constant, linear decay."""
        warmup = min(1.0, (self.step + 1) / WARMUP)
        return warmup * min(1.0, (1.0 - self.progress()) / DECAY)

    def tick(self, elapsed: float) -> None:
        """One step done, `elapsed` seconds into the stage."""
        self.step, self.elapsed = self.step + 1, elapsed
        if self.total is None and elapsed >= (1 - DECAY) * self.seconds:
            left = max(0.0, self.seconds - elapsed) * self.step / elapsed
            self.total = self.step + max(1, round(left))
            # progress() must go on from 1 - DECAY: count steps so that it does
            self.step, self.total = self._rescale(self.total - self.step)

    def _rescale(self, left: int) -> tuple[int, int]:
        total = max(1, round(left / DECAY))
        self.offset = self.step - (total - left)
        return total - left, total

    offset = 0  # steps really taken minus steps on the schedule

    def state(self) -> dict:
        """Plain values for a checkpoint."""
        return dict(vars(self))

    def restore(self, state: dict) -> None:
        """Continue from `state`."""
        vars(self).update(state)

    @property
    def steps_taken(self) -> int:
        return self.step + self.offset

    @property
    def finished(self) -> bool:
        return self.total is not None and self.step >= self.total


@lru_cache(maxsize=1)
def bf16_pays() -> bool:
    """Whether this CPU multiplies matrices at least twice as fast in bf16 as in fp32: measured."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        a @ b
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        seconds.append(time.perf_counter() - start)
    return seconds[0] > 2 * seconds[1]


@contextmanager
def mixed_precision(enabled: bool) -> Iterator[None]:
    """bf16 matrix products over fp32 weights on the CPU; attention as plain products, whose bf16
    backward is several times faster there than the fused one's."""
    if not enabled:
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def _rng(run: Run, stage: Stage, step: int) -> np.random.Generator:
    rank, _ = world()
    return np.random.default_rng([run.seed, zlib.crc32(stage.name.encode()), step, rank])


def _update_average(average: list[Tensor], parameters: list[Tensor], decay: float) -> None:
    torch._foreach_lerp_(average, parameters, 1.0 - decay)


def _take_step(stage, optimizers, parameters, run, clock) -> dict[str, float]:
    """One optimiser step; returns the metrics averaged over processes."""
    with mixed_precision(run.bf16):
        loss, metrics = stage.loss(_rng(run, stage, clock.steps_taken), clock.progress())
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=False)
    loss.backward()
    metrics = {"loss": loss.detach(), **metrics}
    numbers = torch.tensor([float(torch.as_tensor(v).detach()) for v in metrics.values()])
    numbers = average_over_ranks(parameters, numbers)
    norm = float(nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True))
    if not (math.isfinite(norm) and torch.isfinite(numbers).all()):
        raise FloatingPointError(
            f"stage {stage.name}, step {clock.steps_taken}: loss or gradient is not finite ({metrics}); "
            f"the last good checkpoint is kept"
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * clock.lr_scale()
        optimizer.step()
    return {**dict(zip(metrics, numbers.tolist(), strict=True)), "grad_norm": norm}


def _shared_clock(seconds: float) -> float:
    """The clock of process 0, so that all processes take the same decisions."""
    if world()[1] == 1:
        return seconds
    value = torch.tensor([seconds])
    dist.broadcast(value, 0)
    return float(value)


def fit(stage: Stage, run: Run) -> dict:
    """Train `stage` for its budget; leaves the averaged weights in its modules. Returns a summary.

    Resumes from `run.folder/<stage>.ckpt` when there is one. Writes metrics.jsonl and, through
    `stage.sample`, <stage>_NNNNNN.png. Raises FloatingPointError on a loss or gradient that is not finite.
    """
    rank, size = world()
    parameters = [p for p in stage.modules.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimizers = make_optimizers(stage)
    clock, checkpoint = Clock(run), Checkpoint(run.folder / f"{stage.name}.ckpt")
    torch.manual_seed(run.seed * 1000 + rank)
    if state := checkpoint.load():
        _restore(stage, optimizers, average, clock, state)
    start = time.perf_counter() - clock.elapsed
    last_save = last_sample = clock.elapsed
    bar = tqdm(desc=stage.name, disable=run.quiet or rank > 0, total=100, unit="%", leave=True)
    window: list[dict] = []
    while not clock.finished:
        window.append(_take_step(stage, optimizers, parameters, run, clock))
        ramp = min(stage.ema, (1 + clock.steps_taken) / (10 + clock.steps_taken))
        _update_average(average, parameters, ramp)
        clock.tick(_shared_clock(time.perf_counter() - start))
        due = clock.steps_taken % 50 == 0 or clock.finished
        if rank == 0 and due:
            _report(stage, run, clock, window, bar)
            window = []
        if rank == 0 and clock.elapsed - last_save > run.save_every and not clock.finished:
            last_save = clock.elapsed
            checkpoint.save(_state(stage, optimizers, average, clock))
        if rank == 0 and stage.sample and clock.elapsed - last_sample > run.sample_every:
            last_sample = clock.elapsed
            with swapped(parameters, average):
                _sample(stage, run, clock, f"{clock.steps_taken:06d}")
    bar.close()
    for p, a in zip(parameters, average, strict=True):
        p.data.copy_(a)
    if rank == 0:
        checkpoint.save(_state(stage, optimizers, average, clock))
        if stage.sample:
            _sample(stage, run, clock, "final")
    return {"stage": stage.name, "steps": clock.steps_taken, "seconds": clock.elapsed, "ranks": size}


class swapped:
    """Context in which `parameters` hold the values of `average`."""

    def __init__(self, parameters: list[nn.Parameter], average: list[Tensor]):
        self.parameters, self.average = parameters, average

    def __enter__(self) -> None:
        self.kept = [p.detach().clone() for p in self.parameters]
        for p, a in zip(self.parameters, self.average, strict=True):
            p.data.copy_(a)

    def __exit__(self, *exc) -> None:
        for p, k in zip(self.parameters, self.kept, strict=True):
            p.data.copy_(k)


def _state(stage, optimizers, average, clock) -> dict:
    return {
        "modules": stage.modules.state_dict(),
        "average": average,
        "optimizers": [o.state_dict() for o in optimizers],
        "clock": clock.state(),
        "torch_rng": torch.get_rng_state(),
    }


def _restore(stage, optimizers, average, clock, state) -> None:
    stage.modules.load_state_dict(state["modules"])
    for a, saved in zip(average, state["average"], strict=True):
        a.copy_(saved)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    clock.restore(state["clock"])
    if clock.finished:
        for p, a in zip(
            [p for p in stage.modules.parameters() if p.requires_grad], average, strict=True
        ):
            p.data.copy_(a)


def _report(stage: Stage, run: Run, clock: Clock, window: list[dict], bar: tqdm) -> None:
    mean = {k: float(np.mean([w[k] for w in window])) for k in window[0]}
    line = {
        "stage": stage.name,
        "step": clock.steps_taken,
        "seconds": round(clock.elapsed, 1),
        "lr_scale": round(clock.lr_scale(), 4),
        **{k: round(v, 5) for k, v in mean.items()},
    }
    _log(run, line)
    done = clock.progress() if run.steps else clock.elapsed / run.seconds
    bar.n = round(100 * min(1.0, done), 1)
    rate = clock.steps_taken / max(clock.elapsed, 1e-9)
    bar.set_postfix_str(f"{rate:.1f} step/s loss {mean['loss']:.4f}")


def _sample(stage: Stage, run: Run, clock: Clock, tag: str) -> None:
    numbers = stage.sample(run.folder / f"{stage.name}_{tag}.png")
    line = {"stage": stage.name, "step": clock.steps_taken, "seconds": round(clock.elapsed, 1)}
    _log(run, {**line, **{k: round(v, 5) for k, v in numbers.items()}})


def _log(run: Run, line: dict) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "metrics.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy without gradients, in evaluation mode."""
    return copy.deepcopy(module).eval().requires_grad_(False)

