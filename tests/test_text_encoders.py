"""CLIP-L and T5 against the official models and tokenizers (fixture 13)."""

from __future__ import annotations

import json
import lzma

import pytest
import torch
from conftest import GOLDEN, golden, weights
from properties import TEXTS, spelled, widened

from nexus_min.config import CLIPConfig, T5Config
from nexus_min.model.text_encoders import (
    CLIPTextModel,
    T5Encoder,
    clip_tokenizer,
    relative_buckets,
    t5_tokenizer,
)
from nexus_min.parts import tokenizer_of

MANIFESTS = GOLDEN.parent / "manifests"
PROMPTS = json.loads((GOLDEN / "13_official_token_ids.json").read_text())


def clip_and_state() -> tuple[CLIPTextModel, dict, dict]:
    """CLIP at the fixture's micro size with its weights, the weights, and the fixture."""
    tensors, meta = golden("13_text")
    c = meta["config"]["clip"]
    config = CLIPConfig(c["vocab"], c["dim"], c["inter"], c["layers"], c["heads"], c["npos"])
    clip, state = CLIPTextModel(config), weights(tensors, "clip/")
    clip.load_state_dict(state)
    return clip, state, tensors


def t5_and_state() -> tuple[T5Encoder, dict, dict]:
    """T5 at the fixture's micro size with its weights, the weights, and the fixture."""
    tensors, meta = golden("13_text")
    t5, state = T5Encoder(T5Config.from_dict(meta["config"]["t5"])), weights(tensors, "t5/")
    t5.load_state_dict(state)
    return t5, state, tensors


@pytest.mark.parametrize("prompt", ["empty", "short"])
@torch.inference_mode()
def test_parity_clip(assert_parity, prompt):
    clip, _, tensors = clip_and_state()
    ids = tensors[f"in/clip_ids_{prompt}"]
    assert_parity("CLIP", f"13 pooled {prompt}", clip(ids), tensors[f"out/clip_pooled_{prompt}"])
    penultimate = tensors[f"out/clip_hidden_penultimate_{prompt}"]
    assert_parity("CLIP", f"13 penultimate {prompt}", clip.hidden_states(ids)[-2], penultimate)


@torch.inference_mode()
def test_parity_clip_eps_probe(assert_parity):
    clip, state, tensors = clip_and_state()
    clip.load_state_dict({k: v * 1e-3 if "embeddings." in k else v for k, v in state.items()})
    got = clip(tensors["in/clip_ids_short"])
    assert_parity("CLIP", "13 eps probe", got, tensors["out/eps_probe_clip_pooled_short"])


@pytest.mark.parametrize("prompt", ["empty", "short"])
@torch.inference_mode()
def test_parity_t5(assert_parity, prompt):
    t5, _, tensors = t5_and_state()
    got = t5(tensors[f"in/t5_ids_{prompt}"])
    assert_parity("T5", f"13 {prompt}", got, tensors[f"out/t5_{prompt}"], 1e-4)


@torch.inference_mode()
def test_parity_t5_eps_probe(assert_parity):
    t5, state, tensors = t5_and_state()
    t5.load_state_dict(state | {"shared.weight": state["shared.weight"] * 1e-3})
    got = t5(tensors["in/t5_ids_short"])
    assert_parity("T5", "13 eps probe", got, tensors["out/eps_probe_t5_short"], 1e-4)


@pytest.mark.parametrize(
    ("build", "manifest"),
    [
        (lambda: CLIPTextModel(CLIPConfig()), "clip_text_encoder"),
        (lambda: T5Encoder(T5Config()), "t5_text_encoder_2"),
    ],
)
def test_names_full_size(build, manifest):
    official = json.loads((MANIFESTS / f"{manifest}.json").read_text())["tensors"]
    with torch.device("meta"):
        model = build()
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == official


@pytest.fixture(scope="module")
def tokenizer_folders(tmp_path_factory) -> dict:
    """The official tokenizer files, unpacked as FLUX.1-dev lays them out."""
    root = tmp_path_factory.mktemp("tokenizers")
    for packed in sorted((GOLDEN / "tokenizers").glob("*_*.xz")):
        folder, name = packed.stem.split("_", 1)
        (root / folder).mkdir(exist_ok=True)
        (root / folder / name).write_bytes(lzma.decompress(packed.read_bytes()))
    return {"clip": root / "clip", "t5": root / "t5"}


@pytest.fixture(scope="module")
def t5_official(tokenizer_folders):
    return t5_tokenizer(tokenizer_folders["t5"])


