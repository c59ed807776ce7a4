"""Train the tiny Nexus-Gen through the paper's stages, on a laptop CPU.

    python train_tiny.py --minutes 30              # everything, from nothing, into runs/tiny
    python train_tiny.py --minutes 75 --ship       # the same, as the model of this package
    python train_tiny.py --stage ar --minutes 10   # one stage, on top of what the folder holds
    python train_tiny.py --stage ar --base tiny --minutes 5  # words become images: one lesson
    python train_tiny.py --data my.jsonl           # fine-tune the shipped model on your own data

Stages: `vae` (FLUX's, at toy width) and `vision` (grounding, the stand-in for Qwen2.5-VL's
pre-training) make the base; `generation` learns to reconstruct images from their own image
embeddings (paper section 4.2), `ar` is the multi-task training (4.1), `editing` learns from the
embeddings that the AR model *predicts* (4.3). The folder always holds a model in the official
layout under `model/`. To resume a stopped run, repeat the command.
"""

import argparse
import hashlib
import json
import math
import shlex
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from nexus_min import weights
from nexus_min.cli import Parser, check_least, report_errors
from nexus_min.config import NexusGenConfig
from nexus_min.model.autoencoder import AutoEncoder
from nexus_min.model.autoregressive import NexusGenAR
from nexus_min.model.mmdit import MMDiT
from nexus_min.offload import explain_oom
from nexus_min.toy import init, pretrain
from nexus_min.toy import stages as toy
from nexus_min.toy.vocabulary import build_tokenizer, known_facts, translations
from nexus_min.train import finetune
from nexus_min.train.checkpoint import locked
from nexus_min.train.data import MessageDataset, check_file
from nexus_min.train.run_folder import RunFolder
from nexus_min.train.stage import Run, bf16_is_faster
from nexus_min.train.trainer import fit
from nexus_min.weights import model_folder

# The stages in order, with their share of --minutes.
TIME_SHARE = {"vae": 0.09, "vision": 0.12, "generation": 0.23, "ar": 0.35, "editing": 0.21}
BATCH = dict.fromkeys(TIME_SHARE, 32) | {"vae": 16}
DEPENDS_ON = {"vae": (), "vision": (), "generation": ("vae", "vision"), "ar": ("vision",)}
DEPENDS_ON["editing"] = tuple(DEPENDS_ON)

# --------------------------------------------------------------------------------------- the stages
# Each trains one part of the model, saves it, and returns the summary of `fit`.


def train_vae(folder: RunFolder, run: Run, args: argparse.Namespace) -> dict:
    """The autoencoder learns to reconstruct images."""
    config = folder.config
    vae = pretrain.init_vae(AutoEncoder(config.autoencoder))
    summary = fit(pretrain.vae_stage(vae, BATCH["vae"]), run)
    scale, shift = pretrain.latent_statistics(vae)
    sizes = replace(config.autoencoder, scale_factor=scale, shift_factor=shift)
    folder.save(replace(config, autoencoder=sizes), autoencoder=vae)
    return summary


def train_vision(folder: RunFolder, run: Run | None, args: argparse.Namespace) -> dict:
    """The vision tower learns grounding; it is saved in an AR model with fresh weights."""
    config, summary = folder.config, {}
    ar, tokenizer = init.init_ar(NexusGenAR(config.ar)), build_tokenizer(config)
    init.align_translations(ar.model.embed_tokens, translations(tokenizer))
    init.init_value_copy(ar)  # uses torch's generator: before `fit`, which a resumed run shortens
    init.init_previous_token_heads(ar)
    if args.base:
        ar.visual.load_state_dict(RunFolder(model_folder(args.base)).ar().visual.state_dict())
    else:
        summary = fit(pretrain.vision_stage(ar.visual, config, BATCH["vision"]), run)
        pretrain.whiten(ar.visual, config)
    with tempfile.TemporaryDirectory() as tmp_dir:
        file = Path(tmp_dir, "tokenizer.json")
        tokenizer.save(str(file))
        folder.save(config, ar=ar, empty_prompt=toy.empty_prompt(config), tokenizer_file=file)
    return summary


