"""The training command: every stage at a micro budget, its folder, what it ships, and bad input."""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import train_tiny
from nexus_min.pipeline import NexusGen
from nexus_min.toy import stages as toy
from nexus_min.train.trainer import fit

ROOT = Path(__file__).parents[1]
DRAWN = ("vae", "generation", "editing")
MICRO = ["--steps", "2", "--quiet"]


@pytest.fixture(scope="module")
def micro():
    """Tiny batches and pools for the whole file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tiny, "BATCH", dict.fromkeys(train_tiny.BATCH, 4))
        patch.setattr(toy, "POOL", 64)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(micro, tmp_path_factory) -> Path:
    """A folder in which every stage took two steps, shipped to `ship`."""
    folder = tmp_path_factory.mktemp("run")
    for stage in train_tiny.TIME_SHARE:
        argv = ["--stage", stage, "--out", str(folder), *MICRO]
        assert train_tiny.main(argv) == 0, stage
    argv = ["--out", str(folder), *MICRO, "--ship", str(folder / "ship")]
    assert train_tiny.main(argv) == 0
    return folder


def refused(capsys, *argv) -> str:
    """The one line on standard error of a command that ends with status 2."""
    capsys.readouterr()
    assert train_tiny.main(list(map(str, argv))) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("train_tiny: ") and err.count("\n") == 1, err
    return err


# ---- good input ----------------------------------------------------------------------------------


def test_every_stage_and_the_model_they_make(trained):
    lines = [json.loads(line) for line in open(trained / "metrics.jsonl")]
    assert list(dict.fromkeys(line["stage"] for line in lines)) == list(train_tiny.TIME_SHARE)
    assert all(math.isfinite(line.get("loss", 0.0)) for line in lines)
    for stage in train_tiny.TIME_SHARE:
        assert json.loads((trained / f"{stage}.json").read_text())["steps"] == 2
    drawn = ["ar_final_edit", "ar_final_generate", *(f"{n}_final" for n in DRAWN)]
    assert sorted(path.stem for path in trained.glob("*.png")) == sorted(drawn)
    model = NexusGen.load(trained / "model")
    image = model.generate("a red circle", num_steps=1)
    assert image.size == (64, 64)


def test_ship_writes_fp16_and_how_it_was_made(trained):
    files = sorted((trained / "ship").rglob("*.safetensors"))
    assert len(files) == 5
    for file in files:
        with safe_open(file, "pt") as weights:
            facts = weights.metadata()
            kinds = {weights.get_slice(k).get_dtype() for k in weights.keys()}
        assert kinds == {"F16"}
        assert facts["seed"] == "0" and float(facts["minutes"]) >= 0
        assert facts["command"].startswith("python train_tiny.py --stage vae --out")
        assert facts["command"].count("; ") == len(train_tiny.TIME_SHARE) - 1
        assert set(json.loads(facts["metrics"])) == set(train_tiny.TIME_SHARE)
    assert sum(f.stat().st_size for f in (trained / "ship").rglob("*.*")) < 15e6
    assert NexusGen.load(trained / "ship").config == NexusGen.load(trained / "model").config
    log = "metrics.jsonl"
    assert (trained / "ship" / log).read_bytes() == (trained / log).read_bytes()


def files_of(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_ship_without_a_folder_replaces_the_shipped_model(trained, micro, tmp_path, monkeypatch):
    """Whole or not at all: nothing of the earlier model stays, nor of a ship that failed."""
    goal = shutil.copytree(train_tiny.weights.TINY, tmp_path / "tiny")
    (goal / "earlier.safetensors").write_bytes(b"of an earlier model")
    before = files_of(goal)
    monkeypatch.setattr(train_tiny.weights, "TINY", goal)
    argv = ["--out", str(trained), *MICRO, "--ship"]
    with monkeypatch.context() as patch:
        patch.setattr(train_tiny.shutil, "copyfile", lambda *_: 1 / 0)  # fails with all but the log
        with pytest.raises(ZeroDivisionError):
            train_tiny.main(argv)
    assert files_of(goal) == before and list(tmp_path.iterdir()) == [goal]
    assert train_tiny.main(argv) == 0
    assert files_of(goal).keys() == files_of(trained / "ship").keys() < before.keys()
    assert list(tmp_path.iterdir()) == [goal] and NexusGen.load(goal)


def test_ship_never_replaces_a_folder_of_other_files(trained, micro, tmp_path, capsys):
    goal = tmp_path / "mine"
    (goal / "sub").mkdir(parents=True)
    (goal / "sub" / "letter.txt").write_text("dear reader")
    told = refused(capsys, "--out", trained, *MICRO, "--ship", goal)
    assert f"--ship {goal}: {goal}/sub is no part of a shipped model" in told
    assert list(goal.rglob("*.txt"))


def test_what_is_finished_is_skipped(trained, capsys):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()}
    assert train_tiny.main(["--out", str(trained), *MICRO]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()}
    assert "ar is finished (2 steps" in capsys.readouterr().out


def test_what_stands_on_a_changed_stage_is_trained_again(trained, micro, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    for file in folder.glob("vision.*"):
        file.unlink()
    assert train_tiny.is_finished(folder, "vae") and train_tiny.read_summary(folder, "ar")
    assert not train_tiny.is_finished(folder, "generation")
    assert train_tiny.main(["--out", str(folder), *MICRO]) == 0
    out = capsys.readouterr().out
    assert "vae is finished" in out and "editing is trained again" in out
    assert all(train_tiny.is_finished(folder, name) for name in train_tiny.TIME_SHARE)


def test_the_same_command_gives_the_same_model(trained, micro, tmp_path):
    """Bit for bit, on one thread: all stages in one command, or each by its own."""
    assert train_tiny.main(["--out", str(tmp_path), *MICRO]) == 0
    assert files_of(tmp_path / "model") == files_of(trained / "model")


def test_the_ar_stage_on_the_parts_of_a_known_model(trained, micro, tmp_path, capsys):
    """Its decoder starts anew: as much training with the same seed makes the same model."""
    out, base = tmp_path / "my run", str(trained / "model")
    argv = ["--stage", "ar", "--base", base, "--out", str(out), *MICRO]
    assert train_tiny.main(argv) == 0
    text = capsys.readouterr().out
    made, known = files_of(out / "model"), files_of(trained / "model")
    editing = Path("Nexus-GenV2/edit_decoder.safetensors")
    assert made == {k: x for k, x in known.items() if k != editing}
    assert f"sample grid: {out}/ar_final_generate.png" in text
    assert f"generate \"a red star\" --model '{out}'/model\n" in text
    assert f"next: python train_tiny.py --stage editing --out '{out}'" in text
    assert train_tiny.main(argv) == 0 and "ar is finished" in capsys.readouterr().out
    assert files_of(out / "model") == made
    assert train_tiny.main(["--stage", "editing", "--out", str(out), *MICRO]) == 0
    assert f"eval --cases 20 --model '{out}'/model\n" in capsys.readouterr().out
    assert files_of(out / "model") == known


def test_the_first_stage_says_what_comes_next(trained, micro, tmp_path, capsys):
    assert train_tiny.main(["--stage", "vae", "--out", str(tmp_path), *MICRO]) == 0
    told = capsys.readouterr().out
    assert f"vae_final.png\nnext: python train_tiny.py --stage vision --out {tmp_path}\n" in told


@pytest.mark.parametrize("stage", train_tiny.TIME_SHARE)
def test_killed_between_its_last_checkpoint_and_its_model(trained, micro, tmp_path, stage):
    """What ends a stage depends on its checkpoint alone, not on the steps of this process."""
    folder = tmp_path / "run"
    argv = ["--stage", stage, "--out", str(folder), *MICRO]
    if stage == "vision":  # whose file `ar` has written anew since
        assert train_tiny.main(argv) == 0
    else:
        shutil.copytree(trained, folder)
    model = {p: p.read_bytes() for p in (folder / "model").rglob("*") if p.is_file()}
    (folder / f"{stage}.json").unlink()
    assert train_tiny.main(argv) == 0 and (folder / f"{stage}.json").exists()
    assert [str(p) for p, was in model.items() if p.read_bytes() != was] == []


def test_budget_of_the_stages(monkeypatch):
    stages, now, total = tuple(train_tiny.TIME_SHARE), 1000.0, 0.0
    monkeypatch.setattr(train_tiny.time, "monotonic", lambda: now)
    for stage in stages:  # each takes 3 s longer than its budget, the last one too
        seconds = train_tiny.budget(stage, stages, 10, started=1000.0)
        total += seconds + 3
        now += seconds + 3
    assert total == pytest.approx(603)
    now = 1000.0  # after a restart nothing is late
    share = train_tiny.TIME_SHARE["ar"]
    assert train_tiny.budget("ar", stages, 10, started=1000.0) == pytest.approx(600 * share)
    assert train_tiny.budget("ar", ("ar",), 10, started=1000.0) == 600
    now = 9000.0  # a stop, not a stage that was late: it takes at most a tenth
    assert train_tiny.budget("ar", stages, 10, started=1000.0) == pytest.approx(540 * share)


def test_the_loop_is_four_calls_below_main(micro, tmp_path, monkeypatch):
    """main -> train_vae -> fit -> backward: found on the stack when `backward` is called."""
    frames, package = [], str(ROOT / "nexus_min")

    def stub(*_):
        frame = sys._getframe(1)
        while frame:
            file = frame.f_code.co_filename
            if file == train_tiny.__file__ or file.startswith(package):
                frames.append(frame.f_code.co_name)
            frame = frame.f_back
        raise ValueError("stop here")

    monkeypatch.setattr(torch.Tensor, "backward", stub)
    assert train_tiny.main(["--stage", "vae", "--out", str(tmp_path), *MICRO]) == 2
    assert frames == ["fit", "train_vae", "main"]
    loop = inspect.getsource(fit)
    assert loop.count("for step in") == 1
    steps = ("stage.loss(", "loss.backward()", "optimizer.step()", "state.average", "report()")
    order = [loop.index(call) for call in (*steps, "state.save()", "state.sample(")]
    assert order == sorted(order)


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / "train_tiny.py"), "--out", str(folder), *options]


def test_ctrl_c_saves_and_the_same_command_resumes(tmp_path, micro):
    """From the repository's folder, without an installed package."""
    argv = command(tmp_path, "--stage", "vae", "--minutes", "5", "--quiet")
    options = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits "ignored"
    process = subprocess.Popen(argv, stdout=-1, stderr=-1, text=True, **options)
    signal.signal(signal.SIGINT, heard)
    log = tmp_path / "metrics.jsonl"
    deadline = time.time() + 300  # a busy machine is slow
    while not log.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "repeat the command" in err and "Traceback" not in err and err.count("\n") == 1
    step = torch.load(tmp_path / "vae.ckpt")["schedule"]["step"]
    assert step >= 50
    again = ["--steps", str(step + 1), "--quiet", "--out", str(tmp_path)]
    assert train_tiny.main(["--stage", "vae", *again]) == 0
    assert json.loads((tmp_path / "vae.json").read_text())["steps"] == step + 1


