"""Official weight files <-> the models of `nexus_min`: the only file that knows formats and names.

Reading: open without copying -> rename -> compare names, shapes and dtypes with the model built on
`meta`, before any tensor is read -> `load_state_dict(strict=True, assign=True)`. Writing: the same
folder layout and names, file by file atomically. Whatever does not fit is one ValueError that
names the file and the keys at fault. As a command: check, convert or download a release (--help).

Parameter names equal the released keys but for one table, DiffSynth -> black-forest-labs for the
MMDiT inside the two decoder files (official class: DiffSynth's `FluxDiTStateDictConverter`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .config import ARConfig, NexusGenConfig
from .model.autoencoder import AutoEncoder
from .model.autoregressive import NexusGenAR
from .model.mmdit import MMDiT, context_ids_generation
from .model.projector import GenerationAdapter, ImageEmbeddingMerger
from .model.text_encoders import CLIPTextModel, T5Encoder, clip_tokenizer, t5_tokenizer
from .sampling import Context
from .tokenizer import QwenTokenizer, rust_panic_as_error

logger = logging.getLogger(__name__)
TINY = Path(__file__).parent / "checkpoints" / "tiny"
AR_FOLDER, FLUX_FOLDER = "Nexus-GenV2", "FLUX/FLUX.1-dev"

# ------------------------------------------------------------------------------------------ names

# DiffSynth's layer (in the decoder files) -> black-forest-labs' (in `nexus_min`); # is a block.
DIT_TABLE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_embedder.timestep_embedder.0": "time_in.in_layer",
    "time_embedder.timestep_embedder.2": "time_in.out_layer",
    "guidance_embedder.timestep_embedder.0": "guidance_in.in_layer",
    "guidance_embedder.timestep_embedder.2": "guidance_in.out_layer",
    "pooled_text_embedder.0": "vector_in.in_layer",
    "pooled_text_embedder.2": "vector_in.out_layer",
    "blocks.#.norm1_a.linear": "double_blocks.#.img_mod.lin",
    "blocks.#.attn.a_to_qkv": "double_blocks.#.img_attn.qkv",
    "blocks.#.attn.norm_q_a": "double_blocks.#.img_attn.norm.query_norm",
    "blocks.#.attn.norm_k_a": "double_blocks.#.img_attn.norm.key_norm",
    "blocks.#.attn.a_to_out": "double_blocks.#.img_attn.proj",
    "blocks.#.ff_a.0": "double_blocks.#.img_mlp.0",
    "blocks.#.ff_a.2": "double_blocks.#.img_mlp.2",
    "blocks.#.norm1_b.linear": "double_blocks.#.txt_mod.lin",
    "blocks.#.attn.b_to_qkv": "double_blocks.#.txt_attn.qkv",
    "blocks.#.attn.norm_q_b": "double_blocks.#.txt_attn.norm.query_norm",
    "blocks.#.attn.norm_k_b": "double_blocks.#.txt_attn.norm.key_norm",
    "blocks.#.attn.b_to_out": "double_blocks.#.txt_attn.proj",
    "blocks.#.ff_b.0": "double_blocks.#.txt_mlp.0",
    "blocks.#.ff_b.2": "double_blocks.#.txt_mlp.2",
    "single_blocks.#.norm.linear": "single_blocks.#.modulation.lin",
    "single_blocks.#.to_qkv_mlp": "single_blocks.#.linear1",
    "single_blocks.#.norm_q_a": "single_blocks.#.norm.query_norm",
    "single_blocks.#.norm_k_a": "single_blocks.#.norm.key_norm",
    "single_blocks.#.proj_out": "single_blocks.#.linear2",
    "final_norm_out.linear": "final_layer.adaLN_modulation.1",  # and its halves change places
    "final_proj_out": "final_layer.linear",
}
DIT_TABLE_BACK = {bfl: diffsynth for diffsynth, bfl in DIT_TABLE.items()}
DIT_PREFIX, MERGER_PREFIX = "pipe.dit.", "embedding_merger."


def diffsynth_name(name: str) -> str:
    """Black-forest-labs parameter name -> DiffSynth's. Raises KeyError for a name of neither."""
    layer, _, kind = name.rpartition(".")
    block = re.search(r"blocks\.(\d+)\.", layer)
    number = block[1] if block else ""
    pattern = layer.replace(f"blocks.{number}.", "blocks.#.", 1)
    kind = "weight" if kind == "scale" else kind  # the q/k norms call their weight `scale`
    return f"{DIT_TABLE_BACK[pattern].replace('#', number)}.{kind}"


