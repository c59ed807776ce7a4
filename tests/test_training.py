"""The training loop: schedule, optimizers, resume to the bit, failures without loss."""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nexus_min.train import checkpoint as checkpoint_module
from nexus_min.train import trainer
from nexus_min.train.checkpoint import Checkpoint
from nexus_min.train.optim import BLOCK, as_matrix, flat_gradient, split_rows
from nexus_min.train.stage import Run, Schedule, Stage, mixed_precision
from nexus_min.train.trainer import fit

# ---- a stage with everything: convolution, matrix, vectors, an embedding, torch's own noise ------


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """One thread, whose sums are reproducible, and Ctrl-C heard, also when pytest runs in the
    background, where shells make it ignored."""
    threads, heard = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, heard)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.embed = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.conv(x).mean((2, 3)) + self.embed.weight[1])


def make_stage(pause: float = 0.0, at_step=lambda: None) -> Stage:
    torch.manual_seed(1)
    net = Net()

    def loss(rng, progress):
        time.sleep(pause)
        at_step()
        x = torch.from_numpy(rng.normal(size=(4, 3, 5, 5)).astype(np.float32))
        y = net(x + 0.1 * torch.randn_like(x))
        return (y - x.mean((2, 3)).sum(1, keepdim=True)).square().mean(), {"progress": progress}

    return Stage("toy", nn.ModuleDict({"net": net}), loss, lr=0.02, adamw_only=("embed",))


def run_in(folder: Path, **options) -> Run:
    return Run(folder, **{"seed": 3, "quiet": True, **options})


def weights_of(stage: Stage) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in stage.modules.state_dict().items()}


def assert_same_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def straight(folder: Path, steps: int) -> tuple[dict, dict]:
    """(weights, complete final state) of a run without interruption."""
    stage = make_stage()
    fit(stage, run_in(folder, steps=steps))
    return weights_of(stage), Checkpoint(folder / "toy.ckpt").load()


def flat(state, prefix: str = "") -> dict[str, torch.Tensor]:
    """All numbers of a nested state, but the time and what was logged."""
    if isinstance(state, dict):
        parts = [(k, v) for k, v in state.items() if k not in ("elapsed", "metrics")]
    elif isinstance(state, list | tuple):
        parts = list(enumerate(state))
    else:
        return {prefix: torch.as_tensor(state)} if isinstance(state, torch.Tensor | float) else {}
    return {k: v for name, x in parts for k, v in flat(x, f"{prefix}/{name}").items()}


# ---- schedule ------------------------------------------------------------------------------------


def drive(schedule: Schedule, pace) -> tuple[list[float], list[float], float]:
    """Learning rates, progress and the end of a schedule whose steps take pace(now) seconds."""
    now, rates, progress = 0.0, [], []
    while not schedule.finished:
        rates.append(schedule.lr_scale)
        progress.append(schedule.progress)
        now += pace(now)
        schedule.tick(now)
    return rates, progress, now


def test_schedule_in_steps_is_warm_up_constant_linear():
    rates, progress, _ = drive(Schedule(steps=1000), lambda now: 1.0)
    assert len(rates) == 1000
    np.testing.assert_allclose(progress, np.arange(1000) / 1000, atol=1e-9)
    want = np.minimum((np.arange(1000) + 1) / 50, (1 - np.arange(1000) / 1000) / 0.4).clip(max=1)
    np.testing.assert_allclose(rates, want, atol=1e-9)
    assert Schedule(steps=1).finished is False


