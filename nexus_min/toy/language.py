"""Names of objects, cells and scenes of the toy world, in English and Chinese.

Replies use one wording. Users have many: a `Voice` picks them from `wordings.json`.
"""

import json
from pathlib import Path

from .world import Object, Rng, Scene, choice

WORDINGS = json.loads(Path(__file__).with_name("wordings.json").read_text("utf-8"))
PLAIN_SHARE = 0.25  # of users say everything in the first wording
STRANGE_SHARE = 0.04  # of other texts hold a word that means nothing

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
    return phrase + ("es" if phrase.endswith(("s", "x")) else "s")


def with_article(phrase: str, zh: bool = False) -> str:
    return phrase if zh else ("an " if phrase[0] in "aeiou" else "a ") + phrase


def describe_object(obj: Object, zh: bool) -> str:
    """ "a small red star in the center" / "中间有小的红色星形"."""
    name, cell = noun_phrase(*obj.key[:3], zh), cell_name(obj.cell, zh)
    return f"{cell}有{name}" if zh else f"{with_article(name)} {cell}"


def setting(background: str, style: str, zh: bool) -> str:
    """ " on a gray background, outline drawing" / "，灰色背景，线条画"."""
    text = f"，{ZH[background]}背景" if zh else f" on a {background} background"
    return text + ("" if style == "filled" else "，线条画" if zh else ", outline drawing")


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
    if rng.random() < 0.15:
        forms = [(None, obj.color, None)]  # "the red one"
    unique = [f for f in forms if sum(matches(o, f) for o in scene.objects) == 1]
    return choice(rng, unique) if unique else None


class Voice:
    """How one user words things, in one language.

    words: "any", as in training; "plain", the first wording; "as typed", as training never does
    """

    def __init__(self, rng: Rng, zh: bool, words: str = "any"):
        language = "zh" if zh else "en"
        self.rng, self.zh, self.wordings = rng, zh, WORDINGS[language]
        if words == "as typed":
            self.wordings = self.wordings | WORDINGS["as typed"][language]
        self.is_plain = words == "plain" or (words == "any" and rng.random() < PLAIN_SHARE)

    def pick(self, options: list[str], likely: float = 0.0) -> str:
        """One of the wordings; the first one with at least the probability `likely`."""
        is_first = self.is_plain or self.rng.random() < likely
        return options[0] if is_first else choice(self.rng, options)

    def say(self, key: str, *words: str, **slots: str) -> str:
        """A sentence of `wordings.json`."""
        return self.pick(self.wordings[key]).format(*words, **slots)

    def word(self, english: str) -> str:
        """A word or a synonym: "circle" -> "disc"."""
        return self.pick(self.wordings["words"].get(english, [english]), 0.4)

    def noun(self, form: tuple, many: bool = False, is_outline: bool = False) -> str:
        """A (shape, color, size) in words: "small red star", "star in red", "小红星"."""
        shape, color, size = form[:3]
        name = self.word(shape) if shape else self.pick(self.wordings["thing"])
        rest = [self.word(x) for x in (size, color) if x]
        if not self.is_plain and self.rng.random() < 0.15:
            rest = rest[::-1]
        if is_outline:
            rest = [self.pick(self.wordings["outlined"]), *rest]
        if self.zh:
            if not shape and rest:
                rest[-1] = rest[-1].removesuffix("的") + "的"
            likely = [float(x in "小大") if self.is_plain else 0.3 for x in rest]
            of = [
                "的" * (self.rng.random() < p and x[-1] != "的")
                for x, p in zip(rest, likely, strict=True)
            ]
            return "".join(map("".join, zip(rest, of, strict=True))) + name
        name = plural(name) if many else name
        if color and shape and not self.is_plain and self.rng.random() < 0.06:
            return " ".join([*(x for x in rest if x != rest[-1]), name, "in", rest[-1]])
        return " ".join([*rest, name])

    def article(self, phrase: str) -> str:
        """ "a red star", "one red star", or without."""
        if self.zh:
            return self.pick(["", "一个", "一个", "一个", "个", "1个", "一只"]) + phrase
        a = with_article(phrase)
        return self.pick([a, a, a, a, phrase, f"one {phrase}", f"1 {phrase}"], 0.5)

    def number(self, count: int, form: tuple, is_outline: bool = False) -> str:
        """ "three red stars" / "三个红色星形"; one has an article."""
        if count == 1:
            return self.article(self.noun(form, False, is_outline))
        number, name = self.word(NUMBERS[count]), self.noun(form, True, is_outline)
        measure = self.pick(["个", "个", "颗", "只"], 0.6)
        return f"{number}{measure}{name}" if self.zh else f"{number} {name}"

    def place(self, cell: int, key: str = "places") -> str:
        """A cell: "in the top left corner"; as a goal "the top left corner"."""
        return self.pick(self.wordings[key][cell], 0.4)

    def join(self, parts: list[str]) -> str:
        """Parts of a list: "a, b and c"."""
        if len(parts) == 2:
            return self.say("two", a=parts[0], b=parts[1])
        comma, last = ("，", ["，", "、", "和"]) if self.zh else (", ", [", ", " and ", ", and "])
        last = self.pick(last)
        comma = last if last in ("、", " and ") and self.rng.random() < 0.5 else comma
        return last.join(filter(None, (comma.join(parts[:-1]), parts[-1])))

    def setting(self, body: str, background: str | None, is_outline: bool) -> str:
        """A sentence with its background and style."""
        if background:
            body = self.say("on background", body=body, color=self.word(background))
        return self.say("in outline", body=body) if is_outline else body

    def utter(self, key: str, text: str) -> str:
        """What is typed: wrapped in a request, now and then without commas or with odd words."""
        if self.is_plain:
            return text
        is_sentence = "." in text or "。" in text  # no request is put around it
        text = text.translate(dict.fromkeys(map(ord, ".。?？")))
        text = text if is_sentence else self.say(key, text)
        if self.rng.random() < 0.06:
            text = text.replace(" the ", " ")
        if self.rng.random() < 0.12:
            text = text.replace(", ", " ").replace("，", "")
        if self.rng.random() < STRANGE_SHARE:
            odd = "".join(choice(self.rng, "abcdefghiklmnoprstuvw") for _ in range(5))
            text = f"{odd} {text}" if self.rng.random() < 0.5 else f"{text} {odd}"
        return text

    def caption(self, scene: Scene) -> str:
        """Everything of a scene that can be named, less what is large or white at times."""
        if self.is_plain:
            return caption(self.rng, scene, self.zh)
        brief, is_outline = self.rng.random() < 0.4, scene.style == "outline"
        adjective = is_outline and self.rng.random() < 0.15
        parts = []
        for o in (scene.objects[i] for i in self.rng.permutation(len(scene.objects))):
            form = (o.shape, o.color, None if brief and o.size == "large" else o.size)
            name = self.article(self.noun(form, False, adjective))
            parts.append(self.say("placed", object=name, place=self.place(o.cell)))
        bare = scene.background == "white" and self.rng.random() < 0.4
        body = self.join(parts) if len(parts) > 1 else parts[0]
        return self.setting(body, None if bare else scene.background, is_outline and not adjective)
