"""Checkpoints that survive a crash or a full disk, and Ctrl-C that waits for the end of a step."""

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
    """Within, Ctrl-C only sets `heard`, so that the step under way is completed.

    No `threading.Event`: a second signal within the handler would wait for its lock forever.
    """
    interrupt = SimpleNamespace(heard=False)
    if threading.current_thread() is not threading.main_thread():
        yield interrupt  # only the main thread receives signals
        return
    before = signal.signal(signal.SIGINT, lambda *_: setattr(interrupt, "heard", True))
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
