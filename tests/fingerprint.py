"""Hashes of what the shipped model makes, to prove that a change of the code changes no output.

    python tests/fingerprint.py > before.json    # at the old commit
    python tests/fingerprint.py > after.json     # at the new one, on the same machine
    python tests/fingerprint.py --compare before.json after.json

60 images, 40 edits and 40 answers over seeds, sizes and options. Products depend on the processor
and the number of threads, so hashes of two machines differ. One thread is used.
"""

import hashlib
import json
import sys
from itertools import product

import torch

from nexus_min.pipeline import NexusGen

COLORS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("circle", "square", "triangle", "star", "cross")
OPTIONS = (
    {},
    {"num_steps": 5},
    {"fast_preamble": True},
    {"height": 48, "width": 96},
    {"cfg_scale": 2.0, "num_steps": 2},
    {"guidance": 1.0, "language": "zh"},
)
EDITS = (
    "Change the background to white.",
    "Remove the star.",
    "Add a small green cross at the bottom right.",
    "把背景改成灰色。",
)
QUESTIONS = (
    "What color is the background?",
    "Describe the image.",
    "How many shapes are in the image?",
    "图中有几个图形？",
)


def image_hash(image) -> str:
    """Of its size and its bytes."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:16]


def fingerprint() -> dict[str, str]:
    """Name -> hash of an image, or the text of an answer."""
    model, out, images = NexusGen.load("tiny"), {}, []
    for i in range(60):
        color, shape = COLORS[i % 5], SHAPES[i // 5 % 5]
        prompt = f"a {color} {shape} left of a blue circle" if i % 2 else f"a small {color} {shape}"
        prompt = "一个红色的圆形" if i % 10 == 7 else prompt
        image = model.generate(prompt, seed=i % 7, **OPTIONS[i % len(OPTIONS)])
        images.append(image)
        out[f"image {i}"] = image_hash(image)
    for i, (edit, k) in enumerate(product(EDITS, range(10))):
        options = ({}, {"decoder": "generation"}, {"fast_preamble": True, "num_steps": 4})[i % 3]
        out[f"edit {i}"] = image_hash(model.edit(images[3 * k], edit, seed=k, **options))
    for i, (question, k) in enumerate(product(QUESTIONS, range(10))):
        out[f"answer {i}"] = str(model.understand(images[5 * k], question))
    return out


def compare(before: dict, after: dict) -> int:
    """Print what differs; the number of differences."""
    names = sorted(before.keys() | after.keys())
    differ = [name for name in names if before.get(name) != after.get(name)]
    for name in differ:
        print(f"{name}: {before.get(name)} -> {after.get(name)}")
    print(f"{len(names) - len(differ)} of {len(names)} equal")
    return len(differ)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compare"]:
        old, new = (json.load(open(path)) for path in sys.argv[2:4])
        sys.exit(bool(compare(old, new)))
    torch.set_num_threads(1)
    print(json.dumps(fingerprint(), indent=1, ensure_ascii=False))
