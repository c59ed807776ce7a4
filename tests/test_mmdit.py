"""MMDiT against the official code (fixture 09), the released names, and its own invariants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import golden, weights

from nexus_min.config import MMDiTConfig, NexusGenConfig
from nexus_min.model.mmdit import (
    ULP_HIGHER,
    MMDiT,
    context_ids_editing,
    context_ids_generation,
    image_ids,
    patchify,
    timestep_embedding,
    timestep_frequencies,
    unpatchify,
)
from nexus_min.model.rope import apply_rope_interleaved, rotate_real
from nexus_min.weights import diffsynth_name, is_swapped, swap_halves

MANIFESTS = Path(__file__).parent / "manifests"
FINAL = "final_layer.adaLN_modulation.1."


def bfl_weights(tensors: dict, names, swap: bool = True) -> dict[str, torch.Tensor]:
    """The fixture's tensors by our names; `swap` makes [shift; scale] of [scale; shift]."""
    stored = weights(tensors, "pipe.dit.")
    state = {name: stored.pop(diffsynth_name(name)) for name in names}
    assert not stored
    return {k: swap_halves(v) if swap and is_swapped(k) else v for k, v in state.items()}


def micro(tensors: dict, meta: dict) -> MMDiT:
    c = meta["config"]
    config = MMDiTConfig(
        in_channels=c["in_dim"],
        vec_in_dim=c["pooled"],
        context_in_dim=c["ctx"],
        hidden_size=c["dim"],
        mlp_ratio=c["mlp_ratio"],
        num_heads=c["heads"],
        depth=c["joint"],
        depth_single_blocks=c["single"],
        axes_dim=tuple(c["axes"]),
        theta=c["theta"],
        time_embed_dim=c["time_proj_dim"],
    )
    model = MMDiT(config)
    model.load_state_dict(bfl_weights(tensors, model.state_dict()))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def official():
    tensors, meta = golden("09")
    return tensors, meta, micro(tensors, meta)


def velocity(model: MMDiT, tensors: dict, t: float, ids: str, batch: int = 1) -> torch.Tensor:
    """Velocity [B, C, h, w] of the fixture's inputs; the second row is the fixture's variation."""
    latents, txt, y = (tensors[f"in/{k}"] for k in ("latents", "prompt_emb", "pooled_prompt_emb"))
    if batch == 2:
        latents = torch.cat((latents, latents.flip(3)))
        txt, y = torch.cat((txt, txt.flip(1))), torch.cat((y, -y))
    out = model(
        patchify(latents),
        image_ids(*latents.shape[-2:]),
        txt,
        tensors[f"in/text_ids_{ids}"],
        torch.tensor([t / 1000], dtype=torch.float64),
        y,
        tensors["in/guidance"],
    )
    return unpatchify(out, *latents.shape[-2:])


@pytest.mark.parametrize("t", ["1000", "640.25", "3"])
@pytest.mark.parametrize("ids", ["zero", "edit"])
def test_velocity_parity(official, assert_parity, ids, t):
    tensors, _, model = official
    got = velocity(model, tensors, float(t), ids)
    assert_parity("mmdit", f"09 velocity {ids} t={t}", got, tensors[f"out/velocity_{ids}_t{t}"])


def test_batch_parity(official, assert_parity):
    tensors, _, model = official
    got = velocity(model, tensors, 640.25, "edit", batch=2)
    assert_parity("mmdit", "09 velocity batch 2", got, tensors["out/velocity_batch2_edit_t640.25"])


def test_condition_parity(official, assert_parity):
    tensors, _, model = official
    projected = timestep_embedding(torch.tensor([0.64025], dtype=torch.float64), 256)
    assert_parity("mmdit", "09 sinusoid", projected, tensors["out/time_proj_640.25"])
    assert_parity("mmdit", "09 time", model.time_in(projected), tensors["out/time_emb_640.25"])
    guidance = model.guidance_in(timestep_embedding(tensors["in/guidance"], 256))
    assert_parity("mmdit", "09 guidance", guidance, tensors["out/guidance_emb_3.5"])
    y = model.vector_in(tensors["in/pooled_prompt_emb"])
    assert_parity("mmdit", "09 pooled", y, tensors["out/pooled_emb"])


