"""Muon: the direction against an exact decomposition, the step against torch's, and processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nexus_min.train.optim import COEFFICIENTS, ITERATIONS, Muon, newton_schulz

SHAPES = [(8, 8), (6, 10), (6, 10), (12, 5), (6, 10)]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]


def train(optimizer, params, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 20), (2, 20, 6)])
def test_singular_vectors_stay_and_values_become_one(shape):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    core = u.mT @ newton_schulz(m) @ vh.mT
    values = core.diagonal(dim1=-2, dim2=-1)
    assert (core - torch.diag_embed(values)).abs().max() < 1e-4
    assert values.max() < 1.25 and values.median() > 0.65


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 40), (2, 96, 16)])
def test_products_on_the_short_side_are_the_plain_iteration(shape):
    x = m = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    for _ in range(ITERATIONS):
        a, b, c = (k * torch.linalg.matrix_power(x @ x.mT, i) for i, k in enumerate(COEFFICIENTS))
        x = (a + b + c) @ x
    torch.testing.assert_close(newton_schulz(m), x.float(), atol=1e-5, rtol=0)


def test_steps_are_those_of_torch_but_for_its_bf16():
    ours, theirs = parameters(), parameters()
    train(Muon(ours, lr=0.01), ours)
    settings = {"weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}
    train(torch.optim.Muon(theirs, lr=0.01, **settings), theirs)
    for a, b, start in zip(ours, theirs, parameters(), strict=True):
        assert (a - b).norm() < 0.02 * (a - start).norm()  # bf16 rounds by 0.4 %, five times over
        assert (a - start).norm() > 0


def test_zero_gradients_are_harmless():
    still = parameters()
    for p in still:
        p.grad = torch.zeros_like(p)
    Muon(still, lr=0.01, weight_decay=0.0).step()
    assert all(torch.equal(a, b) for a, b in zip(still, parameters(), strict=True))


def test_saved_state_goes_on_exactly():
    straight, resumed = parameters(), parameters()
    train(Muon(straight, lr=0.01), straight, 4)
    generator = torch.Generator().manual_seed(1)
    first = Muon(resumed, lr=0.01)
    for step in range(4):
        if step == 2:
            state, first = first.state_dict(), Muon(resumed, lr=0.01)
            first.load_state_dict(state)
        for p in resumed:
            p.grad = torch.randn(p.shape, generator=generator)
        first.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