@pytest.mark.parametrize(
    "name, pace, late",
    [
        ("even", lambda now: 0.1, 0.002),
        ("slow start", lambda now: 3.0 if now < 1 else 0.1, 0.002),
        ("half the speed at 70 %", lambda now: 0.1 if now < 70 else 0.2, 0.005),
        ("twice the speed at 50 %", lambda now: 0.1 if now < 50 else 0.05, 0.005),
        ("a stall within the decay", lambda now: 10.0 if 80 < now < 80.2 else 0.1, 0.005),
        ("a stall over the end", lambda now: 20.0 if 90 < now < 90.2 else 0.1, 0.15),
    ],
)
def test_schedule_in_seconds_ends_on_time_and_never_jumps(name, pace, late):
    schedule = Schedule(seconds=100.0)
    rates, progress, end = drive(schedule, pace)
    assert 99.5 < end < 100 * (1 + late), name
    assert np.diff(progress).min() > 0 and progress[-1] < 1
    after = rates[
        60:
    ]  # past the warm-up the rate never rises; it ends near 0 and gets there gently
    assert np.diff(after).max() <= 1e-12 and np.diff(after).min() > -0.25
    assert after[0] == 1.0 and after[-1] < 0.1


def test_schedule_takes_one_budget(tmp_path):
    for budget in ({}, {"seconds": 1.0, "steps": 1}):
        with pytest.raises(ValueError, match="either seconds or steps"):
            fit(make_stage(), run_in(tmp_path, **budget))
    assert not list(tmp_path.iterdir())


def test_seconds_are_kept_and_what_was_spent_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "WARMUP", 1)
    run = run_in(tmp_path, seconds=3.0).after(0.5).after(1.0)
    started = time.perf_counter()
    summary = fit(make_stage(pause=0.002), run)
    assert 1.3 < time.perf_counter() - started < 3.0  # 1.5, and room for a busy machine
    assert 2.8 < summary["seconds"] < 4.5 and summary["steps"] > 5
    assert run_in(tmp_path, steps=5).after(9.0).steps == 5


# ---- optimisers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (6, 1, 3, 3), (6, 4, 1, 1), (1, 4, 3, 3)])
def test_as_matrix_shares_memory_and_gradient(order, shape):
    kernel = nn.Parameter(torch.randn(shape).to(memory_format=order))
    kernel.grad = torch.zeros_like(kernel)
    matrix = as_matrix(kernel)
    assert matrix.shape == (shape[0], kernel[0].numel())
    with torch.no_grad():
        matrix.mul_(2.0).add_(1.0)
    F.conv2d(torch.randn(2, shape[1], 4, 4), kernel).square().sum().backward()
    last = not kernel.is_contiguous()
    for got, want in ((matrix.data, kernel.data), (matrix.grad, kernel.grad)):
        assert torch.equal(got, (want.permute(0, 2, 3, 1) if last else want).reshape(got.shape))
    assert matrix.grad.abs().sum() > 0


def test_as_matrix_refuses_what_it_cannot_share():
    kernel = nn.Parameter(torch.randn(3, 6, 3, 3).transpose(0, 1))
    kernel.grad = torch.zeros_like(kernel)
    with pytest.raises(ValueError, match=r"\(6, 3, 3, 3\)"):
        as_matrix(kernel)


def test_flat_gradient_holds_what_backward_finds():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 2))
    net.to(memory_format=torch.channels_last)
    parameters, x = list(net.parameters()), torch.randn(4, 3, 4, 4)
    want = torch.autograd.grad(net(x).square().sum(), parameters)
    flat = flat_gradient(parameters)
    for times in (1, 2):  # it adds up, in place
        net(x).square().sum().backward()
        for p, g in zip(parameters, want, strict=True):
            torch.testing.assert_close(p.grad, times * g)
            assert p.grad.stride() == p.stride()
        torch.testing.assert_close(
            flat.norm(), times * torch.cat([g.flatten() for g in want]).norm()
        )
    flat.zero_()
    assert all(not p.grad.any() for p in parameters)


@pytest.mark.parametrize("rows", [2 * BLOCK + 1, 4 * BLOCK])
def test_row_blocks_share_memory_and_gradient(rows):
    matrix = nn.Parameter(torch.randn(rows, 3 * BLOCK))
    matrix.grad = torch.zeros_like(matrix)
    blocks = split_rows(matrix)
    assert [len(b) for b in blocks] == [len(b) for b in matrix.data.split(BLOCK)]
    with torch.no_grad():
        for i, block in enumerate(blocks):
            block.fill_(i)
    assert torch.equal(matrix[:, 0], torch.arange(len(blocks)).repeat_interleave(BLOCK)[:rows])
    matrix.square().sum().backward()
    assert torch.equal(torch.cat([b.grad for b in blocks]), 2 * matrix.data)


