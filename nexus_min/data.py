"""Training data in the official message-like format, from a JSONL file or made on the fly.

A line is `{"id": ..., "images": [path, ...], "messages": [{"role", "content"}, ...]}`; `<image>` in
a content marks each image in order. An image in an assistant's turn is a target: it is cropped to
the centre square and seen at the slots' size (252 px at full scale). Every other image is read as
the user gave it, within the model's pixel bounds. Paper: section "Dataset Curation".

Official: `train/ar/template.py` and the example datasets of modelscope/Nexus-Gen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .config import NexusGenConfig, VisionConfig
from .image_processor import bound_image, center_crop_view, load_image, to_patches
from .tokenizer import IGNORE, IMAGE, ROLES, QwenTokenizer


class Batch(NamedTuple):
    """What `ar_loss` takes, but for the image embeddings: those come from the vision tower."""

    input_ids: Tensor  # [B, L], right-padded
    labels: Tensor  # [B, L]
    slot_mask: Tensor  # [B, L]
    pixel_values: Tensor  # [P, 3*2*14*14] of all images in reading order
    image_grid_thw: Tensor  # [n, 3]


def check_line(line: Any, where: str) -> None:
    """ValueError naming `where` and the field at fault when a line is not in the format."""
    if not isinstance(line, dict):
        raise ValueError(f"{where}: must be an object, not {type(line).__name__}")
    messages, images = line.get("messages"), line.get("images", [])
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"{where}: `messages` must be a list that is not empty")
    if not isinstance(images, list | tuple):
        raise ValueError(f"{where}: `images` must be a list, not {type(images).__name__}")
    for i, message in enumerate(messages):
        check_message(message, f"{where}: `messages[{i}]`")
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError(f"{where}: `messages` need a turn of the assistant to learn from")
    places = sum(m["content"].count(IMAGE) for m in messages)
    if places != len(images):
        raise ValueError(f"{where}: {places} {IMAGE} in `messages` for {len(images)} `images`")


def check_message(message: Any, where: str) -> None:
    """ValueError unless a message has a role and a text."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ValueError(f"{where} needs a `role` of {', '.join(ROLES)}")
    content = message.get("content")
    if not isinstance(content, str):
        raise ValueError(f"{where} needs a text `content`, not {type(content).__name__}")
    if any("\ud800" <= c <= "\udfff" for c in content):
        raise ValueError(f"{where} holds half a character (a lone surrogate) in its `content`")


class MessageDataset:
    """The lines of a JSONL file; image paths are relative to the file's folder.

    Raises ValueError naming file, line and field for the first line that is not in the format, or
    for a file without any; OSError when it cannot be read. Images are opened when they are needed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        rows = self.path.read_bytes().split(b"\n")  # only these: a text may hold other separators
        numbered = [(n, row) for n, row in enumerate(rows, 1) if row.strip()]
        self.lines = [read_line(row, f"{self.path}:{n}") for n, row in numbered]
        if not self.lines:
            raise ValueError(f"{self.path}: holds no examples")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict:
        """One line, its image paths resolved."""
        line = self.lines[index]
        return line | {"images": [self.path.parent / p for p in line.get("images", [])]}


def read_line(text: bytes, where: str) -> dict:
    """One line of a file, checked; its images must be paths."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    check_line(line, where)
    for i, image in enumerate(line.get("images", [])):
        if not isinstance(image, str) or not image:
            raise ValueError(f"{where}: `images[{i}]` must be a path")
    return line


def image_roles(messages: Sequence[dict]) -> Iterator[str]:
    """The role of the turn in which each image stands, in order."""
    for message in messages:
        yield from [message["role"]] * message["content"].count(IMAGE)


def image_views(line: dict, config: NexusGenConfig) -> list[Image.Image]:
    """The pictures of a line as the vision tower sees them: targets cropped, others bounded."""
    vision = config.ar.vision
    bounds = (vision.patch_size * vision.spatial_merge_size, config.min_pixels, config.max_pixels)
    return [
        center_crop_view(load_image(image), config.target_size)
        if role == "assistant"
        else bound_image(load_image(image), *bounds)
        for image, role in zip(line.get("images", []), image_roles(line["messages"]), strict=True)
    ]


def patch_rows(views: list[Image.Image], vision: VisionConfig) -> tuple[Tensor, Tensor]:
    """(pixel_values, image_grid_thw) of any number of pictures, none included."""
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
