"""Training: one loop for every stage of the paper, over any configuration.

A stage is a set of trainable modules and a function that returns the loss of one batch; the loop
adds what all stages share: Muon on the hidden matrices and AdamW on the rest, warm-up / constant /
linear decay, an exponential moving average of the weights, data parallelism over processes,
metrics, sample grids, checkpoints and resume. Batches and noise are a pure function of (seed,
stage, step, rank), so there is no data position and no state of a random generator to save.

Losses: the AR model's is `autoregressive.ar_loss` (paper section 3.2, lambdas 3, 1.5, 1.5); both
decoders' is `flow.rf_loss` (official `train_generation_decoder` / `train_editing_decoder`).
"""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from .muon import Muon

DECAY = 0.4  # the last part of every stage, over which the learning rate falls to zero
WARMUP = 50  # steps
BLOCK = 128  # rows of a large matrix that Muon orthogonalises together
REPORT = 50  # steps whose metrics are averaged into one line
BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"

# ------------------------------------------------------------------------ what is trained, how long


@dataclass
class Stage:
    """What one stage trains: modules, the loss of a batch, and how to draw samples of progress.

    `loss(rng, progress)` returns the scalar to minimise and a dict of numbers to log, always the
    same names; `progress` runs from 0 to 1. Its noise may come from `rng` or from torch's own
    generator. `sample(path)` writes a PNG and returns numbers to log. Muon leaves out parameters
    whose name holds a word of `adamw_only` (embeddings, heads, first and last layers). A loss over
    a user's file leaves in `lines` what the latest batch was made of, for the message of a failure.
    """

    name: str
    modules: nn.ModuleDict
    loss: Callable[[np.random.Generator, float], tuple[Tensor, dict]]
    lr: float = 3e-3
    adamw_lr: float | None = None
    ema: float = 0.998
    adamw_only: tuple[str, ...] = ()
    sample: Callable[[Path], dict[str, float]] | None = None
    lines: list[str] = field(default_factory=list)


@dataclass
class Run:
    """Where and how long: a folder, a seed, and either seconds or steps for the stage at hand."""

    folder: Path
    seed: int = 0
    seconds: float | None = None
    steps: int | None = None
    spent: float = 0.0  # seconds of the budget that went before the first step
    sample_every: float = 60.0  # seconds between sample grids
    save_every: float = 60.0  # seconds between checkpoints
    quiet: bool = False
    bf16: bool = False  # bf16 matrix products in training, over fp32 weights

    def less(self, seconds: float) -> Run:
        """The same run with `seconds` of its budget already spent."""
        return replace(self, spent=self.spent + seconds)


class Schedule:
    """Progress of a stage from 0 to 1, and its learning rate: warm-up, constant, linear decay to 0.

    Every step moves progress by (1 - progress) / (steps left). A budget in steps knows how many are
    left; one in seconds divides the time left by the pace so far. The stage thus ends on time when
    the machine changes its speed, and neither progress nor the learning rate ever jumps.
    """

    def __init__(self, seconds: float | None = None, steps: int | None = None):
        if (seconds is None) == (steps is None):
            raise ValueError("give a stage either seconds or steps")
        self.seconds, self.steps = seconds, steps
        self.step, self.elapsed, self.progress, self.left = 0, 0.0, 0.0, 1.0

    @property
    def finished(self) -> bool:
        """Whether no whole step is left."""
        return self.left < 1

    @property
    def lr_scale(self) -> float:
        """What the learning rates are multiplied with at the coming step."""
        return min(1.0, (self.step + 1) / WARMUP) * min(1.0, (1 - self.progress) / DECAY)

    def tick(self, elapsed: float) -> None:
        """A step is done, `elapsed` seconds into the stage."""
        self.step, self.elapsed = self.step + 1, elapsed
        if self.steps is not None:
            self.left = self.steps - self.step
        else:  # after a long stall the decay still takes some steps, each a fifth nearer the end
            in_time = (self.seconds - elapsed) * self.step / max(elapsed, 1e-9)
            self.left = max(in_time, 0.8 * self.left - 1)
        self.progress += (1 - self.progress) / (1 + max(0.0, self.left))

    def state(self) -> dict:
        """Plain values for a checkpoint; the budget is the run's own."""
        return {name: getattr(self, name) for name in ("step", "elapsed", "progress", "left")}

    def restore(self, state: dict) -> None:
        """Go on from `state`."""
        vars(self).update(state)


