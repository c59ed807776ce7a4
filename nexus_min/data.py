"""Training data in the official message-like format, from a JSONL file or made on the fly.

A line is `{"id": ..., "images": [path, ...], "messages": [{"role", "content"}, ...]}`; `<image>` in a content
marks each image in order. An image in an assistant's turn is a target: it is cropped to the centre square and
seen at the slots' size (252 px at full scale). Every other image is read as the user gave it, within the
model's pixel bounds. Official: `train/ar/template.py` and the example datasets of modelscope/Nexus-Gen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import NexusGenConfig
from .image_processor import bound_image, center_crop_view, load_image, to_patches
from .tokenizer import IGNORE, IMAGE, ROLES, QwenTokenizer


class Batch(NamedTuple):
    """What `ar_loss` takes, but for the image embeddings: those come from the vision tower."""

    input_ids: Tensor  # [B, L], right-padded
    labels: Tensor  # [B, L]
    slot_mask: Tensor  # [B, L]
    pixel_values: Tensor  # [P, 1176] of all images in reading order
    image_grid_thw: Tensor  # [n, 3]


def check_line(line: Any, where: str) -> None:
    """ValueError naming `where` and the field at fault when a line is not in the format."""
    if not isinstance(line, dict) or not isinstance(line.get("messages"), list | tuple):
        raise ValueError(f"{where}: needs a list `messages`")
    images = line.get("images", [])
    if not isinstance(images, list | tuple):
        raise ValueError(f"{where}: `images` must be a list, not {type(images).__name__}")
    for i, message in enumerate(line["messages"]):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"{where}: messages[{i}] needs a role of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: messages[{i}] needs a text `content`")
    places = sum(m["content"].count(IMAGE) for m in line["messages"])
    if places != len(images):
        raise ValueError(f"{where}: {places} {IMAGE} placeholders for {len(images)} images")


class MessageDataset:
    """The lines of a JSONL file; image paths are relative to the file's folder.

    Raises ValueError naming file, line and field for the first line that is not in the format.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.lines = []
        for number, text in enumerate(self.path.read_text("utf-8").splitlines(), 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{self.path}:{number}: not JSON: {error}") from error
            check_line(line, f"{self.path}:{number}")
            self.lines.append(line)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict:
        """One line, its image paths resolved."""
        line = self.lines[index]
        return line | {"images": [self.path.parent / p for p in line.get("images", [])]}


def image_roles(messages: Sequence[dict]) -> Iterator[str]:
    """The role of the turn in which each image stands, in order."""
    for message in messages:
        yield from [message["role"]] * message["content"].count(IMAGE)


def image_views(line: dict, config: NexusGenConfig) -> list:
    """The pictures of a line as the vision tower sees them: targets cropped, others bounded."""
    bounds = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    return [
        center_crop_view(load_image(image), config.target_size)
        if role == "assistant"
        else bound_image(load_image(image), **bounds)
        for image, role in zip(line.get("images", []), image_roles(line["messages"]), strict=True)
    ]


def collate(
    lines: Sequence[dict], tokenizer: QwenTokenizer, config: NexusGenConfig
) -> Batch:
    """Encode lines in the message format into one right-padded batch."""
    views = [image_views(line, config) for line in lines]
    flat = [view for row in views for view in row]
    pixels, grid = to_patches(flat) if flat else (torch.empty(0, 1176), torch.empty(0, 3).long())
    merge = config.ar.vision.spatial_merge_size
    counts = iter((grid.prod(1) // merge**2).tolist())
    encoded = [
        tokenizer.encode_training(line["messages"], [next(counts) for _ in row])
        for line, row in zip(lines, views, strict=True)
    ]
    length = max(len(e.ids) for e in encoded)
    pad = config.ar.pad_token_id

    def stack(rows: list[list], fill) -> Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows])

    return Batch(
        stack([e.ids for e in encoded], pad),
        stack([e.labels for e in encoded], IGNORE),
        stack([e.slot_mask for e in encoded], False),
        pixels,
        grid,
    )


Sampler = Callable[[Any, int], list[dict]]  # (rng, n) -> n lines