@pytest.mark.parametrize("shape", [(2 * BLOCK, 5 * BLOCK), (5 * BLOCK, 2 * BLOCK), (3, 4)])
def test_what_has_a_short_side_stays_whole(shape):
    matrix = nn.Parameter(torch.zeros(shape))
    assert split_rows(matrix) == [matrix]


# ---- precision -----------------------------------------------------------------------------------


def test_mixed_precision_multiplies_in_bf16_and_attends_in_fp32():
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    weight = torch.randn(8, 8)
    exact = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    with mixed_precision(True):
        product = F.linear(x, weight)
        seen = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        low = F.scaled_dot_product_attention(product, product, product, is_causal=True)
        again = F.linear(seen, weight)
    assert product.dtype == again.dtype == torch.bfloat16
    assert torch.equal(seen, exact)
    assert low.dtype == torch.float32
    again.sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.isfinite().all()
    with mixed_precision(False):
        assert F.linear(x, weight).dtype == torch.float32


def test_fit_learns_and_writes(tmp_path):
    stage = make_stage()
    stage.sample = lambda path: path.write_bytes(b"png") and {"exact": 0.5}
    summary = fit(stage, run_in(tmp_path, steps=120, sample_every=0.0))
    losses = [x["loss"] for x in map(json.loads, open(tmp_path / "metrics.jsonl")) if "loss" in x]
    assert len(losses) == 3 and losses[-1] < 0.5 * losses[0]
    assert (tmp_path / "toy_final.png").exists() and (tmp_path / "toy_000119.png").exists()
    assert summary["steps"] == 120 and summary["metrics"]["exact"] == 0.5
    assert not list(tmp_path.glob("*.partial"))
    state = Checkpoint(tmp_path / "toy.ckpt").load()
    assert all(a.grad_fn is None and not a.requires_grad for a in state["average"])


def test_the_average_is_what_stays(tmp_path):
    stage = make_stage()
    fit(stage, run_in(tmp_path, steps=30))
    average = Checkpoint(tmp_path / "toy.ckpt").load()["average"]
    for p, a in zip(stage.modules.parameters(), average, strict=True):
        assert torch.equal(p, a)


# ---- interruption and resume ---------------------------------------------------------------------


def stop_at(step: int, how):
    """A callable for `at_step` that does `how()` at the step."""
    count = iter(range(10**6))
    return lambda: how() if next(count) == step else None


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def crash() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("how, error", [(interrupt, KeyboardInterrupt), (crash, ZeroDivisionError)])
def test_resume_gives_the_same_bits(tmp_path, how, error):
    want, want_state = straight(tmp_path / "a", 40)
    options = {"steps": 40, "save_every": 0.0}
    for step in (7, 0, 13):  # three times; the second at the first step after the resume
        with pytest.raises(error):
            fit(make_stage(at_step=stop_at(step, how)), run_in(tmp_path / "b", **options))
    assert 0 < Checkpoint(tmp_path / "b/toy.ckpt").load()["schedule"]["step"] < 40
    torch.manual_seed(12345)  # what the generator did before must not matter
    stage = make_stage()
    fit(stage, run_in(tmp_path / "b", **options))
    assert_same_bits(want, weights_of(stage))
    got_state = Checkpoint(tmp_path / "b/toy.ckpt").load()
    assert len(flat(want_state)) > 15 and any("momentum_buffer" in k for k in flat(want_state))
    assert_same_bits(flat(want_state), flat(got_state))


