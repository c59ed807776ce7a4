"""Both projectors against the official code (fixtures 07, 08), the released names, and no mask."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import golden, weights

from nexus_min.config import NexusGenConfig, TextConfig
from nexus_min.model.projector import GenerationAdapter, ImageEmbeddingMerger, merger_positions
from nexus_min.model.rope import mrope_cos_sin

MANIFESTS = Path(__file__).parent / "manifests"
TARGET, REFERENCE = (1, 18, 18), (1, 36, 36)


def official_adapter(scale: float = 1.0) -> tuple[GenerationAdapter, dict, dict]:
    tensors, meta = golden("07")
    adapter = GenerationAdapter(meta["config"]["in_dim"], meta["config"]["out_dim"])
    for key in meta["notes"]["eps_probe"]["scaled_weights"]:
        tensors[f"weights/{key}"] *= scale
    adapter.load_state_dict(weights(tensors))
    return adapter.requires_grad_(False), tensors, meta


@pytest.fixture(scope="module")
def merger() -> tuple[ImageEmbeddingMerger, dict]:
    tensors, meta = golden("08")
    config = meta["config"]
    model = ImageEmbeddingMerger(
        TextConfig.from_dict(config), config["out_channel"], config["expand_ratio"]
    )
    model.load_state_dict(weights(tensors, "embedding_merger."))
    return model.requires_grad_(False), tensors


def test_adapter_parity(assert_parity):
    adapter, tensors, _ = official_adapter()
    got = adapter(tensors["in/image_embeddings"])
    assert_parity("adapter", "07", got, tensors["out/prompt_emb"])


def test_adapter_eps_parity(assert_parity):
    """Linears this small leave the LayerNorms' epsilon (1e-5) to decide."""
    factor = official_adapter()[2]["notes"]["eps_probe"]["factor"]
    adapter, tensors, _ = official_adapter(factor)
    got = adapter(tensors["in/image_embeddings"])
    assert_parity("adapter", "07 eps", got, tensors["out/eps_probe_prompt_emb"])


def test_merger_parity(merger, assert_parity):
    model, t = merger
    both = model(t["in/embeds"], TARGET, t["in/ref_embeds"], REFERENCE)
    assert_parity("merger", "08 with reference", both, t["out/with_ref"])
    assert_parity("merger", "08 without", model(t["in/embeds"], TARGET), t["out/without_ref"])
    odd = model(t["in/odd_embeds"], (1, 10, 14), t["in/odd_ref"], (1, 8, 6))
    assert_parity("merger", "08 odd grids", odd, t["out/odd_grids"])


def test_merger_eps_parity(merger, assert_parity):
    model, t = merger
    got = model(t["in/embeds"] * 1e-3, TARGET, t["in/ref_embeds"] * 1e-3, REFERENCE)
    assert_parity("merger", "08 eps", got, t["out/eps_probe_with_ref"])


def test_merger_positions_parity(merger, assert_parity):
    model, t = merger
    grids = {"18": TARGET, "36": REFERENCE, "10x14": (1, 10, 14)}
    for name, grid in grids.items():
        got, want = merger_positions(grid), t[f"out/position_ids_{name}"]
        assert_parity("merger", f"08 positions {name}", got, want, 1e-5)
    c = model.config
    pair = mrope_cos_sin(merger_positions(TARGET), c.head_dim, c.rope_theta, c.mrope_section)
    for name, got in zip(("cos", "sin"), pair, strict=True):
        parts = t[f"out/rope_{name}_18"].split(c.mrope_section * 2, dim=-1)  # [3, B, L, part]
        want = torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)
        assert_parity("merger", f"08 rope {name}", got, want)


def shapes(model: torch.nn.Module, prefix: str = "") -> dict[str, list[int]]:
    return {prefix + k: list(v.shape) for k, v in model.state_dict().items()}


def test_names_and_shapes_of_the_released_files():
    c = NexusGenConfig.v2()
    width, context = c.ar.text.hidden_size, c.mmdit.context_in_dim
    with torch.device("meta"):
        adapter = GenerationAdapter(width, context)
        merger = ImageEmbeddingMerger(c.ar.text, context)
    models = {
        "generation_decoder": shapes(adapter),
        "edit_decoder": shapes(merger, "embedding_merger."),
    }
    for name, got in models.items():
        manifest = json.loads((MANIFESTS / f"{name}.json").read_text())["tensors"]
        assert got == {k: v for k, v in manifest.items() if not k.startswith("pipe.dit.")}


def test_merger_sees_everything_from_everywhere(merger):
    """No mask: the first target token depends on the last reference token, and the other way."""
    model, t = merger
    embeds, ref = t["in/embeds"], t["in/ref_embeds"]
    want = model(embeds, TARGET, ref, REFERENCE)
    touched = ref.clone()
    touched[:, -1] += 1
    assert not torch.equal(model(embeds, TARGET, touched, REFERENCE)[:, 0], want[:, 0])
    touched = embeds.clone()
    touched[:, -1] += 1
    got = model(touched, TARGET, ref, REFERENCE)
    assert not torch.equal(got[:, 0], want[:, 0]) and not torch.equal(got[:, -1], want[:, -1])


def test_batch_equals_loop(merger):
    model, t = merger
    embeds, ref = t["in/odd_embeds"], t["in/odd_ref"]
    embeds, ref = torch.cat((embeds, embeds.flip(1))), torch.cat((ref, -ref))
    grids = (1, 10, 14), (1, 8, 6)
    rows = [model(embeds[i : i + 1], grids[0], ref[i : i + 1], grids[1]) for i in range(2)]
    got = model(embeds, grids[0], ref, grids[1])
    torch.testing.assert_close(got, torch.cat(rows), atol=2e-5, rtol=0)


def test_target_and_reference_cover_the_same_range():
    """18 patches step by 4, 36 by 2: every second reference row lies on a target row."""
    target, reference = merger_positions(TARGET), merger_positions(REFERENCE)
    assert target[0].eq(0).all() and reference[0].eq(0).all()
    assert target[1].unique().tolist() == list(range(0, 36, 4))
    assert reference[2].unique().tolist() == list(range(0, 36, 2))


def test_wrong_sizes_are_named(merger):
    model, t = merger
    with pytest.raises(RuntimeError, match=r"81\) must match"):  # nothing broadcasts
        model(t["in/embeds"], REFERENCE)
    with pytest.raises(RuntimeError, match=r"405\) must match"):
        model(t["in/embeds"], TARGET, t["in/ref_embeds"], TARGET)
    with pytest.raises(ValueError, match="both or neither"):
        model(t["in/embeds"], TARGET, t["in/ref_embeds"])
    with pytest.raises(ValueError, match="batch of 1"):
        model(t["in/embeds"], TARGET, t["in/ref_embeds"].repeat(2, 1, 1), REFERENCE)
