"""The files of a release: check, convert or download them (--help).

    python weights_loader.py check DIR

Reading and writing them from Python is `nexus_min.weights`; the loaders are handed on from here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import BinaryIO, NamedTuple, NoReturn

import torch
from tqdm import tqdm

from nexus_min.config import NexusGenConfig
from nexus_min.model.autoencoder import AutoEncoder
from nexus_min.model.autoregressive import NexusGenAR
from nexus_min.model.mmdit import MMDiT
from nexus_min.model.text_encoders import CLIPTextModel, T5Encoder, clip_tokenizer, t5_tokenizer
from nexus_min.tokenizer import QwenTokenizer
from nexus_min.weights import (
    AR_FOLDER,
    DTYPES,
    FLOATS,
    FLUX_FOLDER,
    MERGER_PREFIX,
    NEW_IN_NEXUS,
    check,
    find_file,
    is_base,
    join_keys,
    load_ar,
    load_autoencoder,
    load_clip,
    load_config,
    load_embedding_merger,
    load_empty_prompt,
    load_generation_adapter,
    load_mmdit,
    load_t5,
    make_adapter,
    make_merger,
    names_hash,
    on_meta,
    open_pickle,
    open_weights,
    save_checkpoint,
    to_diffsynth,
)

# ------------------------------------------------------------------------------- the command line
# Check, convert and download a release. Each `run_` returns the exit status; everything here raises
# ValueError, one line, for what the user has to mend.

__all__ = [
    "load_ar",
    "load_mmdit",
    "load_generation_adapter",
    "load_embedding_merger",
    "load_autoencoder",
    "load_clip",
    "load_t5",
    "load_config",
    "load_empty_prompt",
    "save_checkpoint",
]
COMMAND = "python weights_loader.py"
readable = partial(tqdm.format_sizeof, suffix="B")  # bytes as in 16.6GB
NEXUS, FLUX = "modelscope/Nexus-GenV2", "black-forest-labs/FLUX.1-dev"  # on the hub
FOLDERS = {FLUX: FLUX_FOLDER, NEXUS: AR_FOLDER}  # and here; the gated one comes first
RELEASED = {  # component: repository, path there, published hash of its names and shapes
    "AR model": (NEXUS, "model", "2bd19e845116e4f875a0a048e27fc219"),
    "tokenizer": (NEXUS, "tokenizer.json", None),
    "generation decoder": (NEXUS, "generation_decoder", "3e6c61b0f9471135fc9c6d6a98e98b6d"),
    "editing decoder": (NEXUS, "edit_decoder", "63c969fd37cce769a90aa781fbff5f81"),
    "autoencoder": (FLUX, "ae", "21ea55f476dfc4fd135587abb59dfe5d"),
    "CLIP": (FLUX, "text_encoder/model", "94eefa3dac9cec93cb1ebaf1747d7b78"),
    "CLIP tokenizer": (FLUX, "tokenizer/vocab.json", None),
    "T5": (FLUX, "text_encoder_2/model", "22540b49eaedbc2f2784b2091a234c7c"),
    "T5 tokenizer": (FLUX, "tokenizer_2/tokenizer.json", None),
    "FLUX.1-dev": (FLUX, "flux1-dev", "a29710fea6dddb0314663ee823598e50"),
}
TEXT_ENCODERS = ("CLIP", "CLIP tokenizer", "T5", "T5 tokenizer")
BASE_HASH = "8004730443f55db63092006dd9f7110e"  # Qwen2.5-VL-7B-Instruct, which lacks NEW_IN_NEXUS
DOWNLOADS = {  # repository: the files that are read
    FLUX: [
        "ae.safetensors",
        *("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/tokenizer.json"),
        *("text_encoder/model.safetensors", "text_encoder_2/model.safetensors.index.json"),
        *(f"text_encoder_2/model-0000{i}-of-00002.safetensors" for i in (1, 2)),
    ],
    NEXUS: [
        *("tokenizer.json", "model.safetensors.index.json"),
        *(f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)),
        *("generation_decoder.bin", "edit_decoder.bin"),
    ],
}


def released_shapes(component: str, config: NexusGenConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of all that the file of a component in RELEASED holds at these sizes."""
    models = {
        "AR model": lambda: NexusGenAR(config.ar),
        "generation decoder": lambda: make_adapter(config),
        "editing decoder": lambda: make_merger(config),
        "autoencoder": lambda: AutoEncoder(config.autoencoder),
        "CLIP": lambda: CLIPTextModel(config.clip),
        "T5": lambda: T5Encoder(config.t5),
        "FLUX.1-dev": lambda: MMDiT(config.mmdit),
    }
    prefix = MERGER_PREFIX if component == "editing decoder" else ""
    state = {prefix + k: tensor for k, tensor in on_meta(models[component]).state_dict().items()}
    if component.endswith("decoder"):
        state |= to_diffsynth(on_meta(models["FLUX.1-dev"]).state_dict())
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


