"""The command line: `python -m nexus_min understand | generate | edit | chat | batch | app | eval`.

Options as in the official `image_understanding.py`, `image_generation.py` and `image_editing.py`,
with shorter names beside them. Whatever is wrong with what the user gave is one line on stderr and
exit status 2; an image appears whole or not at all. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

PROGRAM = "nexus_min"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DTYPES |= {name: name for name in DTYPES.values()}
WORD = r"[a-z\u00c0-\u024f]+|[^\W\d_a-z\u00c0-\u024f]+"  # Latin letters, or other letters
OPTION = r"--|-[^\d\s]\S*$"  # a word that looks like one: not "-3", not "- make it red"
# What an image tells of how it was drawn -> the option that sets it; not the model or the output,
# which a file from outside shall not choose.
RECALLED = {"height": "--height", "width": "--width", "num_steps": "--steps", "seed": "--seed"}
RECALLED |= {"cfg_scale": "--cfg", "guidance": "--guidance", "negative_prompt": "--negative_prompt"}
RECALLED |= {"language": "--language", "max_new_tokens": "--max_new_tokens", "dtype": "--dtype"}
MAX_NAME = 220  # bytes of a file's name: what is written first has a longer one, of at most 255
MAX_MESSAGE = 600  # characters of an error that are shown


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line without the usage."""

    def error(self, message: str):
        fail(f"{message} (try: python -m {PROGRAM} --help)")


def fail(message: object) -> NoReturn:
    """One line on stderr, exit status 2."""
    line = " ".join(str(message).split())
    line = line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]} ..."
    say(sys.stderr, f"{PROGRAM}: error: {line}")
    raise SystemExit(2)


def say(stream, line: str, end: str = "\n") -> None:
    """Write a line in the stream's encoding, escaping what that cannot hold."""
    encoding = stream.encoding or "utf-8"
    stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + end)


# ---- arguments ---------------------------------------------------------------------------------