def test_positions_parity(official, assert_parity):
    tensors, _, model = official
    assert_parity(
        "mmdit", "09 patchify", patchify(tensors["in/latents"]), tensors["out/patchified"]
    )
    assert_parity("mmdit", "09 image ids", image_ids(8, 12), tensors["out/image_ids"])
    edit = context_ids_editing((1, 6, 6), (1, 12, 12), 8, 12)
    assert_parity("mmdit", "09 edit ids", edit, tensors["in/text_ids_edit"], 0)
    assert_parity(
        "mmdit", "09 zero ids", context_ids_generation(45), tensors["in/text_ids_zero"], 0
    )
    cos, sin = model.rope(image_ids(8, 12), edit)
    want = tensors["out/rope_edit"]  # 2 x 2 rotation matrices
    assert_parity("mmdit", "09 rope cos", cos, want[..., 0, 0])
    assert_parity("mmdit", "09 rope sin", sin, want[..., 1, 0])


def test_blocks_parity(official, assert_parity):
    tensors, _, model = official
    rope = model.rope(image_ids(8, 12), tensors["in/text_ids_edit"])
    t = torch.tensor([0.64025], dtype=torch.float64)
    vec = model.condition(t, tensors["in/pooled_prompt_emb"], tensors["in/guidance"])
    mods = model.modulations(vec)
    img = model.img_in(patchify(tensors["in/latents"]))
    txt = model.txt_in(tensors["in/prompt_emb"])
    for i, (block, mod) in enumerate(zip(model.double_blocks, mods.double, strict=True)):
        img, txt = block(img, txt, mod, rope)
        assert_parity("mmdit", f"09 double {i} img", img, tensors[f"out/joint{i}_img"])
        assert_parity("mmdit", f"09 double {i} txt", txt, tensors[f"out/joint{i}_txt"])
    x = torch.cat((txt, img), dim=1)
    for i, (block, mod) in enumerate(zip(model.single_blocks, mods.single, strict=True)):
        x = block(x, mod, rope)
        assert_parity("mmdit", f"09 single {i}", x, tensors[f"out/single{i}"])


def test_frequencies_are_the_official_ones_to_the_last_bit():
    """Read off fixture 09: neither neighbour of a frequency explains the official sinusoid."""
    want = torch.cat(golden("09")[0]["out/time_proj_640.25"][0].double().chunk(2))
    ours = timestep_frequencies(128)
    errors = []
    for freqs in (ours, *(torch.nextafter(ours, torch.full_like(ours, x)) for x in (0.0, 1.0))):
        angles = (torch.tensor(640.25) * freqs).double()
        errors.append((torch.cat((angles.cos(), angles.sin())) - want).abs().view(2, 128).amax(0))
    assert errors[0].max() < 1e-7
    ruled_out = (
        torch.stack(errors[1:]).amin(0) > 2e-7
    )  # the angle of the others is the same after fp32
    assert ruled_out.sum() > 15 and ruled_out[ULP_HIGHER].all()


@pytest.mark.parametrize("probe", ["embed", "qkv"])
def test_eps_parity(assert_parity, probe):
    """With inputs this small the norms' epsilon decides the output, and the sinusoid's last bit."""
    tensors, meta = golden("09")
    notes = meta["notes"]["eps_probe"]
    for key in notes[f"eps_probe_{probe}"]:
        tensors[f"weights/pipe.dit.{key}"] *= notes["factor"]
    model = micro(tensors, meta)
    got = velocity(model, tensors, 640.25, "edit")
    assert_parity("mmdit", f"09 eps {probe}", got, tensors[f"out/eps_probe_{probe}"])


def test_final_half_swap_parity(official, assert_parity):
    """DiffSynth stores [scale; shift], BFL [shift; scale]: swapped is exact, unswapped far off."""
    tensors, meta, model = official
    names = model.state_dict()
    swapped, unswapped = bfl_weights(tensors, names), bfl_weights(tensors, names, swap=False)
    for part in ("weight", "bias"):
        want = tensors[f"weights/BFL:{FINAL}{part}"]
        assert_parity("mmdit", f"09 final {part}", swapped[FINAL + part], want, 0)
        assert_parity("mmdit", f"09 loaded final {part}", model.state_dict()[FINAL + part], want, 0)
    wrong = micro(tensors, meta)
    wrong.load_state_dict(unswapped)  # strict, and silent
    want = tensors["out/velocity_edit_t640.25"]
    assert_parity("mmdit", "09 swapped", velocity(model, tensors, 640.25, "edit"), want)
    error = (velocity(wrong, tensors, 640.25, "edit") - want).abs().max()
    assert error > 0.5 * want.std()


