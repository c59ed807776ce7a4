"""What the toy stages learn from: grounding targets, and the AR loss in parts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_model import make_tiny

from nexus_min.config import NexusGenConfig
from nexus_min.model.autoregressive import NexusGenAR
from nexus_min.model.rope import mrope_cos_sin
from nexus_min.toy import init as initialization
from nexus_min.toy import stages
from nexus_min.toy.pictures import resize, scenes, to_unit
from nexus_min.toy.pretrain import (
    CLASSES,
    GroundingHead,
    add_noise,
    grounding_loss,
    grounding_targets,
    random_phrases,
)
from nexus_min.toy.tasks import sample_example
from nexus_min.toy.world import COLORS, RADIUS, SHAPES, Object, Scene, render
from nexus_min.train import finetune
from nexus_min.train.stage import Run, mixed_precision

RED_STAR, RED_CIRCLE = Object("star", "red", "small", 2), Object("circle", "red", "large", 7, 1.5)
ANY = CLASSES


def ids(shape=None, color=None, size=None) -> list[int]:
    names = SHAPES, list(COLORS), list(RADIUS)
    said = (shape, color, size)
    return [n.index(s) if s else k for n, s, k in zip(names, said, ANY, strict=True)]


def test_grounding_targets_name_what_stands_in_each_cell_and_what_phrases_mean():
    scene = Scene((RED_STAR, RED_CIRCLE), "gray", "outline")
    said = [ids("star"), ids(None, "red"), ids("circle", "red", "large"), ids("cross")]
    want = grounding_targets([scene], torch.tensor([said]))
    assert want["shape"][0].tolist() == [0, 0, 4, 0, 0, 0, 0, 1, 0]
    assert want["color"][0].tolist() == [-100, -100, 0, -100, -100, -100, -100, 0, -100]
    assert want["jitter"][0, 7].tolist() == [1.0, 0.0]
    assert want["meant_matches"][0].tolist() == [1, 2, 1, 0]
    assert want["meant_cell"][0].tolist() == [2, -100, 7, -100]
    assert want["meant_size"][0].tolist() == [0, -100, 1, -100]


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [112, 32, 64])
def test_pictures_are_resized_as_pil_does_it(mode, size):
    """In fp32 also where products are bf16. PIL rounds, and clips what overshoots, twice."""
    seen = [render(s) for s in scenes(np.random.default_rng(0), 8, detail=1.0)]
    how = Image.Resampling[mode.upper()]
    want = to_unit([np.asarray(Image.fromarray(x).resize((size, size), how)) for x in seen])
    with mixed_precision(True):
        got = resize(to_unit(seen), size, mode)
    assert ((got - want).abs() < 1.01 / 255).float().mean() > 0.999
    same = {"size": (size, size), "mode": mode, "antialias": True}
    torch.testing.assert_close(got, F.interpolate(to_unit(seen), **same).clamp(0, 1))


def test_phrases_mostly_fit_and_sometimes_do_not():
    found = scenes(np.random.default_rng(0), 40, most=9)
    assert max(len(s.objects) for s in found) > 6
    full = scenes(np.random.default_rng(0), 3, most=9, least=9)
    assert [len(s.objects) for s in full] == [9, 9, 9]
    want = grounding_targets(found, random_phrases(np.random.default_rng(1), found, 8))
    none = (want["meant_matches"] == 0).float().mean()
    assert 0.02 < none < 0.4


def test_a_perfect_reader_has_little_loss_and_a_wrong_one_much():
    found = scenes(np.random.default_rng(0), 4)
    phrases = random_phrases(np.random.default_rng(1), found, 3)
    want = grounding_targets(found, phrases) | {"pixels": torch.zeros(4, 16, 192)}
    said = GroundingHead(8)(torch.randn(4, 16, 8), phrases)
    assert said.keys() == want.keys()
    right = dict(said)
    for name, x in said.items():
        if want[name].is_floating_point():
            right[name] = want[name].clone()
        else:
            right[name] = 30 * torch.nn.functional.one_hot(want[name].clamp_min(0), x.shape[-1])
    small, accuracy = grounding_loss({k: v.float() for k, v in right.items()}, want)
    assert small < 1e-3 and accuracy["meant_cell_acc"] == 1
    assert grounding_loss(said, want)[0] > 5


def test_noise_is_added_to_standard_embeddings():
    tokens = 3 + 5 * torch.randn(64, 16, 8)
    assert add_noise(tokens, 0.0).std().item() == pytest.approx(1, abs=0.01)
    assert add_noise(tokens, 1.0).std().item() > 1.1


def test_loss_of_a_batch_is_the_mean_over_its_tasks():
    model = make_tiny()
    rng = np.random.default_rng(0)
    batch = [sample_example(rng, task) for task in ("understand", "generate", "edit", "generate")]
    whole = stages.ar_batch_loss(model.ar, model.tokenizer, model.config, batch)
    alone = [stages.ar_batch_loss(model.ar, model.tokenizer, model.config, [x]) for x in batch]
    assert alone[0].mse == 0 and all(x.ce > 0 for x in alone)
    drawn = torch.stack([x.mse for x in alone[1:]]).mean()  # of as many slots each
    torch.testing.assert_close(whole.mse, drawn, atol=1e-5, rtol=1e-5)


def test_earlier_images_of_a_conversation_are_predicted_or_read(monkeypatch):
    """Half of the time each; the last reply's image is always predicted."""
    model, slots = make_tiny(), []
    spy = lambda *args: slots.append(args[-1].sum(1).tolist())  # noqa: E731
    monkeypatch.setattr(finetune, "packed_ar_loss", spy)
    rng, n = np.random.default_rng(0), model.config.ar.num_image_slots
    kinds = ["generate", *["multi_turn"] * 20]
    lines = [stages.toy_line(sample_example(rng, kind)) for kind in kinds]
    counts = [[m["content"].count("<image>") for m in x["messages"][1::2]] for x in lines]
    assert {len(c) for c in counts} >= {1, 3} and any(c[-1] and c[0] for c in counts[1:])
    for value in (0.8, 0.2):
        coin = SimpleNamespace(random=lambda value=value: value)
        finetune.lines_loss(model.ar, model.tokenizer, model.config, lines, coin)
    assert slots[0] == [n * sum(c) for c in counts]
    assert slots[1] == [n * c[-1] for c in counts]


