"""The README says what is so: its tables, files, commands and code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import readme

TEXT = readme.README.read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
QUICK = TEXT.split("## Quick start")[1].split("\n## ")[0]


def test_quick_start_has_two_shell_blocks_and_the_second_is_what_ci_runs():
    shell = re.findall(r"```bash\n(.*?)```", QUICK, re.DOTALL)
    assert len(shell) == 2
    ci = (readme.HOME / ".ci/run").read_text("utf-8")
    assert ci.endswith(shell[1])


def test_the_tour_is_up_to_date():
    assert readme.section("tour", TEXT)[1] == readme.tour(), "python tests/readme.py --write"


def test_the_speed_table_is_what_was_measured():
    assert readme.section("speed", TEXT)[1] == readme.speed(), "python tests/readme.py --write"


def test_the_parity_table_names_the_towers_and_limits_of_the_tests():
    def cells(table: str) -> list[list[str]]:
        return [[c.strip() for c in row.split("|")[1:-1]] for row in table.split("\n")[2:]]

    told, ran = (cells(t) for t in (readme.section("parity", TEXT)[1], readme.parity()))
    assert [r[0] for r in told] == [r[0] for r in ran]
    for row, now in zip(told, ran, strict=True):  # a processor may allow a limit to be smaller
        assert float(row[2]) <= float(row[3]) >= float(now[3])


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = [body for language, body in BLOCKS if language == "python"]
    assert code
    for body in code:
        exec(compile(body, "README.md", "exec"), {})


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python -m nexus_min (\w+)", TEXT))))
def test_commands_exist(command):
    run = [sys.executable, "-m", "nexus_min", command, "--help"]
    assert subprocess.run(run, capture_output=True, cwd=readme.HOME).returncode == 0


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http|#)([^)]+)\)", TEXT)
    assert all(Path(readme.HOME, link.split("#")[0]).exists() for link in links), links
