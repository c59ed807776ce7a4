"""Edits of a scene: instruction, target, and the plan that a reply states before the image.

Replace the star with a cross.
-> The small red star on the left becomes a small red cross. Here is the image: <image>
"""

from dataclasses import replace

from .language import CELL_NAMES, Voice, cell_name, noun_phrase, reference, with_article, word
from .world import BACKGROUNDS, COLORS, SHAPES, Rng, Scene, choice, jittered, random_object

EDITS = ("recolor", "add", "remove", "replace", "background", "move", "style")


def edited(rng: Rng, kind: str, scene: Scene) -> Scene | None:
    """The target of an edit of one kind, or None when the scene does not admit one."""
    if kind == "style":
        return replace(scene, style="filled" if scene.style == "outline" else "outline")
    if kind == "background":
        color = choice(rng, [b for b in BACKGROUNDS if b != scene.background])
        return replace(scene, background=color)
    free = [c for c in range(9) if c not in {o.cell for o in scene.objects}]
    if kind == "add":
        if len(scene.objects) == 4:
            return None
        return replace(scene, objects=(*scene.objects, random_object(rng, choice(rng, free))))
    old = choice(rng, scene.objects)
    # the other kinds change an object that has a unique name
    if sum(o.key[:3] == old.key[:3] for o in scene.objects) > 1:
        return None
    rest = tuple(o for o in scene.objects if o is not old)
    if kind == "remove":
        return replace(scene, objects=rest) if rest else None
    if kind == "recolor":
        new = replace(old, color=choice(rng, [c for c in COLORS if c != old.color]))
    elif kind == "replace":
        new = replace(old, shape=choice(rng, [s for s in SHAPES if s != old.shape]))
    else:
        new = jittered(rng, replace(old, cell=choice(rng, free)))
    return replace(scene, objects=(*rest, new))


def instruction(voice: Voice, scene: Scene, target: Scene) -> str:
    """What a user says to get from one scene to another, which one edit changes."""
    gone = [o for o in scene.objects if o not in target.objects]
    come = [o for o in target.objects if o not in scene.objects]
    if target.style != scene.style:
        key, slots = "fill" if target.style == "filled" else "outline edit", {}
    elif target.background != scene.background:
        key, slots = "rebackground", {"color": voice.word(target.background)}
    elif not gone:
        name, place = voice.noun(come[0].key), voice.place(come[0].cell)
        goal = voice.place(come[0].cell, "goals")
        key, slots = "add", {"a": voice.article(name), "x": name, "place": place, "goal": goal}
    else:
        old, form = gone[0], None
        while form is None:
            form = reference(voice.rng, scene, old)
        key, slots = "remove", {"x": voice.noun(form)}
        if come and come[0].cell != old.cell:
            goal, place = voice.place(come[0].cell, "goals"), voice.place(come[0].cell)
            key, slots = "move", slots | {"goal": goal, "place": place}
        elif come and come[0].shape != old.shape:
            name = voice.noun((come[0].shape, None, None))
            key, slots = "replace", slots | {"a": voice.article(name), "b": name}
        elif come:
            key, slots = "recolor", slots | {"color": voice.word(come[0].color)}
    return voice.utter("polite", voice.say(key, **slots))


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
