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

from typing import NamedTuple

from ..parts import Answer
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
    return Answer.of(reply).answer


def scene_caption(scene: Scene, zh: bool) -> str:
    """The caption that begins the first reply about an image."""
    return lang.caption(None, scene, zh) + ("。" if zh else ". ")


def make_question(voice: lang.Voice, kind: str, scene: Scene) -> QA | None:
    """A question of one kind about a scene, or None when the scene does not admit one."""
    rng, zh, reasoning, slots = voice.rng, voice.zh, "", {}
    obj = choice(rng, scene.objects)
    if kind == "describe":
        answer = lang.caption(None, scene, zh)
    elif kind == "background":
        answer = lang.word(scene.background, zh)
    elif kind == "count_all":
        answer = lang.word(lang.NUMBERS[len(scene.objects)], zh)
    elif kind == "count":
        shape = obj.shape if rng.random() < 0.7 else choice(rng, SHAPES)
        slots["x"] = voice.noun((shape, None, None), many=True)
        count = sum(o.shape == shape for o in scene.objects)
        answer, reasoning = lang.word(lang.NUMBERS[count], zh), _verdicts(scene, shape, None, zh)
    elif kind == "relation":
        return _relation(voice, scene)
    elif kind == "exist":
        shape, color = _near_miss(rng, obj)
        if not voice.is_plain and rng.random() < 0.2:
            color = None
        name = voice.noun((shape, color, None))
        slots = {"a": voice.article(name), "b": name}
        slots["x"] = voice.noun((shape, color, None), many=True)
        exists = any(lang.matches(o, (shape, color)) for o in scene.objects)
        answer = ("有" if exists else "没有") if zh else ("yes" if exists else "no")
        reasoning = _verdicts(scene, shape, color, zh)
    else:
        reasoning = lang.describe_object(obj, zh)
        form = lang.reference(rng, scene, obj)
        if kind == "where":
            answer = lang.cell_name(obj.cell, zh)
        else:
            given = {"color": "shape", "shape": "color"}[kind]
            form = (obj.shape, None, None) if kind == "color" else (None, obj.color, None)
            if sum(getattr(o, given) == getattr(obj, given) for o in scene.objects) > 1:
                return None  # the question would have several answers
            answer = lang.word(getattr(obj, kind), zh)
        if form is None:
            return None
        slots["x"] = voice.word(obj.color) if kind == "shape" else voice.noun(form)
    return QA(voice.utter("asking", voice.say(kind, **slots)), reasoning, answer)


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


def _near_miss(rng: Rng, obj: Object) -> tuple[str, str]:
    """(shape, color) of an object; one of the two is changed half of the time."""
    shape, color = obj.shape, obj.color
    if rng.random() < 0.5:
        return shape, color
    if rng.random() < 0.5:
        return choice(rng, SHAPES), color
    return shape, choice(rng, list(COLORS))


def _relation(voice: lang.Voice, scene: Scene) -> QA | None:
    rng, zh = voice.rng, voice.zh
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
    answer = yes if asked == true else no
    names = [*(lang.CELL_NAMES[lane] for lane in lanes), true]
    steps = [lang.describe_object(o, zh) for o in pair] + [lang.word(name, zh) for name in names]
    reasoning = comma.join([*steps, lang.word(asked, zh) + answer])
    one, two = (voice.noun(form) for form in forms)
    question = voice.say("relation", x=one, y=two, relation=voice.word(asked))
    return QA(voice.utter("asking", question), reasoning, answer.strip())
