"""Train the tiny Nexus-Gen through the paper's stages, on a laptop CPU.

    python train_tiny.py --minutes 30              # everything, from nothing, into runs/tiny
    python train_tiny.py --stage ar --minutes 10   # one stage, on top of what the folder holds
    python train_tiny.py --data my.jsonl           # fine-tune the shipped model on your own data

Stages: `vae` (FLUX's, at toy width) and `vision` (grounding, the stand-in for Qwen2.5-VL's
pre-training) make the base; `generation` learns to reconstruct images from their own image
embeddings (paper section 4.2), `ar` is the multi-task training (4.1), `editing` learns from the
embeddings that the AR model *predicts* (4.3). The folder always holds a model in the official
layout under `model/`. A run that was stopped goes on where it was when the same command is given
again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.multiprocessing import (
    ProcessContext,
    ProcessExitedException,
    ProcessRaisedException,
)

from nexus_min import weights as loader
from nexus_min.config import NexusGenConfig
from nexus_min.model.autoencoder import AutoEncoder
from nexus_min.model.autoregressive import NexusGenAR
from nexus_min.model.mmdit import MMDiT
from nexus_min.offload import is_out_of_memory
from nexus_min.pipeline import NexusGen
from nexus_min.tokenizer import QwenTokenizer
from nexus_min.toy import pretrain as base
from nexus_min.toy import stages as toy
from nexus_min.toy.init import (
    init_ar,
    init_mmdit,
    ready_to_copy,
    ready_to_look_back,
    translate,
)
from nexus_min.toy.vocabulary import build_tokenizer, translations, words
from nexus_min.train import finetune
from nexus_min.train.data import MessageDataset, check_file
from nexus_min.train.trainer import Run, bf16_is_faster, fit, frozen_copy, world
from nexus_min.weights import PARTS, model_folder, read_tokenizer

# The stages in order: the share of --minutes, and the batch over all workers.
SHARES = {"vae": 0.13, "vision": 0.14, "generation": 0.29, "ar": 0.34, "editing": 0.10}
BATCH = {"vae": 16, "vision": 32, "generation": 32, "ar": 32, "editing": 32}
BF16 = ("vision", "generation", "ar", "editing")  # where bf16 products pay, if the CPU has them
NEEDS = {
    "vae": (),
    "vision": (),
    "generation": ("vae", "vision"),
    "ar": ("vision",),
    "editing": ("vae", "vision", "generation", "ar"),
}
CORES = os.cpu_count() or 1
ERRORS = (ValueError, OSError, FloatingPointError)  # what a user can cause: one line, status 2


# ------------------------------------------------------------------------------ the folder of a run


class Folder:
    """The model of a run as it grows, in the official layout under `model/`."""

    def __init__(self, path: Path, start: str | None = None):
        self.path, self.model, self.start = path, path / "model", start

    @property
    def config(self) -> NexusGenConfig:
        """The model's sizes; before its first part is saved, the tiny ones."""
        known = (self.model / "nexus_min.json").exists()
        return loader.load_config(self.model) if known else NexusGenConfig.tiny()

    def note(self, stage: str) -> dict | None:
        """What was noted when the stage was done, if it was. ValueError for a broken file."""
        file = self.path / f"{stage}.json"
        if not file.exists():
            return None
        try:
            note = json.loads(file.read_text())
            float(note["seconds"]), float(note["stamp"]), int(note["steps"])  # are numbers
            if note["needs"].keys() != set(NEEDS[stage]):
                raise ValueError(f"built on {', '.join(note['needs']) or 'nothing'}")
            return note
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file}: not a summary ({error}); delete it") from None

    def finished(self, stage: str) -> dict | None:
        """The note of a stage, None also when a stage that it was built on has changed since."""
        if not (note := self.note(stage)):
            return None
        built_on = note.get("needs", {})
        fresh = all((self.finished(n) or {}).get("stamp") == t for n, t in built_on.items())
        return note if fresh else None

    def finish(self, summary: dict, command: str) -> None:
        """Note that a stage is done and saved, by which command, on top of which others."""
        stage = summary["stage"]
        needs = {n: self.note(n).get("stamp") for n in NEEDS[stage]}
        note = summary | {"command": command, "stamp": time.time(), "needs": needs}
        text = json.dumps(note, indent=1)
        loader.replace_file(self.path / f"{stage}.json", lambda p: p.write_text(text))

    def drop_stale(self, stages: tuple[str, ...]) -> list[str]:
        """Forget those of `stages` whose foundations have changed; return their names."""
        stale = [n for n in stages if self.note(n) and not self.finished(n)]
        for name in stale:
            (self.path / f"{name}.json").unlink()
            for file in self.path.glob(f"{name}.*ckpt"):
                file.unlink()
        return stale

    def check(self, stage: str) -> None:
        """ValueError, with the command to run first, when what the stage needs is missing."""
        for name in NEEDS[stage]:
            if not self.finished(name):
                first = f"python train_tiny.py --stage {name} --out {shlex.quote(str(self.path))}"
                raise ValueError(f"stage {stage} needs {name}, which is not trained yet: {first}")

    def check_complete(self, coming: tuple[str, ...] = ()) -> None:
        """ValueError unless every stage is finished, or among the coming ones."""
        if missing := [n for n in SHARES if n not in coming and not self.finished(n)]:
            raise ValueError(f"--ship needs every stage, not trained yet: {', '.join(missing)}")

    def check_writable(self) -> None:
        """OSError when nothing can be written here."""
        self.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.path):
            pass

    def save(self, config: NexusGenConfig, **components) -> None:
        """Write components as rank 0; every rank waits until they are there."""
        if world()[0] == 0:
            loader.save_checkpoint(self.model, config, dtype=None, **components)
        if dist.is_initialized():
            dist.barrier()

    # The parts of the model, read from its files.

    def vae(self) -> AutoEncoder:
        return loader.load_autoencoder(self.model / loader.FLUX_FOLDER, self.config)

    def ar(self) -> NexusGenAR:
        return loader.load_ar(self.model / loader.AR_FOLDER, self.config)

    def tokenizer(self) -> QwenTokenizer:
        return QwenTokenizer(self.model / loader.AR_FOLDER / "tokenizer.json")

    def empty_prompt(self) -> dict:
        return loader.load_empty_prompt(self.model, self.config)

    def generation(self) -> tuple:
        file = self.model / loader.AR_FOLDER / "generation_decoder.safetensors"
        config = self.config
        return loader.load_mmdit(file, config), loader.load_generation_adapter(file, config)

    def editing(self) -> tuple:
        file = self.model / loader.AR_FOLDER / "edit_decoder.safetensors"
        config = self.config
        return loader.load_mmdit(file, config), loader.load_embedding_merger(file, config)


