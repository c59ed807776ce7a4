"""An AR step of the tiny model whose images were embedded before, beside one that embeds them.

    python -m tests.benchmarks.pool [STEPS]

The same examples and weights, in turns, on one thread; CPU time, with Muon and AdamW. The pool's
own time is counted: it embeds a part of its examples anew as training goes on.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import torch

from nexus_min.config import NexusGenConfig
from nexus_min.model.autoregressive import NexusGenAR
from nexus_min.tokenizer import QwenTokenizer
from nexus_min.toy import init, stages
from nexus_min.toy.vocabulary import build_tokenizer
from nexus_min.train.finetune import lines_loss
from nexus_min.train.optim import flat_gradient, make_optimizers
from nexus_min.train.stage import Run, make_rng


def main(steps: int = 40) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config, run = NexusGenConfig.tiny(), Run(Path(tempfile.mkdtemp()), steps=2000)
    ar, tokenizer = init.init_ar(NexusGenAR(config.ar)), QwenTokenizer(build_tokenizer(config))
    stage = stages.ar_stage(ar, tokenizer, config, 32, run)
    curriculum = stages.Curriculum(ar, config, run)
    optimizers = make_optimizers(stage)
    gradient = flat_gradient([p for p in stage.modules.parameters() if p.requires_grad])

    def from_images(rng, progress):
        lines = [stages.toy_line(ex) for ex in curriculum.draw(rng, 32, progress)[0]]
        return lines_loss(ar, tokenizer, config, lines, rng).loss

    def step(loss: Callable, number: int) -> tuple[float, float]:
        start, progress = time.process_time(), 0.5 + number / 2000
        value = loss(make_rng(0, "ar", number), progress)
        gradient.zero_()
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
        return time.process_time() - start, value.item()

    found = [
        (step(from_images, k), step(lambda *args: stage.loss(*args)[0], k)) for k in range(steps)
    ]
    for name, of in (("mean", mean), ("median", median)):
        old, new = (of([pair[i][0] for pair in found[2:]]) for i in (0, 1))
        print(f"{name}: from images {old:.4f} s, from the pool {new:.4f} s, {old / new:.3f}x")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
