"""The path of a prompt, and of a training step, through the functions of the package.

    python tests/tracer.py                      # the figures of `generate`
    python tests/tracer.py --list               # and every function that it enters, file by file
    python tests/tracer.py --train              # the calls from train_tiny's main to backward
    PYTHONPATH=OLD_TREE python tests/tracer.py  # the same for another checkout

The shipped tiny model makes one image while `sys.setprofile` records every call of a function of
the package. A comprehension, lambda or generator expression counts as the function that holds it.
The depth counts all open frames of the package, comprehensions and recursion included.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import nexus_min

PACKAGE = f"{Path(nexus_min.__file__).resolve().parent}{os.sep}"
PROMPT = "a red star left of a blue circle"
INNER = ("<lambda>", "<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<locals>")


class Trace(NamedTuple):
    """The functions of the package that a call entered."""

    functions: list[tuple[str, str]]  # (file, qualified name), in order of entry
    deepest: list[str]  # names of the open frames where they were most

    @property
    def files(self) -> list[str]:
        """In order of entry."""
        return list(dict.fromkeys(file for file, _ in self.functions))

    def line(self) -> str:
        """The three figures."""
        functions, files, depth = len(self.functions), len(self.files), len(self.deepest)
        return f"{functions} functions, {files} files, {depth} deep"


def open_frames(frame: FrameType | None, inside: Callable[[str], bool]) -> Iterator[str]:
    """Qualified names of a frame and its callers whose file is `inside`, innermost first."""
    while frame is not None:
        if inside(frame.f_code.co_filename):
            yield frame.f_code.co_qualname
        frame = frame.f_back


def function_name(qualname: str) -> str:
    """The name without the comprehensions and lambdas at its end."""
    names = qualname.split(".")
    while names[-1] in INNER:
        names.pop()
    return ".".join(names)


def trace(run: Callable[[], object]) -> Trace:
    """Record the functions that `run` enters on this thread."""
    entered: dict[tuple[str, str], None] = {}
    deepest: list[str] = []

    def record(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            file = code.co_filename.removeprefix(PACKAGE)
            entered.setdefault((file, function_name(code.co_qualname)))
            names = list(open_frames(frame, lambda name: name.startswith(PACKAGE)))
            if len(names) > len(deepest):
                deepest[:] = names[::-1]

    sys.setprofile(record)
    try:
        run()
    finally:
        sys.setprofile(None)
    return Trace(list(entered), deepest)


def trace_generate() -> Trace:
    """The trace of one prompt through the loaded tiny model."""
    from nexus_min.pipeline import NexusGen

    model = NexusGen.load("tiny")
    return trace(lambda: model.generate(PROMPT, seed=0))


def calls_to_backward() -> list[str]:
    """The functions from `train_tiny.main` to the one that calls `loss.backward()`."""
    import torch

    import train_tiny

    class Reached(BaseException):
        """Ends the training at its first `backward`."""

    def stop(*_: object, **__: object) -> None:
        script = train_tiny.__file__
        found[:] = open_frames(
            sys._getframe(1), lambda name: name == script or name.startswith(PACKAGE)
        )
        raise Reached

    found: list[str] = []
    threads, backward = torch.get_num_threads(), torch.Tensor.backward
    command = ["--stage", "vae", "--steps", "1", "--workers", "1", "--quiet"]
    torch.Tensor.backward = stop
    try:
        with tempfile.TemporaryDirectory() as folder:
            train_tiny.main([*command, "--out", folder])
    except Reached:
        pass
    finally:
        torch.Tensor.backward = backward
        torch.set_num_threads(threads)
    names = found[::-1]
    return names[names.index("main") :] if "main" in names else names


def main() -> None:
    if "--train" in sys.argv[1:]:
        names = calls_to_backward()
        return print(f"main to backward: {len(names)} calls: {' -> '.join(names)}")
    found = trace_generate()
    print(f"generate: {found.line()}")
    if "--list" in sys.argv[1:]:
        for file in found.files:
            print(file, *(f"    {name}" for f, name in found.functions if f == file), sep="\n")
        print("deepest", *(f"    {name}" for name in found.deepest), sep="\n")


if __name__ == "__main__":
    main()
