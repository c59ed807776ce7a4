"""Feed broken files and texts to what reads them: every answer is a result or a typed error.

    python tests/fuzz.py --minutes 10                   # each of the targets, one after the other
    python tests/fuzz.py --target image --minutes 1
    python tests/fuzz.py --target loader --only 4711    # that case again, with its traceback

Targets: `jsonl` (data.MessageDataset and the encoding of its lines), `image` (load_image),
`loader` (the weights loader on .safetensors, .bin and index files), `tokenizer` (QwenTokenizer: its
file, chats, decoding). Inputs are mutations of good ones, a pure function of (seed, target, case).
A typed error is ValueError or OSError; anything else, 30 seconds without an answer included, is a
crash: its input is kept in the folder --keep. Exit status 1 after a crash.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from test_tokenizer import byte_tokenizer

import weights_loader
from nexus_min.components import tokenizer_of
from nexus_min.data import MessageDataset
from nexus_min.image_processor import load_image
from nexus_min.tokenizer import QwenTokenizer

TYPED = (ValueError, OSError)
SECONDS = 30  # for one case
Target = tuple[list[bytes], Callable[[bytes, random.Random], object]]  # seeds, what reads a case

# ------------------------------------------------------------------------------------- mutations

WORDS = [b"", b"null", b"-1", b"1e999", b"[[[[", b"{}", b'"', b"\\ud800", b"<image>", b"<|im_end|>"]
WORDS += [b"\0", b"\xff\xfe", b"\n", b"9" * 30, "\u202e\u00e9\U0001f600".encode(), b"A" * 5000]
WORDS += [
    n.to_bytes(k, order) for n in (0, 1, 255) for k in (2, 4, 8) for order in ("big", "little")
]
WORDS += [b"\x7f\xff\xff\xff", b"\xff" * 8, b"\0\0\0\x80", b"\x80\x84\x1e\0"]


def mutate(seeds: list[bytes], rng: random.Random) -> bytes:
    """One of the seeds, changed in a few places; sometimes two of them spliced."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 4, 8, rng.randrange(len(data) + 1))))
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:end] = rng.choice(WORDS)
        elif kind == 2:
            data[at:end] = rng.randbytes(end - at)
        elif kind == 3:
            data[at:at] = data[at:end]
        elif kind == 4:
            del data[at:end]
        else:
            other = rng.choice(seeds)
            data[at:] = other[min(at, len(other)) :]
    return bytes(data)


# --------------------------------------------------------------------------------------- targets


def jsonl_target(folder: Path) -> Target:
    tokenizer, file = QwenTokenizer(byte_tokenizer()), folder / "data.jsonl"
    talk = [{"role": "user", "content": "<image> é?"}, {"role": "assistant", "content": "<image>"}]
    lines = [{"id": 1, "images": ["a.png", "b.png"], "messages": talk}]
    lines.append({"messages": [{"role": r, "content": "hi"} for r in ("system", "assistant")]})
    seeds = [json.dumps(line, ensure_ascii=i > 0).encode() for i, line in enumerate(lines)]
    seeds.append(b"\n".join(seeds))

    def read(data: bytes, rng: random.Random) -> None:
        file.write_bytes(data)
        rows = MessageDataset(file)
        for i in range(len(rows)):
            tokenizer.encode_training(rows[i]["messages"], [2] * len(rows[i]["images"]))

    return seeds, read


def image_target(folder: Path) -> Target:
    picture = Image.linear_gradient("L").resize((24, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = []
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000", "AVIF"):
        for mode in ("RGB", "RGBA", "P", "L", "1", "CMYK", "I;16"):
            stream, more = io.BytesIO(), {"save_all": True} if kind in ("GIF", "TIFF") else {}
            try:  # not every format has every mode, nor every Pillow every format
                picture.convert(mode).save(stream, kind, exif=exif, **more)
            except (OSError, KeyError, ValueError):
                continue
            seeds.append(stream.getvalue())

    def read(data: bytes, rng: random.Random) -> None:
        image = load_image(data)
        assert image.mode == "RGB" and image.width * image.height > 0

    return seeds, read


def loader_target(folder: Path) -> Target:
    state, files = (
        torch.nn.Linear(3, 2).state_dict(),
        [folder / f"x.{e}" for e in ("safetensors", "bin")],
    )
    save_file(state, files[0], {"format": "pt"})
    torch.save(state, files[1])
    index = folder / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, "y.safetensors")}))
    (folder / "y.safetensors").write_bytes(files[0].read_bytes())
    kinds = [(file, [file.read_bytes()]) for file in (*files, index)]

    def read(data: bytes, rng: random.Random) -> None:
        file, seeds = rng.choice(kinds)
        file.write_bytes(mutate(seeds, rng))
        model = weights_loader.build(lambda: torch.nn.Linear(3, 2))
        weights_loader.fit(model, file, weights_loader.open_weights(file), dtype=torch.float32)
        model.requires_grad_(False)(torch.ones(1, 3))  # touches every byte

    return [b"-"], read