def swap_halves(tensor: Tensor) -> Tensor:
    """[scale; shift] <-> [shift; scale] of the final adaptive norm: its own inverse."""
    return torch.cat(tensor.chunk(2)[::-1])


def is_swapped(name: str) -> bool:
    """Whether DiffSynth stores this black-forest-labs parameter with its halves exchanged."""
    return name.startswith("final_layer.adaLN_modulation.")


def to_diffsynth(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MMDiT parameters -> what a decoder file holds under `pipe.dit.`."""
    return {
        DIT_PREFIX + diffsynth_name(k): swap_halves(v) if is_swapped(k) else v
        for k, v in state.items()
    }


def names_hash(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """DiffSynth's published fingerprint of a file: md5 of all sorted `key:shape` and `key`."""
    parts = [f"{key}:{'_'.join(map(str, shape))}" for key, shape in shapes.items()]
    return hashlib.md5(",".join(sorted([*parts, *shapes])).encode()).hexdigest()


# ---------------------------------------------------------------------------------------- opening


@dataclass(frozen=True)
class LazyTensor:
    """One stored tensor that has not been read: where it lies, what it is, and how to read it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a string when torch has no use for the stored type
    read: Callable[[], Tensor]


DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FLOATS = tuple(DTYPES.values())
AS_STORED = "as stored"  # the dtype to ask of a loader when weights are cast later, as they travel
MAX_CONTEXT = 512  # tokens of T5
FORMATS = (".safetensors", ".safetensors.index.json", ".bin")  # in order of preference


def find_file(path: str | Path, stems: tuple[str, ...] = ()) -> Path:
    """`path` itself, or the one file in the folder `path` that is called like one of `stems`.

    Raises ValueError when there is none, or when two stems are there and the choice is the user's.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{path}: no such file or folder; check the path or download it")
        return path
    found = [stem for stem in stems if any((path / f"{stem}{end}").is_file() for end in FORMATS)]
    if not found:
        wanted = " or ".join(f"{stem}.safetensors" for stem in stems)
        raise ValueError(f"{path}: has no {wanted}; check the path or download it")
    if len(found) > 1:
        raise ValueError(f"{path}: holds {' and '.join(found)}; give the path of the file you mean")
    return next(file for end in FORMATS if (file := path / f"{found[0]}{end}").is_file())


def open_weights(file: Path) -> dict[str, LazyTensor]:
    """Key -> entry for one file, or for all shards of an index; headers only."""
    if file.name.endswith(".index.json"):
        return open_shards(file)
    seen = file_id(file)
    entries = open_safetensors(file) if file.suffix == ".safetensors" else open_pickle(file)

    def read(entry: LazyTensor) -> Tensor:
        if file_id(file) != seen:  # a mapped file that was cut short would kill the process
            raise ValueError(f"{file}: changed while it was being read; load it again")
        return entry.read()

    return {key: replace(entry, read=partial(read, entry)) for key, entry in entries.items()}


def file_id(file: Path) -> tuple[int, int, int] | None:
    """Changes when the file is written to or replaced; None when it is not there."""
    try:
        facts = file.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def open_safetensors(file: Path) -> dict[str, LazyTensor]:
    """Entries of a safetensors file; tensors on the CPU will be views of the mapped file."""
    try:
        with safe_open(file, framework="pt"), open(file, "rb") as data:  # the first checks all
            head = 8 + int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(head - 8))
            mapped = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: truncated or not safetensors ({error}); download it again"
        ) from None

    def view(begin: int, end: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # unlike safetensors' own, this reads no page of the file
        return torch.empty(0, dtype=dtype).set_(mapped[head + begin : head + end], 0, shape)

    entries = {}
    for key, found in header.items():
        if key != "__metadata__":
            shape, dtype = tuple(found["shape"]), DTYPES.get(found["dtype"], found["dtype"])
            read = partial(view, *found["data_offsets"], shape, dtype)
            entries[key] = LazyTensor(file, shape, dtype, read)
    return entries


def open_pickle(file: Path) -> dict[str, LazyTensor]:
    """Entries of a `torch.save` dict, mapped; code inside is refused, never run."""
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 6):  # before that, weights_only could be made to run code (CVE-2025-32434)
        raise ValueError(f"{file}: torch {torch.__version__} cannot open it safely; need >= 2.6")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file}: refused, it holds more than plain tensors (code, or a whole model); use the"
            " official file"
        ) from None
    except Exception as error:  # the unpickler raises a dozen kinds on a broken file
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{file}: truncated or not a torch.save file ({reason}); download it again"
        ) from None
    flat = isinstance(tensors, dict) and all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in tensors.items()
    )
    if not flat:
        raise ValueError(f"{file}: not a flat dict of tensors; use the official file")
    odd = [k for k, t in tensors.items() if t.layout != torch.strided or t.device.type != "cpu"]
    if odd:  # sparse, or without data
        raise ValueError(f"{file}: not plain tensors: {join_keys(odd)}; use the official file")
    return {
        key: LazyTensor(file, tuple(t.shape), t.dtype, lambda t=t: t) for key, t in tensors.items()
    }


