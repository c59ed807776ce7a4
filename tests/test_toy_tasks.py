"""The tasks of the toy world: nothing held out leaks into training, and every answer is right.

Answers, references and edits are derived here a second time, from the words alone, by code that
shares nothing with what makes them but the names of things.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest

from nexus_min.tokenizer import EDITING_REPLY
from nexus_min.toy import language, tasks
from nexus_min.toy.edits import EDITS
from nexus_min.toy.language import RELATIONS, ZH, ZH_CELLS, caption
from nexus_min.toy.pictures import scenes as training_scenes
from nexus_min.toy.prompts import CATEGORIES, canonical_scene
from nexus_min.toy.questions import QUESTIONS, final_answer
from nexus_min.toy.tasks import KINDS, QUESTIONS_PER_IMAGE, Example, sample_example
from nexus_min.toy.world import (
    BACKGROUNDS,
    CENTERS,
    COLORS,
    RADIUS,
    SHAPES,
    Object,
    Scene,
    held_out,
    random_texture,
)

TASKS = (*KINDS, "multi_turn")
EVERY = [(task, kind) for task, kinds in KINDS.items() for kind in kinds]


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Texts in the first wording, which the second reading below knows."""
    monkeypatch.setattr(language, "PLAIN_SHARE", 1.0)


def draw(task: str, kind: str, n: int, unseen: bool = False, zh: bool | None = None):
    rng = np.random.default_rng([n, len(task), *(kind or task).encode(), unseen])
    return [sample_example(rng, task, kind, zh, unseen=unseen) for _ in range(n)]


# ---- nothing held out is ever trained on -------------------------------------------------------


@pytest.mark.parametrize("task,kind", EVERY)
def test_training_never_meets_a_held_out_scene_in_any_role(task, kind):
    for ex in draw(task, kind, 150):
        assert not ex.unseen
        assert not any(held_out(scene.key) for scene in ex.scenes)


@pytest.mark.parametrize("task,kind", EVERY)
def test_unseen_examples_always_show_a_held_out_scene(task, kind):
    for ex in draw(task, kind, 25, unseen=True):
        assert ex.unseen and any(held_out(scene.key) for scene in ex.scenes)


def test_the_mixture_of_training_holds_nothing_out_too():
    seen = {s.key for task in TASKS for ex in draw(task, "", 400) for s in ex.scenes}
    asked = {s.key for task in TASKS for ex in draw(task, "", 60, unseen=True) for s in ex.scenes}
    assert not any(held_out(key) for key in seen)
    assert any(held_out(key) for key in asked)


def test_scenes_of_the_base_stages_are_not_held_out():
    found = training_scenes(np.random.default_rng(0), 600)
    assert not any(held_out(s.key) for s in found)


def test_one_scene_in_ten_is_held_out():
    rng = np.random.default_rng(0)
    scenes = [tasks.draw(rng, "generate", "caption")[0][0] for _ in range(3000)]
    share = np.mean([held_out(scene.key) for scene in scenes])
    assert 0.085 < share < 0.12


def test_what_a_caption_cannot_name_does_not_move_a_scene_to_the_other_side():
    rng = np.random.default_rng(0)
    for ex in draw("generate", "caption", 100) + draw("generate", "caption", 20, unseen=True):
        scene = ex.scenes[0]
        other = tuple(replace(o, dx=1.5, dy=-1.0) for o in reversed(scene.objects))
        other = replace(scene, objects=other, texture=random_texture(rng))
        assert replace(ex, scenes=(other,)).unseen == ex.unseen


