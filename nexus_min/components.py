"""The parts of one model, and how each is read from a model's folder.

A folder is laid out as the official release: `Nexus-GenV2/` holds the AR model, its tokenizer and
the two decoder files, `FLUX/FLUX.1-dev/` the autoencoder and the text encoders. The shipped tiny
model lies in the same layout. No equation; `weights_loader` knows the formats and is imported only
when something is read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import NexusGenConfig
from .mmdit import MMDiT, context_ids_generation
from .projector import GenerationAdapter, ImageEmbeddingMerger
from .sampling import Context
from .text_encoders import CLIPTextModel, T5Encoder, clip_tokenizer, t5_tokenizer
from .tokenizer import QwenTokenizer, panics_told

TINY = Path(__file__).parent / "checkpoints" / "tiny"
PARTS = ("ar", "generation", "editing", "autoencoder")


class GenerationDecoder(NamedTuple):
    """Draws a picture from its own embeddings."""

    mmdit: MMDiT
    adapter: GenerationAdapter


class EditingDecoder(NamedTuple):
    """Draws a picture from its embeddings and those of the picture it was made from."""

    mmdit: MMDiT
    merger: ImageEmbeddingMerger


class TextEncoders(NamedTuple):
    """CLIP and T5 with their tokenizers (text -> ids): for a negative prompt that is not empty."""

    clip: CLIPTextModel
    t5: T5Encoder
    clip_tokenizer: Callable[[str], Tensor] | None = None
    t5_tokenizer: Callable[[str], Tensor] | None = None

    def ids(self, text: str) -> tuple[Tensor, Tensor]:
        """Token ids of CLIP [1, 77] and of T5 [1, 512]."""
        return self.clip_tokenizer(text), self.t5_tokenizer(text)


def model_folder(model: str | Path) -> Path:
    """ "tiny" -> the shipped checkpoint, else the folder itself. ValueError when it is absent."""
    folder = TINY if str(model) == "tiny" else Path(model)
    if not folder.is_dir():
        raise ValueError(f"no model folder {str(folder)!r}; give the folder of a model, or tiny")
    return folder


def read_part(name: str, folder: Path, config: NexusGenConfig, place: dict) -> Any:
    """One of `PARTS` from its official file. ValueError for another name."""
    import weights_loader as loader

    home = folder / loader.AR_FOLDER
    if name == "ar":
        return loader.load_ar(home, config, **place)
    if name == "autoencoder":
        return loader.load_autoencoder(folder / loader.FLUX_FOLDER, config, **place)
    if name == "generation":
        file = loader.find_file(home, ("generation_decoder",))
        adapter = loader.load_generation_adapter(file, config, **place)
        return GenerationDecoder(loader.load_mmdit(file, config, **place), adapter)
    if name == "editing":
        file = loader.find_file(home, ("edit_decoder",))
        merger = loader.load_embedding_merger(file, config, **place)
        return EditingDecoder(loader.load_mmdit(file, config, **place), merger)
    raise ValueError(f"parts are {', '.join(PARTS)}, got {name!r}")


def read_tokenizer(folder: Path, config: NexusGenConfig) -> QwenTokenizer:
    """The tokenizer of a model. ValueError when the file is missing, broken, or another model's."""
    import weights_loader as loader

    file = loader.find_file(folder / loader.AR_FOLDER / "tokenizer.json")
    tokenizer = tokenizer_of(file, QwenTokenizer)
    tokenizer.check(config.ar)
    return tokenizer


def tokenizer_of(path: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of a tokenizer's file or folder. ValueError naming it when it is broken."""
    try:
        with panics_told():
            return read(path)
    except Exception as error:  # `tokenizers` raises bare Exceptions on a broken file
        raise ValueError(f"{path}: cannot be read as a tokenizer: {error}") from error


def read_text_encoders(folder: Path, config: NexusGenConfig, place: dict) -> TextEncoders:
    """CLIP, T5 and their tokenizers of FLUX.1-dev."""
    import weights_loader as loader

    flux = folder / loader.FLUX_FOLDER
    return TextEncoders(
        loader.load_clip(flux / "text_encoder", config, **place),
        loader.load_t5(flux / "text_encoder_2", config, **place),
        tokenizer_of(flux / "tokenizer", clip_tokenizer),
        tokenizer_of(flux / "tokenizer_2", t5_tokenizer),
    )


def has_text_encoders(folder: Path) -> bool:
    """Whether the folder holds CLIP and T5; the tiny model's does not."""
    import weights_loader as loader

    return (folder / loader.FLUX_FOLDER / "text_encoder").is_dir()


@torch.no_grad()
def text_context(encoders: TextEncoders, clip_ids: Tensor, t5_ids: Tensor) -> Context:
    """Token ids [1, 77], [1, 512] -> context at position 0; padding takes part, as officially."""
    device = encoders.t5.shared.weight.device
    txt = encoders.t5(t5_ids.to(device))
    ids = context_ids_generation(txt.shape[1])
    return Context(txt, ids, encoders.clip(clip_ids.to(device)))