# ---- bad input -----------------------------------------------------------------------------------


NOTE = {"stage": "vae", "steps": 2, "seconds": 1.0, "stamp": 1.0, "needs": {}}


@pytest.mark.parametrize(
    "note",
    ["{", "[1]", "3", "[" * 100_000, {"steps": None}, {"needs": 3}, {"needs": {"vae": 1}}],
    ids=range(7),
)
def test_a_note_that_is_none_names_its_file(tmp_path, capsys, note):
    text = note if isinstance(note, str) else json.dumps(NOTE | note)
    (tmp_path / "vae.json").write_text(text)
    told = refused(capsys, "--stage", "vae", "--out", tmp_path, *MICRO)
    assert "vae.json: not a summary" in told and "delete it" in told


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--stage", "vea"], "invalid choice: 'vea'"),
        (["--minutes", "0"], "--minutes must be positive, not 0"),
        (["--minutes", "nan"], "--minutes must be positive"),
        (["--minutes", "inf"], "--minutes must be positive"),
        (["--minutes", "soon"], "invalid float value: 'soon'"),
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--workers", "0"], "--workers must be at least 1, not 0"),
        (["--workers", "2"], "--workers must be at most 1: training runs in one process"),
        (["--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_bad_options(capsys, tmp_path, monkeypatch, argv, told):
    monkeypatch.chdir(tmp_path)
    assert told in refused(capsys, *argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "stage, first",
    [("generation", "vae"), ("ar", "vision"), ("editing", "vae")],
)
def test_a_stage_before_its_turn_names_what_to_run(capsys, tmp_path, stage, first):
    folder = tmp_path / "my run"
    line = refused(capsys, "--stage", stage, "--out", folder, *MICRO)
    told = f"python train_tiny.py --stage {first} --out '{folder}'"
    assert f"stage {stage} needs {first}" in line and told in line
    assert not folder.exists()


def test_a_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, "--out", tmp_path / "file", *MICRO)
    assert "/proc/nexus" in refused(capsys, "--out", "/proc/nexus", *MICRO)
    goal = ["--ship", "/proc/nexus"]  # told before anything is trained
    assert "/proc/nexus" in refused(capsys, "--out", tmp_path / "run", *MICRO, *goal)
    assert not (tmp_path / "run").exists()


def test_ship_needs_every_stage(capsys, tmp_path, micro):
    goal = tmp_path / "ship"
    argv = ["--stage", "vae", "--out", tmp_path / "run", *MICRO, "--ship", goal]
    line = refused(capsys, *argv)
    assert "--ship needs every stage, not trained yet: vision, generation, ar, editing" in line
    assert not goal.exists() and not (tmp_path / "run").exists()


def test_a_base_that_does_not_fit(capsys, trained, micro, tmp_path):
    other, out = shutil.copytree(trained / "model", tmp_path / "other"), tmp_path / "run"
    sizes = json.loads((other / "nexus_min.json").read_text())
    sizes["mmdit"]["depth"] += 1
    (other / "nexus_min.json").write_text(json.dumps(sizes))
    argv = ["--stage", "ar", "--out", out, *MICRO, "--base"]
    told = refused(capsys, *argv, other)
    assert f"--base {other}: its sizes are not those of NexusGenConfig.tiny()" in told
    assert "no model folder 'nowhere'" in refused(capsys, *argv, "nowhere")
    assert "--base is for --stage ar" in refused(capsys, *MICRO, "--base", trained / "model")
    told = refused(capsys, *argv[:3], trained, *MICRO, "--base", trained / "model")
    assert f"{trained} holds a model without this --base" in told


def test_a_broken_checkpoint_is_one_line(tmp_path, capsys):
    (tmp_path / "vae.ckpt").write_bytes(b"broken")
    err = refused(capsys, "--stage", "vae", "--out", tmp_path, *MICRO)
    assert "vae.ckpt: not a checkpoint" in err


def test_running_out_of_memory_is_one_line(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(train_tiny, "fit", fail)
    err = refused(capsys, "--stage", "vae", "--out", tmp_path, *MICRO)
    assert "out of memory" in err and "repeat the command" in err