def test_a_run_that_began_in_bf16_ends_so(tmp_path):
    """Whatever this machine is measured to be best at when it is resumed."""
    options, want = {"steps": 20, "save_every": 0.0}, make_stage()
    fit(want, run_in(tmp_path / "a", bf16=True, **options))
    with pytest.raises(ZeroDivisionError):
        crashing = make_stage(at_step=stop_at(7, crash))
        fit(crashing, run_in(tmp_path / "b", bf16=True, **options))
    stage = make_stage()
    fit(stage, run_in(tmp_path / "b", bf16=False, **options))
    assert_same_bits(weights_of(want), weights_of(stage))
    plain = make_stage()
    fit(plain, run_in(tmp_path / "c", bf16=False, **options))
    assert not torch.equal(
        weights_of(plain)["net.linear.weight"], weights_of(stage)["net.linear.weight"]
    )


@pytest.mark.parametrize("moment", ["between the renames", "the last one is broken"])
def test_the_one_before_takes_over(tmp_path, monkeypatch, moment):
    """The last two are kept; the older leads to the same weights, bit for bit."""
    want, _ = straight(tmp_path / "a", 20)
    folder, plain = tmp_path / "b", os.replace
    checkpoint = Checkpoint(folder / "toy.ckpt")

    def killed(source, goal):
        if goal == checkpoint.path and checkpoint.previous.exists():
            raise ZeroDivisionError
        plain(source, goal)

    if moment == "between the renames":
        monkeypatch.setattr(checkpoint_module.os, "replace", killed)
        with pytest.raises(ZeroDivisionError):
            fit(make_stage(), run_in(folder, steps=20, save_every=0.0))
        assert not checkpoint.path.exists() and checkpoint.load()["schedule"]["step"] == 1
    else:
        with pytest.raises(ZeroDivisionError):
            broken = make_stage(at_step=stop_at(7, crash))
            fit(broken, run_in(folder, steps=20, save_every=0.0))
        assert checkpoint.load()["schedule"]["step"] == 7
        checkpoint.path.write_bytes(b"torn")
        with pytest.raises(ValueError, match="delete it to go on from the one before"):
            fit(make_stage(), run_in(folder, steps=20))
        checkpoint.path.unlink()
        assert checkpoint.load()["schedule"]["step"] == 6
    monkeypatch.setattr(checkpoint_module.os, "replace", plain)
    stage = make_stage()
    fit(stage, run_in(folder, steps=20))
    assert_same_bits(want, weights_of(stage))


def test_interrupt_saves_the_step_it_was_in(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(make_stage(at_step=stop_at(5, interrupt)), run_in(tmp_path, steps=40, save_every=1e9))
    state = Checkpoint(tmp_path / "toy.ckpt").load()
    assert state["schedule"]["step"] == 6
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


CTRL_C_WITHIN_CTRL_C = """
import os, signal, sys
from nexus_min.train.checkpoint import deferred_interrupt

left = 20

def again(frame, event, arg):
    global left
    if left:
        left -= 1
        os.kill(os.getpid(), signal.SIGINT)
    return again

with deferred_interrupt() as interrupt:
    sys.settrace(again)  # what is called from here on, the handler first, is interrupted anew
    os.kill(os.getpid(), signal.SIGINT)
    sys.settrace(None)
print(left < 20 and interrupt.heard)
"""


def test_a_second_interrupt_within_the_first_does_not_hang():
    """A terminal signals every process of the run, and the parent forwards its own."""
    argv = [sys.executable, "-c", CTRL_C_WITHIN_CTRL_C]
    place = {"cwd": Path(__file__).parents[1], "timeout": 60}
    done = subprocess.run(argv, capture_output=True, text=True, **place)
    assert done.stdout == "True\n", done.stderr


def test_interrupt_in_the_last_step_finishes_the_stage(tmp_path):
    stage = make_stage(at_step=stop_at(9, interrupt))
    with pytest.raises(KeyboardInterrupt):
        fit(stage, run_in(tmp_path / "a", steps=10))
    assert_same_bits(straight(tmp_path / "b", 10)[0], weights_of(stage))


def test_a_finished_stage_is_skipped_at_once(tmp_path):
    want, _ = straight(tmp_path, 10)
    lines = (tmp_path / "metrics.jsonl").read_text()
    stage = make_stage(at_step=crash)
    stage.sample = lambda path: crash()
    summary = fit(stage, run_in(tmp_path, steps=10))
    assert_same_bits(want, weights_of(stage))
    assert summary["steps"] == 10 and summary["metrics"]["loss"] > 0
    assert (tmp_path / "metrics.jsonl").read_text() == lines


KILLED = """
import sys; sys.path[:0] = {paths!r}
import os, signal, torch
from pathlib import Path
from test_training import make_stage, run_in, stop_at
from nexus_min.train.trainer import fit
torch.set_num_threads(1)
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
fit(make_stage(at_step=stop_at({step}, die)), run_in(Path({folder!r}), steps=30, save_every=0.0))
"""


def test_kill_9_then_resume_gives_the_same_bits(tmp_path):
    want, _ = straight(tmp_path / "a", 30)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script = KILLED.format(paths=paths, step=11, folder=str(tmp_path / "b"))
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: sums depend on the number of threads
    dead = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=alone)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert Checkpoint(tmp_path / "b/toy.ckpt").load()["schedule"]["step"] == 11
    stage = make_stage()
    fit(stage, run_in(tmp_path / "b", steps=30))
    assert_same_bits(want, weights_of(stage))


