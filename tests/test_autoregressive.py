"""Autoregressive half: parity of positions, slots, loss and gradients; and its equivalences."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import golden, weights

from nexus_min.config import ARConfig, NexusGenConfig, TextConfig, VisionConfig
from nexus_min.model.autoregressive import (
    NexusGenAR,
    ar_loss,
    generate,
    penalize,
    prefill_image_slots,
    prefill_image_slots_loop,
    rope_index,
)
from nexus_min.model.packing import packed_ar_loss

MANIFESTS = Path(__file__).parent / "manifests"
MICRO = ARConfig(
    text=TextConfig(32, 48, 2, 4, 2, 40, 1e-6, 1e4, (1, 2, 1)),
    vision=VisionConfig(
        2, 32, 40, 4, patch_size=2, window_size=16, out_hidden_size=32, fullatt_block_indexes=(1,)
    ),
    image_token_id=33,
    vision_start_token_id=31,
    vision_end_token_id=32,
    eos_token_id=30,
    pad_token_id=34,
    num_image_slots=4,
)
START, END, IMAGE = 31, 32, 33


def official(name: str) -> tuple[dict, NexusGenAR]:
    """A fixture's tensors and its model."""
    tensors, meta = golden(name)
    with torch.device("meta"):
        model = NexusGenAR(ARConfig.from_dict(meta["config"]))
    model.load_state_dict(weights(tensors), strict=True, assign=True)
    return tensors, model.requires_grad_(False)


@pytest.fixture(scope="module")
def micro() -> NexusGenAR:
    torch.manual_seed(0)
    return NexusGenAR(MICRO).requires_grad_(False)


def image_embeds(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))


# --- names ------------------------------------------------------------------------------------


def test_names_full_size():
    manifest = json.loads((MANIFESTS / "nexus_genv2_ar.json").read_text())
    with torch.device("meta"):
        model = NexusGenAR(ARConfig())
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert shapes == manifest["tensors"]
    assert len(shapes) == 731
    assert sum(p.numel() for p in model.parameters()) == 8_305_302_016


# --- positions --------------------------------------------------------------------------------

ROPE_CASES = [
    "text_only",
    "text_only_left_pad",
    "image_text",
    "text_image_text_genimage18",
    "batch_right_pad",
    "batch_left_pad",
]


@pytest.mark.parametrize("case", ROPE_CASES)
def test_parity_rope_index(assert_parity, case):
    t, _ = golden("03")
    grid, mask = (t.get(f"in/{case}/{k}") for k in ("image_grid_thw", "attention_mask"))
    got, deltas = rope_index(t[f"in/{case}/input_ids"], grid, mask, config=ARConfig())
    assert_parity("rope_index", f"03 {case}", got, t[f"out/{case}/position_ids"], 0)
    assert_parity("rope_index", f"03 {case} deltas", deltas, t[f"out/{case}/rope_deltas"], 0)