# --------------------------------------------------------------------------------------- the stages
# Each trains one part of the model, saves it, and returns the summary of `fit`.


def train_vae(folder: Folder, run: Run, batch: int) -> dict:
    """Learn images, and save the autoencoder."""
    config = folder.config
    vae = base.init_vae(AutoEncoder(config.autoencoder))
    summary = fit(base.vae_stage(vae, batch), run)
    scale, shift = base.latent_statistics(vae)
    sizes = replace(config.autoencoder, scale_factor=scale, shift_factor=shift)
    folder.save(replace(config, autoencoder=sizes), autoencoder=vae)
    return summary


def train_vision(folder: Folder, run: Run, batch: int) -> dict:
    """Ground the tower, standardise its output, and save it in a fresh, bilingual AR model."""
    config = folder.config
    ar, tokenizer = init_ar(NexusGenAR(config.ar)), build_tokenizer(config)
    translate(ar.model.embed_tokens, translations(tokenizer))
    ready_to_copy(ar)  # draws numbers: before the steps, of which a resumed run takes fewer
    ready_to_look_back(ar)
    summary = fit(base.vision_stage(ar.visual, config, batch), run)
    base.standardise(ar.visual, config)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "tokenizer.json")
        tokenizer.save(str(file))
        folder.save(config, ar=ar, empty_prompt=toy.empty_prompt(config), tokenizer_file=file)
    return summary


