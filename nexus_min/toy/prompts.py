"""Short prompts of GenEval's six categories: what they name, how they say it, what satisfies them.

A *spec* holds what a prompt names; None, or an absent key, leaves an attribute open:
{"objects": [("star", "red", None, None), ("cross", None, None, None)], "background": None,
"style": None, "relation": "left of"} is "a photo of a red star left of a cross". In the true image
each open attribute has one canonical value: large, filled, on white, fixed cells and colors.
"""

from . import language as lang
from .world import BACKGROUNDS, CANONICAL_COLOR, COLORS, RADIUS, SHAPES, Object, Rng, Scene, choice

CATEGORIES = ("single", "two", "counting", "colors", "position", "attribution")
LAYOUTS = {1: (4,), 2: (3, 5), 3: (3, 4, 5), 4: (0, 2, 6, 8)}  # canonical cells
PREFIXES = ("", "a photo of ", "a picture of ", "an image of ")
ZH_PREFIXES = ("", "一张图片：", "一张照片：")


def short_prompt(rng: Rng, kind: str) -> dict:
    """The spec of a random prompt of category `kind`."""

    def maybe(items, probability: float):
        return choice(rng, items) if rng.random() < probability else None

    first, second = rng.choice(SHAPES, 2, replace=False).tolist()
    colors = rng.choice(list(COLORS), 2, replace=False).tolist()
    background = maybe(list(BACKGROUNDS), 0.5)
    spec = {"background": background, "style": "outline" if rng.random() < 0.15 else None}
    size = maybe(list(RADIUS), 0.5)
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


def phrase_prompt(rng: Rng, spec: dict, zh: bool) -> str:
    """A random wording of a spec."""
    objects, relation = spec["objects"], spec.get("relation")
    names = [lang.noun_phrase(*o[:3], zh) for o in objects]
    if len(objects) > 1 and len(set(objects)) == 1:
        number = lang.word(lang.NUMBERS[len(objects)], zh)
        text = f"{number}个{names[0]}" if zh else f"{number} {lang.plural(names[0])}"
    elif zh and relation:
        text = f"{names[0]}在{names[1]}的{lang.word(relation, zh)}"
    elif zh:
        text = "和".join(f"一个{name}" for name in names)
    else:
        text = f" {relation or 'and'} ".join(lang.with_article(name) for name in names)
    if (cell := objects[0][3]) is not None:
        text += f"，在{lang.cell_name(cell, zh)}" if zh else f" {lang.cell_name(cell)}"
    text += lang.setting(spec["background"], spec["style"], zh)
    return choice(rng, ZH_PREFIXES if zh else PREFIXES) + text


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
