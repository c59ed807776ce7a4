"""Shared test helpers: official fixtures, and the parity table printed at the end of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
PARITY: dict[tuple[str, str], tuple[float, float, str]] = {}


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors (float16 upcast to fp32) and JSON of the official fixture whose name starts so."""
    path = next(GOLDEN.glob(f"{name}*.safetensors"))
    tensors = {k: v.float() if v.dtype == torch.float16 else v for k, v in load_file(path).items()}
    return tensors, json.loads(path.with_suffix(".json").read_text())


def weights(tensors: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """The `weights/<prefix>...` tensors of a fixture, keys without that prefix."""
    head = f"weights/{prefix}"
    return {k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)}


@pytest.fixture
def assert_parity(request):
    """assert_parity(tower, reference, got, want, limit): assert the largest error and record it."""

    def check(tower: str, reference: str, got, want, limit: float = 2e-5) -> None:
        got, want = torch.as_tensor(got), torch.as_tensor(want)
        assert got.shape == want.shape, (
            f"{tower} {reference}: {tuple(got.shape)} != {tuple(want.shape)}"
        )
        error = (got.double() - want.double()).abs().max().item()
        PARITY[tower, reference] = (error, limit, request.node.name)
        assert error <= limit, f"{tower} {reference}: max abs error {error:.2e} > {limit:.0e}"

    return check


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the largest error of each tower against the official code."""
    worst: dict[str, tuple[float, float, str, str]] = {}
    for (tower, reference), (error, limit, test) in PARITY.items():
        if tower not in worst or error > worst[tower][0]:
            worst[tower] = (error, limit, reference, test)
    if not worst:
        return
    if record := os.environ.get("PARITY_RECORD"):
        Path(record).write_text(json.dumps(worst), "utf-8")
    terminalreporter.section("parity with the official code (largest absolute error per tower)")
    for tower, (error, limit, reference, test) in sorted(worst.items()):
        terminalreporter.line(
            f"{tower:22s} {error:8.1e}  limit {limit:.0e}  {reference:34s} {test}"
        )
