"""Many tasks in one call: the AR model answers them one by one, a decoder samples many images.

    item = {"task": "generate", "prompt": ..., "seed": ...} -> Result

All texts and image embeddings come first, then all images of each decoder: an offloaded part moves
to the device once, not once an item. The noise depends on the item's own seed, so each image is
the one that the item gives alone. An error in one item becomes the result of that item. The
official scripts take one task a call.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from .cli import one_line
from .images import load_image
from .offload import explain_oom
from .pipeline import plan_edit, plan_generation, sample_images
from .sampling import ImageRequest, SamplingParams
from .weights import replace_file

TASKS = dict(understand=["image", "question"], generate=["prompt"], edit=["image", "instruction"])
ITEM_ERRORS = (ValueError, TypeError, OSError, MemoryError)  # an item may hold any JSON
UTF8 = {"encoding": "utf-8", "errors": "backslashreplace"}  # lone surrogates, as JSON spells them


class Result(NamedTuple):
    """The outcome of the item at `index`: an answer, an image, or an error."""

    index: int
    text: str = ""  # the answer, or the reply before the image
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
    """The result of every item, as it comes; `sorted` restores the order of the items.

    model: a `pipeline.NexusGen`. An item holds its `task` (see `TASKS`), the arguments of the
    method of that name, and its options; the seed is by default `seed` + the index. batch_size:
    images sampled at once, halved when memory runs out. max_pixels: of an image, see `load_image`.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    alike: dict[Any, list[tuple[int, ImageRequest]]] = {}  # but for seed and embeddings
    with tqdm(total=len(items), unit="item", disable=not progress) as bar:
        for i, item in enumerate(items):
            try:
                answer = read(model, item, seed + i, max_pixels)
            except ITEM_ERRORS as error:
                answer = Result(i, error=one_line(error))
            if isinstance(answer, ImageRequest):
                key = answer.decoder, replace(answer.sampling, seed=0)
                alike.setdefault(key, []).append((i, answer))
            else:
                bar.update()
                yield answer if isinstance(answer, Result) else Result(i, answer)
        for key in sorted(alike, key=lambda key: key[0]):  # one decoder after the other
            for start in range(0, len(alike[key]), batch_size):
                for result in sample(model, alike[key][start : start + batch_size]):
                    bar.update()
                    yield result


def read(model: Any, item: dict, seed: int, max_pixels: int | None = None) -> str | ImageRequest:
    """The AR model's part of an item: the answer, or the request for an image."""
    if not isinstance(item, dict) or item.get("task") not in TASKS:
        raise ValueError(f"an item needs a `task` of {', '.join(TASKS)}")
    task = item["task"]
    if missing := [name for name in TASKS[task] if name not in item]:
        raise ValueError(f"the task {task} needs {' and '.join(missing)}")
    options = {k: v for k, v in item.items() if k in TASKS[task] or v is not None}
    options = {k: v for k, v in options.items() if k not in ("task", "id")}
    if options.get("image") is not None:
        options["image"] = map_images(lambda i: load_image(i, max_pixels), options["image"])
    if not isinstance(text := options[TASKS[task][-1]], str):
        raise ValueError(f"{TASKS[task][-1]} must be a text, not {type(text).__name__}")
    if task == "understand":
        if wrong := options.keys() - {*TASKS[task], "max_new_tokens", "seed"}:
            raise TypeError(f"unknown option {', '.join(wrong)}; the option is max_new_tokens")
        options.pop("seed", None)
        return model.understand(**options)
    plan = plan_generation if task == "generate" else plan_edit
    with explain_oom(model.advice):
        return plan(model, **{"seed": seed} | options)


def map_images(function: Callable, images: Any) -> Any:
    """`function` of an image, or of each image of a list."""
    return [function(image) for image in images] if isinstance(images, list) else function(images)


def sample(model: Any, requests: list[tuple[int, ImageRequest]]) -> Iterator[Result]:
    """Sample one batch; after an error, each half of it, down to the request at fault."""
    try:
        with explain_oom(model.advice):
            events = sample_images(model, [request for _, request in requests])
            images = [value for name, value in events if name == "image"]
    except (ValueError, MemoryError) as error:
        if middle := len(requests) // 2:
            yield from sample(model, requests[:middle])
            yield from sample(model, requests[middle:])
        else:
            [(i, request)] = requests
            yield Result(i, request.text, error=one_line(error))
        return
    for (i, request), image in zip(requests, images, strict=True):
        yield Result(i, request.text, image, request.sampling)


def to_folder(
    results: Iterator[Result], folder: Path, save: Callable[[Result, Path], None]
) -> list[dict]:
    """Save numbered images, and a line an item in `results.jsonl`; return these lines' values.

    A run that is stopped keeps its lines; a run that ends sorts them by item.
    """
    rows: dict[int, dict] = {}
    file = folder / "results.jsonl"
    with file.open("w", **UTF8) as out:
        for result in results:
            rows[result.index] = row = {"index": result.index, "text": result.text}
            if result.error:
                row["error"] = result.error
            if result.image:
                row |= {"image": f"{result.index:04d}.png"} | asdict(result.sampling)
                save(result, folder / row["image"])
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
    rows = [rows[i] for i in sorted(rows)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_file(file, lambda partial: partial.write_text(lines, **UTF8))
    return rows


def read_items(path: Path) -> list[Any]:
    """Lines of a JSONL file; a line that is not JSON stays a string, and fails alone.

    Image paths are relative to the file's folder.
    """
    if path.exists() and not path.is_file():  # reading a pipe might never end
        raise ValueError(f"{path} is not a file of tasks")

    def resolve(image: Any) -> Any:
        return path.parent / image if isinstance(image, str) else image

    items = []
    for line in filter(bytes.strip, path.read_bytes().split(b"\n")):
        try:
            item = json.loads(line)
        except (ValueError, RecursionError):
            item = line.decode("utf-8", "replace")
        if isinstance(item, dict) and "image" in item:
            item["image"] = map_images(resolve, item["image"])
        items.append(item)
    return items