def build_parser(with_eval: bool) -> Parser:
    """All subcommands; the options of `eval` are those of `toy.evaluate`, imported if asked for."""
    parser = Parser(prog=f"python -m {PROGRAM}", description="Understand, draw and edit images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    understand = commands.add_parser("understand", help="answer a question about an image")
    add_image(understand)
    add_model(understand)
    add_tokens(understand)
    generate = commands.add_parser("generate", help="draw a description")
    generate.add_argument("words", nargs="*", metavar="PROMPT", help="the description, in quotes")
    generate.add_argument("--prompt")
    add_like(generate)
    add_drawing(generate, "generated.png")
    add_preamble(generate)
    add_model(generate)
    add_tokens(generate)
    edit = commands.add_parser("edit", help="change an image as told")
    add_image(edit)
    edit.add_argument("--decoder", choices=("editing", "generation"), default="editing")
    edit.add_argument(
        "--use_generation_decoder", action="store_const", const="generation", dest="decoder"
    )
    add_like(edit)
    add_drawing(edit, "edited.png")
    add_preamble(edit)
    add_model(edit)
    add_tokens(edit)
    chat = commands.add_parser("chat", help="talk, line by line; /help lists the commands")
    chat.set_defaults(words=[])
    chat.add_argument(
        "--keep",
        choices=("slots", "predicted", "reencoded"),
        default="predicted",
        help="what is remembered of a drawn image",
    )
    chat.add_argument("--decoder", choices=("auto", "generation", "editing"), default="auto")
    add_limit(chat)
    add_drawing(chat, "chat.png")
    add_model(chat)
    add_tokens(chat)
    batch = commands.add_parser("batch", help="the tasks of a JSONL file")
    batch.set_defaults(words=[])
    batch.add_argument(
        "file", type=Path, metavar="FILE", help='{"task": "generate", "prompt": ...}'
    )
    batch.add_argument("--output", "-o", type=Path, default=Path("results"), metavar="DIR")
    batch.add_argument("--batch_size", "--batch-size", type=int, default=8, metavar="N")
    batch.add_argument("--seed", type=int, default=0, metavar="N", help="of the first item")
    add_limit(batch)
    add_model(batch)
    app = commands.add_parser("app", help="a web page, on this machine only unless told otherwise")
    app.set_defaults(words=[])
    app.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    app.add_argument("--port", type=int, default=7860, metavar="N")
    add_model(app)
    evaluate = commands.add_parser("eval", help="score a model on the toy world")
    add_model(evaluate)
    evaluate.add_argument("--seed", type=int, default=0, metavar="N", help="of cases and noise")
    if with_eval:
        from .toy.evaluate import add_arguments

        add_arguments(evaluate)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; words may stand before, between and after the options."""
    parser = build_parser(argv[:1] == ["eval"])
    args, rest = parser.parse_known_args(argv)
    if getattr(args, "like", None) is not None:
        argv = [argv[0], *recall(args, len(rest)), *argv[1:]]  # what comes later counts
        args, rest = parser.parse_known_args(argv)
    if rest and (args.command == "eval" or any(re.match(OPTION, word) for word in rest)):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if rest:
        args.words += rest
    return args


def add_like(parser: argparse.ArgumentParser) -> None:
    """An image that tells how it was drawn."""
    told = "draw as this PNG of ours was drawn; text and options given beside it come first"
    parser.add_argument("--like", metavar="PNG", help=told)


def recall(args: argparse.Namespace, more_words: int) -> list[str]:
    """The options that `args.like` was drawn with, and its text unless the user gives one."""
    kept = read_settings(args.like)
    device = find_device(args.device, args.model)
    for name, now in (("model", args.model), ("device", device), ("versions", versions())):
        if kept.get(name, now) != now:
            told = f"drawn with {name} {kept[name][:100]!r}, now it is {now!r}"
            say(sys.stderr, f"{PROGRAM}: warning: {args.like}: {told}")
    options = [f"{RECALLED[name]}={kept[name]}" for name in RECALLED if kept.get(name)]
    options += [f"--{name}" for name in ("fast_preamble", "fp8") if kept.get(name) == "True"]
    text, wanted = ("prompt", 1) if args.command == "generate" else ("instruction", 2)
    if args.command == "edit" and "decoder" in kept:
        options.append(f"--decoder={kept['decoder']}")
    named = [getattr(args, name, None) for name in ("prompt", "input_image", "instruction")]
    if len(args.words) + more_words + sum(x is not None for x in named) < wanted:
        options.append(f"--{text}={kept.get('prompt', '')}")
    return options


def add_image(parser: argparse.ArgumentParser) -> None:
    """An image, and what to ask or do about it: by position or by name."""
    parser.add_argument("words", nargs="*", metavar="IMAGE TEXT", help="the image, then the text")
    parser.add_argument("--input_image", "--input-image", metavar="FILE")
    parser.add_argument("--instruction", "--question", metavar="TEXT")
    add_limit(parser)


def add_limit(parser: argparse.ArgumentParser) -> None:
    """How large an image from outside may be."""
    told = "refuse a larger image before decoding it; default 50 million"
    parser.add_argument("--max_image_pixels", type=int, metavar="N", help=told)


def add_drawing(parser: argparse.ArgumentParser, output: str) -> None:
    """How an image is drawn and where it goes; sizes, steps and cfg default to the model's own."""
    number = {"type": int, "metavar": "N"}
    real = {"type": float, "metavar": "X"}
    parser.add_argument("--height", **number, help="pixels, rounded up to whole tokens")
    parser.add_argument("--width", **number)
    parser.add_argument("--num_inference_steps", "--steps", dest="num_steps", **number)
    parser.add_argument("--cfg_scale", "--cfg", dest="cfg_scale", **real)
    parser.add_argument("--embedded_guidance", "--guidance", dest="guidance", default=3.5, **real)
    parser.add_argument("--negative_prompt", "--negative-prompt", default="", metavar="TEXT")
    parser.add_argument("--seed", default=0, **number)
    parser.add_argument("--output", "-o", default=output, metavar="FILE", help=f"default {output}")


def add_preamble(parser: argparse.ArgumentParser) -> None:
    """What is said around the prompt."""
    parser.add_argument("--language", choices=("en", "zh"), help="default: by the characters")
    parser.add_argument(
        "--fast_preamble",
        "--fast-preamble",
        action="store_true",
        help="no text before the image; the tiny model then mostly fails to edit one object",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, and where it runs."""
    parser.add_argument("--model", default="tiny", metavar="DIR", help="a model's folder, or tiny")
    parser.add_argument("--device", help="default: cuda, mps or cpu, what is there; tiny: cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on the CPU, else bf16")
    parser.add_argument(
        "--memory",
        choices=("auto", "resident", "staged", "stream"),
        help="what stays on the GPU: all, one part at a time, or a few blocks; auto, the default:"
        " what fits, and why is told",
    )
    parser.add_argument("--fp8", action="store_true", help="store the decoders in 8 bits")


def add_tokens(parser: argparse.ArgumentParser) -> None:
    """How long a reply may be."""
    parser.add_argument("--max_new_tokens", type=int, default=1024, metavar="N")


def place_words(args: argparse.Namespace, *names: str) -> None:
    """Give the positional words to those of `names` that no option has set; all must be set."""
    free = [name for name in names if getattr(args, name) is None]
    if len(args.words) > len(free):
        extra = " ".join(args.words[len(free) :])
        raise ValueError(f"what to do with {extra!r}? put quotes around a text of several words")
    for name, word in zip(free, args.words, strict=False):
        setattr(args, name, word)
    if missing := [name for name in names if getattr(args, name) is None]:
        raise ValueError(f"{args.command} needs {' and '.join('--' + name for name in missing)}")


# ---- the commands ------------------------------------------------------------------------------


def run_understand(args: argparse.Namespace) -> None:
    """Print the answer."""
    place_words(args, "input_image", "instruction")
    image = open_image(args.input_image, args.max_image_pixels)
    model = load_model(args, ["ar"])
    answer = model.understand(image, args.instruction, max_new_tokens=args.max_new_tokens)
    warn_unknown(args.model, args.instruction, image)
    say(sys.stdout, answer)


def run_generate(args: argparse.Namespace) -> None:
    """Draw the prompt; save and name the image."""
    place_words(args, "prompt")
    check_output(args.output)
    model = load_model(args, ["ar", "generation", "autoencoder"])
    events = model.generate_steps(args.prompt, **drawing(args))
    finish(args, events, {"prompt": args.prompt})


def run_edit(args: argparse.Namespace) -> None:
    """Edit the image; save and name the new one."""
    place_words(args, "input_image", "instruction")
    check_output(args.output)
    image = open_image(args.input_image, args.max_image_pixels)
    model = load_model(args, ["ar", args.decoder, "autoencoder"])
    events = model.edit_steps(image, args.instruction, decoder=args.decoder, **drawing(args))
    finish(args, events, {"prompt": args.instruction, "decoder": args.decoder}, image)


def run_chat(args: argparse.Namespace) -> None:
    """Talk over standard input and output; images are saved as chat-1.png, chat-2.png, ..."""
    from .chat import Chat
    from .talk import HELP, Talk

    place_words(args)
    check_output(args.output)
    model = load_model(args)
    chat = Chat(model, keep=args.keep, decoder=args.decoder, **drawing(args))

    def write(text: str) -> None:
        say(sys.stdout, text, end="")
        sys.stdout.flush()

    def save(image, number: int, sampling, message: str) -> str:
        path = Path(args.output)
        path = path.with_stem(f"{path.stem}-{number}")
        save_image(image, path, how_drawn(args, sampling, {"message": message}))
        return str(path)

    def complain(error: BaseException) -> None:
        say(sys.stderr, f"{PROGRAM}: " + (f"error: {error}" if str(error) else "stopped"))

    at_terminal = sys.stdin.isatty()
    if at_terminal:
        write(HELP + "\n")
    talk = Talk(chat, write, save, complain if at_terminal else None, args.max_image_pixels)
    talk.run(sys.stdin)


def run_batch(args: argparse.Namespace) -> None:
    """Do the tasks of a file; a line a task in results.jsonl, images by number beside it."""
    from . import batch as batches

    place_words(args)
    items = batches.read_items(args.file)
    args.output.mkdir(parents=True, exist_ok=True)
    check_place(args.output / "results.jsonl")
    model = load_model(args)
    options = {"batch_size": args.batch_size, "seed": args.seed, "progress": sys.stderr.isatty()}
    options["max_pixels"] = args.max_image_pixels

    def save(result, path: Path) -> None:
        facts = item_facts(items[result.index], result.sampling)
        save_image(result.image, path, how_drawn(args, result.sampling, facts))

    rows = batches.to_folder(batches.run(model, items, **options), args.output, save)
    say(sys.stdout, str(args.output / "results.jsonl"))
    if failed := [row for row in rows if "error" in row]:
        first = f"item {failed[0]['index']}: {failed[0]['error']}"
        raise ValueError(f"{len(failed)} of {len(items)} items failed; {first}")


def item_facts(item: dict, sampling) -> dict:
    """What an image's PNG tells of its item in a batch, as `finish` tells it of a single one."""
    apart = {"task", "id", "image", "instruction", *asdict(sampling)}
    facts = {k: v for k, v in item.items() if k not in apart and v is not None}
    facts["fast_preamble"] = bool(item.get("fast_preamble"))
    if item["task"] == "edit":
        facts = {"prompt": item["instruction"], "decoder": "editing"} | facts
    return facts


def run_app(args: argparse.Namespace) -> None:
    """Serve the web page until Ctrl-C."""
    from .app import page as app

    place_words(args)
    app.find_gradio()
    place = app.listen(args.host, args.port)  # now, not after the model has been loaded
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        say(sys.stderr, f"{PROGRAM}: warning: anyone who reaches {args.host} can use this page")
    model = load_model(args)
    host = f"[{args.host}]" if ":" in args.host else args.host
    say(sys.stdout, f"http://{host}:{args.port}")
    sys.stdout.flush()
    app.serve(model, place)


def run_eval(args: argparse.Namespace) -> None:
    """Score a model on the toy world; where results go is checked before the work is done."""
    from .toy.evaluate import main as evaluate

    if args.seed < 0:
        raise ValueError(f"the seed must be 0 or more, got {args.seed}")
    for path in filter(None, (args.json, args.write_prompts)):
        check_place(path)
    if args.save and args.save.exists() and not args.save.is_dir():
        raise ValueError(f"cannot write grids to {str(args.save)!r}: it is no folder")
    evaluate(args, lambda: load_model(args))


def drawing(args: argparse.Namespace) -> dict:
    """The options of `generate`, `edit` and `chat` that the command line sets."""
    names = ("height", "width", "num_steps", "cfg_scale", "guidance", "negative_prompt", "seed")
    names += ("language", "fast_preamble", "max_new_tokens")
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def open_image(path: str, max_pixels: int | None):
    """The image at `path`: checked before a model is loaded."""
    from .images import load_image

    return load_image(path, max_pixels)


def load_model(args: argparse.Namespace, parts: Sequence[str] | None = None):
    """The parts of the model that a command needs, by default all."""
    import torch

    from .offload import choose, memory_needed
    from .pipeline import PARTS, NexusGen

    parts, device = parts or PARTS, find_device(args.device, args.model)
    args.device = device  # for what an image tells of itself
    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else None
    model = NexusGen.load(args.model, device, dtype, parts, args.memory or "auto", args.fp8)
    profile, reason = "resident", ""
    if model.offloader is not None:
        profile, reason = model.offloader.profile, model.offloader.reason
    elif args.memory == "auto":  # on the CPU, where there is nothing to choose, only if asked
        profile, reason = choose(memory_needed({name: model.part(name) for name in parts}), None)
    if reason:
        say(sys.stderr, f"{PROGRAM}: memory {profile}: {reason}")
    return model


def find_device(name: str | None, model: str) -> str:
    """The device asked for, else the first of cuda, mps, cpu that is there; tiny: the CPU."""
    if name is None:
        return next(d for d in ("cuda", "mps", "cpu") if is_there(d)) if model != "tiny" else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"the device must be cuda, cuda:N, mps or cpu, got {name!r}")
    if not is_there(name):
        raise ValueError(f"this machine, or this build of torch, has no {name}")
    return name


def is_there(device: str) -> bool:
    """Whether a tensor can live there."""
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):  # torch built without it, or no such hardware
        return False
    return True


