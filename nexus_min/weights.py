"""Official weight files <-> the models of `nexus_min`.

Loading: open -> rename -> compare names, shapes and dtypes with the model built on `meta`, before
any tensor is read -> `load_state_dict(strict=True, assign=True)`. Parameter names are the released
keys, except for the MMDiT inside the two decoder files (`DIT_TABLE`).
"""

import hashlib
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .config import NexusGenConfig
from .formats import (
    LazyTensor,
    check_tensors,
    find_file,
    join_keys,
    open_weights,
    read_metadata,
    replace_file,
    save_tensors,
)
from .model.autoencoder import AutoEncoder
from .model.autoregressive import NexusGenAR
from .model.mmdit import MMDiT
from .model.projector import GenerationAdapter, ImageEmbeddingMerger
from .model.text_encoders import CLIPTextModel, T5Encoder

Component = nn.Module | Mapping[str, Tensor]  # a model or its state dict
logger = logging.getLogger(__name__)
TINY = Path(__file__).parent / "checkpoints" / "tiny"
AR_FOLDER, FLUX_FOLDER = "Nexus-GenV2", "FLUX/FLUX.1-dev"
AR_FILE, AUTOENCODER_FILE = f"{AR_FOLDER}/model", f"{FLUX_FOLDER}/ae"
GENERATION_FILE, EDITING_FILE = f"{AR_FOLDER}/generation_decoder", f"{AR_FOLDER}/edit_decoder"
ENCODER_FOLDERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
NEW_IN_NEXUS = ("vision_head.weight", "image_prefill_embeds.weight")  # not in the base model
AS_STORED = "as stored"  # the dtype to give a loader when weights are cast later, as they travel

# ------------------------------------------------------------------------------------------ names

# Layers of the MMDiT in `nexus_min`, as in flux1-dev (black-forest-labs) -> in the decoder files
# (DiffSynth's `FluxDiTStateDictConverter`); # is a block. All other models have their files' names.
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


def decoder_key(name: str) -> str:
    """A parameter of the MMDiT -> its key in a decoder file."""
    return DIT_PREFIX + diffsynth_name(name)


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


# ---------------------------------------------------------------------------------------- loading


class NoInit(TorchFunctionMode):
    """Skip `torch.nn.init`: on `meta` it fills nothing, and it would import sympy."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def on_meta(make: Callable[..., Any], *args) -> Any:
    """What `make` returns, without memory: names and shapes only."""
    try:
        with torch.device("meta"), NoInit():
            return make(*args)
    except (AttributeError, TypeError, ZeroDivisionError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"the sizes of the configuration make no model ({reason})") from error


def sub_config(config: Any, name: str) -> Any:
    """A tower's own config: given as such, inside a NexusGenConfig, or the official full size."""
    config = NexusGenConfig.v2() if config is None else config
    return getattr(config, name) if isinstance(config, NexusGenConfig) else config


def shapes_of(component: Component) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state_of(component).items()}


