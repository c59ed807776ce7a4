"""What is asked in the toy world: prompts, captions, questions and edits, in English and Chinese.

Every example is a conversation in the official message-like format (`images`, `messages` with
`<image>`; paper, section 4.1) plus what a checker needs. A prompt names some attributes of a scene;
what it leaves open is canonical (large, filled, on white, fixed cells, one colour a shape). One
scene in ten is held out by hash: training never shows it, asks for it or edits from or to it, in
any task, wording or language. The six prompt categories are GenEval's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import numpy as np

from ..tokenizer import EDITING_PROMPT, EDITING_REPLY, GENERATION_PROMPT, GENERATION_REPLY, IMAGE
from .world import (
    BACKGROUNDS,
    CANONICAL_COLOUR,
    COLOURS,
    RADIUS,
    SHAPES,
    STYLES,
    Object,
    Scene,
    held_out,
    jittered,
    random_object,
    random_scene,
    random_texture,
)

CATEGORIES = ("single", "two", "counting", "colours", "position", "attribution")
QUESTIONS = ("colour", "shape", "count", "count_all", "exist", "where", "background", "relation")
EDITS = ("recolour", "add", "remove", "replace", "background", "move", "style")

# the nine cells: a place ("in the top left corner") and where things are moved ("to the ...")
CELL_NAMES = (
    "top left corner", "top", "top right corner", "left", "center", "right",
    "bottom left corner", "bottom", "bottom right corner",
)  # fmt: skip
CELL_PREPOSITIONS = ("in", "at", "in", "on", "in", "on", "in", "at", "in")
ZH_CELLS = ("左上角", "上方", "右上角", "左边", "中间", "右边", "左下角", "下方", "右下角")
ZH = {
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "cross": "十字形",
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色",
    "orange": "橙色", "cyan": "青色", "pink": "粉色", "white": "白色", "gray": "灰色",
    "black": "黑色", "brown": "棕色", "small": "小", "large": "大",
}  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four")
ZH_NUMBERS = ("零", "一", "两", "三", "四")
# (row, column) of the first object seen from the second
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
ZH_RELATIONS = {"left of": "左边", "right of": "右边", "above": "上方", "below": "下方"}
LAYOUTS = {1: (4,), 2: (3, 5), 3: (3, 4, 5), 4: (0, 2, 6, 8)}  # canonical cells
PREFIXES = ("", "a photo of ", "a picture of ", "an image of ")
ZH_PREFIXES = ("", "一张图片：", "一张照片：")


@dataclass(frozen=True)
class Example:
    """One conversation with its pictures (as scenes), and what it takes to score the reply."""

    task: str  # "understand", "generate", "edit", or "talk": several of these
    kind: str  # of CATEGORIES, "caption", QUESTIONS (several joined by "+"), "describe", EDITS
    language: str
    scenes: tuple[Scene, ...]  # the pictures, in the order of their <image> placeholders
    messages: tuple[dict, ...]
    text: str  # the bare prompt, question or instruction
    answer: str = ""  # to the first question, or what an edit's reply says will change, or ""
    wanted: dict = field(default_factory=dict)  # what a short prompt names, for `satisfies`

    @property
    def unseen(self) -> bool:
        """Whether one of its scenes is held out; all wordings of a prompt mean one scene."""
        return any(held_out(scene.key) for scene in self.scenes)


def _choice(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


def place(cell: int, zh: bool = False) -> str:
    """Where a cell is: "in the top left corner"."""
    return ZH_CELLS[cell] if zh else f"{CELL_PREPOSITIONS[cell]} the {CELL_NAMES[cell]}"


def plural(shape: str) -> str:
    """Plural of a shape's name."""
    return shape + ("es" if shape == "cross" else "s")


