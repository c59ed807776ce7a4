"""What every notebook shares: one look of all plots, strips of images, one seed.

Colors are those of Okabe and Ito, which the color-blind tell apart; maps of numbers use viridis
(one sign) or PuOr (two signs). Plots are stored in the file, so they are small.
"""

from __future__ import annotations

import hashlib
import random

import matplotlib.pyplot as plt
import numpy as np
import torch
from safetensors import safe_open

from nexus_min.weights import AR_FILE, TINY

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, YELLOW, BLACK = "#56B4E9", "#D55E00", "#F0E442", "#000000"
COLORS = [BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, YELLOW, BLACK]

STYLE = {
    "figure.dpi": 80,
    "figure.figsize": (6, 3),
    "figure.constrained_layout.use": True,
    "axes.prop_cycle": plt.cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "image.cmap": "viridis",
    "image.interpolation": "nearest",
}


def setup(seed: int = 0) -> None:
    """Plot defaults, and the same random numbers in every run."""
    plt.rcParams.update(STYLE)
    seed_all(seed)


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def claim(holds: bool) -> bool:
    """For `assert`: what a well-trained model does. A model of less than half an hour may fail."""
    with safe_open(TINY / f"{AR_FILE}.safetensors", "pt") as file:
        minutes = float(file.metadata()["minutes"])
    if not holds and minutes < 30:
        print(f"Not so with this model, which was trained for {minutes:.0f} minutes.")
    return bool(holds) or minutes < 30


def fingerprint(module: torch.nn.Module) -> str:
    """12 hex digits of the SHA-256 of the weights: tells which model a log is of."""
    digest = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        digest.update(name.encode() + x.float().numpy().tobytes())
    return digest.hexdigest()[:12]


def strip(images, titles=(), columns: int = 8, side: float = 1.1, caption: str = "", rows=()):
    """Images (PIL or arrays [H, W] or [H, W, 3]) with their titles; `rows` names each row."""
    images, titles = list(images), [str(t) for t in titles]
    columns = min(columns, len(images))
    height = -(-len(images) // columns)
    lines = 1 + max((t.count("\n") for t in titles), default=-1)
    margin = 0.075 * max(map(len, rows), default=0)
    size = (side * columns + margin, height * (side + 0.17 * lines) + 0.25 * bool(caption))
    figure, axes = plt.subplots(height, columns, figsize=size, squeeze=False)
    for k, ax in enumerate(axes.flat):
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set(visible=k < len(images), color="#CCCCCC")  # images may be white
        if k < len(images):
            ax.imshow(np.asarray(images[k]))
            ax.set_title(titles[k] if k < len(titles) else "", fontsize=8)
    for ax, name in zip(axes[:, 0], rows):
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    if caption:
        figure.suptitle(caption, fontsize=10)
    plt.show()


def heatmap(
    ax, values, label: str = "", signed: bool = False, numbers: bool = False, beside=None, **options
):
    """A map of numbers [rows, columns] on `ax`; signed: 0 is white; numbers: written on the cells.

    With a label there is a color bar: that of `ax`, or of all axes that it stands `beside`.
    """
    values = np.asarray(values)
    if signed:
        top = float(np.abs(values).max()) or 1.0
        options = {"cmap": "PuOr", "vmin": -top, "vmax": top} | options
    image = ax.imshow(values, **options)
    if label:
        owner = ax if beside is None else beside
        ax.figure.colorbar(image, ax=owner, label=label, fraction=0.046, pad=0.03)
    middle = (values.max() + values.min()) / 2
    for (row, column), value in np.ndenumerate(values) if numbers else ():
        color = "white" if value < middle else "black"  # of viridis the low end is dark
        ax.text(column, row, value, ha="center", va="center", color=color, fontsize=7)
    return image
