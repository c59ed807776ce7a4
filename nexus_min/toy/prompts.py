"""Short prompts of GenEval's six categories: what they name, what they mean, what satisfies them.

What a prompt leaves open is canonical: large, filled, on white, fixed cells, one color a shape.
"""

from __future__ import annotations

import numpy as np

from .language import (
    NUMBERS,
    RELATIONS,
    ZH,
    ZH_NUMBERS,
    ZH_RELATIONS,
    a,
    noun,
    place,
    related,
)
from .world import BACKGROUNDS, CANONICAL_COLOR, COLORS, RADIUS, SHAPES, Object, Scene, choice

CATEGORIES = ("single", "two", "counting", "colors", "position", "attribution")
LAYOUTS = {1: (4,), 2: (3, 5), 3: (3, 4, 5), 4: (0, 2, 6, 8)}  # canonical cells
PREFIXES = ("", "a photo of ", "a picture of ", "an image of ")
ZH_PREFIXES = ("", "一张图片：", "一张照片：")


def short_prompt(rng: np.random.Generator, kind: str) -> dict:
    """What a prompt of category `kind` names; None or absent = left open."""
    maybe = lambda items, p: str(choice(rng, items)) if rng.random() < p else None  # noqa: E731
    first, second = (str(s) for s in rng.choice(SHAPES, 2, replace=False))
    colors = [str(c) for c in rng.choice(list(COLORS), 2, replace=False)]
    wanted = {
        "objects": [],
        "background": maybe(list(BACKGROUNDS), 0.5),
        "style": "outline" if rng.random() < 0.15 else None,
    }
    size = maybe(list(RADIUS), 0.5)
    if kind == "single":
        cell = int(rng.integers(9)) if rng.random() < 0.5 else None
        wanted["objects"] = [(first, None, size, cell)]
    elif kind == "colors":
        cell = int(rng.integers(9)) if rng.random() < 0.3 else None
        wanted["objects"] = [(first, colors[0], size, cell)]
    elif kind == "counting":
        color = maybe(list(COLORS), 0.6)
        wanted["objects"] = [(first, color, size, None)] * int(rng.integers(2, 5))
    elif kind == "two":
        other = maybe(list(RADIUS), 0.3) if size else None
        wanted["objects"] = [(first, None, size, None), (second, None, other, None)]
    else:
        named = kind == "attribution" or rng.random() < 0.5
        pair = colors if named else (None, None)
        wanted["objects"] = [(first, pair[0], None, None), (second, pair[1], None, None)]
        if kind == "position":
            wanted["relation"] = choice(rng, list(RELATIONS))
    return wanted


def canonical_scene(wanted: dict) -> Scene:
    """The one scene that a short prompt means: everything left open takes its canonical value."""
    cells = list(LAYOUTS[len(wanted["objects"])])
    if relation := wanted.get("relation"):
        row, column = RELATIONS[relation]
        cells = [4 + 3 * row + column, 4 - 3 * row - column]
    objects = [
        Object(
            shape,
            color or CANONICAL_COLOR[shape],
            size or "large",
            default if cell is None else cell,
        )
        for (shape, color, size, cell), default in zip(wanted["objects"], cells, strict=True)
    ]
    return Scene(tuple(objects), wanted["background"] or "white", wanted["style"] or "filled")


def _word_objects(wanted: dict, zh: bool) -> str:
    objects, relation = wanted["objects"], wanted.get("relation")
    names = [noun(*o[:3], zh) for o in objects]
    n = len(objects)
    if relation:
        if zh:
            return f"{names[0]}在{names[1]}的{ZH_RELATIONS[relation]}"
        return f"{a(names[0])} {relation} {a(names[1])}"
    if len(set(objects)) == 1 and n > 1:
        if zh:
            return f"{ZH_NUMBERS[n]}个{names[0]}"
        return f"{NUMBERS[n]} {noun(*objects[0][:3], False, n)}"
    if zh:
        return "和".join(f"一个{name}" for name in names)
    return " and ".join(a(name) for name in names)


def word_prompt(rng: np.random.Generator, wanted: dict, zh: bool) -> str:
    """One wording of what a short prompt names."""
    body = _word_objects(wanted, zh)
    if (cell := wanted["objects"][0][3]) is not None:
        body += f"，在{place(cell, True)}" if zh else f" {place(cell)}"
    if background := wanted["background"]:
        body += f"，{ZH[background]}背景" if zh else f" on {a(background)} background"
    if wanted["style"]:
        body += "，线条画" if zh else ", outline drawing"
    prefix = choice(rng, ZH_PREFIXES if zh else PREFIXES)
    return prefix + body


def satisfies(scene: Scene, wanted: dict) -> bool:
    """Whether a scene shows what a short prompt names, and no further object; the rest is free."""
    left = list(scene.objects)
    chosen = []
    for shape, color, size, cell in wanted["objects"]:
        named = {"shape": shape, "color": color, "size": size, "cell": cell}
        fits = [o for o in left if all(v is None or getattr(o, k) == v for k, v in named.items())]
        if not fits:
            return False
        left.remove(fits[0])
        chosen.append(fits[0])
    if left or scene.style != (wanted["style"] or "filled"):
        return False
    if wanted["background"] not in (None, scene.background):
        return False
    return not wanted.get("relation") or related(chosen[0], chosen[1], wanted["relation"])
