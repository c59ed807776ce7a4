"""Rectified flow against the official scheduler (fixture 11) and what straight paths imply."""

from __future__ import annotations

import pytest
import torch
from conftest import golden

from nexus_min.model import flow


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    return golden("11")[0]


@pytest.mark.parametrize("n", [4, 30, 50])
def test_schedule_parity(official, assert_parity, n):
    sigmas = flow.schedule(n)
    assert_parity("flow", f"11 sigmas {n}", sigmas[:-1], official[f"out/sigmas_{n}"], 1e-7)
    assert_parity(
        "flow", f"11 timesteps {n}", 1000 * sigmas[:-1], official[f"out/timesteps_{n}"], 1e-4
    )
    assert sigmas[-1] == 0


def test_strength_parity(official, assert_parity):
    got = flow.schedule(4, strength=0.6)[:-1]
    assert_parity("flow", "11 strength 0.6", got, official["out/sigmas_4_strength0.6"], 1e-7)


def test_training_parity(official, assert_parity):
    """The bell is over the shifted time, so it peaks at level 751, not 500."""
    sigmas = flow.training_sigmas()
    weights = flow.training_weights(sigmas)
    assert_parity("flow", "11 train sigmas", sigmas, official["out/train_sigmas"], 1e-7)
    assert_parity(
        "flow", "11 train timesteps", 1000 * sigmas, official["out/train_timesteps"], 1e-4
    )
    assert_parity("flow", "11 train weights", weights, official["out/train_weights"], 1e-6)
    at_ids = weights[official["in/timestep_ids"]]
    assert_parity("flow", "11 weights at ids", at_ids, official["out/weights_at_ids"], 1e-6)
    assert weights.argmax() == golden("11")[1]["notes"]["weights_argmax"]


def test_path_parity(official, assert_parity):
    x0, noise = official["in/sample"], official["in/noise"]
    times = flow.training_sigmas()[official["in/timestep_ids"]]
    noisy = torch.stack([flow.interpolate(x0, noise, t) for t in times])
    assert_parity("flow", "11 noisy", noisy, official["out/noisy"], 1e-6)
    assert_parity("flow", "11 target", flow.velocity_target(x0, noise), official["out/target"], 0)


def test_denoise_parity(official, assert_parity):
    """The official loop of four steps, with the same velocity at every step."""
    x, v = official["in/sample"], official["in/velocity"]
    steps = [step.x for step in flow.denoise(lambda x, t: v, x, flow.schedule(4))]
    assert_parity("flow", "11 steps", torch.stack(steps), official["out/steps_4"], 1e-6)


# ---- what straight paths imply -------------------------------------------------------------------


def test_schedule_values():
    """shift 3: s' = 3s / (1 + 2s); 1 step starts at pure noise and goes to 0."""
    assert flow.schedule(1).tolist() == [1.0, 0.0]
    assert flow.time_shift(torch.tensor([0.0, 0.25, 0.5, 1.0])).tolist() == [0.0, 0.5, 0.75, 1.0]
    even = flow.schedule(3, shift=1.0)
    middle = (1 + flow.SIGMA_MIN) / 2
    torch.testing.assert_close(even, torch.tensor([1.0, middle, flow.SIGMA_MIN, 0.0]))
    assert (flow.schedule(50).diff() < 0).all()