def positions_by_hand(ids: list[int], grids: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    """M-RoPE written as a loop: grids are merged (rows, columns)."""
    out, p, i, grids = [], 0, 0, iter(grids)
    while i < len(ids):
        if ids[i] == IMAGE:
            h, w = next(grids)
            out += [(p, p + r, p + c) for r in range(h) for c in range(w)]
            i, p = i + h * w, p + max(h, w)
        else:
            out.append((p, p, p))
            i, p = i + 1, p + 1
    return out


def test_rope_index_is_the_written_out_loop():
    """Wide, tall, adjacent, leading and trailing images."""
    rows = [[IMAGE] * 6 + [1] + [IMAGE] * 4 + [IMAGE] * 3, [5] * 4 + [IMAGE] * 10]
    grids = [[(2, 3), (4, 1), (1, 3)], [(5, 2)]]
    flat = torch.tensor([[1, 2 * h, 2 * w] for row in grids for h, w in row])
    got, deltas = rope_index(torch.tensor(rows), flat, config=MICRO)
    for b, (ids, row_grids) in enumerate(zip(rows, grids, strict=True)):
        assert [tuple(p) for p in got[:, b].T.tolist()] == positions_by_hand(ids, row_grids)
    assert (deltas.squeeze(1) + 14 == torch.tensor([3 + 1 + 4 + 3, 4 + 5])).all()


@pytest.mark.parametrize(
    "grids, message",
    [
        (None, r"row 0 do not fit image_grid_thw \[\].*image 1 should have 0 tokens"),
        ([[1, 4, 4]], "image tokens of row 0 do not fit.*image 1 should have 4 tokens"),
        ([[1, 4, 4], [1, 2, 4]], "image tokens of row 0 do not fit"),
        ([[1, 6, 2]], r"row 1 do not fit image_grid_thw \[\[1, 6, 2\]\]"),
        ([[1, 0, 4]], "image 1 should have 0 tokens"),
        ([[1, 6, 2]] * 3, "3 grids for 2 images in the text"),
    ],
)
def test_wrong_grids_are_named(grids, message):
    ids = torch.tensor([[1, 2, IMAGE, IMAGE, IMAGE], [IMAGE, IMAGE, IMAGE, 1, 2]])
    grids = None if grids is None else torch.tensor(grids)
    with pytest.raises(ValueError, match=message):
        rope_index(ids, grids, config=MICRO)


def test_wrong_mask_and_ids_are_named():
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(2, 5\) and attention_mask \(2, 4\) should both be"):
        rope_index(ids, None, torch.ones(2, 4), config=MICRO)
    with pytest.raises(ValueError, match=r"\(5,\) and .* should both be \[B, L\]"):
        rope_index(ids[0], config=MICRO)


# --- forward ----------------------------------------------------------------------------------


def test_parity_forward_from_pixels(assert_parity):
    t, model = official("04")
    grid = t["in/image_grid_thw"]
    merged = model.visual(t["in/pixel_values"], grid)
    assert_parity("autoregressive", "04 visual_merged", merged, t["out/visual_merged"])
    positions, deltas = rope_index(t["in/input_ids"], grid, config=model.config)
    assert_parity("rope_index", "04 position_ids", positions, t["out/position_ids"], 0)
    assert_parity("rope_index", "04 rope_deltas", deltas, t["out/rope_deltas"], 0)
    out = model(t["in/input_ids"], merged, grid)
    assert_parity("autoregressive", "04 logits", out.logits, t["out/logits"])
    want = t["out/image_embeddings"]
    assert_parity("autoregressive", "04 image_embeddings", out.image_embeddings, want)


def test_image_token_count_is_checked(micro):
    ids = torch.tensor([[1, START, IMAGE, IMAGE, END]])
    for n in (1, 3):
        with pytest.raises(ValueError, match=f"{n} image embeddings for 2 image tokens"):
            micro.embed(ids, image_embeds(n))
    with pytest.raises(ValueError, match="0 image embeddings for 2"):
        micro.embed(ids)


def test_slots_are_numbered_anew_in_each_image(micro):
    ids = torch.tensor([[START, IMAGE, IMAGE, IMAGE, END, 1, START, IMAGE, IMAGE, END]])
    x = micro.embed(ids, None, ids == IMAGE)
    table = micro.image_prefill_embeds.weight
    assert torch.equal(x[0, 1:4], table[:3]) and torch.equal(x[0, 7:9], table[:2])
    with pytest.raises(ValueError, match="image of 5 slots; the model has 4"):
        ids = torch.tensor([[START] + [IMAGE] * 5])
        micro.embed(ids, None, ids == IMAGE)


def test_width_mismatch_is_an_error():
    with pytest.raises(ValueError, match="vision width 16 != text width 32"):
        NexusGenAR(replace(MICRO, vision=replace(MICRO.vision, out_hidden_size=16)))


# --- loss -------------------------------------------------------------------------------------


def loss_case(case: str) -> tuple[dict, NexusGenAR, tuple]:
    """Fixture 06: tensors, model, and the arguments of `ar_loss`."""
    t, model = official("06")
    rows = {"all": slice(None), "und_only": slice(0, 48), "gen_only": slice(48, 372)}[case]
    names = ("input_ids", "labels", "attention_mask", "image_grid_thw")
    ids, labels, mask, grid = (t[f"in/{case}/{name}"] for name in names)
    embeds = model.visual(t["in/all/pixel_values"][rows], grid)
    slots = labels == model.config.image_token_id
    return t, model, (ids, labels, mask, grid, embeds, slots)


@pytest.mark.parametrize("case", ["all", "und_only", "gen_only"])
def test_parity_loss(assert_parity, case):
    t, model, args = loss_case(case)
    positions, _ = rope_index(args[0], args[3], args[2], config=model.config)
    assert_parity("rope_index", f"06 {case}", positions, t[f"out/{case}/position_ids"], 0)
    for mask, loss in product((args[2], None), (ar_loss, packed_ar_loss)):
        found = loss(model, *args[:2], mask, *args[3:])
        for name, value in found._asdict().items():
            assert_parity("ar_loss", f"06 {case} {name}", value, t[f"out/{case}/{name}"])


def test_parity_loss_inputs_and_predictions(assert_parity):
    t, model, (ids, _, mask, grid, embeds, slots) = loss_case("all")
    target = slots[ids == model.config.image_token_id]
    want = t["out/all/target_image_embeddings"]
    assert_parity("ar_loss", "06 target_image_embeddings", embeds[target], want)
    x = model.embed(ids, embeds[~target], slots)
    assert_parity("ar_loss", "06 inputs_embeds", x, t["out/all/inputs_embeds"])
    out = model(ids, embeds[~target], grid, mask, slots)
    got = out.image_embeddings[:, :-1][slots[:, 1:]]
    assert_parity("ar_loss", "06 pred_image_embeddings", got, t["out/all/pred_image_embeddings"])


@pytest.mark.parametrize("loss", [ar_loss, packed_ar_loss])
@pytest.mark.parametrize("masked", [False, True])
def test_parity_gradients(assert_parity, loss, masked):
    t, model, args = loss_case("all")
    args = (*args[:2], args[2] if masked else None, *args[3:])
    wanted = {k.removeprefix("out/all/grad/"): v for k, v in t.items() if "/grad/" in k}
    assert len(wanted) == 6
    parameters = dict(model.named_parameters())
    for name in wanted:
        parameters[name].requires_grad_(True)
    loss(model, *args).loss.backward()
    for name, want in wanted.items():
        assert_parity("ar_loss", f"06 grad {name}", parameters[name].grad, want)


def test_right_padding_needs_no_mask_and_left_padding_is_the_same_loss():
    _, model, (ids, labels, mask, grid, embeds, slots) = loss_case("all")
    want = ar_loss(model, ids, labels, mask, grid, embeds, slots)
    bare = ar_loss(model, ids, labels, None, grid, embeds, slots)
    roll = torch.stack([(torch.arange(115) - 115 + n) % 115 for n in mask.sum(1).tolist()])
    left = [x.gather(1, roll) for x in (ids, labels, mask, slots)]
    shifted = ar_loss(model, *left[:3], grid, embeds, left[3])
    for a, b, c in zip(want, bare, shifted, strict=True):
        assert torch.allclose(a, b, atol=1e-5) and torch.allclose(a, c, atol=1e-5)


def test_a_row_without_anything_to_learn_changes_no_gradient():
    found = []
    for loss in (ar_loss, packed_ar_loss):
        _, model, (ids, labels, mask, grid, embeds, slots) = loss_case("all")
        labels = labels.clone()
        labels[0], slots = -100, slots.clone()
        slots[0] = False
        model.model.requires_grad_(True)
        loss(model, ids, labels, None, grid, embeds, slots).loss.backward()
        found.append([p.grad.clone() for p in model.model.layers.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_precomputed_positions_give_the_same_loss():
    _, model, args = loss_case("all")
    positions, _ = rope_index(args[0], args[3], args[2], config=model.config)
    again = ar_loss(model, *args, position_ids=positions)
    assert torch.equal(again.loss, ar_loss(model, *args).loss)


def test_targets_get_no_gradient_and_absent_terms_are_zero(micro):
    torch.manual_seed(0)
    model = NexusGenAR(MICRO)
    embeds = image_embeds(4).requires_grad_()
    ids = torch.tensor([[1, 2, START] + [IMAGE] * 4 + [END, 30]])
    grid, nothing = torch.tensor([[1, 4, 4]]), torch.full_like(ids, -100)
    only_image = packed_ar_loss(model, ids, nothing, None, grid, embeds, ids == IMAGE)
    assert only_image.ce == 0 and only_image.mse > 0
    only_image.loss.backward()
    assert embeds.grad is None and model.image_prefill_embeds.weight.grad[:3].abs().min() > 0
    nothing_learned = packed_ar_loss(model, ids, nothing, None, grid, embeds)
    assert nothing_learned.loss == 0
    nothing_learned.loss.backward()  # every process of several must get this far
    only_text = packed_ar_loss(model, ids[:, :3], ids[:, :3])
    assert only_text.mse == 0 and only_text.one_minus_cos == 0 and only_text.ce > 0


@pytest.mark.parametrize("loss", [ar_loss, packed_ar_loss])
def test_lm_head_runs_only_where_there_is_a_label(micro, loss):
    rows = []
    hook = micro.lm_head.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    ids, labels = torch.randint(9, (2, 9)), torch.full((2, 9), -100)
    labels[0, 5:8] = 7
    loss(micro, ids, labels)
    hook.remove()
    assert rows == [3]


def test_large_sizes_come_again(micro):
    """Each new number of rows costs compiled kernels: large ones are filled up to few."""
    seen = []
    linears = [m for m in micro.model.modules() if isinstance(m, torch.nn.Linear)]
    hooks = [
        m.register_forward_hook(lambda m, args, out: seen.append(out.numel() // out.shape[-1]))
        for m in (*linears, micro.lm_head)
    ]
    for length in (590, 597, 613):
        ids = torch.randint(9, (3, length))
        labels = ids.clone()
        labels[:, : length // 3] = -100
        filled = packed_ar_loss(micro, ids, labels).ce
        plain = ar_loss(micro, ids, labels).ce
        torch.testing.assert_close(filled, plain, atol=2e-6, rtol=0)
    for hook in hooks:
        hook.remove()
    plain = {3 * n for n in (590, 597, 613)} | {3 * (n - n // 3) for n in (590, 597, 613)}
    packed = [rows for rows in seen if rows not in plain]
    assert len(packed) == 3 * (len(linears) + 1) and all(rows % 64 == 0 for rows in packed)
    assert max(packed) <= 3 * 613 + 128


@pytest.mark.parametrize("replies", [20, 300])
def test_filling_up_changes_no_loss_and_no_gradient(replies):
    """Few replies: the filling row has no place in the top layer; many: it has."""
    torch.manual_seed(0)
    model, ids = NexusGenAR(MICRO), torch.randint(9, (3, 400))
    labels = ids.clone()
    labels[:, :-replies] = -100
    found = []
    for loss_fn in (packed_ar_loss, ar_loss):  # filled up; as it stands
        model.zero_grad()
        loss = loss_fn(model, ids, labels).ce
        loss.backward()
        grads = [p.grad.flatten() for p in model.model.parameters() if p.grad is not None]
        found.append((loss.detach(), torch.cat(grads)))
    torch.testing.assert_close(*found, atol=2e-6, rtol=0)


def test_wrong_loss_arguments_are_named(micro):
    ids = torch.tensor([[1, START, IMAGE, IMAGE, END]])
    grid, slots = torch.tensor([[1, 2, 4]]), ids == IMAGE
    with pytest.raises(RuntimeError, match="size of tensor"):
        ar_loss(micro, ids, ids[:, 1:], None, grid, image_embeds(2), slots)
    with pytest.raises(ValueError, match=r"image_embeds \(3, 32\) should be \(2, 32\)"):
        ar_loss(micro, ids, ids, None, grid, image_embeds(3), slots)
    with pytest.raises(ValueError, match=r"image_embeds \(0, 32\) should be \(2, 32\)"):
        ar_loss(micro, ids, ids, None, grid, None, slots)
    with pytest.raises(ValueError, match="no image tokens"):
        ar_loss(micro, ids, ids, None, grid, image_embeds(2), ~slots)


# --- image slots ------------------------------------------------------------------------------

SLOT_CASES = ["gen", "edit"]


def slot_case(case: str):
    """Fixture 05: tensors, model, prompt ids up to vision_start, embeds and grid of its images."""
    t, model = official("05")
    forced = t[f"in/{case}/forced_text_tokens"]
    ids = torch.cat((t[f"in/{case}/prompt_ids"], forced[None, :4]), dim=1)
    grid = t.get(f"in/{case}/image_grid_thw")
    embeds = None if grid is None else model.visual(t[f"in/{case}/pixel_values"], grid)
    return t, model, (ids, embeds, grid)


@pytest.mark.parametrize("case", SLOT_CASES)
@pytest.mark.parametrize("read", [prefill_image_slots, prefill_image_slots_loop])
def test_parity_slots(assert_parity, case, read):
    t, model, prompt = slot_case(case)
    got = read(model, *prompt)
    if prompt[1] is not None:
        want = t[f"out/{case}/onepass_ref_embeddings"]
        assert_parity("slots", f"05 {case} ref_embeddings", prompt[1], want)
    assert_parity("slots", f"05 {case} loop", got, t[f"out/{case}/output_image_embeddings"])
    assert_parity("slots", f"05 {case} one pass", got[0], t[f"out/{case}/onepass_image_embeddings"])


@pytest.mark.parametrize("case", SLOT_CASES)
def test_parity_slot_positions_follow_training(assert_parity, case):
    t, model, (_, _, grid) = slot_case(case)
    slot = torch.tensor([model.config.slot_grid])
    grids = slot if grid is None else torch.cat((grid, slot))
    got, _ = rope_index(t[f"out/{case}/sequences"], grids, config=model.config)
    assert_parity("rope_index", f"05 {case}", got, t[f"out/{case}/position_ids_training"], 0)


@pytest.mark.parametrize("case", SLOT_CASES)
def test_parity_generate_with_the_official_tokens(assert_parity, case):
    """Forced to the official text: the official image, and training's logits after it."""
    t, model, (ids, embeds, grid) = slot_case(case)
    forced, seen = iter(t[f"in/{case}/forced_text_tokens"].tolist()), []

    def sample(logits):
        seen.append(logits)
        return next(forced)

    prompt = ids[:, :-4], embeds, grid
    events = list(generate(model, *prompt, repetition_penalty=1.0, sample=sample))
    images = [value for kind, value in events if kind == "image"]
    assert len(images) == 1
    assert_parity(
        "slots", f"05 {case} generate", images[0], t[f"out/{case}/onepass_image_embeddings"]
    )
    tokens = [value for kind, value in events if kind == "token"]
    text = [i for i in t[f"out/{case}/sequences"][0].tolist() if i != model.config.image_token_id]
    assert tokens == text[-8:-1]  # with the forced vision_end, without im_end
    logits, allowed = torch.stack(seen), torch.ones(160, dtype=torch.bool)
    allowed[[model.config.vision_end_token_id, model.config.image_token_id]] = False
    assert (logits[:, ~allowed] == -torch.inf).all()
    before, after = t[f"out/{case}/step_logits_before_forcing"], "post_image_logits_training_pos"
    want = torch.cat((before[:4], t[f"out/{case}/{after}"][0]))
    assert_parity("slots", f"05 {case} step logits", logits[:, allowed], want[:, allowed])


@pytest.mark.parametrize("case", SLOT_CASES)
def test_parity_of_the_official_loop_positions_quirk(assert_parity, case):
    """The official loop counts 81 slots as 81 text tokens; at its positions we get its logits."""
    t, model, (_, embeds, _) = slot_case(case)
    ids, loop = t[f"out/{case}/sequences"][:, :-1], t[f"out/{case}/position_ids_loop"]
    training = t[f"out/{case}/position_ids_training"][..., :-1]
    assert torch.equal(loop[..., :-3], training[..., :-3])
    assert (loop[..., -3:] - training[..., -3:] == 72).all()
    slots = torch.zeros_like(ids, dtype=torch.bool)
    slots[:, -84:-3] = True
    logits = model.lm_head(model.model(model.embed(ids, embeds, slots), loop))
    start = ids.shape[1] - 85  # vision_start
    steps = [*range(start - 4, start + 1), *range(start + 81, start + 85)]
    want = t[f"out/{case}/step_logits_before_forcing"]
    free = [i for i in range(160) if i != model.config.vision_end_token_id]  # barred: -1e30 there
    assert_parity("slots", f"05 {case} loop logits", logits[0, steps][:, free], want[:, free])
    want = t[f"out/{case}/post_image_logits_loop"]
    assert_parity("slots", f"05 {case} loop post", logits[:, -3:], want)


def test_smaller_slot_grids_use_the_first_prefill_vectors():
    """36 slots (grid 1x12x12) work as officially; more than 81 are an error that says so."""
    _, model, prompt = slot_case("gen")
    one = prefill_image_slots(model, *prompt, slot_grid=(1, 12, 12))
    loop = prefill_image_slots_loop(model, *prompt, slot_grid=(1, 12, 12))
    assert one.shape == (1, 36, 64) and torch.allclose(one, loop, atol=1e-5)
    with pytest.raises(ValueError, match="100 slots; the model has 81"):
        prefill_image_slots(model, *prompt, slot_grid=(1, 20, 20))


def left_padded() -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Four prompts that end with vision_start: of unequal lengths, with one, two or no images."""
    prompts = [[3, 4, 5, START], [6, START, *[IMAGE] * 6, END, 7, 8, START], [9, START]]
    prompts.append([START, *[IMAGE] * 2, END, START, *[IMAGE] * 4, END, 1, 2, START])
    L = max(map(len, prompts))
    ids = torch.tensor([[34] * (L - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (L - len(p)) + [1] * len(p) for p in prompts])
    return prompts, ids, mask


@pytest.mark.parametrize("read", [prefill_image_slots, prefill_image_slots_loop])
def test_left_padded_batch_of_slots_equals_singles(micro, read):
    prompts, ids, mask = left_padded()
    grid, embeds = torch.tensor([[1, 6, 4], [1, 2, 4], [1, 4, 4]]), image_embeds(12)
    own = [(None, None), (embeds[:6], grid[:1]), (None, None), (embeds[6:], grid[1:])]
    got = read(micro, ids, embeds, grid, mask)
    for row, prompt, images in zip(got, prompts, own, strict=True):
        alone = prefill_image_slots(micro, torch.tensor([prompt]), *images)
        assert torch.allclose(row, alone[0], atol=1e-5)


def test_broken_weights_say_nothing(micro):
    broken = copy.deepcopy(micro)
    broken.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite: its weights are broken, or torch.fl"):
        list(generate(broken, torch.tensor([[1, 2]]), max_new_tokens=2))


def test_slots_in_training_equal_slots_at_inference(micro):
    ids = torch.tensor([[1, 2, START, *[IMAGE] * 4, END, 5]])
    slots, grid = ids == IMAGE, torch.tensor([MICRO.slot_grid])
    out = micro(ids, None, grid, None, slots)
    inference = prefill_image_slots(micro, ids[:, :3])
    assert torch.allclose(out.image_embeddings[:, 2:6], inference, atol=1e-5)


def test_prompts_must_end_with_vision_start(micro):
    with pytest.raises(ValueError, match="pad prompts on the left"):
        prefill_image_slots(micro, torch.tensor([[1, START, 34], [1, 2, START]]))


# --- generate ---------------------------------------------------------------------------------


def test_greedy_generate_equals_uncached_argmax(micro):
    """Each token is the argmax of an uncached pass over everything before it."""
    ids, grid = torch.tensor([[START, *[IMAGE] * 4, END, 2]]), torch.tensor([[1, 4, 4]])
    embeds = image_embeds(4)
    barred = [START, END, IMAGE, 30, 34]

    def sample(logits):
        return torch.argmax(logits.index_fill(0, torch.tensor(barred), -torch.inf))

    events = generate(micro, ids, embeds, grid, 12, 1.0, sample)
    count = 0
    for _, token in events:
        logits = micro(ids, embeds, grid).logits[0, -1]
        assert token == sample(logits)
        ids, count = torch.cat((ids, torch.tensor([[token]])), 1), count + 1
    assert count == 12


def test_several_images_in_a_reply_equal_training_passes(micro):
    """Text, image, text, image, text: all numbers are those of one training-style pass."""
    script, seen = [5, START, 6, 7, START, 8, 30], []
    forced = iter(script)

    def sample(logits):
        seen.append(logits)
        return next(forced)

    events = list(generate(micro, torch.tensor([[1, 2]]), repetition_penalty=1.0, sample=sample))
    image = [IMAGE] * 4 + [END]
    ids = torch.tensor([[1, 2, 5, START, *image, 6, 7, START, *image, 8, 30]])
    assert [kind for kind, _ in events].count("image") == 2
    assert [v for k, v in events if k == "token"] == [i for i in ids[0, 2:-1] if i != IMAGE]
    slots = ids == IMAGE
    out = micro(ids, None, torch.tensor([MICRO.slot_grid] * 2), None, slots)
    got = torch.cat([v for k, v in events if k == "image"])
    assert torch.allclose(got, out.image_embeddings[:, :-1][slots[:, 1:]], atol=1e-5)
    at = [1, 2, 8, 9, 10, 16, 17]
    allowed = [i for i in range(40) if i not in (END, IMAGE)]
    want = out.logits[0, at][:, allowed]
    assert torch.allclose(torch.stack(seen)[:, allowed], want, atol=1e-5)


def test_prompt_that_ends_with_vision_start_gives_the_image_first(micro):
    prompt = torch.tensor([[3, START, *[IMAGE] * 4, END, 4, START]])
    args = image_embeds(4), torch.tensor([[1, 4, 4]])
    events = generate(micro, prompt, *args, max_new_tokens=1)
    (kind, image), end = list(events)
    assert kind == "image" and end == ("token", END)
    assert torch.allclose(image, prefill_image_slots(micro, prompt, *args)[0], atol=1e-5)


def test_generate_stops(micro):
    prompt = torch.tensor([[1, 2]])
    for stop in (30, 34):  # im_end, endoftext
        assert list(generate(micro, prompt, sample=lambda _, stop=stop: stop)) == []
    assert len(list(generate(micro, prompt, max_new_tokens=3, sample=lambda _: 5))) == 3
    assert list(generate(micro, prompt, max_new_tokens=0)) == []


def test_repetition_penalty_sees_prompt_and_reply(micro):
    logits = torch.tensor([2.0, -2.0, 1.0, -1.0])
    got = penalize(logits, torch.tensor([0, 1, 1]), 2.0)
    assert got.tolist() == [1.0, -4.0, 1.0, -1.0]
    plain, penal = [], []
    for penalty, seen in ((1.0, plain), (1e6, penal)):
        script = iter([7, 9, 30])
        events = generate(
            micro,
            torch.tensor([[1, 2]]),
            repetition_penalty=penalty,
            sample=lambda x, s=seen, it=script: (s.append(x), next(it))[1],
        )
        list(events)
    for step, touched in enumerate([{1, 2}, {1, 2, 7}, {1, 2, 7, 9}]):
        moved = set((plain[step] != penal[step]).nonzero().flatten().tolist())
        assert moved == touched


def test_generate_takes_one_prompt(micro):
    with pytest.raises(ValueError, match="one prompt, not 2"):
        next(generate(micro, torch.ones(2, 3, dtype=torch.long)))


def test_tiny_model_walks_the_whole_path():
    torch.manual_seed(0)
    config = NexusGenConfig.tiny().ar
    model = NexusGenAR(config).requires_grad_(False)
    ids = torch.tensor([[1, 2, config.vision_start_token_id]])
    one, loop = prefill_image_slots(model, ids), prefill_image_slots_loop(model, ids)
    assert one.shape == (1, 16, 128) and torch.allclose(one, loop, atol=1e-4)