def meanings(kind: str):
    """All prompts of a category, as what they name."""
    sizes, colors = [None, *RADIUS], list(COLORS)
    cells, pairs = [None, *range(9)], list(permutations(SHAPES, 2))
    both = list(permutations(colors, 2))
    objects = {
        "single": [[(s, None, z, c)] for s, z, c in product(SHAPES, sizes, cells)],
        "colors": [[(s, k, z, c)] for s, k, z, c in product(SHAPES, colors, sizes, cells)],
        "counting": [
            [(s, k, z, None)] * n
            for s, k, z, n in product(SHAPES, [None, *colors], sizes, (2, 3, 4))
        ],
        "two": [
            [(a, None, y, None), (b, None, z, None)]
            for (a, b), y, z in product(pairs, sizes, sizes)
            if y or not z
        ],
        "position": [
            [(a, k, None, None), (b, m, None, None)]
            for (a, b), (k, m) in product(pairs, [(None, None), *both])
        ],
        "attribution": [
            [(a, k, None, None), (b, m, None, None)] for (a, b), (k, m) in product(pairs, both)
        ],
    }[kind]
    for named, background, style in product(objects, [None, *BACKGROUNDS], (None, "outline")):
        spec = {"objects": named, "background": background, "style": style}
        if kind == "position":
            yield from ({**spec, "relation": relation} for relation in RELATIONS)
        else:
            yield spec


def frozen(spec: dict) -> tuple:
    return tuple(spec["objects"]), spec["background"], spec["style"], spec.get("relation")


# of 1500, 1400, 4050, 12000, 45600, 11200; they mean 75, 59, 197, 609, 1806, 901 scenes
UNSEEN = {
    "single": 159,
    "two": 114,
    "counting": 392,
    "colors": 1331,
    "position": 4582,
    "attribution": 1132,
}


@pytest.mark.parametrize("kind", CATEGORIES)
def test_every_category_has_at_least_100_unseen_prompts(kind):
    unseen, seen = set(), set()
    for spec in meanings(kind):
        side = unseen if held_out(canonical_scene(spec).key) else seen
        side.add(frozen(spec))
    assert len(unseen) == UNSEEN[kind] >= 100
    for ex in draw("generate", kind, 60, unseen=True):
        assert frozen(ex.spec) in unseen
    for ex in draw("generate", kind, 60):
        assert frozen(ex.spec) in seen


def test_all_wordings_of_a_meaning_are_on_one_side():
    opposite = {"left of": "right of", "above": "below"}
    for ex in draw("generate", "position", 80) + draw("generate", "position", 20, unseen=True):
        objects, relation = ex.spec["objects"], ex.spec["relation"]
        turned = opposite.get(relation) or next(k for k, v in opposite.items() if v == relation)
        scene = canonical_scene(ex.spec | {"objects": objects[::-1], "relation": turned})
        assert replace(ex, scenes=(scene,)).unseen == ex.unseen
    for kind in ("single", "colors", "two", "counting"):  # named or left open: the same image
        for ex in draw("generate", kind, 40) + draw("generate", kind, 10, unseen=True):
            named = ex.spec | {"background": ex.scenes[0].background}
            named["objects"] = [
                (s, o.color, o.size, c)
                for (s, _, _, c), o in zip(ex.spec["objects"], ex.scenes[0].objects, strict=True)
            ]
            assert replace(ex, scenes=(canonical_scene(named),)).unseen == ex.unseen


def test_no_unseen_text_is_ever_a_training_text():
    for kind in ("single", "two", "counting"):
        unseen = {ex.text for ex in draw("generate", kind, 150, unseen=True)}
        assert not unseen & {ex.text for ex in draw("generate", kind, 800)}


# ---- a second reading of the words -------------------------------------------------------------

ENGLISH = {v: k for k, v in ZH.items()}
NAMED = re.compile(
    r"(?:(?P<size>small|large) )?(?:(?P<color>{c}) )?(?P<shape>{s})|"
    r"(?:(?P<zsize>小|大)的)?(?:(?P<zcolor>{zc})的?)?(?P<zshape>{zs})".format(
        c="|".join(COLORS),
        s="|".join((*SHAPES, "shape")),
        zc="|".join(ZH[c] for c in COLORS),
        zs="|".join((*(ZH[s] for s in SHAPES), "图形")),
    )
)