def open_shards(index: Path) -> dict[str, LazyTensor]:
    """Entries of all shards that a Hugging Face index names; every promise of it is checked."""
    try:
        promised = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(promised.values()))
        if not all(isinstance(name, str) for name in shards):
            raise TypeError("a shard that is no name")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index}: not an index with a weight_map; download it again") from None
    if any(name.endswith(".index.json") for name in shards):
        raise ValueError(f"{index}: names an index as a shard; download it again")
    if any(Path(name).name != name for name in shards):
        raise ValueError(f"{index}: names shards outside its own folder: {join_keys(shards)}")
    absent = [name for name in shards if not (index.parent / name).is_file()]
    if absent:
        raise ValueError(f"{index}: names absent shards: {join_keys(absent)}; download them")
    entries = {}
    for name in shards:
        entries |= open_weights(index.parent / name)
    wrong = [k for k, name in promised.items() if k not in entries or entries[k].file.name != name]
    if wrong:
        raise ValueError(
            f"{index}: its shards do not hold what it says: {join_keys(wrong)}; download all again"
        )
    return entries


# --------------------------------------------------------------------------------------- checking

# What unexpected keys look like -> what to do about them.
HINTS = {
    r"(?i)lora[._]": "a LoRA: merge it into the full weights first",
    r"^model\.language_model\.": "renamed by a newer transformers: use the released file",
    r"transformer_blocks\.": "diffusers' names: use flux1-dev.safetensors",
    r"\.(down|up)_blocks\.": "diffusers' names: use ae.safetensors",
    r"^(dit\.)?blocks\.0\.": "DiffSynth names without pipe.dit., which leave open how the halves of"
    " final_norm_out lie: use the released decoder",
}
NOT_ITS_SIZE = "give the config of its size, or use the official file"


def join_keys(keys, limit: int = 20) -> str:
    """The keys in one line, the tail of a very long list counted."""
    keys = sorted(map(str, keys))
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def check(source, kind: str, expected: Mapping[str, tuple[int, ...]], entries: Mapping) -> None:
    """ValueError unless the entries are exactly the expected keys, each of its shape, as floats."""
    both = {k: e for k, e in entries.items() if k in expected}
    faults = {
        "missing": [k for k in expected if k not in entries],
        "unexpected": [k for k in entries if k not in expected],
        "wrong shape": [
            f"{k} {tuple(e.shape)} instead of {expected[k]}"
            for k, e in both.items()
            if e.shape != expected[k]
        ],
        "wrong dtype": [f"{k} {e.dtype}" for k, e in both.items() if e.dtype not in FLOATS],
    }
    told = [f"{name} ({len(keys)}): {join_keys(keys)}" for name, keys in faults.items() if keys]
    if told:
        unexpected = faults["unexpected"]
        hints = [t for mark, t in HINTS.items() if any(re.search(mark, k) for k in unexpected)]
        advice = "; ".join(hints) or NOT_ITS_SIZE
        raise ValueError(f"{source}: does not fit {kind}: {'; '.join(told)}. {advice}")


