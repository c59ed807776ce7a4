"""`python -m nexus_min eval`: scores a model in the toy world, on prompts and scenes it never saw.

GenEval's six categories, long captions, questions, edits and reconstruction (the toy forms of the
paper's tables 2 to 5), each with a 95 % interval. The checker reads every image back (score.py);
nothing is judged by eye or by another model. The official code has no counterpart.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..pipeline import NexusGen
from ..sampling import SamplingParams
from ..tokenizer import EDITING_REPLY, GENERATION_REPLY, IMAGE
from . import geneval, score
from .edits import EDITS
from .pictures import save_grid
from .prompts import CATEGORIES, satisfies
from .questions import QUESTIONS, final
from .tasks import Example, example
from .world import render

BATCH = 50
GROUPS = ("generation", "captions", "questions", "describe", "edits", "reconstruction", "seen")
LANGUAGES = ("en", "zh")


@dataclass
class Tally:
    """Right answers out of n, with Wilson's 95 % interval."""

    name: str
    right: int = 0
    n: int = 0
    notes: dict = field(default_factory=dict)

    def add(self, ok: bool) -> None:
        """Count one case."""
        self.right, self.n = self.right + bool(ok), self.n + 1

    @property
    def rate(self) -> float:
        """Share of right answers, 0 of 0 counted as 0."""
        return self.right / max(1, self.n)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate."""
        n, p, z = max(1, self.n), self.rate, 1.96
        middle = p + z * z / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

    def line(self) -> str:
        """For the terminal."""
        low, high = self.interval
        notes = "  ".join(f"{k} {v:.4g}" for k, v in self.notes.items())
        if not self.n and notes:  # a measure that is no rate
            return f"{self.name:34s} {notes}"
        return f"{self.name:34s} {self.rate:6.3f}  [{low:.3f}, {high:.3f}]  n={self.n:<5d} {notes}"

    def as_dict(self) -> dict:
        """For JSON."""
        own = {"name": self.name, "rate": self.rate, "interval": self.interval, "n": self.n}
        return own | self.notes


def examples(
    task: str, kind: str, zh: bool | None, n: int, seed: int, unseen: bool = True
) -> list[Example]:
    """n examples of one kind with different texts where there are so many."""
    spelled = kind.replace("color", "colour").encode()  # seeds the same cases as ever
    rng = np.random.default_rng([seed, len(spelled), *spelled, bool(zh), unseen])
    found: dict = {}
    for _ in range(40 * n):
        ex = example(rng, task, kind, zh, unseen=unseen)
        found.setdefault(ex.text if task == "generate" else (ex.text, ex.scenes), ex)
        if len(found) == n:
            break
    return list(found.values())


def _pictures(scenes) -> list[Image.Image]:
    return [Image.fromarray(render(s)) for s in scenes]


def _arrays(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(p) for p in pictures])


@torch.no_grad()
def draw(
    model: NexusGen, decoder: str, embeds: torch.Tensor, references, seed: int, **options
) -> np.ndarray:
    """Embeddings [B, N, C] -> images uint8 [B, H, W, 3], one batch, one noise an image."""
    scale = 1.0 if decoder == "editing" else model.config.cfg_scale
    sampling = SamplingParams(seed=seed, **options).resolve(model.config, scale)
    shape = sampling.latent_shape(model.config)
    if decoder == "editing":
        refs = torch.cat([model.reference_embeds(p) for p in references])
        context = model.editing_context(embeds, refs, *shape[2:])
    else:
        context = model.generation_context(embeds)
    noise = torch.randn((len(embeds), *shape[1:]), generator=torch.Generator().manual_seed(seed))
    steps = list(model.denoise_steps(getattr(model, decoder).mmdit, context, noise, sampling))
    return _arrays(model.decode(steps[-1].x))


def predict(model: NexusGen, batch: list[Example], fast: bool = False) -> torch.Tensor:
    """The AR model's embeddings of the images that examples ask for: [B, N, C]."""
    return replies(model, batch, fast)[1]