def train_generation(folder: Folder, run: Run, batch: int) -> dict:
    """Reconstruct images from the tower's embeddings; from `folder.start`'s decoder, if given."""
    config, vae, visual = folder.config, folder.vae(), folder.ar().visual
    started, known = time.perf_counter(), None
    mmdit, adapter = init_mmdit(MMDiT(config.mmdit)), loader.make_adapter(config)
    if folder.start:
        other = NexusGen.load(folder.start, dtype=torch.float32, parts=("ar", "generation"))
        mmdit.load_state_dict(other.generation.mmdit.state_dict())
        adapter.load_state_dict(other.generation.adapter.state_dict())
        known = other.ar.visual, other.generation.adapter
    pool = toy.reconstruction_pool(visual, vae, config, run, known)
    run = run.less(time.perf_counter() - started)
    stage = toy.generation_stage(mmdit, adapter, folder.empty_prompt(), pool, vae, config, batch)
    summary = fit(stage, run)
    folder.save(config, generation=(mmdit, adapter))
    return summary


def train_ar(folder: Folder, run: Run, batch: int) -> dict:
    """Learn all three tasks with the tower frozen (paper, section 4.1)."""
    config, ar, painter = folder.config, folder.ar(), None
    if folder.finished("generation"):  # else learn without images of progress
        painter = toy.Painter(folder.vae(), *folder.generation(), folder.empty_prompt(), config)
    summary = fit(toy.ar_stage(ar, folder.tokenizer(), config, batch, painter), run)
    folder.save(config, ar=ar)
    return summary


def train_editing(folder: Folder, run: Run, batch: int) -> dict:
    """Draw edits from what the AR model predicts, starting as the generation decoder (4.3)."""
    config, vae, ar = folder.config, folder.vae(), frozen_copy(folder.ar())
    started = time.perf_counter()
    pool = toy.editing_pool(ar, vae, folder.tokenizer(), config, run)
    run = run.less(time.perf_counter() - started)
    (mmdit, adapter), merger = folder.generation(), loader.make_merger(config)
    merger.layers[0].load_state_dict(ar.model.layers[0].state_dict())
    parts = mmdit, merger, frozen_copy(adapter)
    summary = fit(toy.editing_stage(*parts, folder.empty_prompt(), pool, vae, config, batch), run)
    folder.save(config, editing=(mmdit, merger))
    return summary


TRAIN = {
    "vae": train_vae,
    "vision": train_vision,
    "generation": train_generation,
    "ar": train_ar,
    "editing": train_editing,
}


# ------------------------------------------------------------------------------------ your own data


def begin(folder: Folder, plan: Plan) -> None:
    """Copy the model to start from, in fp32, and note the data; for rank 0 alone.

    ValueError for a run on others.
    """
    data = hashlib.sha256(plan.data.read_bytes()).hexdigest()
    facts = {"data": data, "model": str(plan.model), "ratio": list(plan.ratio)}
    file, begun = folder.path / "data.json", folder.path / "data.json.begun"
    if file.exists():
        try:
            same = json.loads(file.read_text("utf-8")) == facts
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: cannot be read ({error}); delete the folder") from None
        if not same:
            raise ValueError(f"{folder.path} is a run on other data; give another --out")
        return
    if folder.model.exists() and not begun.exists():  # else killed below
        raise ValueError(f"{folder.path} holds a model that was not begun with --data")
    begun.touch()
    model, source = NexusGen.load(plan.model, dtype=torch.float32), model_folder(plan.model)
    parts = {name: getattr(model, name) for name in (*PARTS, "empty_prompt")}
    parts["tokenizer_file"] = source / loader.AR_FOLDER / "tokenizer.json"
    loader.save_checkpoint(folder.model, model.config, dtype=None, **parts)
    loader.replace_file(file, lambda p: p.write_text(json.dumps(facts), "utf-8"))
    begun.unlink()


