"""Training data in the official message-like format, from a JSONL file or made on the fly.

A line is `{"id": ..., "images": [path, ...], "messages": [{"role", "content"}, ...]}`; `<image>` in
a content marks each image in order. An image in an assistant's turn is a target: it is cropped to
the centre square and seen at the slots' size (252 px at full scale). Every other image is read as
the user gave it, within the model's pixel bounds. Paper: section "Dataset Curation".

Official: `train/ar/template.py` and the example datasets of modelscope/Nexus-Gen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..config import NexusGenConfig, VisionConfig
from ..images import (
    bound_image,
    center_crop_view,
    load_image,
    smart_resize,
    to_patches,
)
from ..tokenizer import IGNORE, IMAGE, ROLES, QwenTokenizer, locate_placeholders


class Batch(NamedTuple):
    """What `ar_loss` takes, but for the image embeddings: those come from the vision tower."""

    input_ids: Tensor  # [B, L], right-padded
    labels: Tensor  # [B, L]
    slot_mask: Tensor  # [B, L]
    pixel_values: Tensor  # [P, 3*2*14*14] of all images in reading order
    image_grid_thw: Tensor  # [n, 3]


def check_line(line: Any, where: str) -> None:
    """ValueError naming `where` and the first field at fault when a line is not in the format."""
    for mistake in mistakes(line):
        raise ValueError(f"{where}: {mistake}")


def mistakes(line: Any) -> Iterator[str]:
    """Every field of a line that is not in the format, and why; nothing of a good line."""
    if not isinstance(line, dict):
        yield f"must be an object, not {type(line).__name__}"
        return
    messages, images = line.get("messages"), line.get("images", [])
    if not isinstance(line.get("id", ""), str | int):
        yield f"`id` must be a text or a number, not {type(line['id']).__name__}"
    if not isinstance(images, list | tuple):
        yield f"`images` must be a list, not {type(images).__name__}"
        images = None
    if not isinstance(messages, list | tuple) or not messages:
        yield "`messages` must be a list that is not empty"
        return
    wrong = [f"`messages[{i}]` {x}" for i, m in enumerate(messages) for x in message_mistakes(m)]
    yield from wrong
    if wrong:
        return
    if not any(m["role"] == "assistant" for m in messages):
        yield "`messages` need a turn of the assistant to learn from"
    found = sum(m["content"].count(IMAGE) for m in messages)
    if images is not None and found != len(images):
        message = f"{found} {IMAGE} in `messages` for {len(images)} `images`"
        yield message + locate_placeholders(messages)


def message_mistakes(message: Any) -> Iterator[str]:
    """What a message lacks of a role and a text."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        yield f"needs a `role` of {', '.join(ROLES)}"
    content = message.get("content") if isinstance(message, dict) else ""
    if not isinstance(content, str):
        yield f"needs a text `content`, not {type(content).__name__}"
    elif any("\ud800" <= c <= "\udfff" for c in content):
        yield "holds half a character (a lone surrogate) in its `content`"


class MessageDataset:
    """The lines of a JSONL file; see `find_image` for where their images are looked for.

    Raises ValueError naming file, line and field for the first line that is not in the format, or
    for a file without any; OSError when it cannot be read. Images are opened when they are needed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        rows = list(read_rows(self.path))
        wrong = [f"{where}: {mistake}" for where, _, found in rows for mistake in found]
        if wrong or not rows:
            more = f" (and {len(wrong) - 1} more mistakes)" if len(wrong) > 1 else ""
            raise ValueError(f"{wrong[0]}{more}" if rows else f"{self.path}: holds no examples")
        self.lines = [line for _, line, _ in rows]
        self.where = [where for where, _, _ in rows]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict:
        """One line, its image paths resolved, and `where` it stands."""
        line, folder = self.lines[index], self.path.parent
        images = [find_image(name, folder) for name in line.get("images", [])]
        where = self.where[index] + (f" (id {line['id']!r})" if "id" in line else "")
        return line | {"images": images, "where": where}


def find_image(name: str, folder: Path) -> Path:
    """A path seen from the folder of its file, or else from the nearest folder above that has it.

    Official lines name their images from the root of the repository that holds the file.
    """
    places = folder / name, *(above / name for above in folder.resolve().parents)
    try:
        return next((p for p in places if p.is_file()), folder / name)
    except OSError:  # too long for a path; who opens it says so
        return folder / name


def read_rows(path: Path) -> Iterator[tuple[str, Any, list[str]]]:
    """("file:line", the line, what is wrong with it) of each row that is not blank."""
    if path.exists() and not path.is_file():  # a pipe would be waited for, and is read once
        raise ValueError(f"{path} is not a file; write the data to one, it is read again later")
    rows = path.read_bytes().split(b"\n")  # only these: a text may hold other separators
    for n, row in enumerate(rows, 1):
        if row.strip():
            yield f"{path}:{n}", *read_line(row)


def read_line(text: bytes) -> tuple[Any, list[str]]:
    """One line of a file, and what is wrong with it; its images must be paths."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, [f"not JSON ({error})"]
    found = list(mistakes(line))
    images = line.get("images") if isinstance(line, dict) else None
    for i, image in enumerate(images if isinstance(images, list) else []):
        if not isinstance(image, str) or not image:
            found.append(f"`images[{i}]` must be a path")
    return line, found


def check_file(path: Path, config: NexusGenConfig, tokenizer: QwenTokenizer) -> list[str]:
    """Every mistake of a file, images that cannot be read and overlong lines included.

    Each is "file:line: field and cause". OSError when the file itself cannot be read.
    """
    rows = list(read_rows(path))
    found = [
        f"{where}: {mistake}"
        for where, line, wrong in rows
        for mistake in wrong or content_mistakes(line, path.parent, config, tokenizer)
    ]
    return found if rows else [f"{path}: holds no examples"]


