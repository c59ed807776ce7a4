"""GenEval's files for the toy world and for any model: prompts in, images and scores out.

A prompt is a JSON line `{"tag", "include": [{"class", "count", "color", "position"}], "exclude",
"prompt"}`; images have the layout of GenEval's scorers (Ghosh et al., 2023). The toy world's
checker stands in for GenEval's detector. It leaves other prompts to an outside scorer.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import batch
from ..pipeline import NexusGen
from . import score
from .language import RELATIONS, is_related
from .prompts import CATEGORIES
from .tasks import Example
from .world import CANVAS, COLORS, SHAPES, Object, Scene

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def metadata(ex: Example) -> dict:
    """A toy prompt of one of CATEGORIES in GenEval's terms, which have no size or background."""
    counts = Counter((shape, color) for shape, color, *_ in ex.spec["objects"])
    include: list[dict] = [
        {"class": shape} | ({"color": color} if color else {}) | {"count": count}
        for (shape, color), count in counts.items()
    ]
    line = {"tag": TAGS[CATEGORIES.index(ex.kind)], "include": include}
    if relation := ex.spec.get("relation"):  # the position of the last object, seen from the first
        first, second = include
        line["include"] = [second, first | {"position": [relation, 0]}]
    if ex.kind == "counting":
        line["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
    return line | {"prompt": ex.text}


def write_lines(path: Path, lines: list[dict]) -> None:
    """Write a JSONL file."""
    rows = [json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("".join(f"{row}\n" for row in rows), "utf-8")


def read_prompts(path: Path) -> list[dict]:
    """The prompts of a file in GenEval's format; an error names the line and the field."""
    prompts = []
    for n, row in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            prompts += [json.loads(row)] if row.strip() else []
        except ValueError as error:
            raise ValueError(f"{path}:{n}: not JSON ({error})") from None
        if row.strip() and (message := problem(prompts[-1])):
            raise ValueError(f"{path}:{n}: {message}")
    if not prompts:
        raise ValueError(f"{path}: holds no prompts")
    return prompts


def problem(line: Any) -> str:
    """The first mistake in a prompt's line, or ""."""
    if not isinstance(line, dict):
        return f"must be an object, not {type(line).__name__}"
    for name in ("tag", "prompt"):
        if not isinstance(line.get(name), str) or not line[name].strip():
            return f"`{name}` must be a text"
    for name in ("include", "exclude"):
        parts = line.get(name, [])
        if not isinstance(parts, list) or (name == "include" and not parts):
            return f"`{name}` must be a list" + (" that is not empty" if name == "include" else "")
        for i, part in enumerate(parts):
            if message := _part_problem(part, len(parts)):
                return f"`{name}[{i}]`{message}"
    return ""


def _part_problem(part: Any, n: int) -> str:
    for name, kind in {"class": str, "count": int}.items():
        if not isinstance(part, dict) or not isinstance(part.get(name), kind):
            return f" needs a `{name}`"
    if not isinstance(part.get("color", ""), str):
        return ": `color` must be a text"
    match part.get("position", ["above", 0]):
        case [str(relation), int(other)] if relation in RELATIONS and 0 <= other < n:
            return ""
    return ": `position` must be [relation, index]"


def _find(scene: Scene, part: dict) -> list[Object]:
    """The objects of a part's class, and of its color if it has one."""
    color = part.get("color")
    return [o for o in scene.objects if o.shape == part["class"] and color in (None, o.color)]


def judge(scene: Scene, line: dict) -> str:
    """Why a scene does not show what a prompt names, or "". `include` needs at least `count`."""
    groups = [_find(scene, part) for part in line["include"]]
    include = list(zip(line["include"], groups, strict=True))
    for part, group in include:
        if len(group) < part["count"]:
            name = " ".join(filter(None, (part.get("color"), part["class"])))
            return f"expected {name} >= {part['count']}, found {len(group)}"
    for part in line.get("exclude", []):
        if (n := len(_find(scene, part))) >= part["count"]:
            return f"expected {part['class']} < {part['count']}, found {n}"
    for part, group in include:
        if "position" in part:
            relation, other = part["position"]
            if not any(is_related(a, b, relation) for a in group for b in groups[other]):
                return f"expected {part['class']} {relation} {line['include'][other]['class']}"
    return ""


def verdict(image: np.ndarray, line: dict) -> dict:
    """`correct` and `reason` for an image uint8 [H, W, 3]; null where the checker cannot tell."""
    parts = [*line["include"], *line.get("exclude", [])]
    is_toy = all(p["class"] in SHAPES and p.get("color", "red") in COLORS for p in parts)
    if not is_toy or image.shape[:2] != (CANVAS, CANVAS):
        reason = "not of the toy world, or not of its size: left to an outside scorer"
        return {"correct": None, "reason": reason}
    reading = score.read(image[None])[0]
    reason = judge(reading.scene, line) if reading.known else "something that is no known shape"
    return {"correct": not reason, "reason": reason}


def summary(rows: Sequence[dict]) -> dict:
    """Scores by category and overall (their mean); null without a judged image."""
    categories = {}
    for tag in dict.fromkeys(row["tag"] for row in rows):
        verdicts = [row["correct"] for row in rows if row["tag"] == tag]
        judged = [v for v in verdicts if v is not None]
        rate = sum(judged) / len(judged) if judged else None
        categories[tag] = {"score": rate, "judged": len(judged), "pictures": len(verdicts)}
    rates = [c["score"] for c in categories.values() if c["score"] is not None]
    return {"categories": categories, "overall": sum(rates) / len(rates) if rates else None}


def evaluate(
    model: NexusGen, prompts: list[dict], folder: Path, samples: int, seed: int, progress, **options
) -> dict:
    """Draw `samples` images of each prompt into `folder` in GenEval's layout, and score them.

    Returns the `summary`, and `results` with one row for each image.
    """
    seeds, rows = range(seed, seed + samples), []
    common = {"task": "generate", **options}
    items = [common | {"prompt": p["prompt"], "seed": s} for p in prompts for s in seeds]
    for result in sorted(batch.run(model, items, progress=progress)):
        number, k = divmod(result.index, samples)
        line, path = prompts[number], folder / f"{number:05d}" / "samples" / f"{k:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path.parents[1] / "metadata.jsonl", [line])
        row = {"filename": str(path), "tag": line["tag"], "prompt": line["prompt"]}
        if result.error:
            row |= {"correct": False, "reason": result.error}
        else:
            result.image.save(path)
            row |= verdict(np.asarray(result.image), line)
        rows.append(row | {"seed": seed + k, "metadata": line})
    return summary(rows) | {"results": rows}
