"""The parts of one model: which there are, how they are read, where they work.

`pipeline.NexusGen` is these parts and what they do together. A folder in the layout of the official
release, like the shipped tiny model's, has them all.
"""

import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import weights
from .config import NexusGenConfig
from .formats import find_file
from .model.autoencoder import AutoEncoder
from .model.autoregressive import NexusGenAR
from .model.mmdit import context_ids_generation
from .model.text_encoders import CLIPTextModel, T5Encoder, clip_tokenizer, t5_tokenizer
from .offload import PROFILES, Offloader, Target, advice, explain_oom, memory_needed, to_fp8, towers
from .sampling import Context, SamplingParams
from .tokenizer import IMAGE, QwenTokenizer, check_text, rust_panic_as_error
from .weights import AR_FOLDER, AS_STORED, FLUX_FOLDER, EditingDecoder, GenerationDecoder

logger = logging.getLogger(__name__)
PARTS = ("ar", "generation", "editing", "autoencoder")
WORD = r"[a-z\u00c0-\u024f]+|[^\W\d_a-z\u00c0-\u024f]+"  # Latin letters, or other letters
ABOUT = "what toy_words.json beside the model lists"
PART_NAMES = {
    "ar": "autoregressive model",
    "generation": "generation decoder",
    "editing": "editing decoder",
    "text_encoders": "text encoders (CLIP and T5), which a negative prompt needs",
    "empty_prompt": "constants of the empty prompt",
}


class BeyondTraining(UserWarning):
    """A text, an image or a size unlike all that the model was trained on."""


def warn_caller(sentence: str) -> None:
    """Warn at the line that called this package, each time that it does."""
    frame, inside = sys._getframe(1), ("nexus_min", "torch", "contextlib")
    while frame.f_back and frame.f_globals["__name__"].startswith(inside):
        frame = frame.f_back
    warnings.warn_explicit(sentence, BeyondTraining, frame.f_code.co_filename, frame.f_lineno)


class Answer(str):
    """A reply to a question; `answer` is its end, `reasoning` ("" for none) what leads there.

    A small model says "a star at the top, ... a star at the top: star"; others only answer.
    """

    answer: str
    reasoning: str

    @classmethod
    def of(cls, reply: str, is_reasoned: bool = True) -> "Answer":
        parts = re.fullmatch("(?s)(?:(.*)(?:[:.] |[：。]))?(.*)", reply) if is_reasoned else None
        self, (before, end) = cls(reply), parts.groups() if parts else ("", reply)
        self.reasoning, self.answer = (before or "").strip(), end.strip()
        return self


def any_of(words: Iterable[str]) -> str:
    """A pattern of one of these words, the longest that fits; Latin ones match whole."""
    forms = [rf"\b{re.escape(w)}\b" if w.isascii() else re.escape(w) for w in words]
    return f"(?:{'|'.join(sorted(forms, key=len, reverse=True)) or '(?!)'})"