def check_and_assign(
    model: nn.Module,
    source: Path,
    tensors: Mapping[str, LazyTensor],
    file_key: Callable[[str], str] = str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
) -> Any:
    """Check the tensors against `model` (on `meta`), then read and assign them.

    file_key: parameter name -> key in the file.
    """
    keys = {name: file_key(name) for name in model.state_dict()}
    expected = {keys[name]: shape for name, shape in shapes_of(model).items()}
    check_tensors(source, type(model).__name__, expected, tensors)
    stored = Counter(tensor.dtype for tensor in tensors.values())
    if dtype is None and len(stored) > 1:
        rare = min(stored, key=stored.get)
        odd = join_keys([key for key, tensor in tensors.items() if tensor.dtype == rare], 3)
        message = f"mixes {join_keys(stored)} ({rare}: {odd}); choose one with dtype="
        raise ValueError(f"{source}: {message}")
    cast = None if dtype == AS_STORED else dtype
    state = {name: tensors[key].read().to(device=device, dtype=cast) for name, key in keys.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model


# Loaders take a file, or a folder that holds it under its official name. `config` None is the full
# size. `dtype` None keeps the file's own, AS_STORED each tensor's.
def load(path, stem: str, make, config, device, dtype, ignore: tuple[str, ...] = (), prefix=""):
    """The model `make(config)` from one file; keys that start with `ignore` are another model's."""
    file, model = find_file(path, (stem,)), on_meta(make, config)
    tensors = {k: tensor for k, tensor in open_weights(file).items() if not k.startswith(ignore)}
    return check_and_assign(model, file, tensors, prefix.__add__, device, dtype)


def load_ar(path, config=None, *, device="cpu", dtype=None) -> NexusGenAR:
    """Nexus-GenV2's AR model, or the base Qwen2.5-VL-Instruct with the two new matrices random."""
    file = find_file(path, ("model",))
    model, tensors = on_meta(NexusGenAR, sub_config(config, "ar")), open_weights(file)
    if is_base(tensors):
        names, shapes = join_keys(NEW_IN_NEXUS), shapes_of(model)
        logger.warning("%s is a base model: %s are drawn from N(0, 0.02^2)", file, names)
        stored, generator = tensors["lm_head.weight"].dtype, torch.Generator().manual_seed(0)

        def random(name: str) -> Tensor:  # N(0, 0.02^2): Qwen's initializer_range
            return (0.02 * torch.randn(shapes[name], generator=generator)).to(stored)

        for name in NEW_IN_NEXUS:
            read = partial(random, name)
            tensors[name] = LazyTensor(file, shapes[name], stored, read)
    return check_and_assign(model, file, tensors, device=device, dtype=dtype)


def is_base(tensors: Mapping) -> bool:
    """Whether these are Qwen2.5-VL's: a language model without what Nexus-Gen adds to it."""
    return "lm_head.weight" in tensors and not any(name in tensors for name in NEW_IN_NEXUS)


def load_mmdit(path, config=None, *, device="cpu", dtype=None) -> MMDiT:
    """The MMDiT of a decoder file or of `flux1-dev.safetensors`."""
    file = find_file(path, ("generation_decoder", "edit_decoder", "flux1-dev"))
    model, tensors = on_meta(MMDiT, sub_config(config, "mmdit")), open_weights(file)
    if not any(key.startswith(DIT_PREFIX) for key in tensors):
        return check_and_assign(model, file, tensors, device=device, dtype=dtype)
    tensors = {k: t for k, t in tensors.items() if not k.startswith(("adapter.", MERGER_PREFIX))}
    check_and_assign(model, file, tensors, decoder_key, device, dtype)
    for name, parameter in model.named_parameters():
        if is_swapped(name):
            parameter.data = swap_halves(parameter.data)
    return model


def load_generation_adapter(path, config=None, *, device="cpu", dtype=None) -> GenerationAdapter:
    """The adapter inside the generation decoder; `config` is a NexusGenConfig."""
    config, ignore = config or NexusGenConfig.v2(), (DIT_PREFIX,)
    return load(path, "generation_decoder", make_adapter, config, device, dtype, ignore)


def load_embedding_merger(path, config=None, *, device="cpu", dtype=None) -> ImageEmbeddingMerger:
    """The merger inside the editing decoder; `config` is a NexusGenConfig."""
    config, ignore = config or NexusGenConfig.v2(), (DIT_PREFIX,)
    return load(path, "edit_decoder", make_merger, config, device, dtype, ignore, MERGER_PREFIX)


def load_autoencoder(path, config=None, *, device="cpu", dtype=None) -> AutoEncoder:
    """FLUX.1-dev's `ae.safetensors`."""
    return load(path, "ae", AutoEncoder, sub_config(config, "autoencoder"), device, dtype)


def load_clip(path, config=None, *, device="cpu", dtype=None) -> CLIPTextModel:
    """FLUX.1-dev's `text_encoder/`."""
    return load(path, "model", CLIPTextModel, sub_config(config, "clip"), device, dtype)


def load_t5(path, config=None, *, device="cpu", dtype=None) -> T5Encoder:
    """FLUX.1-dev's `text_encoder_2/`."""
    return load(path, "model", T5Encoder, sub_config(config, "t5"), device, dtype)


def make_adapter(config: NexusGenConfig) -> GenerationAdapter:
    """An adapter between the widths of `config`."""
    return GenerationAdapter(config.ar.text.hidden_size, config.mmdit.context_in_dim)


def make_merger(config: NexusGenConfig) -> ImageEmbeddingMerger:
    """A merger between the widths of `config`; its layer is one of the decoder's."""
    return ImageEmbeddingMerger(config.ar.text, config.mmdit.context_in_dim)


def decoder_state(mmdit: Component, projector: Component, prefix: str = "") -> dict[str, Tensor]:
    """What a decoder file holds: the MMDiT, and its adapter or merger under `prefix`."""
    own = {prefix + key: tensor for key, tensor in state_of(projector).items()}
    state = state_of(mmdit).items()
    return {decoder_key(k): swap_halves(v) if is_swapped(k) else v for k, v in state} | own


def state_of(component: Component) -> Mapping[str, Tensor]:
    """The tensors of a module (also of a compiled one, by their plain names), or a state dict."""
    state = component.state_dict() if isinstance(component, nn.Module) else component
    return {key.replace("_orig_mod.", ""): tensor for key, tensor in state.items()}


CONTENTS = {  # a file without its ending: its tensors, given a config
    AR_FILE: lambda c: NexusGenAR(c.ar).state_dict(),
    GENERATION_FILE: lambda c: decoder_state(MMDiT(c.mmdit), make_adapter(c)),
    EDITING_FILE: lambda c: decoder_state(MMDiT(c.mmdit), make_merger(c), MERGER_PREFIX),
    AUTOENCODER_FILE: lambda c: AutoEncoder(c.autoencoder).state_dict(),
    f"{FLUX_FOLDER}/text_encoder/model": lambda c: CLIPTextModel(c.clip).state_dict(),
    f"{FLUX_FOLDER}/text_encoder_2/model": lambda c: T5Encoder(c.t5).state_dict(),
    f"{FLUX_FOLDER}/flux1-dev": lambda c: MMDiT(c.mmdit).state_dict(),
}


def file_shapes(path: str, config: NexusGenConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of all that a file of CONTENTS holds at the sizes of `config`."""
    return shapes_of(on_meta(CONTENTS[path], config))


def load_config(folder: str | Path) -> NexusGenConfig:
    """The sizes in `nexus_min.json`; the official full size when the folder has none."""
    file = Path(folder) / "nexus_min.json"
    if not file.is_file():
        return NexusGenConfig.v2()
    try:
        return NexusGenConfig.from_dict(json.loads(file.read_text()))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: not a configuration ({error})") from None


def load_empty_prompt(folder: str | Path, config: NexusGenConfig) -> dict[str, Tensor] | None:
    """CLIP's `pooled` [1, vec] and T5's `context` [1, L, ctx] of the empty prompt.

    None when the folder's text encoders must compute them: the file is absent, of other encoders,
    or holds NaN.
    """
    file, made_from = Path(folder) / "empty_prompt.safetensors", encoders_fingerprint(Path(folder))
    is_current = file.is_file() and read_metadata(file).get("encoders", made_from) == made_from
    if made_from and not is_current:
        return None
    tensors, sizes = open_weights(find_file(file)), config.mmdit
    length = tensors["context"].shape[1:2] if "context" in tensors else ("L",)
    shapes = {"pooled": (1, sizes.vec_in_dim), "context": (1, *length, sizes.context_in_dim)}
    check_tensors(file, "the MMDiT", shapes, tensors)
    if not 1 <= length[0] <= 512:
        raise ValueError(f"{file}: a context of {length[0]} tokens; T5 gives 1 to 512")
    values = {key: tensor.read() for key, tensor in tensors.items()}
    if broken := [key for key, value in values.items() if not value.isfinite().all()]:
        if not made_from:
            raise ValueError(f"{file}: {', '.join(broken)} holds NaN; download it again")
        return None
    return values


def save_empty_prompt(folder: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Save what the folder's text encoders made of "", with their fingerprint."""
    metadata = {"encoders": encoders_fingerprint(Path(folder)) or ""}
    save_tensors(Path(folder) / "empty_prompt.safetensors", tensors, metadata=metadata)


def encoders_fingerprint(folder: Path) -> str | None:
    """Hash of names, sizes and ends (64 KiB) of the files of CLIP and T5; None without any."""
    flux_dir, md5 = folder / FLUX_FOLDER, hashlib.md5()
    paths = [p for name in ENCODER_FOLDERS for p in sorted((flux_dir / name).glob("*"))]
    files = [path for path in paths if path.is_file()]
    for file in files:
        size = file.stat().st_size
        md5.update(f"{file.relative_to(flux_dir)} {size} ".encode())
        with open(file, "rb") as data:
            md5.update(data.read(1 << 16))
            data.seek(max(0, size - (1 << 16)))
            md5.update(data.read())
    return md5.hexdigest() if files else None


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
    keeps each tensor's own. All components are checked against `config` before anything is written.
    """
    folder, states = Path(folder), {}
    for path, state in {
        AR_FILE: None if ar is None else state_of(ar),
        GENERATION_FILE: generation and decoder_state(*generation),
        EDITING_FILE: editing and decoder_state(*editing, MERGER_PREFIX),
        AUTOENCODER_FILE: None if autoencoder is None else state_of(autoencoder),
    }.items():
        if state:
            expected = file_shapes(path, config)
            check_tensors("save_checkpoint", f"{path} of the config", expected, state)
            states[folder / f"{path}.safetensors"] = state
    if empty_prompt:
        states[folder / "empty_prompt.safetensors"] = empty_prompt
    texts = config_files(folder, config)
    for file, text in texts.items():  # first: weights without sizes would pass for full-size ones
        replace_file(file, lambda path, text=text: path.write_text(text))
    for file, state in states.items():
        save_tensors(file, state, dtype, metadata)
    files = [*states, *texts]
    if tokenizer_file is not None:
        files.append(folder / AR_FOLDER / "tokenizer.json")
        replace_file(files[-1], lambda path: shutil.copyfile(tokenizer_file, path))
    return files


def config_files(folder: Path, config: NexusGenConfig) -> dict[Path, str]:
    """`config.json` of the AR model, and `nexus_min.json` when the sizes are not the official."""
    own = asdict(config.ar)
    text, vision = own.pop("text"), own.pop("vision")
    rope = {"type": "mrope", "mrope_section": text.pop("mrope_section")}
    official = {  # as Hugging Face lays it out; `ARConfig.from_dict` reads it
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **text,
        "rope_scaling": rope,
        **own,
        "vision_config": vision | {"in_chans": vision["in_channels"], "model_type": "qwen2_5_vl"},
    }
    files = {folder / AR_FOLDER / "config.json": official}
    if config != NexusGenConfig.v2():
        files[folder / "nexus_min.json"] = config.to_dict()
    return {file: json.dumps(content, indent=2) + "\n" for file, content in files.items()}


# ---------------------------------------------------------------------------- the parts of a model


class GenerationDecoder(NamedTuple):
    """Samples an image from its embeddings."""

    mmdit: MMDiT
    adapter: GenerationAdapter


class EditingDecoder(NamedTuple):
    """Samples an image from its embeddings and those of its source image."""

    mmdit: MMDiT
    merger: ImageEmbeddingMerger


def model_folder(model: str | Path) -> Path:
    """The folder itself, or that of the shipped checkpoint for "tiny"."""
    folder = TINY if str(model) == "tiny" else Path(model)
    if not folder.is_dir():
        raise ValueError(f"no model folder {str(folder)!r}; give the folder of a model, or tiny")
    return folder