def mentions(text: str) -> list[dict]:
    """The objects that a text names, in order, as what it says of them in English."""
    found = []
    for match in NAMED.finditer(text):
        named = {k.removeprefix("z"): ENGLISH.get(v, v) for k, v in match.groupdict().items() if v}
        if named["shape"] in ("shape", "图形"):  # "the red shape"
            del named["shape"]
        found.append(named)
    return found


def fitting(scene: Scene, named: dict) -> list[Object]:
    return [o for o in scene.objects if named.items() <= vars(o).items()]


def the(scene: Scene, named: dict) -> Object:
    (one,) = fitting(scene, named)  # fails where a reference is not unique
    return one


def english(word: str) -> str:
    return ENGLISH.get(word, word)


def center(obj: Object) -> tuple[float, float]:
    return CENTERS[obj.cell % 3] + obj.dx, CENTERS[obj.cell // 3] + obj.dy


def cell_in(text: str) -> int:
    """The cell that a text's last words name."""
    if text[-1] > "\u4e00":
        return max((text.find(z), i) for i, z in enumerate(ZH_CELLS))[1]
    rows = {"top": 0, "bottom": 2}
    columns = {"left": 0, "right": 2}
    words = re.findall("[a-z]+", text)[-4:]
    row = next((rows[w] for w in words if w in rows), 1)
    return 3 * row + next((columns[w] for w in words if w in columns), 1)


COUNTS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4}
COUNTS |= {"零": 0, "一": 1, "两": 2, "三": 3, "四": 4}
YES = {"yes": True, "有": True, "是": True, "no": False, "没有": False, "不是": False}
BEYOND = {
    r"left of|左边": lambda one, two: one[0] < two[0],
    r"right of|右边": lambda one, two: one[0] > two[0],
    r"above|上方": lambda one, two: one[1] < two[1],
    r"below|下方": lambda one, two: one[1] > two[1],
}


def is_right(scene: Scene, kind: str, text: str, answer: str) -> bool:
    """Whether `answer` is the truth about a scene."""
    named = mentions(text)
    if kind == "background":
        return scene.background == english(answer)
    if kind == "count_all":
        return len(scene.objects) == COUNTS[answer]
    if kind == "count":
        return len(fitting(scene, named[0])) == COUNTS[answer]
    if kind == "exist":
        return bool(fitting(scene, named[0])) == YES[answer]
    if kind == "shape":
        (color,) = {c for c in COLORS if c in text.split() or ZH[c] in text}
        return the(scene, {"color": color}).shape == english(answer)
    if kind == "color":
        return the(scene, named[0]).color == english(answer)
    if kind == "where":
        return the(scene, named[0]).cell == cell_in(answer)
    assert kind == "relation"
    one, two = (center(the(scene, s)) for s in named)
    (test,) = [f for words, f in BEYOND.items() if re.search(words, text)]
    return test(one, two) == YES[answer]


def both_sides(task: str, kind: str, zh: bool) -> list[Example]:
    return draw(task, kind, 60, zh=zh) + draw(task, kind, 15, unseen=True, zh=zh)


@pytest.mark.parametrize("zh", [False, True])
@pytest.mark.parametrize("kind", QUESTIONS)
def test_stored_answers_are_true(kind, zh):
    found = both_sides("understand", kind, zh)
    for ex in found:
        assert is_right(ex.scenes[0], kind, ex.text, ex.answer), (ex.text, ex.answer)
    answers = {ex.answer for ex in found}
    assert len(answers) >= 2  # and the second reading does tell them apart
    for ex in found[:20]:
        wrong = next(a for a in sorted(answers) if a != ex.answer)
        assert not is_right(ex.scenes[0], kind, ex.text, wrong)


@pytest.mark.parametrize("zh", [False, True])
@pytest.mark.parametrize("kind", ["exist", "relation"])
def test_yes_and_no_are_both_common(kind, zh):
    answers = [YES[ex.answer] for ex in draw("understand", kind, 200, zh=zh)]
    assert 0.3 < np.mean(answers) < 0.7