def train_generation(folder: RunFolder, run: Run, args: argparse.Namespace) -> dict:
    """The generation decoder learns reconstruction."""
    config, vae, visual = folder.config, folder.vae(), folder.ar().visual
    started = time.perf_counter()
    mmdit, adapter = init.init_mmdit(MMDiT(config.mmdit)), weights.make_adapter(config)
    decoder = weights.GenerationDecoder(mmdit, adapter)
    pool = toy.reconstruction_pool(visual, vae, config, run)
    run = run.after(time.perf_counter() - started)
    preview = toy.PreviewSampler(decoder, vae, folder.empty_prompt(), config)
    summary = fit(toy.generation_stage(preview, pool, BATCH["generation"]), run)
    folder.save(config, generation=decoder)
    return summary


def train_ar(folder: RunFolder, run: Run, args: argparse.Namespace) -> dict:
    """The AR model learns all three tasks, with the tower frozen (paper, section 4.1)."""
    config, ar, preview = folder.config, folder.ar(), None
    if is_finished(run.folder, "generation"):  # otherwise without images of progress
        parts = folder.generation(), folder.vae(), folder.empty_prompt(), config
        preview = toy.PreviewSampler(*parts)
    summary = fit(toy.ar_stage(ar, folder.tokenizer(), config, BATCH["ar"], run, preview), run)
    folder.save(config, ar=ar)
    return summary


def train_editing(folder: RunFolder, run: Run, args: argparse.Namespace) -> dict:
    """The editing decoder starts as the generation decoder, and learns from predictions (4.3)."""
    config, vae, ar = folder.config, folder.vae(), folder.ar().eval().requires_grad_(False)
    started = time.perf_counter()
    pool = toy.editing_pool(ar, vae, folder.tokenizer(), config, run)
    run = run.after(time.perf_counter() - started)
    (mmdit, adapter), merger = folder.generation(), weights.make_merger(config)
    init.init_merger(merger, ar)
    decoder = weights.EditingDecoder(mmdit, merger)
    preview = toy.PreviewSampler(decoder, vae, folder.empty_prompt(), config)
    adapter.requires_grad_(False)
    summary = fit(toy.editing_stage(preview, adapter, pool, BATCH["editing"]), run)
    folder.save(config, editing=decoder)
    return summary


TRAIN = {"vae": train_vae, "vision": train_vision, "generation": train_generation}
TRAIN |= {"ar": train_ar, "editing": train_editing}


def main(argv: list[str] | None = None) -> int:
    """Train the stages in order; return the exit status."""
    started = time.monotonic()
    resume = "repeat the command to go on from the last checkpoint"
    report = report_errors("train_tiny", f"stopped; {resume}", label="", limit=4000)
    with report as status, explain_oom(lambda: resume), ExitStack() as stack:
        args = parse(argv)
        if args.check:
            check_data(args)
            return 0
        is_locked = args.out.is_dir() and stack.enter_context(locked(args.out))
        options = shlex.join(sys.argv[1:] if argv is None else argv)
        command = f"python train_tiny.py {options}".strip()
        folder = RunFolder(args.out / "model", new_config=NexusGenConfig.tiny())
        stages = prepare(args, folder)
        is_locked = is_locked or stack.enter_context(locked(args.out))
        for name in stages:
            if not args.data and is_finished(args.out, name):
                continue
            torch.manual_seed(args.seed)
            seconds = None if args.steps else budget(name, stages, args.minutes, started)
            run = Run(args.out, args.seed, seconds, args.steps, quiet=args.quiet)
            run.sample_every = max(60.0, (seconds or 0.0) / 8)
            run.settings = {"seed": args.seed, "steps": args.steps, "lora": args.lora}
            run.settings |= {} if args.steps else {"minutes": args.minutes}
            run.bf16 = name != "vae" and bf16_is_faster()
            if args.data:
                settings = (args.ratio, BATCH[name], args.shard, args.lora)
                data = finetune.FinetuneData(list(MessageDataset(args.data)), *settings)
                finetune.TRAIN[name](folder, data, run)
            else:
                write_summary(args.out, TRAIN[name](folder, run, args), command)
        minutes = (time.monotonic() - started) / 60
        print(f"{args.stage} is done after {minutes:.1f} minutes: {folder.goal}")
        if args.ship:
            export(folder, args)
            print(f"shipped to {args.ship}")
        print_next(args)
    return status.code