def test_images_embedded_once_give_the_loss_of_the_images(tmp_path):
    """And what is drawn follows from seed and progress: not from what was drawn before."""
    model, run = make_tiny(), Run(tmp_path, seed=2, steps=400)
    inputs = model.ar, model.tokenizer, model.config
    stage, rng = stages.ar_stage(*inputs, 12, run), np.random.default_rng(1)
    for progress in (0.2, 0.6):  # the stage has a window of examples, which moves
        loss, _ = stage.loss(np.random.default_rng(1), progress)
    fresh = stages.Curriculum(model.ar, model.config, run)
    examples, _ = fresh.draw(rng, 12, 0.6)
    assert {ex.task for ex in examples} == {"understand", "generate", "edit", "multi_turn"}
    lines = [stages.toy_line(ex) for ex in examples]
    torch.testing.assert_close(loss, finetune.lines_loss(*inputs, lines, rng).loss)
    others = fresh.draw(np.random.default_rng(1), 12, 0.6)[0]
    assert others == examples != fresh.draw(np.random.default_rng(2), 12, 0.6)[0]


def test_generation_learns_embeddings_also_at_the_places_of_editing():
    model, share = make_tiny(), stages.GENERATION.place_share
    n, side = model.config.ar.num_image_slots, model.config.image_size // 8
    rows = {"embeds": torch.ones(1, n, model.config.ar.text.hidden_size)}
    rows |= {"refs": rows["embeds"].repeat(1, 4, 1), "latents": torch.ones(1, 16, side, side)}
    inputs = stages.empty_prompt(model.config), model.config, rows
    want = finetune.decoder_context(model.editing, *inputs).txt_ids[:, :n]
    placed = finetune.decoder_context(model.generation, *inputs, is_placed=True).txt_ids
    assert placed.equal(want) and want.any() and 0 < share < 1
    for options in ({}, {"is_empty": True, "is_placed": True}):
        assert not finetune.decoder_context(model.generation, *inputs, **options).txt_ids.any()


def test_a_fresh_model_hands_on_what_it_looks_at_and_says_what_is_there():
    config = NexusGenConfig.tiny().ar
    torch.manual_seed(0)
    ar = initialization.init_ar(NexusGenAR(config)).requires_grad_(False)
    initialization.init_value_copy(ar)
    words = ar.model.embed_tokens.weight
    said = ar.lm_head(F.rms_norm(words, words.shape[1:])).argmax(-1)
    assert torch.equal(said, torch.arange(config.text.vocab_size))
    one = torch.ones(1, 1, 1, config.text.head_dim)
    for layer in ar.model.layers:
        x = torch.randn(64, 1, config.text.hidden_size)  # a single token can only look at itself
        handed_on = layer.self_attn(x, one, 0 * one)
        alike = torch.cosine_similarity(handed_on, x, dim=-1).mean().item()
        assert alike > 0.65  # 64 of 128: 0.7; a single token: 0.58 to 0.83
        assert handed_on.norm() < 0.5 * x.norm()


@pytest.mark.parametrize("layer, distances", list(enumerate(initialization.HEAD_OFFSETS)))
def test_heads_begin_by_looking_a_few_tokens_back(layer, distances):
    config = NexusGenConfig.tiny().ar
    torch.manual_seed(0)
    ar = NexusGenAR(config).requires_grad_(False)
    initialization.init_previous_token_heads(ar)
    D = config.text.head_dim
    seen = {}

    def look(q, k, v):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        past = torch.ones(q.shape[2], q.shape[2]).tril().bool()
        seen["share"] = (q @ k.mT / D**0.5).masked_fill(~past, -torch.inf).softmax(-1)
        return q

    x = F.rms_norm(torch.randn(1, 24, config.text.hidden_size), (config.text.hidden_size,))
    places = torch.arange(24).expand(3, 1, -1)
    cos, sin = mrope_cos_sin(places, D, config.text.rope_theta, config.text.mrope_section)
    ar.model.layers[layer].self_attn(x, cos[:, None], sin[:, None], look)
    for head, back in enumerate(distances):
        share = [seen["share"][0, head].diagonal(-n).mean() for n in range(9)]
        assert share[back] == max(share)
        assert sum(share[back - 1 : back + 2]) > 0.9  # the rest is on the neighbours


def test_scenes_of_the_base_stages_are_never_held_out():
    from nexus_min.toy.world import held_out

    assert not any(held_out(s.key) for s in scenes(np.random.default_rng(3), 300, most=9))