def noun(shape: str, colour: str | None, size: str | None, zh: bool, number: int = 1) -> str:
    """ "small red circle(s)" / "小的红色圆形"; None leaves an attribute out."""
    if zh:
        return "".join((f"{ZH[size]}的" if size else "", ZH[colour] if colour else "", ZH[shape]))
    words = [size, colour, shape if number == 1 else plural(shape)]
    return " ".join(w for w in words if w)


def a(phrase: str) -> str:
    """With its indefinite article."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


# ---------------------------------------------------------------- prompts


def _short_prompt(rng: np.random.Generator, kind: str) -> dict:
    """What a prompt of category `kind` names; None or absent = left open."""
    maybe = lambda items, p: str(_choice(rng, items)) if rng.random() < p else None  # noqa: E731
    first, second = (str(s) for s in rng.choice(SHAPES, 2, replace=False))
    colours = [str(c) for c in rng.choice(list(COLOURS), 2, replace=False)]
    wanted = {
        "objects": [],
        "background": maybe(list(BACKGROUNDS), 0.5),
        "style": "outline" if rng.random() < 0.15 else None,
    }
    size = maybe(list(RADIUS), 0.5)
    if kind == "single":
        cell = int(rng.integers(9)) if rng.random() < 0.5 else None
        wanted["objects"] = [(first, None, size, cell)]
    elif kind == "colours":
        cell = int(rng.integers(9)) if rng.random() < 0.3 else None
        wanted["objects"] = [(first, colours[0], size, cell)]
    elif kind == "counting":
        colour = maybe(list(COLOURS), 0.6)
        wanted["objects"] = [(first, colour, size, None)] * int(rng.integers(2, 5))
    elif kind == "two":
        other = maybe(list(RADIUS), 0.3) if size else None
        wanted["objects"] = [(first, None, size, None), (second, None, other, None)]
    else:
        named = kind == "attribution" or rng.random() < 0.5
        pair = colours if named else (None, None)
        wanted["objects"] = [(first, pair[0], None, None), (second, pair[1], None, None)]
        if kind == "position":
            wanted["relation"] = _choice(rng, list(RELATIONS))
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
            colour or CANONICAL_COLOUR[shape],
            size or "large",
            default if cell is None else cell,
        )
        for (shape, colour, size, cell), default in zip(wanted["objects"], cells, strict=True)
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


def _word_prompt(rng: np.random.Generator, wanted: dict, zh: bool) -> str:
    """One wording of what a short prompt names."""
    body = _word_objects(wanted, zh)
    if (cell := wanted["objects"][0][3]) is not None:
        body += f"，在{place(cell, True)}" if zh else f" {place(cell)}"
    if background := wanted["background"]:
        body += f"，{ZH[background]}背景" if zh else f" on {a(background)} background"
    if wanted["style"]:
        body += "，线条画" if zh else ", outline drawing"
    prefix = _choice(rng, ZH_PREFIXES if zh else PREFIXES)
    return prefix + body


def in_order(scene: Scene) -> list[Object]:
    """Its objects as one reads, cell by cell."""
    return sorted(scene.objects, key=lambda o: o.cell)


def _word_placed(obj: Object, zh: bool) -> str:
    """All that can be named about an object: "a small red star in the center"."""
    name = noun(obj.shape, obj.colour, obj.size, zh)
    return f"{place(obj.cell, True)}有{name}" if zh else f"{a(name)} {place(obj.cell)}"


def caption(rng: np.random.Generator | None, scene: Scene, zh: bool) -> str:
    """All that can be named about a scene; objects shuffled, or in reading order without rng."""
    objects = in_order(scene)
    if rng is not None:
        objects = [objects[i] for i in rng.permutation(len(objects))]
    parts = [_word_placed(o, zh) for o in objects]
    if zh:
        style = "，线条画" if scene.style == "outline" else ""
        return "，".join(parts) + f"，{ZH[scene.background]}背景{style}"
    style = ", outline drawing" if scene.style == "outline" else ""
    return ", ".join(parts) + f", on {a(scene.background)} background{style}"


def _generation(kind: str, zh: bool, text: str, scene: Scene, wanted: dict) -> Example:
    language = "zh" if zh else "en"
    messages = (
        {"role": "user", "content": GENERATION_PROMPT[language].format(text)},
        {"role": "assistant", "content": GENERATION_REPLY[language]},
    )
    return Example("generate", kind, language, (scene,), messages, text, wanted=wanted)


def generation_example(rng: np.random.Generator, kind: str, zh: bool, most: int = 4) -> Example:
    """A prompt of one of CATEGORIES, or a long "caption" of a scene of at most `most` objects."""
    if kind == "caption":
        scene = random_scene(rng, int(rng.integers(1, most + 1)))
        return _generation(kind, zh, caption(rng, scene, zh), scene, {})
    wanted = _short_prompt(rng, kind)
    scene = canonical_scene(wanted)
    scene = replace(scene, objects=tuple(jittered(rng, o) for o in scene.objects))
    return _generation(kind, zh, _word_prompt(rng, wanted, zh), scene, wanted)


def satisfies(scene: Scene, wanted: dict) -> bool:
    """Whether a scene shows what a short prompt names, and no further object; the rest is free."""
    left = list(scene.objects)
    chosen = []
    for shape, colour, size, cell in wanted["objects"]:
        named = {"shape": shape, "colour": colour, "size": size, "cell": cell}
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


def related(first: Object, second: Object, relation: str) -> bool:
    """Whether `first` is `relation` of `second`, by cell."""
    row, column = RELATIONS[relation]
    down, right = first.cell // 3 - second.cell // 3, first.cell % 3 - second.cell % 3
    return down * row + right * column > 0


# ---------------------------------------------------------------- referring to objects


def _fits(obj: Object, form: tuple) -> bool:
    pairs = zip(form, (obj.shape, obj.colour, obj.size), strict=True)
    return all(named in (None, value) for named, value in pairs)


def reference(rng: np.random.Generator, scene: Scene, obj: Object) -> tuple | None:
    """(shape, colour, size) that names `obj` alone, as short as chance has it, or None."""
    forms = (
        (obj.shape, None, None),
        (obj.shape, obj.colour, None),
        (obj.shape, obj.colour, obj.size),
    )
    unique = [f for f in forms if sum(_fits(o, f) for o in scene.objects) == 1]
    return _choice(rng, unique) if unique else None


# ---------------------------------------------------------------- questions


Asked = tuple[str, str, str]  # question, what is thought before the answer or "", answer


def final(said: str) -> str:
    """The answer behind what was thought: "a star at the top, ... a star at the top: star"."""
    return re.split("[:.] |[：。]", said)[-1].strip()


def _verdicts(names: list[str], asked: str, zh: bool) -> str:
    """One object after the other, whether it is what is `asked`: "star yes, circle no"."""
    yes, no, gap = ("是", "不是", "，") if zh else (" yes", " no", ", ")
    return gap.join(name + (yes if name == asked else no) for name in names)


def _reply(thought: str, answer: str, zh: bool) -> str:
    return thought + ("：" if zh else ": ") + answer if thought else answer


def _sees(scene: Scene, zh: bool) -> str:
    """What is said first of a picture that nothing has been said of."""
    return caption(None, scene, zh) + ("。" if zh else ". ")


def _ask(rng: np.random.Generator, kind: str, scene: Scene, zh: bool) -> Asked | None:
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
    obj = _choice(rng, scene.objects)
    if kind in ("shape", "colour"):
        return _ask_attribute(kind, scene, obj, zh)
    if kind == "exist":
        return _ask_existence(rng, scene, obj, zh)
    if (ref := reference(rng, scene, obj)) is None:
        return None
    if zh:
        return f"{noun(*ref, True)}在哪里？", _word_placed(obj, True), place(obj.cell, True)
    return f"Where is the {noun(*ref, False)}?", _word_placed(obj, False), place(obj.cell)


def _ask_whole(kind: str, scene: Scene, zh: bool) -> Asked:
    if kind == "background":
        if zh:
            return "背景是什么颜色？", "", ZH[scene.background]
        return "What color is the background?", "", scene.background
    question = "一共有几个图形？" if zh else "How many objects are there?"
    return question, "", (ZH_NUMBERS if zh else NUMBERS)[len(scene.objects)]


def _ask_attribute(kind: str, scene: Scene, obj: Object, zh: bool) -> Asked | None:
    """The colour of the only object of its shape, or the shape of the only one of its colour."""
    known = {"colour": "shape", "shape": "colour"}[kind]
    if sum(getattr(o, known) == getattr(obj, known) for o in scene.objects) > 1:
        return None
    thought = _word_placed(obj, zh)
    if kind == "shape":
        if zh:
            return f"{ZH[obj.colour]}的图形是什么形状？", thought, ZH[obj.shape]
        return f"What shape is the {obj.colour} object?", thought, obj.shape
    if zh:
        return f"{ZH[obj.shape]}是什么颜色？", thought, ZH[obj.colour]
    return f"What color is the {obj.shape}?", thought, obj.colour


def _ask_count(rng: np.random.Generator, scene: Scene, zh: bool) -> Asked:
    shape = _choice(rng, scene.objects).shape if rng.random() < 0.7 else _choice(rng, SHAPES)
    names = [noun(o.shape, None, None, zh) for o in in_order(scene)]
    asked = noun(shape, None, None, zh)
    question = f"有几个{asked}？" if zh else f"How many {plural(shape)} are there?"
    number = (ZH_NUMBERS if zh else NUMBERS)[names.count(asked)]
    return question, _verdicts(names, asked, zh), number


def _ask_existence(rng: np.random.Generator, scene: Scene, obj: Object, zh: bool) -> Asked:
    shape, colour = obj.shape, obj.colour
    if rng.random() < 0.5:  # a near miss half of the time: one attribute changed
        if rng.random() < 0.5:
            shape = _choice(rng, SHAPES)
        else:
            colour = _choice(rng, list(COLOURS))
    names = [noun(o.shape, o.colour, None, zh) for o in in_order(scene)]
    asked = noun(shape, colour, None, zh)
    thought, found = _verdicts(names, asked, zh), asked in names
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
    rows_or_columns = [_along(o.cell, axis, zh) for o in (first, second)]
    thought = gap.join([_word_placed(first, zh), _word_placed(second, zh), *rows_or_columns])
    if zh:
        question = f"{one}在{two}的{ZH_RELATIONS[relation]}吗？"
        return question, thought, "是" if yes else "不是"
    return f"Is the {one} {relation} the {two}?", thought, "yes" if yes else "no"


def _along(cell: int, axis: int, zh: bool) -> str:
    """A cell's row (axis 0) or column, called as the one that crosses the center there."""
    crossing = cell // 3 * 3 + 1 if axis == 0 else 3 + cell % 3
    return (ZH_CELLS if zh else CELL_NAMES)[crossing]


