"""The benchmarks run: each module imports, and what needs no peer measures something small."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent / "benchmarks"
MODULES = sorted(f.stem for f in HERE.glob("*.py") if f.stem != "__main__")


def module(name: str):
    return importlib.import_module(f"tests.benchmarks.{name}")


@pytest.fixture(autouse=True)
def repository_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parents[1]))


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name):
    assert module(name).__doc__


@pytest.mark.parametrize("name", ["gpu", "profiles"])
def test_the_tiny_model_runs_where_the_full_one_would(name):
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--tiny"]
    if name == "profiles":
        command += ["--steps", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    out = subprocess.check_output(command, cwd=HERE.parents[1], env=env, text=True)
    assert out.count("ms") >= 6


def test_the_works_that_are_timed_run():
    against, done = module("against"), []
    for name, make in against.WORKS.items():
        if "cold" not in name and "full width" not in name:
            make()()
            done.append(name)
    assert len(done) == 6


def test_batches_and_growth(monkeypatch):
    batch, growth = module("batch"), module("growth")
    monkeypatch.setattr(batch, "ROUNDS", 1)
    monkeypatch.setattr(growth, "ROUNDS", 1)
    # at most one of 256 levels: on some processors a batch is rounded otherwise
    assert batch.batched(batch.NexusGen.load()).error <= 2 / 255
    with torch.no_grad():
        curve = growth.step_numbers((1, 2, 4))
    assert len(curve.exponents()) == 2 and "steps" in curve.text()


def test_a_training_step_and_its_memory(monkeypatch):
    training = module("training")
    monkeypatch.setitem(training.STEPS, "tiny", 1)
    found = training.run("ours", "tiny")
    assert found["seconds"] > 0 and found["bytes"] > 0 and found["gradient"] > 0


def test_own_data_writes_lines_and_conversations_are_scored(tmp_path):
    own_data, conversation = module("own_data"), module("conversation")
    lines = list(own_data.lines(tmp_path, 1))
    assert len(lines) == 3 and all((tmp_path / n).exists() for x in lines for n in x["images"])
    model = own_data.NexusGen.load()
    found = conversation.case(model, "slots", "a large red circle in the center", "white")
    assert found is None or {"background", "count"} <= found.keys()
