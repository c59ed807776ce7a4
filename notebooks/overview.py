"""The README's figure: the files that data passes through, and results of the tiny model.

    python notebooks/overview.py        writes notebooks/overview.png

Needs notebooks/requirements.txt. The results at the right are the shipped model's; its chain of thought
is left out.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
from common import BLACK, BLUE, GREEN, ORANGE, PINK, setup
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from nexus_min.pipeline import NexusGen
from nexus_min.toy.world import Object, Scene, render

OUTPUT = Path(__file__).with_name("overview.png")
WIDTH, HEIGHT = 2.3, 0.62
GRAY = "#666666"
BOXES = {  # name: (x, y, text, color)
    "words": (0.2, 4.6, "prompt, question\ntokenizer.py", GRAY),
    "source": (0.2, 3.3, "image\nimages.py", GRAY),
    "vision": (3.1, 3.3, "vision tower\nvision.py", BLUE),
    "ar": (3.1, 4.6, "autoregressive model\ndecoder.py, autoregressive.py", BLUE),
    "answer": (6.1, 4.6, "answer\n(text)", GRAY),
    "projector": (3.1, 2.0, "adapter / merger\nprojector.py", ORANGE),
    "mmdit": (3.1, 0.7, "FLUX transformer\nmmdit.py", GREEN),
    "flow": (0.2, 0.7, "noise, Euler steps\nflow.py", GREEN),
    "text": (0.2, 2.0, "empty prompt\ntext_encoders.py", GRAY),
    "vae": (6.1, 0.7, "FLUX autoencoder\nautoencoder.py", PINK),
    "result": (6.1, 2.0, "image", GRAY),
}
ARROWS = (  # from, to, label, bend
    ("words", "ar", "", 0),
    ("source", "vision", "", 0),
    ("vision", "ar", "image embeddings", 0),
    ("ar", "answer", "", 0),
    ("ar", "projector", "", -0.9),
    ("vision", "projector", "edit: the source's", 0),
    ("projector", "mmdit", "context", 0),
    ("text", "mmdit", "", 0),
    ("flow", "mmdit", "", 0),
    ("mmdit", "vae", "latents", 0),
    ("vae", "result", "", 0),
)


def center(name: str) -> np.ndarray:
    x, y = BOXES[name][:2]
    return np.array([x + WIDTH / 2, y + HEIGHT / 2])


def draw_flow(ax) -> None:
    """Boxes with their file names, and the arrows between them."""
    for x, y, text, color in BOXES.values():
        style = {"boxstyle": "round,pad=0.05", "fc": color + "22", "ec": color, "lw": 1.3}
        ax.add_patch(FancyBboxPatch((x, y), WIDTH, HEIGHT, **style))
        head, _, file = text.partition("\n")
        ax.text(x + WIDTH / 2, y + HEIGHT * (0.68 if file else 0.5), head, ha="center", va="center")
        ax.text(x + WIDTH / 2, y + 0.18, file, ha="center", va="center", family="monospace", size=7)
    for start, end, label, bend in ARROWS:
        a, b = center(start), center(end)
        step = (b - a) / np.abs(b - a).max()
        gap = np.array([WIDTH / 2 + 0.08, HEIGHT / 2 + 0.08]) * np.abs(step).round()
        a, b = a + step * gap, b - step * gap
        shape = {"arrowstyle": "-|>", "mutation_scale": 11, "color": BLACK, "lw": 1.1}
        if bend:
            a, b = a + [0.9, 0], b + [0.9, 0]
            shape["connectionstyle"] = f"arc3,rad={bend}"
        ax.add_patch(FancyArrowPatch(a, b, **shape))
        middle = (a + b) / 2
        side = [0.1, 0] if abs(step[1]) > abs(step[0]) else [-0.22, 0.17]
        ax.text(*(middle + side), label, size=7, color=GRAY, va="center")
    ax.text(6.15, 3.42, "prefilled slots:\n81 embeddings in\none causal pass", size=7, color=GRAY)
    ax.set(xlim=(0, 8.6), ylim=(0.4, 5.5))
    ax.axis("off")


def results() -> list[tuple[str, list]]:
    """Three things that the shipped model does: a caption and its images each."""
    model = NexusGen.load("tiny")
    prompt = "a red star left of a blue circle"
    objects = (Object("square", "green", "large", 0), Object("circle", "yellow", "small", 5))
    source = render(Scene((*objects, Object("triangle", "pink", "large", 7)), "gray"))
    order = "Change the triangle to yellow."
    question = "What color is the triangle?"
    answer = model.understand(source, question).answer
    edited = dict(model.edit_steps(source, order))
    change = fill(f"→ “{edited['text'].split('. ')[1]}.”", 44)
    return [
        (f"generate\n“{prompt}”", [model.generate(prompt)]),
        (f"edit\n“{order}”\n{change}", [source, edited["image"]]),
        (f"understand\n“{question}” → “{answer}”", [source]),
    ]


def draw_results(figure) -> None:
    """One row a task."""
    for row, (caption, images) in enumerate(results()):
        bottom = (0.7, 0.355, 0.03)[row]
        for column, image in enumerate(images):
            ax = figure.add_axes([0.745 + 0.125 * column, bottom, 0.1, 0.2188])
            ax.imshow(np.asarray(image), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set(visible=True, color="#CCCCCC")
        figure.text(0.745, bottom + 0.225, caption, size=7, va="bottom")


def main() -> None:
    setup()
    figure = plt.figure(figsize=(10.5, 4.8), dpi=110, constrained_layout=False)
    draw_flow(figure.add_axes([0.0, 0.0, 0.73, 1.0]))
    draw_results(figure)
    figure.savefig(OUTPUT)


if __name__ == "__main__":
    main()
