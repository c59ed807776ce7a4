"""Rectified flow: straight paths from data to noise, the loss that learns them, the sampler.

x_t = (1 - t) x_0 + t noise, with the velocity v = dx_t/dt = noise - x_0. Both decoders minimize
|v_theta(x_t, t) - v|^2, equation 7 of the paper, and sample by Euler steps from t = 1 to 0. (The
paper counts time the other way: its X_1 is our x_0, its velocity points to the data.)

Official class: `FlowMatchScheduler` of DiffSynth, whose timesteps are 1000 t.

Conventions: t in [0, 1], t = 1 is noise. A noise level ("sigma") is a t. All fp32, no network here.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_t [B, ...], t [B]) -> v [B, ...]
FP32 = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults are
SIGMA_MIN = 0.003 / 1.002  # official: the last level above 0, before `time_shift`


def per_sample(t: Tensor | float, x: Tensor) -> Tensor:
    """t (a number, [] or [B]) in a shape that multiplies x [B, ...]."""
    t = torch.as_tensor(t, dtype=torch.float32, device=x.device).reshape(-1)
    if len(t) not in (1, len(x)):
        raise ValueError(f"{len(t)} times for a batch of {len(x)}")
    return t.reshape(-1, *[1] * (x.ndim - 1))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """x_t = (1 - t) x_0 + t noise; x0, noise [B, ...], t a number or [B]."""
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """v = noise - x_0, constant along the path: [B, ...]."""
    return noise - x0


def time_shift(t: Tensor, shift: float = 3.0) -> Tensor:
    """s t / (1 + (s - 1) t): keeps 0 and 1, moves the times between them towards noise."""
    return shift * t / (1 + (shift - 1) * t)


def schedule(num_steps: int, shift: float = 3.0, strength: float = 1.0) -> Tensor:
    """Noise levels of `num_steps` Euler steps, then 0: [num_steps + 1], descending, fp32.

    Levels are evenly spaced, then shifted. strength: the first level before the shift; 1 is noise.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    start = SIGMA_MIN + (1 - SIGMA_MIN) * strength
    sigmas = time_shift(torch.linspace(start, SIGMA_MIN, num_steps, **FP32), shift)
    return torch.cat((sigmas, torch.zeros(1, **FP32)))  # the last step goes to the data


def training_sigmas(n: int = 1000, shift: float = 3.0) -> Tensor:
    """The n noise levels that official training draws from: [n], descending."""
    return schedule(n, shift)[:-1]


def training_weights(sigmas: Tensor) -> Tensor:
    """Official loss weights [n] of the training levels: a bell around 1/2, minimum 0, mean 1."""
    bell = torch.exp(-2 * (sigmas - 0.5) ** 2)
    bell = bell - bell.min()
    return bell * (len(sigmas) / bell.sum())


def sample_t(
    n: int, generator: torch.Generator | None = None, kind: str = "logit_normal", shift: float = 3.0
) -> Tensor:
    """n training times [n] in [0, 1], on the CPU.

    kind: "logit_normal" (sigmoid of a normal; SD3) and "uniform" are not shifted; "official" draws
    from `training_sigmas`.
    """
    if kind == "logit_normal":
        return torch.randn(n, generator=generator, **FP32).sigmoid()
    if kind == "uniform":
        return torch.rand(n, generator=generator, **FP32)
    if kind == "official":
        sigmas = training_sigmas(shift=shift)
        return sigmas[torch.randint(len(sigmas), (n,), generator=generator, device="cpu")]
    raise ValueError(f"kind must be logit_normal, uniform or official, got {kind!r}")


def rf_loss(
    velocity_fn: Velocity, x0: Tensor, noise: Tensor, t: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Mean of weight * (v_theta(x_t, t) - (noise - x_0))^2 over batch and elements; fp32 scalar.

    x0, noise [B, ...]; t, weight [B].
    """
    if x0.shape != noise.shape:
        raise ValueError(f"x0 {tuple(x0.shape)} and noise {tuple(noise.shape)} differ in shape")
    t = t.expand(len(x0)) if t.ndim == 0 or len(t) == 1 else t
    velocity = velocity_fn(interpolate(x0, noise, t), t)
    error = (velocity.float() - velocity_target(x0, noise)).square()
    return error.mean() if weight is None else (error * per_sample(weight, error)).mean()


def euler_step(x: Tensor, velocity: Tensor, t: Tensor | float, t_next: Tensor | float) -> Tensor:
    """x at t_next = x + (t_next - t) v."""
    return x + (t_next - t) * velocity


def cfg(v_neg: Tensor | None, v_pos: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: v_neg + scale (v_pos - v_neg); scale 1 does not read v_neg."""
    return v_pos if scale == 1 else v_neg + scale * (v_pos - v_neg)


class Step(NamedTuple):
    """One Euler step: its number, the time it reached, the sample there, its guess of x_0."""

    i: int
    t: float
    x: Tensor
    x0: Tensor


def denoise(velocity_fn: Velocity, noise: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Euler steps from `noise` [B, ...] at level sigmas[0] down to sigmas[-1]; yield each `Step`.

    sigmas [num_steps + 1], see `schedule`. The last step's x is the sample.
    """
    x = noise.float()
    times = sigmas.tolist()
    for i, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
        velocity = velocity_fn(x, x.new_full((len(x),), t)).float()
        x0 = euler_step(x, velocity, t, 0.0)  # where the straight line through x_t would end
        x = euler_step(x, velocity, t, t_next)
        yield Step(i, t_next, x, x0)
