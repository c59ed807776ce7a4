"""Files of tensors: opened without reading their data, checked by name, written atomically.

A .safetensors file, a .bin of `torch.save` or an index of shards becomes a dict of `LazyTensor`:
names, shapes and dtypes are known before any data is read. Data stays in the mapped file.
Every fault is one ValueError of one line: the file, the keys at fault, and what to do.
"""

import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMATS = (".safetensors", ".safetensors.index.json", ".bin")  # in order of preference
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FLOATS = tuple(DTYPES.values())

# ---------------------------------------------------------------------------------------- opening


@dataclass(frozen=True)
class LazyTensor:
    """A stored tensor whose data has not been read."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # the stored name of a type that no model here uses
    read: Callable[[], Tensor]


def find_file(path: str | Path, stems: tuple[str, ...] = ()) -> Path:
    """`path` itself, or the one file in the folder `path` whose name starts with one of `stems`."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; check the path or download it")
    # the last one counts: of each stem, the format that is preferred
    found = {s: f for s in stems for end in FORMATS[::-1] if (f := path / f"{s}{end}").is_file()}
    if not found:
        expected = " or ".join(f"{stem}.safetensors" for stem in stems)
        raise ValueError(f"{path}: has no {expected}; check the path or download it")
    if len(found) > 1:
        raise ValueError(f"{path}: holds {' and '.join(found)}; give the path of the file you mean")
    return found.popitem()[1]


def open_weights(file: Path) -> dict[str, LazyTensor]:
    """Key -> tensor of one file, or of all shards of an index. Only headers are read."""
    if file.name.endswith(".index.json"):
        return open_shards(file)

    def version() -> tuple[int, int, int] | None:
        stat = file.stat() if file.exists() else None
        return stat and (stat.st_ino, stat.st_size, stat.st_mtime_ns)

    opened = version()
    tensors = open_safetensors(file) if file.suffix == ".safetensors" else open_pickle(file)

    def read(tensor: LazyTensor) -> Tensor:
        if version() != opened:  # a mapped file that was cut would kill the process
            raise ValueError(f"{file}: changed while it was being read; load it again")
        return tensor.read()

    return {key: replace(tensor, read=partial(read, tensor)) for key, tensor in tensors.items()}


def open_safetensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, mapped."""
    try:
        handle = safe_open(file, framework="pt")  # checks the header against the file's size
        slices = {key: handle.get_slice(key) for key in handle.keys()}
    except (SafetensorError, OSError) as error:
        message = f"{file}: truncated or not safetensors ({error}); download it again"
        raise ValueError(message) from None
    tensors = {}
    for key, stored in slices.items():
        shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
        read = partial(handle.get_tensor, key)
        tensors[key] = LazyTensor(file, shape, DTYPES.get(dtype, dtype), read)
    return tensors


def open_pickle(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a `torch.save` dict, mapped. Code inside is refused, never run."""
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 6):  # before that, weights_only could be made to run code (CVE-2025-32434)
        raise ValueError(f"{file}: torch {torch.__version__} cannot open it safely; need >= 2.6")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        fault = "refused, it holds more than plain tensors (code, or a whole model)"
        raise ValueError(f"{file}: {fault}; use the official file") from None
    except Exception as error:  # the unpickler raises a dozen kinds on a broken file
        reason = str(error).split("\n")[0] or type(error).__name__
        message = f"{file}: truncated or not a torch.save file ({reason}); download it again"
        raise ValueError(message) from None
    items = state.items() if isinstance(state, dict) else [(None, state)]
    if not all(isinstance(key, str) and isinstance(t, Tensor) for key, t in items):
        raise ValueError(f"{file}: not a flat dict of tensors; use the official file")
    odd = [k for k, t in state.items() if t.layout != torch.strided or t.device.type != "cpu"]
    if odd:  # sparse, or without data
        raise ValueError(f"{file}: not plain tensors: {join_keys(odd)}; use the official file")
    return {k: LazyTensor(file, tuple(t.shape), t.dtype, lambda t=t: t) for k, t in state.items()}


