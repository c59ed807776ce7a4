"""Edits of a scene: instruction, target, and the plan that a reply tells before the image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .language import CELL_NAMES, ZH, a, noun, place, reference
from .world import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    STYLES,
    Object,
    Scene,
    choice,
    jittered,
    random_object,
)

EDITS = ("recolor", "add", "remove", "replace", "background", "move", "style")


def edit_pair(
    rng: np.random.Generator, kind: str, scene: Scene, zh: bool
) -> tuple[Scene, str] | None:
    """(target, instruction) of one kind for a source scene, or None when it does not admit one."""
    if kind in ("background", "style"):
        return _edit_whole(rng, kind, scene, zh)
    free = [c for c in range(9) if c not in {o.cell for o in scene.objects}]
    if kind == "add":
        if len(scene.objects) == 4:
            return None
        new = random_object(rng, choice(rng, free))
        name = noun(new.shape, new.color, new.size, zh)
        text = (
            f"在{place(new.cell, True)}加一个{name}" if zh else f"Add {a(name)} {place(new.cell)}."
        )
        return replace(scene, objects=(*scene.objects, new)), text
    obj = choice(rng, scene.objects)
    ref = reference(rng, scene, obj)
    if ref is None or (kind == "remove" and len(scene.objects) == 1):
        return None
    name = noun(*ref, zh)
    rest = tuple(o for o in scene.objects if o is not obj)
    if kind == "remove":
        return replace(scene, objects=rest), f"去掉{name}" if zh else f"Remove the {name}."
    new, text = _edit_object(rng, kind, obj, name, free, zh)
    return replace(scene, objects=(*rest, new)), text


def _edit_whole(rng: np.random.Generator, kind: str, scene: Scene, zh: bool) -> tuple[Scene, str]:
    if kind == "background":
        color = choice(rng, [b for b in BACKGROUNDS if b != scene.background])
        text = f"把背景换成{ZH[color]}" if zh else f"Change the background to {color}."
        return replace(scene, background=color), text
    style = STYLES[1 - STYLES.index(scene.style)]
    words = {
        "outline": ("Turn it into an outline drawing.", "改成线条画"),
        "filled": ("Fill in the shapes.", "把图形填满"),
    }[style]
    return replace(scene, style=style), words[zh]


def _edit_object(
    rng: np.random.Generator, kind: str, obj: Object, name: str, free: list[int], zh: bool
) -> tuple[Object, str]:
    """The object called `name` after a recolor, replace or move to a free cell; the text."""
    if kind == "recolor":
        color = choice(rng, [c for c in COLORS if c != obj.color])
        text = f"把{name}变成{ZH[color]}" if zh else f"Change the {name} to {color}."
        return replace(obj, color=color), text
    if kind == "replace":
        shape = choice(rng, [s for s in SHAPES if s != obj.shape])
        text = f"把{name}换成{ZH[shape]}" if zh else f"Replace the {name} with {a(shape)}."
        return replace(obj, shape=shape), text
    new = jittered(rng, replace(obj, cell=choice(rng, free)))
    goal = CELL_NAMES[new.cell]
    text = f"把{name}移到{place(new.cell, True)}" if zh else f"Move the {name} to the {goal}."
    return new, text


def plan(scene: Scene, target: Scene, zh: bool) -> str:
    """What happens to the one object that an edit changes, and where; "" for any other edit.

    Said before the image, behind what the model sees, it is a question answered: cross entropy
    teaches what a phrase means far sooner than the squared error of a few slots does, and the slots
    read the words.
    """
    gone = [o for o in scene.objects if o not in target.objects]
    come = [o for o in target.objects if o not in scene.objects]
    if len(gone) != 1:
        return ""
    old = gone[0]
    name = noun(old.shape, old.color, old.size, zh)
    subject = f"{place(old.cell, True)}的{name}" if zh else f"The {name} {place(old.cell)}"
    if not come:
        return f"{subject}消失。" if zh else f"{subject} disappears. "
    new = come[0]
    if new.cell != old.cell:
        goal = place(new.cell, True) if zh else f"the {CELL_NAMES[new.cell]}"
        return f"{subject}移到{goal}。" if zh else f"{subject} moves to {goal}. "
    name = noun(new.shape, new.color, new.size, zh)
    return f"{subject}变成{name}。" if zh else f"{subject} becomes {a(name)}. "
