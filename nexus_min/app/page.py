"""`python -m nexus_min app`: generate, edit, ask and chat in a browser.

One model serves all visitors, one task at a time. Images appear while they are sampled; Stop ends a
task between two steps. Images are uploaded, never fetched from an address. Needs gradio (6.7 or
newer), imported when the page is built. Official counterpart: `app.py` of modelscope/Nexus-Gen.
"""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..chat import HISTORY_MODES, Chat
from ..images import load_image
from ..pipeline import NexusGen
from ..sampling import SamplingParams
from ..tokenizer import IMAGE

PREVIEWS = 8  # images shown while one is sampled
IMAGE_MARK = "[image] "  # stands for an image in the text of a conversation
CSS = ".image img { width: 100%; height: 100%; object-fit: contain }"
PIXELATED = ".image img { image-rendering: pixelated }"  # for small images


@dataclass(frozen=True)
class Limits:
    """The most that one visitor can ask for."""

    num_steps: int = 100
    height: int = 1024  # pixels
    width: int = 1024
    seed: int = 2**53  # larger integers are not exact in a browser
    tokens: int = 512  # of a reply
    text: int = 2000  # characters of a prompt
    file: str = "20mb"
    queue: int = 16  # waiting tasks


@dataclass
class Handlers:
    """What the buttons do: generators of the values of their outputs, without gradio."""

    model: NexusGen
    limits: Limits

    def options(self, text: str, *numbers: float | None) -> dict:
        """The form as `SamplingParams`, within the limits."""
        if len(text or "") > self.limits.text:
            raise ValueError(f"the text is longer than {self.limits.text} characters")
        form = dict(zip(("num_steps", "seed", "height", "width"), numbers, strict=True))
        for name, value in form.items():
            if value is None or not 0 <= value <= getattr(self.limits, name):
                raise ValueError(f"{name} must be 0 to {getattr(self.limits, name)}, got {value}")
            form[name] = int(value)
        return form

    def generate(self, prompt: str, *form) -> Iterator[tuple[Any, str, str]]:
        """A prompt -> (image, reply, facts)."""
        options = self.options(prompt, *form) | {"max_new_tokens": self.limits.tokens}
        yield from self.watch(self.model.generate_steps(prompt or "", **options), prompt)

    def edit(self, image, instruction: str, decoder: str, *form) -> Iterator[tuple[Any, str, str]]:
        """An image and an instruction -> (image, reply, facts)."""
        if image is None:
            raise ValueError("upload an image first")
        options = self.options(instruction, *form) | {"max_new_tokens": self.limits.tokens}
        source, text = load_upload(image), instruction or ""
        events = self.model.edit_steps(source, text, decoder=decoder, **options)
        yield from self.watch(events, text, source)

    def understand(self, image, question: str) -> Iterator[tuple[str, str]]:
        """An image, or none, and a question -> (the answer, what is beyond the training)."""
        self.options(question, 0, 0, 0, 0)  # checks the length of the text
        source, tokens = load_upload(image) if image else None, self.limits.tokens
        reply, notes = self.model.understand(source, question or "", max_new_tokens=tokens), []
        self.model.known.check(question, [source] if image else [], tell=notes.append)
        yield reply, "\n".join(notes)

    def chat(
        self, chat: Chat | None, text: str, image, keep: str, *form
    ) -> Iterator[tuple[Chat, list[dict], Any, str]]:
        """A turn -> (conversation, its messages as shown, the latest image, facts)."""
        if chat is None or chat.keep != keep:
            chat = Chat(self.model, keep, max_new_tokens=self.limits.tokens)
        chat.sampling = SamplingParams(**self.options(text, *form))
        text, source = text or "", load_upload(image) if image else None
        past = [m | {"content": m["content"].replace(IMAGE, IMAGE_MARK)} for m in chat.messages]
        past.append({"role": "user", "content": (IMAGE_MARK if image else "") + text})
        latest = chat.images[-1].image if chat.images else None
        events = chat.say(text, [source] if image else [])
        for new, reply, facts in self.watch(events, text, source):
            reply = {"role": "assistant", "content": reply.replace(IMAGE, IMAGE_MARK) or "..."}
            yield chat, [*past, reply], new or latest, facts

    def watch(self, events: Iterator, asked: str, source=None) -> Iterator[tuple[Any, str, str]]:
        """(image so far, text so far, facts), whenever one of them changes.

        The facts end with what is beyond the model's training, a line each.
        """
        notes, check = {}, self.model.known.check
        image, text, facts, interval, start = None, "", "", 1, time.perf_counter()
        offloader = self.model.offloader
        has_previews = offloader is None or offloader.profile == "resident"  # no weights move
        with closing(events):
            for kind, value in events:
                if kind == "text":
                    text += value
                    check(asked, [source] if source else [], tell=notes.setdefault)
                elif kind == "sampling":
                    check("", (), value, notes.setdefault)
                    interval = -(-value.num_steps // PREVIEWS)
                    facts = f"seed {value.seed}, {value.num_steps} steps, cfg {value.cfg_scale:g}"
                    facts += f", {value.width} x {value.height} px; "
                elif kind == "step" and has_previews and value.i % interval == 0:
                    image = self.model.decode(value.x0)[0]
                elif kind == "image":
                    image = value
                else:
                    continue
                facts_now = f"{facts}{time.perf_counter() - start:.1f} s"
                yield image, text, "\n".join((facts_now, *notes))


def load_upload(path: str) -> Image.Image:
    """An uploaded image; an error does not name the folder of uploads."""
    try:
        return load_image(path)
    except ValueError as error:
        raise ValueError(str(error).replace(f"{Path(path).parent}/", "")) from None


def find_gradio() -> Any:
    """The gradio package, or a ValueError that names it."""
    try:
        import gradio
    except ImportError:
        raise ValueError("the web page needs gradio: pip install 'gradio>=6.7'") from None
    return gradio


def check_upload(path: str) -> str:
    """The path of a file that a browser has uploaded; gradio.Error for any other.

    gradio checks that only for pages of its own `launch`.
    """
    gr = find_gradio()
    with suppress(OSError, TypeError, ValueError):  # not a path, a NUL in it, too long a name
        file, folder = Path(path).resolve(), Path(gr.utils.get_upload_folder()).resolve()
        if file.is_relative_to(folder) and file.is_file():
            return path
    raise gr.Error("images are uploaded, not read from an address or a path")


def upload(label: str) -> Any:
    """An image input that takes files of the browser only; `load_image` alone opens them."""
    style = {"height": 240, "elem_classes": "image", "buttons": [], "type": "filepath"}
    image = find_gradio().Image(label=label, sources=["upload", "clipboard"], **style)
    move = image.async_move_resource_to_block_cache

    async def move_upload(path):
        return await move(check_upload(path))

    image.async_move_resource_to_block_cache = move_upload
    image.preprocess = lambda payload: check_upload(payload.path) if payload else None
    return image


def build(model: NexusGen, limits: Limits) -> Any:
    """The page, a `gradio.Blocks` with its queue."""
    gr, do, size = find_gradio(), Handlers(model, limits), model.config.image_size

    def form() -> list:
        steps = gr.Slider(1, limits.num_steps, model.config.num_steps, step=1, label="Steps")
        numbers = {"Seed": 0, "Height": size, "Width": size}
        return [steps, *[gr.Number(n, label=name, precision=0) for name, n in numbers.items()]]

    def results(*labels: str) -> list:
        style = {"height": 360, "elem_classes": "image", "buttons": ["download", "fullscreen"]}
        image = gr.Image(label="Image", format="png", **style)
        return [image, *[gr.Textbox(label=label) for label in (*labels, "Made with")]]

    chat, history = gr.State(None), gr.Chatbot(label="Conversation", buttons=["copy"])
    message, added = gr.Textbox(label="Message"), upload("Show an image")
    keep = gr.Radio(list(HISTORY_MODES), value="predicted", label="Images are kept as")
    decoder = gr.Radio(["editing", "generation"], value="editing", label="Decoder")
    editing = [upload("Source"), gr.Textbox(label="Instruction"), decoder]
    asking = [upload("Image to ask about"), gr.Textbox(label="Question")]
    answers = [gr.Textbox(label=label) for label in ("Answer", "Note")]
    outputs = [chat, history, *results()]
    tabs = {  # name: button, handler, inputs, further inputs in one row, outputs
        "Draw": ("Draw", do.generate, [gr.Textbox(label="Prompt")], form(), results("Reply")),
        "Edit": ("Edit", do.edit, editing, form(), results("Reply")),
        "Ask": ("Ask", do.understand, asking, [], answers),
        "Conversation": ("Send", do.chat, [chat, message, added, keep], form(), outputs),
    }
    with gr.Blocks(title="nexus_min", analytics_enabled=False) as page:
        gr.Markdown("# nexus_min\nDraw, edit and ask about images, or talk about them.")
        for name, content in tabs.items():
            with gr.Tab(name) as tab:
                run = add_task(*content)
        with tab:
            new = gr.Button("New conversation")
        run.success(lambda: ("", None), None, [message, added])
        gr.on([new.click, history.clear], lambda: (None, [], None, ""), None, outputs)
    return page.queue(max_size=limits.queue, default_concurrency_limit=1)


def add_task(button: str, handler: Callable, inputs: list, row: list, outputs: list) -> Any:
    """Lay out a task: the button, or Enter in a text, runs the handler; Stop ends it."""
    gr = find_gradio()

    def steps(*values):
        try:
            yield from handler(*values)
        except (ValueError, OSError, MemoryError) as error:
            raise gr.Error(str(error)) from None

    with gr.Row():
        with gr.Column():
            for part in inputs:
                part.render()
            with gr.Row():
                for part in row:
                    part.render()
            with gr.Row():
                start, stop = gr.Button(button, variant="primary"), gr.Button("Stop")
        with gr.Column():
            for part in outputs:
                if part not in inputs:
                    part.render()
    texts = [part.submit for part in inputs if isinstance(part, gr.Textbox)]
    options = {"concurrency_id": "model", "concurrency_limit": 1, "api_name": handler.__name__}
    run = gr.on([start.click, *texts], steps, inputs + row, outputs, **options)
    stop.click(None, cancels=[run])
    return run


def listen(host: str, port: int) -> socket.socket:
    """A socket at host:port; port 0 is any free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error}") from None


def server(model: NexusGen) -> Any:
    """A `uvicorn.Server` of the page: gradio's `launch` waits only seconds on a busy machine."""
    import fastapi  # gradio installs both
    import uvicorn

    gr, limits = find_gradio(), Limits()
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    css = CSS + (PIXELATED if model.config.image_size < 256 else "")
    settings = {"max_file_size": limits.file, "theme": theme, "css": css, "footer_links": []}
    settings |= {"show_error": False, "ssr_mode": False, "mcp_server": False}
    site = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    site = gr.mount_gradio_app(site, build(model, limits), "/", **settings)
    config = uvicorn.Config(site, log_level="warning", timeout_graceful_shutdown=1)
    return uvicorn.Server(config)
