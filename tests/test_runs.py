"""Runs say what is so: pauses, signals, changed settings, folders in use, links."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from test_training import make_stage, run_in
from tiny_model import make_tiny, save_tiny

import train_tiny
from nexus_min import weights
from nexus_min.pipeline import NexusGen
from nexus_min.scale import train as full_scale
from nexus_min.train import stage as stages
from nexus_min.train import trainer
from nexus_min.train.checkpoint import append_line, deferred_interrupt, locked
from nexus_min.train.run_folder import RunFolder
from nexus_min.train.stage import Clock, changes
from nexus_min.train.trainer import fit

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# ---- time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wall,work,counted", [(2, 4, 2), (2, 0.1, 2), (3600, 0.5, 11), (9, 0, 1)])
def test_a_clock_counts_work_and_hardly_any_pause(monkeypatch, wall, work, counted):
    now = [100.0, 7.0]
    monkeypatch.setattr(stages.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(stages.time, "process_time", lambda: now[1])
    clock = Clock(5.0)
    now[:] = [100.0 + wall, 7.0 + work]
    assert clock() == pytest.approx(5.0 + counted)
    assert clock() == pytest.approx(5.0 + counted)  # no time since


def test_a_stopped_process_loses_none_of_its_budget(tmp_path):
    """SIGSTOP for longer than the whole budget: the stage still gets its steps."""
    code = """import pathlib, sys
sys.path[:0] = sys.argv[2:]
from test_training import fit, make_stage, run_in
print("ready", flush=True)
print(fit(make_stage(pause=0.005), run_in(pathlib.Path(sys.argv[1]), seconds=4.0))["steps"])"""
    argv = [sys.executable, "-c", code, str(tmp_path), os.path.dirname(__file__)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(6)
    process.send_signal(signal.SIGCONT)
    assert int(process.communicate(timeout=60)[0].split()[-1]) > 60


def test_a_stage_without_its_warmup_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "WARMUP", 10**6)
    with pytest.raises(ValueError, match=r"^stage toy: \d+ steps in .* fewer than its warm-up"):
        fit(make_stage(), run_in(tmp_path, seconds=1.0))


# ---- settings ------------------------------------------------------------------------------------


def test_changes_are_named():
    before = {"seed": 0, "steps": 3, "gone": 1}
    assert changes(before, {"seed": 1, "steps": 3, "new": 2}) == "seed was 0, is 1"
    assert changes(before, before) == changes({}, before) == ""


def test_more_steps_go_on_and_a_repeated_command_says_so(tmp_path, capsys):
    def train(steps: int, seed: int) -> dict:
        run = run_in(tmp_path, steps=steps, settings={"steps": steps, "seed": seed})
        return fit(make_stage(), run)

    assert train(3, 0)["steps"] == 3 and capsys.readouterr().out == ""
    assert train(3, 0)["steps"] == 3
    assert "toy is finished (3 steps); more --steps" in capsys.readouterr().out
    summary = train(8, 1)
    told = "steps was 3, is 8, seed was 0, is 1"
    assert summary["steps"] == 8 and summary["changed"] == [f"step 3: {told}"]
    assert capsys.readouterr().out == f"toy goes on from step 3; {told}\n"
    means = [json.loads(line)["progress"] for line in open(tmp_path / "metrics.jsonl")]
    assert len(means) == 2 and means[1] >= 3 / 8  # of the stage, before each step


@pytest.fixture
def heard():
    """Signals as in a terminal: whoever ran pytest in the background may ignore some."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_save_the_step_under_way(tmp_path, heard, number):
    seen = []

    def at_step():
        seen.append(1)
        if len(seen) == 4:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt):
        fit(make_stage(at_step=at_step), run_in(tmp_path, steps=9))
    assert len(seen) == 4
    summary = fit(make_stage(at_step=lambda: seen.append(1)), run_in(tmp_path, steps=9))
    assert summary["steps"] == len(seen) == 9


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with deferred_interrupt() as interrupt:
        signal.raise_signal(signal.SIGHUP)
    assert not interrupt.heard and signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["", "one\n", "one\ntw"])
def test_a_line_begins_on_its_own(tmp_path, left):
    file = tmp_path / "metrics.jsonl"
    file.write_text(left)
    append_line(file, "new")
    append_line(file, "last")
    assert file.read_text().split() == [*left.split(), "new", "last"]


def test_two_commands_do_not_share_a_folder(tmp_path, capsys):
    with locked(tmp_path / "run"):
        argv = ["--stage", "vae", "--steps", "1", "--out", str(tmp_path / "run"), "--quiet"]
        assert train_tiny.main(argv) == 2
    assert "is in use by another run; give another --out" in capsys.readouterr().err
    with locked(tmp_path / "run"):  # free again
        pass


def test_a_run_of_links_has_all_files_and_no_stale_form(tmp_path):
    source, hub = tmp_path / "links", save_tiny(tmp_path)
    source.mkdir()
    for path in hub.iterdir():
        (source / path.name).symlink_to(path)  # folders, too
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (hub / weights.AR_FOLDER / name).write_text("{}")
    goal = tmp_path / "out/model"
    (goal / weights.AR_FOLDER).mkdir(parents=True)
    stale = goal / weights.AR_FOLDER / "model.safetensors.index.json"
    stale.symlink_to(hub / weights.AR_FOLDER / "model.safetensors.index.json")
    folder = RunFolder(hub, goal, link_rest=True)
    RunFolder(source, goal, link_rest=True).save(folder.config, ar=make_tiny(1).ar)
    names = {str(p.relative_to(hub)) for p in hub.rglob("*") if p.is_file()}
    found = {str(p.relative_to(goal)) for p in goal.rglob("*") if p.is_file()}
    assert names - found == {n for n in names if "model-0000" in n or "index.json" in n}
    assert torch.equal(NexusGen.load(goal).ar.lm_head.weight, make_tiny(1).ar.lm_head.weight)


def test_a_run_does_not_lie_in_its_model(tmp_path, capsys):
    save_tiny(tmp_path)
    (tmp_path / "own.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    argv = ["--preset", "ar_pretrain", "--data", str(tmp_path / "own.jsonl"), "--steps", "1"]
    out = str(tmp_path / "model/out")
    assert full_scale.main([*argv, "--model", str(tmp_path / "model"), "--out", out]) == 2
    assert "lies inside --model" in capsys.readouterr().err
    assert not (tmp_path / "model/out").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself
def test_a_compiled_module_is_saved_under_its_plain_names(tmp_path):
    model = make_tiny(0)
    parts = {"ar": torch.compile(model.ar), "autoencoder": torch.compile(model.autoencoder)}
    weights.save_checkpoint(tmp_path, model.config, **parts, dtype=None)
    loaded = weights.load_ar(tmp_path / weights.AR_FOLDER, model.config)
    assert torch.equal(loaded.lm_head.weight, model.ar.lm_head.weight)
