"""`python -m nexus_min app`: draw, edit, ask and talk in a browser.

One model for all visitors, one task at a time, a queue before it; images appear while they are
sampled, and Stop ends a task between two steps. What the buttons do, and how much a visitor can ask
for, is in `page_tasks`; images are uploaded, never fetched from an address. Needs gradio (6.7 or
newer), imported when the page is built. Official counterpart: `app.py` of modelscope/Nexus-Gen.
"""

from __future__ import annotations

import socket
from functools import wraps
from pathlib import Path
from typing import Any

from ..chat import KEEP
from ..pipeline import NexusGen
from .page_tasks import Limits, Tasks

CSS = ".image img { width: 100%; height: 100%; object-fit: contain }"
PIXELS = ".image img { image-rendering: pixelated }"  # of a small image
FONT = ["system-ui", "sans-serif"]  # nothing comes from elsewhere


def find_gradio() -> Any:
    """The gradio package. ValueError when it is not installed."""
    try:
        import gradio
    except ImportError:
        raise ValueError("the web page needs gradio: pip install 'gradio>=6.7'") from None
    return gradio


def uploaded(path: str) -> str:
    """The path of a file that a browser has uploaded.

    gradio.Error for any other: a request may name an address, a device, or a file of this machine,
    and gradio itself checks that only for pages that its own `launch` has started.
    """
    gr = find_gradio()
    try:
        file, folder = Path(path).resolve(), Path(gr.utils.get_upload_folder()).resolve()
        good = file.is_relative_to(folder) and file.is_file()
    except (OSError, TypeError, ValueError):  # no path at all, a NUL in it, too long a name
        good = False
    if not good:
        raise gr.Error("images are uploaded, not read from an address or a path")
    return path


def build(model: NexusGen, limits: Limits) -> Any:
    """The page, a `gradio.Blocks` with its queue."""
    gr = find_gradio()
    tasks, size = Tasks(model, limits), model.config.image_size

    def upload(label: str) -> Any:
        """An image input that takes files from the browser only, opened by `load_image` alone."""
        look = {"height": 240, "elem_classes": "image", "buttons": []}
        image = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], **look)
        move = image.async_move_resource_to_block_cache

        async def move_file(path):
            return await move(uploaded(path))

        image.async_move_resource_to_block_cache = move_file
        image.preprocess = lambda payload: uploaded(payload.path) if payload else None
        return image

    def told(task):
        """The task, its mistakes shown to the visitor."""

        @wraps(task)
        def steps(*values):
            try:
                yield from task(*values)
            except (ValueError, OSError, MemoryError) as error:
                raise gr.Error(str(error)) from None

        return steps

    def form() -> list:
        with gr.Row():
            steps = gr.Slider(1, limits.num_steps, model.config.num_steps, step=1, label="Steps")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            sides = [gr.Number(size, label=name, precision=0) for name in ("Height", "Width")]
        return [steps, seed, *sides]

    def buttons(name: str) -> tuple[Any, Any]:
        with gr.Row():
            return gr.Button(name, variant="primary"), gr.Button("Stop")

    def results(*more: str) -> list:
        look = {"height": 360, "elem_classes": "image", "buttons": ["download", "fullscreen"]}
        picture = gr.Image(label="Image", format="png", **look)  # above the words
        return [picture, *[gr.Textbox(label=label) for label in (*more, "Made with")]]

    def wire(pressed, task, inputs: list, outputs: list, text) -> Any:
        options = {"concurrency_id": "model", "concurrency_limit": 1}
        run = gr.on([pressed[0].click, text.submit], told(task), inputs, outputs, **options)
        pressed[1].click(None, cancels=[run])
        return run

    with gr.Blocks(title="nexus_min", analytics_enabled=False) as page:
        gr.Markdown("# nexus_min\nDraw, edit and ask about images, or talk about them.")
        with gr.Tab("Draw"), gr.Row():
            with gr.Column():
                text, numbers, go = gr.Textbox(label="Prompt"), form(), buttons("Draw")
            with gr.Column():
                wire(go, tasks.draw, [text, *numbers], results("Reply"), text)
        with gr.Tab("Edit"), gr.Row():
            with gr.Column():
                source, text = upload("Source"), gr.Textbox(label="Instruction")
                decoder = gr.Radio(["editing", "generation"], value="editing", label="Decoder")
                numbers, go = form(), buttons("Edit")
            with gr.Column():
                wire(go, tasks.edit, [source, text, decoder, *numbers], results("Reply"), text)
        with gr.Tab("Ask"), gr.Row():
            with gr.Column():
                seen, text = upload("Image to ask about"), gr.Textbox(label="Question")
                go = buttons("Ask")
            with gr.Column():
                wire(go, tasks.ask, [seen, text], [gr.Textbox(label="Answer")], text)
        with gr.Tab("Conversation"), gr.Row():
            chat = gr.State(None)
            with gr.Column():
                history = gr.Chatbot(label="Conversation", buttons=["copy"])
                text = gr.Textbox(label="Message")
                go, new = buttons("Send"), gr.Button("New conversation")
            with gr.Column():
                outputs, added = [chat, history, *results()], upload("Show an image")
                keep = gr.Radio(list(KEEP), value="predicted", label="A drawn image is kept as")
                sent = wire(go, tasks.talk, [chat, text, added, keep, *form()], outputs, text)
                sent.success(lambda: ("", None), None, [text, added])  # said and shown once
                gr.on([new.click, history.clear], lambda: (None, [], None, ""), None, outputs)
    return page.queue(max_size=limits.queue, default_concurrency_limit=1)


def listen(host: str, port: int) -> socket.socket:
    """A socket at host:port, any free port for 0. ValueError when it cannot be had."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error}") from None


def server(model: NexusGen) -> Any:
    """A `uvicorn.Server` of the page, which `run(sockets=[...])` shows until stopped.

    Not `launch`: its own checks of the page give up after seconds, which a busy machine needs.
    """
    gr, limits = find_gradio(), Limits()
    import fastapi  # with gradio come both
    import uvicorn

    theme = gr.themes.Default(font=FONT, font_mono=["monospace"])
    css = CSS + (PIXELS if model.config.image_size < 256 else "")
    settings = {"max_file_size": limits.file, "theme": theme, "css": css, "footer_links": []}
    settings |= {"show_error": False, "ssr_mode": False, "mcp_server": False}
    site = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    site = gr.mount_gradio_app(site, build(model, limits), "/", **settings)
    config = uvicorn.Config(site, log_level="warning", timeout_graceful_shutdown=1)
    return uvicorn.Server(config)


def serve(model: NexusGen, place: socket.socket) -> None:
    """Show the page at a socket until Ctrl-C."""
    server(model).run(sockets=[place])
