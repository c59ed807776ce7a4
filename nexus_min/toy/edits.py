"""Edits of a scene: instruction, target, and the plan that a reply states before the image.

Replace the star with a cross.
-> The small red star on the left becomes a small red cross. Here is the image: <image>
"""

from dataclasses import replace

from .language import CELL_NAMES, cell_name, noun_phrase, reference, with_article, word
from .world import BACKGROUNDS, COLORS, SHAPES, Rng, Scene, choice, jittered, random_object

EDITS = ("recolor", "add", "remove", "replace", "background", "move", "style")


def edit_pair(rng: Rng, kind: str, scene: Scene, zh: bool) -> tuple[Scene, str] | None:
    """(target, instruction) of one kind for a source scene, or None when it does not admit one."""
    if kind == "background":
        color = choice(rng, [b for b in BACKGROUNDS if b != scene.background])
        text = f"把背景换成{word(color, zh)}" if zh else f"Change the background to {color}."
        return replace(scene, background=color), text
    if kind == "style":
        if scene.style == "outline":
            text = "把图形填满" if zh else "Fill in the shapes."
            return replace(scene, style="filled"), text
        text = "改成线条画" if zh else "Turn it into an outline drawing."
        return replace(scene, style="outline"), text
    free = [c for c in range(9) if c not in {o.cell for o in scene.objects}]
    if kind != "add":
        return _edit_object(rng, kind, scene, free, zh)
    if len(scene.objects) == 4:
        return None
    new = random_object(rng, choice(rng, free))
    name, cell = noun_phrase(*new.key[:3], zh), cell_name(new.cell, zh)
    text = f"在{cell}加一个{name}" if zh else f"Add {with_article(name)} {cell}."
    return replace(scene, objects=(*scene.objects, new)), text


def _edit_object(
    rng: Rng, kind: str, scene: Scene, free: list[int], zh: bool
) -> tuple[Scene, str] | None:
    """Remove, recolor, replace or move (to a free cell) an object that has a unique name."""
    old = choice(rng, scene.objects)
    form = reference(rng, scene, old)
    if form is None or (kind == "remove" and len(scene.objects) == 1):
        return None
    name = noun_phrase(*form, zh)
    rest = tuple(o for o in scene.objects if o is not old)
    if kind == "remove":
        return replace(scene, objects=rest), f"去掉{name}" if zh else f"Remove the {name}."
    if kind == "recolor":
        color = choice(rng, [c for c in COLORS if c != old.color])
        new = replace(old, color=color)
        text = f"把{name}变成{word(color, zh)}" if zh else f"Change the {name} to {color}."
    elif kind == "replace":
        new = replace(old, shape=choice(rng, [s for s in SHAPES if s != old.shape]))
        goal = word(new.shape, True) if zh else with_article(new.shape)
        text = f"把{name}换成{goal}" if zh else f"Replace the {name} with {goal}."
    else:
        new = jittered(rng, replace(old, cell=choice(rng, free)))
        goal = word(CELL_NAMES[new.cell], zh)
        text = f"把{name}移到{goal}" if zh else f"Move the {name} to the {goal}."
    return replace(scene, objects=(*rest, new)), text


def plan(scene: Scene, target: Scene, zh: bool) -> str:
    """What happens to the one object that an edit changes; "" for an edit of another kind.

    Cross entropy on these words teaches what a phrase means sooner than the slots' squared error.
    """
    gone = [o for o in scene.objects if o not in target.objects]
    come = [o for o in target.objects if o not in scene.objects]
    if len(gone) != 1:
        return ""
    old, new = gone[0], come[0] if come else None
    name, cell = noun_phrase(*old.key[:3], zh), cell_name(old.cell, zh)
    subject = f"{cell}的{name}" if zh else f"The {name} {cell}"
    if new is None:
        return f"{subject}消失。" if zh else f"{subject} disappears. "
    if new.cell != old.cell:
        goal = word(CELL_NAMES[new.cell], zh)
        return f"{subject}移到{goal}。" if zh else f"{subject} moves to the {goal}. "
    name = noun_phrase(*new.key[:3], zh)
    return f"{subject}变成{name}。" if zh else f"{subject} becomes {with_article(name)}. "
