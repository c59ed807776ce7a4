"""The files of a release: check, convert or download them (--help).

    python weights_loader.py check DIR

`nexus_min.weights` reads and writes them from Python; its loaders can be imported from here, too.
"""

import argparse
import hashlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from inspect import getdoc
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from tqdm import tqdm

from nexus_min.cli import Parser, report_errors
from nexus_min.config import NexusGenConfig
from nexus_min.formats import (
    FLOATS,
    check_tensors,
    find_file,
    join_keys,
    open_pickle,
    open_weights,
    read_metadata,
    save_tensors,
)
from nexus_min.model.text_encoders import clip_tokenizer, t5_tokenizer
from nexus_min.parts import tokenizer_of
from nexus_min.tokenizer import QwenTokenizer
from nexus_min.weights import (  # noqa: F401
    AR_FOLDER,
    FLUX_FOLDER,
    NEW_IN_NEXUS,
    file_shapes,
    is_base,
    load_ar,
    load_autoencoder,
    load_clip,
    load_config,
    load_embedding_merger,
    load_empty_prompt,
    load_generation_adapter,
    load_mmdit,
    load_t5,
    save_checkpoint,
    shapes_of,
)

COMMAND = "python weights_loader.py"
readable = partial(tqdm.format_sizeof, suffix="B")  # bytes as in 16.6GB

# ---- the release ---------------------------------------------------------------------------------

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
BASE_HASH = "8004730443f55db63092006dd9f7110e"  # Qwen2.5-VL-7B-Instruct, which lacks NEW_IN_NEXUS
BASE_REMARK = "the base model Qwen2.5-VL, not Nexus-Gen. It answers questions but must be trained"
BASE_REMARK += f" to generate images: {join_keys(NEW_IN_NEXUS)} will be random"
TEXT_ENCODERS = ("CLIP", "CLIP tokenizer", "T5", "T5 tokenizer")
TOKENIZERS = {  # component: how its file is read, given a config
    "tokenizer": lambda c, file: QwenTokenizer(file).check(c.ar),
    "CLIP tokenizer": lambda c, file: clip_tokenizer(file.parent),
    "T5 tokenizer": lambda c, file: t5_tokenizer(file.parent),
}
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

# ---- check ---------------------------------------------------------------------------------------

COLUMNS = ("component", "file", "tensors", "bytes", "dtype", "names and shapes", "state")


