"""The house rules: one direction of imports, no foreign packages, and nothing happens on import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nexus_min

PACKAGE = Path(nexus_min.__file__).parent
# A file imports files of smaller rank only; those on one line do not import each other.
RANKS = (
    ("config",),
    ("model.flow", "model.layers", "model.rope"),
    ("tokenizer", "images"),
    ("model.vision", "model.decoder", "model.autoencoder", "model.text_encoders"),
    ("model.packing",),
    ("model.projector", "model.autoregressive", "model.mmdit"),
    ("sampling",),
    ("weights", "offload"),
    ("cli",),
    ("chat", "batch"),
    ("pipeline",),
    ("train.data", "train.lora", "train.muon", "train.run_folder"),
    ("train.trainer",),
    ("train.finetune",),
    ("scale.fsdp",),
    ("scale.train", "scale.estimate"),
    ("toy.world",),
    ("toy.score", "toy.language"),
    ("toy.prompts", "toy.questions", "toy.edits"),
    ("toy.tasks",),
    ("toy.vocabulary",),
    ("toy.pictures",),
    ("toy.geneval",),
    ("toy.init", "toy.pretrain", "toy.stages", "toy.evaluate"),
    ("talk", "app.page_tasks"),
    ("app.page",),
    ("__main__",),
)
PACKAGES = ("", "model", "train", "scale", "toy", "app")
RANK = {name: i for i, names in enumerate(RANKS) for name in names} | dict.fromkeys(PACKAGES, -1)
RUNTIME = {"torch", "einops", "safetensors", "tokenizers", "PIL", "numpy", "tqdm"}
OPTIONAL = {"app.page": {"gradio", "fastapi", "uvicorn"}}  # inside functions only
SCRIPTS = {"weights_loader", "train_tiny"}


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


FILES = {name_of(f): f for f in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(f.read_text("utf-8")) for name, f in FILES.items()}


def absolute(module: str, node: ast.Import | ast.ImportFrom) -> list[str]:
    """The dotted names that an import statement of `module` reads."""
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    head = node.module or ""
    if node.level:
        here = ["nexus_min", *module.split(".")]
        if FILES[module].name != "__init__.py":
            here = here[:-1]
        base = [p for p in here if p][: len(here) - node.level + 1]
        head = ".".join([*base, head] if head else base)
    below = [f"{head}.{a.name}" for a in node.names]
    inside = [b for b in below if b.removeprefix("nexus_min.") in FILES]
    return inside if len(inside) == len(below) else [head, *inside]


def imports(module: str) -> list[tuple[str, bool]]:
    """(dotted name, whether at module level) of every import in a file, wherever it stands."""
    tree, found = TREES[module], []
    inner = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += [(name, id(node) not in inner) for name in absolute(module, node)]
    return found


def internal(module: str) -> set[str]:
    """The package's own files that a file imports."""
    own = {n.removeprefix("nexus_min").lstrip(".") for n, _ in imports(module) if owned(n)}
    return {n if n in FILES else n.rpartition(".")[0] for n in own}


def owned(name: str) -> bool:
    return name.split(".")[0] == "nexus_min"


def back_edges(module: str, targets: set[str]) -> set[str]:
    return {t for t in targets if RANK[t] >= RANK[module]}


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_arrow(module):
    assert module in RANK, f"nexus_min/{module}.py has no place in the order of layout.md"
    assert not back_edges(module, internal(module))


def test_the_arrow_would_catch_a_back_edge():
    assert back_edges("model.flow", {"sampling"}) and not back_edges("sampling", {"model.flow"})
    assert back_edges("config", {"model.rope"}) and not back_edges("model.rope", {"config"})
    relative = ast.parse(
        "from . import score\nfrom .tasks import example\nfrom ..model.flow import cfg"
    )
    read = [absolute("toy.stages", node) for node in relative.body]
    assert read == [["nexus_min.toy.score"], ["nexus_min.toy.tasks"], ["nexus_min.model.flow"]]
    assert {"toy.tasks", "toy.pictures", "toy.world", "model.flow"} < internal("toy.stages")
    assert "model.autoregressive" in internal("pipeline")


def test_the_sampler_and_the_network_do_not_know_each_other():
    assert "model.flow" not in internal("model.mmdit")
    assert internal("model.flow") == set()


@pytest.mark.parametrize("module", FILES)
def test_only_the_command_line_knows_the_toy_world(module):
    if not module.startswith("toy") and module != "__main__":
        assert not {t for t in internal(module) if t.startswith("toy")}


@pytest.mark.parametrize("module", FILES)
def test_the_package_imports_no_script(module):
    assert not {name for name, _ in imports(module)} & SCRIPTS


@pytest.mark.parametrize("module", FILES)
def test_only_the_runtime_packages_are_imported(module):
    roots = {name.split(".")[0] for name, _ in imports(module)}
    foreign = roots - RUNTIME - SCRIPTS - sys.stdlib_module_names - {"nexus_min"}
    late = {name for name, at_top in imports(module) if not at_top}
    assert foreign <= OPTIONAL.get(module, set()) & late  # no matplotlib, transformers, timm ...


def harmless(node: ast.stmt) -> bool:
    """Whether a statement at module level only defines names."""
    if isinstance(node, ast.If):
        test = ast.unparse(node.test)
        return test == "TYPE_CHECKING" or test == "__name__ == '__main__'"
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef
    return isinstance(node, kinds | ast.Assign | ast.AnnAssign | ast.AugAssign)


@pytest.mark.parametrize("module", FILES)
def test_files_only_define_names(module):
    assert not [ast.unparse(n) for n in TREES[module].body if not harmless(n)]
    assert not harmless(ast.parse("print(1)").body[0])


WATCH = """
import importlib, logging, os, pathlib, sys
import numpy, torch
def state():
    return (
        dict(os.environ), os.getcwd(), sorted(os.listdir()), logging.root.handlers[:],
        logging.root.level, torch.get_num_threads(), torch.get_default_dtype(),
        torch.is_grad_enabled(), torch.random.get_rng_state().sum().item(),
        numpy.random.get_state()[1].sum(), torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(), torch.initial_seed(),
    )
before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
assert state() == before, (before, state())
assert not {"weights_loader", "train_tiny"} & set(sys.modules)
"""


def test_importing_everything_changes_nothing(tmp_path):
    names = [f"nexus_min.{n}".rstrip(".") for n in FILES]
    command = [sys.executable, "-B", "-c", WATCH, *names]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "" and not list(tmp_path.iterdir())


def test_the_package_itself_is_light():
    code = "import sys, nexus_min; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
