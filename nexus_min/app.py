"""`python -m nexus_min app`: draw, edit, ask and talk in a browser.

One model for all visitors, one task at a time, a queue before it; pictures appear while they are
sampled, and Stop ends a task between two steps. What a visitor can ask for is capped by `Limits`;
pictures are uploaded, never fetched from an address. Needs gradio (6.7 or newer), which is imported
when the page is built. Official counterpart: `app.py` of modelscope/Nexus-Gen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import wraps
from typing import Any

from .conversation import KEEP, Chat
from .pipeline import NexusGen
from .sampling import Sampling
from .tokenizer import IMAGE

PREVIEWS = 8  # pictures shown while one is sampled
SIGN = "[picture] "  # where one stands in what is shown of a conversation
FONT = ["system-ui", "sans-serif"]  # nothing comes from elsewhere


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

    def draw(self, prompt: str, *form) -> Iterator[tuple[Any, str]]:
        """A prompt -> (picture, facts)."""
        events = self.model.generate_steps(prompt or "", **self.options(prompt, *form))
        yield from ((image, facts) for image, _, facts in self.watch(events))

    def edit(self, image, instruction: str, decoder: str, *form) -> Iterator[tuple[Any, str]]:
        """A picture and an instruction -> (picture, facts)."""
        if image is None:
            raise ValueError("upload a picture first")
        options = self.options(instruction, *form) | {"decoder": decoder}
        events = self.model.edit_steps(image, instruction or "", **options)
        yield from ((image, facts) for image, _, facts in self.watch(events))

    def ask(self, image, question: str) -> Iterator[str]:
        """A picture, or none, and a question -> the answer."""
        self.options(question, 0, 0, 0, 0)
        tokens = self.limits.tokens
        yield self.model.understand(image, question or "", max_new_tokens=tokens)

    def talk(
        self, chat: Chat | None, text: str, image, keep: str, *form
    ) -> Iterator[tuple[Chat, list[dict], Any, str]]:
        """A turn -> (conversation, what is shown of it, the latest picture, facts)."""
        options = self.options(text, *form)
        if chat is None or chat.keep != keep:
            chat = self.model.chat(keep=keep, max_new_tokens=options["max_new_tokens"])
        options.pop("max_new_tokens")
        chat.sampling = Sampling(**options)
        past = [m | {"content": m["content"].replace(IMAGE, SIGN)} for m in chat.messages]
        past.append({"role": "user", "content": (SIGN if image else "") + (text or "")})
        events = chat.say(text or "", [image] if image else [])
        for latest, reply, facts in self.watch(events):
            said = reply.replace(IMAGE, SIGN) or "..."
            yield chat, [*past, {"role": "assistant", "content": said}], latest, facts

    def watch(self, events: Iterator) -> Iterator[tuple[Any, str, str]]:
        """(picture so far, text so far, facts) whenever one of them is new."""
        image, text, facts, every, start = None, "", "", 1, time.perf_counter()
        with closing(events):
            for kind, value in events:
                if kind == "text":
                    text += value
                elif kind == "sampling":
                    every = -(-value.num_steps // PREVIEWS)
                    facts = f"seed {value.seed}, {value.num_steps} steps, cfg {value.cfg_scale:g}"
                    facts += f", {value.width} x {value.height} px; "
                elif kind == "step" and value.i % every == 0:
                    image = self.model.decode(value.x0)[0]
                elif kind == "image":
                    image = value
                else:
                    continue
                yield image, text, f"{facts}{time.perf_counter() - start:.1f} s"


def find_gradio() -> Any:
    """The gradio package. ValueError when it is not installed."""
    try:
        import gradio
    except ImportError:
        raise ValueError("the web page needs gradio: pip install 'gradio>=6.7'") from None
    return gradio


def build(model: NexusGen, limits: Limits) -> Any:
    """The page, a `gradio.Blocks` with its queue."""
    gr = find_gradio()
    tasks, size = Tasks(model, limits), model.config.image_size

    def upload(label: str) -> Any:
        """An image input that takes files from the browser only, opened by `load_image` alone."""
        image = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"])
        move = image.async_move_resource_to_block_cache

        async def move_file(path):
            if "://" in str(path):
                raise gr.Error("pictures are uploaded, not fetched from an address")
            return await move(path)

        image.async_move_resource_to_block_cache = move_file
        image.preprocess = lambda payload: payload.path if payload else None
        return image

    def told(task):
        """The task, its mistakes shown to the visitor."""

        @wraps(task)
        def steps(*values):
            try:
                yield from task(*values)
            except (ValueError, OSError) as error:
                raise gr.Error(str(error)) from None

        return steps

    def form() -> list:
        with gr.Row():
            steps = gr.Slider(1, limits.num_steps, model.config.num_steps, step=1, label="Steps")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            sides = [gr.Number(size, label=name, precision=0) for name in ("Height", "Width")]
        return [steps, seed, *sides]

    def buttons(task, inputs: list, outputs: list, name: str, trigger=None) -> None:
        with gr.Row():
            go, stop = gr.Button(name, variant="primary"), gr.Button("Stop")
        options = {"concurrency_id": "model", "concurrency_limit": 1}
        run = gr.on([go.click, trigger], told(task), inputs, outputs, **options)
        stop.click(None, cancels=[run])

    with gr.Blocks(title="nexus_min", analytics_enabled=False) as page:
        gr.Markdown("# nexus_min\nDraw, edit and ask about pictures, or talk about them.")
        with gr.Tab("Draw"):
            prompt, numbers = gr.Textbox(label="Prompt"), form()
            outputs = [gr.Image(label="Picture", format="png"), gr.Textbox(label="Made with")]
            buttons(tasks.draw, [prompt, *numbers], outputs, "Draw", prompt.submit)
        with gr.Tab("Edit"):
            with gr.Row():
                source, edited = upload("Source"), gr.Image(label="Edited", format="png")
            text = gr.Textbox(label="Instruction")
            decoder = gr.Radio(["editing", "generation"], value="editing", label="Decoder")
            inputs = [source, text, decoder, *form()]
            outputs = [edited, gr.Textbox(label="Made with")]
            buttons(tasks.edit, inputs, outputs, "Edit", text.submit)
        with gr.Tab("Ask"):
            seen, question = upload("Picture to ask about"), gr.Textbox(label="Question")
            answer = [gr.Textbox(label="Answer")]
            buttons(tasks.ask, [seen, question], answer, "Ask", question.submit)
        with gr.Tab("Conversation"):
            chat, history = gr.State(None), gr.Chatbot(label="Conversation")
            with gr.Row():
                added, latest = upload("Show a picture"), gr.Image(label="Latest", format="png")
            text = gr.Textbox(label="Message")
            keep = gr.Radio(list(KEEP), value="predicted", label="A drawn picture is kept as")
            inputs, facts = [chat, text, added, keep, *form()], gr.Textbox(label="Made with")
            buttons(tasks.talk, inputs, [chat, history, latest, facts], "Send", text.submit)
            new = gr.Button("New conversation")
            new.click(lambda: (None, [], None, ""), None, [chat, history, latest, facts])
    return page.queue(max_size=limits.queue, default_concurrency_limit=1)


def serve(model: NexusGen, host: str = "127.0.0.1", port: int = 7860, **options) -> Any:
    """Show the page at host:port until stopped; loopback unless told otherwise."""
    gr, limits = find_gradio(), Limits()
    theme = gr.themes.Default(font=FONT, font_mono=["monospace"])
    settings = {"max_file_size": limits.file, "theme": theme, "share": False, "footer_links": []}
    settings |= {"ssr_mode": False, "quiet": True, "mcp_server": False}
    page = build(model, limits)
    return page.launch(server_name=host, server_port=port, **settings, **options)
