"""Full-scale training on GPUs: the stages of `finetune` with the presets of the paper's table 4.

    torchrun --nproc-per-node=8 -m nexus_min.scale.train --preset ar_pretrain \\
        --data my.jsonl --model DIR --out runs/ar

If the folder `--model` lacks a part, training starts as in the paper: the AR model from Qwen2.5-VL,
a decoder from FLUX.1-dev with a new projector. `OUT/model` receives the trained part. To resume
from the last checkpoint, repeat the command, on any number of processes.
"""

import hashlib
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from ..cli import Parser, check_least, report_errors
from ..offload import explain_oom
from ..train import finetune
from ..train.data import MessageDataset
from ..train.run_folder import RunFolder
from ..train.stage import Run, changes
from ..weights import model_folder, replace_file
from .fsdp import PRESETS, fit, full_state_dict

OOM_ADVICE = "take a smaller --micro-batch or more GPUs; the same command resumes"


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line; ValueError names an option that is wrong."""
    parser = Parser("nexus_min.scale.train", description=__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, required=True, help="a column of the paper's table 4")
    add("--data", type=Path, required=True, help="JSONL file in the message-like format")
    add("--model", required=True, help="folder of the release to start from")
    add("--out", type=Path, required=True, help="folder of the run")
    add("--micro-batch", "--micro", type=int, default=1, help="samples that a GPU takes at once")
    add("--until", type=int, help="stop after this step; 0 only converts the last checkpoint")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--seed", type=int, default=0, help="seed of batches and noise")
    add("--shard", type=int, default=256, help="samples in a file of the embedding cache")
    add("--quiet", action="store_true", help="no progress bar")
    add("--fp32", action="store_true", help="compute in fp32 instead of bf16, as a CPU always does")
    add("--batch", type=int, help="samples in a step, instead of the preset's")
    add("--steps", type=int, help="steps in all, instead of the preset's")
    add("--warmup", type=int, help="steps of warm-up, instead of the preset's")
    add("--lr", type=float, help="learning rate, instead of the preset's")
    args = parser.parse_args(argv)
    check_least(args, micro_batch=1, save_every=1, shard=1, batch=1, steps=1)
    check_least(args, until=0, warmup=0, seed=0, lr=0)
    return args


@contextmanager
def processes() -> Iterator[torch.device]:
    """Join the processes that torchrun started, or run alone; yields this one's device."""
    cuda, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local_rank)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    try:
        yield torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    finally:
        dist.destroy_process_group()


def train(args: Namespace, device: torch.device) -> None:
    """Train the preset's stage on the data, from the model's folder into the run's."""
    fields = ("batch", "steps", "warmup", "lr")
    overrides = {k: v for k in fields if (v := getattr(args, k)) is not None}
    preset = replace(PRESETS[args.preset], **overrides)
    tasks = {t for t, ratio in zip(finetune.TASKS, preset.ratio, strict=True) if ratio}
    lines = [line for line in MessageDataset(args.data) if finetune.task_of(line) in tasks]
    if not lines:
        raise ValueError(f"{args.data}: no lines of the kind {' or '.join(sorted(tasks))}")
    source, bf16 = model_folder(args.model), device.type == "cuda" and not args.fp32
    if source.resolve() in (out := args.out.resolve(), *out.parents):
        raise ValueError(f"--out {args.out} lies inside --model {source}; give a folder outside it")

    # All that the run's numbers depend on: a run with other settings must not resume here.
    digest = hashlib.sha256(args.data.read_bytes()).hexdigest()[:16]
    settings = {"model": str(source.resolve()), "data": digest, **asdict(preset), "seed": args.seed}
    text, file = json.dumps(settings, indent=1), args.out / "run.json"
    before = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if changed := changes(before, json.loads(text)):
        raise ValueError(f"{args.out} is a run with other settings: {changed}; give another --out")
    replace_file(file, lambda path: path.write_text(text, "utf-8"))

    budget = {"until": args.until, "save_every": args.save_every}
    loop = partial(fit, preset=preset, micro_batch=args.micro_batch, device=device, **budget)
    dtype = torch.bfloat16 if bf16 else torch.float32
    folder = RunFolder(source, args.out / "model", device, dtype, full_state_dict, link_rest=True)
    data = finetune.FinetuneData(lines, preset.ratio, args.micro_batch, args.shard, official=True)
    run = Run(args.out, args.seed, steps=preset.steps, quiet=args.quiet, bf16=bf16)
    finetune.TRAIN[preset.stage](folder, data, run, loop)


def main(argv: list[str] | None = None) -> int:
    """Train. Only process 0 reports what all processes have in common."""
    rank = int(os.environ.get("RANK", 0))
    program = f"fullscale: process {rank}" if rank else "fullscale"
    stopped = "" if rank else "stopped; the same command resumes from the last checkpoint"
    with report_errors(program, stopped) as status:
        try:
            args = parse_args(argv)
        except ValueError:
            if rank == 0:
                raise
            return 2
        with explain_oom(lambda: OOM_ADVICE), processes() as device:
            train(args, device)
        if rank == 0:
            print(f"trained {args.preset}: {args.out}/model")
    return status.code


if __name__ == "__main__":
    sys.exit(main())