def finish(args: argparse.Namespace, events, facts: dict, source=None) -> None:
    """Walk the events to the image, save it with how it was made, and print its name."""
    seen = dict(progress(events))
    settings = how_drawn(args, seen["sampling"], facts)
    if settings["negative_prompt"] and settings["cfg_scale"] == 1:
        say(sys.stderr, f"{PROGRAM}: warning: a negative prompt has no effect at cfg scale 1")
    save_image(seen["image"], Path(args.output), settings)
    warn_unknown(args.model, facts["prompt"], source)
    say(sys.stdout, args.output)


def progress(events):
    """The same events, with a bar on a terminal."""
    from tqdm import tqdm

    with tqdm(unit="step", leave=False, disable=not sys.stderr.isatty()) as bar:
        for name, value in events:
            if name == "sampling":
                bar.reset(value.num_steps)
            bar.update(name == "step")
            yield name, value


COMMANDS = {
    "understand": run_understand,
    "generate": run_generate,
    "edit": run_edit,
    "chat": run_chat,
    "batch": run_batch,
    "app": run_app,
    "eval": run_eval,
}


# ---- output ------------------------------------------------------------------------------------


def check_output(output: str) -> None:
    """ValueError when no image can be written there; asked before the work is done."""
    path = Path(output)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"output {output!r} must end in {', '.join(FORMATS)}")
    check_place(path)