def check_and_assign(
    model: nn.Module,
    source: Path,
    entries: dict[str, LazyTensor],
    file_name: Callable[[str], str] = str,
    swapped: Callable[[str], bool] = lambda name: False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
) -> nn.Module:
    """Check the entries against `model` (on `meta`), then read and assign them one by one.

    file_name: parameter name -> key in the file; swapped: whether that tensor's halves change
    places. dtype None keeps the file's own, which then must be one for all tensors; AS_STORED keeps
    each tensor's.
    """
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    names = {file_name(name): name for name in shapes}
    check(source, type(model).__name__, {k: shapes[n] for k, n in names.items()}, entries)
    stored = Counter(entry.dtype for entry in entries.values())
    if dtype is None and len(stored) > 1:
        rare = min(stored, key=stored.get)
        odd = join_keys([key for key, entry in entries.items() if entry.dtype == rare], 3)
        raise ValueError(
            f"{source}: mixes {join_keys(stored)} ({rare}: {odd}); choose one with dtype="
        )
    goal = None if dtype == AS_STORED else dtype
    state = {}
    for key, name in names.items():
        tensor = entries[key].read().to(device=device, dtype=goal)
        state[name] = swap_halves(tensor) if swapped(name) else tensor
    model.load_state_dict(state, strict=True, assign=True)
    return model


class NoInit(TorchFunctionMode):
    """Skip `torch.nn.init`: on `meta` nothing is there to fill, and it would import sympy."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The model without memory: names and shapes only. ValueError when no model has such sizes."""
    try:
        with torch.device("meta"), NoInit():
            return make()
    except (AttributeError, TypeError, ZeroDivisionError, RuntimeError) as error:
        # another part's configuration; a size that is 0, < 0 or a text
        reason = str(error).split("\n")[0]
        raise ValueError(f"the sizes of the configuration make no model ({reason})") from error


def sub_config(config, name: str):
    """The tower's own config: given as such, inside a NexusGenConfig, or the official full size."""
    config = NexusGenConfig.v2() if config is None else config
    return getattr(config, name) if isinstance(config, NexusGenConfig) else config


# ---------------------------------------------------------------------------------------- loaders
# All take a file, or a folder that holds the file under its official name; `config` None means the
# official full size; `dtype` None keeps the file's own. All raise ValueError as the head says.

NEW_IN_NEXUS = ("vision_head.weight", "image_prefill_embeds.weight")


def load_ar(path, config=None, *, device="cpu", dtype=None) -> NexusGenAR:
    """Nexus-GenV2's AR model, or the base Qwen2.5-VL-Instruct with the two new matrices drawn."""
    file = find_file(path, ("model",))
    model = on_meta(lambda: NexusGenAR(sub_config(config, "ar")))
    entries = open_weights(file)
    if is_base(entries):
        entries |= init_missing(file, model, entries["lm_head.weight"].dtype)
    return check_and_assign(model, file, entries, device=device, dtype=dtype)


def is_base(entries: Mapping) -> bool:
    """Whether these are Qwen2.5-VL's: a language model without what Nexus-Gen adds to it."""
    return "lm_head.weight" in entries and not any(name in entries for name in NEW_IN_NEXUS)


