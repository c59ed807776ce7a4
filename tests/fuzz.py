"""Feed broken files and texts to what reads them: every answer is a result or a typed error.

    python tests/fuzz.py --minutes 10                   # each of the targets, one after the other
    python tests/fuzz.py --target image --minutes 1
    python tests/fuzz.py --target loader --only 4711    # that case again, with its traceback
    python tests/fuzz.py --hypothesis                   # hypothesis chooses, and shrinks a crash

Targets: `jsonl` (data.MessageDataset and the encoding of its lines), `image` (load_image),
`loader` (the weights loader on .safetensors, .bin and index files), `tokenizer` (QwenTokenizer: its
file, chats, decoding), `batch` (a file of tasks, up to the drawing), `like` (the options of
`generate --like` and `edit --like`), `config` (a model's nexus_min.json). Inputs are mutations of
good ones, a pure function of (seed, target, case). A typed error is ValueError or OSError, on the
command line exit status 2; anything else, 30 seconds without an answer included, is a crash: its
input is kept in the folder --keep. Exit status 1 after a crash.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import itertools
import json
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from test_tokenizer import byte_tokenizer
from tiny_model import make_tiny, save_tiny

from nexus_min import __main__ as command_line
from nexus_min import batch as batches
from nexus_min import weights
from nexus_min.config import NexusGenConfig
from nexus_min.images import load_image
from nexus_min.parts import tokenizer_of
from nexus_min.pipeline import NexusGen
from nexus_min.sampling import SamplingParams
from nexus_min.tokenizer import QwenTokenizer
from nexus_min.train.data import MessageDataset

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
        model = weights.on_meta(lambda: torch.nn.Linear(3, 2))
        weights.check_and_assign(model, file, weights.open_weights(file), dtype=torch.float32)
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


def batch_target(folder: Path) -> Target:
    model, file = make_tiny(), folder / "tasks.jsonl"
    drawn = "image", Image.new("RGB", (1, 1))
    batches.sample_images = lambda model, requests: [drawn] * len(requests)
    Image.linear_gradient("L").save(folder / "a.png")
    quick = {"fast_preamble": True, "num_steps": 2, "seed": 3}
    items = [{"task": "generate", "prompt": "a red 圆", "cfg_scale": 1.5, "height": 64, **quick}]
    items += [{"task": "edit", "image": "a.png", "instruction": "white", "guidance": 3, **quick}]
    items += [{"task": "understand", "image": ["a.png"], "question": "?", "max_new_tokens": 2}]
    seeds = [json.dumps(item, ensure_ascii=False).encode() for item in items]

    def read(data: bytes, rng: random.Random) -> None:
        file.write_bytes(data)
        items = batches.read_items(file)
        rows = batches.to_folder(batches.run(model, items), folder, lambda result, path: None)
        assert [row["index"] for row in rows] == list(range(len(items)))

    return seeds, read


def like_target(folder: Path) -> Target:
    file, config = folder / "like.png", NexusGenConfig.tiny()
    good = {k: str(v) for k, v in asdict(SamplingParams().resolve(config, 1.0)).items()}
    good |= {"prompt": "a red circle", "model": "tiny", "decoder": "editing", "dtype": "fp32"}
    good |= {"language": "en", "fast_preamble": "True", "max_new_tokens": "9", "fp8": "False"}
    odd = [*good, *good.values(), "-o", "--steps", "--", "message", "-1", "1e9"]
    odd = [word.encode() for word in odd]
    given = ["--like", str(file)]

    def read(data: bytes, rng: random.Random) -> None:
        info = PngInfo()
        for name, value in good.items():
            if rng.random() < 0.15:
                value = mutate(odd, rng).decode("utf-8", "replace")
            if rng.random() < 0.95:
                info.add_text(name, value, zip=rng.random() < 0.2)
        Image.new("RGB", (2, 2)).save(file, pnginfo=info)
        if rng.random() < 0.1:
            file.write_bytes(mutate([file.read_bytes()], rng))
        with contextlib.redirect_stderr(io.StringIO()):
            args = command_line.parse([*rng.choice((["generate"], ["edit", "a.png"])), *given])
        options = command_line.sampling_kwargs(args)
        SamplingParams(**{k: options[k] for k in asdict(SamplingParams())}).resolve(config, 1.0)

    return [b"-"], read


def config_target(folder: Path) -> Target:
    model, picture = save_tiny(folder), Image.linear_gradient("L").resize((64, 64))
    file = model / "nexus_min.json"
    seeds = [file.read_bytes()]
    odd = [-4, 0, 1, 2, 7, 64, 1000, 10**8, 2**31, 10**400, 1e-300, 0.5, True, None, "x", {}, []]
    odd += [[0], [-4, 18, 18], [1, 2, 3], [2, 15, 15], [99]]

    def read(data: bytes, rng: random.Random) -> None:
        if rng.random() < 0.8:  # else bytes, which are seldom JSON
            table = whole = json.loads(seeds[0])
            while isinstance(table[key := rng.choice(list(table))], dict):
                table = table[key]
            table[key] = rng.choice(odd)
            data = json.dumps(whole).encode()
        file.write_bytes(data)
        part = rng.choice(("ar", "generation", "editing", "autoencoder"))
        loaded = NexusGen.load(model, parts=[part])
        if part == "ar":
            loaded.understand(picture, "?", max_new_tokens=1)
        elif part == "autoencoder":
            loaded.decode(torch.zeros(1, loaded.config.autoencoder.z_channels, 4, 4))

    return seeds, read


TARGETS = {
    "jsonl": jsonl_target,
    "image": image_target,
    "loader": loader_target,
    "tokenizer": tokenizer_target,
    "batch": batch_target,
    "like": like_target,
    "config": config_target,
}

# ------------------------------------------------------------------------------------- the loop


def hang(*_) -> None:
    raise TimeoutError


class Judge:
    """Gives a target its cases, counts the answers, keeps what crashed."""

    def __init__(self, name: str, args: argparse.Namespace, folder: Path):
        self.name, self.args, self.folder = name, args, folder
        self.seeds, self.read = TARGETS[name](folder)
        self.end = time.monotonic() + 60 * args.minutes
        self.counts, self.slowest = {"read": 0, "refused": 0, "crashed": 0}, (0.0, "")

    def case(self, number: str, rng: random.Random) -> None:
        """One input. What is no typed error is raised, once it is counted and kept."""
        data, begun = mutate(self.seeds, rng), time.perf_counter()
        (self.folder / "case").write_text(f"{self.name} {number}")  # for what ends the process
        signal.alarm(SECONDS)
        try:
            self.read(data, rng)
            self.counts["read"] += 1
        except BaseException as error:
            took = time.perf_counter() - begun
            if isinstance(error, TYPED) and took < SECONDS:
                self.counts["refused"] += 1
                return
            ends = isinstance(error, KeyboardInterrupt) or "hypothesis" in type(error).__module__
            if not ends:  # hypothesis ends an example that asks for too much, and counts it not
                self.counts["crashed"] += 1
                self.args.keep.mkdir(parents=True, exist_ok=True)
                (self.args.keep / f"{self.name}-{self.args.seed}-{number}").write_bytes(data)
            raise
        finally:
            signal.alarm(0)
            self.slowest = max(self.slowest, (time.perf_counter() - begun, number))

    def tell_crash(self, number: str, error: BaseException) -> None:
        told = f"{type(error).__name__}: {error}"
        print(f"{self.name}: crash in case {number}: {told}", flush=True)

    def all_cases(self) -> None:
        """One number after the other, until the time is over."""
        for number in itertools.count():
            if time.monotonic() >= self.end:
                return
            try:
                self.case(str(number), random.Random(f"{self.args.seed} {self.name} {number}"))
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a panic of Rust code is no Exception
                self.tell_crash(str(number), error)

    def hypothesis(self) -> None:
        """Rounds of examples that hypothesis chooses, and shrinks when one crashes."""
        from hypothesis import HealthCheck, given, seed, settings
        from hypothesis.strategies import randoms

        quiet = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}

        def case(rng: random.Random) -> None:
            self.case("hypothesis", rng)

        for number in itertools.count(self.args.seed * 1_000_000):
            if time.monotonic() >= self.end:
                return
            round_ = given(randoms(use_true_random=False))(case)
            try:
                seed(number)(settings(max_examples=100, **quiet)(round_))()
            except Exception as error:
                self.tell_crash("hypothesis", error)

    def told(self) -> str:
        """The counts, and the slowest case."""
        tried = f"{sum(self.counts.values())} cases: "
        tried += ", ".join(f"{n} {what}" for what, n in self.counts.items())
        return f"{self.name}: {tried}; slowest {self.slowest[0]:.2f} s (case {self.slowest[1]})"


def run(name: str, args: argparse.Namespace, folder: Path) -> int:
    """Fuzz one target for its time; print the counts, and a line for each crash. Crashes."""
    judge = Judge(name, args, folder)
    if args.only is not None:
        judge.case(str(args.only), random.Random(f"{args.seed} {name} {args.only}"))
    elif args.hypothesis:
        judge.hypothesis()
    else:
        judge.all_cases()
    print(judge.told(), flush=True)
    return judge.counts["crashed"]


def main() -> int:
    """1 when anything crashed."""
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--target", choices=("all", *TARGETS), default="all")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this case alone")
    parser.add_argument("--hypothesis", action="store_true", help="tests/requirements.txt has it")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="for crashing inputs")
    args = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, hang)
    names = list(TARGETS) if args.target == "all" else [args.target]
    with tempfile.TemporaryDirectory() as place:
        crashed = [run(name, args, Path(tempfile.mkdtemp(dir=place))) for name in names]
    return 1 if any(crashed) else 0


if __name__ == "__main__":
    sys.exit(main())
