"""`python -m nexus_min eval`: scores a model in the toy world, on prompts and scenes it never saw.

GenEval's six categories, long captions, questions, edits and reconstruction (the toy forms of the
paper's tables 2 to 5), each with a 95 % interval. The checker (`score`) reads every image.
"""

import json
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..cli import check_least
from ..pipeline import NexusGen
from ..sampling import SamplingParams
from ..tokenizer import EDITING_REPLY, GENERATION_REPLY, IMAGE
from . import geneval
from .edits import EDITS
from .pictures import are_exact, save_grid
from .prompts import CATEGORIES, satisfies
from .questions import QUESTIONS, final_answer
from .score import l1_unedited, read
from .tasks import Example, sample_example
from .world import render

BATCH = 50
GROUPS = ("generation", "captions", "questions", "describe", "edits", "as typed")
GROUPS += ("reconstruction", "seen")
MIXED = {"generate": (*CATEGORIES, "several", "caption"), "understand": QUESTIONS, "edit": EDITS}
LANGUAGES = ("en", "zh")


@dataclass
class Score:
    """Right answers out of n, with Wilson's 95 % interval."""

    name: str
    right: int = 0
    n: int = 0
    notes: dict = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, verdicts: Sequence[bool], **notes) -> Self:
        return cls(name, sum(map(bool, verdicts)), len(verdicts), notes)

    @property
    def rate(self) -> float:
        return self.right / max(1, self.n)

    @property
    def interval(self) -> tuple[float, float]:
        n, p, z = max(1, self.n), self.rate, 1.96
        center, scale = p + z * z / (2 * n), 1 + z * z / n
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (center - half) / scale, (center + half) / scale

    def line(self) -> str:
        low, high = self.interval
        notes = "  ".join(f"{k} {v:.4g}" for k, v in self.notes.items())
        if not self.n and notes:  # a measure that is no rate
            return f"{self.name:34s} {notes}"
        return f"{self.name:34s} {self.rate:6.3f}  [{low:.3f}, {high:.3f}]  n={self.n:<5d} {notes}"

    def as_dict(self) -> dict:
        values = {"name": self.name, "rate": self.rate, "interval": self.interval, "n": self.n}
        return values | self.notes


def sample_examples(
    task: str, kind: str, zh: bool, n: int, seed: int, unseen: bool = True
) -> list[Example]:
    """n examples of one kind with different texts, as far as there are so many.

    In the first wording. "as typed" stands for all kinds, in wordings that training never shows.
    """
    kinds, words = (MIXED[task], kind) if kind == "as typed" else ((kind,), "plain")
    spelling = kind.replace("color", "colour").encode()  # keeps the cases of recorded scores
    rng = np.random.default_rng([seed, len(spelling), *spelling, zh, unseen])
    found: dict = {}
    for i in range(40 * n):
        kind = kinds[i % len(kinds)]
        ex = sample_example(rng, task, kind, zh, unseen=unseen, words=words)
        found.setdefault(ex.text if task == "generate" else (ex.text, ex.scenes), ex)
        if len(found) == n:
            break
    return list(found.values())


def predict(model: NexusGen, cases: list[Example], fast: bool = False) -> tuple[list[str], Tensor]:
    """The AR model's chain of thought before each image, and the images' embeddings [B, N, C]."""
    texts, rows = [], []
    for ex in cases:
        if ex.task == "edit":
            inputs = model.editing_inputs(Image.fromarray(render(ex.scenes[0])), ex.text)
        else:
            inputs = model.generation_inputs(ex.text, ex.language)
        sentence = (EDITING_REPLY if ex.task == "edit" else GENERATION_REPLY)[ex.language]
        text, embeds = model.predict_embeddings(inputs, sentence, fast, max_new_tokens=128)
        texts.append(text.removesuffix(sentence.removesuffix(IMAGE)).strip())
        rows.append(embeds)
    return texts, torch.cat(rows)


@torch.no_grad()
def sample_images(
    model: NexusGen, decoder: str, embeds: Tensor, sources: Sequence | None, seed: int
) -> np.ndarray:
    """Embeddings [B, N, C] -> images uint8 [B, H, W, 3], each from its own noise.

    sources: the images that the "editing" decoder edits
    """
    images, cfg_scale = [], 1.0 if decoder == "editing" else model.config.cfg_scale
    for i, part in enumerate(embeds.split(BATCH)):
        sampling = SamplingParams(seed=seed + i).resolve(model.config, cfg_scale)
        shape = sampling.latent_shape(model.config)
        if decoder == "editing":
            refs = [model.reference_embeds(x) for x in sources[i * BATCH : (i + 1) * BATCH]]
            context = model.editing_context(part, torch.cat(refs), *shape[2:])
        else:
            context = model.generation_context(part)
        generator = torch.Generator().manual_seed(seed + i)
        noise = torch.randn((len(part), *shape[1:]), generator=generator)
        *_, last = model.denoise_steps(getattr(model, decoder).mmdit, context, noise, sampling)
        images += [np.asarray(image) for image in model.decode(last.x)]
    return np.stack(images)


