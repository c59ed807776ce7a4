"""Train the tiny Nexus-Gen through the paper's stages, on a laptop CPU.

    python train_tiny.py --minutes 30              # everything, from nothing, into runs/tiny
    python train_tiny.py --stage ar --minutes 10   # one stage, on top of what the folder holds

Stages: `vae` (FLUX's, at toy width) and `vision` (grounding, the stand-in for Qwen2.5-VL's pre-training) make
the base; `generation` learns to reconstruct pictures from their own image embeddings (paper section 4.2), `ar`
is the multi-task training (4.1), `editing` learns from the embeddings that the AR model *predicts* (4.3).
The folder always holds a model in the official layout under `model/`; a run that is stopped goes on where it
was when the same command is given again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import weights_loader as loader
from nexus_min.autoencoder import AutoEncoder
from nexus_min.autoregressive import NexusGenAR
from nexus_min.config import NexusGenConfig
from nexus_min.mmdit import MMDiT
from nexus_min.tokenizer import QwenTokenizer
from nexus_min.toy import stages as toy
from nexus_min.toy.vocabulary import build_tokenizer
from nexus_min.training import Run, bf16_pays, fit, frozen_copy, world

STAGES = ("vae", "vision", "generation", "ar", "editing")
SHARES = {"vae": 0.08, "vision": 0.15, "generation": 0.17, "ar": 0.44, "editing": 0.16}  # of --minutes
BATCH = {"vae": 16, "vision": 32, "generation": 32, "ar": 32, "editing": 32}  # over all workers


class Folder:
    """The model of a run as it grows, in the official layout under `model/`."""

    def __init__(self, path: Path):
        self.path, self.model = path, path / "model"

    @property
    def config(self) -> NexusGenConfig:
        return loader.load_config(self.model) if self.model.exists() else NexusGenConfig.tiny()

    def save(self, config: NexusGenConfig, **components) -> None:
        """Write components as rank 0; every rank waits until they are there."""
        if world()[0] == 0:
            loader.save_checkpoint(self.model, config, dtype=None, **components)
        if dist.is_initialized():
            dist.barrier()

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


def train_vae(folder: Folder, run: Run, batch: int) -> None:
    config = folder.config
    vae = toy.init_vae(AutoEncoder(config.autoencoder))
    fit(toy.vae_stage(vae, batch), run)
    scale, shift = toy.latent_statistics(vae)
    sizes = replace(config.autoencoder, scale_factor=scale, shift_factor=shift)
    folder.save(replace(config, autoencoder=sizes), autoencoder=vae)


def train_vision(folder: Folder, run: Run, batch: int) -> None:
    config = folder.config
    ar = toy.init_ar(NexusGenAR(config.ar))
    fit(toy.vision_stage(ar.visual, config, batch), run)
    toy.standardise(ar.visual, config)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        build_tokenizer(config).save(file.name)
        empty = toy.empty_prompt(config)
        folder.save(config, ar=ar, empty_prompt=empty, tokenizer_file=file.name)


def train_generation(folder: Folder, run: Run, batch: int) -> None:
    config, vae, visual = folder.config, folder.vae(), folder.ar().visual
    started = time.perf_counter()
    pool = toy.reconstruction_pool(visual, vae, config, run)
    run = run.less(time.perf_counter() - started)
    mmdit, adapter = toy.init_mmdit(MMDiT(config.mmdit)), loader.make_adapter(config)
    fit(toy.generation_stage(mmdit, adapter, folder.empty_prompt(), pool, vae, config, batch), run)
    folder.save(config, generation=(mmdit, adapter))


def train_ar(folder: Folder, run: Run, batch: int) -> None:
    config, ar = folder.config, folder.ar()
    try:
        painter = toy.Painter(folder.vae(), *folder.generation(), folder.empty_prompt(), config)
    except ValueError:  # no decoder yet: learn without pictures of progress
        painter = None
    fit(toy.ar_stage(ar, folder.tokenizer(), config, batch, painter), run)
    folder.save(config, ar=ar)


def train_editing(folder: Folder, run: Run, batch: int) -> None:
    config, vae, ar = folder.config, folder.vae(), frozen_copy(folder.ar())
    started = time.perf_counter()
    pool = toy.editing_pool(ar, vae, folder.tokenizer(), config, run)
    run = run.less(time.perf_counter() - started)
    mmdit, merger = folder.generation()[0], loader.make_merger(config)
    merger.layers[0].load_state_dict(ar.model.layers[0].state_dict())
    fit(toy.editing_stage(mmdit, merger, folder.empty_prompt(), pool, vae, config, batch), run)
    folder.save(config, editing=(mmdit, merger))


TRAIN = {
    "vae": train_vae,
    "vision": train_vision,
    "generation": train_generation,
    "ar": train_ar,
    "editing": train_editing,
}


def train(args: argparse.Namespace, workers: int) -> None:
    """Run the chosen stages one after the other, in this process."""
    folder = Folder(Path(args.out))
    chosen = STAGES if args.stage == "all" else (args.stage,)
    for name in chosen:
        share = SHARES[name] if args.stage == "all" else 1.0
        seconds = None if args.steps else args.minutes * 60 * share
        torch.manual_seed(args.seed)
        bf16 = name != "vae" and bf16_pays()  # its convolutions gain nothing
        run = Run(folder.path, args.seed, seconds, args.steps, quiet=args.quiet, bf16=bf16)
        TRAIN[name](folder, run, max(1, BATCH[name] // workers))


def _worker(rank: int, args: argparse.Namespace, workers: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
    train(args, workers)
    dist.destroy_process_group()


def launch(args: argparse.Namespace) -> None:
    """One single-threaded process a worker; they average their gradients."""
    if args.workers == 1:
        return train(args, 1)
    with tempfile.TemporaryDirectory() as place:
        store = os.path.join(place, "store")
        arguments = (args, args.workers, store)
        torch.multiprocessing.spawn(_worker, args=arguments, nprocs=args.workers)


def ship(folder: Path, goal: Path, metadata: dict[str, str]) -> None:
    """Copy a run's model into `goal` in fp16, with `metadata` in every file."""
    run, config = Folder(folder), Folder(folder).config
    edit = run.model / loader.AR_FOLDER / "edit_decoder.safetensors"
    loader.save_checkpoint(
        goal,
        config,
        ar=run.ar(),
        generation=run.generation(),
        editing=(loader.load_mmdit(edit, config), loader.load_embedding_merger(edit, config)),
        autoencoder=run.vae(),
        empty_prompt=run.empty_prompt(),
        tokenizer_file=run.model / loader.AR_FOLDER / "tokenizer.json",
        dtype=torch.float16,
        metadata=metadata,
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. ValueError for values that make no sense."""
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--minutes", type=float, default=30.0, help="budget of the chosen stages")
    parser.add_argument("--steps", type=int, help="steps of each stage, instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/tiny", help="folder of the run (default runs/tiny)")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--ship", type=Path, help="write the finished model to this folder in fp16")
    args = parser.parse_args(argv)
    if args.minutes <= 0 or (args.steps is not None and args.steps < 1) or args.workers < 1:
        raise ValueError("--minutes, --steps and --workers must be positive")
    return args


def main(argv: list[str] | None = None) -> int:
    """Train; 0, or 2 after one clear line on standard error."""
    try:
        args = parse(argv)
        started = time.perf_counter()
        launch(args)
        minutes = (time.perf_counter() - started) / 60
        print(f"trained {args.stage} in {minutes:.1f} minutes: {args.out}/model")
        if args.ship:
            words = " ".join(sys.argv[1:] if argv is None else argv)
            facts = {"command": f"python train_tiny.py {words}", "seed": str(args.seed)}
            ship(Path(args.out), args.ship, facts | {"minutes": f"{minutes:.1f}"})
    except (ValueError, OSError) as error:
        print(f"train_tiny: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_tiny: stopped; the same command goes on from the last checkpoint")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