def question_example(rng: np.random.Generator, kind: str, zh: bool, most: int = 4) -> Example:
    """A question of one of QUESTIONS, or "describe", about a random scene (a quarter textured).

    `kind` may name several, joined by "+": asked one after the other about one picture. Before the
    first answer the model says what it sees, and before each what decides it: the object, a verdict
    on each object, two rows or columns. So what a question means is looked up in words: that is
    learnt far sooner than finding in a picture what a word means.
    """
    kinds = kind.split("+")
    least = 2 if kinds[0] == "relation" else 1
    asked: list[Asked] = []
    while not asked:
        scene = random_scene(rng, int(rng.integers(least, max(least, most) + 1)), detail=0.25)
        for k in kinds:
            found = _ask(rng, k, scene, zh)
            if found and found not in asked:
                asked.append(found)
            elif not asked:
                break
    sees = "" if kinds[0] == "describe" else _sees(scene, zh)
    messages = []
    for question, thought, answer in asked:
        said = _reply(thought, answer, zh)
        messages += [
            {"role": "user", "content": question if messages else IMAGE + question},
            {"role": "assistant", "content": said if messages else sees + said},
        ]
    language, (text, _, answer) = "zh" if zh else "en", asked[0]
    return Example("understand", kind, language, (scene,), tuple(messages), text, answer)


