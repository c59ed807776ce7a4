"""Training data in the official message-like format, from a JSONL file or made on the fly.

A line is `{"id": ..., "images": [path, ...], "messages": [{"role", "content"}, ...]}`; `<image>` in
a content marks each image in order. An image in an assistant's turn is a target: it is cropped to
the center square and resized to the slots' size (252 px at full scale). Every other image keeps its
shape, within the model's pixel bounds. Paper: section "Dataset Curation".

Official: `train/ar/template.py` and the example datasets of modelscope/Nexus-Gen.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..config import NexusGenConfig
from ..formats import read_metadata, save_tensors
from ..images import bound_image, center_crop_view, load_image, smart_resize, to_patches
from ..tokenizer import IGNORE, IMAGE, ROLES, QwenTokenizer, locate_placeholders


class Batch(NamedTuple):
    """What `ar_loss` takes, except the image embeddings: those come from the vision tower."""

    input_ids: Tensor  # [B, L], right-padded
    labels: Tensor  # [B, L]
    slot_mask: Tensor  # [B, L]
    pixel_values: Tensor  # [P, 3*2*14*14] of all images in reading order
    image_grid_thw: Tensor  # [n, 3]


# ---- reading and checking lines ----------------------------------------------------------------


def mistakes(line: Any) -> Iterator[str]:
    """Every field of a line that does not have the format, and why."""
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
    count = sum(m["content"].count(IMAGE) for m in messages)
    if images is not None and count != len(images):
        where = locate_placeholders(messages)
        yield f"{count} {IMAGE} in `messages` for {len(images)} `images`{where}"


def message_mistakes(message: Any) -> Iterator[str]:
    """What is wrong with one message of a line."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        yield f"needs a `role` of {', '.join(ROLES)}"
    content = message.get("content") if isinstance(message, dict) else ""
    if not isinstance(content, str):
        yield f"needs a text `content`, not {type(content).__name__}"
    elif any("\ud800" <= c <= "\udfff" for c in content):
        yield "contains a lone surrogate in its `content`"


def check_line(line: Any, where: str) -> None:
    if mistake := next(mistakes(line), None):
        raise ValueError(f"{where}: {mistake}")


def read_lines(path: Path) -> Iterator[tuple[str, Any, list[str]]]:
    """("file:number", the line, its mistakes) of each line that is not blank."""
    if path.exists() and not path.is_file():  # a pipe would block, and can be read only once
        raise ValueError(f"{path} is not a file; write the data to one, it is read again later")
    lines = [(n, x) for n, x in enumerate(path.read_bytes().split(b"\n"), 1) if x.strip()]
    if not lines:
        yield str(path), None, ["holds no examples"]
    for number, text in lines:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield f"{path}:{number}", None, [f"not JSON ({error})"]
            continue
        found = list(mistakes(line))
        if isinstance(line, dict) and isinstance(images := line.get("images"), list):
            wrong = [i for i, image in enumerate(images) if not image or not isinstance(image, str)]
            found += [f"`images[{i}]` must be a path" for i in wrong]
        yield f"{path}:{number}", line, found


