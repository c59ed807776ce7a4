"""What things are called in the toy world, in English and Chinese: objects, places, scenes."""

from __future__ import annotations

import numpy as np

from .world import Object, Scene, choice

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


def place(cell: int, zh: bool = False) -> str:
    """Where a cell is: "in the top left corner"."""
    return ZH_CELLS[cell] if zh else f"{CELL_PREPOSITIONS[cell]} the {CELL_NAMES[cell]}"


def plural(shape: str) -> str:
    """Plural of a shape's name."""
    return shape + ("es" if shape == "cross" else "s")


def noun(shape: str, color: str | None, size: str | None, zh: bool, number: int = 1) -> str:
    """ "small red circle(s)" / "小的红色圆形"; None leaves an attribute out."""
    if zh:
        return "".join((f"{ZH[size]}的" if size else "", ZH[color] if color else "", ZH[shape]))
    words = [size, color, shape if number == 1 else plural(shape)]
    return " ".join(w for w in words if w)


def a(phrase: str) -> str:
    """With its indefinite article."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def in_order(scene: Scene) -> list[Object]:
    """Its objects as one reads, cell by cell."""
    return sorted(scene.objects, key=lambda o: o.cell)


def word_placed(obj: Object, zh: bool) -> str:
    """All that can be named about an object: "a small red star in the center"."""
    name = noun(obj.shape, obj.color, obj.size, zh)
    return f"{place(obj.cell, True)}有{name}" if zh else f"{a(name)} {place(obj.cell)}"


def caption(rng: np.random.Generator | None, scene: Scene, zh: bool) -> str:
    """All that can be named about a scene; objects shuffled, or in reading order without rng."""
    objects = in_order(scene)
    if rng is not None:
        objects = [objects[i] for i in rng.permutation(len(objects))]
    parts = [word_placed(o, zh) for o in objects]
    if zh:
        style = "，线条画" if scene.style == "outline" else ""
        return "，".join(parts) + f"，{ZH[scene.background]}背景{style}"
    style = ", outline drawing" if scene.style == "outline" else ""
    return ", ".join(parts) + f", on {a(scene.background)} background{style}"


def row_or_column(cell: int, axis: int, zh: bool) -> str:
    """A cell's row (axis 0) or column, called as the one that crosses the center there."""
    crossing = cell // 3 * 3 + 1 if axis == 0 else 3 + cell % 3
    return (ZH_CELLS if zh else CELL_NAMES)[crossing]


def related(first: Object, second: Object, relation: str) -> bool:
    """Whether `first` is `relation` of `second`, by cell."""
    row, column = RELATIONS[relation]
    down, right = first.cell // 3 - second.cell // 3, first.cell % 3 - second.cell % 3
    return down * row + right * column > 0


def fits(obj: Object, form: tuple) -> bool:
    """Whether an object has the (shape, color, size) named; None names nothing."""
    pairs = zip(form, (obj.shape, obj.color, obj.size), strict=True)
    return all(named in (None, value) for named, value in pairs)


def reference(rng: np.random.Generator, scene: Scene, obj: Object) -> tuple | None:
    """(shape, color, size) that names `obj` alone, as short as chance has it, or None."""
    forms = (
        (obj.shape, None, None),
        (obj.shape, obj.color, None),
        (obj.shape, obj.color, obj.size),
    )
    unique = [f for f in forms if sum(fits(o, f) for o in scene.objects) == 1]
    return choice(rng, unique) if unique else None
