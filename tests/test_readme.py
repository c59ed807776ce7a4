"""The READMEs say what is so: their tables, files, commands and code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import house
import pytest
import readme

TEXT = readme.README.read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
QUICK = TEXT.split("## Quick start")[1].split("\n## ")[0]
OTHERS = ("tests/README.md", "tests/benchmarks/README.md", "notebooks/README.md")
WINGS = ("nexus_min/README.md", "nexus_min/toy/README.md")
ALL = {name: Path(readme.HOME, name).read_text("utf-8") for name in ("README.md", *WINGS, *OTHERS)}
MODULES = sorted(
    {m for t in ALL.values() for m in re.findall(r"-m (nexus_min(?:\.\w+)*|tests\.[\w.]+)", t)}
)
SCRIPTS = sorted({s for t in ALL.values() for s in re.findall(r"python (\S+\.py)\b", t)})


def test_quick_start_has_two_shell_blocks_and_the_second_is_what_ci_runs():
    shell = re.findall(r"```bash\n(.*?)```", QUICK, re.DOTALL)
    assert len(shell) == 2
    ci = (readme.HOME / ".ci/run").read_text("utf-8")
    assert ci.endswith(shell[1])


@pytest.mark.parametrize(
    "name", ["reading", "core", "wings", "maths", "summary", "scores", "making", "speed"]
)
def test_tables_are_up_to_date(name):
    make = readme.TABLES[name][1]
    assert readme.section(name)[1] == make(), f"python tests/readme.py {name} --write"


def test_core_and_wings_are_all_of_the_source():
    files = [f for names in readme.WINGS for f in readme.wing_files(names)] + house.CORE_FILES
    empty = {readme.HOME / f"nexus_min/{name}__init__.py" for name in ("", "model/")}
    assert sorted(files) == sorted({*house.SOURCES} - empty)


def test_the_parity_table_names_the_towers_and_limits_of_the_tests():
    def cells(table: str) -> list[list[str]]:
        return [[c.strip() for c in row.split("|")[1:-1]] for row in table.split("\n")[2:]]

    stored, measured = (cells(t) for t in (readme.section("parity")[1], readme.parity()))
    assert [r[0] for r in stored] == [r[0] for r in measured]
    for row, now in zip(stored, measured, strict=True):  # a processor may allow a smaller limit
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


def test_options_exist():
    options = {o for text in ALL.values() for o in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
    folders = ("nexus_min", "tests", "notebooks")
    files = [f for folder in folders for f in Path(readme.HOME, folder).rglob("*.py")]
    code = "".join(house.text_of(f) for f in {*files, *house.SOURCES})
    assert not {o for o in options if f'"{o}"' not in code} - {"--nproc-per-node"}  # torchrun's


@pytest.mark.parametrize("name", [*MODULES, *SCRIPTS])
def test_modules_and_scripts_exist(name):
    path = Path(readme.HOME, name if name.endswith(".py") else name.replace(".", "/"))
    assert path.is_file() or path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


@pytest.mark.parametrize("name", ALL)
def test_linked_files_exist(name):
    links = re.findall(r"\]\((?!http|#)([^)]+)\)", ALL[name])
    folder = Path(readme.HOME, name).parent
    assert all((folder / link.split("#")[0]).exists() for link in links), links


@pytest.mark.parametrize("name", OTHERS)
def test_short_readmes_are_short(name):
    text = re.sub(r"(?m)^\|.*\n", "", ALL[name])  # without tables
    assert text.count("\n") <= 60
