"""The order of the house in figures: `python tests/house.py` prints what test_layout.py asserts.

Import order, lines of the core and of all source, comments in each core file, lengths of function
bodies, and the path of a prompt and of a training step (tracer.py).
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median, quantiles

HOME = Path(__file__).resolve().parents[1]
PACKAGE = HOME / "nexus_min"
SCRIPTS = ("train_tiny", "weights_loader")
# The files to be read in an afternoon, in reading order.
CORE = (
    "model/flow", "model/projector", "model/layers", "model/rope", "model/vision",
    "model/decoder", "model/autoregressive", "model/mmdit", "model/autoencoder",
    "sampling", "pipeline", "config",
)  # fmt: skip
# What test_layout.py asserts; every figure is an upper limit.
LIMITS = {
    "core_lines": 2_500,
    "source_lines": 11_050,  # the goal is 9,500
    "file_lines": 450,
    "body_median": 10,
    "body_p90": 30,
    "generate_functions": 84,  # the goal is 45, in 9 files; half of them are layers of the towers
    "generate_files": 16,
    "generate_depth": 10,
    "calls_to_backward": 4,
}


def module_name(file: Path) -> str:
    """nexus_min/model/flow.py -> "model.flow"; the package itself is ""."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


FILES = {module_name(f): f for f in sorted(PACKAGE.rglob("*.py"))}
SOURCES = [*FILES.values(), *(HOME / f"{name}.py" for name in SCRIPTS)]
CORE_FILES = [PACKAGE / f"{name}.py" for name in CORE]


# ---- lines ---------------------------------------------------------------------------------------


@cache
def text_of(file: Path) -> str:
    return file.read_text("utf-8")


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(text_of(file))


def count_lines(*files: Path) -> int:
    """Lines of all files together, blank ones too."""
    return sum(text_of(file).count("\n") for file in files)


def comments_per_100(file: Path) -> float:
    """Lines with a comment per 100 lines of code; docstrings and blank lines are neither."""
    skip = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    comments, code = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(text_of(file)).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in skip:
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            code -= set(range(node.lineno, node.end_lineno + 1))
    return 100 * len(comments) / max(1, len(code))


def body_lengths(files: list[Path]) -> list[int]:
    """Lines of every function's body without its docstring, shortest first."""
    found = []
    for file in files:
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                start = node.body[0].lineno
                if ast.get_docstring(node) is not None:
                    start = node.body[0].end_lineno + 1
                found.append(max(0, node.end_lineno - start + 1))
    return sorted(found)


def percentile_90(values: list[int]) -> float:
    return quantiles(values, n=10)[-1]


# ---- imports -------------------------------------------------------------------------------------


def imported_names(module: str, node: ast.Import | ast.ImportFrom) -> list[str]:
    """The absolute dotted names that an import statement of `module` reads."""
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    base = node.module or ""
    if node.level:
        parts = [p for p in ("nexus_min", *module.split(".")) if p]
        up = node.level - (FILES[module].name == "__init__.py")
        base = ".".join([*parts[: len(parts) - up], *filter(None, [base])])
    names = [f"{base}.{a.name}" for a in node.names]
    files = [n for n in names if n.removeprefix("nexus_min.") in FILES]
    return files if len(files) == len(names) else [base, *files]


def imports(module: str) -> list[tuple[str, bool]]:
    """(dotted name, whether at module level) of every import in a file, wherever it stands."""
    tree = tree_of(FILES[module])
    functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, functions) for n in ast.walk(f)}
    return [
        (name, id(node) not in inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported_names(module, node)
    ]


def internal_imports(module: str) -> set[str]:
    """The package's own files that a file imports; not the empty `__init__` above them."""
    names = (n for n, _ in imports(module) if n.split(".")[0] == "nexus_min")
    own = {n.removeprefix("nexus_min").lstrip(".") for n in names}
    return {n if n in FILES else n.rpartition(".")[0] for n in own}


def import_order() -> list[list[str]]:
    """Files by rank: each imports files of earlier ranks only. graphlib.CycleError on a cycle."""
    sorter = TopologicalSorter({module: internal_imports(module) for module in FILES})
    sorter.prepare()
    ranks = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        ranks.append([m for m in ready if FILES[m].name != "__init__.py"])
        sorter.done(*ready)
    return [rank for rank in ranks if rank]


# ---- the report ----------------------------------------------------------------------------------


def report() -> None:
    print("Import order: a file imports files of earlier lines only")
    for rank, names in enumerate(import_order(), 1):
        print(f"  {rank:2d}  {', '.join(names)}")
    print("\nCore file                  lines  comments per 100 code lines")
    for file in CORE_FILES:
        name = file.relative_to(HOME).as_posix()
        print(f"  {name:31s}{count_lines(file):5d}  {comments_per_100(file):8.1f}")
    print(f"  core    {count_lines(*CORE_FILES):6d} (at most {LIMITS['core_lines']})")
    print(f"  source  {count_lines(*SOURCES):6d} (at most {LIMITS['source_lines']})")
    longest = max(SOURCES, key=count_lines)
    name = longest.relative_to(HOME).as_posix()
    print(f"  longest {count_lines(longest):6d} (at most {LIMITS['file_lines']}): {name}")
    sizes = body_lengths(SOURCES)
    print(
        f"\n{len(sizes)} functions, lines of a body: median {median(sizes):g}, "
        f"p90 {percentile_90(sizes):g}, max {sizes[-1]}"
    )
    sys.stdout.flush()
    for option in ([], ["--train"]):
        subprocess.run([sys.executable, HOME / "tests" / "tracer.py", *option], check=False)


if __name__ == "__main__":
    report()
