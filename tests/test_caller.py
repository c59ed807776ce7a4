"""A result depends on the model and its inputs: not on the caller's modes, nor on who ran first."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny_model import make_tiny
from torch._subclasses import FakeTensor, FakeTensorMode

from nexus_min import batch
from nexus_min.chat import Chat
from nexus_min.pipeline import NexusGen

PROMPT, EDIT, QUESTION = "a red star", "Remove the star.", "What color is the star?"


@pytest.fixture(scope="module")
def model() -> NexusGen:
    return NexusGen.load("tiny")


def results(model: NexusGen) -> list[bytes | str]:
    """One image of each decoder, with guidance and without, and an answer."""
    image = model.generate(PROMPT, seed=3, cfg_scale=1.5, num_steps=2)
    edited = model.edit(image, EDIT, height=48, width=96, num_steps=2)
    answer = model.understand(image, QUESTION, max_new_tokens=16)
    return [image.tobytes(), edited.tobytes(), answer]


@pytest.fixture(scope="module")
def expected(model) -> list[bytes | str]:
    return results(model)


@pytest.fixture
def restored():
    """Gives back the defaults that a test has changed."""
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_callers_dtype_changes_nothing(model, expected, restored, dtype):
    torch.set_default_dtype(dtype)
    assert results(model) == expected
    assert results(NexusGen.load("tiny")) == expected


@pytest.mark.filterwarnings("ignore")
def test_the_callers_device_changes_nothing(model, expected, restored):
    torch.set_default_device("meta")
    assert results(model) == expected
    assert results(NexusGen.load("tiny")) == expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad, torch.no_grad])
def test_the_callers_grad_mode_changes_nothing(model, expected, mode):
    with mode():
        assert results(model) == expected


@pytest.mark.parametrize("first,then", [(True, False), (False, True)])
def test_a_chat_goes_on_in_another_mode(model, first, then):
    replies = []
    for modes in [(first, then), (False, False)]:
        chat = Chat(model)
        for on, text in zip(modes, [PROMPT, QUESTION], strict=True):
            with torch.inference_mode() if on else nullcontext():
                events = list(chat.say(text))
            replies.append([value for name, value in events if name == "text"])
            replies.append([value.tobytes() for name, value in events if name == "image"])
    assert replies[:4] == replies[4:] and replies[1] and replies[2]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_trace_leaves_nothing_behind(is_first):
    visual, grid = make_tiny(0).part("ar").visual, ((1, 4, 8 if is_first else 12),)
    pixels = torch.randn(grid[0][1] * grid[0][2], visual.patch_embed.proj.weight[0].numel())
    before = None if is_first else visual(pixels, grid)
    with FakeTensorMode(allow_non_fake_inputs=True):
        traced = visual(pixels, grid)
    after = visual(pixels, grid)
    assert type(traced) is FakeTensor and type(after) is torch.Tensor
    assert after.shape == traced.shape and (is_first or torch.equal(before, after))


@pytest.mark.parametrize("options", [{"seed": np.int64(3)}, {"seed": None}, {"guidance": None}])
@pytest.mark.parametrize("more", [{}, {"num_steps": np.int32(1), "max_new_tokens": np.int64(20)}])
def test_numbers_of_any_kind_and_none(model, options, more):
    given = {"num_steps": 1} | options | more
    plain = {name: 3 if value == 3 else value for name, value in given.items() if value is not None}
    assert model.generate(PROMPT, **given).tobytes() == model.generate(PROMPT, **plain).tobytes()


@pytest.mark.parametrize("value", [0, -1, 2.5, "9", True, float("nan")])
def test_a_wrong_number_of_tokens_is_one_line(model, value):
    for call in (model.generate, lambda text, **options: model.understand(None, text, **options)):
        with pytest.raises(ValueError, match="^max_new_tokens must be a whole number .*got"):
            call(PROMPT, max_new_tokens=value)
    with pytest.raises(ValueError, match="^max_new_tokens must be a whole number .*got"):
        Chat(model, max_new_tokens=value)


def test_no_number_of_tokens_is_the_default(model):
    answer = model.understand(None, QUESTION, max_new_tokens=None)
    assert answer == model.understand(None, QUESTION)


NULLS = ("seed", "guidance", "negative_prompt", "language", "height", "max_new_tokens")


def test_null_is_the_default_in_a_batch(model):
    tasks = [{"task": "generate", "prompt": PROMPT} | {name: None} for name in NULLS]
    tasks += [{"task": "understand", "image": None, "question": QUESTION}]
    wrong = {"task": "understand", "image": None, "question": QUESTION, "max_new_tokens": "8"}
    *good, last = sorted(batch.run(model, [*tasks, wrong]))
    assert not any(result.error for result in good) and "max_new_tokens" in last.error
