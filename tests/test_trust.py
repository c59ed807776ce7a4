"""What spans files: no code from files, no network, pinned packages, the same bytes from two
processes, and short runs of the two long attacks (fuzz.py, kill_and_resume.py)."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import fuzz
import pytest
from PIL import Image
from properties import TEXTS
from tiny_model import save_tiny

from nexus_min.__main__ import main

ROOT, TESTS = Path(__file__).parents[1], Path(__file__).parent
SOURCES = [*sorted((ROOT / "nexus_min").rglob("*.py")), *sorted(ROOT.glob("*.py"))]


def python(*argv: str, **options) -> subprocess.CompletedProcess:
    """A Python process, on one thread, whose sums are reproducible."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=env, **options)


# ---- no code from files --------------------------------------------------------------------------

RUN_CODE = {"torch.jit.load", "torch.package.PackageImporter", "torch.export.load", "joblib.load"}
RUN_CODE |= {"pickle.Unpickler", "shelve.open", "runpy.run_path", "__import__", "compile"}
RUN_CODE |= {"eval", "exec", "pickle.load", "pickle.loads", "os.system", "os.popen", "numpy.load"}
RUN_CODE |= {"yaml.load", "torch.hub.load", "subprocess.run", "subprocess.Popen", "marshal.loads"}


def aliases(tree: ast.AST) -> dict[str, str]:
    """What imported names stand for, wherever they are imported: np -> numpy."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        if isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def risky(tree: ast.AST) -> list[str]:
    """Calls that run code out of a file, or may."""
    found, known = [], aliases(tree)
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        safe = any(
            k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords
        )
        first, dot, rest = ast.unparse(node.func).partition(".")
        name = known.get(first, first) + dot + rest
        if name in RUN_CODE or name == "torch.load" and not safe:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_file_is_read_in_a_way_that_runs_code(file):
    assert risky(ast.parse(file.read_text("utf-8"))) == []


def test_a_risky_call_would_be_seen():
    calls = ["torch.load(f)", "torch.load(f, weights_only=False)", "pickle.load(f)", "eval(x)"]
    assert risky(ast.parse("\n".join(calls))) == calls
    assert risky(ast.parse("torch.load(f, weights_only=True); model.eval()")) == []
    hidden = ["import torch as t", "from pickle import loads as read", "import numpy as n"]
    calls = ["t.load(f)", "read(f)", "n.load(f)"]
    assert risky(ast.parse("\n".join([*hidden, *calls]))) == calls


# ---- supply --------------------------------------------------------------------------------------

PINNED = re.compile(r"[A-Za-z0-9._-]+(\[[\w,]+\])?==[\w.]+(\s*;.*)?")


@pytest.mark.parametrize(
    "name", sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("*/requirements.txt"))
)
def test_more_requirements_are_pinned(name):
    assert unpinned((ROOT / name).read_text()) == []


def unpinned(text: str) -> list[str]:
    """Lines of a requirements file that are no exact version of a package in the registry."""
    lines = [line.split(" #")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line[:1] not in ("", "#") and not PINNED.fullmatch(line)]


def test_requirements_are_pinned_and_from_the_registry():
    text = (ROOT / "requirements.txt").read_text()
    assert unpinned(text) == ["-e ."] and text.count("==") == 8
    odd = ["git+https://x/y", "torch>=2", "torch", "x @ https://y/z.whl", "--index-url https://x"]
    assert unpinned("\n".join(odd)) == odd


def test_what_is_installed_with_the_package_comes_from_the_registry():
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extras = facts["project"]["optional-dependencies"].values()
    needs = [*facts["build-system"]["requires"], *facts["project"].get("dependencies", [])]
    needs += [need for extra in extras for need in extra]
    assert needs and not [n for n in needs if not re.fullmatch(r"[\w.-]+>=[\d.]+", n)]


# ---- two processes, the second one without a network ---------------------------------------------

OFFLINE = """
import os, sys
def refuse(event, args):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        os.write(2, f"network: {event} {args}".encode())
        os._exit(7)
sys.addaudithook(refuse)
if sys.argv[1] == "--try":
    import socket
    socket.create_connection(("127.0.0.1", 9))