# ---------------------------------------------------------------- edits


def _edit_pair(
    rng: np.random.Generator, kind: str, scene: Scene, zh: bool
) -> tuple[Scene, str] | None:
    """(target, instruction) of one kind for a source scene, or None when it does not admit one."""
    if kind in ("background", "style"):
        return _edit_whole(rng, kind, scene, zh)
    free = [c for c in range(9) if c not in {o.cell for o in scene.objects}]
    if kind == "add":
        if len(scene.objects) == 4:
            return None
        new = random_object(rng, _choice(rng, free))
        name = noun(new.shape, new.colour, new.size, zh)
        text = (
            f"在{place(new.cell, True)}加一个{name}" if zh else f"Add {a(name)} {place(new.cell)}."
        )
        return replace(scene, objects=(*scene.objects, new)), text
    obj = _choice(rng, scene.objects)
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
        colour = _choice(rng, [b for b in BACKGROUNDS if b != scene.background])
        text = f"把背景换成{ZH[colour]}" if zh else f"Change the background to {colour}."
        return replace(scene, background=colour), text
    style = STYLES[1 - STYLES.index(scene.style)]
    words = {
        "outline": ("Turn it into an outline drawing.", "改成线条画"),
        "filled": ("Fill in the shapes.", "把图形填满"),
    }[style]
    return replace(scene, style=style), words[zh]


