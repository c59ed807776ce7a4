"""What is counted on `meta` is what the stages really keep and compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_sharding import MICRO, Rows, make_stage
from tiny_model import make_tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nexus_min.config import NexusGenConfig
from nexus_min.scale import estimate as budget
from nexus_min.scale.estimate import Sample, autoregressive_work, kept, learning, operations, work
from nexus_min.scale.fsdp import PRESETS, Root, recompute_blocks
from nexus_min.toy.stages import toy_line
from nexus_min.toy.tasks import example
from nexus_min.train import finetune
from nexus_min.train.data import collate

TINY = NexusGenConfig.tiny()


def both(real: Root, counted: Root) -> list[tuple[int, int]]:
    """(real, counted) bytes kept: whole, and of blocks that are computed again."""
    pairs = []
    for _ in range(2):
        with sdpa_kernel(SDPBackend.MATH):  # as on `meta`
            pairs.append((kept(real), 0))
        with torch.device("meta"):
            pairs[-1] = pairs[-1][0], kept(counted)
        recompute_blocks(real)
        recompute_blocks(counted)
    return pairs


@pytest.mark.parametrize("name", ["generation", "editing"])
def test_bytes_of_the_decoders(name):
    whole, inputs = both(Root(make_stage(name)), work(name, TINY, MICRO, "edit", torch.float32))
    assert whole[0] == pytest.approx(whole[1], rel=0.02) and inputs[0] < 0.5 * whole[0]
    assert inputs[0] == pytest.approx(inputs[1], rel=0.05)


def edits():
    """The AR stage on edits alone, and how long they are."""
    model = make_tiny()
    line = toy_line(example(np.random.default_rng(3), "edit"))
    stage = finetune.autoregressive_stage(
        model.ar, model.tokenizer, TINY, finetune.Mixture([line]), MICRO
    )
    batch = collate([line], model.tokenizer, TINY)
    learned = int((batch.labels[:, 1:] != -100).sum())
    sides = tuple(batch.image_grid_thw[:, 1].tolist())
    return stage, Sample(batch.input_ids.shape[1], learned, int(batch.slot_mask.sum()), sides)


def test_bytes_and_operations_of_the_ar_model():
    stage, sample = edits()
    with torch.device("meta"):
        counted = Root(autoregressive_work(TINY, MICRO, sample, torch.float32))
        flops = operations(counted)
    real = Root(stage)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        real(np.random.default_rng(0), 0.0)[0].backward()
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    whole, inputs = both(real, counted)
    assert whole[0] == pytest.approx(whole[1], rel=0.05) and inputs[0] < 0.5 * whole[0]
    assert inputs[0] == pytest.approx(inputs[1], rel=0.1)


def test_operations_are_6_p_d_and_attention():
    """Without images to see: 6 for each weight and token it meets, 12 L^2 C a layer.

    The top layer has queries for the reply alone, and so has all that follows them.
    """
    sample, text = Sample(40, 7, 16, ()), TINY.ar.text
    with torch.device("meta"):
        root = Root(autoregressive_work(TINY, 1, sample, torch.float32))
        counted = operations(root)
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
    made = budget.Rows(TINY).rows([0, 1])
    assert {k: x.shape for k, x in made.items()} == {
        k: x.shape for k, x in Rows().rows([0, 1]).items()
    }


def test_full_scale_learns_what_the_release_holds():
    """The AR model's 8.305 B parameters less its vision tower; FLUX.1-dev's 11.90 B and a
    projector."""
    v2 = NexusGenConfig.v2()
    roots = {name: work(name, v2, 1, "edit") for name in ("ar", "generation")}
    ar = roots["ar"].parts["ar"]
    vision = sum(p.numel() for p in ar.visual.parameters())
    assert learning(roots["ar"]) + vision == sum(p.numel() for p in ar.parameters())
    assert round((learning(roots["ar"]) + vision) / 1e9, 3) == 8.305
    adapter = roots["generation"].parts["adapter"]
    mmdit = learning(roots["generation"]) - sum(p.numel() for p in adapter.parameters())
    assert round(mmdit / 1e9, 2) == 11.90
    assert budget.sample_of("edit", v2) == Sample(505, 50, 81, (36, 18))


def test_rates_follow_the_mixture():
    one = budget.throughput(PRESETS["generation_decoder"], TINY)
    assert one["tokens"] == 16 + 16
    assert one["samples_s"] == pytest.approx(budget.MFU * budget.PEAK / one["TFLOP"] / 1e12)
    mixed = budget.throughput(PRESETS["ar_pretrain"], TINY)["tokens"]
    und, gen, edit = (budget.sample_of(k, TINY).tokens for k in finetune.KINDS)
    assert mixed == pytest.approx((und + 2 * gen + edit) / 4)
