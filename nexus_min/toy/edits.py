"""Edits of a scene: instruction, target, and the plan that a reply states before the image.

Replace the star with a cross.
-> The small red star on the left becomes a small red cross. Here is the image: <image>
"""

from dataclasses import replace

from .language import CELL_NAMES, cell_name, noun_phrase, reference, with_article, word
from .world import BACKGROUNDS, COLORS, SHAPES, Rng, Scene, choice, jittered, random_object

EDITS = ("recolor", "add", "remove", "replace", "background", "move", "style")
SENTENCES = {
    "recolor": ("Change the {} to {}.", "把{}变成{}"),
    "add": ("Add {} {}.", "在{1}加一个{0}"),
    "remove": ("Remove the {}.", "去掉{}"),
    "replace": ("Replace the {} with {}.", "把{}换成{}"),
    "background": ("Change the background to {}.", "把背景换成{}"),
    "move": ("Move the {} to the {}.", "把{}移到{}"),
    "fill": ("Fill in the shapes.", "把图形填满"),
    "outline": ("Turn it into an outline drawing.", "改成线条画"),
}


def edit_pair(rng: Rng, kind: str, scene: Scene, zh: bool) -> tuple[Scene, str] | None:
    """(target, instruction) of one kind for a source scene, or None when it does not admit one."""
    if kind == "style":
        kind = "fill" if scene.style == "outline" else "outline"
    english, chinese = SENTENCES[kind]
    sentence = chinese if zh else english
    if kind == "background":
        color = choice(rng, [b for b in BACKGROUNDS if b != scene.background])
        return replace(scene, background=color), sentence.format(word(color, zh))
    if kind in ("fill", "outline"):
        return replace(scene, style="filled" if kind == "fill" else "outline"), sentence
    free = [c for c in range(9) if c not in {o.cell for o in scene.objects}]
    if kind == "add":
        if len(scene.objects) == 4:
            return None
        new = random_object(rng, choice(rng, free))
        name = with_article(noun_phrase(*new.key[:3], zh), zh)
        text = sentence.format(name, cell_name(new.cell, zh))
        return replace(scene, objects=(*scene.objects, new)), text
    old = choice(rng, scene.objects)
    form = reference(rng, scene, old)  # the other kinds change an object that has a unique name
    if form is None or (kind == "remove" and len(scene.objects) == 1):
        return None
    name, rest = noun_phrase(*form, zh), tuple(o for o in scene.objects if o is not old)
    if kind == "remove":
        return replace(scene, objects=rest), sentence.format(name)
    if kind == "recolor":
        new = replace(old, color=choice(rng, [c for c in COLORS if c != old.color]))
        goal = word(new.color, zh)
    elif kind == "replace":
        new = replace(old, shape=choice(rng, [s for s in SHAPES if s != old.shape]))
        goal = with_article(word(new.shape, zh), zh)
    else:
        new = jittered(rng, replace(old, cell=choice(rng, free)))
        goal = word(CELL_NAMES[new.cell], zh)
    return replace(scene, objects=(*rest, new)), sentence.format(name, goal)


def plan(scene: Scene, target: Scene, zh: bool) -> str:
    """What happens to the one object that an edit changes; "" for an edit of another kind.

    Cross entropy on these words teaches what a phrase means sooner than the slots' squared error.
    """
    gone = [o for o in scene.objects if o not in target.objects]
    come = [o for o in target.objects if o not in scene.objects]
    if len(gone) != 1:
        return ""
    old = gone[0]
    name, cell = noun_phrase(*old.key[:3], zh), cell_name(old.cell, zh)
    subject = f"{cell}的{name}" if zh else f"The {name} {cell}"
    if not come:
        return f"{subject}消失。" if zh else f"{subject} disappears. "
    new = come[0]
    if new.cell != old.cell:
        goal = word(CELL_NAMES[new.cell], zh)
        return f"{subject}移到{goal}。" if zh else f"{subject} moves to the {goal}. "
    name = with_article(noun_phrase(*new.key[:3], zh), zh)
    return f"{subject}变成{name}。" if zh else f"{subject} becomes {name}. "