def replies(
    model: NexusGen, batch: list[Example], fast: bool = False
) -> tuple[list[str], torch.Tensor]:
    """What the AR model says before each image beyond the usual sentence, and `predict`."""
    texts, rows = [], []
    for ex in batch:
        if ex.task == "edit":
            inputs = model.editing_inputs(_pictures(ex.scenes[:1])[0], ex.text)
            sentence = EDITING_REPLY[ex.language]
        else:
            inputs = model.generation_inputs(ex.text, ex.language)
            sentence = GENERATION_REPLY[ex.language]
        said, embeds = model.predict_embeddings(inputs, sentence, fast, max_new_tokens=128)
        texts.append(said.removesuffix(sentence.removesuffix(IMAGE)).strip())
        rows.append(embeds)
    return texts, torch.cat(rows)


def batches(items: list) -> list[list]:
    """Consecutive parts of at most BATCH items."""
    return [items[i : i + BATCH] for i in range(0, len(items), BATCH)]


def file_name(name: str) -> str:
    """ "edits en / add" -> "edits_en_add"."""
    return "_".join(name.replace("/", " ").split())


def score_generation(
    model, kind, zh, n, seed, unseen=True, name="", save=None, **options
) -> list[Tally]:
    """Images of prompts of one kind; captions also by number of objects."""
    cases = examples("generate", kind, zh, n, seed, unseen)
    tallies = {"all": Tally(name, notes={"scenes": len({ex.scenes[0].key for ex in cases})})}
    for number, batch in enumerate(batches(cases)):
        pictures = draw(model, "generation", predict(model, batch), None, seed + number, **options)
        for ex, reading in zip(batch, score.read(pictures), strict=True):
            if kind != "caption":
                ok = reading.known and satisfies(reading.scene, ex.wanted)
            else:
                ok = reading.is_exactly(ex.scenes[0])
                count = len(ex.scenes[0].objects)
                tallies.setdefault(count, Tally(f"{name}, {count} objects")).add(ok)
            tallies["all"].add(ok)
        if save and number == 0:
            save_grid(save / f"{file_name(name)}.png", [pictures[:10]])
    return [tallies.pop("all")] + [tallies[k] for k in sorted(tallies)]


def score_questions(model, kind, zh, n, seed, name="") -> list[Tally]:
    """Exact answers to questions of one kind, whatever the model thinks before it answers."""
    tally = Tally(name)
    for ex in examples("understand", kind, zh, n, seed):
        said = model.understand(_pictures(ex.scenes)[0], ex.text, max_new_tokens=128)
        tally.add(final(said) == ex.answer)
    return [tally]


def score_edits(model, kind, zh, n, seed, name="", save=None, **options) -> list[Tally]:
    """Edits of one kind by the editing decoder; both decoders' L1 outside, where textured.

    `told`, where one object changes, is the share whose reply says rightly what will. Outside the
    edit, `no_texture` is a faultless image but for the texture, which the source alone shows.
    """
    tally, distances = Tally(name), {"editing": [], "generation": [], "no_texture": []}
    told = Tally(name)
    for number, batch in enumerate(batches(examples("edit", kind, zh, n, seed))):
        sources = _pictures([ex.scenes[0] for ex in batch])
        texts, embeds = replies(model, batch)
        for ex, text in zip(batch, texts, strict=True):
            if ex.answer:  # it changes one object
                told.add(text.endswith(ex.answer))
        drawn = {
            decoder: draw(model, decoder, embeds, sources, seed + number, **options)
            for decoder in ("editing", "generation")
        }
        drawn["no_texture"] = [render(replace(ex.scenes[1], texture=None)) for ex in batch]
        for i, (ex, reading) in enumerate(zip(batch, score.read(drawn["editing"]), strict=True)):
            tally.add(reading.is_exactly(ex.scenes[1]))
            if ex.scenes[0].texture and kind not in ("background", "style"):
                source, target = (render(s) for s in ex.scenes)
                for d, values in distances.items():
                    values.append(score.l1_outside(drawn[d][i], target, source))
        if save and number == 0:
            targets = _arrays(_pictures([ex.scenes[1] for ex in batch]))
            rows = [_arrays(sources), targets, drawn["editing"], drawn["generation"]]
            save_grid(save / f"{file_name(name)}.png", [r[:10] for r in rows])
    if told.n:
        tally.notes = {"told": told.rate}
    if distances["editing"]:
        tally.notes |= {f"l1_outside_{d}": float(np.mean(v)) for d, v in distances.items()}
    return [tally]