class Checkpoint:
    """The complete state of a stage in one file, and the one before it in `NAME.previous.ckpt`.

    Written beside it and renamed, so that a reader finds the old state or the new one, never half
    of one; when the disk fails, the old one stays.
    """

    def __init__(self, path: Path):
        self.path, self.previous = path, path.with_stem(f"{path.stem}.previous")

    @property
    def kept(self) -> str:
        """What a failure leaves, for its message."""
        there = self.path.exists() or self.previous.exists()
        return "the last good checkpoint is kept" if there else "there is no checkpoint yet"

    def save(self, state: dict) -> None:
        """Write atomically. OSError, one line, when the state cannot be written."""
        partial = self.path.with_suffix(".partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            if self.path.exists():
                os.replace(self.path, self.previous)  # killed after this: `load` falls back to it
            os.replace(partial, self.path)
        except (OSError, RuntimeError) as error:  # torch tells of a full disk by RuntimeError
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            cause: BaseException = error
            while not isinstance(cause, OSError) and cause.__context__:
                cause = cause.__context__
            reason = str(cause).split("\n")[0]
            told = f"cannot save the checkpoint {self.path}: {reason}; {self.kept}"
            raise OSError(told) from error

    def load(self) -> dict | None:
        """The saved state, or None when there is none. Only tensors and plain values are unpickled.

        Raises ValueError when the file is none of ours.
        """
        path = self.path if self.path.exists() else self.previous
        if not path.exists():
            return None
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            if not isinstance(state, dict):
                raise ValueError(type(state).__name__)
            return state
        except OSError:
            raise
        except Exception as error:  # bytes that are no checkpoint fail in a dozen ways
            reason = str(error).split("\n")[0]
            older = path is self.path and self.previous.exists()
            told = f"{path}: not a checkpoint ({reason}); delete it"
            raise ValueError(told + " to go on from the one before" * older) from None


# ---------------------------------------------------------------------------------------- processes


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) when not distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def broadcast(*values: float) -> list[float]:
    """The values of process 0, so that all processes take the same decisions."""
    if world()[1] == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64)
    dist.broadcast(numbers, 0)
    return numbers.tolist()


def all_reduce_mean_(*numbers: Tensor) -> None:
    """Average tensors in place over processes."""
    _, size = world()
    if size > 1:
        for x in numbers:
            dist.all_reduce(x)
            x /= size


def make_rng(seed: int, stage: str, step: int, part: int) -> np.random.Generator:
    """The generator of a part of a step's batch; torch's own is seeded from it."""
    rng = np.random.default_rng([seed, zlib.crc32(stage.encode()), step, part])
    torch.manual_seed(int(rng.integers(2**62)))
    return rng


class Interrupt:
    """Whether Ctrl-C was heard.

    No `threading.Event`: a second signal, while the handler of the first holds its lock, would wait
    for that lock for ever.
    """

    heard = False

    def hear(self, *_) -> None:
        """The signal handler."""
        self.heard = True


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Within, Ctrl-C is noted instead of breaking off in the middle of a step."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt  # only the main thread hears signals
        return
    before = signal.signal(signal.SIGINT, interrupt.hear)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


# --------------------------------------------------------------------------------------- optimisers


def flat_gradient(parameters: list[nn.Parameter]) -> Tensor:
    """One buffer [n] that holds the gradients of all for good, each laid out as its parameter."""
    sizes = [p.numel() for p in parameters]
    flat = torch.zeros(sum(sizes))
    for p, part in zip(parameters, flat.split(sizes), strict=True):
        p.grad = part.as_strided(p.shape, p.stride())
    return flat


