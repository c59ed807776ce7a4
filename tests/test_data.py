"""The message-like format: the official shape, what is learned of it, and lines that do not fit."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from test_tokenizer import byte_tokenizer

from nexus_min.config import NexusGenConfig
from nexus_min.images import bound_image, center_crop_view, to_patches
from nexus_min.tokenizer import IGNORE, QwenTokenizer
from nexus_min.toy.stages import toy_line
from nexus_min.toy.tasks import sample_example
from nexus_min.toy.vocabulary import build_tokenizer
from nexus_min.train.data import MessageDataset, collate

CONFIG = NexusGenConfig.tiny()
USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
# The official README's line: a question about an image, then an image drawn, in one conversation.
OFFICIAL = {
    "images": ["images/a.png", "b.jpg"],
    "messages": [
        {"role": "user", "content": "<image> xxx"},
        {"role": "assistant", "content": "xxx"},
        {"role": "user", "content": "xxx"},
        {"role": "assistant", "content": "xxx <image>"},
    ],
}


@pytest.fixture(scope="module")
def tokenizer() -> QwenTokenizer:
    return QwenTokenizer(byte_tokenizer())


@pytest.fixture
def write(tmp_path):
    """write(*lines): the path of a JSONL file; dicts become JSON, strings and bytes stay."""

    def to_bytes(line) -> bytes:
        text = json.dumps(line, ensure_ascii=False) if isinstance(line, dict) else line
        return text if isinstance(text, bytes) else text.encode()

    def file(*lines):
        path = tmp_path / "data.jsonl"
        path.write_bytes(b"\n".join(map(to_bytes, lines)))
        return path

    return file


def picture(seed: int, w: int, h: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save_official(folder) -> tuple[Image.Image, Image.Image]:
    """The two images of OFFICIAL beside its file."""
    a, b = picture(1, 90, 40), picture(2, 50, 70)
    (folder / "images").mkdir()
    a.save(folder / "images/a.png")
    b.save(folder / "b.jpg", format="PNG")  # a lossless file, whatever its name says
    return a, b


# ---- the official shape --------------------------------------------------------------------------


def test_official_line_from_disk(tmp_path, write, tokenizer):
    a, b = save_official(tmp_path)
    data = MessageDataset(write(OFFICIAL | {"id": "x"}))
    assert len(data) == 1 and data[0]["id"] == "x"
    batch = collate([data[0]], tokenizer, CONFIG)
    views = [
        bound_image(a, 28, CONFIG.min_pixels, CONFIG.max_pixels),  # the user's: whole
        center_crop_view(b, CONFIG.target_size),  # the assistant's: a square target
    ]
    pixels, grid = to_patches(views)
    assert torch.equal(batch.pixel_values, pixels) and torch.equal(batch.image_grid_thw, grid)
    assert grid.tolist() == [[1, 6, 12], [1, 8, 8]]


def test_labels_and_slots_are_the_assistants(tmp_path, write, tokenizer):
    save_official(tmp_path)
    batch = collate([MessageDataset(write(OFFICIAL))[0]], tokenizer, CONFIG)
    ids, labels, slots = batch.input_ids[0], batch.labels[0], batch.slot_mask[0]
    pads = ids == CONFIG.ar.image_token_id
    assert pads.sum() == 18 + 16 and slots.sum() == 16  # the user's image is no target
    assert torch.equal(pads.nonzero()[18:], slots.nonzero())
    learned = labels != IGNORE
    assert torch.equal(ids[learned], labels[learned]) and not (learned & slots).any()
    special = {k: tokenizer.special_ids[f"<|{k}|>"] for k in ("vision_start", "vision_end")}
    end = CONFIG.ar.eos_token_id
    want = [*tokenizer.encode("xxx"), end, *tokenizer.encode("xxx "), *special.values(), end]
    assert labels[learned].tolist() == want


def test_rows_are_padded_on_the_right(tokenizer):
    lines = [{"messages": [USER, REPLY]}, {"messages": [USER, REPLY, USER, REPLY]}]
    batch = collate(lines, tokenizer, CONFIG)
    alone = collate(lines[:1], tokenizer, CONFIG)
    n = alone.input_ids.shape[1]
    assert batch.input_ids.shape == batch.labels.shape == batch.slot_mask.shape
    assert torch.equal(batch.input_ids[0, :n], alone.input_ids[0])
    assert (batch.input_ids[0, n:] == CONFIG.ar.pad_token_id).all() and n < len(batch.labels[0])
    assert (batch.labels[0, n:] == IGNORE).all() and not batch.slot_mask.any()
    assert batch.pixel_values.shape == (0, 1176) and batch.image_grid_thw.shape == (0, 3)


def test_images_are_in_reading_order(tokenizer):
    turns = [{"role": "user", "content": "<image><image>?"}, REPLY]
    images = [picture(k, 112, 112) for k in range(3)]
    lines = [{"images": images[:2], "messages": turns}]
    lines += [{"images": [images[2]], "messages": [{"role": "user", "content": "<image>"}, REPLY]}]
    batch = collate(lines, tokenizer, CONFIG)
    assert torch.equal(batch.pixel_values, to_patches(images)[0])


@pytest.mark.parametrize("task", ["understand", "generate", "edit"])
def test_toy_example_through_a_file_is_the_same_batch(tmp_path, write, task):
    tokenizer, rng = QwenTokenizer(build_tokenizer(CONFIG)), np.random.default_rng(5)
    lines = [toy_line(sample_example(rng, task)) for _ in range(3)]
    rows = []
    for i, line in enumerate(lines):
        names = [f"{i}_{k}.png" for k in range(len(line["images"]))]
        for name, image in zip(names, line["images"], strict=True):
            Image.fromarray(image).save(tmp_path / name)
        rows.append(line | {"images": names})
    data = MessageDataset(write(*rows))
    disk = collate([data[i] for i in range(3)], tokenizer, CONFIG)
    memory = collate(lines, tokenizer, CONFIG)
    assert len(memory.pixel_values) > 0
    for name, a, b in zip(memory._fields, memory, disk, strict=True):
        assert torch.equal(a, b), name


# ---- files ---------------------------------------------------------------------------------------


def test_relative_and_absolute_paths(tmp_path, write, monkeypatch):
    monkeypatch.chdir("/")
    line = {"messages": [{"role": "user", "content": "<image><image>"}, REPLY]}
    data = MessageDataset(write(line | {"images": ["a/b.png", "/c/d.png"]}))
    assert list(map(str, data[0]["images"])) == [f"{tmp_path}/a/b.png", "/c/d.png"]
    assert data.lines[0]["images"] == ["a/b.png", "/c/d.png"]


def test_blank_lines_and_odd_separators(write):
    odd = {"messages": [USER | {"content": "one\u2028line \x85 of text 圆"}, REPLY]}
    data = MessageDataset(write("", odd, "  \r", json.dumps({"messages": [USER, REPLY]}) + "\r"))
    assert len(data) == 2 and data[0]["messages"] == odd["messages"]
    assert data[0]["images"] == []


@pytest.mark.parametrize("lines", [(), ("",), (" ", "")])
def test_a_file_without_examples(write, lines):
    with pytest.raises(ValueError, match="data.jsonl: holds no examples"):
        MessageDataset(write(*lines))


BAD = {
    "not JSON": "{",
    "not JSON ": b"\xff\xfe{}",
    "not JSON  ": "[" * 100_000,
    "must be an object, not list": "[]",
    "`messages` must be a list that is not empty": {"images": []},
    "`messages` must be a list that is not empty ": {"messages": []},
    "`messages` must be a list that is not empty  ": {"messages": "hi"},
    "`images` must be a list, not str": {"images": "a.png", "messages": [USER, REPLY]},
    r"`images\[0\]` must be a path": {
        "images": [3],
        "messages": [USER, REPLY | {"content": "<image>"}],
    },
    r"`messages\[0\]` needs a `role` of system, user, assistant": {"messages": ["hi"]},
    r"`messages\[1\]` needs a `role`": {"messages": [USER, {"role": "tool", "content": ""}]},
    r"`messages\[1\]` needs a `role` ": {"messages": [USER, {"role": ["user"], "content": ""}]},
    r"`messages\[1\]` needs a text `content`, not int": {
        "messages": [USER, REPLY | {"content": 3}]
    },
    r"`messages\[1\]` needs a text `content`, not NoneType": {
        "messages": [USER, {"role": "assistant"}]
    },
    r"`messages\[0\]` contains a lone surrogate": json.dumps(
        {"messages": [USER | {"content": "\ud800"}, REPLY]}
    ),
    "`messages` need a turn of the assistant": {"messages": [USER]},
    r"1 <image> in `messages` for 0 `images` \(messages\[1\], assistant: 1\)": {
        "messages": [USER, REPLY | {"content": "<image>"}]
    },
    r"3 <image> .*for 1 `images` \(messages\[0\], user: 2; messages\[3\], assistant: 1\)": {
        "images": ["a.png"],
        "messages": [
            USER | {"content": "<image> <image>"},
            REPLY,
            USER,
            REPLY | {"content": "<image>"},
        ],
    },
    "0 <image> in `messages` for 1 `images`": {"images": ["a.png"], "messages": [USER, REPLY]},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_line_is_named(write, message):
    good = {"messages": [USER, REPLY]}
    with pytest.raises(ValueError, match=r"data\.jsonl:3: .*" + message.strip()) as error:
        MessageDataset(write(good, "", BAD[message], good))
    assert "\n" not in str(error.value)


def test_a_bad_line_in_memory_is_named(tokenizer):
    good, bad = {"messages": [USER, REPLY]}, {"messages": [USER, REPLY | {"content": "<image>"}]}
    with pytest.raises(ValueError, match="line 1 of the batch: 1 <image> in `messages` for 0"):
        collate([good, bad], tokenizer, CONFIG)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a file"):
        MessageDataset(tmp_path / "pipe")


def test_a_missing_image_is_named(write, tokenizer):
    data = MessageDataset(write(OFFICIAL))
    with pytest.raises(ValueError, match="images/a.png"):
        collate([data[0]], tokenizer, CONFIG)
