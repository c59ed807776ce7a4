"""A model with random weights, in the folder layout and the file formats of the official release.

    python tests/make_release.py DIR                 everything at toy size: what users download
    python tests/make_release.py DIR --gigabytes 4   AR model and MMDiT of 2 GB each, for benchmarks

The large one is the official model cut down: an AR model of the official depth, narrower, and an
MMDiT of the official width, with fewer blocks (diffusers reads flux1-dev of that width only); the
latter twice, as flux1-dev and as generation decoder. Its values are one random block, repeated.
"""

from __future__ import annotations

import argparse
import json
import lzma
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import torch
from conftest import GOLDEN
from safetensors.torch import save_file
from test_tokenizer import byte_tokenizer
from tiny_model import make_tiny
from torch import Tensor, nn

from nexus_min.config import CLIPConfig, MMDiTConfig, NexusGenConfig, T5Config
from nexus_min.model.autoregressive import NexusGenAR
from nexus_min.model.mmdit import MMDiT
from nexus_min.model.text_encoders import CLIPTextModel, T5Encoder
from nexus_min.weights import (
    AR_FOLDER,
    FLUX_FOLDER,
    MERGER_PREFIX,
    config_files,
    decoder_state,
    load_mmdit,
    make_adapter,
    on_meta,
)

Write = Callable[[Mapping[str, Tensor], Path], None]
save = partial(save_file, metadata={"format": "pt"})
TOKENIZERS = {
    "clip_vocab.json.xz": "tokenizer/vocab.json",
    "clip_merges.txt.xz": "tokenizer/merges.txt",
    "t5_tokenizer.json.xz": "tokenizer_2/tokenizer.json",
}


def write_release(folder: str | Path, size: str | float = "micro") -> Path:
    """Write the release of `size`, "micro" or gigabytes, to `folder` and return that."""
    home, flux = Path(folder) / AR_FOLDER, Path(folder) / FLUX_FOLDER
    for path in (home, flux):
        path.mkdir(parents=True, exist_ok=True)
    config = write_micro(home, flux) if size == "micro" else write_large(home, flux, float(size))
    for file, text in config_files(Path(folder), config).items():  # last: then all is there
        file.write_text(text)
    return Path(folder)


# ---- everything, at toy size -------------------------------------------------------------------


def micro_config() -> NexusGenConfig:
    """The toy model with text encoders as small as their official vocabularies let them be."""
    clip = CLIPConfig(hidden_size=32, intermediate_size=8, num_hidden_layers=1)
    t5 = T5Config(d_model=96, d_kv=8, d_ff=8, num_layers=2, num_heads=2)
    return replace(NexusGenConfig.tiny(), clip=replace(clip, num_attention_heads=2), t5=t5)


def write_micro(home: Path, flux: Path) -> NexusGenConfig:
    """All files of both folders but the configuration, which is returned."""
    model, config = make_tiny(), micro_config()
    write_shards(home, bf16(model.ar.state_dict()), 4)
    generation = decoder_state(*model.generation)
    editing = decoder_state(*model.editing, MERGER_PREFIX)
    torch.save(bf16(generation), home / "generation_decoder.bin")
    torch.save(bf16(editing), home / "edit_decoder.bin")
    save(model.autoencoder.state_dict(), flux / "ae.safetensors")  # official: fp32
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        (flux / name).mkdir(exist_ok=True)
    clip, t5 = CLIPTextModel(config.clip), T5Encoder(config.t5)
    save(bf16(clip.state_dict()), flux / "text_encoder" / "model.safetensors")
    write_shards(flux / "text_encoder_2", bf16(t5.state_dict()), 2)
    byte_tokenizer().save(str(home / "tokenizer.json"))
    for source, name in TOKENIZERS.items():
        (flux / name).write_bytes(lzma.decompress((GOLDEN / "tokenizers" / source).read_bytes()))
    return config


def bf16(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().bfloat16() for name, tensor in state.items()}


def write_shards(
    folder: Path, state: Mapping[str, Tensor], shards: int, write: Write = save
) -> None:
    """`model-0000x-of-0000y.safetensors` and their index, the tensors shared out by number."""
    names, places = list(state), {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        write({name: state[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": num_bytes(state)}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def num_bytes(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


# ---- what the benchmarks load, at any size -----------------------------------------------------


def write_large(home: Path, flux: Path, gigabytes: float) -> NexusGenConfig:
    """AR model, flux1-dev and generation decoder: half of `gigabytes` or a little more each."""
    enough, config = gigabytes * 1e9 / 2, NexusGenConfig.v2()
    config, ar = first(narrow_ar(), lambda c: NexusGenAR(c.ar), enough)
    config, mmdit = first(shallow_mmdit(config), lambda c: MMDiT(c.mmdit), enough)
    write_shards(home, ar, 4, write_random)
    write_random(mmdit, flux / "flux1-dev.safetensors")
    mapped = load_mmdit(flux / "flux1-dev.safetensors", config)
    adapter = make_adapter(config).bfloat16()
    decoder = decoder_state(mapped, adapter)
    torch.save(decoder, home / "generation_decoder.bin")
    text = json.dumps(diffusers_config(config.mmdit), indent=2)
    (flux / "transformer").mkdir(exist_ok=True)
    (flux / "transformer" / "config.json").write_text(text)
    return config


def narrow_ar() -> Iterator[NexusGenConfig]:
    """The official depth and vocabulary, n/28 of the width for n = 1, 2..."""
    v2 = NexusGenConfig.v2()
    for n in count(1):
        own = {"hidden_size": 128 * n, "intermediate_size": 676 * n}
        heads = {"num_attention_heads": n, "num_key_value_heads": 1}
        eyes = {"hidden_size": 48 * n, "intermediate_size": 128 * n, "num_heads": n}
        vision = replace(v2.ar.vision, out_hidden_size=128 * n, **eyes)
        yield replace(
            v2, ar=replace(v2.ar, text=replace(v2.ar.text, **own, **heads), vision=vision)
        )


def shallow_mmdit(config: NexusGenConfig) -> Iterator[NexusGenConfig]:
    """The official width, n double and 2n single blocks for n = 1, 2..."""
    for n in count(1):
        yield replace(config, mmdit=MMDiTConfig(depth=n, depth_single_blocks=2 * n))


def first(
    configs: Iterator[NexusGenConfig], make: Callable[[NexusGenConfig], nn.Module], enough: float
) -> tuple[NexusGenConfig, dict[str, Tensor]]:
    """The first config whose model has `enough` bytes in bf16, and its tensors, on `meta`."""
    for config in configs:
        state = bf16(on_meta(partial(make, config)).state_dict())
        if num_bytes(state) >= enough:
            return config, state


def write_random(state: Mapping[str, Tensor], file: Path) -> None:
    """A safetensors file of these bf16 tensors' names and shapes, written in small pieces."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in state.items():
        start, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    block = 0.02 * torch.randn(1 << 22, generator=generator)
    data = block.bfloat16().view(torch.uint8).numpy().data
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for left in range(end, 0, -len(data)):
            out.write(data[:left])


def diffusers_config(config: MMDiTConfig) -> dict:
    """`transformer/config.json` as FLUX.1-dev has it, of this size."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "pooled_projection_dim": config.vec_in_dim,
        "guidance_embeds": True,
        "axes_dims_rope": list(config.axes_dim),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--gigabytes", type=float, metavar="N", help="for benchmarks; default: toy")
    options = parser.parse_args()
    print(write_release(options.folder, options.gigabytes or "micro"))
