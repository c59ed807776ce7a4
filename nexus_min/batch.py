"""Many tasks in one call: the AR model reads them one by one, the decoders draw them together.

    item = {"task": "generate", "prompt": ..., "seed": ...} -> Result

First all texts and image embeddings, then all images of each decoder: parts of the model that
visit a small device come once, not once an item. Noise depends on an item's own seed, so an image
is the one that the item gives alone. What is wrong with one item is that item's result. No
equation; the official scripts take one task a call.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from .images import load_image
from .offload import explain_oom
from .sampling import ImageRequest, SamplingParams

TASKS = {
    "understand": ("image", "question"),
    "generate": ("prompt",),
    "edit": ("image", "instruction"),
}
MISTAKES = (ValueError, TypeError, OSError, MemoryError)  # of one item, read from a file perhaps
MAX_ERROR = 500  # characters of one that are kept
UTF8 = {"encoding": "utf-8", "errors": "backslashreplace"}  # half a character: as JSON spells it


class Result(NamedTuple):
    """What became of the item at `index`: an answer, an image, or an error."""

    index: int
    text: str = ""  # the answer, or what is said before the image
    image: Image.Image | None = None
    sampling: SamplingParams | None = None  # of the image
    error: str = ""


def run(
    model: Any,
    items: Sequence[dict],
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
    max_pixels: int | None = None,
) -> Iterator[Result]:
    """The result of every item, as they come; `model` is a `pipeline.NexusGen`.

    An item holds its `task` (one of `TASKS`), what that takes, and options of the method of that
    name; without a seed its own is `seed` + its index. `batch_size` images are drawn at a time,
    fewer when memory is short; `max_pixels` bounds their images, see `load_image`. ValueError for
    a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    drawings: dict[int, ImageRequest] = {}
    with tqdm(total=len(items), unit="item", disable=not progress) as bar:
        for i, item in enumerate(items):
            try:
                said = read(model, item, seed + i, max_pixels)
            except MISTAKES as error:
                said = Result(i, error=one_line(error))
            if isinstance(said, ImageRequest):
                drawings[i] = said
            else:
                bar.update()
                yield said if isinstance(said, Result) else Result(i, said)
        for group in groups(drawings, batch_size):
            for result in draw(model, {i: drawings[i] for i in group}):
                bar.update()
                yield result


def read(model: Any, item: dict, seed: int, max_pixels: int | None = None) -> str | ImageRequest:
    """The AR model's part of an item: the answer, or the drawing to do."""
    if not isinstance(item, dict) or item.get("task") not in TASKS:
        raise ValueError(f"an item needs a `task` of {', '.join(TASKS)}")
    options = {k: v for k, v in item.items() if k not in ("task", "id")}
    if missing := [name for name in TASKS[item["task"]] if name not in options]:
        raise ValueError(f"the task {item['task']} needs {' and '.join(missing)}")
    for name in TASKS[item["task"]]:
        if name != "image" and not isinstance(options[name], str):
            raise ValueError(f"{name} must be a text, not {type(options[name]).__name__}")
    if "image" in TASKS[item["task"]]:
        options["image"] = opened(options["image"], max_pixels)
    if item["task"] == "understand":
        options.pop("seed", None)
        return model.understand(options.pop("image"), options.pop("question"), **options)
    options = {"seed": seed} | options
    if item["task"] == "generate":
        return model.plan_generation(options.pop("prompt"), **options)
    return model.plan_edit(options.pop("image"), options.pop("instruction"), **options)


def opened(image: Any, max_pixels: int | None) -> Any:
    """The image, or the list of images, decoded."""
    if isinstance(image, list):
        return [load_image(one, max_pixels) for one in image]
    return load_image(image, max_pixels)


def groups(drawings: dict[int, ImageRequest], size: int) -> Iterator[list[int]]:
    """Indices of drawings that differ in seed and embeddings alone, at most `size` at a time."""
    alike: dict[Any, list[int]] = {}
    for i, drawing in drawings.items():
        key = drawing.decoder, replace(drawing.sampling, seed=0)
        alike.setdefault(key, []).append(i)
    for key in sorted(alike, key=lambda key: key[0]):  # one decoder after the other
        yield from (alike[key][k : k + size] for k in range(0, len(alike[key]), size))


def draw(model: Any, drawings: dict[int, ImageRequest]) -> Iterator[Result]:
    """Draw all; when that fails, one half after the other, down to the one at fault."""
    items = list(drawings.items())
    try:
        with explain_oom(model.advice):
            pictures = draw_together(model, list(drawings.values()))
    except (ValueError, MemoryError) as error:  # NaN for instance, or no room
        if len(items) == 1:
            yield Result(items[0][0], items[0][1].text, error=one_line(error))
        else:
            half = len(items) // 2
            yield from draw(model, dict(items[:half]))
            yield from draw(model, dict(items[half:]))
        return
    for (i, drawing), picture in zip(items, pictures, strict=True):
        yield Result(i, drawing.text, picture, drawing.sampling)


def one_line(error: BaseException) -> str:
    """What an error says, in printable characters and not too many."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= MAX_ERROR else f"{text[:MAX_ERROR]} ..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@torch.no_grad()
def draw_together(model: Any, drawings: list[ImageRequest]) -> list[Image.Image]:
    """One batch through the decoder and the autoencoder."""
    first = drawings[0]
    embeds = torch.cat([d.embeds for d in drawings])
    references = None
    if first.reference is not None:
        references = torch.cat([d.reference for d in drawings])
    context = model.drawing_context(first._replace(embeds=embeds, reference=references))
    noise = torch.cat([d.sampling.noise(model.config) for d in drawings])
    mmdit = model.part(first.decoder).mmdit
    *_, end = model.denoise_steps(mmdit, context, noise, first.sampling)
    return model.decode(end.x)


def to_folder(
    results: Iterator[Result], folder: Path, save: Callable[[Result, Path], None]
) -> list[dict]:
    """Save images by number and a line an item in `results.jsonl`, as they come: returned.

    In the end the lines are put in the order of the items; a run that is stopped keeps them as they
    came.
    """
    rows: dict[int, dict] = {}
    file, partial = folder / "results.jsonl", folder / ".results.jsonl.partial"

    def line(row: dict) -> str:
        return json.dumps(row, ensure_ascii=False) + "\n"

    with file.open("w", **UTF8) as out:
        for result in results:
            rows[result.index] = row = {"index": result.index, "text": result.text}
            if result.error:
                row["error"] = result.error
            if result.image:
                row |= {"image": f"{result.index:04d}.png"} | asdict(result.sampling)
                save(result, folder / row["image"])
            out.write(line(row))
            out.flush()
    partial.write_text("".join(line(rows[i]) for i in sorted(rows)), **UTF8)
    os.replace(partial, file)
    return [rows[i] for i in sorted(rows)]


def read_items(path: Path) -> list[Any]:
    """Lines of a JSONL file, image paths relative to its folder; what is no JSON stays a string.

    ValueError for what is no regular file: a pipe might never end.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file of tasks")
    items = []
    for row in filter(bytes.strip, path.read_bytes().split(b"\n")):
        try:
            item = json.loads(row)
        except (ValueError, RecursionError):
            item = row.decode("utf-8", "replace")
        if isinstance(item, dict) and "image" in item:
            item["image"] = resolved(item["image"], path.parent)
        items.append(item)
    return items


def resolved(image: Any, folder: Path) -> Any:
    """A path, or a list of paths, seen from `folder`."""
    if isinstance(image, list):
        return [resolved(one, folder) for one in image]
    return folder / image if isinstance(image, str) else image
