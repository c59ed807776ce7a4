"""Batches: each item's result is the one it gives alone, and a bad item fails alone."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import make_tiny, save_tiny

from nexus_min import batch as batches
from nexus_min.__main__ import main
from nexus_min.chat import Chat
from nexus_min.pipeline import NexusGen

FAST = {"fast_preamble": True, "num_steps": 2}
VALID = "the options are height, width, num_steps, cfg_scale, guidance, negative_prompt, seed"


@pytest.fixture(scope="module")
def tiny() -> NexusGen:
    return make_tiny()


def results_of(model: NexusGen, items: list, **options) -> list[batches.Result]:
    """The results in the order of the items."""
    return sorted(batches.run(model, items, **options))


def photo() -> Image.Image:
    return Image.linear_gradient("L").resize((50, 30)).convert("RGB")


def mixed() -> list[dict]:
    edit = {"task": "edit", "image": photo(), "instruction": "white", **FAST}
    return [
        {"task": "generate", "prompt": "a circle", **FAST},
        {"task": "understand", "image": photo(), "question": "what?", "max_new_tokens": 3},
        edit,
        {"task": "generate", "prompt": "a red star", "seed": 40, "cfg_scale": 2.0, **FAST},
        {"task": "generate", "prompt": "一个圆", **FAST},
        edit | {"decoder": "generation"},
        edit | {"instruction": "black"},
        {"task": "generate", "prompt": "a much longer prompt", "height": 96, "width": 48, **FAST},
        {
            "task": "understand",
            "image": Image.new("L", (9, 70)),
            "question": "?",
            "max_new_tokens": 2,
        },
    ]


def alone(model: NexusGen, item: dict, index: int):
    """The item through its own method."""
    item = {"seed": index} | item
    task = item.pop("task")
    if task == "understand":
        item.pop("seed")
    return getattr(model, task)(*[item.pop(n) for n in batches.TASKS[task]], **item)


def test_a_batch_is_its_items_one_by_one(tiny):
    items = mixed()
    results = results_of(tiny, items, batch_size=2)
    assert [r.index for r in results] == list(range(len(items)))
    assert not any(r.error for r in results)
    for i, (item, result) in enumerate(zip(items, results, strict=True)):
        want = alone(tiny, item, i)
        if item["task"] == "understand":
            assert result.text == want and result.image is None
        else:
            assert result.sampling.seed == item.get("seed", i)
            difference = np.asarray(result.image, int) - np.asarray(want, int)
            assert abs(difference).max() <= 1  # a batch may round differently


def test_alike_items_are_drawn_together(tiny, monkeypatch):
    sizes = []
    whole = batches.sample_images
    monkeypatch.setattr(
        batches, "sample_images", lambda m, d: sizes.append((d[0].decoder, len(d))) or whole(m, d)
    )
    results_of(tiny, [*mixed(), {"task": "generate", "prompt": "b", **FAST}], batch_size=3)
    want = [("editing", 2), *[("generation", 1)] * 3, ("generation", 3)]
    assert sorted(sizes) == want  # cfg 2, a size, one left; an edit can go with the prompts


def bad_items() -> list:
    return [
        ("not JSON", "needs a `task`"),
        ({"prompt": "a"}, "needs a `task` of understand, generate, edit"),
        ({"task": "generate"}, "the task generate needs prompt"),
        ({"task": "edit", "prompt": "a"}, "the task edit needs image and instruction"),
        ({"task": "generate", "prompt": " "}, "the prompt is empty"),
        ({"task": "generate", "prompt": 3}, "prompt must be a text, not int"),
        ({"task": "generate", "prompt": "a", "color": 1}, f"unknown option color; {VALID}, lang"),
        ({"task": "edit", "image": photo(), "instruction": "a", "x": 1}, f"option x; {VALID}, dec"),
        ({"task": "understand", "image": photo(), "question": "a", "x": 1}, "is max_new_tokens"),
        ({"task": "generate", "prompt": "a", "seed": -1}, "seed must be"),
        ({"task": "generate", "prompt": "a", "height": "x"}, "height must be a whole number"),
        ({"task": "generate", "prompt": "a", "height": 64.5}, "height must be a whole number"),
        ({"task": "generate", "prompt": "a", "seed": True}, "seed must be a whole number"),
        ({"task": "generate", "prompt": "a", "num_steps": 1.5}, "num_steps must be a whole"),
        ({"task": "generate", "prompt": "a", "cfg_scale": [1]}, "cfg_scale must be a number"),
        (
            {"task": "generate", "prompt": "a", "guidance": 1e39},
            "guidance must be a number from 0 to 1000",
        ),
        ({"task": "generate", "prompt": "a", "guidance": float("nan")}, "guidance must be"),
        ({"task": "generate", "prompt": "a", "negative_prompt": 5}, "negative_prompt must be"),
        ({"task": "generate", "prompt": "a", "negative_prompt": "\ud800"}, "not valid Unicode"),
        ({"task": "generate", "prompt": "a", "\x1b[31m": 1}, "\\x1b[31m"),
        ({"task": "generate", "prompt": "a", "\ud800": 1}, "\\ud800"),
        ({"task": "edit", "image": "none.png", "instruction": "a"}, "no such file"),
        ({"task": "understand", "image": b"no image", "question": "a"}, "cannot read image"),
    ]


def test_bad_items_fail_alone(tiny):
    bad, good = bad_items(), {"task": "generate", "prompt": "a circle", "seed": 1, **FAST}
    results = results_of(tiny, [item for item, _ in bad] + [good])
    for (item, message), result in zip(bad, results, strict=False):
        assert message in result.error and result.image is None, (item, result.error)
    want = alone(tiny, good, 0)
    assert results[-1].error == "" and results[-1].image.tobytes() == want.tobytes()


def test_a_file_of_bad_items_ends_with_all_answers(tmp_path, monkeypatch, capsys):
    folder = str(save_tiny(tmp_path))
    good = {"task": "generate", "prompt": "a circle", **FAST}
    rows = [json.dumps(item, default=str) for item, _ in bad_items()]
    (tmp_path / "t.jsonl").write_text("\n".join([json.dumps(good), "[" * 100_000, *rows]))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["batch", "t.jsonl", "-o", "out", "--model", folder])
    err = capsys.readouterr().err
    assert end.value.code == 2 and "items failed" in err and "\x1b" not in err
    made = [json.loads(row) for row in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [row["index"] for row in made] == list(range(len(rows) + 2))
    assert ["error" in row for row in made] == [False] + [True] * (len(rows) + 1)
    assert (tmp_path / "out/0000.png").is_file()


def test_what_is_done_is_kept_when_a_batch_is_stopped(tmp_path):
    def results():
        yield batches.Result(1, "one")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batches.to_folder(results(), tmp_path, lambda *_: None)
    assert json.loads((tmp_path / "results.jsonl").read_text()) == {"index": 1, "text": "one"}


def test_a_pipe_is_no_file_of_tasks(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a file of tasks"):
        batches.read_items(tmp_path / "pipe")


def test_running_out_of_memory_costs_its_item_and_says_what_to_do(tiny, monkeypatch):
    def no_room(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    items = [{"task": "generate", "prompt": "a", **FAST}]
    for name in ("decode", "predict_embeddings"):  # while it is drawn, and before
        with monkeypatch.context() as patch:
            patch.setattr(tiny, name, no_room)
            [result] = results_of(tiny, items)
            assert "can't allocate memory" in result.error and tiny.advice() in result.error
            chat = Chat(tiny, decoder="generation")
            patch.setattr(tiny, "reply", no_room)
            with pytest.raises(MemoryError, match="can't allocate") as told:
                list(chat.say("a circle"))
            assert str(told.value).count(tiny.advice()) == 1 and not chat.messages
    assert results_of(tiny, items)[0].image


def test_an_image_that_fails_fails_alone(tiny, monkeypatch):
    decode, most = tiny.decode, 2

    def short_of_memory(latents):
        if len(latents) > most:
            raise torch.OutOfMemoryError("no room")
        if (latents[:, 0, 0, 0] == marked).any():
            raise ValueError("an image holds NaN values")
        return decode(latents)

    items = [{"task": "generate", "prompt": "a", **FAST} for _ in range(5)]
    marked = torch.tensor(0.0)
    seen = []
    monkeypatch.setattr(tiny, "decode", lambda x: seen.append(x[:, 0, 0, 0].clone()) or decode(x))
    whole = results_of(tiny, items, batch_size=5)
    marked = seen[0][3]
    monkeypatch.setattr(tiny, "decode", short_of_memory)
    results = results_of(tiny, items, batch_size=5)
    assert [bool(r.error) for r in results] == [False, False, False, True, False]
    assert results[3].error == "an image holds NaN values"
    for a, b in zip(whole, results, strict=True):
        if b.image:
            assert np.abs(np.asarray(a.image, int) - np.asarray(b.image, int)).max() <= 1


def test_a_batch_size_of_none(tiny):
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        list(batches.run(tiny, [], batch_size=0))


@pytest.mark.parametrize(
    "asked",
    [
        {"task": "understand", "image": "a.png", "question": "?"},
        {"task": "understand", "image": ["a.png"], "question": "?"},
        {"task": "edit", "image": "a.png", "instruction": "white"},
    ],
)
def test_an_image_too_large_costs_its_item_only(tiny, tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    photo().save("a.png")  # 50 x 30
    other = {"task": "generate", "prompt": "a", **FAST}
    first, second = results_of(tiny, [asked, other], max_pixels=1499)
    assert "50 x 30 is not within 1..1499" in first.error and second.image


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    folder = str(save_tiny(tmp_path))
    (tmp_path / "data").mkdir()
    photo().save(tmp_path / "data" / "a.png")
    items = [
        {"task": "generate", "prompt": "圆", "language": None, **FAST},
        {"task": "edit", "image": "a.png", "instruction": "white", **FAST, "fast_preamble": 1},
        {"task": "understand", "image": ["a.png", "a.png"], "question": "?", "max_new_tokens": 2},
    ]
    file = tmp_path / "data" / "tasks.jsonl"
    file.write_text("\n".join(map(json.dumps, items)))
    monkeypatch.chdir(tmp_path)
    options = ["--model", folder, "--output", "out", "--seed", "3"]
    main(["batch", str(file), *options])
    assert capsys.readouterr() == ("out/results.jsonl\n", "")
    rows = [json.loads(row) for row in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [row.get("image") for row in rows] == ["0000.png", "0001.png", None]
    assert rows[0]["seed"] == 3 and rows[1]["seed"] == 4 and not any("error" in r for r in rows)
    with Image.open(tmp_path / "out/0001.png") as image:
        assert image.size == (64, 64) and image.text["seed"] == "4"

    like = ["--model", folder, "-o", "again.png", "--like"]
    for kind, number in (["generate"], "0000"), (["edit", "data/a.png"], "0001"):
        main([*kind, *like, f"out/{number}.png"])
        with Image.open("again.png") as again, Image.open(f"out/{number}.png") as first:
            assert again.tobytes() == first.tobytes()
            assert again.text | {"max_new_tokens": ""} == first.text
        capsys.readouterr()

    with pytest.raises(SystemExit):
        main(["batch", str(file), *options, "--max_image_pixels", "1499"])
    assert "2 of 3 items failed; item 1: cannot read image" in capsys.readouterr().err

    file.write_text("{oops\n" + json.dumps(items[0]) + "\n")
    with pytest.raises(SystemExit) as end:
        main(["batch", str(file), *options])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and err.startswith("nexus_min: error: 1 of 2 items failed; item 0: ")
    rows = [json.loads(row) for row in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert "error" in rows[0] and rows[1]["image"] == "0001.png"
