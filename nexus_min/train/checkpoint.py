"""Checkpoints that survive a crash or a full disk, and Ctrl-C that waits for the end of a step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


class Checkpoint:
    """The complete state of a stage in one file, and the state before it in `NAME.previous.ckpt`.

    It is written to a file beside it that is then renamed: a reader finds either the old state or
    the new one.
    """

    def __init__(self, path: Path):
        self.path, self.previous = path, path.with_stem(f"{path.stem}.previous")

    @property
    def status(self) -> str:
        """What a failure leaves, for its message."""
        exists = self.path.exists() or self.previous.exists()
        return "the last good checkpoint is kept" if exists else "there is no checkpoint yet"

    def save(self, state: dict) -> None:
        partial = self.path.with_suffix(".partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
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
            message = f"cannot save the checkpoint {self.path}: {reason}; {self.status}"
            raise OSError(message) from error

    def load(self) -> dict | None:
        """The saved state, or None when there is none. Unpickles only tensors and plain values."""
        path = self.path if self.path.exists() else self.previous
        if not path.exists():
            return None
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            if not isinstance(state, dict):
                raise ValueError(type(state).__name__)
            return state
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
            message, status = str(error), self.status
            raise OSError(message if status in message else f"{message}; {status}") from error


class Interrupt:
    """Whether Ctrl-C was pressed.

    This is no `threading.Event`: a second signal that interrupts the handler of the first would
    wait for the event's lock forever.
    """

    heard = False

    def __call__(self, *_) -> None:
        self.heard = True


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Within, Ctrl-C is noted, so that the step under way is completed."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt  # only the main thread receives signals
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
