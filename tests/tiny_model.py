"""A toy-sized NexusGen with random weights and a byte-level tokenizer, whole and as a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from test_tokenizer import byte_tokenizer

from nexus_min.config import NexusGenConfig
from nexus_min.model.autoencoder import AutoEncoder
from nexus_min.model.autoregressive import NexusGenAR
from nexus_min.model.mmdit import MMDiT
from nexus_min.pipeline import NexusGen
from nexus_min.tokenizer import QwenTokenizer
from nexus_min.weights import (
    EditingDecoder,
    GenerationDecoder,
    make_adapter,
    make_merger,
    save_checkpoint,
)


def make_tiny(seed: int = 0) -> NexusGen:
    """All components at `NexusGenConfig.tiny()`, the same for one seed."""
    torch.manual_seed(seed)
    config = NexusGenConfig.tiny()
    return NexusGen(
        config,
        QwenTokenizer(byte_tokenizer()),
        NexusGenAR(config.ar),
        AutoEncoder(config.autoencoder),
        GenerationDecoder(MMDiT(config.mmdit), make_adapter(config)),
        EditingDecoder(MMDiT(config.mmdit), make_merger(config)),
        {
            "pooled": torch.randn(1, config.mmdit.vec_in_dim),
            "context": torch.randn(1, 5, config.mmdit.context_in_dim),
        },
    )


def save_tiny(folder: Path) -> Path:
    """Write the model of `make_tiny` as a checkpoint folder, in fp32."""
    model, tokenizer = make_tiny(), folder / "tokenizer.json"
    byte_tokenizer().save(str(tokenizer))
    parts = {k: getattr(model, k) for k in ("ar", "generation", "editing", "autoencoder")}
    parts |= {"empty_prompt": model.empty_prompt, "tokenizer_file": tokenizer}
    save_checkpoint(folder / "model", model.config, **parts, dtype=None)
    return folder / "model"