def tokenizer_target(folder: Path) -> Target:
    good, file = QwenTokenizer(byte_tokenizer(300)), folder / "tokenizer.json"
    seeds = [byte_tokenizer(300).to_str().encode()]
    odd = ["<image>", "\ud800", "\0", "\u202e", *good.special_ids]

    def text(rng: random.Random) -> str:
        words = [
            rng.choice(odd) if rng.random() < 0.4 else chr(rng.randrange(0x110000)) for _ in "ab"
        ]
        return "".join(words) * rng.choice((1, 1, 9, 999))

    def read(data: bytes, rng: random.Random) -> None:
        if rng.random() < 0.3:
            file.write_bytes(data)
            tokenizer_of(file, QwenTokenizer).encode_chat([{"role": "user", "content": "a é 圆"}])
        roles, values = ["user", "system", "assistant", "x", None], [text(rng), "", None, 3]
        chat = [{"role": rng.choice(roles), "content": rng.choice(values)} for _ in range(3)]
        good.decode(rng.randrange(400) for _ in range(9))
        ids = good.encode_chat(chat[: rng.randrange(4)], [2] * rng.randrange(3))
        assert ids.count(good.special_ids["<|im_start|>"]) <= 5  # three turns, system, opening

    return seeds, read


TARGETS = {
    "jsonl": jsonl_target,
    "image": image_target,
    "loader": loader_target,
    "tokenizer": tokenizer_target,
}

# ------------------------------------------------------------------------------------- the loop


def hang(*_) -> None:
    raise TimeoutError


def run(name: str, args: argparse.Namespace, folder: Path) -> int:
    """Fuzz one target for its time; print the counts, and a line for each crash. Crashes."""
    seeds, read = TARGETS[name](folder)
    end, counts, slowest = time.monotonic() + 60 * args.minutes, [0, 0, 0], (0.0, 0)
    case = args.only or 0
    while time.monotonic() < end:
        rng = random.Random(f"{args.seed} {name} {case}")
        data, begun = mutate(seeds, rng), time.perf_counter()
        (folder / "case").write_text(f"{name} {case}")  # for the one that ends the process
        signal.alarm(SECONDS)
        try:
            read(data, rng)
            counts[0] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or args.only is not None:
                raise
            typed = isinstance(error, TYPED) and time.perf_counter() - begun < SECONDS
            counts[1 if typed else 2] += 1
            if not typed:
                args.keep.mkdir(parents=True, exist_ok=True)
                (args.keep / f"{name}-{args.seed}-{case}").write_bytes(data)
                told = traceback.format_exception_only(error)[-1].strip()
                print(f"{name}: crash in case {case}: {told}", flush=True)
        finally:
            signal.alarm(0)
        slowest = max(slowest, (time.perf_counter() - begun, case))
        if args.only is not None:
            break
        case += 1
    read_, refused, crashed = counts
    told = f"{sum(counts)} cases: {read_} read, {refused} refused, {crashed} crashed"
    print(f"{name}: {told}; slowest {slowest[0]:.2f} s (case {slowest[1]})", flush=True)
    return crashed


def main() -> int:
    """1 when anything crashed."""
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--target", choices=("all", *TARGETS), default="all")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this case alone")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="for crashing inputs")
    args = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, hang)
    names = list(TARGETS) if args.target == "all" else [args.target]
    with tempfile.TemporaryDirectory() as place:
        crashed = [run(name, args, Path(place)) for name in names]
    return 1 if any(crashed) else 0


if __name__ == "__main__":
    sys.exit(main())