def _edit_object(
    rng: np.random.Generator, kind: str, obj: Object, name: str, free: list[int], zh: bool
) -> tuple[Object, str]:
    """The object called `name` after a recolour, replace or move to a free cell; the text."""
    if kind == "recolour":
        colour = _choice(rng, [c for c in COLOURS if c != obj.colour])
        text = f"把{name}变成{ZH[colour]}" if zh else f"Change the {name} to {colour}."
        return replace(obj, colour=colour), text
    if kind == "replace":
        shape = _choice(rng, [s for s in SHAPES if s != obj.shape])
        text = f"把{name}换成{ZH[shape]}" if zh else f"Replace the {name} with {a(shape)}."
        return replace(obj, shape=shape), text
    new = jittered(rng, replace(obj, cell=_choice(rng, free)))
    goal = CELL_NAMES[new.cell]
    text = f"把{name}移到{place(new.cell, True)}" if zh else f"Move the {name} to the {goal}."
    return new, text


def edit_example(
    rng: np.random.Generator, kind: str, zh: bool, most: int = 4, detail: float = 0.6
) -> Example:
    """An edit of one of EDITS; both ways occur alike (add / remove, there / back)."""
    least = 2 if kind == "remove" else 1
    while True:
        scene = random_scene(rng, int(rng.integers(least, max(least, most) + 1)))
        if rng.random() < detail:
            scene = replace(scene, texture=random_texture(rng))
        if pair := _edit_pair(rng, kind, scene, zh):
            break
    target, text = pair
    language = "zh" if zh else "en"
    told, reply = plan(scene, target, zh), EDITING_REPLY[language]
    thought = _sees(scene, zh) + told if rng.random() < TELLS else ""
    messages = (
        {"role": "user", "content": EDITING_PROMPT.format(text)},
        {"role": "assistant", "content": thought + reply},
    )
    return Example("edit", kind, language, (scene, target), messages, text, told.strip())