def print_next(args: argparse.Namespace) -> None:
    """Name the sample grids, and the commands that come next."""
    for file in sorted(args.out.glob("*_final*.png")):
        print(f"sample grid: {file}")
    left = [] if args.data else [n for n in TIME_SHARE if not is_finished(args.out, n)]
    out = shlex.quote(str(args.out))
    if left:
        print(f"next: python train_tiny.py --stage {left[0]} --out {out}")
    if not {*left} - {"editing"}:
        print(f'next: python -m nexus_min generate "a red star" --model {out}/model')
        groups = " --groups generation" if left else ""
        print(f"next: python -m nexus_min eval --cases 20 --model {out}/model{groups}")


def budget(stage: str, stages: tuple[str, ...], minutes: float, started: float) -> float:
    """Seconds of a stage, less what was lost before it (final grids, start-up), at most a tenth."""
    per_share = 60 * minutes / sum(TIME_SHARE[name] for name in stages)
    before = sum(TIME_SHARE[name] for name in stages[: stages.index(stage)])
    late, own = time.monotonic() - started - per_share * before, per_share * TIME_SHARE[stage]
    return max(1.0, own - min(max(0.0, late), own / 10))


def read_summary(out: Path, stage: str) -> dict | None:
    """What was written when the stage was done; None when it was not."""
    file = out / f"{stage}.json"
    if not file.exists():
        return None
    try:
        summary = json.loads(file.read_text())
        float(summary["seconds"]), float(summary["stamp"]), int(summary["steps"])  # are numbers
        if summary["needs"].keys() != set(DEPENDS_ON[stage]):
            raise ValueError(f"built on {', '.join(summary['needs']) or 'nothing'}")
        return summary
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: not a summary ({error}); delete it") from None


def is_finished(out: Path, stage: str) -> bool:
    """Whether a stage is done, and the stages that it was built on have not changed since."""
    summary = read_summary(out, stage)
    return summary is not None and all(
        is_finished(out, name) and read_summary(out, name)["stamp"] == stamp
        for name, stamp in summary["needs"].items()
    )


def write_summary(out: Path, summary: dict, command: str) -> None:
    """Record that a stage is done and saved, by which command, on top of which others."""
    stage = summary["stage"]
    needs = {name: read_summary(out, name)["stamp"] for name in DEPENDS_ON[stage]}
    summary |= {"command": command, "stamp": time.time(), "needs": needs}
    replace_text(out / f"{stage}.json", json.dumps(summary, indent=1))


def prepare(args: argparse.Namespace, folder: RunFolder) -> tuple[str, ...]:
    """Check all that can be checked before any training; return the stages to train."""
    if args.data:
        check_writable(args.out)
        stages = finetune.stages(MessageDataset(args.data).lines, args.stage)
        init_run(args, folder)
        return stages
    stages = tuple(TIME_SHARE) if args.stage == "all" else (args.stage,)
    if args.base:
        init_from_base(args, folder)
    for name in DEPENDS_ON.get(args.stage, ()):
        if not is_finished(args.out, name):
            first = f"python train_tiny.py --stage {name} --out {shlex.quote(str(args.out))}"
            raise ValueError(f"stage {args.stage} needs {name}, which is not trained yet: {first}")
    if args.ship:
        missing = [n for n in TIME_SHARE if n not in stages and not is_finished(args.out, n)]
        if missing:
            raise ValueError(f"--ship needs every stage, not trained yet: {', '.join(missing)}")
        check_goal(args.ship)
    check_writable(args.out)
    for name in stages:
        summary = read_summary(args.out, name)
        if summary and is_finished(args.out, name):
            minutes = f"{summary['seconds'] / 60:.1f} minutes"
            again = f"to train it again: rm {shlex.quote(str(args.out))}/{name}.*"
            print(f"{name} is finished ({summary['steps']} steps, {minutes}); {again}")
        elif summary:
            print(f"{name} is trained again: what it was built on has changed")
            for file in (args.out / f"{name}.json", *args.out.glob(f"{name}.*ckpt")):
                file.unlink()
    return stages