def read_objects(text: str) -> set:
    """Keys of the objects that a text names with their places."""
    objects = set()
    for part in re.split(", |，", text):
        for named in mentions(part):
            cell = cell_in(part if part[0] < "\u4e00" else part.split("有")[0])
            objects.add((named["shape"], named["color"], named["size"], cell))
    return objects


def read_caption(text: str) -> tuple[set, str, str]:
    """(objects, background, style) that a caption tells, from its words."""
    objects = read_objects(text)
    (background,) = re.findall(r"(\w+) background", text) or re.findall(r"(\w\w)背景", text)
    style = "outline" if re.search("outline|线条画", text) else "filled"
    return objects, english(background), style


@pytest.mark.parametrize("zh", [False, True])
def test_captions_name_everything(zh):
    rng = np.random.default_rng(0)
    for ex in both_sides("generate", "caption", zh):
        scene = ex.scenes[0]
        for text in (ex.text, caption(None, scene, zh), caption(rng, scene, zh)):
            objects, background, style = read_caption(text)
            assert objects == {o.key for o in scene.objects}
            assert (background, style) == (scene.background, scene.style)
    for ex in both_sides("understand", "describe", zh):
        assert read_caption(ex.answer)[0] == {o.key for o in ex.scenes[0].objects}


# ---- edits -------------------------------------------------------------------------------------

BACK = {"add": "remove", "remove": "add"}  # the other edits undo themselves
STAYS = {
    "recolor": ("shape", "size", "cell", "dx", "dy"),
    "replace": ("color", "size", "cell", "dx", "dy"),
    "move": ("shape", "color", "size"),
}


def difference(source: Scene, target: Scene) -> tuple[str, Object | None, Object | None]:
    """(kind of edit, the object that goes, the object that comes) between two scenes."""
    gone = [o for o in source.objects if o not in target.objects]
    new = [o for o in target.objects if o not in source.objects]
    whole = [k for k in ("background", "style") if getattr(source, k) != getattr(target, k)]
    assert source.texture == target.texture
    assert len(whole) + max(len(gone), len(new)) == 1, "more than one change"
    if whole:
        return whole[0], None, None
    if not (gone and new):
        return ("add", None, new[0]) if new else ("remove", gone[0], None)
    same = [
        kind
        for kind, keep in STAYS.items()
        if all(getattr(gone[0], k) == getattr(new[0], k) for k in keep)
    ]
    return same[0], gone[0], new[0]


@pytest.mark.parametrize("zh", [False, True])
@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_is_one_change_of_the_object_its_words_name(kind, zh):
    for ex in both_sides("edit", kind, zh):
        source, target = ex.scenes
        found, gone, new = difference(source, target)
        assert found == kind
        named = mentions(ex.text)
        if kind == "add":
            assert named == [{"shape": new.shape, "color": new.color, "size": new.size}]
            assert cell_in(ex.text.split("加")[0] if zh else ex.text) == new.cell
        elif gone:
            assert the(source, named[0]) is gone
        if kind == "recolor":
            goal = ex.text.split("变成")[1] if zh else ex.text.split(" to ")[1][:-1]
            assert english(goal) == new.color
        if kind == "replace":
            assert named[1] == {"shape": new.shape}
        if kind == "move":
            goal = ex.text.split("移到")[1] if zh else ex.text.split(" to ")[1]
            assert cell_in(goal) == new.cell
        if kind == "background":
            (goal,) = [b for b in BACKGROUNDS if b in ex.text or ZH[b] in ex.text]
            assert goal == target.background
        cells = [o.cell for o in target.objects]
        assert 1 <= len(cells) == len(set(cells)) <= 4


GOES = {"remove": ("disappears", "消失"), "move": (" moves to ", "移到")}