COLUMNS = ("component", "file", "tensors", "bytes", "dtype", "names and shapes", "state")


def inspect_weights(
    row: dict[str, str], folder: Path, config: NexusGenConfig, values: bool = False
) -> None:
    """Fill in the row of a component of tensors, from headers only unless `values`; ValueError
    tells what is wrong."""
    repo, path, published = RELEASED[row["component"]]
    place, expected = folder / FOLDERS[repo] / path, released_shapes(row["component"], config)
    row["tensors"] = f"0/{len(expected)}"
    file = find_file(place.parent, (place.name,))
    row |= {"file": str(file.relative_to(folder)), "bytes": readable(file.stat().st_size)}
    entries = open_weights(file)
    if is_base(entries):
        expected = {key: shape for key, shape in expected.items() if key not in NEW_IN_NEXUS}
        published, told = BASE_HASH, "the base model Qwen2.5-VL, not Nexus-Gen; it answers, but to"
        row["remark"] = (
            f"{told} draw it has to be trained: {join_keys(NEW_IN_NEXUS)} will be random"
        )
    same = names_hash({key: e.shape for key, e in entries.items()}) == published
    row |= {
        "tensors": f"{len(entries)}/{len(expected)}",
        "bytes": readable(sum(f.stat().st_size for f in {e.file for e in entries.values()})),
        "dtype": join_keys({str(e.dtype).removeprefix("torch.") for e in entries.values()}, 3),
        "names and shapes": "equal" if same else "differs",
    }
    if config != NexusGenConfig.v2():
        row["names and shapes"] = "none published"
    check(file, f"the {row['component']}", expected, entries)
    odd = [key for key, e in entries.items() if not e.read().isfinite().all()] if values else []
    if odd:
        raise ValueError(f"{file}: holds NaN or infinite values ({len(odd)}): {join_keys(odd)}")


def inspect_tokenizer(row: dict[str, str], folder: Path, config: NexusGenConfig) -> None:
    """Fill in the row of a tokenizer by reading it; ValueError tells what is wrong."""
    repo, path, _ = RELEASED[row["component"]]
    file = find_file(folder / FOLDERS[repo] / path)
    row |= {"file": str(file.relative_to(folder)), "bytes": readable(file.stat().st_size)}
    readers = {"CLIP tokenizer": clip_tokenizer, "T5 tokenizer": t5_tokenizer}
    try:
        if row["component"] in readers:
            readers[row["component"]](file.parent)
        else:
            QwenTokenizer(file).check(config.ar)
    except Exception as error:  # `tokenizers` raises bare Exceptions on a broken file
        raise ValueError(f"{file}: cannot be read as a tokenizer: {error}") from None


def inspect_empty_prompt(row: dict[str, str], folder: Path, config: NexusGenConfig) -> None:
    """Fill in the row of the kept constants, which stand for the text encoders if of the same."""
    file = find_file(folder / "empty_prompt.safetensors")
    row |= {"file": file.name, "bytes": readable(file.stat().st_size)}
    if load_empty_prompt(folder, config) is None:
        row |= {"state": "stale", "remark": "not of these text encoders; made anew when needed"}


