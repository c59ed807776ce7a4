"""The course: every notebook is whole, small and clean as stored, and runs from top to bottom."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
FILES = {f.stem: f for f in sorted(FOLDER.glob("*.ipynb"))}
BOOKS = {name: json.loads(f.read_text("utf-8")) for name, f in FILES.items()}
EXECUTED = [name for name in FILES if not name.startswith("12")]  # 12 needs the real weights
PINNED = ("matplotlib", "nbclient", "nbformat")  # of notebooks/requirements.txt, as imported
RUNTIME = {"torch", "einops", "safetensors", "tokenizers", "PIL", "numpy", "tqdm", "matplotlib"}
OWN = {"nexus_min", "weights_loader", "train_tiny"} | {f.stem for f in FOLDER.glob("*.py")}
ASSERTS = 6
every_notebook = pytest.mark.parametrize("name", FILES)


def cells(name: str, kind: str = "code") -> list[dict]:
    return [c for c in BOOKS[name]["cells"] if c["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def trees(name: str) -> list[ast.Module]:
    """The code cells, parsed; plain Python, without magics."""
    return [ast.parse(source(c)) for c in cells(name)]


def outputs(name: str) -> list[dict]:
    return [o for c in cells(name) for o in c["outputs"]]


def asserts(tree: ast.AST) -> int:
    return sum(isinstance(node, ast.Assert) for node in ast.walk(tree))


def texts(value: object) -> Iterator[str]:
    """All strings in a nested object that are no images."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if not key.startswith("image/"):
                yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


def test_the_course_is_there():
    assert len(FILES) >= 6
    numbers = [name[:2] for name in FILES]
    assert len(set(numbers)) == len(numbers)


@every_notebook
def test_format(name):
    book = BOOKS[name]
    assert (book["nbformat"], book["nbformat_minor"]) >= (4, 5)
    ids = [c["id"] for c in book["cells"]]
    assert len(set(ids)) == len(ids)
    assert source(book["cells"][0]).startswith("# ") and {"code"} < {
        c["cell_type"] for c in book["cells"]
    }
    assert not {"widgets", "signature"} & book["metadata"].keys()
    assert FILES[name].stat().st_size < 1_000_000
    if importlib.util.find_spec("nbformat"):
        import nbformat

        nbformat.validate(nbformat.read(FILES[name], as_version=4))


@every_notebook
def test_outputs_are_kept_and_clean(name):
    counts = [c["execution_count"] for c in cells(name)]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {o["output_type"] for o in outputs(name)}
    assert "error" not in kinds and kinds <= {"stream", "display_data", "execute_result"}
    assert not [o for o in outputs(name) if o.get("name") == "stderr"]
    streams = [[o.get("name") for o in c["outputs"]] for c in cells(name)]
    assert not [s for s in streams if ("stdout", "stdout") in zip(s, s[1:], strict=False)]
    assert sum("image/png" in o.get("data", {}) for o in outputs(name)) >= 1
    assert sum(bool(c["outputs"]) for c in cells(name)) >= len(counts) / 2
    stored = "\n".join(texts([outputs(name), [c["source"] for c in BOOKS[name]["cells"]]]))
    assert not re.findall(r"/(?:tmp|work|home|root|Users)/\S*|\bat 0x[0-9a-f]+", stored)


@every_notebook
def test_cells_are_short_and_assert_what_they_teach(name):
    lengths = [len([x for x in source(c).splitlines() if x.strip()]) for c in cells(name)]
    assert median(lengths) <= 8 and max(lengths) <= 30, sorted(lengths)
    assert max(len(x) for c in cells(name) for x in source(c).splitlines()) <= 100
    assert sum(asserts(tree) for tree in trees(name)) >= ASSERTS
    assert len(cells(name, "markdown")) >= len(lengths) / 2  # claims in prose, not code alone