@pytest.mark.parametrize("zh", [False, True])
@pytest.mark.parametrize("kind", EDITS)
def test_a_reply_to_an_edit_says_first_what_will_change(kind, zh):
    silent = 0
    for ex in both_sides("edit", kind, zh):
        reply = ex.messages[1]["content"]
        usual = EDITING_REPLY["zh" if zh else "en"]
        silent += reply == usual
        if reply != usual:
            description, steps = reply.removesuffix(usual).split("。" if zh else ". ", 1)
            assert read_caption(description)[0] == {o.key for o in ex.scenes[0].objects}
            assert steps.strip() == ex.answer
        _, gone, new = difference(*ex.scenes)
        if kind == "add" or not gone:
            assert ex.answer == ""
            continue
        word = GOES.get(kind, (" becomes ", "变成"))[zh]
        before, after = ex.answer.split(word)
        named = mentions(ex.answer)
        assert named[0] == {"shape": gone.shape, "color": gone.color, "size": gone.size}
        assert cell_in(before.split("的")[0] if zh else before) == gone.cell
        if kind == "move":
            assert cell_in(after[:-1]) == new.cell
        elif kind != "remove":
            assert named[1] == {"shape": new.shape, "color": new.color, "size": new.size}
    assert silent > 0  # the usual sentence alone is learnt too


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_and_its_way_back_are_on_one_side(kind):
    for ex in draw("edit", kind, 60) + draw("edit", kind, 30, unseen=True):
        back = replace(ex, scenes=ex.scenes[::-1])
        assert back.unseen == ex.unseen
        assert difference(*back.scenes)[0] == BACK.get(kind, kind)


def test_both_ways_of_an_edit_are_asked_for_alike():
    counts = {kind: [0] * 5 for kind in ("add", "remove")}
    for kind, bins in counts.items():
        for ex in draw("edit", kind, 900):
            bins[max(len(s.objects) for s in ex.scenes)] += 1
    assert all(abs(a - b) < 90 for a, b in zip(*counts.values(), strict=True))  # 4 sigma
    for kind, of in (("background", lambda s: s.background), ("style", lambda s: s.style)):
        found = [ex.scenes for ex in draw("edit", kind, 600)]
        first = [(of(a), of(b)) for a, b in found]
        for there in set(first):
            if kind == "background":  # styles are not alike: three scenes in four are filled
                assert abs(first.count(there) - first.count(there[::-1])) < 50
        assert {b for _, b in first} == {a for a, _ in first}


@pytest.mark.parametrize("task", TASKS)
def test_messages_follow_the_official_format(task):
    for ex in draw(task, "", 60):
        turns = len(ex.messages) // 2  # questions come several about one image
        assert 1 <= turns <= {"understand": QUESTIONS_PER_IMAGE, "multi_turn": 3}.get(task, 1)
        assert [m["role"] for m in ex.messages] == ["user", "assistant"] * turns
        joined = "".join(m["content"] for m in ex.messages)
        assert joined.count("<image>") == len(ex.scenes)
        assert ex.text in ex.messages[0]["content"]
        if task == "understand":
            assert final_answer(ex.messages[1]["content"]) == ex.answer


NAMED_FIRST = {"color": 1, "shape": 1, "where": 1, "background": 0, "count_all": 0, "relation": 2}


