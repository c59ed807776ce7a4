"""Checkpoints that survive a crash or a full disk, and signals that wait for the end of a step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import torch


class Checkpoint:
    """The complete state of a stage in one file, and the state before it in `NAME.previous.ckpt`.

    A new one is written beside it and then renamed: a reader finds the old state or the new one.
    """

    def __init__(self, path: Path):
        self.path, self.previous = path, path.with_stem(f"{path.stem}.previous")

    @property
    def status(self) -> str:
        """What a failure leaves, for its message."""
        exists = self.path.exists() or self.previous.exists()
        return "the last good checkpoint is kept" if exists else "there is no checkpoint yet"

    def save(self, state: dict) -> None:
        """Write atomically; OSError of one line when the disk fails, the old file stays."""
        partial = self.path.with_suffix(".partial")
        try:
            with open(partial, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            if self.path.exists():
                os.replace(self.path, self.previous)  # if killed after this, `load` reads it
            os.replace(partial, self.path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk by RuntimeError
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            cause: BaseException = error
            while not isinstance(cause, OSError) and cause.__context__:
                cause = cause.__context__
            reason = str(cause).split("\n")[0]
            message = f"cannot save the checkpoint {self.path}: {reason}"
            raise OSError(f"{message}; {self.status}") from error

    def load(self) -> dict | None:
        """The saved state, or None when there is none. Unpickles only tensors and plain values."""
        path = self.path if self.path.exists() else self.previous
        if not path.exists():
            return None
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except OSError:
            raise
        except Exception as error:  # torch raises a dozen kinds on a broken file
            reason = str(error).split("\n")[0]
            message = f"{path}: not a checkpoint ({reason}); delete it"
            if path is self.path and self.previous.exists():
                message += " to go on from the one before"
            raise ValueError(message) from None

    @contextmanager
    def mention(self) -> Iterator[None]:
        """Within, the message of an OSError also says whether there is a checkpoint."""
        try:
            yield
        except OSError as error:
            if self.status in str(error):
                raise
            raise OSError(f"{error}; {self.status}") from error


@contextmanager
def deferred_interrupt() -> Iterator[SimpleNamespace]:
    """Within, Ctrl-C, SIGTERM and SIGHUP only set `heard`: the step under way is completed.

    No `threading.Event`: a second signal within the handler would wait for its lock forever.
    """
    interrupt = SimpleNamespace(heard=False)
    if threading.current_thread() is not threading.main_thread():
        yield interrupt  # only the main thread receives signals
        return
    names = [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]
    # what the caller ignores (nohup) stays ignored, but for Ctrl-C
    heard = [s for s in names if s == names[0] or signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, lambda *_: setattr(interrupt, "heard", True)) for s in {*heard}}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def append_line(file: Path, line: str) -> None:
    """Append a line of text; half a line that a killed run left is ended first."""
    with open(file, "a+b") as out:
        if out.seek(0, os.SEEK_END):
            out.seek(-1, os.SEEK_END)
            line = line if out.read(1) == b"\n" else f"\n{line}"
        out.write(f"{line}\n".encode())


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Within, no other command can train in this folder; ValueError where one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            import fcntl  # Windows has no such lock

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another run; give another --out") from None
        yield True