def init_from_base(args: argparse.Namespace, folder: RunFolder) -> None:
    """Copy what --base made before its AR stage, as finished stages; the AR decoder is new."""
    base = RunFolder(model_folder(args.base).resolve())
    vae = replace(base.config.autoencoder, scale_factor=1.0, shift_factor=0.0)  # are measured
    if replace(base.config, autoencoder=vae) != NexusGenConfig.tiny():
        raise ValueError(f"--base {args.base}: its sizes are not those of NexusGenConfig.tiny()")
    if folder.goal.exists():
        if (read_summary(args.out, "generation") or {}).get("base") != str(base.source):
            raise ValueError(f"{args.out} holds a model without this --base; give another --out")
        return
    torch.manual_seed(args.seed)
    folder.save(base.config, autoencoder=base.vae(), generation=base.generation())
    train_vision(folder, None, args)
    for name in ("vae", "vision", "generation"):
        note = {"stage": name, "steps": 0, "seconds": 0.0, "metrics": {}, "base": str(base.source)}
        write_summary(args.out, note, f"copied from {args.base}")


def replace_text(file: Path, text: str) -> None:
    weights.replace_file(file, lambda path: path.write_text(text, "utf-8"))


def check_writable(folder: Path) -> None:
    """OSError when nothing can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_goal(goal: Path) -> None:
    """Refuse a folder that a shipped model cannot replace, or that holds anything else."""
    known = {file.relative_to(weights.TINY) for file in weights.TINY.rglob("*")}
    if other := next((p for p in goal.rglob("*") if p.relative_to(goal) not in known), None):
        raise ValueError(f"--ship {goal}: {other} is no part of a shipped model; give another")
    check_writable(goal)
    check_writable(goal.resolve().parent)


def export(folder: RunFolder, args: argparse.Namespace) -> None:
    """Replace `args.ship` by the model in fp16, the log of its run, and the words it knows.

    The metadata of every file say how it was made. The folder is written beside the old one, then
    takes its place: so it never holds files of two models.
    """
    done = {name: read_summary(args.out, name) for name in TIME_SHARE}
    stages = {name: [s["command"], s["steps"], s["seconds"]] for name, s in done.items()}
    facts = {
        "command": "; ".join(dict.fromkeys(s["command"] for s in done.values())),
        "stages": json.dumps(stages),
        "seed": str(args.seed),
        "minutes": f"{sum(s['seconds'] for s in done.values()) / 60:.1f}",
        "metrics": json.dumps({name: s["metrics"] for name, s in done.items()}),
    }
    known = json.dumps(known_facts(), ensure_ascii=False)
    options, goal = {"dtype": torch.float16, "metadata": facts}, args.ship.resolve()
    check_goal(goal)
    with tempfile.TemporaryDirectory(dir=goal.parent, prefix=f".{goal.name}.") as tmp_dir:
        new = Path(tmp_dir, "new")
        weights.save_checkpoint(new, folder.config, **folder.all_parts(), **options)
        replace_text(new / "toy_words.json", known)
        shutil.copyfile(args.out / "metrics.jsonl", new / "metrics.jsonl")
        goal.rename(Path(tmp_dir, "old"))
        new.rename(goal)


# ------------------------------------------------------------------------------------ your own data


def init_run(args: argparse.Namespace, folder: RunFolder) -> None:
    """Copy the model to fine-tune, in fp32, and record the data."""
    digest = hashlib.sha256(args.data.read_bytes()).hexdigest()
    facts = json.dumps({"data": digest, "model": str(args.model), "ratio": list(args.ratio)})
    file, begun = args.out / "data.json", args.out / "data.json.begun"
    if file.exists():
        if file.read_bytes() != facts.encode():
            raise ValueError(f"{args.out} is a run on other data; give another --out")
        return
    if folder.goal.exists() and not begun.exists():  # it exists if a run was killed below
        raise ValueError(f"{args.out} holds a model that was not begun with --data")
    begun.touch()
    source = RunFolder(model_folder(args.model))
    folder.save(source.config, **source.all_parts())
    replace_text(file, facts)
    begun.unlink()


def check_data(args: argparse.Namespace) -> None:
    """Print every mistake of a data file; ValueError when there is one."""
    model = RunFolder(model_folder(args.model))
    mistakes = check_file(args.data, model.config, model.tokenizer())
    if mistakes:
        print(*mistakes, sep="\n")
        raise ValueError(f"{args.data}: {len(mistakes)} mistakes, see above")
    tasks = [finetune.task_of(line) for line in MessageDataset(args.data).lines]
    print(f"{args.data}: good; " + ", ".join(f"{tasks.count(t)} {t}" for t in finetune.TASKS))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; ValueError names an option that is wrong."""
    parser = Parser("train_tiny.py", description=__doc__)
    add = parser.add_argument
    add("--stage", choices=("all", *TIME_SHARE), default="all", help="what to train")
    add("--minutes", type=float, default=30.0, help="budget of the chosen stages")
    add("--steps", type=int, help="steps of each stage, instead of minutes")
    add("--seed", type=int, default=0, help="of all random numbers")
    add("--base", help="the model whose tower and decoder --stage ar uses: a folder, or tiny")
    add("--out", type=Path, help="folder of the run (runs/tiny; runs/own; runs/ar with --base)")
    add("--workers", type=int, default=1, help="only 1: training runs in one process, with threads")
    add("--quiet", action="store_true", help="no progress bar")
    goal = {"type": Path, "nargs": "?", "const": weights.TINY}
    add("--ship", **goal, help="write the model in fp16 (without a folder: as the shipped one)")
    add("--data", type=Path, help="fine-tune on this file in the message-like format")
    add("--check", action="store_true", help="only name the mistakes of --data")
    add("--model", default="tiny", help="what --data fine-tunes: a folder, or tiny")
    add("--ratio", type=ratio, default="1:2:1", help="understanding:generation:editing of --data")
    add("--lora", type=int, default=0, help="rank; the AR model learns by LoRA")
    add("--shard", type=int, default=256, help="samples in a file of cached embeddings")
    args = parser.parse_args(argv)
    if not 0 < args.minutes < math.inf:
        raise ValueError(f"--minutes must be positive, not {args.minutes:g}")
    check_least(args, steps=1, workers=1, seed=0, shard=1, lora=0)
    if args.workers > 1:
        raise ValueError("--workers must be at most 1: training runs in one process, with threads")
    if args.check and not args.data:
        raise ValueError("--check needs --data")
    if args.base and (args.data or args.stage != "ar"):
        raise ValueError("--base is for --stage ar")
    if args.ship and args.data:
        raise ValueError("--ship is for whole runs; with --data the folder's model/ is the model")
    args.out = args.out or Path("runs", "own" if args.data else "ar" if args.base else "tiny")
    return args


def ratio(text: str) -> tuple[float, ...]:
    """ "1:2:1" -> the weights of understanding, generation and editing."""
    parts = tuple(float(part) for part in text.split(":"))
    if len(parts) != 3 or not all(0 <= part < 1e6 for part in parts) or not sum(parts):
        raise ValueError(text)
    return parts


if __name__ == "__main__":
    sys.exit(main())
