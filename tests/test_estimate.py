"""What is counted on `meta` is what the stages really keep and compute."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_fsdp import MICRO_BATCH, Rows, make_stage
from tiny_model import make_tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nexus_min.config import NexusGenConfig
from nexus_min.model import gradients
from nexus_min.scale import estimate
from nexus_min.scale.estimate import (
    Sample,
    build_ar_stage,
    build_stage,
    flops,
    sample_of,
    saved_activation_bytes,
    throughput,
    trainable_params,
)
from nexus_min.scale.fsdp import PRESETS, LossModule, checkpoint_activations
from nexus_min.toy.stages import toy_line
from nexus_min.toy.tasks import sample_example
from nexus_min.train import finetune
from nexus_min.train.data import collate

TINY = NexusGenConfig.tiny()


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Norms without the fast gradient of CPUs, which keeps less: the estimate is of GPUs."""
    plain = lambda x, eps: F.rms_norm(x, x.shape[-1:], eps=eps)  # noqa: E731
    monkeypatch.setattr(gradients._Normalize, "apply", plain)


def both(real: LossModule, counted: LossModule) -> list[tuple[int, int]]:
    """(real, counted) bytes kept: whole, and of blocks that are computed again."""
    pairs = []
    for _ in range(2):
        with sdpa_kernel(SDPBackend.MATH):  # as on `meta`
            pairs.append((saved_activation_bytes(real), 0))
        with torch.device("meta"):
            pairs[-1] = pairs[-1][0], saved_activation_bytes(counted)
        checkpoint_activations(real)
        checkpoint_activations(counted)
    return pairs


@pytest.mark.parametrize("name", ["generation", "editing"])
def test_bytes_of_the_decoders(name):
    counted = build_stage(name, TINY, MICRO_BATCH, "edit", torch.float32)
    whole, inputs = both(LossModule(make_stage(name)), counted)
    assert whole[0] == pytest.approx(whole[1], rel=0.02) and inputs[0] < 0.5 * whole[0]
    assert inputs[0] == pytest.approx(inputs[1], rel=0.05)


def edits():
    """The AR stage on edits alone, and how long they are."""
    model = make_tiny()
    line = toy_line(sample_example(np.random.default_rng(3), "edit", "style", most=1))
    stage = finetune.autoregressive_stage(
        model.ar, model.tokenizer, TINY, finetune.TaskMixture([line]), MICRO_BATCH
    )
    batch = collate([line], model.tokenizer, TINY)
    learned = int((batch.labels[:, 1:] != -100).sum())
    sides = tuple(batch.image_grid_thw[:, 1].tolist())
    return stage, Sample(batch.input_ids.shape[1], learned, int(batch.slot_mask.sum()), sides)


def test_bytes_and_operations_of_the_ar_model():
    stage, sample = edits()
    with torch.device("meta"):
        counted = LossModule(build_ar_stage(TINY, MICRO_BATCH, sample, torch.float32))
        counted_flops = flops(counted)
    real = LossModule(stage)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        real(np.random.default_rng(0), 0.0)[0].backward()
    assert counted_flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    whole, inputs = both(real, counted)
    assert whole[0] == pytest.approx(whole[1], rel=0.05) and inputs[0] < 0.5 * whole[0]
    assert inputs[0] == pytest.approx(inputs[1], rel=0.1)


def test_operations_are_6_p_d_and_attention():
    """Without images to see: 6 for each weight and token it meets, 12 L^2 C a layer.

    The top layer has queries for the reply alone, and so has all that follows them.
    """
    sample, text = Sample(40, 7, 16, ()), TINY.ar.text
    with torch.device("meta"):
        root = LossModule(build_ar_stage(TINY, 1, sample, torch.float32))
        counted = flops(root)
    ar, read, reply = root.parts["ar"], 39, 7 + 16
    matrices = [(n, p.numel()) for n, p in ar.model.layers[0].named_parameters() if p.ndim == 2]
    below = read * sum(size for _, size in matrices) * (text.num_hidden_layers - 1)
    top = sum(
        size * (read if n[10:] in ("k_proj.weight", "v_proj.weight") else reply)
        for n, size in matrices
    )
    met = below + top + 7 * ar.lm_head.weight.numel() + 16 * ar.vision_head.weight.numel()
    pairs = (text.num_hidden_layers - 1) * read**2 + reply * read
    assert counted == pytest.approx(6 * met + 12 * pairs * text.hidden_size, rel=1e-9)


def test_the_cached_samples_have_the_sizes_of_real_ones():
    made = estimate.MetaShards(TINY).rows([0, 1])
    assert {k: x.shape for k, x in made.items()} == {
        k: x.shape for k, x in Rows().rows([0, 1]).items()
    }


def test_full_scale_learns_what_the_release_holds():
    """The AR model's 8.305 B parameters less its vision tower; FLUX.1-dev's 11.90 B and a
    projector."""
    v2 = NexusGenConfig.v2()
    roots = {name: build_stage(name, v2, 1, "edit") for name in ("ar", "generation")}
    ar = roots["ar"].parts["ar"]
    vision = sum(p.numel() for p in ar.visual.parameters())
    assert trainable_params(roots["ar"]) + vision == sum(p.numel() for p in ar.parameters())
    assert round((trainable_params(roots["ar"]) + vision) / 1e9, 3) == 8.305
    adapter = roots["generation"].parts["adapter"]
    mmdit = trainable_params(roots["generation"]) - sum(p.numel() for p in adapter.parameters())
    assert round(mmdit / 1e9, 2) == 11.90
    assert sample_of("edit", v2) == Sample(505, 50, 81, (36, 18))


def test_rates_follow_the_mixture():
    one = throughput(PRESETS["generation_decoder"], TINY)
    assert one["tokens"] == 16 + 16
    assert one["samples_s"] == pytest.approx(estimate.MFU * estimate.PEAK / one["TFLOP"] / 1e12)
    mixed = throughput(PRESETS["ar_pretrain"], TINY)["tokens"]
    und, gen, edit = (sample_of(k, TINY).tokens for k in finetune.TASKS)
    assert mixed == pytest.approx((und + 2 * gen + edit) / 4)


def test_the_table_of_the_readme_is_what_the_command_prints(capsys):
    estimate.estimate([])
    printed = capsys.readouterr().out.splitlines()
    rows = []
    for memory, rates in zip(printed[::2], printed[1::2], strict=True):
        name, all_parts = re.match(r"(\w+): ([\d.]+) GB", memory).groups()
        parts = re.findall(r"[\d.]+", memory.partition("(")[2])
        tokens, days = re.search(r"tokens_s ([\d.]+); ([\d.]+) days on 8 GPUs", rates).groups()
        cells = [f"`{name}`", *parts, all_parts, f"{float(tokens):,.0f}", days]
        rows.append(f"| {' | '.join(cells)} |")
    readme = Path(estimate.__file__).with_name("README.md").read_text("utf-8")
    assert [line for line in readme.splitlines() if line.startswith("| `")] == rows
