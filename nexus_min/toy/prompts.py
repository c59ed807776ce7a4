"""Short prompts of GenEval's six categories: what they name, how they say it, what satisfies them.

A *spec* holds what a prompt names; None, or an absent key, leaves an attribute open:
{"objects": [("star", "red", None, None), ("cross", None, None, None)], "background": None,
"style": None, "relation": "left of"} is "a photo of a red star left of a cross". In the true image
each open attribute has one canonical value: large, filled, on white, fixed cells and colors.
"""

from itertools import groupby

from . import language as lang
from .world import BACKGROUNDS, CANONICAL_COLOR, COLORS, RADIUS, SHAPES, Object, Rng, Scene, choice

CATEGORIES = ("single", "two", "counting", "colors", "position", "attribution")
LAYOUTS = {1: (4,), 2: (3, 5), 3: (3, 4, 5), 4: (0, 2, 6, 8)}  # canonical cells


def short_prompt(rng: Rng, kind: str) -> dict:
    """The spec of a random prompt of category `kind`, or of "several" objects."""

    def maybe(items, probability: float):
        return choice(rng, items) if rng.random() < probability else None

    first, second = rng.choice(SHAPES, 2, replace=False).tolist()
    colors = rng.choice(list(COLORS), 2, replace=False).tolist()
    background = maybe(list(BACKGROUNDS), 0.5)
    spec = {"background": background, "style": "outline" if rng.random() < 0.15 else None}
    size = maybe(list(RADIUS), 0.5)
    if kind == "several":  # two to four objects, all with a cell or none, some alike
        shapes = rng.choice(SHAPES, int(rng.integers(2, 5)), replace=False).tolist()
        cells = rng.permutation(9).tolist() if rng.random() < 0.5 else [None] * 9
        objects = [
            (s, maybe(list(COLORS), 0.8), maybe(list(RADIUS), 0.3), c)
            for s, c in zip(shapes, cells, strict=False)
        ]
        if cells[0] is None and len(shapes) < 4 and rng.random() < 0.3:
            objects.insert(0, objects[0])
        return {"objects": objects, **spec}
    if kind == "single":
        objects = [(first, None, size, maybe(range(9), 0.5))]
    elif kind == "colors":
        objects = [(first, colors[0], size, maybe(range(9), 0.3))]
    elif kind == "counting":
        color = maybe(list(COLORS), 0.6)
        objects = [(first, color, size, None)] * int(rng.integers(2, 5))
    elif kind == "two":
        other = maybe(list(RADIUS), 0.3) if size else None
        objects = [(first, None, size, None), (second, None, other, None)]
    else:
        if kind == "position" and rng.random() >= 0.5:
            colors = [None, None]
        objects = [(first, colors[0], None, None), (second, colors[1], None, None)]
        if kind == "position":
            spec["relation"] = choice(rng, list(lang.RELATIONS))
    return {"objects": objects, **spec}


def canonical_scene(spec: dict) -> Scene:
    """The one scene that a short prompt means: open attributes take their canonical values."""
    cells = LAYOUTS[len(spec["objects"])]
    if relation := spec.get("relation"):
        row, column = lang.RELATIONS[relation]
        cells = (4 + 3 * row + column, 4 - 3 * row - column)
    objects = [
        Object(shape, color or CANONICAL_COLOR[shape], size or "large", free if c is None else c)
        for (shape, color, size, c), free in zip(spec["objects"], cells, strict=True)
    ]
    return Scene(tuple(objects), spec["background"] or "white", spec["style"] or "filled")


def phrase_prompt(voice: lang.Voice, spec: dict) -> str:
    """A wording of a spec."""
    objects, is_outline = spec["objects"], spec["style"] == "outline"
    adjective = is_outline and not voice.is_plain and voice.rng.random() < 0.15
    names = []
    for form, same in groupby(objects):
        name = voice.number(len(list(same)), form, adjective)
        if form[3] is not None:
            name = voice.say("placed", object=name, place=voice.place(form[3]))
        names.append(name)
    if relation := spec.get("relation"):
        text = voice.say("related", a=names[0], b=names[1], relation=voice.word(relation))
    else:
        text = voice.join(names) if len(names) > 1 else names[0]
    text = voice.setting(text, spec["background"], is_outline and not adjective)
    return choice(voice.rng, voice.wordings["prompt"][1:3]).format(text) if voice.is_plain else text


def satisfies(scene: Scene, spec: dict) -> bool:
    """Whether a scene shows what a prompt names and no further object; open attributes are free."""
    rest, chosen = list(scene.objects), []
    for form in spec["objects"]:
        found = next((o for o in rest if lang.matches(o, form)), None)
        if found is None:
            return False
        rest.remove(found)
        chosen.append(found)
    if rest or scene.style != (spec["style"] or "filled"):
        return False
    is_related = not spec.get("relation") or lang.is_related(*chosen, spec["relation"])
    return is_related and spec["background"] in (None, scene.background)