class Known:
    """What a small model knows; `check` tells of what is beyond it.

    facts: of `toy_words.json` beside the model (`toy.vocabulary.known_facts`), or only its list of
    words. None, as at full scale, is a model that is held to know everything.
    """

    def __init__(self, facts: Any = None, size: int = 0, fold: Callable[[str], str] = str):
        facts = {"words": facts} if isinstance(facts, list) else facts
        self.facts, self.fold = {"sizes": [size], **facts} if facts else {}, fold
        get = self.facts.get
        words = [word.lower() for word in get("words", ())]
        self.latin = set(re.findall(WORD, " ".join(words)))
        self.other = re.compile(any_of(w for w in words if not w.isascii()))
        kinds = ("objects", "colors", "backgrounds", "background", "adjectives", "numbers")
        noun, color, ground, behind, size, number = (any_of(get(kind, ())) for kind in kinds)
        thing = f"(?:(?:{color}|{ground}|{size})(?:的| )?){{0,4}}{noun}"
        self.objects = re.compile(rf"(?:({number}|\b\d{{1,6}})[个颗只]?(?:的| )?)?{thing}")
        self.ground = re.compile(behind)
        # a color of backgrounds right before an object, or where no word means the background
        self.painted = re.compile(f"({ground})(?:的| )?{thing}")
        self.behind = re.compile(f"({color})(?:的| )?{behind}")
        self.alone = re.compile(rf"(?<!\bon )(?<!\bover )(?<!\bagainst )(?<!\bfront of )({ground})")

    @classmethod
    def read(cls, folder: Path, size: int, tokenizer: QwenTokenizer) -> "Known":
        """What the model in a folder knows; size: of its images, in pixels."""
        file = folder / "toy_words.json"
        if not file.is_file():
            return cls()
        try:
            return cls(json.loads(file.read_text("utf-8")), size, tokenizer.fold)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file}: not a list of words ({error}); delete it") from None

    def check(
        self,
        text: str,
        images: Sequence[Image.Image] = (),
        sampling: SamplingParams | None = None,
        tell: Callable[[str], None] = warn_caller,
    ) -> None:
        """Call `tell` with a sentence for each way in which a task is beyond the training."""
        if not self.facts:
            return
        get, text = self.facts.get, self.fold(text.replace(IMAGE, " ")).lower()
        about = get("about", ABOUT)
        words = re.findall(WORD, self.other.sub(" ", text))
        if strange := [word for word in dict.fromkeys(words) if word not in self.latin]:
            shown = ", ".join(strange[:10]) + (" ..." if len(strange) > 10 else "")
            tell(f"words this model has never seen: {shown}; it knows {about}")
        numbers, found = {None: 1, **get("numbers", {})}, self.objects.finditer(text)
        named = [m[1] for m in found if m[0] not in get("conjunctions", ())]
        count = sum(numbers[n] if n in numbers else int(n) for n in named)
        if count > (most := get("most_objects", count)):
            tell(f"this model draws at most {most} objects, not {count}: name fewer of them")
        of_objects = self.painted if self.ground.search(text) else self.alone
        for pattern, what in ((of_objects, "backgrounds"), (self.behind, "objects")):
            if wrong := ", ".join(dict.fromkeys(pattern.findall(text))):
                tell(f"this model knows {wrong} as a color of {what} only; it knows {about}")
        sizes = get("sizes")
        if sampling and not {sampling.height, sampling.width} <= {*sizes}:
            size, only = f"{sampling.width}x{sampling.height}", ", ".join(f"{n}x{n}" for n in sizes)
            tell(f"this model draws at {only}, not at {size}: draw so, then enlarge the image")
        rgb = np.array([c for colors in get("rgb", {}).values() for c in colors], np.int16)
        views = [np.asarray(image.convert("RGB").resize((64, 64)), np.int16) for image in images]
        off = [abs(view[:, :, None] - rgb).max(-1).min(-1) for view in views if len(rgb)]
        if any((levels < 36).mean() < 0.8 for levels in off):  # from the nearest known color
            tell(f"this model has never seen an image like this one; it knows {about}")

    def introduction(self, text: str, has_images: bool) -> str:
        """What a small model can do, for a text that asks for nothing that it knows; else ""."""
        text = self.fold(text.replace(IMAGE, " ")).lower()
        asks = {*re.findall(WORD, text)} & self.latin or self.other.search(text)
        if asks and not has_images and "objects" in self.facts:
            asks = self.objects.search(text)  # there is no image to ask about
        about = self.facts.get("about", ABOUT)
        return f"I draw, change and describe {about}." if self.facts and not asks else ""


class TextEncoders(NamedTuple):
    """CLIP and T5 with their tokenizers (text -> ids): for a negative prompt that is not empty."""

    clip: CLIPTextModel
    t5: T5Encoder
    clip_tokenizer: Callable[[str], Tensor] | None = None
    t5_tokenizer: Callable[[str], Tensor] | None = None

    @torch.no_grad()
    def context(self, text: str) -> Context:
        """T5's states [1, 512, C] at position 0, and CLIP's vector; padding takes part."""
        device = self.t5.shared.weight.device
        txt = self.t5(self.t5_tokenizer(text).to(device))
        pooled = self.clip(self.clip_tokenizer(text).to(device))
        return Context(txt, context_ids_generation(txt.shape[1]), pooled)