# ---- failures ------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path):
    stage = make_stage()
    fine, count = stage.loss, iter(range(100))

    def loss(rng, progress):
        value, metrics = fine(rng, progress)
        return value * (float("nan") if next(count) == 6 else 1.0), metrics

    stage.loss = loss
    told = r"stage toy, step 6: the loss .*batch of seed.*\(3, 'toy', 6, 0\)\); the last good check"
    with pytest.raises(FloatingPointError, match=told) as error:
        fit(stage, run_in(tmp_path, steps=20, save_every=0.0))
    state = Checkpoint(tmp_path / "toy.ckpt").load()
    assert state["schedule"]["step"] == 6
    assert all(v.isfinite().all() for v in flat(state).values())
    dump = tmp_path / "toy.nonfinite-0.ckpt"
    assert str(dump) in str(error.value)
    facts = Checkpoint(dump).load()["nonfinite"]
    assert facts["batch"] == (3, "toy", 6, 0) and math.isnan(facts["numbers"]["loss"])
    assert facts["gradients"] == [f"net.{name}" for name, _ in Net().named_parameters()]
    again, count = make_stage(), iter(range(6, 100))
    again.loss = loss
    os.replace(dump, tmp_path / "toy.ckpt")  # leads to the same step again
    with pytest.raises(FloatingPointError, match="stage toy, step 6"):
        fit(again, run_in(tmp_path, steps=20))


def test_no_checkpoint_holds_a_weight_that_is_not_finite(tmp_path):
    """The embedding's last row takes no part in the loss, which thus stays finite."""
    stage = make_stage()
    fine, count, row = stage.loss, iter(range(100)), stage.modules["net"].embed.weight.data[4]

    def loss(rng, progress):
        if next(count) == 6:
            row.fill_(float("inf"))
        return fine(rng, progress)

    stage.loss = loss
    with pytest.raises(FloatingPointError, match="stage toy, step 7: a weight is not finite"):
        fit(stage, run_in(tmp_path, steps=20, save_every=0.0))
    state = Checkpoint(tmp_path / "toy.ckpt").load()
    assert state["schedule"]["step"] == 6
    assert all(v.isfinite().all() for v in flat(state).values())