def test_names_and_shapes_of_the_released_file():
    manifest = json.loads((MANIFESTS / "flux1_dev_bfl.json").read_text())["tensors"]
    with torch.device("meta"):
        model = MMDiT(NexusGenConfig.v2().mmdit)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == manifest


# ---- invariants ----------------------------------------------------------------------------------


def tiny_inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    c = NexusGenConfig.tiny().mmdit
    torch.manual_seed(0)
    return {
        "img": torch.randn(batch, 12, c.in_channels),
        "img_ids": image_ids(6, 8),
        "txt": torch.randn(batch, 5, c.context_in_dim),
        "txt_ids": context_ids_generation(5),
        "timesteps": torch.rand(batch),
        "y": torch.randn(batch, c.vec_in_dim),
        "guidance": torch.full((batch,), 3.5),
    }


@pytest.fixture(scope="module")
def tiny() -> MMDiT:
    torch.manual_seed(0)
    return MMDiT(NexusGenConfig.tiny().mmdit).requires_grad_(False)


def test_unpatchify_inverts_patchify():
    x = torch.randn(2, 16, 6, 10)
    assert patchify(x).shape == (2, 15, 64)
    assert torch.equal(unpatchify(patchify(x), 6, 10), x)
    # the first token is the upper left 2 x 2 cells, channel by channel
    assert torch.equal(patchify(x)[0, 0], x[0, :, :2, :2].reshape(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ways_to_turn_pairs_are_one_rotation(dtype):
    """CPUs take the complex one, and so do the fixtures; GPUs the real one."""
    torch.manual_seed(0)
    x, angle = torch.randn(2, 3, 5, 8, dtype=dtype), torch.randn(2, 1, 5, 4, dtype=dtype)
    cos, sin = angle.cos(), angle.sin()
    fused = x.transpose(1, 2).repeat(1, 1, 3, 1)[:, :, :3].transpose(1, 2)  # as the MMDiT has it
    assert not fused.is_contiguous()
    torch.testing.assert_close(
        apply_rope_interleaved(fused, cos, sin), apply_rope_interleaved(x, cos, sin)
    )
    got = rotate_real(x, cos, sin)
    torch.testing.assert_close(got, apply_rope_interleaved(x, cos, sin))
    for pair in range(4):
        c, s = cos[..., pair, None], sin[..., pair, None]
        a, b = x[..., 2 * pair : 2 * pair + 2].chunk(2, -1)
        want = torch.cat((a * c - b * s, a * s + b * c), -1)
        torch.testing.assert_close(got[..., 2 * pair : 2 * pair + 2], want)


def test_zero_gates_make_identity_blocks(tiny):
    inputs = tiny_inputs()
    rope = tiny.rope(inputs["img_ids"], inputs["txt_ids"])
    img, txt = torch.randn(2, 12, 128), torch.randn(2, 5, 128)
    mods = tiny.modulations(torch.randn(2, 128))

    def closed(parts):
        return [m._replace(gate=torch.zeros_like(m.gate)) for m in parts]

    img_mod, txt_mod = mods.double[0]
    got = tiny.double_blocks[0](img, txt, (closed(img_mod), closed(txt_mod)), rope)
    assert torch.equal(got[0], img) and torch.equal(got[1], txt)
    x = torch.cat((txt, img), 1)
    assert torch.equal(tiny.single_blocks[0](x, closed([mods.single[0]])[0], rope), x)
    moved = tiny.double_blocks[0](img, txt, (img_mod, txt_mod), rope)
    assert not torch.allclose(moved[0], img) and not torch.allclose(moved[1], txt)


def test_batch_equals_loop(tiny):
    inputs = tiny_inputs(3)
    ids = {k: v for k, v in inputs.items() if k.endswith("ids")}
    rows = [tiny(**{k: v[i : i + 1] for k, v in inputs.items()} | ids) for i in range(3)]
    torch.testing.assert_close(tiny(**inputs), torch.cat(rows), atol=1e-5, rtol=0)


def test_precomputed_rope_and_modulations_change_nothing(tiny):
    inputs = tiny_inputs()
    want = tiny(**inputs)
    rope = tiny.rope(inputs["img_ids"], inputs["txt_ids"])
    mods = tiny.modulations(tiny.condition(inputs["timesteps"], inputs["y"], inputs["guidance"]))
    assert torch.equal(tiny.velocity(inputs["img"], inputs["txt"], mods, rope), want)


def test_every_input_matters(tiny):
    inputs = tiny_inputs()
    want = tiny(**inputs)
    for key in inputs:
        changed = inputs[key].clone()
        changed[..., -1] += 0.25
        assert not torch.allclose(tiny(**inputs | {key: changed}), want), key


def test_context_order_is_free_only_with_equal_positions(tiny):
    """Generation context has no order (all ids zero); editing context has."""
    inputs = tiny_inputs()
    flipped = inputs | {"txt": inputs["txt"].flip(1)}
    torch.testing.assert_close(tiny(**flipped), tiny(**inputs), atol=1e-5, rtol=0)
    placed = {"txt_ids": context_ids_editing((1, 2, 2), (1, 4, 4), 6, 8)}
    assert not torch.allclose(tiny(**flipped | placed), tiny(**inputs | placed), atol=1e-4)


def test_editing_ids_share_the_frame_of_the_image():
    """At 512 px: 9 target rows 3.56 apart and 18 reference rows 1.78 apart over 32 image rows."""
    ids = context_ids_editing((1, 18, 18), (1, 36, 36), 64, 64)[0]
    assert ids.shape == (405, 3)
    assert ids[:81, 0].eq(0).all() and ids[81:, 0].eq(1).all()
    torch.testing.assert_close(ids[80], torch.tensor([0.0, 8 * 64 / 18, 8 * 64 / 18]))
    torch.testing.assert_close(ids[-1], torch.tensor([1.0, 17 * 64 / 36, 17 * 64 / 36]))
    assert torch.equal(ids[:81], context_ids_editing((1, 18, 18), None, 64, 64)[0])


def test_bf16_keeps_time_precise(tiny):
    """The sinusoid is fp32 whatever the weights: two close times stay apart, the output is bf16."""
    model = MMDiT(tiny.config).to(torch.bfloat16).requires_grad_(False)
    model.load_state_dict(tiny.state_dict())
    inputs = tiny_inputs()
    low = inputs | {k: inputs[k].to(torch.bfloat16) for k in ("img", "txt", "y")}
    got = model(**low)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), tiny(**inputs), atol=0.05, rtol=0.05)
    near = timestep_embedding(torch.tensor([0.9, 0.901]), 256)
    assert near.dtype == torch.float32 and (near[0] - near[1]).abs().max() > 0.5