def read_part(name: str, folder: Path, config: NexusGenConfig, load_kwargs: dict) -> Any:
    """One of `PARTS` from its official file."""
    ar_dir, options = folder / AR_FOLDER, {"config": config, **load_kwargs}
    if name == "ar":
        return weights.load_ar(ar_dir, **options)
    if name == "autoencoder":
        return weights.load_autoencoder(folder / FLUX_FOLDER, **options)
    if name == "generation":
        file = find_file(ar_dir, ("generation_decoder",))
        adapter = weights.load_generation_adapter(file, **options)
        return GenerationDecoder(weights.load_mmdit(file, **options), adapter)
    if name == "editing":
        file = find_file(ar_dir, ("edit_decoder",))
        merger = weights.load_embedding_merger(file, **options)
        return EditingDecoder(weights.load_mmdit(file, **options), merger)
    raise ValueError(f"parts are {', '.join(PARTS)}, got {name!r}")


def read_tokenizer(folder: Path, config: NexusGenConfig) -> QwenTokenizer:
    """The tokenizer of a model, which must have the ids that its configuration names."""
    tokenizer = tokenizer_of(find_file(folder / AR_FOLDER / "tokenizer.json"), QwenTokenizer)
    tokenizer.check(config.ar)
    return tokenizer


def tokenizer_of(path: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of a tokenizer's file or folder; one line that names it when broken."""
    try:
        with rust_panic_as_error():
            return read(path)
    except Exception as error:  # `tokenizers` raises bare Exceptions on a broken file
        raise ValueError(f"{path}: cannot be read as a tokenizer: {error}") from error


def read_text_encoders(folder: Path, config: NexusGenConfig, load_kwargs: dict) -> TextEncoders:
    """CLIP, T5 and their tokenizers of FLUX.1-dev."""
    flux_dir = folder / FLUX_FOLDER
    return TextEncoders(
        weights.load_clip(flux_dir / "text_encoder", config, **load_kwargs),
        weights.load_t5(flux_dir / "text_encoder_2", config, **load_kwargs),
        tokenizer_of(flux_dir / "tokenizer", clip_tokenizer),
        tokenizer_of(flux_dir / "tokenizer_2", t5_tokenizer),
    )


def read_empty_prompt(folder: Path, config: NexusGenConfig) -> dict[str, Tensor]:
    """CLIP's `pooled` [1, V] and T5's `context` [1, L, C] of "", in fp32 on the CPU.

    Computed once, block by block, and saved in the model's folder (8 MB): the same numbers whatever
    the run's dtype and device, and whoever ran first.
    """
    if stored := weights.load_empty_prompt(folder, config):
        return stored
    encoders = read_text_encoders(folder, config, {"dtype": AS_STORED})
    with Offloader("stream", {}, Target(torch.device("cpu"), torch.float32)).temporary(encoders):
        txt, _, pooled = encoders.context("")
    tensors = {"pooled": pooled, "context": txt}
    try:
        weights.save_empty_prompt(folder, tensors)
    except OSError as error:
        logger.warning("cannot save the constants of the empty prompt: %s", error)
    return tensors


@dataclass(repr=False)
class Parts:
    """All towers of one model; those that no task needs may be None."""

    config: NexusGenConfig
    tokenizer: QwenTokenizer | None = None
    ar: NexusGenAR | None = None
    autoencoder: AutoEncoder | None = None
    generation: GenerationDecoder | None = None
    editing: EditingDecoder | None = None
    empty_prompt: dict[str, Tensor] | None = None  # CLIP's pooled [1, V], T5's context [1, L, C]
    text_encoders: TextEncoders | None = None
    read_text_encoders: Callable[[], TextEncoders] | None = None  # for one negative prompt each
    offloader: Offloader | None = None  # None: every part works where its weights are
    known: Known = field(default_factory=Known)

    @classmethod
    def load(
        cls,
        model: str | Path = "tiny",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        parts: Sequence[str] = PARTS,
        memory: str = "auto",
        fp8: bool = False,
    ) -> "Parts":
        """The shipped tiny model, or a folder in the layout of the official release.

        dtype: default fp32 on the CPU, bf16 elsewhere. parts: what to load, of `PARTS`; "ar" alone
        can understand. memory: a profile of `offload`, "auto" takes the first that fits the device.
        fp8: the decoders' matrices are stored in 8 bits.
        """
        if memory not in PROFILES:
            raise ValueError(f"memory must be one of {', '.join(PROFILES)}, got {memory!r}")
        folder, device = weights.model_folder(model), torch.device(device)
        config = weights.load_config(folder)
        tokenizer = read_tokenizer(folder, config)
        known = Known.read(folder, config.image_size, tokenizer)
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        target = {"device": device, "dtype": dtype}
        is_resident = device.type == "cpu" and not fp8 and memory in ("auto", "resident")
        # weights that are not resident stay mapped on the host, and are cast when they are onloaded
        load_kwargs = target if is_resident else {"dtype": AS_STORED}

        def load_advice() -> str:  # counts all parts, also those that did not fit
            on_meta = {"dtype": AS_STORED, "device": "meta"}
            sizes = {name: read_part(name, folder, config, on_meta) for name in parts}
            return advice("resident" if is_resident else memory, memory_needed(sizes, dtype))

        with explain_oom(load_advice):
            loaded = {name: read_part(name, folder, config, load_kwargs) for name in parts}
            for name in ("generation", "editing") if fp8 else ():
                if name in loaded:
                    to_fp8(loaded[name].mmdit)
            offloader = None if is_resident else Offloader(memory, loaded, Target(device, dtype))
        self = cls(config, tokenizer, **loaded, offloader=offloader, known=known)
        if (folder / FLUX_FOLDER / "text_encoder").is_dir():  # the tiny model has none
            self.read_text_encoders = lambda: read_text_encoders(folder, config, load_kwargs)
        if "generation" in parts or "editing" in parts:
            stored = read_empty_prompt(folder, config)
            self.empty_prompt = {name: x.to(device, dtype) for name, x in stored.items()}
        return self

    def __repr__(self) -> str:
        """Six lines: the sizes, then every part with its parameters, dtype and device."""
        c, memory = self.config, self.offloader.profile if self.offloader else "resident"
        lines = [f"NexusGen: {c.image_size} px, {c.ar.num_image_slots} slots, memory {memory}"]
        for name in PARTS:
            weights_of = [p for tower in towers(getattr(self, name)) for p in tower.parameters()]
            size = sum(p.numel() for p in weights_of) / 1e6
            where = {f"{p.dtype} on {p.device}".removeprefix("torch.") for p in weights_of}
            about = f"{size:,.1f} M parameters, {', '.join(where)}" if where else "not loaded"
            lines.append(f"  {name}: {about}")
        encoders = self.text_encoders or self.read_text_encoders
        lines.append(f"  text encoders: {'available' if encoders else 'the empty prompt only'}")
        return "\n".join(lines)

    def advice(self) -> str:
        """What to do when a call runs out of memory."""
        parts = {name: getattr(self, name) for name in PARTS}
        if self.offloader is None:
            return advice("resident", memory_needed(parts, None))
        return advice(self.offloader.profile, memory_needed(parts, self.offloader.target.dtype))

    def part(self, name: str) -> Any:
        """The part of that name, if this model was loaded with it."""
        if (part := getattr(self, name)) is None:
            raise ValueError(f"this model has no {PART_NAMES.get(name, name)}")
        return part

    def part_on_device(self, name: str) -> Any:
        """The part of that name, on the device."""
        part = self.part(name)
        if self.offloader is not None:
            self.offloader.onload(part)
        return part

    def max_prompt_tokens(self) -> int:
        """All positions but those of a short sentence and an image."""
        ar = self.config.ar
        return ar.text.max_position_embeddings - ar.num_image_slots - 64

    def negative_context(self, prompt: str = "") -> Context:
        """T5's states [1, L, C] of a negative prompt, at position 0, and CLIP's vector of it."""
        if prompt:
            check_text(prompt, "negative prompt")
            return self.encode_text(prompt)
        empty = self.part_on_device("empty_prompt")
        txt = empty["context"]
        return Context(txt, context_ids_generation(txt.shape[1]), empty["pooled"])

    @torch.no_grad()
    def encode_text(self, prompt: str) -> Context:
        """T5's states and CLIP's vector; encoders that are read from files are freed again."""
        read = self.read_text_encoders or (lambda: self.part("text_encoders"))
        encoders = self.text_encoders or read()
        with self.offloader.temporary(encoders) if self.offloader else nullcontext():
            return encoders.context(prompt)