def plan(scene: Scene, target: Scene, zh: bool) -> str:
    """What happens to the one object that an edit changes, and where; "" for any other edit.

    Said before the picture, behind what the model sees, it is a question answered: cross entropy
    teaches what a phrase means far sooner than the squared error of a few slots does, and the slots
    read the words.
    """
    gone = [o for o in scene.objects if o not in target.objects]
    come = [o for o in target.objects if o not in scene.objects]
    if len(gone) != 1:
        return ""
    old = gone[0]
    name = noun(old.shape, old.colour, old.size, zh)
    subject = f"{place(old.cell, True)}的{name}" if zh else f"The {name} {place(old.cell)}"
    if not come:
        return f"{subject}消失。" if zh else f"{subject} disappears. "
    new = come[0]
    if new.cell != old.cell:
        goal = place(new.cell, True) if zh else f"the {CELL_NAMES[new.cell]}"
        return f"{subject}移到{goal}。" if zh else f"{subject} moves to {goal}. "
    name = noun(new.shape, new.colour, new.size, zh)
    return f"{subject}变成{name}。" if zh else f"{subject} becomes {a(name)}. "


# ---------------------------------------------------------------- conversations


def talk_example(rng: np.random.Generator, kind: str, zh: bool, most: int = 4) -> Example:
    """A task of one `kind` ("understand", "generate", "edit") and two turns about what came of it.

    These are questions and edits of the latest picture, which is not shown again.
    """
    first = MAKERS[kind](rng, _random_kind(rng, kind).split("+")[0], zh, most)
    scenes, messages, said_of = list(first.scenes), list(first.messages), kind == "understand"
    for _ in range(2):
        scene, sees = scenes[-1], "" if said_of else _sees(scenes[-1], zh)
        if rng.random() < 0.5:
            if not (pair := _edit_pair(rng, _random_kind(rng, "edit"), scene, zh)):
                continue
            target, text = pair
            reply = plan(scene, target, zh) + EDITING_REPLY[first.language]
            scenes.append(target)
        else:
            if not (asked := _ask(rng, rng.choice(QUESTIONS, p=QUESTION_SHARES), scene, zh)):
                continue
            text, reply = asked[0], _reply(*asked[1:], zh)
        said_of = scene is scenes[-1]
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": sees + reply})
    return replace(first, task="talk", kind=kind, scenes=tuple(scenes), messages=tuple(messages))


# ---------------------------------------------------------------- the mixture

MAKERS = {
    "understand": question_example,
    "generate": generation_example,
    "edit": edit_example,
    "talk": talk_example,
}
ZH_SHARE = 0.3
TURNS = 4  # most questions in a conversation
QUESTION_SHARES = np.array([3, 5, 4, 1, 4, 4, 1, 5]) / 27  # what is hard is asked often
TELLS = 0.9  # of the replies to an edit say what is seen, and what will change, before the picture
# what refers to an object takes longest to learn
EDIT_SHARES = np.array([5, 3, 3, 4, 1, 3, 1]) / 20


def example(
    rng: np.random.Generator,
    task: str,
    kind: str | None = None,
    zh: bool | None = None,
    most: int = 4,
    unseen: bool = False,
) -> Example:
    """A random example of a task, seen or `unseen` in training.

    Kind and language are those of the training mixture unless given. Captions are 20 % short, 80 %
    long in the paper; here 40 % are short, since they carry six categories.
    """
    while True:
        zh_now = rng.random() < ZH_SHARE if zh is None else zh
        found = MAKERS[task](rng, kind or _random_kind(rng, task), zh_now, most)
        if found.unseen == unseen:
            return found


def _random_kind(rng: np.random.Generator, task: str) -> str:
    if task == "generate":
        return _choice(rng, CATEGORIES) if rng.random() < 0.4 else "caption"
    if task == "understand":  # several turns about one picture: more answers for the same work
        if rng.random() < 0.2:
            return "describe"
        return "+".join(rng.choice(QUESTIONS, TURNS, p=QUESTION_SHARES))
    if task == "talk":
        return _choice(rng, ("understand", "generate", "generate", "edit"))
    return str(rng.choice(EDITS, p=EDIT_SHARES))