def open_shards(index: Path) -> dict[str, LazyTensor]:
    """The tensors of all shards that a Hugging Face index names; the index must be right."""
    try:
        shard_of = json.loads(index.read_text())["weight_map"]
        files = {name: index.parent / name for name in sorted(set(shard_of.values()))}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index}: not an index with a weight_map; download it again") from None
    if outside := [n for n in files if Path(n).name != n or n.endswith(".index.json")]:
        raise ValueError(f"{index}: names files that are no shards beside it: {join_keys(outside)}")
    if absent := [name for name, file in files.items() if not file.is_file()]:
        raise ValueError(f"{index}: names absent shards: {join_keys(absent)}; download them")
    tensors = {key: t for file in files.values() for key, t in open_weights(file).items()}
    held = {key: tensor.file.name for key, tensor in tensors.items()}
    if wrong := [key for key, name in shard_of.items() if held.get(key) != name]:
        wrong = f"its shards do not hold what it says: {join_keys(wrong)}"
        raise ValueError(f"{index}: {wrong}; download all again")
    return tensors


# --------------------------------------------------------------------------------------- checking

# What unexpected keys look like -> what to do about them.
HINTS = {
    r"(?i)lora[._]": "a LoRA: merge it into the full weights first",
    r"(^| )model\.language_model\.": "renamed by a newer transformers: use the released file",
    r"transformer_blocks\.": "diffusers' names: use flux1-dev.safetensors",
    r"\.(down|up)_blocks\.": "diffusers' names: use ae.safetensors",
    r"(^| )(dit\.)?blocks\.0\.": "DiffSynth names without pipe.dit., which do not tell the order of"
    " final_norm_out's halves: use the released decoder",
}


def join_keys(keys: Iterable, limit: int = 20) -> str:
    """The sorted keys in one line; of a long list, the first ones and the number of the others."""
    keys = sorted(map(str, keys))
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def check_tensors(
    source: Path | str, kind: str, expected: Mapping[str, tuple[int, ...]], tensors: Mapping
) -> None:
    """ValueError unless the tensors have exactly the expected names and shapes, as floats."""
    faults = {
        "missing": expected.keys() - tensors.keys(),
        "unexpected": tensors.keys() - expected.keys(),
        "wrong shape": [
            f"{key} {tuple(tensors[key].shape)} instead of {shape}"
            for key, shape in expected.items()
            if key in tensors and tensors[key].shape != shape
        ],
        "wrong dtype": [
            f"{key} {tensor.dtype}"
            for key, tensor in tensors.items()
            if key in expected and tensor.dtype not in FLOATS
        ],
    }
    if any(faults.values()):
        found = [f"{fault} ({len(k)}): {join_keys(k)}" for fault, k in faults.items() if k]
        unexpected = " ".join(faults["unexpected"])
        hints = [hint for pattern, hint in HINTS.items() if re.search(pattern, unexpected)]
        hints = hints or ["give the config of its size, or use the official file"]
        raise ValueError(f"{source}: does not fit {kind}: {'; '.join(found)}. {'; '.join(hints)}")


# ---------------------------------------------------------------------------------------- writing


def save_tensors(file: Path, tensors: Mapping[str, Tensor], dtype=None, metadata=None) -> None:
    """Write one safetensors file atomically; `dtype` None keeps each tensor's own."""
    tensors = {key: t.detach().to("cpu", dtype).contiguous() for key, t in tensors.items()}
    metadata = {"format": "pt", **(metadata or {})}
    try:
        replace_file(file, lambda partial_file: save_file(tensors, partial_file, metadata))
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(f"cannot write {file}: {error}") from None


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says of itself; empty when it cannot be read."""
    try:
        with safe_open(file, framework="pt") as handle:
            return handle.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `file`, then rename it to `file` in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial_file = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial_file.touch()
        mode = partial_file.stat().st_mode  # as the umask says; safetensors makes it private
        write(partial_file)
        partial_file.chmod(mode)
        with open(partial_file, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(partial_file, file)
    finally:
        partial_file.unlink(missing_ok=True)
