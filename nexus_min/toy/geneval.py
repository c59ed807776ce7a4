"""GenEval's files for the toy world and for any model: prompts in, images and scores out.

A prompt is a JSON line `{"tag", "include": [{"class", "count", "color", "position"}], "exclude",
"prompt"}`; images lie as GenEval's scorers expect them (`00000/metadata.jsonl`,
`00000/samples/0000.png`). GenEval (Ghosh et al., 2023) reads images with a detector; here the
checker of the toy world does, for prompts of that world. Others are drawn and left to an outside
scorer, their `correct` null. The overall score is the mean over categories, as GenEval's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import batch
from ..pipeline import NexusGen
from . import score
from .language import RELATIONS, related
from .prompts import CATEGORIES
from .tasks import Example
from .world import CANVAS, COLORS, SHAPES, Object, Scene

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TAG = dict(zip(CATEGORIES, TAGS, strict=True))


# ---- prompts -----------------------------------------------------------------------------------


def metadata(ex: Example) -> dict:
    """A toy prompt of one of CATEGORIES in GenEval's terms; sizes and backgrounds have none."""
    include: list[dict] = []
    for shape, color, *_ in ex.wanted["objects"]:
        known = {"class": shape} | ({"color": color} if color else {})
        same = [x for x in include if {k: x[k] for k in x if k != "count"} == known]
        if same:
            same[0]["count"] += 1
        else:
            include.append(known | {"count": 1})
    line: dict[str, Any] = {"tag": TAG[ex.kind], "include": include}
    if relation := ex.wanted.get("relation"):  # the position of the last one, seen from the first
        first, second = include
        line["include"] = [second, first | {"position": [relation, 0]}]
    if ex.kind == "counting":
        line["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
    return line | {"prompt": ex.text}


def read_prompts(path: Path) -> list[dict]:
    """The lines of a file in GenEval's format. ValueError naming the line and field at fault."""
    rows = [(n, row) for n, row in enumerate(path.read_bytes().split(b"\n"), 1) if row.strip()]
    lines = []
    for n, row in rows:
        try:
            lines.append(json.loads(row))
        except ValueError as error:
            raise ValueError(f"{path}:{n}: not JSON ({error})") from None
        if mistake := next(mistakes(lines[-1]), None):
            raise ValueError(f"{path}:{n}: {mistake}")
    if not lines:
        raise ValueError(f"{path}: holds no prompts")
    return lines


def mistakes(line: Any) -> Iterator[str]:
    """What is wrong with a prompt's line."""
    if not isinstance(line, dict):
        yield f"must be an object, not {type(line).__name__}"
        return
    for name in ("tag", "prompt"):
        if not isinstance(line.get(name), str) or not line[name].strip():
            yield f"`{name}` must be a text"
    for name in ("include", "exclude"):
        parts = line.get(name, [])
        if not isinstance(parts, list) or (name == "include" and not parts):
            yield f"`{name}` must be a list" + (" that is not empty" if name == "include" else "")
            continue
        for i, part in enumerate(parts):
            if not isinstance(part, dict) or not isinstance(part.get("class"), str):
                yield f"`{name}[{i}]` needs a `class`"
            elif not isinstance(part.get("count"), int):
                yield f"`{name}[{i}]` needs a `count`"
            elif not isinstance(part.get("color", ""), str):
                yield f"`{name}[{i}]`: `color` must be a text"
            elif "position" in part and not is_position(part["position"], len(parts)):
                yield f"`{name}[{i}]`: `position` must be [relation, index]"


def is_position(value: Any, n: int) -> bool:
    """Whether it is a relation to one of n parts."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and value[0] in RELATIONS
        and isinstance(value[1], int)
        and 0 <= value[1] < n
    )


# ---- scores ------------------------------------------------------------------------------------


def in_toy_world(line: dict) -> bool:
    """Whether the checker knows all that a prompt names."""
    parts = [*line["include"], *line.get("exclude", [])]
    return all(p["class"] in SHAPES and p.get("color", "red") in COLORS for p in parts)


def found(scene: Scene, part: dict) -> list[Object]:
    """The objects that are of a part's class, and of its color if it has one."""
    color = part.get("color")
    return [o for o in scene.objects if o.shape == part["class"] and color in (None, o.color)]


def judge(scene: Scene, line: dict) -> str:
    """Why a scene does not show what a line wants; "" when it does. At least `count` of each."""
    groups = [found(scene, part) for part in line["include"]]
    for part, group in zip(line["include"], groups, strict=True):
        if len(group) < part["count"]:
            name = " ".join(filter(None, (part.get("color"), part["class"])))
            return f"expected {name} >= {part['count']}, found {len(group)}"
    for part in line.get("exclude", []):
        if len(found(scene, part)) >= part["count"]:
            return f"expected {part['class']} < {part['count']}, found {len(found(scene, part))}"
    for part, group in zip(line["include"], groups, strict=True):
        if "position" in part:
            relation, other = part["position"]
            pairs = [(a, b) for a in group for b in groups[other]]
            if not any(related(a, b, relation) for a, b in pairs):
                return f"expected {part['class']} {relation} {line['include'][other]['class']}"
    return ""


def verdict(picture: np.ndarray, line: dict) -> dict:
    """`correct` and `reason` of an image uint8 [H, W, 3]; null where the checker cannot tell."""
    if not in_toy_world(line) or picture.shape[:2] != (CANVAS, CANVAS):
        reason = "not of the toy world, or not of its size: left to an outside scorer"
        return {"correct": None, "reason": reason}
    reading = score.read(picture[None])[0]
    reason = judge(reading.scene, line) if reading.known else "something that is no known shape"
    return {"correct": not reason, "reason": reason}


def summary(rows: Sequence[dict]) -> dict:
    """Scores by category and overall (their mean); null without a judged image."""
    categories = {}
    for tag in dict.fromkeys(row["tag"] for row in rows):
        judged = [
            row["correct"] for row in rows if row["tag"] == tag and row["correct"] is not None
        ]
        pictures = sum(row["tag"] == tag for row in rows)
        rate = sum(judged) / len(judged) if judged else None
        categories[tag] = {"score": rate, "judged": len(judged), "pictures": pictures}
    rates = [c["score"] for c in categories.values() if c["score"] is not None]
    return {"categories": categories, "overall": sum(rates) / len(rates) if rates else None}


# ---- images ----------------------------------------------------------------------------------


def evaluate(
    model: NexusGen,
    lines: Sequence[dict],
    folder: Path,
    samples: int = 4,
    seed: int = 0,
    progress: bool = False,
    **options,
) -> dict:
    """Draw `samples` images of each prompt into `folder` in GenEval's layout, and score them.

    Returns `results` (a row an image: filename, tag, prompt, correct, reason, seed, metadata) and
    what `summary` makes of them.
    """
    items = [
        {"task": "generate", "prompt": line["prompt"], "seed": seed + k, **options}
        for line in lines
        for k in range(samples)
    ]
    rows = []
    for result in sorted(batch.run(model, items, progress=progress)):
        number, k = divmod(result.index, samples)
        line, home = lines[number], folder / f"{number:05d}"
        file = home / "samples" / f"{k:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        (home / "metadata.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", "utf-8")
        row = {"filename": os.fspath(file), "tag": line["tag"], "prompt": line["prompt"]}
        if result.error:
            row |= {"correct": False, "reason": result.error}
        else:
            result.image.save(file)
            row |= verdict(np.asarray(result.image), line)
        rows.append(row | {"seed": seed + k, "metadata": line})
    return summary(rows) | {"results": rows}
