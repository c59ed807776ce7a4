"""Devices: fp64, which Apple's GPUs lack, appears on the CPU alone, in two functions."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import make_tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nexus_min import __main__ as command_line
from nexus_min.pipeline import NexusGen
from nexus_min.toy.questions import final_answer

AT_HOME = {"flux_rope", "timestep_frequencies"}  # their tensors are made on the CPU


class Fp64(TorchDispatchMode):
    """Notes who makes a tensor in fp64: the innermost function of the package."""

    def __init__(self):
        super().__init__()
        self.makers: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_leaves(out)):
            frame = sys._getframe(1)
            while frame and "nexus_min" not in frame.f_globals.get("__name__", ""):
                frame = frame.f_back
            self.makers.add(frame.f_code.co_name if frame else "?")
        return out


def test_fp64_stays_in_two_functions():
    model, photo = make_tiny(), Image.new("RGB", (60, 40), "red")
    with Fp64() as watch:
        model.generate("a circle", num_steps=1, cfg_scale=2.0, fast_preamble=True)
        model.edit(photo, "white", num_steps=1, max_new_tokens=2)
        model.understand(photo, "what?", max_new_tokens=2)
    assert "flux_rope" in watch.makers  # the watch works
    assert watch.makers <= AT_HOME


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_does_what_the_cpu_does(dtype):
    """The shipped model under every profile; an H200 was 1 level of 255 off, 5 in bf16."""
    prompt, question = "a small blue star on a gray background", "What color is the background?"
    cpu = NexusGen.load("tiny")
    picture = cpu.generate(prompt)
    for memory in ("resident", "staged", "stream"):
        gpu = NexusGen.load("tiny", "cuda", dtype, memory=memory)
        off = np.abs(np.asarray(gpu.generate(prompt), int) - np.asarray(picture, int)).max()
        assert off <= (3 if dtype == torch.float32 else 15)
        answers = [final_answer(m.understand(picture, question)) for m in (gpu, cpu)]
        assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("there", "want"), [(("cuda", "mps"), "cuda"), (("mps",), "mps"), ((), "cpu")]
)
def test_the_first_device_that_is_there(monkeypatch, there, want):
    def zeros(size: int, device: str) -> None:
        if device not in (*there, "cpu"):
            raise RuntimeError("no such device")

    monkeypatch.setattr(torch, "zeros", zeros)
    assert command_line.find_device(None, "folder") == want
    assert command_line.find_device(None, "tiny") == "cpu"  # too small for a GPU to pay
    assert command_line.find_device("cpu", "folder") == "cpu"
    with pytest.raises(ValueError, match="has no cuda:3"):
        command_line.find_device("cuda:3", "folder")
    with pytest.raises(ValueError, match="must be cuda, cuda:N, mps or cpu, got 'tpu'"):
        command_line.find_device("tpu", "folder")