class MessageDataset:
    """The lines of a JSONL file. ValueError with file, line and field of the first mistake."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        rows = list(read_lines(self.path))
        wrong = [f"{where}: {mistake}" for where, _, found in rows for mistake in found]
        if wrong:
            more = f" (and {len(wrong) - 1} more mistakes)" if len(wrong) > 1 else ""
            raise ValueError(wrong[0] + more)
        self.lines = [line for _, line, _ in rows]
        self.where = [where for where, _, _ in rows]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict:
        """One line with the full paths of its images, and `where` it stands."""
        line, folder = self.lines[index], self.path.parent
        images = [find_image(name, folder) for name in line.get("images", [])]
        where = self.where[index] + (f" (id {line['id']!r})" if "id" in line else "")
        return line | {"images": images, "where": where}


def find_image(name: str, folder: Path) -> Path:
    """A path relative to the folder of its file, or else to the nearest folder above that has it.

    Official lines name their images from the root of the repository that holds the file.
    """
    candidates = folder / name, *(above / name for above in folder.resolve().parents)
    try:
        return next((p for p in candidates if p.is_file()), folder / name)
    except OSError:  # too long for a path: opening it reports that
        return folder / name


def check_file(path: Path, config: NexusGenConfig, tokenizer: QwenTokenizer) -> list[str]:
    """Every mistake of a file, unreadable images and overlong lines included."""
    return [
        f"{where}: {mistake}"
        for where, line, wrong in read_lines(path)
        for mistake in wrong or content_mistakes(line, path.parent, config, tokenizer)
    ]


def content_mistakes(line: dict, folder: Path, config, tokenizer) -> list[str]:
    """What is wrong with the images of a well-formed line, or with its length."""
    line, found = line | {"images": [find_image(x, folder) for x in line.get("images", [])]}, []
    for i, path in enumerate(line["images"]):
        try:
            image = load_image(path)
            smart_resize(image.height, image.width)
        except ValueError as error:
            found.append(f"`images[{i}]`: {error}")
    if not found:
        length = collate([line], tokenizer, config).input_ids.shape[1]
        if length > (limit := config.ar.text.max_position_embeddings):
            found.append(f"`messages` are {length} tokens long; the limit of this model is {limit}")
    return found


# ---- lines -> batch ----------------------------------------------------------------------------


def image_roles(messages: Sequence[dict]) -> Iterator[str]:
    """The role of the turn in which each image stands, in order."""
    for message in messages:
        yield from [message["role"]] * message["content"].count(IMAGE)


def image_views(line: dict, config: NexusGenConfig) -> list[Image.Image]:
    """The images of a line as the vision tower reads them: targets cropped, others bounded."""
    vision = config.ar.vision
    bounds = (vision.patch_size * vision.spatial_merge_size, config.min_pixels, config.max_pixels)
    return [
        center_crop_view(load_image(image), config.target_size)
        if role == "assistant"
        else bound_image(load_image(image), *bounds)
        for image, role in zip(line.get("images", []), image_roles(line["messages"]), strict=True)
    ]


def collate(lines: Sequence[dict], tokenizer: QwenTokenizer, config: NexusGenConfig) -> Batch:
    """Encode lines into one right-padded batch; their images are whatever `load_image` takes."""
    for i, line in enumerate(lines):
        check_line(line, f"line {i} of the batch")
    vision, views = config.ar.vision, [image_views(line, config) for line in lines]
    if images := [view for row in views for view in row]:
        sizes = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        pixels, grid = to_patches(images, *sizes)
    else:
        columns = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels, grid = torch.empty(0, columns), torch.empty(0, 3, dtype=torch.long)
    return Batch(
        *encode([line["messages"] for line in lines], grid, tokenizer, config), pixels, grid
    )


def encode(
    conversations: Sequence[Sequence[dict]], grid: Tensor, tokenizer, config: NexusGenConfig
) -> list[Tensor]:
    """ids, labels and slots [B, L], right-padded; grid [n, 3] of all images in reading order."""
    counts = iter((grid.prod(1) // config.ar.vision.spatial_merge_size**2).tolist())
    encoded = [
        tokenizer.encode_training(messages, [next(counts) for _ in image_roles(messages)])
        for messages in conversations
    ]
    columns = zip(*encoded, strict=True)
    fills = (config.ar.pad_token_id, IGNORE, False)
    return [
        pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)
        for rows, fill in zip(columns, fills, strict=True)
    ]


# ---- embeddings computed ahead -----------------------------------------------------------------


class Shards:
    """Tensors of n samples in several safetensors files; rows are read when needed."""

    def __init__(self, files: Sequence[Path], where: Sequence[str] = ()):
        self.files = [safe_open(file, "pt") for file in files]
        self.where = where  # the line that each sample comes from, for messages
        self.names = self.files[0].keys()
        sizes = [file.get_slice(self.names[0]).get_shape()[0] for file in self.files]
        self.starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of some samples, stacked, in fp32."""
        shards = np.searchsorted(self.starts, indices, "right") - 1
        pairs = list(zip(shards, indices - self.starts[shards], strict=True))
        return {
            name: torch.stack([self.files[k].get_slice(name)[int(i)].float() for k, i in pairs])
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
    """Compute the tensors of every sample once, in fp16; return the files of `per_shard` each.

    A whole file with the same `stamp` (what its numbers depend on) is not made again, so a stopped
    run continues with the next one. `share` (rank, processes) makes every processes-th file.
    """
    starts = range(0, len(samples), per_shard)
    files = [folder / f"{k:05d}.safetensors" for k in range(len(starts))]
    folder.mkdir(parents=True, exist_ok=True)
    own = list(zip(files, starts, strict=True))[share[0] :: share[1]]
    for file, start in tqdm(own, desc=folder.name, unit="shard", disable=quiet):
        file_stamp = f"{stamp} {per_shard} {start} of {len(samples)}"
        if read_metadata(file).get("stamp") == file_stamp:
            continue
        rows = [make(sample) for sample in samples[start : start + per_shard]]
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        save_tensors(file, tensors, torch.float16, {"stamp": file_stamp})
    return files