def test_a_gradient_that_is_not_finite_stops(tmp_path):
    stage = make_stage()
    linear = stage.modules["net"].linear
    stage.loss = lambda rng, progress: (linear.weight.sum().mul(0.0).sqrt(), {})
    with pytest.raises(FloatingPointError, match="step 0.*there is no checkpoint yet"):
        fit(stage, run_in(tmp_path, steps=2))
    assert not (tmp_path / "toy.ckpt").exists()
    facts = Checkpoint(tmp_path / "toy.nonfinite-0.ckpt").load()["nonfinite"]
    assert facts["gradients"] == ["net.linear.weight"] and facts["numbers"]["loss"] == 0


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    checkpoint = Checkpoint(tmp_path / "toy.ckpt")
    checkpoint.save({"x": torch.ones(3)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            OSError, match="toy.ckpt: .*File too large.*last good checkpoint is kept"
        ) as e:
            checkpoint.save({"x": torch.ones(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "\n" not in str(e.value)
    assert torch.equal(checkpoint.load()["x"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["toy.ckpt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_write_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, call):
    def fail(*_):
        raise OSError(5, "Input/output error")

    checkpoint = Checkpoint(tmp_path / "toy.ckpt")
    checkpoint.save({"x": torch.ones(3)})
    monkeypatch.setattr(checkpoint_module.os, call, fail)
    with pytest.raises(
        OSError, match="toy.ckpt: .*Input/output error; the last good checkpoint is kept"
    ):
        checkpoint.save({"x": torch.zeros(3)})
    assert torch.equal(checkpoint.load()["x"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["toy.ckpt"]


@contextmanager
def read_only() -> Iterator[Path]:
    """A folder that lets itself be read alone; root may write anywhere, so it becomes nobody."""
    with tempfile.TemporaryDirectory() as place:
        folder, user = Path(place, "run"), os.geteuid()
        folder.mkdir()
        os.chmod(place, 0o755)
        try:
            yield folder
        finally:
            os.seteuid(user)
            os.chmod(folder, 0o755)


def lock(folder: Path) -> None:
    os.chmod(folder, 0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)


@pytest.mark.parametrize("save_every", [0.0, 1e9])
def test_a_folder_that_becomes_read_only(save_every):
    """Met by the checkpoint, or first by what is logged; the last good state is there, and told."""
    with read_only() as folder:
        with pytest.raises(ZeroDivisionError):
            stage = make_stage(at_step=stop_at(3, crash))
            fit(stage, run_in(folder, steps=60, save_every=0.0))
        stage = make_stage(at_step=stop_at(2, lambda: lock(folder)))
        with pytest.raises(OSError, match="denied.*the last good checkpoint is kept") as error:
            fit(stage, run_in(folder, steps=60, save_every=save_every))
        assert "\n" not in str(error.value)
        step = Checkpoint(folder / "toy.ckpt").load()["schedule"]["step"]
        assert step == (5 if save_every == 0.0 else 3)


def test_what_is_not_finite_is_told_also_on_a_full_disk(tmp_path, monkeypatch):
    stage = make_stage()
    fine = stage.loss
    stage.loss = lambda rng, progress: (fine(rng, progress)[0] * float("nan"), {"half": 0.0})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nexus_min.train.checkpoint.torch.save", full)
    told = r"stage toy, step 0: .*there is no checkpoint yet, cannot save .*No space left"
    with pytest.raises(FloatingPointError, match=told):
        fit(stage, run_in(tmp_path, steps=3))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="there is no checkpoint yet"):
        Checkpoint(tmp_path / "file" / "toy.ckpt").save({})


class Code:
    """Unpickling this would make a folder."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_foreign_or_broken_checkpoint_is_one_line(tmp_path):
    path = tmp_path / "toy.ckpt"
    code = pickle.dumps({"modules": Code(str(tmp_path / "executed"))})
    for content in (b"", b"not a checkpoint", b"broken", b"PK\x03\x04 torn", code):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="toy.ckpt: not a checkpoint") as e:
            fit(make_stage(), run_in(tmp_path, steps=1))
        assert "\n" not in str(e.value)
    torch.save({"modules": Code(str(tmp_path / "executed"))}, path)
    with pytest.raises(ValueError, match="toy.ckpt: not a checkpoint"):
        fit(make_stage(), run_in(tmp_path, steps=1))
    assert not (tmp_path / "executed").exists()
    Checkpoint(path).save({"modules": nn.ModuleDict({"net": nn.Linear(2, 2)}).state_dict()})
    with pytest.raises(ValueError, match="toy.ckpt: does not fit this stage") as e:
        fit(make_stage(), run_in(tmp_path, steps=1))
    assert "\n" not in str(e.value)
