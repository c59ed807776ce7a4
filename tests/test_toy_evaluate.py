"""`nexus_min eval` and the toy tokenizer: intervals, scores of stubs, whole words."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import make_tiny

from nexus_min.config import NexusGenConfig
from nexus_min.tokenizer import QwenTokenizer
from nexus_min.toy import evaluate as ev
from nexus_min.toy import language
from nexus_min.toy.edits import EDITS
from nexus_min.toy.init import COSINE, align_translations
from nexus_min.toy.pictures import MARGIN, save_grid
from nexus_min.toy.prompts import CATEGORIES
from nexus_min.toy.questions import QUESTIONS
from nexus_min.toy.tasks import KINDS, sample_example
from nexus_min.toy.vocabulary import SPECIAL, build_tokenizer, translations, words
from nexus_min.toy.world import Scene, held_out, render

# ---- scores ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right,n,low,high",  # by the published formula, to four places
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (95, 100, 0.8882, 0.9785),
        (194, 200, 0.9361, 0.9862),
    ],
)
def test_wilson_interval_against_known_values(right, n, low, high):
    assert ev.Score("x", right, n).interval == pytest.approx((low, high), abs=1e-4)


def test_a_score_counts_and_prints():
    empty = ev.Score("x")
    assert empty.rate == 0 and 0 <= empty.interval[0] < empty.interval[1] <= 1
    score = ev.Score.of("x", [True, False, np.True_, True], ratio=0.5)
    assert (score.right, score.n, score.rate) == (3, 4, 0.75)
    assert "0.750" in score.line() and "n=4" in score.line() and "ratio 0.5" in score.line()
    assert json.loads(json.dumps(score.as_dict())) == {
        "name": "x",
        "rate": 0.75,
        "interval": list(score.interval),
        "n": 4,
        "ratio": 0.5,
    }


def test_totals_add_up_and_name_the_worst_kind():
    right = {"a": 9, "b": 5}
    rows = ev.by_kind("g", ("a", "b"), lambda kind, name: [ev.Score(name, right[kind], 10)])
    assert [(t.name, t.right, t.n) for t in rows] == [
        ("g / a", 9, 10),
        ("g / b", 5, 10),
        ("g: all", 14, 20),
        ("g: worst (b)", 5, 10),
    ]


# ---- cases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*CATEGORIES, "caption"])
def test_cases_are_unseen_distinct_and_the_same_every_time(kind):
    found = ev.sample_examples("generate", kind, False, 60, 0)
    assert len({ex.text for ex in found}) == len(found) == 60
    assert all(ex.unseen for ex in found)
    assert found == ev.sample_examples("generate", kind, False, 60, 0)
    assert found != ev.sample_examples("generate", kind, False, 60, 1)
    assert not any(
        ex.unseen for ex in ev.sample_examples("generate", kind, True, 20, 0, unseen=False)
    )


def test_two_hundred_cases_exist_in_every_category_and_language():
    for kind in ("single", "two"):  # those with the fewest prompts
        for zh in (False, True):
            assert len(ev.sample_examples("generate", kind, zh, 200, 0)) == 200


def test_images_are_sampled_in_batches_each_with_its_own_seed(monkeypatch):
    monkeypatch.setattr(ev, "BATCH", 2)
    model = make_tiny()
    embeds = torch.randn(5, 16, model.config.ar.text.hidden_size)
    sources = [Image.new("RGB", (64, 64), (40 * i, 0, 0)) for i in range(5)]
    for decoder in ("generation", "editing"):
        images = ev.sample_images(model, decoder, embeds, sources, 7)
        parts = [slice(0, 2), slice(2, 4), slice(4, 5)]
        same = [
            ev.sample_images(model, decoder, embeds[part], sources[part], 7 + i)
            for i, part in enumerate(parts)
        ]
        assert images.shape == (5, 64, 64, 3) and np.array_equal(images, np.concatenate(same))


# ---- score functions with models that are always right, or always wrong ------------------------


def truth(scene: Scene) -> Scene:
    return scene


def other_background(scene: Scene) -> Scene:
    return replace(scene, background="black" if scene.background != "black" else "gray")


def one_missing(scene: Scene) -> Scene:
    return replace(scene, objects=scene.objects[1:])


@pytest.fixture
def artist(monkeypatch):
    """A model whose embeddings are the examples, and whose decoders draw a `view` of them."""

    def install(view, generation_view=None):
        views = {"editing": view, "generation": generation_view or view}

        def sample_images(model, decoder, embeds, sources, seed):
            assert decoder == "generation" or len(sources) == len(embeds)
            return np.stack([render(views[decoder](ex.scenes[-1])) for ex in embeds])

        monkeypatch.setattr(ev, "predict", lambda model, cases: ([e.answer for e in cases], cases))
        monkeypatch.setattr(ev, "sample_images", sample_images)

    return install


@pytest.mark.parametrize("kind", CATEGORIES)
def test_generation_scores(artist, kind, tmp_path):
    artist(truth)
    (score,) = ev.score_generation(None, kind, False, 12, 0, name="a / b c", save=tmp_path)
    assert (score.name, score.right, score.n) == ("a / b c", 12, 12)
    strip = Image.open(tmp_path / "a_b_c.png")
    assert strip.size == (MARGIN + 10 * 64 * 2, 64 * 2)
    artist(one_missing)
    assert next(ev.score_generation(None, kind, True, 12, 0)).right == 0


def test_a_grid_has_ten_images_of_each_row_beside_its_name(tmp_path):
    rows = {name: np.full((12, 8, 8, 3), i, np.uint8) for i, name in enumerate("abc")}
    save_grid(tmp_path / "grids" / "x.png", **rows)
    grid = np.asarray(Image.open(tmp_path / "grids" / "x.png"))
    assert grid.shape == (3 * 16, MARGIN + 10 * 16, 3)
    assert (grid[:, MARGIN:] == np.repeat(np.arange(3), 16)[:, None, None]).all()
    margins = grid[:, :MARGIN].reshape(3, -1)
    assert all((m < 128).any() and (m == 255).mean() > 0.9 for m in margins)  # words on white
    assert not np.array_equal(margins[0], margins[1])


def test_captions_are_scored_exactly_and_by_number_of_objects(artist):
    artist(truth)
    total, *parts = ev.score_generation(None, "caption", False, 30, 0, name="c")
    assert total.right == total.n == 30 == sum(t.n for t in parts)
    assert [t.name for t in parts] == [f"c, {n} objects" for n in (1, 2, 3, 4)]
    artist(other_background)
    assert all(t.right == 0 for t in ev.score_generation(None, "caption", False, 30, 0))


@pytest.mark.parametrize("kind", EDITS)
def test_edit_scores(artist, kind):
    artist(truth, other_background)
    (score,) = ev.score_edits(None, kind, False, 12, 0)
    assert (score.right, score.n) == (12, 12)
    if kind in ("background", "style"):
        assert score.notes == {}  # nothing to tell of one object, no outside
    else:
        assert score.notes.get("told") == (None if kind == "add" else 1)
        assert score.notes["l1_outside_editing"] == 0 < score.notes["l1_outside_generation"]
        artist(truth, lambda scene: replace(scene, texture=None))
        notes = next(ev.score_edits(None, kind, False, 12, 0)).notes
        assert 0 < notes["l1_outside_generation"] == notes["l1_outside_no_texture"] < 0.1
    artist(other_background)
    assert next(ev.score_edits(None, kind, False, 12, 0)).right == 0


def test_an_edit_left_undone_is_wrong(artist, monkeypatch):
    silent = lambda model, batch: ([""] * len(batch), batch)  # noqa: E731
    monkeypatch.setattr(ev, "predict", silent)
    undone = lambda model, decoder, embeds, *_: np.stack(  # noqa: E731
        [render(ex.scenes[0]) for ex in embeds]
    )
    monkeypatch.setattr(ev, "sample_images", undone)
    for kind in EDITS:
        (score,) = ev.score_edits(None, kind, False, 8, 0)
        assert score.right == 0
        assert score.notes.get("l1_outside_editing", 0) == 0
        assert score.notes.get("told") == (None if kind in ("add", "background", "style") else 0)


class Answers:
    """Knows every answer by heart; `pad` stands around it, `thought` before it."""

    def __init__(self, cases: list, pad: str = " ", thought: str = "", wrong: bool = False):
        self.known = {(ex.text, render(ex.scenes[0]).tobytes()): ex.answer for ex in cases}
        self.pad, self.thought, self.wrong = pad, thought, wrong

    def understand(self, image, question: str, max_new_tokens: int) -> str:
        answer = self.known[question, np.asarray(image).tobytes()]
        return self.pad + self.thought + ("not " + answer if self.wrong else answer) + self.pad


@pytest.mark.parametrize("kind", [*QUESTIONS, "describe"])
def test_question_scores(kind):
    cases = ev.sample_examples("understand", kind, False, 12, 0)
    score_kind = partial(ev.score_questions, kind=kind, zh=False, n=12, seed=0)
    (score,) = score_kind(Answers(cases))
    assert score.right == score.n == len(cases) > 1
    assert next(score_kind(Answers(cases, wrong=True))).right == 0
    assert next(score_kind(Answers(cases, pad=" a red star: "))).right == 0  # the last word counts
    assert next(score_kind(Answers(cases, thought="a star in the center: "))).right == score.n


def test_reconstruction_is_of_held_out_scenes(monkeypatch):
    shown = []

    def embed(views):
        assert {v.size for v in views} == {(112, 112)}
        return (torch.zeros(len(views) * 16, 8),)

    def sample_images(model, decoder, embeds, sources, seed):
        assert decoder == "generation" and embeds.shape[1:] == (16, 8)
        part = scenes[len(shown) : len(shown) + len(embeds)]
        shown.extend(part)
        return np.stack([render(s) for s in part])

    scenes = [ex.scenes[0] for ex in ev.sample_examples("generate", "caption", False, 60, 4)]
    assert all(held_out(s.key) for s in scenes)
    monkeypatch.setattr(ev, "sample_images", sample_images)
    model = SimpleNamespace(config=NexusGenConfig.tiny(), embed_images=embed)
    (score,) = ev.score_reconstruction(model, 60, 4)
    assert score.right == score.n == len(shown) == 60


def test_evaluate_yields_every_row_once_and_in_order(artist, monkeypatch):
    artist(truth, other_background)
    right = lambda model, kind, zh, n, seed, name="": [ev.Score(name, n, n)]  # noqa: E731
    monkeypatch.setattr(ev, "score_questions", right)
    monkeypatch.setattr(ev, "score_reconstruction", lambda *a, **k: [ev.Score("reconstruction")])
    rows = list(ev.evaluate(None, cases=3))
    names = [t.name for t in rows]
    assert len(set(names)) == len(names)
    for lang in ("en", "zh"):
        assert names.count(f"geneval-toy {lang}: all") == 1
        assert {f"geneval-toy {lang} / {k}" for k in CATEGORIES} < set(names)
        assert {f"questions {lang} / {k}" for k in QUESTIONS} < set(names)
        assert {f"edits {lang} / {k}" for k in EDITS} < set(names)
        assert {f"long captions {lang}", f"describe {lang}"} < set(names)
    assert {f"in training / {k}" for k in CATEGORIES} < set(names)
    assert "geneval-toy en, in training: all" in names and "reconstruction" in names
    last = rows[-1]
    assert last.name == "L1 outside, editing / generation" and last.notes["ratio"] == 0
    few = ev.evaluate(None, cases=2, groups=("captions",))
    assert {t.name.split(",")[0] for t in few} == {"long captions en", "long captions zh"}


@pytest.mark.parametrize("groups,cases,message", [("edits,all", 1, "all"), ("edits", 0, "--cases")])
def test_bad_options_are_errors_before_a_model_is_loaded(groups, cases, message):
    args = SimpleNamespace(
        groups=groups, languages="en", cases=cases, samples=1, model="no such folder", seed=0
    )
    with pytest.raises(ValueError, match=message):
        ev.main(args, None)


# ---- the vocabulary ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def toy(tokenizer):
    return QwenTokenizer(tokenizer)


def test_every_word_is_one_token(toy):
    every = words()
    assert len(every) > 100
    assert [w for w in every if len(toy.encode(w)) != 1] == []


@pytest.mark.parametrize("words", ["any", "as typed"])
@pytest.mark.parametrize("zh", [False, True])
@pytest.mark.parametrize("task", KINDS)
def test_words_stay_whole_in_new_company(toy, monkeypatch, task, zh, words):
    monkeypatch.setattr(language, "STRANGE_SHARE", 0)
    rng = np.random.default_rng(5)
    for unseen in (False, True) * 20:
        ex = sample_example(rng, task, zh=zh, unseen=unseen, words=words)
        asked, *replies = (m["content"].replace("<image>", "") for m in ex.messages)
        for text in (toy.fold(asked), *replies[::2]):  # what users write is folded
            pieces = [toy.decode([i]) for i in toy.encode(text)]
            assert "".join(pieces) == text
            whole = re.findall(r"[A-Za-z]+|[\u4e00-\u9fff]", text)
            found = [p.strip() for p in pieces if re.search(r"[A-Za-z\u4e00-\u9fff]", p)]
            assert [w for p in found for w in ([p] if p.isascii() else p)] == whole


def test_special_ids_are_the_configurations(tokenizer, toy):
    config = NexusGenConfig.tiny().ar
    ids = [tokenizer.token_to_id(name) for name in SPECIAL]
    last = config.text.vocab_size
    assert tokenizer.get_vocab_size() == last
    assert ids == list(range(last - len(ids), last))  # Qwen's order, after everything else
    toy.check(config)


def test_a_word_begins_much_as_its_translation_does(tokenizer):
    pairs, size = translations(tokenizer), tokenizer.get_vocab_size()
    english_of = {tokenizer.decode([k]): tokenizer.decode(v) for k, v in pairs.items()}
    some = {"红色": " red", "左上角": " top left corner", "两": " two"}
    some |= {" disc": " circle", " discs": " circle", " grey": " gray", "橘": None}
    assert {k: english_of.get(k) for k in some} == some
    words = torch.nn.Embedding(size, 128)
    before = words.weight.detach().clone()
    align_translations(words, pairs)
    after = words.weight.detach()
    english = torch.stack([before[meaning].sum(0) for meaning in pairs.values()])
    alike = torch.cosine_similarity(after[list(pairs)], english)
    assert alike.mean().item() == pytest.approx(COSINE, abs=0.05)
    assert after[list(pairs)].std().item() == pytest.approx(1, abs=0.05)  # the scale stays
    others = [k for k in range(size) if k not in pairs]
    assert torch.equal(after[others], before[others])


TEXTS = (
    "a photo of two small red circles",
    "一张照片：红色圆形在蓝色星形的左边",
    "Grüße, zażółć, привет, 👩‍🚀 שלום",
    "  tabs\tand\r\nlines \n\n and 3.14159e-10  ",
    "<|im_end|> <image> </tool_call>",
    "\x00\x7f\u200b\ufeff",
    "",
)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_round_trips(toy, text):
    assert toy.decode(toy.encode(text), skip_special=False) == text


def test_random_text_round_trips(toy):
    rng = np.random.default_rng(0)
    for _ in range(200):
        points = rng.integers(0, 0x11000, 30)
        text = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
        assert toy.decode(toy.encode(text), skip_special=False) == text


def test_two_builds_are_the_same_file(tokenizer):
    here = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    code = (
        "import hashlib; from nexus_min.toy.vocabulary import build_tokenizer as build;"
        "print(hashlib.sha256(build().to_str().encode()).hexdigest())"
    )
    for seed in ("1", "2"):  # another order of sets
        env = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == here


def test_too_small_a_vocabulary_is_an_error():
    tiny = NexusGenConfig.tiny()
    small = replace(tiny, ar=replace(tiny.ar, pad_token_id=300))
    with pytest.raises(ValueError, match="300 tokens are too few"):
        build_tokenizer(small)
