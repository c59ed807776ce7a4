"""Questions about a scene, what is thought before they are answered, and the answers."""

from __future__ import annotations

import re

import numpy as np

from .language import (
    NUMBERS,
    RELATIONS,
    ZH,
    ZH_NUMBERS,
    ZH_RELATIONS,
    a,
    caption,
    fits,
    in_order,
    noun,
    place,
    plural,
    reference,
    related,
    row_or_column,
    word_placed,
)
from .world import COLORS, SHAPES, Object, Scene, choice

QUESTIONS = ("color", "shape", "count", "count_all", "exist", "where", "background", "relation")

Asked = tuple[str, str, str]  # question, what is thought before the answer or "", answer


def final(said: str) -> str:
    """The answer behind what was thought: "a star at the top, ... a star at the top: star"."""
    return re.split("[:.] |[：。]", said)[-1].strip()


def _verdicts(scene: Scene, shape: str, color: str | None, zh: bool) -> str:
    """Each object beside what is asked for, then whether it is that: "star circle no".

    With a color, that comes first: "red blue no, blue blue star circle no". So a verdict is on the
    words right before it. When what was asked for had to be found far back as well, `count` was
    right half of the time after 2000 steps; now it nearly always is.
    """
    yes, no, gap, space = ("是", "不是", "，", "") if zh else (" yes", " no", ", ", " ")
    said = []
    for o in in_order(scene):
        words = [o.color, color] if color else []
        if color in (None, o.color):
            words += [o.shape, shape]
        same = words[::2] == words[1::2]
        said.append(space.join(ZH[w] if zh else w for w in words) + (yes if same else no))
    return gap.join(said)


def spoken(thought: str, answer: str, zh: bool) -> str:
    """The answer behind what was thought."""
    return thought + ("：" if zh else ": ") + answer if thought else answer


def what_is_seen(scene: Scene, zh: bool) -> str:
    """What is said first of an image that nothing has been said of."""
    return caption(None, scene, zh) + ("。" if zh else ". ")


def ask(rng: np.random.Generator, kind: str, scene: Scene, zh: bool) -> Asked | None:
    """A question of one kind about a scene, or None when the scene does not admit one."""
    if kind == "describe":
        question = "请描述这张图片。" if zh else "Please describe the image."
        return question, "", caption(None, scene, zh)
    if kind in ("background", "count_all"):
        return _ask_whole(kind, scene, zh)
    if kind == "count":
        return _ask_count(rng, scene, zh)
    if kind == "relation":
        return _ask_relation(rng, scene, zh)
    obj = choice(rng, scene.objects)
    if kind in ("shape", "color"):
        return _ask_attribute(kind, scene, obj, zh)
    if kind == "exist":
        return _ask_existence(rng, scene, obj, zh)
    if (ref := reference(rng, scene, obj)) is None:
        return None
    if zh:
        return f"{noun(*ref, True)}在哪里？", word_placed(obj, True), place(obj.cell, True)
    return f"Where is the {noun(*ref, False)}?", word_placed(obj, False), place(obj.cell)


def _ask_whole(kind: str, scene: Scene, zh: bool) -> Asked:
    if kind == "background":
        if zh:
            return "背景是什么颜色？", "", ZH[scene.background]
        return "What color is the background?", "", scene.background
    question = "一共有几个图形？" if zh else "How many objects are there?"
    return question, "", (ZH_NUMBERS if zh else NUMBERS)[len(scene.objects)]


def _ask_attribute(kind: str, scene: Scene, obj: Object, zh: bool) -> Asked | None:
    """The color of the only object of its shape, or the shape of the only one of its color."""
    known = {"color": "shape", "shape": "color"}[kind]
    if sum(getattr(o, known) == getattr(obj, known) for o in scene.objects) > 1:
        return None
    thought = word_placed(obj, zh)
    if kind == "shape":
        if zh:
            return f"{ZH[obj.color]}的图形是什么形状？", thought, ZH[obj.shape]
        return f"What shape is the {obj.color} object?", thought, obj.shape
    if zh:
        return f"{ZH[obj.shape]}是什么颜色？", thought, ZH[obj.color]
    return f"What color is the {obj.shape}?", thought, obj.color


def _ask_count(rng: np.random.Generator, scene: Scene, zh: bool) -> Asked:
    shape = choice(rng, scene.objects).shape if rng.random() < 0.7 else choice(rng, SHAPES)
    question = f"有几个{ZH[shape]}？" if zh else f"How many {plural(shape)} are there?"
    number = sum(o.shape == shape for o in scene.objects)
    return question, _verdicts(scene, shape, None, zh), (ZH_NUMBERS if zh else NUMBERS)[number]


def _ask_existence(rng: np.random.Generator, scene: Scene, obj: Object, zh: bool) -> Asked:
    shape, color = obj.shape, obj.color
    if rng.random() < 0.5:  # a near miss half of the time: one attribute changed
        if rng.random() < 0.5:
            shape = choice(rng, SHAPES)
        else:
            color = choice(rng, list(COLORS))
    found = any(fits(o, (shape, color, None)) for o in scene.objects)
    asked, thought = noun(shape, color, None, zh), _verdicts(scene, shape, color, zh)
    if zh:
        return f"有{asked}吗？", thought, "有" if found else "没有"
    return f"Is there {a(asked)}?", thought, "yes" if found else "no"


def _ask_relation(rng: np.random.Generator, scene: Scene, zh: bool) -> Asked | None:
    if len(scene.objects) < 2:
        return None
    chosen = rng.choice(len(scene.objects), 2, replace=False)
    first, second = (scene.objects[i] for i in chosen)
    refs = reference(rng, scene, first), reference(rng, scene, second)
    if None in refs:
        return None
    axis = int(rng.integers(2))
    away = (first.cell // 3 - second.cell // 3, first.cell % 3 - second.cell % 3)[axis]
    if away == 0:
        return None
    relation = list(RELATIONS)[(0, 2)[axis == 0] + int(rng.integers(2))]
    yes = related(first, second, relation)
    one, two = (noun(*r, zh) for r in refs)
    gap = "，" if zh else ", "
    rows_or_columns = [row_or_column(o.cell, axis, zh) for o in (first, second)]
    true = next(r for r in RELATIONS if related(first, second, r) and RELATIONS[r][axis])
    placed = word_placed(first, zh), word_placed(second, zh)
    answer = ("是" if yes else "不是") if zh else "yes" if yes else "no"
    told, asked = (ZH_RELATIONS[r] if zh else r for r in (true, relation))
    verdict = asked + answer if zh else f"{asked} {answer}"
    thought = gap.join([*placed, *rows_or_columns, told, verdict])
    if zh:
        return f"{one}在{two}的{asked}吗？", thought, answer
    return f"Is the {one} {asked} the {two}?", thought, answer