def test_parity_token_ids(tokenizer_folders):
    clip, t5 = clip_tokenizer(tokenizer_folders["clip"]), t5_tokenizer(tokenizer_folders["t5"])
    for text, want in PROMPTS.items():
        for name, tokenizer in (("clip", clip), ("t5", t5)):
            head, length = want[f"{name}_ids_before_padding"], want[f"{name}_len"]
            padding = [want[f"{name}_pad_id"]] * (length - len(head))
            assert tokenizer(text).tolist() == [head + padding], (name, text)
    tensors, _ = golden("13_text")
    assert torch.equal(clip(""), tensors["in/official_clip_ids_empty"])
    assert torch.equal(t5(""), tensors["in/official_t5_ids_empty"])


def test_long_prompts_keep_their_end(tokenizer_folders):
    text = "a red cat " * 200
    clip = clip_tokenizer(tokenizer_folders["clip"])(text)
    t5 = t5_tokenizer(tokenizer_folders["t5"])(text)
    assert clip.shape == (1, 77) and clip[0, -1] == 49407 and (clip == 49407).sum() == 1
    assert t5.shape == (1, 512) and t5[0, -1] == 1 and (t5 == 0).sum() == 0


def test_prompt_cannot_end_itself(tokenizer_folders):
    ids = clip_tokenizer(tokenizer_folders["clip"])("a <|endoftext|> cat\n\tON  a MAT")
    assert (ids == 49406).sum() == 1
    assert ids[0].tolist().index(49407) > 8  # the end stands after the whole prompt


T5_ATTACKS = ["a </s> b", "<pad>", "</s></s>", "<extra_id_0> x", "<extra_id_99>", "<unk>", "</S>"]


@widened("text", [*TEXTS, *T5_ATTACKS], spelled(["</s>", "<pad>", "<extra_id_7>", " "]), 40)
def test_no_prompt_of_t5_is_special(t5_official, text):
    ids = t5_official(text)[0].tolist()
    end = ids.index(1)
    assert not {0, *range(32000, 32100)} & set(ids[:end])  # no pad, no sentinel before the end
    assert set(ids[end:]) <= {1, 0} and ids.count(1) == 1


def test_a_broken_tokenizer_file_is_named(tmp_path):
    for content in ("{", "{}", '{"model": 3, "added_tokens": []}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=f"{tmp_path}: cannot be read as a tokenizer"):
            tokenizer_of(tmp_path, t5_tokenizer)


def test_missing_tokenizer_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="vocab.json is missing"):
        clip_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="tokenizer.json is missing"):
        t5_tokenizer(tmp_path)


def test_relative_buckets():
    buckets = relative_buckets(300, 32, 128)
    assert buckets[200, 200] == 0
    assert buckets[200, 193:200].flip(0).tolist() == [1, 2, 3, 4, 5, 6, 7]  # keys before the query
    assert buckets[0, 1:8].tolist() == [17, 18, 19, 20, 21, 22, 23]  # keys after it
    assert buckets[0, [8, 16, 32, 64, 127, 128, 299]].tolist() == [24, 26, 28, 30, 31, 31, 31]
    assert (buckets[0].diff() >= 0).all()


@torch.inference_mode()
def test_clip_is_causal_and_pools_at_the_first_end():
    clip, _, tensors = clip_and_state()
    ids = tensors["in/clip_ids_short"]
    end = int(ids.argmax())
    assert (ids == ids.max()).sum() > 1  # the padding is the same id
    changed = ids.clone()
    changed[0, end + 1 :] = 1
    torch.testing.assert_close(clip(changed), clip(ids), atol=1e-6, rtol=0)
    changed[0, end - 1] += 1
    assert (clip(changed) - clip(ids)).abs().max() > 1e-3


@torch.inference_mode()
def test_batch_equals_loop():
    for model, name in ((clip_and_state()[0], "clip"), (t5_and_state()[0], "t5")):
        tensors, _ = golden("13_text")
        ids = torch.cat([tensors[f"in/{name}_ids_{p}"] for p in ("empty", "short")])
        loop = torch.cat([model(row[None]) for row in ids])
        torch.testing.assert_close(model(ids), loop, atol=1e-5, rtol=0)


def test_bad_ids_are_named():
    clip, t5 = clip_and_state()[0], t5_and_state()[0]
    with pytest.raises(ValueError, match=r"CLIP.*1 to 77.*\(1, 78\)"):
        clip(torch.zeros(1, 78, dtype=torch.long))
    with pytest.raises(ValueError, match=r"T5.*\(5,\)"):
        t5(torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"T5.*\(1, 0\)"):
        t5(torch.zeros(1, 0, dtype=torch.long))