def make_optimizers(stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices (and convolutions, as such); AdamW for all the rest.

    The gradients must be there already, see `flat_gradient`: blocks and matrices share them.
    """
    matrices, others = [], []
    for name, p in stage.modules.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2 or any(word in name for word in stage.adamw_only):
            others.append(p)
        else:
            matrices += row_blocks(p if p.ndim == 2 else as_matrix(p))
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, stage.lr))
    if others:
        lr = stage.adamw_lr or stage.lr
        optimizers.append(torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def as_matrix(kernel: nn.Parameter) -> nn.Parameter:
    """A convolution's kernel [O, I, h, w] as a matrix [O, I*h*w] that shares memory and gradient.

    The columns of a kernel in channels_last order are (h, w, I), which is the same to Muon.
    """
    last = not kernel.is_contiguous()

    def flat(x: Tensor) -> Tensor:
        return (x.movedim(1, -1) if last else x).flatten(1)

    matrix = nn.Parameter(flat(kernel.data))
    matrix.grad = flat(kernel.grad)
    if matrix.data_ptr() != kernel.data_ptr() or matrix.grad.data_ptr() != kernel.grad.data_ptr():
        raise ValueError(f"a kernel of {tuple(kernel.shape)} cannot be viewed as a matrix")
    return matrix


def row_blocks(matrix: nn.Parameter) -> list[nn.Parameter]:
    """A matrix [m, n] as blocks of BLOCK rows that share memory and gradient, if both sides are
    longer than twice that: Muon's work grows with the cube of the shorter one."""
    if min(matrix.shape) <= 2 * BLOCK:
        return [matrix]
    blocks = []
    for rows, grad in zip(matrix.data.split(BLOCK), matrix.grad.split(BLOCK), strict=True):
        blocks.append(nn.Parameter(rows))
        blocks[-1].grad = grad
    return blocks


# ---------------------------------------------------------------------------------------- precision


@lru_cache(maxsize=1)
def bf16_is_faster() -> bool:
    """Whether this CPU multiplies matrices at least twice as fast in bf16 as in fp32: measured.

    On one thread and by the best of many: others may use the machine.
    """
    threads, best = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            a @ b
            seconds.append(time.perf_counter() - start)
        best.append(min(seconds))
    torch.set_num_threads(threads)
    return best[0] > 2 * best[1]


class _FullAttention(TorchFunctionMode):
    """Within, attention takes and gives fp32 under autocast too."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return function(*(x.float() for x in args[:3]), *args[3:], **kwargs)


@contextmanager
def mixed_precision(enabled: bool) -> Iterator[None]:
    """bf16 matrix products over fp32 weights on the CPU; attention in fp32, where the backward of
    the fused kernel is several times faster than in bf16."""
    if not enabled:
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), _FullAttention():
        yield


# ----------------------------------------------------------------------------------------- the loop


def fit(stage: Stage, run: Run) -> dict:
    """Train `stage` for its budget; leaves the averaged weights in its modules. Returns a summary.

    Goes on from `run.folder/<stage>.ckpt` when there is one, and is done at once when that is
    finished. Writes metrics.jsonl and, through `stage.sample`, <stage>_NNNNNN.png. Raises
    FloatingPointError, naming the step, on a loss, gradient or weight that is not finite; OSError
    when something cannot be written; KeyboardInterrupt after Ctrl-C, with the last step saved.
    """
    trainer = Trainer(stage, run)
    if not trainer.schedule.finished:
        with deferred_interrupt() as interrupt, trainer.bar, trainer.mention_checkpoint():
            trainer.train(interrupt)
            trainer.finish()
        if interrupt.heard:
            raise KeyboardInterrupt
    return trainer.summary()


class Trainer:
    """A stage under way: weights, their average, optimisers, schedule, and what is written when."""

    def __init__(self, stage: Stage, run: Run):
        self.checkpoint = Checkpoint(run.folder / f"{stage.name}.ckpt")
        state = self.checkpoint.load() or {}
        run = replace(run, bf16=state.get("bf16", run.bf16))  # as it began, whatever pays now
        self.stage, self.run = stage, run
        self.rank, self.size = world()
        self.parameters = [p for p in stage.modules.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.gradient = flat_gradient(self.parameters)
        self.optimizers = make_optimizers(stage)
        seconds = None if run.seconds is None else broadcast(max(1.0, run.seconds - run.spent))[0]
        self.schedule = Schedule(seconds, run.steps)
        self.metrics: dict[str, float] = {}  # the latest of each name
        self.window: list[dict[str, float]] = []  # of the steps since the last report
        if state:
            self.restore(state)
        self.saved = self.sampled = self.schedule.elapsed
        silent = run.quiet or self.rank > 0 or self.schedule.finished
        start = {"total": 1.0, "initial": self.schedule.progress, "bar_format": BAR}
        self.bar = tqdm(desc=stage.name, disable=silent, smoothing=0, **start)

    @contextmanager
    def mention_checkpoint(self) -> Iterator[None]:
        """Within, what fails to be written or read also says what became of the work."""
        try:
            yield
        except OSError as error:
            told, kept = str(error), self.checkpoint.kept
            raise OSError(told if kept in told else f"{told}; {kept}") from error

    def train(self, interrupt: Interrupt) -> None:
        """Steps until the budget is spent."""
        start = time.perf_counter() - self.schedule.elapsed
        while not self.schedule.finished:
            numbers = self.take_step()
            if self.rank == 0:
                self.window.append(numbers)
            elapsed, stop = broadcast(time.perf_counter() - start, interrupt.heard)
            self.schedule.tick(elapsed)
            if self.rank == 0:
                self.log_and_checkpoint(bool(stop))
            if stop and not self.schedule.finished:
                raise KeyboardInterrupt

    def take_step(self) -> dict[str, float]:
        """One step of the optimisers and of the average; its metrics, averaged over processes."""
        numbers, scale = self.gradients(), self.schedule.lr_scale
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
            optimizer.step()
        ramp = (1 + self.schedule.step) / (10 + self.schedule.step)
        with torch.no_grad():
            weight = 1.0 - min(self.stage.ema, ramp)
            torch._foreach_lerp_(self.average, self.parameters, weight)
        return numbers

    def gradients(self) -> dict[str, float]:
        """Fill the gradients with those of one batch over all processes; its metrics."""
        rng = self.make_rng()
        with mixed_precision(self.run.bf16):
            loss, metrics = self.stage.loss(rng, self.schedule.progress)
        self.gradient.zero_()
        loss.backward()
        metrics = {"loss": loss, **metrics}
        values = torch.tensor([float(torch.as_tensor(v).detach()) for v in metrics.values()])
        all_reduce_mean_(self.gradient, values)
        norm = self.gradient.norm()
        numbers = dict(zip(metrics, values.tolist(), strict=True)) | {"grad_norm": float(norm)}
        if not (math.isfinite(numbers["loss"]) and norm.isfinite()):
            self.raise_nonfinite("the loss or its gradient", numbers)
        self.gradient *= (1.0 / (norm + 1e-6)).clamp_max(1.0)
        return numbers

    def raise_nonfinite(self, what: str, numbers: dict[str, float]) -> NoReturn:
        """Dump the state that led there; FloatingPointError with the step and how to see it again.

        The four numbers of `batch` make the batch; the dump, put in the place of the checkpoint,
        leads to the same step again. `gradients` names the parameters where it is not finite.
        """
        batch = (self.run.seed, self.stage.name, self.schedule.step, self.rank)
        named = self.stage.modules.named_parameters()
        broken = [k for k, p in named if p.grad is not None and not p.grad.isfinite().all()]
        lines = sorted(set(self.stage.lines))
        made_of = f", of {', '.join(lines)}" if lines else ""
        facts = {"batch": batch, "lines": lines, "numbers": numbers, "gradients": broken}
        kept, path = self.checkpoint.kept, self.checkpoint.path
        dump = path.with_stem(f"{path.stem}.nonfinite-{self.rank}")
        left = f"what led here is in {dump}"
        try:
            Checkpoint(dump).save(self.state() | {"nonfinite": facts})
        except OSError as error:
            left = str(error).split(";")[0]
        raise FloatingPointError(
            f"stage {self.stage.name}, step {self.schedule.step}: {what} is not finite ({numbers}; "
            f"batch of seed, stage, step, rank {batch}{made_of}); {kept}, {left}"
        )

    def make_rng(self) -> np.random.Generator:
        """The generator of this step and process; torch's own is seeded from it."""
        return make_rng(self.run.seed, self.stage.name, self.schedule.step, self.rank)

    def log_and_checkpoint(self, stop: bool) -> None:
        """Progress, metrics, a checkpoint (at once on `stop`), a sample grid."""
        now = self.schedule
        self.bar.update(now.progress - self.bar.n)
        if now.step % REPORT == 0 or now.finished or stop:
            self.report()
        if now.finished:
            return
        if stop or now.elapsed - self.saved > self.run.save_every:
            self.saved = now.elapsed
            self.save()
        if not stop and now.elapsed - self.sampled > self.run.sample_every:
            self.sampled = now.elapsed
            with swapped(self.parameters, self.average):
                self.sample(f"{now.step:06d}")

    def finish(self) -> None:
        """Leave the average in the modules, the last grid and checkpoint in the folder."""
        put(self.average, self.parameters)
        if self.rank == 0:
            self.save()
            self.sample("final")

    def save(self) -> None:
        """Write a checkpoint; of weights that are not finite a dump instead, and stop."""
        weights = [p.detach() for p in (*self.parameters, *self.average)]
        if not nn.utils.get_total_norm(weights, foreach=True).isfinite():
            self.raise_nonfinite("a weight", {})
        self.checkpoint.save(self.state())

    def report(self) -> None:
        """Log the mean of the metrics since the last report."""
        mean = {k: float(np.mean([w[k] for w in self.window])) for k in self.window[0]}
        self.window = []
        self.log({"lr_scale": self.schedule.lr_scale} | mean)
        rate = self.schedule.step / max(self.schedule.elapsed, 1e-9)
        self.bar.set_postfix_str(f"{rate:.1f} step/s, loss {mean['loss']:.4f}")

    def sample(self, tag: str) -> None:
        """Draw a sample grid, where the stage has one, and log what it measures."""
        if self.stage.sample is None:
            return
        self.run.folder.mkdir(parents=True, exist_ok=True)
        self.log(self.stage.sample(self.run.folder / f"{self.stage.name}_{tag}.png"))

    def log(self, numbers: dict[str, float]) -> None:
        """Append a line to metrics.jsonl."""
        numbers = {k: round(float(v), 5) for k, v in numbers.items()}
        self.metrics |= numbers
        where = {"stage": self.stage.name, "step": self.schedule.step}
        line = where | {"seconds": round(self.schedule.elapsed, 1)} | numbers
        self.run.folder.mkdir(parents=True, exist_ok=True)
        with open(self.run.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def summary(self) -> dict:
        """What was done; `seconds` include what was spent before the first step."""
        return {
            "stage": self.stage.name,
            "steps": self.schedule.step,
            "seconds": self.schedule.elapsed + self.run.spent,
            "ranks": self.size,
            "metrics": self.metrics,
        }

    def state(self) -> dict:
        """Everything that the next step depends on."""
        return {
            "modules": self.stage.modules.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "schedule": self.schedule.state(),
            "bf16": self.run.bf16,
            "metrics": self.metrics,
        }

    def restore(self, state: dict) -> None:
        """Go on from `state`, in place. ValueError when it is another stage's or version's."""
        try:
            self.stage.modules.load_state_dict(state["modules"])
            put(state["average"], self.average)
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                rates = [group["base_lr"] for group in optimizer.param_groups]
                optimizer.load_state_dict(saved)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["base_lr"] = rate  # the stage's own, should it have changed since
            self.schedule.restore(state["schedule"])
            self.metrics = state["metrics"]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{self.checkpoint.path}: does not fit this stage ({reason})"
            ) from None


@torch.no_grad()
def put(values: list[Tensor], goal: list[Tensor]) -> None:
    """Copy `values` into the tensors of `goal`, in place. ValueError when they are not as many."""
    for g, v in zip(goal, values, strict=True):
        g.copy_(v)


@contextmanager
def swapped(parameters: list[nn.Parameter], average: list[Tensor]) -> Iterator[None]:
    """Within, `parameters` hold the values of `average`."""
    kept = [p.detach().clone() for p in parameters]
    put(average, parameters)
    try:
        yield
    finally:
        put(kept, parameters)


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy without gradients, in evaluation mode."""
    return copy.deepcopy(module).eval().requires_grad_(False)