def _save_samples(folder: Path | None, name: str, **rows: np.ndarray) -> None:
    """Ten images of each row in one file: "edits en / add" -> edits_en_add.png."""
    if folder:
        path = folder / ("_".join(name.replace("/", " ").split()) + ".png")
        save_grid(path, **rows)


def score_generation(model, kind, zh, n, seed, unseen=True, name="", save=None) -> Iterator[Score]:
    """Images of prompts of one kind; for captions then also by number of objects."""
    cases = sample_examples("generate", kind, zh, n, seed, unseen)
    images = sample_images(model, "generation", predict(model, cases)[1], None, seed)
    _save_samples(save, name, drawn=images)
    distinct = len({ex.scenes[0].key for ex in cases})
    verdicts = [
        r.known and satisfies(r.scene, ex.spec) if ex.spec else r.is_exactly(ex.scenes[0])
        for r, ex in zip(read(images), cases, strict=True)
    ]
    yield Score.of(name, verdicts, scenes=distinct)
    counts = [len(ex.scenes[0].objects) for ex in cases]
    for count in sorted(set(counts)) if kind == "caption" else ():
        part = [v for v, c in zip(verdicts, counts, strict=True) if c == count]
        yield Score.of(f"{name}, {count} objects", part)


def score_questions(model, kind, zh, n, seed, name="") -> Iterator[Score]:
    """Exact answers to questions of one kind, after any chain of thought."""
    verdicts = []
    for ex in sample_examples("understand", kind, zh, n, seed):
        image = Image.fromarray(render(ex.scenes[0]))
        reply = model.understand(image, ex.text, max_new_tokens=128)
        verdicts.append(final_answer(reply) == ex.answer)
    yield Score.of(name, verdicts)


def score_edits(model, kind, zh, n, seed, name="", save=None) -> Iterator[Score]:
    """Edits of one kind by the editing decoder.

    Its notes: `told`, the share of replies that state the change rightly; L1 outside the edits of
    textured images, for both decoders and for a true target without the texture.
    """
    cases = sample_examples("edit", kind, zh, n, seed)
    sources, targets = (np.stack([render(ex.scenes[i]) for ex in cases]) for i in (0, 1))
    texts, embeds = predict(model, cases)
    inputs = embeds, [Image.fromarray(x) for x in sources], seed
    images = {d: sample_images(model, d, *inputs) for d in ("editing", "generation")}
    _save_samples(save, name, source=sources, target=targets, **images)
    images["no_texture"] = [render(replace(ex.scenes[1], texture=None)) for ex in cases]
    score = Score.of(name, are_exact(images["editing"], [ex.scenes[1] for ex in cases]))
    if told := [t.endswith(ex.answer) for t, ex in zip(texts, cases, strict=True) if ex.answer]:
        score.notes["told"] = sum(told) / len(told)
    textured = [i for i, ex in enumerate(cases) if ex.scenes[0].texture]
    textured = [i for i in textured if cases[i].kind not in ("background", "style")]
    if textured:
        for d, x in images.items():
            distances = [l1_unedited(x[i], targets[i], sources[i]) for i in textured]
            score.notes[f"l1_outside_{d}"] = float(np.mean(distances))
    yield score


def score_reconstruction(model, n, seed, save=None) -> Iterator[Score]:
    """Unseen scenes that the generation decoder redraws from their own image embeddings."""
    cases = sample_examples("generate", "caption", False, n, seed)
    truth = np.stack([render(ex.scenes[0]) for ex in cases])
    size = (model.config.target_size,) * 2
    views = [Image.fromarray(x).resize(size, Image.Resampling.BICUBIC) for x in truth]
    with torch.no_grad():
        embeds = torch.stack([model.embed_images([view])[0] for view in views])
    images = sample_images(model, "generation", embeds, None, seed)
    _save_samples(save, "reconstruction", truth=truth, drawn=images)
    yield Score.of("reconstruction", are_exact(images, [ex.scenes[0] for ex in cases]))


def by_kind(name: str, kinds: tuple[str, ...], score_kind: Callable, part="") -> Iterator[Score]:
    """The score of each kind, named `part / kind`, then their total and the worst."""
    parts: list[Score] = []
    for kind in kinds:
        parts += score_kind(kind, name=f"{part or name} / {kind}")
        yield parts[-1]
    yield Score(f"{name}: all", sum(s.right for s in parts), sum(s.n for s in parts))
    worst = min(parts, key=lambda s: s.rate)
    yield Score(f"{name}: worst ({worst.name.split(' / ')[-1]})", worst.right, worst.n)


