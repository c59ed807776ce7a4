"""What a small model knows: one warning for each thing beyond it, and answers in their parts."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_model import make_tiny, save_tiny

from nexus_min import __main__ as command_line
from nexus_min.app.page import Handlers, Limits
from nexus_min.batch import run as run_batch
from nexus_min.chat import Chat
from nexus_min.parts import Answer, BeyondTraining, Known
from nexus_min.pipeline import NexusGen
from nexus_min.tokenizer import GENERATION_PROMPT
from nexus_min.toy.questions import final_answer
from nexus_min.toy.tasks import sample_example
from nexus_min.toy.vocabulary import folding, known_facts
from nexus_min.toy.world import random_scene, render
from nexus_min.weights import TINY

FAST = {"num_steps": 1, "max_new_tokens": 2}
CAT = "words this model has never seen: cat; it knows circles, squares"


@pytest.fixture(scope="module")
def known() -> Known:
    return Known(known_facts(), 64, folding().normalize_str)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model without training that says what it knows."""
    folder = save_tiny(tmp_path_factory.mktemp("knowing"))
    (folder / "toy_words.json").write_text(json.dumps(known_facts()), "utf-8")
    return folder


@pytest.fixture(scope="module")
def model(folder) -> NexusGen:
    return NexusGen.load(folder)


def told(known: Known, text: str, **options) -> list[str]:
    sentences: list[str] = []
    known.check(text, tell=sentences.append, **options)
    return sentences


def noise(size: int = 64) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))


def scene() -> Image.Image:
    return Image.fromarray(render(random_scene(np.random.default_rng(1))))


# ---- what is beyond ------------------------------------------------------------------------------

BEYOND = {
    "a cat on the moon": ["never seen: cat, moon; it knows circles"],
    "一只猫": ["never seen: 猫; "],
    "a black square": ["knows black as a color of backgrounds only; it knows circles"],
    "a black small outlined star on a gray background": ["knows black as a color of backgrounds"],
    "make the star white": ["knows white as a color of backgrounds"],
    "黑色的正方形": ["knows 黑色 as a color of backgrounds"],
    "a star on a green background": ["knows green as a color of objects only"],
    "红色背景": ["knows 红色 as a color of objects only"],
    "5 red stars": ["draws at most 4 objects, not 5"],
    "three stars plus two big circles": ["draws at most 4 objects, not 5"],
    "a star, a cross, a red box, a green triangle and a disc": ["at most 4 objects, not 5"],
    "六个红色圆形": ["never seen: 六; ", "at most 4 objects, not 6"],
    "5 cats and 5 black stars": ["never seen: cats", "not 5", "knows black"],
}


@pytest.mark.parametrize("text", BEYOND)
def test_what_is_beyond_is_told(known, text):
    for sentence, says in zip(told(known, text), BEYOND[text], strict=True):
        assert says in sentence


WITHIN = [
    "DRAW a Red Star!",
    " ＲＥＤ  star ",
    "a red star on white",
    "a red star plus a blue circle plus a cross",
    "three stars plus one circle on black",
    "把背景换成黑色",
    "三个三角形和一个十字形",
    GENERATION_PROMPT["zh"].format("红星"),
    "",
]


@pytest.mark.parametrize("text", WITHIN)
def test_what_is_known_is_not(known, text):
    assert told(known, text) == []


@pytest.mark.parametrize("task", ["generate", "edit", "understand", "multi_turn"])
def test_no_example_of_training_is_beyond(known, task):
    """But for the words that mean nothing, which some have."""
    rng, count = np.random.default_rng(3), 0
    for i in range(300):
        ex = sample_example(rng, task, unseen=bool(i % 2))
        for message in ex.messages[::2]:
            sentences = told(known, message["content"])
            assert not sentences or len(sentences) == 1 and "never seen" in sentences[0]
            count += len(sentences)
        assert not known.introduction(ex.text, task != "generate")
        image = Image.fromarray(render(ex.scenes[0]))
        assert told(known, "", images=[image, image.resize((512, 384))]) == []
    assert count < 60


def test_pictures_unlike_any_of_training(known):
    rows, columns = np.mgrid[:400, :600] / 100
    sky = np.stack([np.sin(columns + rows), np.cos(2 * columns), np.sin(3 * rows)], -1) * 90 + 128
    stored = io.BytesIO()
    scene().save(stored, "JPEG")
    assert told(known, "", images=[Image.open(stored)]) == []
    for image in (noise(), Image.fromarray(sky.astype(np.uint8)), noise().convert("RGBA")):
        (sentence,) = told(known, "", images=[scene(), image, image])
        assert "has never seen an image like this one; it knows circles" in sentence


def test_a_list_of_words_is_read_too():
    known = Known(["a", "Red", "circle", "top-left", "红色", "圆", "的"], 64)
    assert told(known, "A red circle, top-left! 2") == told(known, "红色的圆") == []
    (sentence,) = told(known, "a café zebra ZEBRA 红色的猫和圆circle")
    assert "never seen: café, zebra, 猫和; it knows what toy_words.json" in sentence
    assert known.introduction("hello", False) and not known.introduction("red", False)


