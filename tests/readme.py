"""The tables of the README that the code itself can fill.

    python tests/readme.py            print the file tour, the parity table and the speed table
    python tests/readme.py --write    put them into README.md, between their markers

The tour lists each file's lines and the first sentence of its docstring; the parity table each
tower's largest error against the official code, from a run of the parity tests; the speed table
what `python -m tests.benchmarks` measured last.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
README = HOME / "README.md"
ROOMS = ("nexus_min/*.py", "nexus_min/toy/*.py", "*.py")


def tour() -> str:
    """Markdown table: file, lines, what it is."""
    rows = ["| file | lines | what it is |", "|---|---:|---|"]
    for file in (f for room in ROOMS for f in sorted(HOME.glob(room))):
        text = file.read_text("utf-8")
        if about := ast.get_docstring(ast.parse(text)):
            first = about.split("\n\n")[0].replace("\n", " ")
            name = file.relative_to(HOME).as_posix()
            rows.append(f"| `{name}` | {text.count(chr(10))} | {first} |")
    return "\n".join(rows)


def parity() -> str:
    """Markdown table: tower, where its error is largest, the error, its limit, the test."""
    with tempfile.TemporaryDirectory() as place:
        record = Path(place, "parity.json")
        command = [sys.executable, "-m", "pytest", "-q", "-k", "parity", "--ignore", __file__]
        command += ["-p", "no:cacheprovider", "--deselect", "tests/test_readme.py", str(HOME)]
        subprocess.run(
            command,
            check=True,
            cwd=HOME,
            env=os.environ | {"PARITY_RECORD": str(record)},
            stdout=subprocess.DEVNULL,
        )
        worst = json.loads(record.read_text("utf-8"))
    rows = ["| tower | official fixture | largest error | limit | test |", "|---|---|---|---|---|"]
    for tower, (error, limit, reference, test) in sorted(worst.items()):
        test = test.split("[")[0]
        rows.append(f"| {tower} | {reference} | {error:.0e} | {limit:.0e} | `{test}` |")
    return "\n".join(rows)


def speed() -> str:
    """Markdown table of `tests/benchmarks/results.json`."""
    command = [sys.executable, "-m", "tests.benchmarks", "table"]
    return subprocess.check_output(command, cwd=HOME, text=True).strip()


TABLES = {"tour": tour, "parity": parity, "speed": speed}


def section(name: str, text: str) -> tuple[str, str, str]:
    """A README before, between and after the markers of a table. ValueError without markers."""
    parts = re.split(rf"(?<=<!-- {name} -->\n)|(?=\n<!-- end {name} -->)", text)
    if len(parts) != 3:
        raise ValueError(f"README.md needs once <!-- {name} --> and <!-- end {name} -->")
    return tuple(parts)


def main() -> None:
    text = README.read_text("utf-8")
    for name, make in TABLES.items():
        table = make()
        print(table, end="\n\n")
        before, _, after = section(name, text)
        text = before + table + after
    if sys.argv[1:] == ["--write"]:
        README.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
