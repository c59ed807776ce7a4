"""The command line: `python -m nexus_min understand | generate | edit | chat | batch | app | eval`.

One function a verb, and each option once, in `OPTIONS`, under its name in Python and in batches.
The spellings of the official `image_understanding.py`, `image_generation.py` and `image_editing.py`
work too. Heavy modules are imported where a command needs them.
"""

import argparse
import itertools
import json
import logging
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

from .cli import Parser, check_least, one_line, report_errors
from .png import MAX_SCALE, check_output, check_writable, read_metadata, save_image, versions

PROGRAM = "nexus_min"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
OPTION = r"--|-[^\d\s]\S*$"  # a word that looks like an option: not "-3", not "- make it red"

# ---- arguments ---------------------------------------------------------------------------------

HISTORY_MODES = ("slots", "predicted", "reencoded")
DECODERS, PROFILES = ("editing", "generation"), ("auto", "resident", "staged", "stream")
OPTIONS = {  # name: other spellings, type or choices, default, help
    "image": ("--input_image", str, None, "the image"),
    "question": ("--instruction", str, None, "the question about the image"),
    "instruction": ("--question", str, None, "how to change the image"),
    "prompt": ("", str, None, "the description of the image"),
    "like": ("", str, None, "repeat this PNG of ours; what is given beside it takes precedence"),
    "max_image_pixels": ("", int, None, "refuse a larger image (default: 50 million)"),
    "decoder": ("", DECODERS, "editing", "editing keeps the rest of the image"),
    "chat_decoder": ("", ("auto", *DECODERS), "auto", "auto edits unless the reply announces anew"),
    "use_generation_decoder": ("", bool, False, "the same as --decoder generation"),
    "keep": ("", HISTORY_MODES, "predicted", "what later turns read of a generated image"),
    "height": ("", int, None, "pixels, rounded up to whole tokens (default: the model's)"),
    "width": ("", int, None, "pixels, rounded up to whole tokens (default: the model's)"),
    "num_steps": ("--num_inference_steps --steps", int, None, "Euler steps (default: the model's)"),
    "cfg_scale": ("--cfg", float, None, "classifier-free guidance (default: the decoder's)"),
    "guidance": ("--embedded_guidance", float, 3.5, "distilled guidance, a network input"),
    "negative_prompt": ("", str, "", "what cfg leads away from (default: the empty prompt)"),
    "seed": ("", int, 0, "seed of the noise, or the first of several"),
    "output": ("-o", str, None, "the file of the image (PNG, JPEG or WEBP), or the batch's folder"),
    "scale": ("", int, 1, f"enlarge the saved image 1 to {MAX_SCALE} times, by nearest neighbor"),
    "language": ("", ("en", "zh"), None, "of the template (default: by the prompt's characters)"),
    "fast_preamble": ("", bool, False, "fixed reply; the tiny model then mostly fails to edit"),
    "max_new_tokens": ("", int, 1024, "most tokens of a reply"),
    "file": ("", str, None, 'JSONL, a task a line: {"task": "generate", "prompt": ...}'),
    "batch_size": ("", int, 8, "images sampled at once"),
    "host": ("", str, "127.0.0.1", "address to listen on; the default serves this machine only"),
    "port": ("", int, 7860, "port to listen on"),
    "model": ("", str, "tiny", "a model's folder, or tiny"),
    "device": ("", str, None, "default: cuda, mps or cpu, the first available; cpu for tiny"),
    "dtype": ("", (*DTYPES, *DTYPES.values()), None, "default: fp32 on the CPU, else bf16"),
    "memory": ("", PROFILES, None, "on the GPU: all, a part, some blocks (default: auto)"),
    "fp8": ("", bool, False, "store the decoders in 8 bits"),
}
MODEL = ("model", "device", "dtype", "memory", "fp8")
SAMPLING = ("height", "width", "num_steps", "cfg_scale", "guidance", "negative_prompt", "seed")
REPLY = ("language", "fast_preamble", "max_new_tokens")
# What --like takes from a PNG: not the model or the output, which a foreign file must not choose.
PNG_OPTIONS = (*SAMPLING, "language", "max_new_tokens", "dtype", "scale")
HELP = """\
/image FILE   attach an image to the next message; repeat it for several images
/draw TEXT    draw a description anew, whatever was said before
/new          start a new conversation
/quit         leave, as the end of the input does\
"""
OUTPUTS = dict(generate="generated.png", edit="edited.png", chat="chat.png", batch="results")


