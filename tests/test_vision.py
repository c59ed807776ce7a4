"""Vision tower: the official fixture, released names, and the equivalences behind its layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import golden, weights

from nexus_min.config import NexusGenConfig, VisionConfig
from nexus_min.model.rope import vision_angles
from nexus_min.model.vision import (
    QwenViT,
    attend_segments,
    make_segments,
    patch_positions,
    window_index,
)

MANIFESTS = Path(__file__).parent / "manifests"
TINY = NexusGenConfig.tiny().ar.vision
SMALL = replace(TINY, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=24)


@pytest.fixture(scope="module")
def official():
    """(tensors, config, model with the official micro weights)"""
    tensors, meta = golden("01")
    model = QwenViT(VisionConfig.from_dict(meta["config"]))
    model.load_state_dict(weights(tensors))
    return tensors, meta, model


def random_vit(config: VisionConfig = SMALL, seed: int = 0) -> QwenViT:
    torch.manual_seed(seed)
    return QwenViT(config)


def random_images(grid) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(sum(t * h * w for t, h, w in grid), 3 * 2 * 14 * 14)


@torch.no_grad()
def test_parity_hidden_states(official, assert_parity):
    tensors, _, model = official
    states = model.hidden_states(tensors["in/pixel_values"], tensors["in/grid_thw"])
    names = {"patch_embed": "patch_embed", "merger": "merger_window_order", "merged": "merged"}
    names |= {f"block{i}": f"block{i}_window_order" for i in range(model.config.depth)}
    blocks = [f"block{i}" for i in range(4)]
    assert list(states) == ["patch_embed", *blocks, "merger", "merged"]
    for ours, theirs in names.items():
        assert_parity("vision", f"01 {theirs}", states[ours], tensors[f"out/{theirs}"], 2e-5)


@torch.no_grad()
def test_parity_forward(official, assert_parity):
    tensors, _, model = official
    out = model(tensors["in/pixel_values"], tensors["in/grid_thw"])
    assert_parity("vision", "01 merged (forward)", out, tensors["out/merged"], 2e-5)


@torch.no_grad()
def test_parity_eps_probe(official, assert_parity):
    tensors, meta, _ = official
    probe = meta["notes"]["eps_probe"]
    model = QwenViT(VisionConfig.from_dict(meta["config"]))
    model.load_state_dict(
        {
            k: v * probe["factor"] if k in probe["scaled_weights"] else v
            for k, v in weights(tensors).items()
        }
    )
    out = model(tensors["in/pixel_values"], tensors["in/grid_thw"])
    assert_parity("vision", "01 eps_probe_merged", out, tensors["out/eps_probe_merged"], 2e-5)


def test_parity_layout(official, assert_parity):
    tensors, _, model = official
    grid = tensors["in/grid_thw"]
    index, lengths = window_index(grid, model.config)
    assert_parity("vision", "01 window_index", index, tensors["out/window_index"], 0)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    assert_parity("vision", "01 cu_window_seqlens", ends, tensors["out/cu_window_seqlens"], 0)
    raw = tensors["out/cu_window_seqlens_raw"].unique_consecutive()  # official empty windows
    assert_parity("vision", "01 cu_window_seqlens_raw", ends, raw, 0)
    images = torch.tensor([0, *(t * h * w for t, h, w in grid.tolist())]).cumsum(0)
    assert_parity("vision", "01 cu_seqlens", images, tensors["out/cu_seqlens"], 0)
    head_dim = model.config.hidden_size // model.config.num_heads
    angles = vision_angles(patch_positions(grid.tolist()), head_dim)
    assert_parity("vision", "01 rot_pos_emb", angles, tensors["out/rot_pos_emb_patch_order"], 2e-5)


@pytest.mark.parametrize("manifest", ["nexus_genv2_ar", "qwen2_5_vl_7b_instruct"])
def test_names_and_shapes_of_the_released_file(manifest):
    released = json.loads((MANIFESTS / f"{manifest}.json").read_text())["tensors"]
    want = {k: tuple(v) for k, v in released.items() if k.startswith("visual.")}
    with torch.device("meta"):
        model = QwenViT(VisionConfig())
    assert {f"visual.{k}": tuple(v.shape) for k, v in model.state_dict().items()} == want
    assert len(want) == 32 * 12 + 6
    assert not list(model.buffers())


@pytest.mark.parametrize(
    "grid", [((1, 8, 8),), ((1, 10, 14), (2, 6, 8), (1, 2, 2)), ((1, 18, 18),)]
)
def test_segments_equal_block_diagonal_mask(grid):
    """Windows and images as batches == one full attention with a block-diagonal mask."""
    q, k, v = torch.randn(3, sum(t * h * w for t, h, w in grid), 2, 16)
    _, windows = window_index(grid, SMALL)
    for lengths in (windows, [h * w for t, h, w in grid for _ in range(t)]):
        owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        mask = owner[:, None] == owner
        heads = (x.transpose(0, 1) for x in (q, k, v))
        want = F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(0, 1).flatten(1)
        got = attend_segments(q, k, v, make_segments(lengths, q.device))
        torch.testing.assert_close(got, want, atol=2e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("batch", [((1, 8, 8),) * 3, ((1, 8, 8), (1, 10, 6), (1, 16, 16))])
def test_many_images_equal_one_at_a_time(batch):
    model, x = random_vit(), random_images(batch)
    parts = x.split([t * h * w for t, h, w in batch])
    want = torch.cat([model(p, torch.tensor([g])) for p, g in zip(parts, batch, strict=True)])
    torch.testing.assert_close(model(x, torch.tensor(batch)), want, atol=2e-6, rtol=0)


@torch.no_grad()
def test_video_frames_are_images():
    model, x = random_vit(), random_images([(3, 4, 6)])
    want = model(x, ((1, 4, 6),) * 3)
    torch.testing.assert_close(model(x, ((3, 4, 6),)), want, atol=2e-6, rtol=0)


@torch.no_grad()
def test_windows_confine_and_full_blocks_mix():
    """A change in the last patch reaches the other windows if and only if a block is full."""
    x = random_images([(1, 8, 8)])
    y = x.clone()
    y[-1] += 1.0
    for full in ((), (1,)):
        model = random_vit(replace(SMALL, depth=2, fullatt_block_indexes=full))
        moved = (model(x, ((1, 8, 8),)) - model(y, ((1, 8, 8),))).abs().amax(-1).view(4, 4) > 0
        own = torch.zeros(4, 4, dtype=torch.bool)
        own[2:, 2:] = True
        assert torch.equal(moved, torch.ones_like(own) if full else own)


def test_window_index_is_a_permutation_with_ragged_edges():
    index, lengths = window_index(((1, 10, 6), (1, 4, 4)), SMALL)  # 5x3 and 2x2 units, windows of 2
    assert sorted(index.tolist()) == list(range(19))
    assert index[:6].tolist() == [0, 1, 3, 4, 2, 5]
    assert lengths == (16, 8, 16, 8, 8, 4, 16)


def test_equal_segments_need_no_gather():
    """The training case: B images of one grid whose windows fit are a pure reshape."""
    grid = ((1, 8, 8),) * 32
    segments = make_segments(window_index(grid, TINY)[1], torch.device("cpu"))
    assert segments == ((16,), (slice(None),), None)


def test_gradients_after_inference_mode():
    """A layout that was cached during inference must serve training."""
    model, x, grid = random_vit(), random_images([(1, 12, 4)]), ((1, 12, 4),)
    with torch.inference_mode():
        want = model(x, grid).clone()
    x.requires_grad_()
    out = model(x, grid)
    out.square().sum().backward()
    torch.testing.assert_close(out.detach(), want)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert (x.grad.abs().amax(-1) > 0).all()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiles_as_one_graph_for_a_fixed_grid():
    model, x, grid = random_vit(), random_images([(1, 8, 8)] * 2), ((1, 8, 8),) * 2
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, grid), model(x, grid), atol=2e-6, rtol=0)


@torch.no_grad()
def test_bfloat16_stays_close_and_keeps_its_dtype():
    model, x, grid = random_vit(), random_images([(1, 8, 8)]), ((1, 8, 8),)
    want = model(x, grid)
    got = model.bfloat16()(x, grid)
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize(
    "shape, grid, message",
    [
        ((64, 1176), ((1, 8, 6),), r"\(64, 1176\) must be \(48, 1176\)"),
        ((64, 588), ((1, 8, 8),), r"\(64, 588\) must be \(64, 1176\)"),
        ((1, 64, 1176), ((1, 8, 8),), r"\(1, 64, 1176\)"),
        ((63, 1176), ((1, 7, 9),), "multiples of 2"),
        ((64, 1176), ((8, 8),), r"\(t, h, w\)"),
        ((64, 1176), (1, 8, 8), r"\(t, h, w\)"),
        ((64, 1176), ((1, -8, -8),), ">= 1"),
        ((0, 1176), (), "n >= 1"),
    ],
)
def test_wrong_inputs_name_the_sizes(shape, grid, message):
    model = random_vit()
    for g in (grid, torch.tensor(grid, dtype=torch.int64)):
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(shape), g)


@pytest.mark.parametrize("change", [{"window_size": 14}, {"fullatt_block_indexes": (1, 4)}])
def test_impossible_config_is_an_error(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        QwenViT(replace(SMALL, **change))
