"""What all commands share: a parser, and one line on stderr instead of a traceback."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NoReturn

MAX_MESSAGE = 600  # characters of an error that are shown
ERRORS = (ValueError, OSError, FloatingPointError)  # what a user can cause and mend


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines; ends each help text with the default, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is False or action.default in (None, "", [], argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors; `--an-option` and `--an_option` mean the same."""

    def __init__(self, *args, formatter_class=HelpFormatter, **options):
        super().__init__(*args, formatter_class=formatter_class, **options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        spellings = {name.replace("_", "-"): name for name in self._option_string_actions}
        words = [word.partition("=") for word in (sys.argv[1:] if args is None else args)]
        args = [spellings.get(n.replace("_", "-"), n) + eq + value for n, eq, value in words]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")


def check_least(args: argparse.Namespace, **least: float) -> None:
    """ValueError when a number is below its least value, or 2^62 and more."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not low <= value < 2**62:
            limit = "below 2^62" if value >= low else f"at least {low}"
            raise ValueError(f"--{name.replace('_', '-')} must be {limit}, not {value}")


def one_line(message: object, limit: int = MAX_MESSAGE) -> str:
    """A message without line breaks and control characters, and not too long."""
    line = " ".join(str(message).split()) or type(message).__name__
    line = line if len(line) <= limit else f"{line[:limit]} ..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


@contextmanager
def report_errors(
    program: str, stopped: str = "stopped", label: str = "error: ", limit: int = MAX_MESSAGE
) -> Iterator[SimpleNamespace]:
    """Within, an error becomes one line on stderr and status 2; Ctrl-C becomes status 130."""
    status, line = SimpleNamespace(code=0), ""
    try:
        yield status
    except ERRORS as error:
        status.code, line = 2, label + one_line(error, limit)
    except (RuntimeError, MemoryError) as error:
        from .offload import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        status.code, line = 2, f"{label}out of memory: {one_line(error)}"
    except KeyboardInterrupt:
        status.code, line = 130, stopped
    if line:
        print(f"{program}: {line}", file=sys.stderr)