def test_the_shipped_list_is_read():
    facts = json.loads((TINY / "toy_words.json").read_text("utf-8"))
    known = Known(facts, 64, folding().normalize_str)
    assert told(known, "a red star") == [] and "never seen: cat;" in told(known, "a cat")[0]


# ---- in Python, in a chat, on the page, on the command line --------------------------------------

CALLS = {  # of a text that names a cat
    "generate": lambda model: model.generate("a cat", **FAST),
    "generate_steps": lambda model: list(model.generate_steps("a cat", **FAST)),
    "edit": lambda model: model.edit(scene(), "remove the cat", **FAST),
    "understand": lambda model: model.understand(scene(), "a cat?", max_new_tokens=2),
    "say": lambda model: list(Chat(model, **FAST).say("is it a cat", [scene()])),
    "draw": lambda model: list(Chat(model, **FAST).draw("a cat")),
    "batch": lambda model: list(
        run_batch(model, [{"task": "generate", "prompt": "a cat", **FAST}])
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_each_call_warns_once_at_the_line_that_made_it(model, name):
    for _ in range(2):  # Python's default shows a warning of a line once
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            CALLS[name](model)
        (warning,) = caught
        assert str(warning.message).startswith(CAT) and issubclass(warning.category, UserWarning)
        assert warning.filename == __file__


def test_sizes_and_images_warn(model):
    with pytest.warns(BeyondTraining, match="draws at 64x64, not at 96x64: draw so, then enlarge"):
        assert model.generate("a star", width=90, **FAST).size == (96, 64)
    with pytest.warns(BeyondTraining, match="never seen an image like this one"):
        model.understand([scene(), noise()], "what color is it?", max_new_tokens=2)


def test_a_model_at_full_scale_never_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        free = make_tiny()
        free.generate("5 black cats", width=96, **FAST)
        list(Chat(free, **FAST).say("hello", [noise()]))
        reply = free.understand(noise(), "a cat?", max_new_tokens=9)
    assert reply.reasoning == "" and reply.answer == reply


def test_the_page_notes_what_is_beyond(model, tmp_path):
    (handlers, file), form = (Handlers(model, Limits(tokens=2)), str(tmp_path / "a.png")), (1, 0)
    noise().save(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        *_, (_, _, facts) = handlers.generate("a cat", *form, 64, 96)
        lines = facts.split("\n")
        assert lines[0].startswith("seed 0, ") and len(lines) == 3
        assert lines[1].startswith(CAT) and "not at 96x64" in lines[2]
        *_, (_, _, facts) = handlers.edit(file, "a cat", "editing", *form, 64, 64)
        assert facts.count(CAT) == facts.count("like this one") == 1 and facts.count("\n") == 2
        [(_, notes)] = handlers.understand(file, "a cat?")
        assert notes.count(CAT) == notes.count("like this one") == 1 and notes.count("\n") == 1
        *_, (_, shown, _, facts) = handlers.chat(None, "zebra", None, "slots", *form, 64, 64)
        assert shown[-1]["content"].startswith("I draw, change and describe circles, squares")
        assert facts.count("never seen: zebra") == 1


def test_the_command_line_warns_in_one_line_once(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(folder), "--max_new_tokens", "2"]
    command_line.main(["generate", "a cat", "--steps", "1", "--width", "96", *options])
    out, err = capsys.readouterr()
    first, second, _ = err.splitlines()
    assert out == "generated.png\n" and first.startswith(f"nexus_min: warning: {CAT}")
    assert second.startswith("nexus_min: warning: this model draws at 64x64")
    noise().save("a.png")
    command_line.main(["understand", "a.png", "a cat?", *options])
    assert len(capsys.readouterr().err.splitlines()) == 2
    item = {"task": "generate", "prompt": "a cat", **FAST}
    Path("tasks.jsonl").write_text("\n".join([json.dumps(item)] * 3))
    command_line.main(["batch", "tasks.jsonl", "--model", str(folder), "-o", "out"])
    assert capsys.readouterr().err.count(CAT) == 1
    assert warnings.showwarning.__module__ == "warnings"


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "reasoning", "answer"),
    [
        ("a star, on white. star circle no: one", "a star, on white. star circle no", "one"),
        ("白色背景。红色是：有", "白色背景。红色是", "有"),
        ("white", "", "white"),
        ("", "", ""),
    ],
)
def test_an_answer_is_the_reply_and_its_parts(reply, reasoning, answer):
    got = Answer.of(reply)
    for same in (got, copy.deepcopy(got), pickle.loads(pickle.dumps(got))):
        assert same == reply and isinstance(same, str) and json.dumps([same]) == json.dumps([reply])
        assert (same.reasoning, same.answer) == (reasoning, answer)
    assert final_answer(reply) == answer
    plain = Answer.of(reply, False)
    assert (plain, plain.reasoning, plain.answer) == (reply, "", reply)


def test_understanding_returns_an_answer(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids: " a star on white: white\n")
    reply = model.understand(scene(), "what color is it?", max_new_tokens=2)
    assert (reply, reply.reasoning, reply.answer) == (
        "a star on white: white",
        "a star on white",
        "white",
    )
