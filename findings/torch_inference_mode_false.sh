#!/usr/bin/env bash
# torch.inference_mode(False) switches gradients on, also inside torch.no_grad().
#
# Expected: `with torch.inference_mode(False)` leaves inference mode and nothing else; inside no_grad()
# no graph is built.
# What happens: it also sets grad mode to True. Operations on parameters inside it record a graph,
# although an outer no_grad() is still open; after the block grad mode is False again.
# Whom it bites: who makes tensors of a cache under inference_mode(False), so that they are of use
# outside: a cache of products of parameters keeps the whole graph of every step alive.
# What to do: `with torch.inference_mode(False), torch.no_grad()`.
# Versions: torch 2.13.0 (CPU), CPython 3.11. Source: PyPI, CPU wheel.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

weight = torch.ones(2, requires_grad=True)
with torch.no_grad():
    outside = (weight * 2).requires_grad
    with torch.inference_mode(False):
        inside, mode = (weight * 2).requires_grad, torch.is_grad_enabled()
    with torch.inference_mode(False), torch.no_grad():
        remedy = (weight * 2).requires_grad
    after = torch.is_grad_enabled()
print("in no_grad:", outside, "| in inference_mode(False) within it:", inside, "| remedy:", remedy)
assert (outside, inside, mode, remedy, after) == (False, True, True, False, False)
PYTHON
echo "seen: inference_mode(False) overrules the no_grad around it"
