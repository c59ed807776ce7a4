"""What visitors of the web page can ask for: the four tasks as generators, and their limits.

Knows nothing of the page: values of a form in, images, words and facts out, as they come. Every
mistake of a visitor is a ValueError that may be shown to him.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..chat import Chat
from ..images import load_image
from ..pipeline import NexusGen
from ..sampling import SamplingParams
from ..tokenizer import IMAGE

PREVIEWS = 8  # images shown while one is sampled
SIGN = "[image] "  # where one stands in what is shown of a conversation


@dataclass(frozen=True)
class Limits:
    """The most that one visitor can ask for."""

    num_steps: int = 100
    height: int = 1024  # pixels
    width: int = 1024
    seed: int = 2**53  # what a browser can count
    tokens: int = 512  # of a reply
    text: int = 2000  # characters of a prompt
    file: str = "20mb"
    queue: int = 16  # tasks that wait


class Tasks:
    """What the buttons do; each generator yields what its outputs show, again and again."""

    def __init__(self, model: NexusGen, limits: Limits):
        self.model, self.limits = model, limits

    def options(self, text: str, *numbers: float | None) -> dict:
        """The form as options of `generate`. ValueError when it asks for more than the limits."""
        if len(text or "") > self.limits.text:
            raise ValueError(f"the text is longer than {self.limits.text} characters")
        names = ("num_steps", "seed", "height", "width")
        for name, value in zip(names, numbers, strict=True):
            if value is None or not 0 <= value <= getattr(self.limits, name):
                raise ValueError(f"{name} must be 0 to {getattr(self.limits, name)}, got {value}")
        form = {name: int(value) for name, value in zip(names, numbers, strict=True)}
        return form | {"max_new_tokens": self.limits.tokens}

    def draw(self, prompt: str, *form) -> Iterator[tuple[Any, str, str]]:
        """A prompt -> (image, what the model says to it, facts)."""
        yield from self.watch(
            self.model.generate_steps(prompt or "", **self.options(prompt, *form))
        )

    def edit(self, image, instruction: str, decoder: str, *form) -> Iterator[tuple[Any, str, str]]:
        """An image and an instruction -> (image, what the model says to it, facts)."""
        if image is None:
            raise ValueError("upload an image first")
        options = self.options(instruction, *form) | {"decoder": decoder}
        yield from self.watch(self.model.edit_steps(opened(image), instruction or "", **options))

    def ask(self, image, question: str) -> Iterator[str]:
        """An image, or none, and a question -> the answer."""
        self.options(question, 0, 0, 0, 0)
        tokens, seen = self.limits.tokens, opened(image) if image else None
        yield self.model.understand(seen, question or "", max_new_tokens=tokens)

    def talk(
        self, chat: Chat | None, text: str, image, keep: str, *form
    ) -> Iterator[tuple[Chat, list[dict], Any, str]]:
        """A turn -> (conversation, what is shown of it, the latest image, facts)."""
        options = self.options(text, *form)
        if chat is None or chat.keep != keep:
            chat = Chat(self.model, keep=keep, max_new_tokens=options["max_new_tokens"])
        options.pop("max_new_tokens")
        chat.sampling = SamplingParams(**options)
        past = [m | {"content": m["content"].replace(IMAGE, SIGN)} for m in chat.messages]
        past.append({"role": "user", "content": (SIGN if image else "") + (text or "")})
        events = chat.say(text or "", [opened(image)] if image else [])
        known = chat.pictures[-1].image if chat.pictures else None
        for latest, reply, facts in self.watch(events):
            said, latest = reply.replace(IMAGE, SIGN) or "...", latest or known
            yield chat, [*past, {"role": "assistant", "content": said}], latest, facts

    def watch(self, events: Iterator) -> Iterator[tuple[Any, str, str]]:
        """(image so far, text so far, facts) whenever one of them is new."""
        image, text, facts, every, start = None, "", "", 1, time.perf_counter()
        offloader = self.model.offloader
        # a preview must not displace the part at work
        previews = offloader is None or offloader.profile == "resident"
        with closing(events):
            for kind, value in events:
                if kind == "text":
                    text += value
                elif kind == "sampling":
                    every = -(-value.num_steps // PREVIEWS)
                    facts = f"seed {value.seed}, {value.num_steps} steps, cfg {value.cfg_scale:g}"
                    facts += f", {value.width} x {value.height} px; "
                elif kind == "step" and previews and value.i % every == 0:
                    image = self.model.decode(value.x0)[0]
                elif kind == "image":
                    image = value
                else:
                    continue
                yield image, text, f"{facts}{time.perf_counter() - start:.1f} s"


def opened(path: str) -> Image.Image:
    """An uploaded image. ValueError, without the place where the upload lies, if it is none."""
    try:
        return load_image(path)
    except ValueError as error:
        raise ValueError(str(error).replace(f"{Path(path).parent}/", "")) from None
