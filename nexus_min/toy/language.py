"""Names of objects, cells and scenes of the toy world, in English and Chinese."""

from .world import Object, Rng, Scene, choice

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
ZH_RELATIONS = ("左边", "右边", "上方", "下方")
ZH_WORDS = ZH | {
    english: chinese
    for names in ((CELL_NAMES, ZH_CELLS), (NUMBERS, ZH_NUMBERS), (RELATIONS, ZH_RELATIONS))
    for english, chinese in zip(*names, strict=True)
}


def word(english: str, zh: bool) -> str:
    """A word or a cell's name in the language of the example: "red" / "红色"."""
    return ZH_WORDS[english] if zh else english


def cell_name(cell: int, zh: bool = False) -> str:
    """A cell with its preposition: "in the top left corner" / "左上角"."""
    return ZH_CELLS[cell] if zh else f"{CELL_PREPOSITIONS[cell]} the {CELL_NAMES[cell]}"


def noun_phrase(shape: str, color: str | None, size: str | None, zh: bool) -> str:
    """ "small red circle" / "小的红色圆形"; None leaves an attribute out."""
    if zh:
        return (f"{ZH[size]}的" if size else "") + (ZH[color] if color else "") + ZH[shape]
    return " ".join(w for w in (size, color, shape) if w)


def plural(phrase: str) -> str:
    return phrase + ("es" if phrase.endswith("cross") else "s")


def with_article(phrase: str, zh: bool = False) -> str:
    return phrase if zh else ("an " if phrase[0] in "aeiou" else "a ") + phrase


def describe_object(obj: Object, zh: bool) -> str:
    """ "a small red star in the center" / "中间有小的红色星形"."""
    name, cell = noun_phrase(*obj.key[:3], zh), cell_name(obj.cell, zh)
    return f"{cell}有{name}" if zh else f"{with_article(name)} {cell}"


def setting(background: str | None, style: str | None, zh: bool) -> str:
    """ " on a gray background, outline drawing" / "，灰色背景，线条画"; None leaves a part out."""
    text = ""
    if background:
        name = with_article(word(background, zh), zh)
        text = f"，{name}背景" if zh else f" on {name} background"
    if style == "outline":
        text += "，线条画" if zh else ", outline drawing"
    return text


def caption(rng: Rng | None, scene: Scene, zh: bool) -> str:
    """Everything that can be named; objects in random order, or in reading order without `rng`.

    "a small red star in the center, a large blue circle on the left, on a gray background"
    """
    parts = [describe_object(o, zh) for o in sorted(scene.objects, key=lambda o: o.cell)]
    if rng is not None:
        parts = [parts[i] for i in rng.permutation(len(parts))]
    text = "，".join(parts) if zh else ", ".join(parts) + ","
    return text + setting(scene.background, scene.style, zh)


def is_related(first: Object, second: Object, relation: str) -> bool:
    """Whether `first` is `relation` of `second`, by cell."""
    row, column = RELATIONS[relation]
    down, right = first.cell // 3 - second.cell // 3, first.cell % 3 - second.cell % 3
    return down * row + right * column > 0


def matches(obj: Object, form: tuple) -> bool:
    """Whether an object has the (shape, color, size[, cell]) of a form; None matches anything."""
    return all(named in (None, value) for named, value in zip(form, obj.key, strict=False))


def reference(rng: Rng, scene: Scene, obj: Object) -> tuple | None:
    """A (shape, color, size) that only `obj` matches, with None for omitted attributes."""
    forms = [(obj.shape, None, None), (obj.shape, obj.color, None), obj.key[:3]]
    unique = [f for f in forms if sum(matches(o, f) for o in scene.objects) == 1]
    return choice(rng, unique) if unique else None
