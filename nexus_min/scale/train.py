"""Full-scale training of a release: the stages of `finetune`, with the paper's table 4, on cards.

    torchrun --nproc-per-node=8 -m nexus_min.scale.train --preset ar_pretrain \\
        --data my.jsonl --model DIR --out runs/ar

`--model` is a folder in the official layout; what it lacks is begun as the paper did: the AR model
from Qwen2.5-VL, a decoder from FLUX.1-dev with a new projector. The part that was trained ends in
`OUT/model`, under its official names. Losses, noise levels and weights are the official training's.
The same command goes on from the last checkpoint, on any number of processes; `--until STEP` stops
there, so `--until 0` only converts the last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import NexusGenConfig
from ..model.mmdit import MMDiT
from ..offload import is_out_of_memory
from ..train import finetune
from ..train.data import MessageDataset
from ..train.trainer import Run, world
from ..weights import (
    EditingDecoder,
    GenerationDecoder,
    model_folder,
    read_part,
    read_text_encoders,
    read_tokenizer,
    text_context,
)
from .fsdp import PRESETS, Preset, fit, gathered

ERRORS = (ValueError, OSError, FloatingPointError)  # what a user can cause: one line, status 2


class Release:
    """A model's folder to start from and another to end in, as `finetune`'s stages ask for them."""

    def __init__(self, source: Path, goal: Path, device: torch.device, bf16: bool):
        from .. import weights as loader

        self.loader, self.source, self.goal = loader, source, goal
        self.config, self.device = loader.load_config(source), device
        self.place = {"device": device, "dtype": torch.float32 if device.type == "cpu" else None}
        self.dtype = torch.bfloat16 if bf16 else torch.float32  # of what is written

    def ar(self):
        return read_part("ar", self.source, self.config, self.place)

    def vae(self):
        return read_part("autoencoder", self.source, self.config, self.place)

    def tokenizer(self):
        return read_tokenizer(self.source, self.config)

    def generation(self) -> GenerationDecoder:
        if self.has("generation_decoder"):
            return read_part("generation", self.source, self.config, self.place)
        adapter = self.loader.make_adapter(self.config).to(self.device)
        return GenerationDecoder(self.flux(), adapter)

    def editing(self) -> EditingDecoder:
        """Without a file: the merger's layer starts from the AR model's first, as officially."""
        if self.has("edit_decoder"):
            return read_part("editing", self.source, self.config, self.place)
        merger = self.loader.make_merger(self.config)
        merger.layers[0].load_state_dict(self.ar().model.layers[0].state_dict())
        return EditingDecoder(self.flux(), merger.to(self.device))

    def has(self, stem: str) -> bool:
        home = self.source / self.loader.AR_FOLDER
        return any((home / f"{stem}{end}").is_file() for end in self.loader.FORMATS)

    def flux(self) -> MMDiT:
        folder = self.source / self.loader.FLUX_FOLDER
        return self.loader.load_mmdit(folder / "flux1-dev.safetensors", self.config, **self.place)

    @torch.no_grad()
    def empty_prompt(self) -> dict[str, Tensor]:
        if kept := self.loader.load_empty_prompt(self.source, self.config):
            return kept
        encoders = read_text_encoders(self.source, self.config, self.place)
        txt, _, pooled = text_context(encoders, *encoders.ids(""))
        return {"pooled": pooled, "context": txt}

    def save(self, config: NexusGenConfig, **parts) -> None:
        """Gather what was trained; process 0 writes it and links what else a model needs."""
        named = {k: v if isinstance(v, tuple) else (v,) for k, v in parts.items()}
        states = {k: [gathered(module) for module in v] for k, v in named.items()}
        if world()[0] == 0:
            whole = {k: v if len(v) > 1 else v[0] for k, v in states.items()}
            self.loader.save_checkpoint(self.goal, config, **whole, dtype=self.dtype)
            self.link_the_rest()
        dist.barrier()

    def link_the_rest(self) -> None:
        """Links in the goal to all files of the source that it lacks."""
        for file in self.source.rglob("*"):
            link = self.goal / file.relative_to(self.source)
            if file.is_file() and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.resolve())


# --------------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """Bad options raise ValueError, one line, instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. ValueError for values that make no sense."""
    about = argparse.RawDescriptionHelpFormatter
    parser = Parser("nexus_min.scale.train", description=__doc__, formatter_class=about)
    parser.add_argument("--preset", choices=PRESETS, required=True, help="a column of table 4")
    parser.add_argument("--data", type=Path, required=True, help="JSONL, message-like format")
    parser.add_argument("--model", required=True, help="folder of the release to start from")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--micro", type=int, default=1, help="samples that a card takes at once")
    parser.add_argument("--until", type=int, help="stop after this step; 0 only converts")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", type=int, default=256, help="samples a file of the cache")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--fp32", action="store_true", help="no bf16; always so on a CPU")
    for name, kind in {"batch": int, "steps": int, "warmup": int, "lr": float}.items():
        parser.add_argument(f"--{name}", type=kind, help="instead of the preset's")
    args = parser.parse_args(argv)
    least = {"micro": 1, "save_every": 1, "shard": 1, "batch": 1, "steps": 1}
    for name, low in (least | {"until": 0, "warmup": 0, "seed": 0, "lr": 0}).items():
        value = getattr(args, name)
        if value is not None and not low <= value < 2**62:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, not {value}")
    return args


def preset_of(args: argparse.Namespace) -> Preset:
    """The named preset, with what the user sets instead."""
    own = {name: getattr(args, name) for name in ("batch", "steps", "warmup", "lr")}
    return replace(PRESETS[args.preset], **{k: v for k, v in own.items() if v is not None})


def begin(args: argparse.Namespace, preset: Preset, folder: Release) -> None:
    """Note what the run's numbers depend on. ValueError when the folder is another run's."""
    data = hashlib.sha256(args.data.read_bytes()).hexdigest()
    facts = {"model": str(folder.source.resolve()), "data": data, **asdict(preset)}
    facts = json.dumps(facts | {"micro": args.micro, "seed": args.seed}, indent=1)
    note = args.out / "run.json"
    if note.exists() and note.read_text("utf-8") != facts:
        raise ValueError(f"{args.out} is a run with other data or settings; give another --out")
    folder.loader.replace_file(note, lambda path: path.write_text(facts, "utf-8"))


@contextmanager
def processes() -> Iterator[torch.device]:
    """Join those that torchrun started, or be the only one; the device of this one."""
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    try:
        yield torch.device("cuda", local) if cuda else torch.device("cpu")
    finally:
        dist.destroy_process_group()


def train(args: argparse.Namespace, device: torch.device) -> None:
    """The stage of a preset on the data, from the model's folder into the run's."""
    preset, data = preset_of(args), MessageDataset(args.data)
    lines = [data[i] for i in range(len(data))]
    kinds = {k for k, share in zip(finetune.KINDS, preset.ratio, strict=True) if share}
    lines = [line for line in lines if finetune.kind_of(line) in kinds]
    if not lines:
        raise ValueError(f"{args.data}: no lines of the kind {' or '.join(sorted(kinds))}")
    bf16 = device.type == "cuda" and not args.fp32
    own = finetune.Own(lines, preset.ratio, args.micro, args.shard, official=True)
    run = Run(args.out, args.seed, steps=preset.steps, quiet=args.quiet, bf16=bf16)
    settings = {"preset": preset, "micro": args.micro, "device": device, "until": args.until}
    loop = partial(fit, **settings, save_every=args.save_every)
    folder = Release(model_folder(args.model), args.out / "model", device, bf16)
    begin(args, preset, folder)
    finetune.TRAIN[preset.stage](folder, own, run, loop)


def main(argv: list[str] | None = None) -> int:
    """Train; 0, or 2 after one clear line on standard error, or 130 after Ctrl-C."""
    rank, begun = os.environ.get("RANK", "0"), False
    first = rank == "0"
    try:
        args = parse(argv)
        begun = True
        with processes() as device:
            train(args, device)
        if first:
            print(f"trained {args.preset}: {args.out}/model")
    except ERRORS as error:
        if first or begun:  # a bad option is the same to every process
            who = "" if first else f"process {rank}: "
            print(f"fullscale: {who}{error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).split("\n")[0]
        advice = "a smaller --micro, or more cards; the same command goes on"
        print(f"fullscale: process {rank}: out of memory: {reason}; {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if first:
            print("fullscale: stopped; the same command goes on from the last checkpoint")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