def check_place(path: Path) -> None:
    """ValueError when no file can be written to `path`."""
    if len(os.fsencode(path.name)) > MAX_NAME:
        raise ValueError(f"the name {path.name[:60]!r}... is longer than {MAX_NAME} bytes")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {str(path)!r}: no file can be made there")


def how_drawn(args: argparse.Namespace, sampling, facts: dict) -> dict:
    """All that an image depends on but its source: its own facts, settings, versions."""
    names = ("language", "fast_preamble", "max_new_tokens", "device", "dtype", "fp8")
    options = {name: getattr(args, name, None) or "" for name in names}
    known = {"model": args.model, **asdict(sampling), **options, "versions": versions()}
    return known | facts


def save_image(image, path: Path, settings: dict) -> None:
    """Write the image beside `path`, then move it there; a PNG also tells how it was made."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in settings.items():
        info.add_text(key, str(value))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    extra = {"pnginfo": info} if path.suffix.lower() == ".png" else {"quality": 95}
    try:
        image.save(partial, format=FORMATS[path.suffix.lower()], **extra)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_settings(path: str) -> dict[str, str]:
    """What `save_image` wrote into a PNG, unchecked. ValueError for any other file."""
    from .images import open_image

    try:
        with open_image(path) as image:
            kept = {name: text for name, text in image.info.items() if isinstance(text, str)}
    except Exception as error:  # Pillow's readers raise a dozen kinds on a broken file
        raise ValueError(f"cannot read {path!r}: {error}") from error
    if "message" in kept:
        raise ValueError(f"{path!r} was drawn in a conversation, on which it depends")
    if not {"prompt", "seed", "num_steps"} <= kept.keys():
        raise ValueError(f"{path!r} does not tell how it was drawn: no PNG of generate or edit")
    return kept


def versions() -> str:
    """The versions that an image depends on."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return ", ".join(f"{name} {version(name)}" for name in ("nexus_min", "torch"))
    except PackageNotFoundError as error:  # run from its folder, not installed
        return f"unknown ({error.name})"