def check_reply(scene: Scene, text: str, reply: str) -> None:
    """The answer to a question of any kind follows from the reasoning before it."""
    *reasoning, answer = re.split(": |：", reply)
    assert final_answer(reply) == answer
    kind = question_kind(text)
    assert is_right(scene, kind, text, answer)
    parts = re.split(", |，", reasoning[0]) if reasoning else []
    if kind in ("count", "exist"):
        (queried,) = mentions(text)
        objects = sorted(scene.objects, key=lambda o: o.cell)
        verdicts = [not re.search(" no$|不是$", part) for part in parts]
        assert verdicts == [all(getattr(o, k) == v for k, v in queried.items()) for o in objects]
        for o, part in zip(objects, parts, strict=True):
            compared = ["shape"] if "color" not in queried else ["color", "shape"]
            if queried.get("color", o.color) != o.color:
                compared = ["color"]
            words = [word for name in compared for word in (getattr(o, name), queried[name])]
            pair = re.sub(" (yes|no)$|不?是$", "", part)
            assert pair in (" ".join(words), "".join(ZH[word] for word in words))
        return
    about = parts[: NAMED_FIRST[kind]]
    assert len(about) == NAMED_FIRST[kind]
    keys = [read_objects(part) for part in about]
    assert all(len(k) == 1 and k <= {o.key for o in scene.objects} for k in keys)
    if kind == "relation":
        assert keys[0] != keys[1]
        places = [divmod(cell_in(part), 3) for part in parts[2:4]]
        *_, true, verdict = parts
        axis = 0 if re.search("above|below|上方|下方", text) else 1
        (one,), (two,) = keys
        first, second = [divmod(k[-1], 3)[axis] for k in (one, two)]
        assert [p[axis] for p in places] == [first, second]
        words = (("above|上方", "below|下方"), ("left of|左边", "right of|右边"))[axis]
        assert re.fullmatch(words[first > second], true)
        queried = verdict.removesuffix(answer).strip()
        assert re.search(f"({queried}) the|的({queried})吗", text)
        assert (queried == true) == (answer in ("yes", "是"))


QUESTION_FORMS = {
    "count": "How many (?!obj)|有几个(?!图)",
    "count_all": "How many objects|几个图形",
    "background": "background|背景",
    "exist": "Is there|^有.*吗",
    "shape": "What shape|什么形状",
    "where": "Where|在哪里",
    "relation": "^Is the |在.*的.*吗",
    "color": "What color is the (?!back)|(?<!背景)是什么颜色",
}


def question_kind(text: str) -> str:
    """The kind of a question, from its words."""
    (kind,) = [kind for kind, words in QUESTION_FORMS.items() if re.search(words, text)]
    return kind


@pytest.mark.parametrize("zh", [False, True])
@pytest.mark.parametrize("kind", QUESTIONS)
def test_an_answer_follows_a_caption_and_a_chain_of_thought(kind, zh):
    for ex in both_sides("understand", f"{kind}+where+relation", zh):
        scene = ex.scenes[0]
        first, *others = (m["content"] for m in ex.messages[1::2])
        description, first = first.split("。" if zh else ". ")  # stated once
        assert read_caption(description)[0] == {o.key for o in scene.objects}
        assert final_answer(first) == ex.answer
        questions = [m["content"].removeprefix("<image>") for m in ex.messages[::2]]
        assert question_kind(questions[0]) == kind
        assert len(set(questions)) == len(questions)
        for text, reply in zip(questions, (first, *others), strict=True):
            check_reply(scene, text, reply)


@pytest.mark.parametrize("zh", [False, True])
def test_a_conversation_continues_about_the_latest_image(zh):
    turns, edits, unseen = [], 0, draw("multi_turn", "", 30, unseen=True, zh=zh)
    for ex in draw("multi_turn", "", 200, zh=zh) + unseen:
        scenes, described = list(ex.scenes), ex.kind == "understand"
        at = 0 if ex.kind == "generate" else 1  # of the first image that is made
        turns.append(len(ex.messages) // 2)
        for user, reply in zip(ex.messages[::2], ex.messages[1::2], strict=True):
            text, answer = user["content"], reply["content"]
            if user is ex.messages[0]:
                at += ex.kind != "understand"
                continue
            assert "<image>" not in text
            scene = scenes[at - 1]
            if not described:  # stated once of each image, from a second look
                description, answer = answer.split("。" if zh else ". ", 1)
                assert read_caption(description)[0] == {o.key for o in scene.objects}
            described = True
            if not answer.endswith("<image>"):
                check_reply(scene, text, answer)
                continue
            difference(scene, scenes[at])  # one change
            at, described, edits = at + 1, False, edits + 1
        assert at == len(scenes)
    assert edits > 50 and turns.count(3) > turns.count(2) > 0
    assert all(any(held_out(s.key) for s in ex.scenes) for ex in unseen)