from nexus_min.__main__ import main
main(sys.argv[1:])
"""


def test_the_same_bytes_from_a_second_process_without_a_network(tmp_path):
    """The shipped model; the second process draws as the first one's image says."""
    place = {"cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT)}}
    options = ["--seed", "5", "--steps", "2", "--cfg", "2", "--max_new_tokens", "40", "-o", "a.png"]
    first = python("-m", "nexus_min", "generate", "a red star", *options, **place)
    assert (first.returncode, first.stdout) == (0, "a.png\n"), first.stderr
    place["env"] |= {"PYTHONHASHSEED": "7", "HTTPS_PROXY": "http://127.0.0.1:9"}
    second = python("-c", OFFLINE, "generate", "--like", "a.png", "-o", "b.png", **place)
    assert (second.returncode, second.stdout) == (0, "b.png\n"), second.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert python("-c", OFFLINE, "--try", **place).returncode == 7


# ---- texts and memory, through the command line -------------------------------------------------

ODD = [*TEXTS, "a red circle " * 80_000, "<|image_pad|><image></s>\ud800", "\udcff\ude00", "-" * 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("trust")
    Image.linear_gradient("L").save(place / "a.png")
    return save_tiny(place)


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
@pytest.mark.parametrize("command", ["understand", "generate", "edit", "chat", "batch"])
def test_any_text_is_answered_or_refused_in_one_line(
    folder, tmp_path, monkeypatch, capsys, command, text
):
    monkeypatch.chdir(tmp_path)
    picture, quick = str(folder.parent / "a.png"), ["--max_new_tokens", "2"]
    draw = [*quick, "--steps", "1"]
    item = {"task": "edit", "image": picture, "instruction": text, "num_steps": 1}
    Path("tasks.jsonl").write_text(json.dumps(item | {"fast_preamble": True}))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/draw {text}\n{text}\n"))
    argv = {
        "understand": [f"--input_image={picture}", f"--question={text}", *quick],
        "generate": [f"--prompt={text}", "--fast_preamble", *draw],
        "edit": [f"--input_image={picture}", f"--instruction={text}", "--fast_preamble", *draw],
        "chat": draw,
        "batch": ["tasks.jsonl"],
    }
    try:
        main([command, *argv[command], "--model", str(folder)])
    except SystemExit as end:
        err = capsys.readouterr().err
        assert end.code == 2 and err.startswith("nexus_min: error: ") and err.count("\n") == 1
        assert len(err) < 1500 and err[:-1].isprintable()
    else:
        assert capsys.readouterr().out
    assert not list(Path().glob(".*"))  # nothing half-written


OUT_OF_MEMORY = """
import resource, sys
from nexus_min.__main__ import main
from nexus_min.pipeline import NexusGen
NexusGen.load("tiny").generate("a red circle", num_steps=1)  # what is imported late is there now
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (60 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
main(sys.argv[1:])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_that_really_ends(tmp_path):
    """60 MB more than a small image took: a large one fails with advice, the next is drawn."""
    place = {"cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT)}}
    large = {"task": "generate", "prompt": "a red circle", "height": 512, "width": 512}
    items = [large, {"task": "generate", "prompt": "a red circle"}]
    items = [item | {"num_steps": 1, "fast_preamble": True} for item in items]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, items)))
    done = python("-c", OUT_OF_MEMORY, "batch", "tasks.jsonl", "-o", "out", **place)
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1), done.stderr
    assert done.stderr.count("\n") == 2  # and a warning of the size
    first, second = (json.loads(row) for row in open(tmp_path / "out/results.jsonl"))
    assert "the next smaller is staged: --memory staged" in first["error"]
    assert second["image"] == "0001.png" and (tmp_path / "out/0001.png").exists()
    options = ["--height", "512", "--width", "512", "--steps", "1", "--fast_preamble"]
    done = python("-c", OUT_OF_MEMORY, "generate", "a red circle", *options, **place)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 2), done.stderr
    assert "\nnexus_min: error: out of memory: " in done.stderr
    assert "resident needs" in done.stderr and "--memory staged" in done.stderr
    assert not (tmp_path / "generated.png").exists()


# ---- the long attacks, short ---------------------------------------------------------------------


def test_fuzz_for_some_seconds(tmp_path):
    done = python(TESTS / "fuzz.py", "--minutes", "0.05", "--keep", tmp_path / "kept", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"^(\w+): (\d+) cases: .* 0 crashed", done.stdout, re.M)
    assert [name for name, _ in counts] == list(fuzz.TARGETS)
    assert all(int(n) > 0 for _, n in counts) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("driver", ["0", "hypothesis"])
def test_fuzz_would_see_a_crash(tmp_path, driver):
    """An error that is not typed is a crash with its case, which is kept."""
    if driver == "hypothesis":
        pytest.importorskip("hypothesis", reason="in tests/requirements.txt")
    code = "import fuzz; fuzz.load_image = lambda data: 1 / 0; raise SystemExit(fuzz.main())"
    argv = ["--target", "image", "--minutes", "0.0001", "--keep", tmp_path / "kept"]
    argv += ["--hypothesis"] if driver == "hypothesis" else []
    done = python("-c", code, *argv, cwd=tmp_path, env={"PYTHONPATH": f"{TESTS}:{ROOT}"})
    assert done.returncode == 1, done.stderr
    assert f"image: crash in case {driver}: ZeroDivisionError" in done.stdout
    assert (tmp_path / f"kept/image-0-{driver}").exists()


@pytest.mark.parametrize("stages", ["vae,vision", "data,lora"])
def test_kill_and_resume_twice(tmp_path, stages):
    argv = ["--rounds", "2", "--stages", stages, "--steps", "3"]
    done = python(TESTS / "kill_and_resume.py", *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^2 rounds with \d+ kills, 0 of them with a difference$", done.stdout, re.M)