def test_interpolate_ends_and_slope():
    x0, noise = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    assert torch.equal(flow.interpolate(x0, noise, 0.0), x0)
    assert torch.equal(flow.interpolate(x0, noise, 1.0), noise)
    per_row = flow.interpolate(x0, noise, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(per_row, torch.stack((x0[0], (x0[1] + noise[1]) / 2, noise[2])))
    slope = (flow.interpolate(x0, noise, 0.75) - flow.interpolate(x0, noise, 0.25)) / 0.5
    torch.testing.assert_close(slope, flow.velocity_target(x0, noise), atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_euler_on_a_straight_path_recovers_the_data(num_steps):
    """With the true velocity every x0 prediction is the data, whatever the number of steps."""
    x0, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    seen = []

    def velocity(x, t):
        seen.append(t.clone())
        return flow.velocity_target(x0, noise)

    sigmas = flow.schedule(num_steps)
    steps = list(flow.denoise(velocity, noise, sigmas))
    assert [s.i for s in steps] == list(range(num_steps))
    assert torch.equal(torch.stack(seen), sigmas[:-1, None].expand(-1, 2))
    for i, t, x, guess in steps:
        assert t == sigmas[i + 1]
        torch.testing.assert_close(x, flow.interpolate(x0, noise, t), atol=1e-5, rtol=0)
        torch.testing.assert_close(guess, x0, atol=1e-5, rtol=0)
    assert torch.equal(steps[-1].x, steps[-1].x0)


def test_denoise_follows_a_curved_field():
    """dx/dt = x from 1 to 0 divides by e: Euler's error halves with the step."""
    noise = torch.ones(1, 2)
    errors = []
    for n in (64, 128):
        *_, last = flow.denoise(lambda x, t: x, noise, torch.linspace(1, 0, n + 1))
        errors.append((last.x - torch.exp(torch.tensor(-1.0))).abs().max().item())
    assert 1.8 < errors[0] / errors[1] < 2.2


def test_denoise_keeps_latents_in_fp32():
    noise = torch.randn(1, 2).to(torch.bfloat16)
    *_, last = flow.denoise(lambda x, t: x.to(torch.bfloat16), noise, flow.schedule(2))
    assert last.x.dtype == torch.float32


def test_cfg():
    neg, pos = torch.randn(2, 3), torch.randn(2, 3)
    assert flow.cfg(None, pos, 1.0) is pos
    assert flow.cfg(neg, pos, 1) is pos
    assert torch.equal(flow.cfg(neg, pos, 0.0), neg)
    torch.testing.assert_close(flow.cfg(neg, pos, 3.0), 3 * pos - 2 * neg)


def test_loss_is_zero_for_the_true_velocity_and_weighted_by_row():
    x0, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    t = torch.tensor([0.2, 0.9])
    target = flow.velocity_target(x0, noise)
    assert flow.rf_loss(lambda x, s: target, x0, noise, t) == 0

    def off(x, s):
        torch.testing.assert_close(x, flow.interpolate(x0, noise, t))
        assert torch.equal(s, t)
        return target + torch.tensor([1.0, 2.0])[:, None, None]

    torch.testing.assert_close(flow.rf_loss(off, x0, noise, t), torch.tensor(2.5))
    weighted = flow.rf_loss(off, x0, noise, t, torch.tensor([1.0, 0.25]))
    torch.testing.assert_close(weighted, torch.tensor(1.0))


def test_loss_serves_one_time_to_the_whole_batch():
    """As official training does: one t a batch; the network still sees [B]."""
    x0, noise = torch.randn(2, 3), torch.randn(2, 3)
    shapes = []

    def velocity(x, t):
        shapes.append(t.shape)
        return x

    one = flow.rf_loss(velocity, x0, noise, torch.tensor([0.3]))
    assert one == flow.rf_loss(velocity, x0, noise, torch.tensor([0.3, 0.3]))
    assert shapes == [(2,), (2,)]


@pytest.mark.parametrize("kind", ["logit_normal", "uniform", "official"])
def test_sampled_times(kind):
    def draw():
        return flow.sample_t(4000, torch.Generator().manual_seed(0), kind)

    t = draw()
    assert t.shape == (4000,) and 0 <= t.min() and t.max() <= 1
    assert torch.equal(t, draw())
    mean = {"logit_normal": 0.5, "uniform": 0.5, "official": flow.training_sigmas().mean()}[kind]
    assert abs(t.mean() - mean) < 0.02
    if kind == "official":
        assert torch.isin(t, flow.training_sigmas()).all()
    else:
        inside = ((t > 0.25) & (t < 0.75)).float().mean()
        assert abs(inside - {"logit_normal": 0.728, "uniform": 0.5}[kind]) < 0.03


def test_wrong_inputs_are_named():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        flow.schedule(0)
    with pytest.raises(ValueError, match="3 times for a batch of 2"):
        flow.interpolate(x, x, torch.rand(3))
    with pytest.raises(ValueError, match=r"\(2, 3\) and noise \(2, 4\)"):
        flow.rf_loss(lambda x, t: x, x, torch.zeros(2, 4), torch.rand(2))
    with pytest.raises(ValueError, match="cosine"):
        flow.sample_t(2, kind="cosine")
