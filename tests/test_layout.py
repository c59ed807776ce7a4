"""The order of the house: sizes, one direction of imports, and nothing happens on import.

`python tests/house.py` prints the figures, house.LIMITS holds what they must not exceed.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from statistics import median

import house
import pytest
import tracer
from house import FILES, LIMITS, imports, internal_imports

RUNTIME = {"torch", "einops", "safetensors", "tokenizers", "PIL", "numpy", "tqdm"}
OPTIONAL = {"app.page": {"gradio", "fastapi", "uvicorn"}}  # inside functions only
# What the files of a wing, or one file, never import: the layers above them.
ABOVE = {
    "config": {"model", "tokenizer", "images", "sampling", "pipeline"},
    "model": {"tokenizer", "images", "sampling", "pipeline", "weights", "offload", "cli"},
    "sampling": {"pipeline", "weights"},
    "pipeline": {"chat", "batch", "cli"},
    "train": {"scale"},
}
TOP = {"train", "scale", "toy", "app", "__main__"}  # known to none of the files below
WINGS = {"train", "scale", "toy", "app"}
KNOW_THE_TOY_WORLD = {"toy", "__main__"}


def wing(module: str) -> str:
    """The first part of a name: "model" of "model.flow"."""
    return module.split(".")[0]


# ---- sizes ---------------------------------------------------------------------------------------


def test_the_core_is_an_afternoons_read():
    assert house.count_lines(*house.CORE_FILES) <= LIMITS["core_lines"]


def test_all_source_is_small():
    assert house.count_lines(*house.SOURCES) <= LIMITS["source_lines"]


def test_no_file_is_long():
    lines = {file.name: house.count_lines(file) for file in house.SOURCES}
    assert not {name: n for name, n in lines.items() if n > LIMITS["file_lines"]}


def test_functions_are_short():
    sizes = house.body_lengths(house.SOURCES)
    assert median(sizes) <= LIMITS["body_median"]
    assert house.percentile_90(sizes) <= LIMITS["body_p90"]


@pytest.fixture(scope="module")
def path_of_a_prompt() -> tracer.Trace:
    return tracer.trace_generate()


def test_a_prompt_enters_few_functions_of_few_files(path_of_a_prompt):
    assert len(path_of_a_prompt.functions) <= LIMITS["generate_functions"], path_of_a_prompt.line()
    assert len(path_of_a_prompt.files) <= LIMITS["generate_files"], path_of_a_prompt.files


def test_the_calls_of_a_prompt_are_not_deep(path_of_a_prompt):
    assert len(path_of_a_prompt.deepest) <= LIMITS["generate_depth"], path_of_a_prompt.deepest


def test_the_training_loop_is_in_view():
    calls = tracer.calls_to_backward()
    assert calls[0] == "main" and len(calls) <= LIMITS["calls_to_backward"], calls


def test_the_tracer_counts_functions_files_and_depth():
    from nexus_min.model import flow

    found = tracer.trace(lambda: flow.schedule(3))
    assert ("model/flow.py", "schedule") in found.functions
    assert found.files == ["model/flow.py"] and len(found.deepest) >= 1
    assert tracer.function_name("f.<locals>.<lambda>") == "f"
    assert tracer.function_name("C.f.<locals>.g.<locals>.<listcomp>") == "C.f.<locals>.g"


# ---- imports -------------------------------------------------------------------------------------


def test_imports_have_no_cycle():
    order = house.import_order()
    assert sorted(m for rank in order for m in rank) == sorted(
        m for m, file in FILES.items() if file.name != "__init__.py"
    )
    assert order[0] and {"config", "model.flow"} <= set(order[0])


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_arrows(module):
    found = {wing(m) for m in internal_imports(module) if m}
    above = ABOVE.get(module, ABOVE.get(wing(module), set()))
    assert not found & (above if wing(module) in TOP else above | TOP) - {wing(module)}


def test_relative_and_late_imports_are_seen():
    code = "from . import score\nfrom .world import render\nfrom ..model.flow import schedule"
    read = [house.imported_names("toy.stages", node) for node in ast.parse(code).body]
    assert read == [["nexus_min.toy.score"], ["nexus_min.toy.world"], ["nexus_min.model.flow"]]
    assert "model.autoregressive" in internal_imports("pipeline")
    late = {name for module in FILES for name, at_top in imports(module) if not at_top}
    assert "nexus_min.toy.evaluate" in {n.rpartition(".")[0] for n in late} | late


def test_model_knows_only_config_and_itself():
    found = {t for m in FILES if wing(m) == "model" for t in internal_imports(m)}
    assert {wing(t) for t in found} <= {"config", "model"}


def test_the_sampler_and_the_network_do_not_know_each_other():
    assert "model.flow" not in internal_imports("model.mmdit")
    assert internal_imports("model.flow") == set()


@pytest.mark.parametrize("module", FILES)
def test_only_the_command_line_knows_the_toy_world(module):
    if wing(module) not in KNOW_THE_TOY_WORLD:
        assert not {t for t in internal_imports(module) if wing(t) == "toy"}


@pytest.mark.parametrize("module", FILES)
def test_only_the_runtime_packages_are_imported(module):
    roots = {name.split(".")[0] for name, _ in imports(module)}
    assert not roots & set(house.SCRIPTS)
    foreign = roots - RUNTIME - sys.stdlib_module_names - {"nexus_min"}
    late = {name for name, at_top in imports(module) if not at_top}
    assert foreign <= OPTIONAL.get(module, set()) & late  # no matplotlib, transformers, timm ...


# ---- nothing happens on import -------------------------------------------------------------------


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
    body = house.tree_of(FILES[module]).body
    assert not [ast.unparse(node) for node in body if not harmless(node)]
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
