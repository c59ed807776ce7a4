"""The wordings of the toy world: each says what it should, and those of `eval` are new."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest

from nexus_min.tokenizer import QwenTokenizer
from nexus_min.toy.edits import EDITS
from nexus_min.toy.language import WORDINGS
from nexus_min.toy.tasks import KINDS, rewrite, sample_example
from nexus_min.toy.vocabulary import build_tokenizer, folding
from nexus_min.toy.world import BACKGROUNDS, COLORS, RADIUS, SHAPES

LANGUAGES = ("en", "zh")
# what each wording has to name: any one of each group
NEEDS = {
    "prompt": [""], "polite": [""], "asking": [""], "placed": ["object", "place"],
    "two": ["a", "b"], "related": ["a", "b", "relation"], "on background": ["body", "color"],
    "in outline": ["body"], "color": ["x"], "shape": ["x"], "count": ["x"], "count_all": [],
    "exist": ["a b x"], "where": ["x"], "background": [], "relation": ["x", "y", "relation"],
    "describe": [], "recolor": ["x", "color"], "add": ["a x", "place goal"], "remove": ["x"],
    "replace": ["x", "a b"], "rebackground": ["color"], "move": ["x", "goal place"],
    "fill": [], "outline edit": [],
}  # fmt: skip
EVERY = list(product(LANGUAGES, NEEDS))
fold = folding().normalize_str


@pytest.fixture(scope="module")
def toy() -> QwenTokenizer:
    return QwenTokenizer(build_tokenizer())


@pytest.mark.parametrize("language, key", EVERY)
def test_a_wording_names_all_that_it_is_about_and_nothing_else(language, key):
    known, typed = WORDINGS[language][key], WORDINGS["as typed"][language].get(key, [])
    groups = [group.split() or [""] for group in NEEDS[key]]
    for text in [*known, *typed]:
        slots = re.findall(r"{(\w*)}", text)
        assert all(len(set(slots) & set(group)) == 1 for group in groups), text
        assert len(slots) == len(groups), text
    assert key == "placed" or len(set(known)) >= 8
    assert not {fold(text) for text in known} & {fold(text) for text in typed}


def test_every_kind_has_wordings_as_typed():
    kinds = set(NEEDS) - {"polite", "asking", "placed", "describe"}
    kinds -= {"two", "related", "on background", "in outline"}
    assert all(kinds <= set(WORDINGS["as typed"][language]) for language in LANGUAGES)


def named_in(text: str, zh: bool) -> set[str]:
    """The shapes, colors and sizes that a text names, by any of their words."""
    words = WORDINGS["zh" if zh else "en"]["words"]
    names = [*SHAPES, *COLORS, *BACKGROUNDS, *RADIUS]
    meaning = {x: name for name in names for x in words[name]}
    pattern = "|".join(sorted(meaning, key=len, reverse=True))
    return {meaning[x] for x in re.findall(pattern if zh else rf"\b({pattern})\b", text.lower())}


@pytest.mark.parametrize("words", ["any", "as typed"])
@pytest.mark.parametrize("zh", [False, True])
@pytest.mark.parametrize("kind", EDITS)
def test_an_instruction_names_the_change_and_nothing_else(kind, zh, words):
    rng = np.random.default_rng(0)
    for _ in range(60):
        ex = sample_example(rng, "edit", kind, zh, words=words)
        old, new = (set(scene.objects) for scene in ex.scenes)
        gone, come = ({x for o in part for x in o.key[:3]} for part in (old - new, new - old))
        found, wanted = named_in(ex.text, zh), come - gone
        if kind == "background":
            wanted = {ex.scenes[1].background}
        assert wanted <= found <= wanted | gone, ex.text
        if kind in ("add", "move"):
            (obj,) = new - old
            voice = WORDINGS["zh" if zh else "en"]
            places = [*voice["places"][obj.cell], *voice["goals"][obj.cell]]
            assert any(place.replace("the ", "") in ex.text.replace("the ", "") for place in places)


@pytest.mark.parametrize("task", [*KINDS, "multi_turn"])
def test_other_words_are_about_the_same_scenes(task):
    rng = np.random.default_rng(1)
    for _ in range(40):
        ex = sample_example(rng, task)
        again = [rewrite(rng, ex) for _ in range(4)]
        assert all((x.task, x.scenes, x.spec) == (task, ex.scenes, ex.spec) for x in again)
        assert task == "understand" or all(x.kind == ex.kind for x in again)
        assert len({x.text for x in [ex, *again]}) > 1


@pytest.mark.parametrize("words", ["any", "as typed"])
@pytest.mark.parametrize("zh", [False, True])
@pytest.mark.parametrize("task", KINDS)
def test_a_reply_is_in_the_language_of_the_user(task, zh, words):
    rng = np.random.default_rng(2)
    for _ in range(40):
        ex = sample_example(rng, task, zh=zh, words=words)
        for message in ex.messages:
            assert bool(re.search("[\u4e00-\u9fff]", message["content"])) == zh, message


@pytest.mark.parametrize(
    "texts",
    [
        ("Is it red?", "IS IT RED", "  is it  red ?!", "Ｉs it red？"),
        ("a star, a ball", "A star ,a ball.", "a star，a ball。", "“a star”, a ball"),
        ("星形是什么颜色？", "星形是什么颜色?", "星形 是什么颜色", "星形是什么颜色。 "),
        ("圆形、星形，2个", "圆形,星形，２个", "圆形， 星形, 2个！"),
    ],
)  # fmt: skip
def test_what_differs_in_case_width_and_punctuation_only_is_the_same(toy, texts):
    asks = [toy.encode_chat([{"role": "user", "content": text}]) for text in texts]
    assert all(ids == asks[0] for ids in asks)
    assert all(toy.fold(toy.fold(text)) == toy.fold(text) for text in texts)


def test_folding_twice_is_folding_once_and_replies_are_not_folded(toy):
    rng = np.random.default_rng(3)
    for task in (*KINDS, "multi_turn") * 40:
        for user, reply in zip(*[iter(sample_example(rng, task).messages)] * 2, strict=True):
            once = toy.fold(user["content"])
            assert toy.fold(once) == once
            text = toy.decode(
                toy.encode_chat([user, reply], [4] * f"{user}{reply}".count("<image>"))
            )
            assert f"assistant\n{reply['content']}\n" in text