@every_notebook
def test_exercises_with_checked_answers_come_last(name):
    sources = [source(c) for c in BOOKS[name]["cells"]]
    start = [i for i, text in enumerate(sources) if text.startswith("## Exercises")]
    assert len(start) == 1
    rest = BOOKS[name]["cells"][start[0] :]
    assert len(re.findall(r"^\*?\*?\d\. ?", source(rest[0]), re.M)) >= 2  # numbered
    after = [ast.parse(source(c)) for c in rest if c["cell_type"] == "code"]
    assert sum(asserts(tree) for tree in after) >= 2


@every_notebook
def test_imports(name):
    roots = set()
    for tree in trees(name):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                roots |= {a.name.split(".")[0] for a in node.names}
            if isinstance(node, ast.ImportFrom):
                roots.add(node.module.split(".")[0])
    assert not roots - RUNTIME - OWN - sys.stdlib_module_names
    assert "nexus_min" in roots and "common" in roots


@every_notebook
def test_files_that_the_text_names_exist(name):
    home = FOLDER.parent
    roots = (FOLDER, FOLDER / "data", home, home / "nexus_min", home / "nexus_min/model")
    text = "\n".join(source(c) for c in cells(name, "markdown"))
    for file in re.findall(r"`([\w/]+\.(?:py|json))\b`", text):
        assert any((root / file).is_file() for root in roots), file


def script(name: str):
    """A script of the course as a module."""
    spec = importlib.util.spec_from_file_location(f"notebooks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_runner_picks_notebooks_by_their_names(capsys):
    run = script("run")
    assert [f.stem for f in run.select([])] == EXECUTED
    assert [f.stem for f in run.select(["05"])] == [n for n in EXECUTED if n.startswith("05")]
    assert run.main(["05", "77_missing"]) == 2
    assert capsys.readouterr().err.splitlines() == ["error: no notebook starts with 77_missing"]


def test_a_claim_stops_a_notebook_unless_the_model_was_trained_for_minutes(monkeypatch, capsys):
    common = script("common")
    assert common.claim(True) and not common.claim(False)  # of the shipped model
    file = SimpleNamespace(metadata=lambda: {"minutes": "5.2"})
    monkeypatch.setattr(common, "safe_open", lambda *_: nullcontext(file))
    assert common.claim(False) and "5 minutes" in capsys.readouterr().out


def test_figure_6_can_be_made_again(tmp_path):
    log, out = FOLDER / "data" / "figure6.json", tmp_path / "log.json"
    command = [sys.executable, FOLDER / "figure6.py", "--steps", "5", "--pool", "16"]
    command += ["--test", "8", "--layers", "1", "--captions", "full", "--seeds", "0", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    stored, made = (json.loads(f.read_text()) for f in (log, out))
    assert stored["settings"].keys() == made["settings"].keys()
    assert stored["runs"][0].keys() == made["runs"][0].keys()
    for errors in made["runs"][0]["per_slot"].values():
        assert len(errors) == 16 and min(errors) > 0
    assert made["runs"][0]["curve"][-1]["step"] == 5


def test_figure_3_can_be_made_again(tmp_path):
    command = [sys.executable, FOLDER / "figure3.py", "--images", "16", "--decoder-steps", "1"]
    command += ["--ar-steps", "1", "--cases", "10", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    files = FOLDER / "data" / "figure3.json", tmp_path / "figure3.json"
    stored, made = (json.loads(f.read_text())["tokens"] for f in files)
    assert stored.keys() == made.keys() == {"4", "16", "64"}
    for tokens, parts in stored.items():
        assert parts["decoder"].keys() == made[tokens]["decoder"].keys()
        assert parts["ar"].keys() == made[tokens]["ar"].keys()
    for name in ("figure3.png", "figure4.png"):
        assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize("name", EXECUTED)
def test_runs_from_top_to_bottom(name):
    missing = [m for m in (*PINNED, "ipykernel") if importlib.util.find_spec(m) is None]
    if missing:
        reason = "pip install -r notebooks/requirements.txt to run the notebooks; missing:"
        pytest.skip(f"{reason} {', '.join(missing)}")
    book = script("run").execute(FILES[name])  # a cell that fails raises, with its traceback
    counts = [c.execution_count for c in book.cells if c.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
