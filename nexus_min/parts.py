"""The parts of one model: which there are, how they are read, where they work.

`pipeline.NexusGen` is these parts and what they do together. A folder in the layout of the official
release, like the shipped tiny model's, has them all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import weights
from .config import NexusGenConfig
from .model.mmdit import context_ids_generation
from .offload import (
    PROFILES,
    Offloader,
    Target,
    advice,
    explain_oom,
    memory_needed,
    to_fp8,
    towers,
)
from .sampling import Context
from .tokenizer import QwenTokenizer, check_text
from .weights import PARTS, EditingDecoder, GenerationDecoder, TextEncoders

if TYPE_CHECKING:
    from .model.autoencoder import AutoEncoder
    from .model.autoregressive import NexusGenAR

logger = logging.getLogger(__name__)

PART_NAMES = {
    "ar": "autoregressive model",
    "generation": "generation decoder",
    "editing": "editing decoder",
    "text_encoders": "text encoders (CLIP and T5), which a negative prompt needs",
    "empty_prompt": "constants of the empty prompt",
}


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

    @classmethod
    def load(
        cls,
        model: str | Path = "tiny",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        parts: Sequence[str] = PARTS,
        memory: str = "auto",
        fp8: bool = False,
    ) -> Parts:
        """The shipped tiny model, or a folder in the layout of the official release.

        dtype: default fp32 on the CPU, bf16 elsewhere. parts: what to load, of `PARTS`; "ar" alone
        can understand. memory: a profile of `offload`, "auto" takes the first that fits the device.
        fp8: the decoders' matrices are stored in 8 bits.
        """
        if memory not in PROFILES:
            raise ValueError(f"memory must be one of {', '.join(PROFILES)}, got {memory!r}")
        folder, device = weights.model_folder(model), torch.device(device)
        config = weights.load_config(folder)
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        target = {"device": device, "dtype": dtype}
        is_resident = device.type == "cpu" and not fp8 and memory in ("auto", "resident")
        # weights that are not resident stay mapped on the host, and are cast when they are onloaded
        load_kwargs = target if is_resident else {"dtype": weights.AS_STORED}
        self = cls(config, weights.read_tokenizer(folder, config))

        def load_advice() -> str:  # counts all parts, also those that did not fit
            on_meta = {"dtype": weights.AS_STORED, "device": "meta"}
            sizes = {name: weights.read_part(name, folder, config, on_meta) for name in parts}
            return advice("resident" if is_resident else memory, memory_needed(sizes, dtype))

        with explain_oom(load_advice):
            for name in parts:
                setattr(self, name, weights.read_part(name, folder, config, load_kwargs))
            for decoder in (self.generation, self.editing):
                if fp8 and decoder is not None:
                    to_fp8(decoder.mmdit)
            if not is_resident:
                loaded = {name: getattr(self, name) for name in parts}
                self.offloader = Offloader(memory, loaded, Target(device, dtype))
        if weights.has_text_encoders(folder):
            self.read_text_encoders = lambda: weights.read_text_encoders(
                folder, config, load_kwargs
            )
        if "generation" in parts or "editing" in parts:
            self.empty_prompt = weights.load_empty_prompt(folder, config, **target)
            if self.empty_prompt is None:
                self.empty_prompt = self.make_empty_prompt(folder)
        return self

    def make_empty_prompt(self, folder: Path) -> dict[str, Tensor]:
        """CLIP's and T5's output for "": computed once, then saved in the model's folder (4 MB)."""
        txt, _, pooled = self.encode_text("")
        tensors = {"pooled": pooled, "context": txt}
        try:
            weights.save_empty_prompt(folder, tensors)
        except OSError as error:
            logger.warning("cannot save the constants of the empty prompt: %s", error)
        return tensors

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
        parts = {name: part for name in PARTS if (part := getattr(self, name)) is not None}
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
        encoders = self.text_encoders
        if encoders is None and self.read_text_encoders:
            encoders = self.read_text_encoders()
        if encoders is None:
            raise ValueError(f"this model has no {PART_NAMES['text_encoders']}")
        with self.offloader.temporary(encoders) if self.offloader else nullcontext():
            return weights.text_context(encoders, *encoders.ids(prompt))