def names_hash(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """DiffSynth's published fingerprint of a file: md5 of all sorted `key:shape` and `key`."""
    parts = [f"{key}:{'_'.join(map(str, shape))}" for key, shape in shapes.items()]
    return hashlib.md5(",".join(sorted([*parts, *shapes])).encode()).hexdigest()


def fill_row(row: dict[str, str], folder: Path, config: NexusGenConfig, read_values: bool) -> None:
    """Fill in the row of a component; ValueError says what is wrong with its file."""
    component = row["component"]
    repo, path, published_hash = RELEASED.get(component, (None, "empty_prompt.safetensors", None))
    path = Path(FOLDERS.get(repo, ""), path)
    if published_hash:
        expected = file_shapes(path.as_posix(), config)
        row["tensors"] = f"0/{len(expected)}"
        file = find_file(folder / path.parent, (path.name,))
    else:
        file = find_file(folder / path)
    row |= {"file": str(file.relative_to(folder)), "bytes": readable(file.stat().st_size)}
    if component in TOKENIZERS:
        tokenizer_of(file, partial(TOKENIZERS[component], config))
    elif published_hash is None and load_empty_prompt(folder, config) is None:
        row |= {"state": "stale", "remark": "of other text encoders, or not finite; computed anew"}
    if published_hash is None:
        return
    tensors = open_weights(file)
    if is_base(tensors):
        expected = {key: shape for key, shape in expected.items() if key not in NEW_IN_NEXUS}
        published_hash, row["remark"] = BASE_HASH, BASE_REMARK
    verdict = "equal" if names_hash(shapes_of(tensors)) == published_hash else "differs"
    files = {tensor.file for tensor in tensors.values()}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    row |= {
        "tensors": f"{len(tensors)}/{len(expected)}",
        "bytes": readable(sum(f.stat().st_size for f in files)),
        "dtype": join_keys(dtypes, 3),
        "names and shapes": verdict if config == NexusGenConfig.v2() else "none published",
    }
    check_tensors(file, f"the {component}", expected, tensors)
    odd = [k for k, t in tensors.items() if read_values and not t.read().isfinite().all()]
    if odd:
        raise ValueError(f"{file}: holds NaN or infinite values ({len(odd)}): {join_keys(odd)}")


def component_row(
    component: str, needed: bool, folder: Path, config: NexusGenConfig, read_values: bool = False
) -> dict[str, str]:
    """The row of a component, and a remark: what is wrong with it, and where to get it."""
    row = dict.fromkeys(COLUMNS, "-") | {"component": component, "state": "ok", "remark": ""}
    try:
        fill_row(row, folder, config, read_values)
    except (ValueError, OSError) as error:
        absent = row["file"] == "-"
        row["state"] = ("missing" if absent else "wrong") + ("" if needed else ", not needed")
        remedy = "not in the release: get it from where this folder comes from"
        if component in RELEASED and not (folder / "nexus_min.json").is_file():
            condition = "" if absent else ", once this is deleted"
            option = " --base" if component == "FLUX.1-dev" else ""
            remedy = f"from {RELEASED[component][0]}{condition}: "
            remedy += f"{COMMAND} download {quote(str(folder))}{option}"
        row["remark"] = f"{error}\n  {remedy}" if needed or not absent else ""
    return row


def check(args: argparse.Namespace) -> int:
    """Compare names, shapes and types of all tensors with the models and the released ones.

    Ends with exit status 1 when a needed file is missing or wrong.
    """
    folder = args.path
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the one that holds {AR_FOLDER}/")
    config, has_prompt = load_config(folder), (folder / "empty_prompt.safetensors").is_file()
    prompt = component_row("empty prompt", has_prompt, folder, config)
    optional = ("FLUX.1-dev", *(TEXT_ENCODERS if prompt["state"] == "ok" else ()))
    rows = [component_row(c, c not in optional, folder, config, args.values) for c in RELEASED]
    rows.append(prompt)
    lines = [COLUMNS, *([row[column] for column in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
    for row in rows:
        if row["remark"]:
            print(f"\n{row['component']}: {row['remark']}")
    faulty = [row["component"] for row in rows if row["state"] in ("missing", "wrong")]
    print(f"\nmissing or wrong: {', '.join(faulty)}" if faulty else "\nall that is needed is there")
    return 1 if faulty else 0


# ---- convert -------------------------------------------------------------------------------------


def free_bytes(folder: Path, needed: int) -> int:
    """Free bytes on the disk of `folder`, which need not exist; ValueError below `needed`."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        sizes = f"needs {readable(needed)} on its disk, where {readable(free)} are free"
        raise ValueError(f"{folder}: {sizes}; make room")
    return free


def convert_file(file: Path) -> bool:
    """Write a .bin as safetensors beside it, keys and values unchanged. False if that was done."""
    tensors, stat = open_pickle(find_file(file)), file.stat()
    if odd := [f"{key} {t.dtype}" for key, t in tensors.items() if t.dtype not in FLOATS]:
        raise ValueError(f"{file}: holds types that nothing here reads: {join_keys(odd)}")
    target = file.with_suffix(".safetensors")
    source = {"source_bytes": str(stat.st_size), "source_mtime_ns": str(stat.st_mtime_ns)}
    if target.exists():
        if source.items() <= read_metadata(target).items():
            return False
        raise ValueError(f"{target}: not made from this {file.name}; move it away or delete it")
    for leftover in target.parent.glob(f".{target.name}.*partial"):  # of a run that was killed
        leftover.unlink()
    free_bytes(file.parent, stat.st_size)
    state = {key: tensor.read() for key, tensor in tensors.items()}
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in state.values())
    for key, tensor in state.items():  # safetensors stores no shared memory
        state[key] = tensor.clone() if users[tensor.untyped_storage().data_ptr()] > 1 else tensor
    save_tensors(target, state, metadata=source)
    return True


def convert(args: argparse.Namespace) -> None:
    """Write each decoder's .bin as .safetensors beside it: the same names, types and values.

    An interrupted conversion starts again.
    """
    files, path = [args.path], args.path
    if path.suffix != ".bin":
        files = sorted((path / AR_FOLDER).glob("*_decoder.bin"), reverse=True)
    if not files:
        raise ValueError(f"{path}: neither a .bin file nor a folder with decoders as .bin files")
    for file in files:
        state = "is written" if convert_file(file) else "is there already"
        print(f"{file.with_suffix('.safetensors')} {state}; {file.name} may be deleted")


# ---- download ------------------------------------------------------------------------------------


class HubFile(NamedTuple):
    """One version of a file on the hub, and where it goes here."""

    url: str
    size: int  # bytes
    blob: str  # identifies the content
    sha256: str | None  # of large files only
    target: Path

    @property
    def partial(self) -> Path:
        """What has been downloaded of this content."""
        return self.target.with_name(f".{self.target.name}.{self.blob[:12]}.partial")

    @property
    def left(self) -> int:
        """Bytes still to download; a .bin that has been converted is not needed again."""
        here, converted = self.target, self.target.with_suffix(".safetensors")
        is_whole = here.is_file() and here.stat().st_size == self.size
        if is_whole or here.suffix == ".bin" and converted.is_file():
            return 0
        return self.size - (self.partial.stat().st_size if self.partial.is_file() else 0)


@contextmanager
def hub_errors(source: str) -> Iterator[None]:
    """Any failure of the hub becomes a ValueError of one line that says what to do."""
    from huggingface_hub.errors import HTTPError  # of the HTTP library that this version uses

    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = str(error).split("\n")[0] or type(error).__name__
        message = f"{reason}; check network, disk and --endpoint, then repeat the command to resume"
        if status in (401, 403) and FLUX in source:
            page = f"https://huggingface.co/{FLUX}"
            message = f"gated: accept the FLUX.1-dev non-commercial license at {page}, then"
            message += f" `hf auth login`. It covers both decoders of {NEXUS}, fine-tuned from it"
        elif status in (401, 403, 404):
            message = f"not on the hub, or not for you ({reason}); try `hf auth login`"
        raise ValueError(f"{source}: {message}") from None


def hub_files(folder: Path, base: bool, endpoint: str | None) -> list[HubFile]:
    """The current version on the hub of all files that a model is read from."""
    from huggingface_hub import HfApi, hf_hub_url

    files = []
    for repo, subfolder in FOLDERS.items():
        names = DOWNLOADS[repo] + (["flux1-dev.safetensors"] if base and repo == FLUX else [])
        with hub_errors(repo):
            info = HfApi(endpoint).model_info(repo, files_metadata=True, timeout=30)
        found = {s.rfilename: s for s in info.siblings or () if s.size is not None and s.blob_id}
        if absent := join_keys(name for name in names if name not in found):
            raise ValueError(f"{repo}: the hub has no {absent}; see its page for the reason")
        for name in names:
            s, url = found[name], hf_hub_url(repo, name, revision=info.sha, endpoint=endpoint)
            sha256 = s.lfs.sha256 if s.lfs else None
            files.append(HubFile(url, s.size, s.blob_id, sha256, folder / subfolder / name))
    return files


def fetch(file: HubFile) -> None:
    """Download a file or the rest of it; it gets its name only when whole and verified.

    Not by `hf_hub_download`: its newer versions delete a partial file when they are interrupted.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    file.target.parent.mkdir(parents=True, exist_ok=True)
    if file.left < 0:  # two commands wrote to it at once
        file.partial.unlink()
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # ranges of the file itself
    facts = {"expected_size": file.size, "displayed_filename": file.target.name}
    with hub_errors(file.url), open(file.partial, "ab") as out:
        http_get(file.url, out, resume_size=out.tell(), headers=headers, **facts)
    with open(file.partial, "rb") as data:
        is_sound = file.sha256 in (None, hashlib.file_digest(data, "sha256").hexdigest())
    if not is_sound:
        file.partial.unlink()
        raise ValueError(f"{file.target}: checksum mismatch; deleted. Repeat the command")
    os.replace(file.partial, file.target)


def download(args: argparse.Namespace) -> None:
    """Get the release, 75 GB, from the Hugging Face hub. Repeat the command to resume it.

    FLUX.1-dev is gated: accept its license there, then `hf auth login`.
    """
    if not find_spec("huggingface_hub"):
        raise ValueError("download needs: pip install huggingface_hub")
    files = hub_files(args.path, args.base, args.endpoint and args.endpoint.rstrip("/"))
    for file in files:
        state = "there" if not file.left else "begun" if file.left < file.size else ""
        print(f"{readable(file.size):>8}  {state:5}  {file.target}")
    left, total = sum(file.left for file in files), sum(file.size for file in files)
    free = free_bytes(args.path, 0 if args.list else left)
    print(f"{readable(left)} of {readable(total)} to download; {readable(free)} free on the disk")
    if args.list:
        return
    for file in files:
        if file.left:
            fetch(file)
    print(f"complete; next: {COMMAND} check {quote(str(args.path))}")


# ---- the command line ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The verb's exit status; 2 after one line on standard error, 130 after Ctrl-C."""
    parser = Parser("weights_loader.py", description="The files of a release: get and check them.")
    verbs, commands = parser.add_subparsers(required=True, metavar="VERB"), {}
    for run in (check, convert, download):
        about = getdoc(run)
        command = verbs.add_parser(run.__name__, help=about.split("\n")[0], description=about)
        path, noun = ("DIR|FILE", "a model, or one .bin") if run is convert else ("DIR", "a model")
        command.add_argument("path", type=Path, metavar=path, help=f"folder of {noun}")
        command.set_defaults(run=run)
        commands[run] = command.add_argument
    commands[check]("--values", action="store_true", help="also read all values and look for NaN")
    commands[download]("--list", action="store_true", help="only print the files and sizes")
    commands[download]("--base", action="store_true", help="flux1-dev.safetensors as well")
    commands[download]("--endpoint", metavar="URL", help="URL of a mirror of huggingface.co")
    with report_errors("weights_loader", "stopped; repeat the command to resume") as status:
        args = parser.parse_args(argv)
        status.code = args.run(args) or 0
    return status.code


if __name__ == "__main__":
    sys.exit(main())
