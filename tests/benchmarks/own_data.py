"""What fine-tuning on a file of one's own teaches, and what it makes forget.

    python tests/benchmarks/own_data.py DIR --minutes 6

Writes DIR/new_words.jsonl, conversations of the toy world in which a yellow circle is called a sun
and a pink star a rose, words that the tiny model has never read; fine-tunes the shipped model on it
by `train_tiny.py --data`; and scores both models on scenes that no training saw: long captions and
descriptions in the new words, the same captions in the old ones, and edits in both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from nexus_min.pipeline import NexusGen
from nexus_min.toy.evaluate import predict, sample_images
from nexus_min.toy.pictures import exactness
from nexus_min.toy.tasks import Example, sample_example
from nexus_min.toy.world import render

TRAIN = Path(__file__).parents[2] / "train_tiny.py"
WORDS = {"yellow circle": "sun", "pink star": "rose"}
KINDS = {"understand": "describe", "generate": "caption", "edit": None}  # None: any kind


def in_new_words(text: str) -> str:
    """The text in the new words."""
    for old, new in WORDS.items():
        text = text.replace(old, new)
    return text


def examples(task: str, n: int, rng: np.random.Generator, unseen: bool) -> list[Example]:
    """n English examples that name an object with a new name."""
    found: list[Example] = []
    while len(found) < n:
        ex = sample_example(rng, task, KINDS[task], False, unseen=unseen)
        words = ex.text if task != "understand" else ex.messages[1]["content"]
        found += [ex] * (in_new_words(words) != words)
    return found


def lines(folder: Path, n: int) -> Iterator[dict]:
    """n examples of each task in the message-like format, their images beside the file."""
    rng = np.random.default_rng(0)
    for task in KINDS:
        for i, ex in enumerate(examples(task, n, rng, unseen=False)):
            names = [f"{task}_{i}_{k}.png" for k in range(len(ex.scenes))]
            for name, scene in zip(names, ex.scenes, strict=True):
                Image.fromarray(render(scene)).save(folder / name)
            messages = [m | {"content": in_new_words(m["content"])} for m in ex.messages]
            yield {"id": f"{task}_{i}", "images": names, "messages": messages}


def images_correct(model: NexusGen, batch: list[Example]) -> float:
    """Share of images that show exactly the whole scene."""
    decoder = "editing" if batch[0].task == "edit" else "generation"
    sources = [Image.fromarray(render(ex.scenes[0])) for ex in batch]
    images = sample_images(model, decoder, predict(model, batch)[1], sources, seed=0)
    return exactness(images, [ex.scenes[-1] for ex in batch])


def descriptions_correct(model: NexusGen, batch: list[Example]) -> float:
    """Share of descriptions that are right to the letter, in the new words."""
    answers = [model.understand(Image.fromarray(render(ex.scenes[0])), ex.text) for ex in batch]
    wanted = [in_new_words(ex.messages[1]["content"]) for ex in batch]
    return float(np.mean([a.strip() == b for a, b in zip(answers, wanted, strict=True)]))


def scores(model: NexusGen, cases: int) -> dict[str, float]:
    """By task and words."""
    rng = np.random.default_rng(1)
    known = {task: examples(task, cases, rng, unseen=True) for task in KINDS}
    new = {
        t: [replace(ex, text=in_new_words(ex.text)) for ex in batch] for t, batch in known.items()
    }
    others = [sample_example(rng, "generate", "caption", False, unseen=True) for _ in range(cases)]
    found = {
        "captions, new words": images_correct(model, new["generate"]),
        "captions, old words": images_correct(model, known["generate"]),
        "captions of any scene": images_correct(model, others),
        "descriptions, new words": descriptions_correct(model, new["understand"]),
        "edits, new words": images_correct(model, new["edit"]),
        "edits, old words": images_correct(model, known["edit"]),
    }
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--lines", type=int, default=200, help="of each task")
    parser.add_argument("--cases", type=int, default=100, help="of each score")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    file, out = args.folder / "new_words.jsonl", args.folder / "run"
    if out.exists():
        parser.error(f"{out} exists: give another DIR")
    rows = [json.dumps(line) for line in lines(args.folder, args.lines)]
    file.write_text("\n".join(rows) + "\n", "utf-8")
    print(json.dumps({"model": "tiny"} | scores(NexusGen.load("tiny"), args.cases)), flush=True)
    options = ["--data", file, "--out", out, "--minutes", args.minutes, "--quiet"]
    subprocess.run([sys.executable, str(TRAIN), *map(str, options)], check=True)
    tuned = NexusGen.load(str(out / "model"))
    print(json.dumps({"model": f"after {args.minutes:g} minutes"} | scores(tuned, args.cases)))


if __name__ == "__main__":
    main()