def init_missing(file: Path, model: NexusGenAR, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """What the base model lacks: N(0, 0.02^2), Qwen's initializer_range, from a fixed seed."""
    logger.warning(
        "%s is a base model: %s are drawn from N(0, 0.02^2)", file, join_keys(NEW_IN_NEXUS)
    )
    generator = torch.Generator().manual_seed(0)

    def entry(shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(
            file, shape, dtype, lambda: (0.02 * torch.randn(shape, generator=generator)).to(dtype)
        )

    return {name: entry(tuple(model.get_parameter(name).shape)) for name in NEW_IN_NEXUS}


def load_mmdit(path, config=None, *, device="cpu", dtype=None) -> MMDiT:
    """The MMDiT of a decoder file (DiffSynth names), or `flux1-dev` (black-forest-labs names)."""
    file = find_file(path, ("generation_decoder", "edit_decoder", "flux1-dev"))
    model, entries = on_meta(lambda: MMDiT(sub_config(config, "mmdit"))), open_weights(file)
    if not any(key.startswith(DIT_PREFIX) for key in entries):
        return check_and_assign(model, file, entries, device=device, dtype=dtype)
    entries = {k: v for k, v in entries.items() if not k.startswith(("adapter.", MERGER_PREFIX))}
    return check_and_assign(
        model, file, entries, lambda n: DIT_PREFIX + diffsynth_name(n), is_swapped, device, dtype
    )


def load_generation_adapter(path, config=None, *, device="cpu", dtype=None) -> GenerationAdapter:
    """The adapter inside the generation decoder; `config` is a NexusGenConfig."""
    file = find_file(path, ("generation_decoder",))
    model = on_meta(lambda: make_adapter(config or NexusGenConfig.v2()))
    entries = {k: v for k, v in open_weights(file).items() if not k.startswith(DIT_PREFIX)}
    return check_and_assign(model, file, entries, device=device, dtype=dtype)


def load_embedding_merger(path, config=None, *, device="cpu", dtype=None) -> ImageEmbeddingMerger:
    """The merger inside the editing decoder; `config` is a NexusGenConfig."""
    file = find_file(path, ("edit_decoder",))
    model = on_meta(lambda: make_merger(config or NexusGenConfig.v2()))
    entries = {k: v for k, v in open_weights(file).items() if not k.startswith(DIT_PREFIX)}
    return check_and_assign(model, file, entries, MERGER_PREFIX.__add__, device=device, dtype=dtype)


def load_autoencoder(path, config=None, *, device="cpu", dtype=None) -> AutoEncoder:
    """FLUX.1-dev's `ae.safetensors`."""
    file = find_file(path, ("ae",))
    model = on_meta(lambda: AutoEncoder(sub_config(config, "autoencoder")))
    return check_and_assign(model, file, open_weights(file), device=device, dtype=dtype)


def load_clip(path, config=None, *, device="cpu", dtype=None) -> CLIPTextModel:
    """FLUX.1-dev's `text_encoder/`."""
    file = find_file(path, ("model",))
    model = on_meta(lambda: CLIPTextModel(sub_config(config, "clip")))
    return check_and_assign(model, file, open_weights(file), device=device, dtype=dtype)


def load_t5(path, config=None, *, device="cpu", dtype=None) -> T5Encoder:
    """FLUX.1-dev's `text_encoder_2/`."""
    file = find_file(path, ("model",))
    model = on_meta(lambda: T5Encoder(sub_config(config, "t5")))
    return check_and_assign(model, file, open_weights(file), device=device, dtype=dtype)


def make_adapter(config: NexusGenConfig) -> GenerationAdapter:
    """An adapter between the widths of `config`."""
    return GenerationAdapter(config.ar.text.hidden_size, config.mmdit.context_in_dim)


def make_merger(config: NexusGenConfig) -> ImageEmbeddingMerger:
    """A merger between the widths of `config`; its layer is one of the decoder's."""
    return ImageEmbeddingMerger(config.ar.text, config.mmdit.context_in_dim)


def load_config(folder: str | Path) -> NexusGenConfig:
    """The sizes in `nexus_min.json`; the official full size when the folder has none."""
    file = Path(folder) / "nexus_min.json"
    if not file.is_file():
        return NexusGenConfig.v2()
    try:
        return NexusGenConfig.from_dict(json.loads(file.read_text()))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: not a configuration ({error})") from None


ENCODER_FOLDERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def load_empty_prompt(
    folder: str | Path, config: NexusGenConfig, *, device="cpu", dtype=None
) -> dict[str, Tensor] | None:
    """CLIP's `pooled` [1, vec] and T5's `context` [1, L, ctx] of the empty prompt.

    None when they must be computed: the encoders are there, the file is not, or is of others.
    """
    folder = Path(folder)
    path, made_from = folder / "empty_prompt.safetensors", encoders_fingerprint(folder)
    if made_from and (not path.is_file() or stored_fingerprint(path) not in (made_from, None)):
        return None
    file = find_file(path)
    entries, sizes = open_weights(file), config.mmdit
    length = entries["context"].shape[1:2] if "context" in entries else ("L",)
    shapes = {"pooled": (1, sizes.vec_in_dim), "context": (1, *length, sizes.context_in_dim)}
    check(file, "the MMDiT", shapes, entries)
    if not 1 <= length[0] <= MAX_CONTEXT:
        raise ValueError(f"{file}: a context of {length[0]} tokens; T5 gives 1 to {MAX_CONTEXT}")
    return {key: entry.read().to(device, dtype) for key, entry in entries.items()}


def save_empty_prompt(folder: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Keep what the folder's encoders made of "", and of which files they were read."""
    made_from = {"encoders": encoders_fingerprint(Path(folder)) or ""}
    save_tensors(Path(folder) / "empty_prompt.safetensors", tensors, None, made_from)


def encoders_fingerprint(folder: Path) -> str | None:
    """Of names, sizes, first and last 64 KiB of CLIP's and T5's files; None when there are none."""
    flux, mark = folder / FLUX_FOLDER, hashlib.md5()
    files = [f for name in ENCODER_FOLDERS for f in sorted((flux / name).glob("*")) if f.is_file()]
    for file in files:
        mark.update(f"{file.relative_to(flux)} {file.stat().st_size} ".encode())
        with open(file, "rb") as data:
            mark.update(data.read(1 << 16))
            data.seek(max(0, file.stat().st_size - (1 << 16)))
            mark.update(data.read())
    return mark.hexdigest() if files else None


def stored_fingerprint(file: Path) -> str | None:
    """Which encoders a file of constants was made from; None when it does not say."""
    try:
        with safe_open(file, framework="pt") as handle:
            return (handle.metadata() or {}).get("encoders")
    except (SafetensorError, OSError):
        return None  # whoever reads it will say what is wrong


# ----------------------------------------------------------------------------------------- saving


def save_checkpoint(
    folder: str | Path,
    config: NexusGenConfig,
    ar: nn.Module | None = None,
    generation: tuple[nn.Module, nn.Module] | None = None,
    editing: tuple[nn.Module, nn.Module] | None = None,
    autoencoder: nn.Module | None = None,
    empty_prompt: dict[str, Tensor] | None = None,
    tokenizer_file: str | Path | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    metadata: dict[str, str] | None = None,
) -> list[Path]:
    """Write any subset of the components under their official names; return the files written.

    generation: (mmdit, adapter); editing: (mmdit, merger). Modules or state dicts; `dtype` None
    keeps each tensor's own. Every file appears whole or not at all. Raises ValueError, before
    anything is written, when a component does not fit `config`.
    """
    folder = Path(folder)
    ar_dir, flux = folder / AR_FOLDER, folder / FLUX_FOLDER
    files = {
        ar_dir / "model.safetensors": ar and checked_state(ar, lambda: NexusGenAR(config.ar)),
        ar_dir / "generation_decoder.safetensors": generation
        and decoder_tensors(*generation, config, make_adapter, ""),
        ar_dir / "edit_decoder.safetensors": editing
        and decoder_tensors(*editing, config, make_merger, MERGER_PREFIX),
        flux / "ae.safetensors": autoencoder
        and checked_state(autoencoder, lambda: AutoEncoder(config.autoencoder)),
        folder / "empty_prompt.safetensors": empty_prompt,
    }
    files = {file: state for file, state in files.items() if state}
    texts = config_files(folder, config)
    for file, text in texts.items():  # first: weights without sizes would pass for full-size ones
        replace_file(file, lambda path, text=text: path.write_text(text))
    for file, state in files.items():
        save_tensors(file, state, dtype, metadata)
    copies = [ar_dir / "tokenizer.json"] if tokenizer_file is not None else []
    for file in copies:
        replace_file(file, lambda path: shutil.copyfile(tokenizer_file, path))
    return [*files, *texts, *copies]


def checked_state(
    component: nn.Module | Mapping[str, Tensor], make: Callable[[], nn.Module]
) -> dict:
    """The component's tensors, checked against the model that `make` builds."""
    state = component.state_dict() if isinstance(component, nn.Module) else dict(component)
    model = on_meta(make)
    shapes = {k: tuple(p.shape) for k, p in model.state_dict().items()}
    check("save_checkpoint", f"{type(model).__name__} of the config", shapes, state)
    return state


def decoder_tensors(mmdit, projector, config: NexusGenConfig, make: Callable, prefix: str) -> dict:
    """One decoder file: the MMDiT under DiffSynth's names, its projector under `prefix`."""
    tensors = to_diffsynth(checked_state(mmdit, lambda: MMDiT(config.mmdit)))
    own = checked_state(projector, lambda: make(config))
    return tensors | {prefix + key: tensor for key, tensor in own.items()}


def config_files(folder: Path, config: NexusGenConfig) -> dict[Path, str]:
    """`config.json` of the AR model, and `nexus_min.json` when the sizes are not the official."""
    files = {folder / AR_FOLDER / "config.json": official_config(config.ar)}
    if config != NexusGenConfig.v2():
        files[folder / "nexus_min.json"] = config.to_dict()
    return {file: json.dumps(content, indent=2) + "\n" for file, content in files.items()}


def official_config(config: ARConfig) -> dict:
    """The AR model's configuration as Hugging Face lays it out; `ARConfig.from_dict` reads it."""
    text, own = asdict(config.text), asdict(config)
    rope = {"type": "mrope", "mrope_section": text.pop("mrope_section")}
    vision = own.pop("vision")
    del own["text"]
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **text,
        "rope_scaling": rope,
        **own,
        "vision_config": vision | {"in_chans": vision["in_channels"], "model_type": "qwen2_5_vl"},
    }


def save_tensors(
    file: Path, state: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: dict | None
) -> None:
    """Write one safetensors file atomically."""
    tensors = {k: t.detach().to("cpu", dtype).contiguous() for k, t in state.items()}
    header = {"format": "pt", **(metadata or {})}
    try:
        replace_file(file, lambda path: save_file(tensors, path, header))
    except SafetensorError as error:  # how it tells of a full disk
        raise OSError(f"cannot write {file}: {error}") from None


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `file`, then put it in place in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # what the umask grants; safetensors' own is for us alone
        write(partial)
        partial.chmod(mode)
        with open(partial, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- the parts of a model

PARTS = ("ar", "generation", "editing", "autoencoder")


class GenerationDecoder(NamedTuple):
    """Draws an image from its own embeddings."""

    mmdit: MMDiT
    adapter: GenerationAdapter


class EditingDecoder(NamedTuple):
    """Draws an image from its embeddings and those of the image it was made from."""

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


def read_part(name: str, folder: Path, config: NexusGenConfig, load_kwargs: dict) -> Any:
    """One of `PARTS` from its official file. ValueError for another name."""
    ar_dir = folder / AR_FOLDER
    if name == "ar":
        return load_ar(ar_dir, config, **load_kwargs)
    if name == "autoencoder":
        return load_autoencoder(folder / FLUX_FOLDER, config, **load_kwargs)
    if name == "generation":
        file = find_file(ar_dir, ("generation_decoder",))
        adapter = load_generation_adapter(file, config, **load_kwargs)
        return GenerationDecoder(load_mmdit(file, config, **load_kwargs), adapter)
    if name == "editing":
        file = find_file(ar_dir, ("edit_decoder",))
        merger = load_embedding_merger(file, config, **load_kwargs)
        return EditingDecoder(load_mmdit(file, config, **load_kwargs), merger)
    raise ValueError(f"parts are {', '.join(PARTS)}, got {name!r}")


def read_tokenizer(folder: Path, config: NexusGenConfig) -> QwenTokenizer:
    """The tokenizer of a model. ValueError when the file is missing, broken, or another model's."""
    file = find_file(folder / AR_FOLDER / "tokenizer.json")
    tokenizer = tokenizer_of(file, QwenTokenizer)
    tokenizer.check(config.ar)
    return tokenizer


def tokenizer_of(path: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of a tokenizer's file or folder. ValueError naming it when it is broken."""
    try:
        with rust_panic_as_error():
            return read(path)
    except Exception as error:  # `tokenizers` raises bare Exceptions on a broken file
        raise ValueError(f"{path}: cannot be read as a tokenizer: {error}") from error


def read_text_encoders(folder: Path, config: NexusGenConfig, load_kwargs: dict) -> TextEncoders:
    """CLIP, T5 and their tokenizers of FLUX.1-dev."""
    flux = folder / FLUX_FOLDER
    return TextEncoders(
        load_clip(flux / "text_encoder", config, **load_kwargs),
        load_t5(flux / "text_encoder_2", config, **load_kwargs),
        tokenizer_of(flux / "tokenizer", clip_tokenizer),
        tokenizer_of(flux / "tokenizer_2", t5_tokenizer),
    )


def has_text_encoders(folder: Path) -> bool:
    """Whether the folder holds CLIP and T5; the tiny model's does not."""
    return (folder / FLUX_FOLDER / "text_encoder").is_dir()


@torch.no_grad()
def text_context(encoders: TextEncoders, clip_ids: Tensor, t5_ids: Tensor) -> Context:
    """Token ids [1, 77], [1, 512] -> context at position 0; padding takes part, as officially."""
    device = encoders.t5.shared.weight.device
    txt = encoders.t5(t5_ids.to(device))
    ids = context_ids_generation(txt.shape[1])
    return Context(txt, ids, encoders.clip(clip_ids.to(device)))
