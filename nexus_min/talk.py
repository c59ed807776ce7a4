"""`python -m nexus_min chat`: a conversation, line by line.

A line is what the user says; the reply comes as it is made, the names of its images after it.
Lines that begin with a slash are commands, see `HELP`. From a file or a pipe the first mistake ends
the conversation; on a terminal it costs the line only, and so does Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .chat import Chat
from .images import load_image
from .tokenizer import GENERATION_PROMPT, check_text, language

HELP = """\
/image FILE   show an image with the next message; may be given several times
/draw TEXT    ask for an image in the words of training; or just ask
/new          forget everything
/quit         or the end of the input\
"""


class Talk:
    """Lines in; text and saved images out.

    write(text): shows a piece of a line. save(image, number, settings, message): stores an image
    and returns its name. complain(error): tells of a mistake, which then costs its line only.
    max_pixels: of an image, see `load_image`.
    """

    def __init__(
        self,
        chat: Chat,
        write: Callable[[str], None],
        save: Callable[[Any, int, Any, str], str],
        complain: Callable[[BaseException], None] | None = None,
        max_pixels: int | None = None,
    ):
        self.chat, self.write, self.save, self.complain = chat, write, save, complain
        self.max_pixels = max_pixels
        self.images: list[Any] = []  # for the next message
        self.saved = 0

    def run(self, lines: Iterable[str]) -> None:
        """Answer line after line, to the end or `/quit`."""
        for line in map(str.strip, lines):
            if line == "/quit":
                return
            try:
                if line:
                    self.answer(line)
            except (ValueError, OSError, MemoryError, KeyboardInterrupt) as error:
                if self.complain is None:
                    raise
                self.complain(error)

    def answer(self, line: str) -> None:
        """One line: a command or a message."""
        command, _, rest = line.partition(" ")
        if command == "/draw":
            check_text(rest, "prompt")
            self.say(GENERATION_PROMPT[language(rest)].format(rest.strip()))
        elif command == "/image":
            self.images.append(load_image(rest.strip(), self.max_pixels))
        elif line == "/new":
            self.chat.clear()
            self.images = []
        elif line == "/help":
            self.write(HELP + "\n")
        elif line.startswith("/"):
            raise ValueError(
                f"unknown command {command!r}; there are /image /draw /new /quit /help"
            )
        else:
            self.say(line)

    def say(self, text: str) -> None:
        """One turn; images are saved as they are drawn."""
        images, names, settings = self.images, [], None
        self.images = []
        for kind, value in self.chat.say(text, images):
            if kind == "text":
                self.write(value)
            elif kind == "sampling":
                settings = value
            elif kind == "image":
                self.saved += 1
                names.append(self.save(value, self.saved, settings, text))
        self.write("".join(f"\n{name}" for name in names) + "\n")
