"""What spans files: no code from files, no network, pinned packages, the same bytes from two
processes, and short runs of the two long attacks (fuzz.py, kill_and_resume.py)."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT, TESTS = Path(__file__).parents[1], Path(__file__).parent
SOURCES = [*sorted((ROOT / "nexus_min").rglob("*.py")), *sorted(ROOT.glob("*.py"))]


def python(*argv: str, **options) -> subprocess.CompletedProcess:
    """A Python process, on one thread, whose sums are reproducible."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=env, **options)


# ---- no code from files --------------------------------------------------------------------------

RUN_CODE = {"eval", "exec", "pickle.load", "pickle.loads", "os.system", "os.popen", "numpy.load"}
RUN_CODE |= {"np.load", "yaml.load", "torch.hub.load", "subprocess.run", "marshal.loads"}


def risky(tree: ast.AST) -> list[str]:
    """Calls that run code out of a file, or may."""
    found = []
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        safe = any(
            k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords
        )
        name = ast.unparse(node.func)
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
    """The shipped model; the second process draws as the first one's picture says."""
    place = {"cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT)}}
    options = ["--seed", "5", "--steps", "2", "--cfg", "2", "--max_new_tokens", "40", "-o", "a.png"]
    first = python("-m", "nexus_min", "generate", "a red star", *options, **place)
    assert (first.returncode, first.stdout) == (0, "a.png\n"), first.stderr
    place["env"] |= {"PYTHONHASHSEED": "7", "HTTPS_PROXY": "http://127.0.0.1:9"}
    second = python("-c", OFFLINE, "generate", "--like", "a.png", "-o", "b.png", **place)
    assert (second.returncode, second.stdout) == (0, "b.png\n"), second.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert python("-c", OFFLINE, "--try", **place).returncode == 7


# ---- the long attacks, short ---------------------------------------------------------------------


def test_fuzz_for_some_seconds(tmp_path):
    done = python(TESTS / "fuzz.py", "--minutes", "0.05", "--keep", tmp_path / "kept", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"^(\w+): (\d+) cases: .* 0 crashed", done.stdout, re.M)
    assert [name for name, _ in counts] == ["jsonl", "image", "loader", "tokenizer"]
    assert all(int(n) > 0 for _, n in counts) and not list(tmp_path.iterdir())


def test_fuzz_would_see_a_crash(tmp_path, monkeypatch):
    """An error that is not typed is a crash with its case, which is kept."""
    code = "import fuzz; fuzz.load_image = lambda data: 1 / 0; raise SystemExit(fuzz.main())"
    argv = ["--target", "image", "--minutes", "0.0001", "--keep", tmp_path / "kept"]
    done = python("-c", code, *argv, cwd=tmp_path, env={"PYTHONPATH": f"{TESTS}:{ROOT}"})
    assert done.returncode == 1, done.stderr
    assert "image: crash in case 0: ZeroDivisionError" in done.stdout
    assert (tmp_path / "kept/image-0-0").exists()


def test_kill_and_resume_twice(tmp_path):
    argv = ["--rounds", "2", "--stages", "vae,vision", "--steps", "3"]
    done = python(TESTS / "kill_and_resume.py", *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^2 rounds with \d+ kills, 0 of them with a difference$", done.stdout, re.M)
