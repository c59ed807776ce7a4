"""Shards: the curve of one process on two, checkpoints that fit any number, fp32 master weights."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_model import make_tiny
from torch import nn

from nexus_min.scale.estimate import memory
from nexus_min.scale.fsdp import (
    BETAS,
    MAX_GRAD_NORM,
    PRESETS,
    LossModule,
    ShardedState,
    fit,
    fsdp_units,
    full_state_dict,
)
from nexus_min.scale.train import processes
from nexus_min.toy.stages import toy_line
from nexus_min.toy.tasks import sample_example
from nexus_min.train import finetune
from nexus_min.train.stage import Run, make_rng

CPU = torch.device("cpu")
PRESET = replace(PRESETS["ar_pretrain"], batch=8, steps=6, warmup=2, lr=3e-4)
MICRO_BATCH = 2


class Rows:
    """Random samples for a decoder, in the place of `data.Shards`."""

    where = ()

    def __len__(self):
        return 5

    def rows(self, indices):
        sizes = {"embeds": (16, 128), "refs": (64, 128), "latents": (16, 8, 8)}
        drawn = torch.Generator().manual_seed(0)
        rows = {k: torch.randn(5, *size, generator=drawn) for k, size in sizes.items()}
        return {k: x[torch.as_tensor(indices)] for k, x in rows.items()}


def make_stage(name: str):
    """A stage of `finetune` at tiny size, on micro-batches of MICRO_BATCH samples."""
    model = make_tiny()
    if name == "ar":
        rng = np.random.default_rng(3)
        lines = [toy_line(sample_example(rng, k)) for k in ("understand", "generate", "edit")]
        given = model.tokenizer, model.config, finetune.TaskMixture(lines), MICRO_BATCH
        return finetune.autoregressive_stage(model.ar, *given)
    given = model.empty_prompt, Rows(), model.config, MICRO_BATCH
    return finetune.decoder_stage(getattr(model, name), *given)


def plainly(name: str, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of the same training by a plain loop: no shards, nothing recomputed."""
    stage = make_stage(name)
    learns = [p for p in stage.modules.parameters() if p.requires_grad]
    adamw, losses = torch.optim.AdamW(learns, betas=BETAS, weight_decay=0.0), []
    for step in range(steps):
        parts = [stage.loss(make_rng(0, stage.name, step, k), 0.0)[0] for k in range(4)]
        mean = torch.stack(parts).mean()
        mean.backward()
        nn.utils.clip_grad_norm_(learns, MAX_GRAD_NORM)
        adamw.param_groups[0]["lr"] = PRESET.lr * PRESET.lr_scale(step)
        adamw.step()
        adamw.zero_grad()
        losses.append(float(mean.detach()))
    return losses, stage.modules.state_dict()


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in open(folder / "metrics.jsonl")]


def sharded(folder: Path, name: str, preset=PRESET, bf16: bool = False, **options) -> None:
    """Train a stage by `fit` and save its gathered weights."""
    folder.mkdir(parents=True, exist_ok=True)
    stage = make_stage(name)
    fit(stage, Run(folder, quiet=True, bf16=bf16), preset, MICRO_BATCH, CPU, **options)
    weights = full_state_dict(stage.modules)
    if dist.get_rank() == 0:
        save_file(weights, folder / "weights.safetensors")


def bytes_of(state: ShardedState) -> dict[str, int]:
    """What this process really holds."""

    def held(tensors):
        return sum(t.to_local().nbytes for t in tensors)

    learns = state.parameters.values()
    state.root(np.random.default_rng(0), 0.0)[0].backward()
    moments = [state.optimizer.state[p][k] for p in learns for k in ("exp_avg", "exp_avg_sq")]
    frozen = [p for p in state.root.parameters() if not p.requires_grad]
    return {
        "weights": held(learns),
        "gradients": held(p.grad for p in learns),
        "optimizer": held(moments),
        "frozen": sum(p.nbytes for p in frozen),
    }


