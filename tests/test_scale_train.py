"""The command of full-scale training: torchrun on two processes, a model in the official layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_finetune import toy_file
from tiny_model import make_tiny, save_tiny

from nexus_min import weights as loader
from nexus_min.pipeline import NexusGen
from nexus_min.scale import train
from nexus_min.train.run_folder import RunFolder

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]
SMALL = ["--batch", "4", "--micro-batch", "2", "--warmup", "1", "--lr", "1e-3", "--quiet"]
SMALL += ["--steps", "3", "--shard", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_tiny(folder)
    toy_file(folder, ["understand", "generate", "edit", "generate"])
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def options(home: Path, preset: str, out: Path) -> list[str]:
    given = ["--preset", preset, "--data", home / "own.jsonl", "--model", home / "model"]
    return [*map(str, given), "--out", str(out), *SMALL]


def test_two_processes_by_torchrun_then_one(home, tmp_path, capsys):
    """Two steps on two processes, the third on one: a model that loads and draws."""
    out = tmp_path / "out"
    command = options(home, "generation_decoder", out)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = [*TORCHRUN, "nexus_min.scale.train", *command, "--until", "2"]
    done = subprocess.run(run, capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"trained generation_decoder: {out}/model\n"
    assert len(list((out / "generation.0000002").iterdir())) == 2
    assert len(list((out / "cache" / "generation").iterdir())) == 1  # of generation lines alone

    after_two = load_file(out / "model" / loader.AR_FOLDER / "generation_decoder.safetensors")
    assert train.main([*command, "--until", "0"]) == 0  # only converts, on one process
    again = load_file(out / "model" / loader.AR_FOLDER / "generation_decoder.safetensors")
    assert all(torch.equal(again[k], after_two[k]) for k in after_two | again)
    shards = [load_file(f) for f in (out / "generation.0000002").iterdir()]
    name = "final_layer.linear.weight"
    whole = torch.cat([s[f"weight/parts.mmdit.{name}"] for s in sorted(shards, key=len)])
    assert torch.equal(again["pipe.dit.final_proj_out.weight"], whole)

    assert train.main(command) == 0
    steps = [json.loads(line)["step"] for line in open(out / "metrics.jsonl")]
    assert steps == [1, 2, 3]
    before, after = NexusGen.load(home / "model"), NexusGen.load(out / "model")
    old, new = (m.generation.mmdit.img_in.weight for m in (before, after))
    assert not torch.equal(old, new) and new.dtype == torch.float32
    assert torch.equal(before.ar.lm_head.weight, after.ar.lm_head.weight)
    assert (out / "model" / loader.FLUX_FOLDER / "ae.safetensors").is_symlink()
    after.generate("a circle", num_steps=1, fast_preamble=True)

    capsys.readouterr()
    assert train.main([*command, "--seed", "1"]) == 2
    message = f"fullscale: error: {out} is a run with other settings: seed was 0, is 1; "
    message += "give another --out\n"
    assert capsys.readouterr().err == message


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", ["ar_pretrain", "generation_decoder", "editing_decoder"])
def test_a_gpu_has_the_losses_of_the_cpu(home, tmp_path, preset):
    """Three steps of one process: fp32 closely, bf16 roughly."""
    losses = {}
    for where, more in {"cpu": [], "fp32": ["--fp32"], "bf16": []}.items():
        env = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if where == "cpu" else {})
        given = [*options(home, preset, tmp_path / where), *more]
        run = [sys.executable, "-m", "nexus_min.scale.train", *given]
        subprocess.run(run, check=True, env=env, timeout=400)
        rows = (tmp_path / where / "metrics.jsonl").read_text().splitlines()
        losses[where] = torch.tensor([json.loads(row)["loss"] for row in rows])
    assert len(losses["cpu"]) == 3
    torch.testing.assert_close(losses["fp32"], losses["cpu"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses["bf16"], losses["cpu"], atol=1e-2, rtol=1e-2)


def test_a_decoder_begins_from_flux(home, tmp_path):
    """Without its file: FLUX.1-dev's MMDiT, and a new adapter or a merger of the AR's layer."""
    model = make_tiny()
    source = tmp_path / "model"
    parts = {"ar": model.ar, "empty_prompt": model.empty_prompt}
    loader.save_checkpoint(source, model.config, **parts, dtype=None)
    flux = source / loader.FLUX_FOLDER / "flux1-dev.safetensors"
    loader.save_tensors(flux, model.generation.mmdit.state_dict(), None, None)
    folder = RunFolder(source, tmp_path / "goal")
    for mmdit, _ in (folder.generation(), folder.editing()):
        assert torch.equal(mmdit.img_in.weight, model.generation.mmdit.img_in.weight)
    layer = folder.editing().merger.layers[0].state_dict()
    want = model.ar.model.layers[0].state_dict()
    assert all(torch.equal(layer[k], want[k]) for k in want)


@pytest.mark.parametrize(
    ("preset", "more", "message"),
    [
        ("none", [], "invalid choice: 'none'"),
        ("ar_pretrain", ["--micro", "0"], "--micro-batch must be at least 1, not 0"),
        ("ar_pretrain", ["--save-every", "0"], "--save-every must be at least 1"),
        ("ar_pretrain", ["--batch", "5"], "a batch of 5 does not divide into micro-batches of 2"),
        ("ar_pretrain", ["--model", "none"], "no model folder 'none'"),
        ("ar_pretrain", ["--data", "none.jsonl"], "No such file"),
        ("editing_decoder", ["--data", "drawn.jsonl"], "drawn.jsonl: no lines of the kind edit"),
    ],
)
def test_what_is_wrong_is_one_line(home, tmp_path, monkeypatch, capsys, preset, more, message):
    monkeypatch.chdir(tmp_path)
    lines = (home / "own.jsonl").read_text().split("\n")
    Path("drawn.jsonl").write_text(lines[1])
    assert train.main([*options(home, preset, tmp_path / "out"), *more]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert not torch.distributed.is_initialized()


def test_only_process_0_reports_what_all_have_in_common(monkeypatch, capsys):
    def out_of_memory(args, device):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GB\nmore")

    def interrupted(args, device):
        raise KeyboardInterrupt

    given = ["--preset", "ar_pretrain", "--data", "d", "--model", "m", "--out", "o"]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(train, "processes", nullcontext)
    monkeypatch.setattr(train, "train", interrupted)
    assert train.main(["--preset", "none"]) == 2 and train.main(given) == 130
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(train, "train", out_of_memory)
    assert train.main(given) == 2
    message = "fullscale: process 1: error: out of memory: CUDA out of memory. Tried to allocate"
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(message) and err.count("\n") == 1
    assert "smaller --micro-batch or more GPUs" in err
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(train, "train", interrupted)
    assert train.main(given) == 130
    stopped = "fullscale: stopped; the same command resumes from the last checkpoint\n"
    assert capsys.readouterr() == ("", stopped)