def score_reconstruction(model, n, seed, save=None, **options) -> list[Tally]:
    """Unseen scenes drawn again by the generation decoder from their own image embeddings."""
    tally = Tally("reconstruction")
    scenes = [ex.scenes[0] for ex in examples("generate", "caption", False, n, seed)]
    for number, batch in enumerate(batches(scenes)):
        pictures, size = _pictures(batch), (model.config.target_size,) * 2
        views = [p.resize(size, Image.Resampling.BICUBIC) for p in pictures]
        with torch.no_grad():
            tokens = model.embed_images(views)[0]
        embeds = tokens.reshape(len(batch), -1, tokens.shape[-1])
        drawn = draw(model, "generation", embeds, None, seed + number, **options)
        for scene, reading in zip(batch, score.read(drawn), strict=True):
            tally.add(reading.is_exactly(scene))
        if save and number == 0:
            save_grid(save / "reconstruction.png", [_arrays(pictures)[:10], drawn[:10]])
    return [tally]


def totals(name: str, parts: list[Tally]) -> list[Tally]:
    """The total over `parts`, and the worst of them."""
    total = Tally(f"{name}: all", sum(t.right for t in parts), sum(t.n for t in parts))
    worst = min(parts, key=lambda t: t.rate)
    label = f"{name}: worst ({worst.name.split(' / ')[-1]})"
    return [total, Tally(label, worst.right, worst.n)]


class _Book:
    """The tallies so far; each is reported as it is known."""

    def __init__(self, report: Callable[[Tally], None]):
        self.rows: list[Tally] = []
        self.report = report

    def add(self, tallies: list[Tally]) -> Tally:
        """Enter tallies; the first of them."""
        self.rows.extend(tallies)
        for tally in tallies:
            self.report(tally)
        return tallies[0]

    def kinds(self, name: str, kinds: tuple[str, ...], score_one: Callable, part: str = "") -> None:
        """Enter a tally a kind, named `part / kind`, then their total and the worst."""
        parts = [self.add(score_one(k, name=f"{part or name} / {k}")) for k in kinds]
        self.add(totals(name, parts))


def _score_language(book: _Book, model, zh, cases, seed, groups, save, options) -> None:
    lang = "zh" if zh else "en"
    generation = partial(score_generation, model, zh=zh, n=cases, seed=seed, **options)
    questions = partial(score_questions, model, zh=zh, n=cases, seed=seed)
    edits = partial(score_edits, model, zh=zh, n=cases, seed=seed, save=save, **options)
    if "generation" in groups:
        book.kinds(f"geneval-toy {lang}", CATEGORIES, partial(generation, save=save))
    if "captions" in groups:
        book.add(generation("caption", name=f"long captions {lang}", save=save))
    if "questions" in groups:
        book.kinds(f"questions {lang}", QUESTIONS, questions)
    if "describe" in groups:
        book.add(questions("describe", name=f"describe {lang}"))
    if "edits" in groups:
        book.kinds(f"edits {lang}", EDITS, edits)
    if "seen" in groups and not zh:
        known = partial(generation, unseen=False)
        book.kinds("geneval-toy en, in training", CATEGORIES, known, "in training")


