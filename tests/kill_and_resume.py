"""Kill training with signal 9 at random moments, resume it, compare bit for bit.

    python tests/kill_and_resume.py                          # 20 kills over all stages
    python tests/kill_and_resume.py --rounds 4 --stages vae,ar --steps 4
    python tests/kill_and_resume.py --stages data,lora       # fine-tuning on a file of one's own

First every stage is trained without interruption. A round then trains one stage from the same
beginning in a process that is killed once or more (in a step, while it saves, while it prepares or
ends), and goes on until it is finished. Compared are the bytes of every file of the model and all
that the checkpoint holds: weights, their average, optimizers, schedule. Batches are tiny, sample
grids are left out, and checkpoints are written at every step. Exit status 1 when a bit differs.
"""

from __future__ import annotations

import argparse
import json
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

import numpy as np
import torch
import torch._dynamo  # which optimizers import at their first step: here once for all processes
from PIL import Image

import train_tiny
from nexus_min.config import NexusGenConfig
from nexus_min.toy import pictures, pretrain
from nexus_min.toy import stages as toy
from nexus_min.toy.tasks import sample_example
from nexus_min.train import trainer
from nexus_min.train.checkpoint import Checkpoint

OWN = {"data": [], "lora": ["--lora", "2"]}  # all stages of `--data`, one command
NOT_COMPARED = ("elapsed", "metrics")  # the clock, and what was logged


def shrink() -> None:
    """Tiny batches, a save at every step, and no measurement that may turn out differently."""
    torch.set_num_threads(1)
    train_tiny.BATCH = dict.fromkeys(train_tiny.BATCH, 4)
    toy.POOL = 64
    tokenizer = train_tiny.build_tokenizer(NexusGenConfig.tiny())  # seconds: once for all processes
    train_tiny.build_tokenizer = lambda config: tokenizer
    few = pictures.scenes
    for module in (pretrain, toy):  # images to measure or to embed before and after the steps
        module.scenes = lambda rng, n, *more, **named: few(rng, min(n, 8), *more, **named)
    train_tiny.Run = partial(train_tiny.Run, save_every=0.0)
    train_tiny.bf16_is_faster = lambda: False
    trainer.TrainState.sample = lambda *_: None


def write_data(folder: Path) -> None:
    """Two lines of every task in `own.jsonl`, and their images."""
    lines, rng = [], np.random.default_rng(0)
    for task in (toy.UND, toy.GEN, toy.EDIT) * 2:
        line = toy.toy_line(sample_example(rng, task))
        names = [f"{len(lines)}-{i}.png" for i in range(len(line["images"]))]
        for name, pixels in zip(names, line["images"], strict=True):
            Image.fromarray(pixels).save(folder / name)
        lines.append(json.dumps(line | {"images": names}) + "\n")
    (folder / "own.jsonl").write_text("".join(lines), "utf-8")


def command(folder: Path, stage: str, steps: int) -> list[str]:
    """The arguments of `train_tiny.py`."""
    what = ["--stage", stage]
    if stage in OWN:
        what = ["--data", str(folder / "own.jsonl"), *OWN[stage]]
    return [*what, "--steps", str(steps), "--out", str(folder), "--workers", "1", "--quiet"]


def start(folder: Path, stage: str, steps: int) -> tuple[int, int]:
    """A process that trains the stage: (its id, a pipe that gives a byte at every step)."""
    steps_out, steps_in = os.pipe()
    if child := os.fork():
        os.close(steps_in)
        return child, steps_out
    try:  # nothing of the parent's shall run here
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        make_rng = trainer.make_rng  # every step begins with it
        trainer.make_rng = lambda *key: os.write(steps_in, b".") and make_rng(*key)
        os._exit(train_tiny.main(command(folder, stage, steps)))
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
    """What a model is read from: not the hidden beginnings that a killed process leaves beside it.

    They are our `.NAME.PID.partial`, and `.tmpXXXXXX` while safetensors still writes that one.
    """
    files = (p for p in folder.rglob("model/**/*") if p.is_file())
    return [p for p in files if not p.name.startswith(".")]


def states(folder: Path) -> dict:
    """What the checkpoints hold, by stage."""
    files = [p for p in folder.glob("*.ckpt") if ".previous" not in p.suffixes]
    return {p.stem: Checkpoint(p).load() for p in files}


def differences(folder: Path, reference: Path) -> list[str]:
    """Names of what is not the same, bit for bit, in two folders of finished runs."""
    folders = folder, reference
    got, want = (dict(numbers(states(f))) for f in folders)
    if not want or not model_files(reference):
        raise SystemExit(f"{reference} holds nothing to compare")
    odd = [k for k in got.keys() | want.keys() if k not in got or k not in want]
    odd += [k for k in got.keys() & want.keys() if not torch.equal(got[k], want[k])]
    pair = [{p.relative_to(f): p.read_bytes() for p in model_files(f)} for f in folders]
    names = pair[0].keys() | pair[1].keys()
    odd += [str(name) for name in names if pair[0].get(name) != pair[1].get(name)]
    return sorted(odd)


def one_round(before: Path, after: Path, stage: str, steps: int, rng: random.Random) -> tuple:
    """(steps at which a process was killed, differences to the run that was left alone)."""
    killed = []
    with tempfile.TemporaryDirectory(dir=before.parent) as root:
        folder = Path(shutil.copytree(before, Path(root, "run")))
        for _ in range(rng.choice((1, 1, 2, 3))):
            most = steps * (3 if stage in OWN else 1)
            step = rng.randrange(most + 1)  # from preparing to the last one, and saving it
            if not kill(*start(folder, stage, steps), step, rng):
                break
            killed.append(step)
        wait(*start(folder, stage, steps))
        return killed, differences(folder, after)


def main() -> int:
    """Print a line for every round and the count; 1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="rounds with at least one kill")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--stages", default=",".join(train_tiny.TIME_SHARE))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wanted, rng = args.stages.split(","), random.Random(args.seed)
    chain = list(train_tiny.TIME_SHARE)
    last = max((chain.index(stage) for stage in wanted if stage not in OWN), default=-1)
    shrink()
    with tempfile.TemporaryDirectory() as folder:
        pairs, before = {}, Path(folder, "nothing")
        before.mkdir()
        for stage in [*chain[: last + 1], *OWN.keys() & wanted]:
            if stage in OWN:
                before = Path(folder, f"before_{stage}")
                before.mkdir()
                write_data(before)
            after = Path(shutil.copytree(before, Path(folder, stage)))
            wait(*start(after, stage, args.steps))
            pairs[stage], before = (before, after), after
        rounds, kills, bad = 0, 0, 0
        while rounds < args.rounds:
            stage = wanted[rounds % len(wanted)]
            killed, odd = one_round(*pairs[stage], stage, args.steps, rng)
            verdict = f"differs: {', '.join(odd[:5])}" if odd else "equal bit for bit"
            at = f"killed in step {', '.join(map(str, killed))}" if killed else "finished too soon"
            print(f"{stage:10} {at}: {verdict}", flush=True)
            rounds, kills, bad = rounds + bool(killed), kills + len(killed), bad + bool(odd)
    print(f"{rounds} rounds with {kills} kills, {bad} of them with a difference")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
