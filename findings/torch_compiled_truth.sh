#!/usr/bin/env bash
# A compiled module has no truth value: `module or default` raises.
#
# Expected: torch.compile(module) stands for the module wherever the module stood, as in
# `state = model and model.state_dict()`.
# What happens: a plain module is true. The compiled one has a `__len__` that forwards to the module's,
# so bool() raises TypeError "... does not support len()" unless the module is a container. A compiled
# empty nn.Sequential is false, as the plain one is.
# Whom it bites: savers and pipelines with optional parts (`if self.vae:`), once somebody compiles one.
# What to do: compare with None.
# Versions: torch 2.13.0 (CPU), CPython 3.11. Source: PyPI, CPU wheel.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn


def truth(module):
    try:
        return bool(module)
    except TypeError as error:
        return str(error)


linear = nn.Linear(2, 2)
stack, empty = nn.Sequential(linear), nn.Sequential()
found = {
    "Linear": (truth(linear), truth(torch.compile(linear))),
    "Sequential of one": (truth(stack), truth(torch.compile(stack))),
    "empty Sequential": (truth(empty), truth(torch.compile(empty))),
}
for name, values in found.items():
    print(f"{name}: plain {values[0]}, compiled {values[1]}")
assert found["Linear"] == (True, "Linear does not support len()"), found
assert found["Sequential of one"] == (True, True) and found["empty Sequential"] == (False, False)
PYTHON
echo "seen: bool() of a compiled module raises"