def inspected(
    component: str, needed: bool, folder: Path, config: NexusGenConfig, values: bool = False
) -> dict[str, str]:
    """The row of a component, and a remark: what is wrong with it, and where to get it."""
    row = dict.fromkeys(COLUMNS, "-") | {"component": component, "state": "ok", "remark": ""}
    repo, _, published = RELEASED.get(component, ("", "", None))
    inspect = partial(inspect_weights, values=values) if published else inspect_tokenizer
    try:
        (inspect if repo else inspect_empty_prompt)(row, folder, config)
    except (ValueError, OSError) as error:
        absent, base = row["file"] == "-", " --base" * (component == "FLUX.1-dev")
        row["state"] = ("missing" if absent else "wrong") + ("" if needed else ", not needed")
        again = "" if absent else ", once this is deleted"
        remedy = f"from {repo}{again}: {COMMAND} download {quote(str(folder))}{base}"
        if not repo or (folder / "nexus_min.json").is_file():
            remedy = "not in the release: get it from where this folder comes from"
        row["remark"] = f"{error}\n  {remedy}" if needed or not absent else ""
    return row


def run_check(args: argparse.Namespace) -> int:
    """Print what the folder holds; 1 when anything that is needed is missing or wrong."""
    folder = args.path
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the one that holds {AR_FOLDER}/")
    config, kept = load_config(folder), (folder / "empty_prompt.safetensors").is_file()
    prompt = inspected("empty prompt", kept, folder, config)
    optional = ("FLUX.1-dev", *(TEXT_ENCODERS if prompt["state"] == "ok" else ()))
    rows = [inspected(name, name not in optional, folder, config, args.values) for name in RELEASED]
    rows.append(prompt)
    lines = [COLUMNS, *([row[column] for column in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
    for row in rows:
        if row["remark"]:
            print(f"\n{row['component']}: {row['remark']}")
    off = [row["component"] for row in rows if row["state"] in ("missing", "wrong")]
    print(f"\nmissing or wrong: {', '.join(off)}" if off else "\nall that is needed is there")
    return 1 if off else 0


# ---- convert -------------------------------------------------------------------------------------

REMAP_BYTES = 512 << 20  # touched pages of a mapped file count as used memory until it is unmapped


def free_bytes(folder: Path, needed: int) -> int:
    """Free on the disk of `folder`, which need not exist; ValueError when less than `needed`."""
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        more, left = readable(needed), readable(free)
        raise ValueError(f"{folder}: needs {more} on its disk, where {left} are free; make room")
    return free


def safetensors_header(file: Path) -> tuple[bytes, dict[str, int]]:
    """First bytes of the safetensors file that a .bin becomes, and where in it each tensor ends."""
    entries, stat = open_pickle(find_file(file)), file.stat()
    if odd := [f"{key} {e.dtype}" for key, e in entries.items() if e.dtype not in FLOATS]:
        raise ValueError(f"{file}: holds types that nothing here reads: {join_keys(odd)}")
    names, end, ends = {dtype: name for name, dtype in DTYPES.items()}, 0, {}
    facts = {"source_bytes": str(stat.st_size), "source_mtime_ns": str(stat.st_mtime_ns)}
    header = {"__metadata__": {"format": "pt", **facts}}
    for key, e in sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize):  # aligned
        start, end = end, end + math.prod(e.shape) * e.dtype.itemsize
        header[key] = {"dtype": names[e.dtype], "shape": e.shape, "data_offsets": [start, end]}
        ends[key] = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {key: len(head) + end for key, end in ends.items()}


def starts_with(file: Path, head: bytes) -> bool:
    """Whether the file is there and these are its first bytes."""
    if not file.is_file():
        return False
    with open(file, "rb") as data:
        return data.read(len(head)) == head


def copy_tensors(file: Path, keys: list[str], out: BinaryIO, bar: tqdm) -> None:
    """Append the bytes of these tensors of a .bin."""
    entries, touched = open_pickle(file), 0
    for key in keys:
        if touched >= REMAP_BYTES:
            entries, touched = {}, 0  # nothing may hold on to the old mapping
            entries = open_pickle(file)
        length = out.write(entries[key].read().reshape(-1).view(torch.uint8).numpy().data)
        touched += length
        bar.update(length)


def convert(file: Path) -> bool:
    """Write a .bin as safetensors beside it: same keys, types and values. False if that was done.

    Goes on with what an interrupted run left. ValueError, before anything is written, for a file
    that is no plain dict of tensors, for another file in the way, and for a full disk.
    """
    head, ends = safetensors_header(file)
    target, size = file.with_suffix(".safetensors"), max([len(head), *ends.values()])
    if target.exists():
        if starts_with(target, head) and target.stat().st_size == size:
            return False
        raise ValueError(f"{target}: not made from this {file.name}; move it away or delete it")
    begun, done = target.with_name(f".{target.name}.partial"), 0
    if starts_with(begun, head):
        there = begun.stat().st_size
        done = max(end for end in [len(head), *ends.values()] if end <= there)
    free_bytes(file.parent, size - done)
    bar = tqdm(desc=target.name, total=size, initial=done, unit="B", unit_scale=True)
    with bar, open(begun, "ab") as out:
        out.truncate(done)  # of the last tensor its torn beginning, of another file's all
        bar.update(0 if done else out.write(head))
        copy_tensors(file, [key for key, end in ends.items() if end > done], out, bar)
        out.flush()
        os.fsync(out.fileno())
    if begun.stat().st_size != size:
        raise ValueError(f"{begun}: written to by two commands at once; delete it and run one")
    os.replace(begun, target)
    return True


def run_convert(args: argparse.Namespace) -> int:
    """Convert one .bin, or those of a model's folder."""
    files, path = [args.path], args.path
    if path.is_dir():
        places = [path / AR_FOLDER / f"{name}_decoder.bin" for name in ("generation", "edit")]
        files = [file for file in places if file.is_file()]
    if not files or path.is_file() and path.suffix != ".bin":
        raise ValueError(f"{path}: neither a .bin file nor a folder with decoders as .bin files")
    for file in files:
        told = "is written" if convert(file) else "is there already"
        print(f"{file.with_suffix('.safetensors')} {told}; {file.name} may be deleted")
    return 0


# ---- download ------------------------------------------------------------------------------------


class HubFile(NamedTuple):
    """A file on the hub, of one version, and its place here."""

    url: str
    size: int  # bytes
    blob: str  # identifies the content
    sha256: str | None  # of large files only
    target: Path

    @property
    def begun(self) -> Path:
        """What has been downloaded of this very content."""
        return self.target.with_name(f".{self.target.name}.{self.blob[:12]}.partial")

    @property
    def left(self) -> int:
        """Bytes still to be downloaded; a .bin that has been converted is not needed again."""
        here, converted = self.target, self.target.with_suffix(".safetensors")
        whole = here.is_file() and here.stat().st_size == self.size
        if whole or here.suffix == ".bin" and converted.is_file():
            return 0
        return self.size - (self.begun.stat().st_size if self.begun.is_file() else 0)


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Whatever goes wrong with the hub as one ValueError of one line that says what to do."""
    from huggingface_hub.errors import HTTPError  # of the HTTP library that this version uses

    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = str(error).split("\n")[0] or type(error).__name__
        told = f"{reason}; check network, disk and --endpoint; the same command then goes on"
        if status in (401, 403, 404):
            told = f"not on the hub, or not for you ({reason}); try `hf auth login`"
        if status in (401, 403) and FLUX in what:
            told = (
                f"gated: accept the FLUX.1-dev non-commercial licence at https://huggingface.co/{FLUX}"
                f", then `hf auth login`. It reaches both decoders of {NEXUS}, fine-tuned from it"
            )
        raise ValueError(f"{what}: {told}") from None


def hub_files(folder: Path, base: bool, endpoint: str | None) -> list[HubFile]:
    """The files that a model is read from, as the hub has them now; ValueError if it lacks one."""
    from huggingface_hub import HfApi, hf_hub_url

    files = []
    for repo, below in FOLDERS.items():
        names = DOWNLOADS[repo] + (["flux1-dev.safetensors"] if base and repo == FLUX else [])
        with hub_errors(repo):
            info = HfApi(endpoint).model_info(repo, files_metadata=True, timeout=30)
        there = {s.rfilename: s for s in info.siblings or () if s.size is not None and s.blob_id}
        if absent := [name for name in names if name not in there]:
            raise ValueError(
                f"{repo}: the hub has no {join_keys(absent)}; see its page for the reason"
            )
        for name in names:
            s, url = there[name], hf_hub_url(repo, name, revision=info.sha, endpoint=endpoint)
            sha256 = s.lfs.sha256 if s.lfs else None
            files.append(HubFile(url, s.size, s.blob_id, sha256, folder / below / name))
    return files


def fetch(file: HubFile) -> None:
    """Download a file from where an interrupted run stopped; in place only when whole and sound.

    Not by `hf_hub_download`: newer ones delete what they have when they are interrupted.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    file.target.parent.mkdir(parents=True, exist_ok=True)
    if file.left < 0:  # two commands wrote to it at once
        file.begun.unlink()
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # ranges of the file itself
    known = {"expected_size": file.size, "displayed_filename": file.target.name}
    with hub_errors(file.url), open(file.begun, "ab") as out:
        http_get(file.url, out, resume_size=out.tell(), headers=headers, **known)
    with open(file.begun, "rb") as data:
        sound = file.sha256 in (None, hashlib.file_digest(data, "sha256").hexdigest())
    if not sound:
        file.begun.unlink()
        raise ValueError(f"{file.target}: arrived damaged, and was deleted; run the command again")
    os.replace(file.begun, file.target)


def run_download(args: argparse.Namespace) -> int:
    """Tell what is to be downloaded, and do so."""
    if not find_spec("huggingface_hub"):
        raise ValueError("download needs: pip install huggingface_hub")
    files = hub_files(args.path, args.base, args.endpoint and args.endpoint.rstrip("/"))
    for file in files:
        state = "there" if not file.left else "begun" if file.left < file.size else ""
        print(f"{readable(file.size):>8}  {state:5}  {file.target}")
    left, total = sum(file.left for file in files), sum(file.size for file in files)
    free = free_bytes(args.path, 0 if args.list else left)
    print(f"{readable(left)} of {readable(total)} to download; {readable(free)} free on the disk")
    if not args.list:
        for file in files:
            if file.left:
                fetch(file)
        print(f"complete; now: {COMMAND} check {quote(str(args.path))}")
    return 0


# ---- the three verbs -----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Bad options raise ValueError, one line, instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line: `path`, the function `run` of the verb, and download's options."""
    parser = Parser("weights_loader.py", description="The files of a release: get and check them.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Callable, path: str, about: str) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=about, description=about)
        command.add_argument("path", type=Path, metavar=path, help="folder of a model")
        command.set_defaults(run=run)
        return command

    about = "compare names, shapes and types of all tensors with the models and the released ones;"
    about += " exit status 1 when a needed file is missing or wrong"
    checked = verb("check", run_check, "DIR", about)
    checked.add_argument("--values", action="store_true", help="also read all, and look for NaN")
    about = "write each decoder's .bin as .safetensors beside it, same names, types and values;"
    verb("convert", run_convert, "DIR|FILE", f"{about} little memory; the same command goes on")
    about = "get the release, 75 GB, from the Hugging Face hub; what is there is skipped, what is"
    about += " begun goes on. FLUX.1-dev is gated: accept its licence there, then `hf auth login`"
    download = verb("download", run_download, "DIR", about)
    download.add_argument("--list", action="store_true", help="only print the files and sizes")
    download.add_argument("--base", action="store_true", help="flux1-dev.safetensors as well")
    download.add_argument("--endpoint", metavar="URL", help="of a mirror of huggingface.co")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The verb's exit status; 2 after one line on standard error, 130 after Ctrl-C."""
    try:
        args = parse(argv)
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"weights_loader: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "weights_loader: stopped; the same command goes on with what is done", file=sys.stderr
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