def train_on_data(plan: Plan) -> None:
    """Fine-tune by one stage after the other; those whose checkpoint is finished only save."""
    folder, data = Folder(plan.out), MessageDataset(plan.data)
    lines = [data[i] for i in range(len(data))]
    if world()[0] == 0:
        begin(folder, plan)
    if dist.is_initialized():
        dist.barrier()
    for name in plan.stages:
        torch.manual_seed(plan.seed)
        limits = {"seconds": plan.seconds(name), "steps": plan.steps}
        bf16 = plan.bf16 and name in BF16
        run = Run(folder.path, plan.seed, **limits, quiet=plan.quiet, bf16=bf16)
        own = finetune.Own(
            lines, plan.ratio, max(1, BATCH[name] // plan.workers), plan.shard, plan.lora
        )
        finetune.TRAIN[name](folder, own, run)


def check_data(args: argparse.Namespace) -> None:
    """Print every mistake of a data file. ValueError when there is one."""
    folder = model_folder(args.model)
    config = loader.load_config(folder)
    found = check_file(args.data, config, read_tokenizer(folder, config))
    for mistake in found:
        print(mistake)
    if found:
        raise ValueError(f"{args.data}: {len(found)} mistakes, see above")
    kinds = [finetune.kind_of(line) for line in MessageDataset(args.data).lines]
    print(f"{args.data}: good; " + ", ".join(f"{kinds.count(k)} {k}" for k in finetune.KINDS))


# -------------------------------------------------------------------------------- the chosen stages


@dataclass(frozen=True)
class Plan:
    """What was asked for, and what all workers must know alike."""

    out: Path
    stages: tuple[str, ...]
    minutes: float
    steps: int | None
    seed: int
    workers: int
    quiet: bool
    bf16: bool
    started: float  # time.time()
    command: str  # as given, for the record
    start: str | None = None  # a model whose generation decoder is adapted to this tower
    data: Path | None = None  # one's own; then also:
    model: str = "tiny"  # what is fine-tuned
    ratio: tuple[float, ...] = finetune.RATIO
    shard: int = 256  # samples in a file of cached embeddings
    lora: int = 0  # rank for the AR model; 0: all weights learn

    def seconds(self, stage: str) -> float | None:
        """Budget of a stage; what the ones before overran (final grids, start-up) comes off it."""
        if self.steps is not None:
            return None
        whole = sum(SHARES[name] for name in self.stages)
        per_share = 60 * self.minutes / whole
        before = sum(SHARES[name] for name in self.stages[: self.stages.index(stage)])
        late = time.time() - self.started - per_share * before
        return max(1.0, per_share * SHARES[stage] - max(0.0, late))


def train(plan: Plan) -> None:
    """Run the stages one after the other, in this process; those that are finished are skipped."""
    if plan.data:
        return train_on_data(plan)
    folder, (rank, _) = Folder(plan.out, plan.start), world()
    for name in plan.stages:
        if folder.finished(name):
            continue
        folder.check(name)
        torch.manual_seed(plan.seed)
        bf16 = plan.bf16 and name in BF16
        limits = {"seconds": plan.seconds(name), "steps": plan.steps}
        limits["sample_every"] = max(60.0, (limits["seconds"] or 0.0) / 8)
        run = Run(folder.path, plan.seed, **limits, quiet=plan.quiet, bf16=bf16)
        summary = TRAIN[name](folder, run, max(1, BATCH[name] // plan.workers))
        if rank == 0:
            folder.finish(summary, plan.command)
        if dist.is_initialized():
            dist.barrier()


def worker(rank: int, plan: Plan, place: str) -> None:
    """One of several processes, each on its share of the cores, that average their gradients."""
    torch.set_num_threads(max(1, CORES // plan.workers))
    store = {"init_method": f"file://{place}/store", "world_size": plan.workers}
    try:
        dist.init_process_group("gloo", rank=rank, **store)
        train(plan)
        dist.destroy_process_group()
    except KeyboardInterrupt:  # all is saved; the signal comes again, forwarded by the parent
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except (*ERRORS, RuntimeError, MemoryError) as error:
        Path(place, f"error-{rank}").write_text(explained(error), "utf-8")
        sys.exit(2)


def explained(error: BaseException) -> str:
    """One line about what a user can mend; any other error is raised."""
    if isinstance(error, ERRORS):
        return str(error)
    if not is_out_of_memory(error):
        raise error
    reason = str(error).split("\n")[0]
    return f"out of memory: {reason}; the same command goes on from the last checkpoint"


def launch(plan: Plan) -> None:
    """Train in this process, or in several; what a worker raises is raised here."""
    if plan.workers == 1:
        return train(plan)
    with tempfile.TemporaryDirectory() as place:
        arguments = {"args": (plan, place), "nprocs": plan.workers, "join": False}
        context = torch.multiprocessing.spawn(worker, **arguments)
        try:
            with interrupts_forwarded(context):
                while not context.join(grace_period=5):
                    pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            notes = [note.read_text("utf-8") for note in sorted(Path(place).glob("error-*"))]
            if notes:  # not finite, for instance: every process names its own part of the batch
                raise ValueError("; ".join(dict.fromkeys(notes))) from None
            if isinstance(error, ProcessRaisedException):
                raise
            raise ValueError(f"{error}; the same command goes on from the checkpoint") from None


@contextmanager
def interrupts_forwarded(context: ProcessContext) -> Iterator[None]:
    """On Ctrl-C, let the workers save before it goes on to the caller."""
    try:
        yield
    except KeyboardInterrupt:
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGINT)
        for process in context.processes:
            process.join()
        raise


def ship(folder: Folder, goal: Path, seed: int) -> None:
    """Copy a run's model into `goal` in fp16; every file's metadata say how it was made."""
    done = {name: folder.finished(name) for name in SHARES}
    facts = {
        "command": "; ".join(dict.fromkeys(note["command"] for note in done.values())),
        "stages": json.dumps(
            {name: [n["command"], n["steps"], n["seconds"]] for name, n in done.items()}
        ),
        "seed": str(seed),
        "minutes": f"{sum(summary['seconds'] for summary in done.values()) / 60:.1f}",
        "metrics": json.dumps({name: summary["metrics"] for name, summary in done.items()}),
    }
    loader.save_checkpoint(
        goal,
        folder.config,
        ar=folder.ar(),
        generation=folder.generation(),
        editing=folder.editing(),
        autoencoder=folder.vae(),
        empty_prompt=folder.empty_prompt(),
        tokenizer_file=folder.model / loader.AR_FOLDER / "tokenizer.json",
        dtype=torch.float16,
        metadata=facts,
    )
    known = json.dumps(sorted({word.strip() for word in words()} - {""}), ensure_ascii=False)
    loader.replace_file(goal / "toy_words.json", lambda p: p.write_text(known, "utf-8"))


# --------------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """Bad options raise ValueError, one line, instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. ValueError for values that make no sense."""
    about = argparse.RawDescriptionHelpFormatter
    parser = Parser("train_tiny.py", description=__doc__, formatter_class=about)
    parser.add_argument("--stage", choices=("all", *SHARES), default="all")
    parser.add_argument("--minutes", type=float, default=30.0, help="budget of the chosen stages")
    parser.add_argument("--steps", type=int, help="steps of each stage, instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", help="adapt this model's generation decoder (a folder, or tiny)")
    parser.add_argument("--out", type=Path, help="folder of the run (runs/tiny; runs/own)")
    parser.add_argument(
        "--workers",
        type=int,
        default=2 if CORES >= 4 else 1,
        help="processes, that share the cores",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--ship", type=Path, help="write the finished model to this folder in fp16")
    parser.add_argument(
        "--data", type=Path, help="fine-tune on this file in the message-like format"
    )
    parser.add_argument("--check", action="store_true", help="only name the mistakes of --data")
    parser.add_argument("--model", default="tiny", help="what --data fine-tunes: a folder, or tiny")
    parser.add_argument("--ratio", type=ratio, default=finetune.RATIO, help="default 1:2:1")
    parser.add_argument("--lora", type=int, default=0, help="rank; the AR model learns by LoRA")
    parser.add_argument("--shard", type=int, default=256, help="samples a file of the cache")
    args = parser.parse_args(argv)
    if not (math.isfinite(args.minutes) and args.minutes > 0):
        raise ValueError(f"--minutes must be positive, not {args.minutes:g}")
    for name, least in {"steps": 1, "workers": 1, "seed": 0, "shard": 1, "lora": 0}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, not {value}")
        if value is not None and value >= 2**62:
            raise ValueError(f"--{name} must be below 2^62, not {value}")
    if args.workers > (most := min(BATCH.values())):
        raise ValueError(f"--workers must be at most {most}, the smallest batch")
    if args.check and not args.data:
        raise ValueError("--check needs --data")
    if args.start and (args.data or args.stage not in ("all", "generation")):
        raise ValueError("--start is for the generation stage")
    if args.ship and args.data:
        raise ValueError("--ship is for whole runs; with --data the folder's model/ is the model")
    args.out = args.out or Path("runs/own" if args.data else "runs/tiny")
    return args


def ratio(text: str) -> tuple[float, ...]:
    """ "1:2:1" -> the weights of understanding, generation and editing."""
    parts = tuple(float(part) for part in text.split(":"))
    if len(parts) != 3 or not all(0 <= part < 1e6 for part in parts) or not sum(parts):
        raise ValueError(text)
    return parts


def make_plan(args: argparse.Namespace, started: float, command: str) -> Plan:
    """Check what can be checked before any work is done. ERRORS name the option or the folder."""
    folder = Folder(args.out)
    kept = {f.name for f in fields(Plan)} & vars(args).keys()
    settings = {name: getattr(args, name) for name in kept} | {"bf16": bf16_is_faster()}
    settings |= {"started": started, "command": command}
    if args.data:
        folder.check_writable()
        stages = finetune.stages(MessageDataset(args.data).lines, args.stage)
        return Plan(stages=stages, **settings)
    stages = tuple(SHARES) if args.stage == "all" else (args.stage,)
    if args.start and loader.load_config(model_folder(args.start)).mmdit != folder.config.mmdit:
        raise ValueError(f"--start {args.start}: its MMDiT has other sizes than this run's")
    if args.stage != "all":
        folder.check(args.stage)
    if args.ship:
        folder.check_complete(stages)
        Folder(args.ship).check_writable()  # now, not after hours of training
    folder.check_writable()
    for name in folder.drop_stale(stages):
        print(f"{name} is trained again: what it was built on has changed")
    return Plan(stages=stages, **settings)


def tell(folder: Folder, stages: tuple[str, ...]) -> None:
    """Say what is finished from an earlier run."""
    for name in stages:
        if done := folder.finished(name):
            again = f"to train it again: rm {shlex.quote(str(folder.path))}/{name}.*"
            minutes = done["seconds"] / 60
            print(f"{name} is finished ({done['steps']} steps, {minutes:.1f} minutes); {again}")


def main(argv: list[str] | None = None) -> int:
    """Train; 0, or 2 after one clear line on standard error, or 130 after Ctrl-C."""
    started = time.time()
    try:
        args = parse(argv)
        if args.check:
            check_data(args)
            return 0
        options = shlex.join(sys.argv[1:] if argv is None else argv)
        plan = make_plan(args, started, f"python train_tiny.py {options}".strip())
        if not args.data:
            tell(Folder(args.out), plan.stages)
        launch(plan)
        minutes = (time.time() - started) / 60
        print(f"trained {args.stage} in {minutes:.1f} minutes: {args.out}/model")
        if args.ship:
            ship(Folder(args.out), args.ship, args.seed)
            print(f"shipped to {args.ship}")
    except (*ERRORS, RuntimeError, MemoryError) as error:
        print(f"train_tiny: {explained(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_tiny: stopped; the same command goes on from the last checkpoint")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
