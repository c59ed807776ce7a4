"""Names of the MMDiT's parameters inside the two decoder files: DiffSynth's.

`nexus_min` has black-forest-labs' names, as `flux1-dev.safetensors`. This table is the only one:
all other models have their files' names. Official: DiffSynth's `FluxDiTStateDictConverter`.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# A layer in `nexus_min` (black-forest-labs) -> in the decoder files (DiffSynth); # is a block.
DIT_TABLE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_embedder.timestep_embedder.0",
    "time_in.out_layer": "time_embedder.timestep_embedder.2",
    "guidance_in.in_layer": "guidance_embedder.timestep_embedder.0",
    "guidance_in.out_layer": "guidance_embedder.timestep_embedder.2",
    "vector_in.in_layer": "pooled_text_embedder.0",
    "vector_in.out_layer": "pooled_text_embedder.2",
    "double_blocks.#.img_mod.lin": "blocks.#.norm1_a.linear",
    "double_blocks.#.img_attn.qkv": "blocks.#.attn.a_to_qkv",
    "double_blocks.#.img_attn.norm.query_norm": "blocks.#.attn.norm_q_a",
    "double_blocks.#.img_attn.norm.key_norm": "blocks.#.attn.norm_k_a",
    "double_blocks.#.img_attn.proj": "blocks.#.attn.a_to_out",
    "double_blocks.#.img_mlp.0": "blocks.#.ff_a.0",
    "double_blocks.#.img_mlp.2": "blocks.#.ff_a.2",
    "double_blocks.#.txt_mod.lin": "blocks.#.norm1_b.linear",
    "double_blocks.#.txt_attn.qkv": "blocks.#.attn.b_to_qkv",
    "double_blocks.#.txt_attn.norm.query_norm": "blocks.#.attn.norm_q_b",
    "double_blocks.#.txt_attn.norm.key_norm": "blocks.#.attn.norm_k_b",
    "double_blocks.#.txt_attn.proj": "blocks.#.attn.b_to_out",
    "double_blocks.#.txt_mlp.0": "blocks.#.ff_b.0",
    "double_blocks.#.txt_mlp.2": "blocks.#.ff_b.2",
    "single_blocks.#.modulation.lin": "single_blocks.#.norm.linear",
    "single_blocks.#.linear1": "single_blocks.#.to_qkv_mlp",
    "single_blocks.#.norm.query_norm": "single_blocks.#.norm_q_a",
    "single_blocks.#.norm.key_norm": "single_blocks.#.norm_k_a",
    "single_blocks.#.linear2": "single_blocks.#.proj_out",
    "final_layer.adaLN_modulation.1": "final_norm_out.linear",  # its halves are swapped, too
    "final_layer.linear": "final_proj_out",
}
DIT_PREFIX, MERGER_PREFIX = "pipe.dit.", "embedding_merger."


def diffsynth_name(name: str) -> str:
    """DiffSynth's name of a black-forest-labs parameter. KeyError for any other name."""
    layer, _, kind = name.rpartition(".")
    block = re.search(r"blocks\.(\d+)\.", layer)
    number = block[1] if block else ""
    pattern = layer.replace(f"blocks.{number}.", "blocks.#.", 1)
    kind = "weight" if kind == "scale" else kind  # the q/k norms call their weight `scale`
    return f"{DIT_TABLE[pattern].replace('#', number)}.{kind}"


def is_swapped(name: str) -> bool:
    """Whether DiffSynth stores this black-forest-labs parameter with its halves swapped."""
    return name.startswith("final_layer.adaLN_modulation.")


def swap_halves(tensor: Tensor) -> Tensor:
    """[scale; shift] <-> [shift; scale] of the final adaptive norm: its own inverse."""
    return torch.cat(tensor.chunk(2)[::-1])


def to_diffsynth(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MMDiT parameters -> what a decoder file holds under `pipe.dit.`."""
    return {
        DIT_PREFIX + diffsynth_name(k): swap_halves(v) if is_swapped(k) else v
        for k, v in state.items()
    }
