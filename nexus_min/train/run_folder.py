"""The model of a run as it grows: parts are read from one folder, trained parts saved to another.

Both folders have the official layout. `train_tiny.py` reads and writes the same folder; full-scale
training starts from a release and links what it did not train.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import weights
from ..config import NexusGenConfig
from ..formats import FORMATS
from ..model.autoencoder import AutoEncoder
from ..model.autoregressive import NexusGenAR
from ..model.mmdit import MMDiT
from ..parts import read_empty_prompt, read_part, read_tokenizer
from ..tokenizer import QwenTokenizer
from ..weights import AR_FOLDER, FLUX_FOLDER, EditingDecoder, GenerationDecoder


def rank_and_size() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) when not distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait for all processes, if there are several."""
    if dist.is_initialized():
        dist.barrier()


@dataclass
class RunFolder:
    """The parts of the model in `source`, and where the trained ones go."""

    source: Path
    goal: Path | None = None  # the folder that trained parts are saved to; None: `source`
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype | None = None  # of what is saved; None keeps each tensor's own
    gather: Callable[[nn.Module], dict] | None = None  # sharded module -> whole state dict
    link_rest: bool = False  # whether `goal` gets links to all other files of `source`
    new_config: NexusGenConfig | None = None  # the sizes while the folder does not hold any part

    def __post_init__(self):
        self.goal = self.goal or self.source
        dtype = torch.float32 if self.device.type == "cpu" else None
        self.load_kwargs = {"device": self.device, "dtype": dtype}

    @property
    def config(self) -> NexusGenConfig:
        is_new = self.new_config and not (self.source / "nexus_min.json").exists()
        return self.new_config if is_new else weights.load_config(self.source)

    def _read(self, part: str) -> Any:
        return read_part(part, self.source, self.config, self.load_kwargs)

    def ar(self) -> NexusGenAR:
        return self._read("ar")

    def vae(self) -> AutoEncoder:
        return self._read("autoencoder")

    def tokenizer(self) -> QwenTokenizer:
        return read_tokenizer(self.source, self.config)

    def generation(self) -> GenerationDecoder:
        """The generation decoder; without a file, FLUX.1-dev with a new adapter."""
        if self._has("generation_decoder"):
            return self._read("generation")
        return GenerationDecoder(self._flux(), weights.make_adapter(self.config).to(self.device))

    def editing(self) -> EditingDecoder:
        """The editing decoder; without a file, FLUX.1-dev with a new merger."""
        if self._has("edit_decoder"):
            return self._read("editing")
        merger = weights.make_merger(self.config)
        # Its layer starts as the AR model's first, as in the official training.
        merger.layers[0].load_state_dict(self.ar().model.layers[0].state_dict())
        return EditingDecoder(self._flux(), merger.to(self.device))

    def empty_prompt(self) -> dict[str, Tensor]:
        """CLIP's `pooled` [1, V] and T5's `context` [1, L, C] of the empty prompt."""
        return read_empty_prompt(self.source, self.config)

    def all_parts(self) -> dict:
        """Every part, as `save` and `save_checkpoint` take them."""
        parts = {"ar": self.ar(), "generation": self.generation(), "editing": self.editing()}
        parts |= {"autoencoder": self.vae(), "empty_prompt": self.empty_prompt()}
        return parts | {"tokenizer_file": self.source / AR_FOLDER / "tokenizer.json"}

    def save(self, config: NexusGenConfig, **parts) -> None:
        """Write trained parts, named as `save_checkpoint` does; all processes wait for it."""
        if gather := self.gather:
            for name, part in parts.items():
                is_decoder = isinstance(part, tuple)
                parts[name] = tuple(map(gather, part)) if is_decoder else gather(part)
        if rank_and_size()[0] == 0:
            written = weights.save_checkpoint(self.goal, config, **parts, dtype=self.dtype)
            if self.link_rest:
                self.link_others([file for file in written if file.suffix == ".safetensors"])
        barrier()

    def link_others(self, written: list[Path]) -> None:
        """Links in `goal` to all files of `source` but other forms (shards, .bin) of `written`."""
        for folder, _, names in os.walk(self.source, followlinks=True):
            goal = self.goal / Path(folder).relative_to(self.source)
            forms = tuple(w.stem + mark for w in written if w.parent == goal for mark in ".-")
            goal.mkdir(parents=True, exist_ok=True)
            for name in names:
                file, link = Path(folder, name), goal / name
                if link not in written and name.startswith(forms):
                    link.unlink(missing_ok=True)  # it would be read in the place of what is written
                elif file.is_file() and not link.exists():
                    link.symlink_to(file.resolve())

    def _has(self, stem: str) -> bool:
        return any((self.source / AR_FOLDER / f"{stem}{end}").is_file() for end in FORMATS)

    def _flux(self) -> MMDiT:
        file = self.source / FLUX_FOLDER / "flux1-dev.safetensors"
        return weights.load_mmdit(file, self.config, **self.load_kwargs)