@pytest.mark.parametrize(
    "change",
    [
        {"txt": torch.zeros(2, 5, 95)},
        {"y": torch.zeros(2, 31)},
        {"txt": torch.zeros(3, 5, 96)},
        {"txt": torch.zeros(2, 6, 96)},
        {"timesteps": torch.rand(3)},
        {"txt_ids": torch.zeros(3, 5, 3)},
        {"txt_ids": torch.zeros(3, 5, 3), "img_ids": torch.zeros(2, 12, 3)},
    ],
)
def test_wrong_sizes_never_broadcast(tiny, change):
    with pytest.raises(RuntimeError, match="size|shapes"):
        tiny(**tiny_inputs() | change)


def test_wrong_grids_are_named():
    with pytest.raises(ValueError, match="1, 16, 7, 8"):
        patchify(torch.zeros(1, 16, 7, 8))
    with pytest.raises(ValueError, match="15 tokens cannot fill 6 x 8"):
        unpatchify(torch.zeros(1, 15, 64), 6, 8)


def test_parameters_learn(tiny):
    """Every parameter receives a gradient."""
    model = MMDiT(tiny.config)
    model(**tiny_inputs()).square().mean().backward()
    dead = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_velocity_compiles_in_one_graph(tiny):
    inputs = tiny_inputs()
    rope = tiny.rope(inputs["img_ids"], inputs["txt_ids"])
    mods = tiny.modulations(tiny.condition(inputs["timesteps"], inputs["y"], inputs["guidance"]))
    args = inputs["img"], inputs["txt"], mods, rope
    compiled = torch.compile(tiny.velocity, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args), tiny(**inputs), atol=1e-5, rtol=0)
