"""How cost grows with tokens, batch and steps: the exponent between neighbouring sizes, and a plot.

    python -m tests.benchmarks.growth [PNG]    # default: growth.png beside this file

Seconds ~ size^e; e is the slope between two neighbours on logarithmic axes: 1 is proportional, 2
quadratic, below 1 a fixed cost that is shared. Widths and depths are reduced, so that all sizes fit
a small machine; where attention (4 L^2 C operations a block) overtakes the matrices (24 L C^2 in
the MMDiT) moves with the width C: L = 6 C, 3072 tokens here and 18432 at full width.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from nexus_min.config import MMDiTConfig, NexusGenConfig, TextConfig
from nexus_min.model import flow
from nexus_min.model.decoder import QwenDecoder
from nexus_min.sampling import velocity_field

from .common import require
from .diffusion import context, random_model

PLOT = Path(__file__).with_name("growth.png")
BLUE, GREY = "#0072B2", "#595959"  # of Okabe and Ito's palette, safe for the color-blind
WIDTH = MMDiTConfig(hidden_size=512, num_heads=4, depth=1, depth_single_blocks=1)
ROUNDS = 3


class Curve(NamedTuple):
    """Seconds of one kind of work at growing sizes."""

    title: str
    unit: str  # of the sizes
    sizes: Sequence[int]
    times: list[float]

    def exponents(self) -> list[float]:
        """Slopes between neighbours on logarithmic axes."""
        points = list(zip(self.sizes, self.times, strict=True))
        return [
            math.log(t2 / t1) / math.log(n2 / n1)
            for (n1, t1), (n2, t2) in zip(points, points[1:], strict=False)
        ]

    def bend(self) -> int:
        """The size on both sides of which the exponents differ most."""
        e = self.exponents()
        turns = [abs(b - a) for a, b in zip(e, e[1:], strict=False)]
        return self.sizes[1 + turns.index(max(turns))]

    def text(self) -> str:
        """For the terminal."""
        lines = [f"{self.title} ({self.unit})"]
        slopes = ["", *(f"{e:.2f}" for e in self.exponents())]
        for n, t, e in zip(self.sizes, self.times, slopes, strict=True):
            lines.append(f"  {n:>6} {1e3 * t:>10.1f} ms  {e}")
        return "\n".join([*lines, f"  bends most at {self.bend()}"])


def timed(run: Callable[[], object]) -> float:
    """Median seconds, after one round that is not counted."""
    times = []
    for k in range(ROUNDS + 1):
        start = time.perf_counter()
        run()
        if k:
            times.append(time.perf_counter() - start)
    return median(times)


def mmdit_tokens(sizes: Sequence[int] = (256, 512, 1024, 2048, 3072, 4608)) -> Curve:
    """One velocity of latents that make so many tokens, a sixteenth of them the context."""
    model, times = random_model(WIDTH), []
    for n in sizes:
        conditioning = context(n // 16, WIDTH)
        latents = torch.randn(1, WIDTH.in_channels // 4, 2, 2 * (n - n // 16))
        field = velocity_field(model, conditioning, *latents.shape[-2:], times=(0.5,))
        times.append(timed(lambda f=field, x=latents: f(x, torch.tensor([0.5]))))
    return Curve("MMDiT, one velocity, width 512", "tokens", sizes, times)


def decoder_tokens(sizes: Sequence[int] = (64, 128, 256, 512, 1024, 2048, 4096)) -> Curve:
    """One causal pass of the Qwen decoder."""
    config = TextConfig(512, 1536, 2, 4, 2, vocab_size=64)
    model, times = QwenDecoder(config).eval(), []
    for n in sizes:
        x, positions = torch.randn(1, n, 512), torch.arange(n).expand(3, 1, n)
        times.append(timed(lambda x=x, p=positions: model(x, p)))
    return Curve("Qwen decoder, one pass, width 512", "tokens", sizes, times)


def batch_sizes(sizes: Sequence[int] = (1, 2, 4, 8, 16)) -> Curve:
    """One velocity of so many images by the tiny MMDiT."""
    config = NexusGenConfig.tiny().mmdit
    model, conditioning, times = random_model(config), context(16, config), []
    field = velocity_field(model, conditioning, 8, 8, times=(0.5,))
    for n in sizes:
        x, t = torch.randn(n, config.in_channels // 4, 8, 8), torch.full((n,), 0.5)
        times.append(timed(lambda x=x, t=t: [field(x, t) for _ in range(4)]) / 4)
    return Curve("Tiny MMDiT, one velocity", "images a batch", sizes, times)


def step_numbers(sizes: Sequence[int] = (1, 2, 4, 8, 16, 32)) -> Curve:
    """A whole sampling by the tiny MMDiT, its modulations of all steps made ahead."""
    config = NexusGenConfig.tiny().mmdit
    model, conditioning, noise, times = (
        random_model(config),
        context(16, config),
        torch.randn(1, config.in_channels // 4, 8, 8),
        [],
    )
    for n in sizes:
        sigmas = flow.schedule(n)

        def sample(sigmas=sigmas) -> None:
            field = velocity_field(model, conditioning, 8, 8, times=sigmas[:-1].tolist())
            for _ in flow.denoise(field, noise, sigmas):
                pass

        times.append(timed(sample))
    return Curve("Tiny MMDiT, sampling", "steps", sizes, times)


def curves() -> Iterator[Curve]:
    """All four."""
    with torch.no_grad():
        for measure in (mmdit_tokens, decoder_tokens, batch_sizes, step_numbers):
            yield measure()


def plot(found: Sequence[Curve], path: Path) -> None:
    """One panel a curve, measured line and the slopes 1 and 2 through its first point."""
    plt = require("matplotlib.pyplot")
    figure, panels = plt.subplots(2, 2, figsize=(9, 7), constrained_layout=True)
    for panel, curve in zip(panels.flat, found, strict=True):
        n, t = curve.sizes, [1e3 * x for x in curve.times]
        for power, dashes in ((1, ":"), (2, "--")):
            line = [t[0] * (x / n[0]) ** power for x in n]
            panel.plot(n, line, dashes, color=GREY, linewidth=1, label=f"slope {power}")
        panel.plot(n, t, "o-", color=BLUE, label="measured")
        panel.axvline(curve.bend(), color=GREY, linewidth=0.6, label="bends most")
        panel.set(xscale="log", yscale="log", title=curve.title, xlabel=curve.unit)
        panel.set(ylabel="milliseconds", ylim=(0.5 * min(t), 3 * max(t)))
        panel.set_xticks(n, [str(x) for x in n])
        panel.minorticks_off()
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=120)


def main(path: Path) -> None:
    found = []
    for curve in curves():
        print(curve.text(), flush=True)
        found.append(curve)
    plot(found, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PLOT)
