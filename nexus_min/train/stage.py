"""What one stage of training is: its modules and loss, its budget, its random numbers.

Batches and noise are a pure function of (seed, stage, step): a checkpoint thus holds neither a
position in the data nor the state of a random generator.
"""

from __future__ import annotations

import time
import timeit
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

DECAY = 0.4  # share of a stage, at its end, over which the learning rate falls to zero
WARMUP = 50  # steps


@dataclass
class Stage:
    """What one stage trains: modules, the loss of a batch, and a sample of progress."""

    name: str
    modules: nn.ModuleDict
    # (rng, progress in [0, 1]) -> the scalar to minimize, and numbers to log. The noise comes from
    # `rng` or from torch's own generator.
    loss: Callable[[np.random.Generator, float], tuple[Tensor, dict]]
    lr: float = 3e-3
    adamw_lr: float | None = None
    ema: float = 0.998
    adamw_only: tuple[str, ...] = ()  # parts of names that Muon leaves out (embeddings, heads)
    sample: Callable[[Path], dict[str, float]] | None = None  # writes a PNG; numbers to log
    lines: list[str] = field(default_factory=list)  # "file:line" of the latest batch, for errors


@dataclass
class Run:
    """The folder and the seed of a run, and the budget of its stage: either seconds or steps."""

    folder: Path
    seed: int = 0
    seconds: float | None = None
    steps: int | None = None
    elapsed_before: float = 0.0  # seconds of the budget that are spent before the first step
    sample_every: float = 60.0  # seconds
    save_every: float = 60.0  # seconds
    quiet: bool = False
    bf16: bool = False  # bf16 matrix products in training, over fp32 weights
    settings: dict = field(default_factory=dict)  # of the command, for `changes`

    def after(self, seconds: float) -> Run:
        return replace(self, elapsed_before=self.elapsed_before + seconds)


class Schedule:
    """Progress of a stage from 0 to 1, and its learning rate: warm-up, constant, linear decay.

    Every step moves progress by (1 - progress) / (steps left). A budget in steps knows how many
    are left; a budget in seconds divides the time left by the pace so far. So the stage ends on
    time when the machine changes its speed, and the learning rate never jumps.
    """

    def __init__(self, seconds: float | None = None, steps: int | None = None):
        if (seconds is None) == (steps is None):
            raise ValueError("give a stage either seconds or steps")
        self.seconds, self.steps = seconds, steps
        self.step, self.elapsed, self.progress, self.left = 0, 0.0, 0.0, 1.0

    def __iter__(self) -> Iterator[int]:
        """The number of each coming step."""
        while not self.finished:
            yield self.step

    @property
    def finished(self) -> bool:
        return self.left < 1

    @property
    def lr_scale(self) -> float:
        return min(1.0, (self.step + 1) / WARMUP) * min(1.0, (1 - self.progress) / DECAY)

    def tick(self, elapsed: float) -> None:
        """A step ends, `elapsed` seconds into the stage."""
        self.step, self.elapsed = self.step + 1, elapsed
        if self.steps is not None:
            self.left = self.steps - self.step
        else:  # after a long stall the decay still takes some steps
            in_time = (self.seconds - elapsed) * self.step / max(elapsed, 1e-9)
            self.left = max(in_time, 0.8 * self.left - 1)
        self.progress += (1 - self.progress) / (1 + max(0.0, self.left))

    def restore(self, saved: dict, is_extended: bool) -> None:
        """Go on as `state` said; with a larger budget than then, also after the end."""
        vars(self).update(saved)
        in_time = (self.seconds or 0.0) - self.elapsed
        more = self.steps - self.step if self.steps else in_time * self.step / (self.elapsed or 1.0)
        if self.finished and is_extended and more >= 1:
            self.left, self.progress = more, self.step / (self.step + more)

    def state(self) -> dict:
        return {name: getattr(self, name) for name in ("step", "elapsed", "progress", "left")}


class Clock:
    """Seconds of work since it was made, on top of `elapsed`: a pause hardly counts.

    A stopped process or a sleeping machine takes no time of the processor; each call counts at most
    twenty times that, and a second, of the time on the wall.
    """

    def __init__(self, elapsed: float = 0.0):
        self.elapsed, self.last = elapsed, (time.perf_counter(), time.process_time())

    def __call__(self) -> float:
        wall, work = now = time.perf_counter(), time.process_time()
        seconds = min(wall - self.last[0], 1 + 20 * (work - self.last[1]))
        self.elapsed, self.last = self.elapsed + seconds, now
        return self.elapsed


def changes(before: dict, now: dict) -> str:
    """What a repeated command changes: "seed was 0, is 1"; "" for nothing."""
    names = [name for name in now if name in before and before[name] != now[name]]
    return ", ".join(f"{name} was {before[name]}, is {now[name]}" for name in names)


def make_rng(seed: int, stage: str, step: int, part: int = 0) -> np.random.Generator:
    """The generator of one step, or of one part of its batch; it also seeds torch's own."""
    rng = np.random.default_rng([seed, zlib.crc32(stage.encode()), step, part])
    torch.manual_seed(int(rng.integers(2**62)))
    return rng


@lru_cache(maxsize=1)
def bf16_is_faster() -> bool:
    """Whether this CPU multiplies matrices much faster in bf16 than in fp32: measured.

    On one thread, and by the best of twenty times, since other programs may use the machine. With
    bf16 units the ratio is 2 or more, without them 1 or less; a run is repeated in one precision.
    """
    threads, best = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        best.append(min(timeit.repeat(lambda a=a, b=b: a @ b, number=1, repeat=20)))
    torch.set_num_threads(threads)
    return best[0] > 1.5 * best[1]


class _FullAttention(TorchFunctionMode):
    """Within, attention takes and returns fp32 also under autocast."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return function(*(x.float() for x in args[:3]), *args[3:], **kwargs)


@contextmanager
def mixed_precision(enabled: bool) -> Iterator[None]:
    """bf16 matrix products over fp32 weights on the CPU.

    Attention stays in fp32: there the backward pass of the fused kernel is several times faster.
    """
    if not enabled:
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), _FullAttention():
        yield
