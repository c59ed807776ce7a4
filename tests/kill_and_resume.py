"""Kill training with signal 9 at random moments, give the same command again, compare bit for bit.

    python tests/kill_and_resume.py                          # 20 kills over all stages
    python tests/kill_and_resume.py --rounds 4 --stages vae,ar --steps 4

First every stage is trained without interruption. A round then trains one stage from the same
beginning in a process that is killed once or more (in a step, while it saves, while it prepares or
ends), and goes on until it is finished. Compared are the bytes of every file of the model and all
that the checkpoint holds: weights, their average, optimisers, schedule. Batches are tiny, sample
grids are left out, and checkpoints are written at every step. Exit status 1 when a bit differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # which optimisers import at their first step: here once for all processes

import train_tiny
from nexus_min import training
from nexus_min.config import NexusGenConfig
from nexus_min.toy import base, pictures
from nexus_min.toy import stages as toy

NOT_COMPARED = ("elapsed", "metrics")  # the clock, and what was logged


def shrink() -> None:
    """Tiny batches, a save at every step, and no measurement that may turn out differently."""
    torch.set_num_threads(1)
    train_tiny.BATCH = dict.fromkeys(train_tiny.BATCH, 4)
    toy.POOL = 64
    tokenizer = train_tiny.build_tokenizer(NexusGenConfig.tiny())  # seconds: once for all processes
    train_tiny.build_tokenizer = lambda config: tokenizer
    few = pictures.scenes
    for module in (base, toy):  # pictures to measure or to embed before and after the steps
        module.scenes = lambda rng, n, *more, **named: few(rng, min(n, 8), *more, **named)
    train_tiny.Run = partial(training.Run, save_every=0.0)
    train_tiny.bf16_pays = lambda: False
    training.Trainer.sample = lambda *_: None


def start(folder: Path, stage: str, steps: int) -> tuple[int, int]:
    """A process that trains the stage: (its id, a pipe that gives a byte at every step)."""
    steps_out, steps_in = os.pipe()
    if child := os.fork():
        os.close(steps_in)
        return child, steps_out
    try:  # nothing of the parent's shall run here
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        inner = training.Trainer.take_step
        training.Trainer.take_step = lambda self: os.write(steps_in, b".") and inner(self)
        argv = ["--stage", stage, "--steps", str(steps), "--out", str(folder)]
        os._exit(train_tiny.main([*argv, "--workers", "1", "--quiet"]))
    except BaseException:
        traceback.print_exc()
        os._exit(3)


def wait(child: int, pipe: int) -> None:
    """Let the process finish."""
    os.close(pipe)
    if status := os.waitpid(child, 0)[1]:
        raise SystemExit(f"training failed: wait status {status}")


def kill(child: int, pipe: int, step: int, rng: random.Random) -> bool:
    """Kill the process some moment after that step began. False if it was finished before."""
    before = now = time.perf_counter()
    for _ in range(step):
        os.read(pipe, 1)  # a byte; nothing at once when the process has ended
        before, now = now, time.perf_counter()
    time.sleep(rng.random() * (now - before if step > 1 else 0.5))
    os.kill(child, signal.SIGKILL)
    os.close(pipe)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def numbers(state, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors and numbers of a checkpoint, by name."""
    if isinstance(state, dict | list | tuple):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        for key, value in pairs:
            if key not in NOT_COMPARED:
                yield from numbers(value, f"{name}/{key}")
    elif isinstance(state, torch.Tensor | float | int):
        yield name, torch.as_tensor(state)


def model_files(folder: Path) -> list[Path]:
    """What a model is read from: not the beginnings that a killed process leaves beside it."""
    files = (p for p in folder.rglob("model/**/*") if p.is_file())
    return [p for p in files if p.suffix != ".partial"]


def differences(folder: Path, reference: Path, stage: str) -> list[str]:
    """Names of what is not the same, bit for bit, after a stage."""
    folders = folder, reference
    states = [training.Checkpoint(f / f"{stage}.ckpt").load() for f in folders]
    got, want = (dict(numbers(state)) for state in states)
    odd = [k for k in got.keys() | want.keys() if k not in got or k not in want]
    odd += [k for k in got.keys() & want.keys() if not torch.equal(got[k], want[k])]
    pair = [{p.relative_to(f): p.read_bytes() for p in model_files(f)} for f in folders]
    names = pair[0].keys() | pair[1].keys()
    odd += [str(name) for name in names if pair[0].get(name) != pair[1].get(name)]
    return sorted(odd)


def one_round(before: Path, after: Path, stage: str, steps: int, rng: random.Random) -> tuple:
    """(steps at which a process was killed, differences to the run that was left alone)."""
    killed = []
    with tempfile.TemporaryDirectory(dir=before.parent) as place:
        folder = Path(shutil.copytree(before, Path(place, "run")))
        for _ in range(rng.choice((1, 1, 2, 3))):
            step = rng.randrange(steps + 1)  # from preparing to the last one, and saving it
            if not kill(*start(folder, stage, steps), step, rng):
                break
            killed.append(step)
        wait(*start(folder, stage, steps))
        return killed, differences(folder, after, stage)


def main() -> int:
    """Print a line for every round and the count; 1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="rounds with at least one kill")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--stages", default=",".join(train_tiny.SHARES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wanted, rng = args.stages.split(","), random.Random(args.seed)
    last = max(list(train_tiny.SHARES).index(stage) for stage in wanted)
    shrink()
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place, "0")]
        folders[0].mkdir()
        for i, stage in enumerate(list(train_tiny.SHARES)[: last + 1]):
            folders.append(Path(shutil.copytree(folders[-1], Path(place, str(i + 1)))))
            wait(*start(folders[-1], stage, args.steps))
        rounds, kills, bad = 0, 0, 0
        while rounds < args.rounds:
            stage = wanted[rounds % len(wanted)]
            i = list(train_tiny.SHARES).index(stage)
            killed, odd = one_round(folders[i], folders[i + 1], stage, args.steps, rng)
            told = f"differs: {', '.join(odd[:5])}" if odd else "equal bit for bit"
            at = f"killed in step {', '.join(map(str, killed))}" if killed else "finished too soon"
            print(f"{stage:10} {at}: {told}", flush=True)
            rounds, kills, bad = rounds + bool(killed), kills + len(killed), bad + bool(odd)
    print(f"{rounds} rounds with {kills} kills, {bad} of them with a difference")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