def evaluate(
    model: NexusGen,
    cases: int = 200,
    seed: int = 0,
    groups: tuple[str, ...] = GROUPS,
    languages: tuple[str, ...] = LANGUAGES,
    save: Path | None = None,
    report: Callable[[Tally], None] = lambda tally: None,
    **options,
) -> list[Tally]:
    """All tallies of the chosen groups; `report` is called with each as it is known."""
    book = _Book(report)
    for language in languages:
        _score_language(book, model, language == "zh", cases, seed, groups, save, options)
    if "reconstruction" in groups:
        book.add(score_reconstruction(model, cases, seed, save, **options))
    outside = [t.notes for t in book.rows if "l1_outside_editing" in t.notes]
    if outside:
        names = [k for k in outside[0] if k.startswith("l1_outside_")]
        mean = {k: float(np.mean([o[k] for o in outside])) for k in names}
        ratio = mean["l1_outside_editing"] / mean["l1_outside_generation"]
        book.add([Tally("L1 outside, editing / generation", 0, 0, {**mean, "ratio": ratio})])
    return book.rows


def add_arguments(parser: ArgumentParser) -> None:
    """Options of `python -m nexus_min eval`."""
    parser.add_argument("--cases", type=int, default=200, help="cases a category (default 200)")
    known = ", ".join(GROUPS)
    parser.add_argument("--groups", default=",".join(GROUPS), help=f"comma-separated: {known}")
    parser.add_argument("--languages", default=",".join(LANGUAGES), help="en, zh or both")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--save", type=Path, help="write sample grids (PNG) to this folder")
    parser.add_argument("--prompts", type=Path, help="score these prompts, in GenEval's format")
    parser.add_argument("--samples", type=int, default=4, help="images a prompt of --prompts")
    parser.add_argument(
        "--write_prompts", type=Path, help="only write the toy prompts, in that format"
    )


def chosen(text: str, names: tuple[str, ...], what: str) -> tuple[str, ...]:
    """The comma-separated names of `text`. ValueError for one that is not among `names`."""
    picked = tuple(word.strip() for word in text.split(",") if word.strip())
    if unknown := [word for word in picked if word not in names] or ["(none)"] * (not picked):
        raise ValueError(f"unknown {what} {', '.join(unknown)}; there are {', '.join(names)}")
    return picked


def toy_prompts(languages: tuple[str, ...], cases: int, seed: int) -> list[dict]:
    """The unseen short prompts that `evaluate` would draw, in GenEval's format."""
    wanted = [(kind, language == "zh") for language in languages for kind in CATEGORIES]
    found = [ex for kind, zh in wanted for ex in examples("generate", kind, zh, cases, seed)]
    return [geneval.metadata(ex) for ex in found]


def score_prompts(model: NexusGen, lines: list[dict], args: Namespace) -> dict:
    """Draw and score prompts in GenEval's format; a line a category."""
    folder = args.save or Path("geneval")
    found = geneval.evaluate(model, lines, folder, args.samples, args.seed, sys.stderr.isatty())
    for tag, row in [*found["categories"].items(), ("overall", {"score": found["overall"]})]:
        rate = "   -" if row["score"] is None else f"{row['score']:6.3f}"
        print(f"{tag:34s} {rate}" + (f"  n={row['judged']}" if "judged" in row else ""))
    return found


def main(args: Namespace, load: Callable[[], NexusGen] | None = None) -> int:
    """Evaluate and print one line a score. ValueError for bad options."""
    groups = chosen(args.groups, GROUPS, "groups")
    languages = chosen(args.languages, LANGUAGES, "languages")
    for name in ("cases", "samples"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.write_prompts:
        lines = toy_prompts(languages, args.cases, args.seed)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        args.write_prompts.write_text(text, "utf-8")
        return 0
    lines = geneval.read_prompts(args.prompts) if args.prompts else None
    model = load() if load else NexusGen.load(args.model)
    if lines:
        results = score_prompts(model, lines, args)
    else:
        show = lambda tally: print(tally.line(), file=sys.stdout, flush=True)  # noqa: E731
        rows = evaluate(model, args.cases, args.seed, groups, languages, args.save, show)
        results = [t.as_dict() for t in rows]
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 0
