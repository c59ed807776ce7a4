"""What the benchmarks share: alternating timing, the machine's ceiling, and the rows they print."""

from __future__ import annotations

import importlib
import os
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from types import ModuleType

import torch
from torch.profiler import profile

ROUNDS = 5
# On a busy machine CPU=1 with OMP_NUM_THREADS=1 counts what a process itself has worked.
clock = time.process_time if os.environ.get("CPU") else time.perf_counter


@dataclass
class Row:
    """One work, done by us and by a peer on the same weights and inputs."""

    work: str  # what is done, with its size
    dtype: str
    peer: str
    ours: float  # seconds
    theirs: float
    goal: float  # the ratio that we want
    error: float  # largest difference of the results over the largest of the peer's
    flop: float = 0.0  # of ours, matmuls only; 0 where a share of the ceiling tells nothing
    core: float | None = None  # share of ours in matmuls and attention: what no rewriting can win
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times as fast as the peer."""
        return self.theirs / self.ours

    @property
    def share(self) -> float | None:
        """Of what a large matmul of the same dtype does a second, here and now."""
        return self.flop / self.ours / ceiling(self.dtype) if self.flop else None

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self) | {"ratio": self.ratio, "share": self.share}

    def line(self) -> str:
        """For the terminal."""
        share, core = ("" if x is None else f"{x:.0%}" for x in (self.share, self.core))
        cells = (
            f"{self.work}, {self.dtype}", self.peer, seconds(self.ours), seconds(self.theirs),
            f"{self.ratio:.2f}x", f"{self.goal:g}x", share, core, f"{self.error:.1e}", self.note,
        )  # fmt: skip
        return "| " + " | ".join(cells) + " |"


def dtypes() -> list[torch.dtype]:
    """fp32, and bf16 where this machine has units for it: where it multiplies clearly faster."""
    both = ceiling("bfloat16") > 1.5 * ceiling("float32")
    return [torch.float32, torch.bfloat16] if both else [torch.float32]


def name_of(dtype: torch.dtype) -> str:
    """ "float32" """
    return str(dtype).removeprefix("torch.")


HEADER = (
    "| work | peer | ours | peer's | ratio | goal | of the ceiling | in matmuls and attention "
    "| difference | |\n|---|---|---|---|---|---|---|---|---|---|"
)


def seconds(x: float) -> str:
    """ "12.3 ms" """
    return f"{1e3 * x:.3g} ms" if x < 1 else f"{x:.3g} s"


def alternate(ours: Callable, theirs: Callable, rounds: int = ROUNDS) -> tuple[float, float]:
    """Least seconds of both, run in turn; each has run before, so that none warms up here.

    The least, since other work on the machine only ever adds.
    """
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, times in zip((ours, theirs), found, strict=True):
            start = clock()
            run()
            times.append(clock() - start)
    return min(found[0]), min(found[1])


CORE = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmv_", "aten::mv"}
CORE |= {"aten::_scaled_dot_product_flash_attention_for_cpu"}


def core_share(run: Callable) -> float:
    """Share of a run's time that torch's profiler finds in matmuls and attention."""
    with profile() as found:
        run()
    times = {e.key: e.self_cpu_time_total for e in found.key_averages()}
    return sum(times.get(name, 0.0) for name in CORE) / sum(times.values())


@cache
def ceiling(dtype: str) -> float:
    """FLOP a second of a 2048 x 2048 matmul on the threads torch uses now."""
    a = torch.randn(2048, 2048).to(getattr(torch, dtype))
    a @ a
    times = []
    for _ in range(5):
        start = clock()
        a @ a
        times.append(clock() - start)
    return 2 * 2048**3 / min(times)


@cache
def copy_speed() -> float:
    """Bytes a second, read and written, of a copy of 256 MB on the threads torch uses now."""
    a = torch.ones(1 << 26)
    b, times = torch.empty_like(a), []
    for _ in range(5):
        start = clock()
        b.copy_(a)
        times.append(clock() - start)
    return 2 * a.numel() * a.element_size() / min(times)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference, over the peer's largest absolute value."""
    ours, theirs = ours.float(), theirs.float()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def peak_rss() -> float:
    """Bytes this process has had in memory at most."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def require(name: str) -> ModuleType:
    """The package to compare with, or a line that says how to have it, and status 1."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(f"{error}: pip install -r tests/requirements.txt") from error


def measure(name: str, queue) -> None:
    """In a process of its own: send every row of a module as it is there, None at the end."""
    try:
        for row in importlib.import_module(f"tests.benchmarks.{name}").rows():
            queue.put((row.line(), row.as_dict()))
    finally:  # a peer that is missing says so and ends this process alone
        queue.put(None)