def one_of_two(rank: int, folder: str, part: str) -> None:
    torch.set_num_threads(1)
    folder = Path(folder)
    store = {"init_method": f"file://{folder}/store-{part}", "world_size": 2}
    dist.init_process_group("gloo", rank=rank, **store)
    if part == "first":
        sharded(folder / "ar", "ar", until=2)
        sharded(folder / "editing", "editing", until=3)
        state = ShardedState(make_stage("ar"), folder, CPU, bf16=False)
        (folder / f"held-{rank}.json").write_text(json.dumps(bytes_of(state)))
    else:
        sharded(folder / "ar", "ar")
        low = replace(PRESET, steps=1, warmup=0, lr=1e-6)
        sharded(folder / "bf16", "generation", low, bf16=True)
    dist.destroy_process_group()
    os._exit(0)  # DTensor's caches keep gloo's threads, which now and then abort a normal exit


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two processes begin, one goes on, two end."""
    folder = tmp_path_factory.mktemp("shards")
    torch.multiprocessing.spawn(one_of_two, args=(str(folder), "first"), nprocs=2)
    with processes():
        sharded(folder / "ar", "ar", until=4)
    torch.multiprocessing.spawn(one_of_two, args=(str(folder), "last"), nprocs=2)
    return folder


def test_two_processes_one_and_two_again_are_one(trained):
    """Save on 2, resume on 1, and back: the curve of one process that never stopped."""
    want, weights = plainly("ar", 6)
    np.testing.assert_allclose(losses(trained / "ar"), want, atol=1e-5, rtol=0)
    got = load_file(trained / "ar" / "weights.safetensors")
    assert got.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-5, rtol=0, msg=name)
    start = make_stage("ar").modules.state_dict()
    moved = {k.split(".")[1] for k in got if not torch.equal(got[k], start[k])}
    assert moved == {"model", "lm_head", "vision_head", "image_prefill_embeds"}  # not `visual`


def test_the_editing_decoder_too(trained):
    want, weights = plainly("editing", 3)
    np.testing.assert_allclose(losses(trained / "editing"), want, atol=1e-5, rtol=0)
    got = load_file(trained / "editing" / "weights.safetensors")
    for name, tensor in weights.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-5, rtol=0, msg=name)


def test_checkpoints_are_plain_fp32_shards(trained):
    """The last two stay; no pickle; each process's file holds its half."""
    folders = sorted(p.name for p in (trained / "ar").iterdir() if p.is_dir())
    assert folders == ["ar.0000004", "ar.0000006"]
    alone, both = (sorted((trained / "ar" / name).iterdir()) for name in folders)
    assert [len(alone), len(both)] == [1, 2]
    assert {f.suffix for f in (*alone, *both)} == {".safetensors"}
    name = "weight/parts.ar.model.layers.0.mlp.up_proj.weight"
    shapes = []
    for file in (*alone, *both):
        with safe_open(file, "pt") as shard:
            kinds = {shard.get_slice(k).get_dtype() for k in shard.keys() if k != "step"}
            assert kinds == {"F32"}
            assert not [k for k in shard.keys() if "visual" in k]
            shapes.append(shard.get_slice(name).get_shape())
    assert shapes == [[384, 128], [192, 128], [192, 128]]


def test_bf16_computes_over_fp32_master_weights(trained):
    """A step of 1e-6 moves the master weights, though bf16 could not tell most of them apart."""
    stage = make_stage("generation")
    start = stage.modules.state_dict()
    with torch.no_grad():
        parts = [stage.loss(make_rng(0, "generation", 0, k), 0.0)[0] for k in range(4)]
    want, got = float(torch.stack(parts).mean()), losses(trained / "bf16")[0]
    assert 0 < abs(got - want) < 0.01 * want
    weights = load_file(trained / "bf16" / "weights.safetensors")
    pairs = [(weights[k], start[k]) for k in start if "img_attn.qkv.weight" in k]
    for after, before in pairs:
        assert after.dtype == torch.float32
        assert (after != before).float().mean() > 0.99
        assert (after.bfloat16() == before.bfloat16()).float().mean() > 0.9
        assert (after - before).abs().max() < 1.1e-6


def test_bytes_are_those_that_were_counted(trained):
    need = memory(LossModule(make_stage("ar")), 2, False)
    for rank in (0, 1):
        held = json.loads((trained / f"held-{rank}.json").read_text())
        assert held == {name: need[name] for name in held}


# ---- what needs no second process ----------------------------------------------------------------


def test_units_are_blocks_tables_and_modulations():
    def names(name):
        root = LossModule(make_stage(name))
        found = {id(u) for u in fsdp_units(root)}
        return [k for k, m in root.named_modules() if id(m) in found]

    layers = [f"parts.ar.model.layers.{i}" for i in range(4)]
    assert names("ar") == ["parts.ar.model.embed_tokens", *layers, "parts.ar.lm_head"]
    found = names("editing")
    assert sum(k.endswith(".lin") for k in found) == 2 * 1 + 4 and len(found) == 6 + 1 + 4 + 1


def test_the_presets_are_table_4():
    rows = {k: (p.lr, p.cosine, p.batch, p.steps, p.warmup, p.ratio) for k, p in PRESETS.items()}
    assert rows == {
        "ar_pretrain": (1e-5, True, 512, 100_000, 7500, (1, 2, 1)),
        "ar_aesthetic": (1e-5, True, 512, 10_000, 800, (1, 2, 1)),
        "generation_decoder": (1e-5, False, 128, 20_000, 100, (0, 1, 0)),
        "editing_decoder": (1e-5, False, 128, 10_000, 100, (0, 0, 1)),
    }