def warn_unknown(model: str, text: str, image=None) -> None:
    """A line on stderr when the model's folder lists its words and the text has others, and one
    when the image is none of its world."""
    from .weights import model_folder

    file = model_folder(model) / "toy_words.json"
    if file.is_file() and (words := unknown_words(text, read_words(file))):
        shown = ", ".join(words[:10]) + (" ..." if len(words) > 10 else "")
        say(sys.stderr, f"{PROGRAM}: warning: words this model has never seen: {shown}")
    if file.is_file() and image is not None and not is_toy(image):
        say(sys.stderr, f"{PROGRAM}: warning: this model has never seen an image like this one")


def read_words(file: Path) -> list[str]:
    """The words of a toy model. ValueError, with the file, when it is no list of them."""
    try:
        words = json.loads(file.read_text("utf-8"))
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("it holds other things")
        return words
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a list of words ({error}); delete it") from None


def is_toy(image) -> bool:
    """Whether the checker can read a scene of the toy world from the image."""
    import numpy as np

    from .toy.score import read

    reading = read(np.asarray(image.resize((64, 64)))[None])[0]
    return reading.known and bool(reading.scene.objects)


def unknown_words(text: str, known: list[str]) -> list[str]:
    """Words in Latin letters, and runs of other letters (Chinese), made of no known words."""
    text, known = text.lower(), [word.lower() for word in known]
    for word in sorted(known, key=len, reverse=True):
        text = text if word.isascii() else text.replace(word, " ")
    known = set(re.findall(WORD, " ".join(known)))
    return [word for word in dict.fromkeys(re.findall(WORD, text)) if word not in known]


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse(argv)
        logging.basicConfig(format=f"{PROGRAM}: warning: %(message)s")
        COMMANDS[args.command](args)
    except (ValueError, OSError) as error:
        fail(error)
    except (RuntimeError, MemoryError) as error:
        from .offload import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        fail(f"out of memory: {error}".rstrip(": "))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
