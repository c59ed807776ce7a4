"""Questions about a scene, with the chain of thought that comes before each answer.

For a small red star on the left and a large blue circle in the center:
    Where is the star?                 a small red star on the left: on the left
    How many circles are there?        star circle no, circle circle yes: one
    Is there a blue star?              red blue no, blue blue circle star no: no
    Is the star right of the circle?   a small red star on the left, a large blue circle in the
                                       center, left, center, left of, right of no: no
Each step copies or compares words right before it, which a tiny model learns far sooner than it
learns to look the same thing up in an image.
"""

import re
from typing import NamedTuple

from . import language as lang
from .world import COLORS, SHAPES, Object, Rng, Scene, choice

QUESTIONS = ("color", "shape", "count", "count_all", "exist", "where", "background", "relation")


class QA(NamedTuple):
    """A question, the chain of thought before its answer ("" for none), and the answer."""

    question: str
    reasoning: str
    answer: str


def with_reasoning(qa: QA, zh: bool) -> str:
    """The reply to a question: "a star at the top: star"."""
    return qa.reasoning + ("：" if zh else ": ") + qa.answer if qa.reasoning else qa.answer


def final_answer(reply: str) -> str:
    """The answer at the end of a reply: "a star at the top, ... a star at the top: star"."""
    return re.split("[:.] |[：。]", reply)[-1].strip()


def scene_caption(scene: Scene, zh: bool) -> str:
    """The caption that begins the first reply about an image."""
    return lang.caption(None, scene, zh) + ("。" if zh else ". ")


def make_question(rng: Rng, kind: str, scene: Scene, zh: bool) -> QA | None:
    """A question of one kind about a scene, or None when the scene does not admit one."""
    if kind == "describe":
        question = "请描述这张图片。" if zh else "Please describe the image."
        return QA(question, "", lang.caption(None, scene, zh))
    if kind == "background":
        question = "背景是什么颜色？" if zh else "What color is the background?"
        return QA(question, "", lang.word(scene.background, zh))
    if kind == "count_all":
        question = "一共有几个图形？" if zh else "How many objects are there?"
        return QA(question, "", lang.word(lang.NUMBERS[len(scene.objects)], zh))
    if kind == "count":
        shape = choice(rng, scene.objects).shape if rng.random() < 0.7 else choice(rng, SHAPES)
        name = lang.word(shape, True) if zh else lang.plural(shape)
        question = f"有几个{name}？" if zh else f"How many {name} are there?"
        number = lang.NUMBERS[sum(o.shape == shape for o in scene.objects)]
        return QA(question, _verdicts(scene, shape, None, zh), lang.word(number, zh))
    if kind == "relation":
        return _relation(rng, scene, zh)
    obj = choice(rng, scene.objects)
    if kind == "exist":
        return _existence(rng, scene, obj, zh)
    reasoning = lang.describe_object(obj, zh)
    if kind == "where":
        if (form := lang.reference(rng, scene, obj)) is None:
            return None
        name = lang.noun_phrase(*form, zh)
        question = f"{name}在哪里？" if zh else f"Where is the {name}?"
        return QA(question, reasoning, lang.cell_name(obj.cell, zh))
    given = {"color": "shape", "shape": "color"}[kind]
    if sum(getattr(o, given) == getattr(obj, given) for o in scene.objects) > 1:
        return None  # the question would have several answers
    name = lang.word(getattr(obj, given), zh)
    if kind == "shape":
        question = f"{name}的图形是什么形状？" if zh else f"What shape is the {name} object?"
    else:
        question = f"{name}是什么颜色？" if zh else f"What color is the {name}?"
    return QA(question, reasoning, lang.word(getattr(obj, kind), zh))


def _verdicts(scene: Scene, shape: str, color: str | None, zh: bool) -> str:
    """For each object, each attribute beside the requested one, then yes or no."""
    yes, no, comma, space = ("是", "不是", "，", "") if zh else (" yes", " no", ", ", " ")
    parts = []
    for o in sorted(scene.objects, key=lambda o: o.cell):
        words = [o.color, color] if color else []
        if color in (None, o.color):
            words += [o.shape, shape]
        verdict = yes if words[::2] == words[1::2] else no
        parts.append(space.join(lang.word(w, zh) for w in words) + verdict)
    return comma.join(parts)


def _existence(rng: Rng, scene: Scene, obj: Object, zh: bool) -> QA:
    shape, color = obj.shape, obj.color
    if rng.random() < 0.5:  # a near miss half of the time: one attribute changed
        if rng.random() < 0.5:
            shape = choice(rng, SHAPES)
        else:
            color = choice(rng, list(COLORS))
    name = lang.with_article(lang.noun_phrase(shape, color, None, zh), zh)
    question, yes, no = (
        (f"有{name}吗？", "有", "没有") if zh else (f"Is there {name}?", "yes", "no")
    )
    exists = any(lang.matches(o, (shape, color)) for o in scene.objects)
    return QA(question, _verdicts(scene, shape, color, zh), yes if exists else no)


def _relation(rng: Rng, scene: Scene, zh: bool) -> QA | None:
    if len(scene.objects) < 2:
        return None
    pair = [scene.objects[i] for i in rng.choice(len(scene.objects), 2, replace=False)]
    forms = [lang.reference(rng, scene, o) for o in pair]
    if None in forms:
        return None
    axis = int(rng.integers(2))  # 0: rows, above or below; 1: columns, left or right
    # a row or column has the name of its cell in the center
    lanes = [o.cell // 3 * 3 + 1 if axis == 0 else 3 + o.cell % 3 for o in pair]
    if lanes[0] == lanes[1]:
        return None
    relations = [r for r, step in lang.RELATIONS.items() if step[axis]]
    asked = choice(rng, relations)
    true = next(r for r in relations if lang.is_related(*pair, r))
    yes, no, comma = ("是", "不是", "，") if zh else (" yes", " no", ", ")
    relation, answer = lang.word(asked, zh), yes if asked == true else no
    names = [*(lang.CELL_NAMES[lane] for lane in lanes), true]
    steps = [lang.describe_object(o, zh) for o in pair] + [lang.word(name, zh) for name in names]
    reasoning = comma.join([*steps, relation + answer])
    one, two = (lang.noun_phrase(*form, zh) for form in forms)
    question = f"{one}在{two}的{relation}吗？" if zh else f"Is the {one} {relation} the {two}?"
    return QA(question, reasoning, answer.strip())