def build_parser(with_eval: bool) -> Parser:
    """All commands; only `eval` imports the toy world, for its options."""
    parser = Parser(prog=f"python -m {PROGRAM}", description="Understand, generate, edit images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for verb, (run, positionals, names) in COMMANDS.items():
        command = commands.add_parser(verb, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run, positionals=positionals, words=[])
        if positionals:
            text = "the same as " + " ".join(f"--{name}" for name in positionals)
            metavar = " ".join(positionals).upper()
            command.add_argument("words", nargs="*", metavar=metavar, help=text)
        for name in (*positionals, *names, *MODEL):
            aliases, kind, default, text = OPTIONS[name]
            settings = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
            settings = {"action": "store_true"} if kind is bool else settings
            settings |= {"default": OUTPUTS[verb] if name == "output" else default, "help": text}
            spellings = f"--{name.removeprefix('chat_')} {aliases}".split()
            command.add_argument(*spellings, **settings)
        if with_eval and verb == "eval":
            from .toy.evaluate import add_arguments

            add_arguments(command)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; words may stand before, between and after the options."""
    parser = build_parser(argv[:1] == ["eval"])
    args, rest = parser.parse_known_args(argv)
    if getattr(args, "like", None) is not None:
        argv = [argv[0], *args_from_png(args, len(rest)), *argv[1:]]  # what comes later counts
        args, rest = parser.parse_known_args(argv)
    if any(re.match(OPTION, word) for word in rest):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    words, free = args.words + rest, [n for n in args.positionals if getattr(args, n) is None]
    if len(words) > len(free):
        extra = " ".join(words[len(free) :])
        raise ValueError(f"what to do with {extra!r}? put quotes around a text of several words")
    for name, word in zip(free, words, strict=False):
        setattr(args, name, word)
    if missing := free[len(words) :]:
        raise ValueError(f"{args.command} needs {' and '.join('--' + name for name in missing)}")
    if hasattr(args, "scale"):
        check_output(args.output, args.scale)
    return args


def args_from_png(args: argparse.Namespace, num_rest: int) -> list[str]:
    """The options that `args.like` records, and its text unless the user gives one."""
    saved, device = read_metadata(args.like), find_device(args.device, args.model)
    for name, value in (("model", args.model), ("device", device), ("versions", versions())):
        if saved.get(name, value) != value:
            warn(f"{args.like}: made with {name} {saved[name][:100]!r}, now it is {value!r}")
    options = [f"--{name}={saved[name]}" for name in PNG_OPTIONS if saved.get(name)]
    options += [f"--{name}" for name in ("fast_preamble", "fp8") if saved.get(name) == "True"]
    if args.command == "edit" and "decoder" in saved:
        options.append(f"--decoder={saved['decoder']}")
    num_set = sum(getattr(args, name) is not None for name in args.positionals)
    if len(args.words) + num_rest + num_set < len(args.positionals):
        options.append(f"--{args.positionals[-1]}={saved['prompt']}")
    return options


# ---- the commands ------------------------------------------------------------------------------


def run_understand(args: argparse.Namespace) -> None:
    """Answer a question about an image."""
    image = open_image(args.image, args)
    model = load_model(args, ["ar"])
    reply = model.understand(image, args.question, max_new_tokens=args.max_new_tokens)
    print(reply, flush=True)


def run_generate(args: argparse.Namespace) -> None:
    """Generate an image from a description."""
    model = load_model(args, ["ar", "generation", "autoencoder"])
    events = model.generate_steps(args.prompt, **sampling_kwargs(args))
    save_events(args, events, {"prompt": args.prompt})


def run_edit(args: argparse.Namespace) -> None:
    """Change an image as an instruction says."""
    image = open_image(args.image, args)
    decoder = "generation" if args.use_generation_decoder else args.decoder
    model = load_model(args, ["ar", decoder, "autoencoder"])
    events = model.edit_steps(image, args.instruction, decoder=decoder, **sampling_kwargs(args))
    save_events(args, events, {"prompt": args.instruction, "decoder": decoder})


def run_chat(args: argparse.Namespace) -> None:
    """Chat line by line; /help lists the commands, images go to numbered files."""
    from .chat import Chat

    chat = Chat(load_model(args), args.keep, args.decoder, **sampling_kwargs(args))
    images, numbers, is_terminal = [], itertools.count(1), sys.stdin.isatty()
    if is_terminal:
        print(HELP, flush=True)
    for line in typed_lines(is_terminal):
        if line == "/quit":
            return
        with report_errors(PROGRAM) if is_terminal else nullcontext():
            answer(args, chat, line, images, numbers)


def typed_lines(is_terminal: bool) -> Iterator[str]:
    """What is typed, line by line; on a terminal after a prompt sign."""
    while True:
        if is_terminal:
            print("> ", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return
        if line := line.strip():
            yield line


def answer(args: argparse.Namespace, chat, line: str, images: list, numbers: Iterator) -> None:
    """Follow a command, or send a message with the `images` so far and show the reply."""
    command, _, rest = line.partition(" ")
    if command == "/image":
        return images.append(open_image(rest.strip(), args))
    if line == "/help":
        return print(HELP, flush=True)
    if line == "/new":
        chat.clear()
        return images.clear()
    if command == "/draw":
        events = chat.draw(rest.strip())
    elif line.startswith("/"):
        raise ValueError(f"unknown command {command!r}; there are /image /draw /new /quit /help")
    else:
        events, images[:] = chat.say(line, images[:]), []
    names, path = [], Path(args.output)
    for kind, value in events:
        if kind == "text":
            print(value, end="", flush=True)
        elif kind == "sampling":
            sampling = value
        elif kind == "image":
            files = (path.with_stem(f"{path.stem}-{n}") for n in numbers)
            names.append(next(file for file in files if not file.exists()))
            save_image(value, names[-1], metadata(args, sampling, vars(args), {"message": line}))
    print("".join(f"\n{name}" for name in names), flush=True)


def run_batch(args: argparse.Namespace) -> None:
    """Do the tasks of a file; write results.jsonl and numbered images."""
    from . import batch

    items, folder = batch.read_items(Path(args.file)), Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder / "results.jsonl")
    options = args.batch_size, args.seed, sys.stderr.isatty(), args.max_image_pixels
    results = batch.run(load_model(args), items, *options)

    def save(result: batch.Result, path: Path) -> None:
        item = items[result.index]
        facts = {"fast_preamble": bool(item.get("fast_preamble")), "prompt": item.get("prompt")}
        if item["task"] == "edit":
            facts |= {"prompt": item["instruction"], "decoder": item.get("decoder", "editing")}
        save_image(result.image, path, metadata(args, result.sampling, item, facts))

    rows = batch.to_folder(results, folder, save)
    print(folder / "results.jsonl", flush=True)
    if failed := [row for row in rows if "error" in row]:
        first = f"item {failed[0]['index']}: {failed[0]['error']}"
        raise ValueError(f"{len(failed)} of {len(items)} items failed; {first}")


def run_app(args: argparse.Namespace) -> None:
    """Serve a web page."""
    from .app import page

    page.find_gradio()
    sock = page.listen(args.host, args.port)  # fails before the model is loaded
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        warn(f"anyone who reaches {args.host} can use this page")
    model = load_model(args)
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"http://{host}:{args.port}", flush=True)
    page.server(model).run(sockets=[sock])


def run_eval(args: argparse.Namespace) -> None:
    """Score a model on the toy world."""
    from .toy.evaluate import main as evaluate

    check_least(args, seed=0)
    for path in filter(None, (args.json, args.write_prompts)):
        check_writable(path)
    if args.save and args.save.exists() and not args.save.is_dir():
        raise ValueError(f"cannot write grids to {str(args.save)!r}: it is no folder")
    evaluate(args, lambda: load_model(args))


IMAGE_OUTPUT = (*SAMPLING, "max_new_tokens", "output", "scale")
ONE_IMAGE = ("like", "language", "fast_preamble", *IMAGE_OUTPUT)
EDITING = ("max_image_pixels", "decoder", "use_generation_decoder")
COMMANDS = {  # what runs, its words, its options but for those of the model
    "understand": (run_understand, ("image", "question"), ("max_image_pixels", "max_new_tokens")),
    "generate": (run_generate, ("prompt",), ONE_IMAGE),
    "edit": (run_edit, ("image", "instruction"), (*EDITING, *ONE_IMAGE)),
    "chat": (run_chat, (), ("keep", "chat_decoder", "max_image_pixels", *IMAGE_OUTPUT)),
    "batch": (run_batch, ("file",), ("output", "batch_size", "seed", "max_image_pixels")),
    "app": (run_app, (), ("host", "port")),
    "eval": (run_eval, (), ("seed",)),
}


def sampling_kwargs(args: argparse.Namespace) -> dict:
    """The options of `generate`, `edit` and `Chat` that the command has."""
    return {name: getattr(args, name) for name in (*SAMPLING, *REPLY) if hasattr(args, name)}


def open_image(path: str, args: argparse.Namespace):
    """An image of the user."""
    from .images import load_image

    return load_image(path, args.max_image_pixels)


def load_model(args: argparse.Namespace, parts: Sequence[str] | None = None):
    """The parts of the model that a command needs, by default all."""
    import torch

    from .offload import choose, memory_needed
    from .parts import PARTS
    from .pipeline import NexusGen

    parts, args.device = parts or PARTS, find_device(args.device, args.model)
    dtype = getattr(torch, DTYPES.get(args.dtype, args.dtype)) if args.dtype else None
    model = NexusGen.load(args.model, args.device, dtype, parts, args.memory or "auto", args.fp8)
    profile, reason = "", ""
    if model.offloader is not None:
        profile, reason = model.offloader.profile, model.offloader.reason
    elif args.memory == "auto":  # the CPU leaves no choice: say so only on request
        profile, reason = choose(memory_needed({name: model.part(name) for name in parts}), None)
    if reason:
        print(f"{PROGRAM}: memory {profile}: {reason}", file=sys.stderr)
    return model


def find_device(name: str | None, model: str) -> str:
    """The named device, else the first available of cuda, mps and cpu; for tiny the CPU."""
    import torch

    if name and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"the device must be cuda, cuda:N, mps or cpu, got {name!r}")
    default = ["cpu"] if model == "tiny" else ["cuda", "mps", "cpu"]
    for device in [name] if name else default:
        with suppress(RuntimeError, AssertionError):  # not built into torch, or no such hardware
            torch.zeros(1, device=device)
            return device
    raise ValueError(f"this machine, or this build of torch, has no {name}")


def save_events(args: argparse.Namespace, events, facts: dict) -> None:
    """Run the events to the image, save it and print its name; a summary goes to stderr."""
    from tqdm import tqdm

    result, start = {}, time.perf_counter()
    with tqdm(unit="step", leave=False, disable=not sys.stderr.isatty()) as bar:
        for name, value in events:
            result[name] = value  # of each kind the last
            if name == "sampling":
                bar.reset(value.num_steps)
            elif name == "step":
                bar.update()
    seconds, image, sampling = time.perf_counter() - start, result["image"], result["sampling"]
    if sampling.negative_prompt and sampling.cfg_scale == 1:
        warn("a negative prompt has no effect at cfg scale 1")
    save_image(image, Path(args.output), metadata(args, sampling, vars(args), facts))
    reply = json.dumps(result["text"], ensure_ascii=False)
    summary = f"{image.width}x{image.height}, {sampling.num_steps} steps, {seconds:.1f} s"
    print(one_line(f"{PROGRAM}: {summary}; reply: {reply}"), file=sys.stderr)
    print(args.output, flush=True)


def metadata(args: argparse.Namespace, sampling, options: dict, facts: dict) -> dict:
    """All that an image depends on, but its source: settings, options of the reply, versions."""
    known = {"model": args.model, **asdict(sampling)}
    known |= {name: options.get(name) or "" for name in REPLY}
    known |= {name: getattr(args, name) or "" for name in ("device", "dtype", "fp8")}
    scale = {"scale": args.scale} if getattr(args, "scale", 1) > 1 else {}  # a batch has none
    return known | {"versions": versions()} | facts | scale


def warn(message: str) -> None:
    """A warning on stderr."""
    print(f"{PROGRAM}: warning: {message}", file=sys.stderr)


@contextmanager
def warnings_as_lines(command: str) -> Iterator[None]:
    """Within, each warning of the user's input is one line on stderr, each once but in a chat.

    The page shows them to its visitor instead, and an evaluation means to go beyond the training.
    """
    show, shown = warnings.showwarning, set()

    def one_line_each(message, category, *place) -> None:
        from .parts import BeyondTraining

        if not issubclass(category, BeyondTraining):
            return show(message, category, *place)
        if command not in ("app", "eval") and (command == "chat" or str(message) not in shown):
            shown.add(str(message))
            warn(one_line(message))

    with warnings.catch_warnings():
        warnings.showwarning = one_line_each
        yield


def main(argv: list[str] | None = None) -> None:
    """Run a command; exit with 2 after one line about an error, with 130 after Ctrl-C."""
    with suppress(AttributeError):  # a notebook's stdout
        sys.stdout.reconfigure(errors="backslashreplace")
    with report_errors(PROGRAM) as status:
        args = parse(sys.argv[1:] if argv is None else argv)
        logging.basicConfig(format=f"{PROGRAM}: warning: %(message)s")
        with warnings_as_lines(args.command):
            args.run(args)
    if status.code:
        raise SystemExit(status.code)


if __name__ == "__main__":
    main()