def evaluate(
    model: NexusGen,
    cases: int = 200,
    seed: int = 0,
    groups: tuple[str, ...] = GROUPS,
    languages: tuple[str, ...] = LANGUAGES,
    save: Path | None = None,
) -> Iterator[Score]:
    """Yield the scores of the chosen groups, each as soon as it is known."""
    notes = []
    for language in languages:
        common = {"zh": language == "zh", "n": cases, "seed": seed}
        generation = partial(score_generation, model, save=save, **common)
        questions = partial(score_questions, model, **common)
        edits = partial(score_edits, model, save=save, **common)
        scores = {
            "generation": by_kind(f"geneval-toy {language}", CATEGORIES, generation),
            "captions": generation("caption", name=f"long captions {language}"),
            "questions": by_kind(f"questions {language}", QUESTIONS, questions),
            "describe": questions("describe", name=f"describe {language}"),
            "edits": by_kind(f"edits {language}", EDITS, edits),
            "as typed": chain.from_iterable(
                score("as typed", name=f"as typed {language} / {name}")
                for name, score in (
                    ("prompts", generation),
                    ("questions", questions),
                    ("edits", edits),
                )
            ),
        }
        if language == "en":
            seen = partial(generation, unseen=False, save=None)
            scores["seen"] = by_kind("geneval-toy en, in training", CATEGORIES, seen, "in training")
        for score in chain.from_iterable(scores[group] for group in scores if group in groups):
            is_kind = "as typed" not in score.name
            notes += [score.notes] if is_kind and "l1_outside_editing" in score.notes else []
            yield score
    if "reconstruction" in groups:
        yield from score_reconstruction(model, cases, seed, save)
    if notes:
        mean = {k: float(np.mean([n[k] for n in notes])) for k in notes[0] if k != "told"}
        ratio = mean["l1_outside_editing"] / mean["l1_outside_generation"]
        yield Score("L1 outside, editing / generation", notes={**mean, "ratio": ratio})


def add_arguments(parser: ArgumentParser) -> None:
    """Options of `python -m nexus_min eval`."""
    add = parser.add_argument
    add("--cases", type=int, default=200, metavar="N", help="cases of each kind")
    add("--groups", default=",".join(GROUPS), metavar="A,B", help="comma-separated groups")
    add("--languages", default=",".join(LANGUAGES), metavar="A,B", help="en, zh or both")
    add("--json", type=Path, metavar="FILE", help="write the results to this file")
    add("--save", type=Path, metavar="DIR", help="write sample grids (PNG) to this folder")
    add("--prompts", type=Path, metavar="FILE", help="score these prompts, in GenEval's format")
    add("--samples", type=int, default=4, metavar="N", help="images of each of the --prompts")
    add("--write_prompts", type=Path, metavar="FILE", help="only write prompts in GenEval's format")


def _chosen(text: str, names: tuple[str, ...], what: str) -> tuple[str, ...]:
    """The comma-separated words of `text`, each of which must be among `names`."""
    words = tuple(filter(None, map(str.strip, text.split(","))))
    unknown = [word for word in words if word not in names]
    if unknown or not words:
        unknown = ", ".join(unknown) or "(none)"
        raise ValueError(f"unknown {what} {unknown}; there are {', '.join(names)}")
    return words


def main(args: Namespace, load: Callable[[], NexusGen]) -> None:
    """Evaluate a model and print one line for each score."""
    groups = _chosen(args.groups, GROUPS, "groups")
    languages = _chosen(args.languages, LANGUAGES, "languages")
    check_least(args, cases=1, samples=1)
    if args.write_prompts:
        kinds = [(kind, language == "zh") for language in languages for kind in CATEGORIES]
        cases = [sample_examples("generate", *k, args.cases, args.seed) for k in kinds]
        lines = [geneval.metadata(ex) for ex in chain.from_iterable(cases)]
        geneval.write_lines(args.write_prompts, lines)
        return
    if args.prompts:
        prompts, folder = geneval.read_prompts(args.prompts), args.save or Path("geneval")
        progress = sys.stderr.isatty()
        results = geneval.evaluate(load(), prompts, folder, args.samples, args.seed, progress)
        rows = {tag: (c["score"], f"  n={c['judged']}") for tag, c in results["categories"].items()}
        for tag, (rate, n) in (rows | {"overall": (results["overall"], "")}).items():
            text = "   -" if rate is None else f"{rate:6.3f}"
            print(f"{tag:34s} {text}{n}")
    else:
        results = []
        for score in evaluate(load(), args.cases, args.seed, groups, languages, args.save):
            print(score.line(), flush=True)
            results.append(score.as_dict())
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