def content_mistakes(
    line: dict, folder: Path, config: NexusGenConfig, tokenizer: QwenTokenizer
) -> Iterator[str]:
    """What is wrong with the images of a well-formed line, or with its length."""
    images, wrong = [find_image(name, folder) for name in line.get("images", [])], False
    for i, image in enumerate(images):
        try:
            opened = load_image(image)
            smart_resize(opened.height, opened.width)
        except ValueError as error:
            wrong = True
            yield f"`images[{i}]`: {error}"
    if wrong:
        return
    length = collate([line | {"images": images}], tokenizer, config).input_ids.shape[1]
    if length > (most := config.ar.text.max_position_embeddings):
        yield f"`messages` are {length} tokens long; this model reads {most}"


def image_roles(messages: Sequence[dict]) -> Iterator[str]:
    """The role of the turn in which each image stands, in order."""
    for message in messages:
        yield from [message["role"]] * message["content"].count(IMAGE)


def image_views(line: dict, config: NexusGenConfig) -> list[Image.Image]:
    """The images of a line as the vision tower sees them: targets cropped, others bounded."""
    vision = config.ar.vision
    bounds = (vision.patch_size * vision.spatial_merge_size, config.min_pixels, config.max_pixels)
    return [
        center_crop_view(load_image(image), config.target_size)
        if role == "assistant"
        else bound_image(load_image(image), *bounds)
        for image, role in zip(line.get("images", []), image_roles(line["messages"]), strict=True)
    ]


def patch_rows(views: list[Image.Image], vision: VisionConfig) -> tuple[Tensor, Tensor]:
    """(pixel_values, image_grid_thw) of any number of images, none included."""
    sizes = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    if views:
        return to_patches(views, *sizes)
    columns = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return torch.empty(0, columns), torch.empty(0, 3, dtype=torch.long)


def collate(lines: Sequence[dict], tokenizer: QwenTokenizer, config: NexusGenConfig) -> Batch:
    """Encode lines in the message format into one right-padded batch.

    Images may also be what `load_image` takes. Raises ValueError naming the line and field at
    fault.
    """
    for i, line in enumerate(lines):
        check_line(line, f"line {i} of the batch")
    views = [image_views(line, config) for line in lines]
    pixels, grid = patch_rows([v for row in views for v in row], config.ar.vision)
    counts = iter((grid.prod(1) // config.ar.vision.spatial_merge_size**2).tolist())
    encoded = [
        tokenizer.encode_training(line["messages"], [next(counts) for _ in row])
        for line, row in zip(lines, views, strict=True)
    ]
    columns = zip(*encoded, strict=True)
    fills = (config.ar.pad_token_id, IGNORE, False)
    padded = [stack(rows, fill) for rows, fill in zip(columns, fills, strict=True)]
    return Batch(*padded, pixels, grid)


def stack(rows: Sequence[list], fill: int | bool) -> Tensor:
    """Lists of any lengths -> [B, L], the short ones filled up at the end."""
    length = max(map(len, rows))
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])


# ---- embeddings computed ahead -----------------------------------------------------------------


class Shards:
    """Tensors of n samples in several safetensors files; rows are read from disk as needed.

    where: the line that each sample comes from, for messages.
    """

    def __init__(self, files: Sequence[Path], where: Sequence[str] = ()):
        self.files, self.where = [safe_open(file, "pt") for file in files], where
        self.names = self.files[0].keys()
        sizes = [file.get_slice(self.names[0]).get_shape()[0] for file in self.files]
        self.starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of some samples, stacked, in fp32."""
        found = []
        for i in indices:
            k = int(np.searchsorted(self.starts, i, "right")) - 1
            found.append((self.files[k], int(i - self.starts[k])))
        return {
            name: torch.stack([file.get_slice(name)[i].float() for file, i in found])
            for name in self.names
        }


def cache_embeddings(
    folder: Path,
    samples: Sequence[Any],
    make: Callable[[Any], dict[str, Tensor]],
    stamp: str,
    per_shard: int = 256,
    share: tuple[int, int] = (0, 1),
    quiet: bool = True,
) -> list[Path]:
    """Compute the tensors of every sample once, in fp16: one file for each `per_shard` of them.

    A file that is whole and bears the same `stamp` (what its numbers depend on) is not made again,
    so a run that was stopped goes on with the next one. `share` (rank, processes) makes every
    processes-th file. Returns the paths of all files.
    """
    starts = range(0, len(samples), per_shard)
    files = [folder / f"{k:05d}.safetensors" for k in range(len(starts))]
    folder.mkdir(parents=True, exist_ok=True)
    own = list(zip(files, starts, strict=True))[share[0] :: share[1]]
    for file, start in tqdm(own, desc=folder.name, unit="shard", disable=quiet):
        mark = {"stamp": f"{stamp} {per_shard} {start} of {len(samples)}"}
        if stamp_of(file) == mark["stamp"]:
            continue
        rows = [make(sample) for sample in samples[start : start + per_shard]]
        tensors = {name: torch.stack([row[name] for row in rows]).half() for name in rows[0]}
        partial = file.with_suffix(f".{os.getpid()}.partial")
        try:
            save_file(tensors, partial, mark)
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
    return files


def stamp_of(file: Path) -> str | None:
    """What a shard depends on; None when it is missing or not whole."""
    try:
        with safe_open(file, "pt") as shard:
            return shard.metadata().get("stamp")
    except (OSError, SafetensorError):
        return None