def test_schedules_warm_up_then_cosine_or_constant():
    cosine, constant = PRESETS["ar_aesthetic"].lr_scale, PRESETS["editing_decoder"].lr_scale
    assert [cosine(0), cosine(799), cosine(800)] == [1 / 800, 1.0, 1.0]
    assert cosine(5400) == pytest.approx(0.5) and cosine(9999) < 1e-6
    assert math.isclose(cosine(800 + 2300), 0.5 * (1 + math.cos(math.pi / 4)))
    assert [constant(0), constant(99), constant(9999)] == [0.01, 1.0, 1.0]
    assert replace(PRESETS["editing_decoder"], warmup=0).lr_scale(0) == 1.0


def test_a_batch_that_does_not_divide(tmp_path):
    with processes(), pytest.raises(ValueError, match="a batch of 7 .* micro-batches of 2 on 1"):
        fit(make_stage("ar"), Run(tmp_path), replace(PRESET, batch=7), MICRO_BATCH, CPU)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: file.write_bytes(b"no shard"), "not a checkpoint"),
        (
            lambda file: save_file({"step": torch.tensor(3)}, file),
            "incomplete, or another model's: .* tensors",
        ),
    ],
)
def test_a_broken_or_foreign_checkpoint_is_one_line(tmp_path, caplog, write, message):
    (folder := tmp_path / "generation.0000009").mkdir()
    write(folder / "shard-00001-model-00001-of-00001.safetensors")
    with processes():
        state = ShardedState(make_stage("generation"), tmp_path, CPU, bf16=False)
        with pytest.raises(ValueError, match=f"generation.0000009: {message}") as error:
            state.restore()
    assert "\n" not in str(error.value) and not caplog.records


def test_a_checkpoint_that_lacks_a_process_file(trained, tmp_path):
    for lost in (1, 2):
        folder = tmp_path / f"{lost}"
        shutil.copytree(trained / "ar" / "ar.0000006", folder / "ar.0000006")
        next((folder / "ar.0000006").glob(f"shard-0000{lost}-*")).unlink()
        with processes(), pytest.raises(ValueError, match="ar.0000006: incomplete, or another"):
            ShardedState(make_stage("ar"), folder, CPU, bf16=False).restore()


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path):
    """What is dumped, in the place of the checkpoint, leads to the same step again."""

    def training_breaks():
        stage = make_stage("generation")
        loss = stage.loss

        def breaks(rng, progress):
            value, metrics = loss(rng, progress)
            return value * (math.nan if progress == 1 / PRESET.steps else 1.0), metrics

        stage.loss = breaks
        with processes(), pytest.raises(FloatingPointError, match="generation, step 1: not finite"):
            fit(stage, Run(tmp_path, quiet=True), PRESET, MICRO_BATCH, CPU, save_every=1)

    training_breaks()
    folders = sorted(p for p in tmp_path.iterdir() if p.is_dir())
    assert [p.name for p in folders] == ["generation.0000001", "generation.nonfinite"]
    kept, dumped = (load_file(next(p.iterdir())) for p in folders)
    assert all(t.isfinite().all() and torch.equal(t, dumped[k]) for k, t in kept.items())
    assert len(losses(tmp_path)) == 1
    shutil.rmtree(folders[0])
    folders[1].rename(folders[0])
    training_breaks()
    assert len(losses(tmp_path)) == 1


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with processes():
        state = ShardedState(make_stage("generation"), tmp_path, CPU, bf16=False)
        state.save()
        (tmp_path / "generation.partial").mkdir()  # of a run that was killed
        state.step = 1
        monkeypatch.setattr("safetensors.torch.save", full)
        monkeypatch.setattr("torch.distributed.checkpoint.filesystem.os.fsync", full)
        message = (
            "cannot write .*generation.0000001: .*No space left.*; the last checkpoint is kept"
        )
        with pytest.raises(OSError, match=message) as error:
            state.save()
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["generation.0000000"]


def test_an_interrupt_is_saved_and_goes_on(tmp_path):
    stage = make_stage("generation")
    loss = stage.loss

    def interrupted(rng, progress):
        if progress == 1 / PRESET.steps:
            signal.raise_signal(signal.SIGINT)
        return loss(rng, progress)

    stage.loss = interrupted
    with processes(), pytest.raises(KeyboardInterrupt):
        (tmp_path / "a").mkdir()
        fit(stage, Run(tmp_path / "a", quiet=True), PRESET, MICRO_BATCH, CPU)
    assert [p.name for p in (tmp_path / "a").iterdir() if p.is_dir()] == ["generation.0000002"]
    with processes():
        sharded(tmp_path / "a", "generation", until=4)
        sharded(tmp_path / "b", "generation", until=4)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    a, b = (load_file(tmp_path / name / "weights.safetensors") for name in "ab")
    assert all(torch.equal(t, b[k]) for k, t in a.items())
