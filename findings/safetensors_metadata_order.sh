#!/usr/bin/env bash
# safetensors writes the same tensors and the same metadata as different files.
#
# Expected: a file is a function of its content, so that two runs of one script give one hash.
# What happens: the entries of `metadata` come in another order from one save to the next, even within
# one process, because the header is made from a hash map with a random seed. Tensors keep their order
# (by type, then by name). Without metadata, or with one entry, the bytes are equal.
# Whom it bites: who caches, signs or deduplicates checkpoints by the hash of the file, and who tests
# that a run is reproducible bit for bit: compare the tensors, or write one metadata entry.
# Versions: safetensors 0.8.0, numpy 2.4.6, CPython 3.11. Source: PyPI.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
from hashlib import sha256

import numpy as np
from safetensors.numpy import load, save

tensors = {name: np.arange(3, dtype=np.float32) for name in "cab"}
keys = ("format", "seed", "command", "minutes")


def hashes(metadata):
    files = [save(tensors, metadata) for _ in range(50)]
    assert all((load(file)["a"] == tensors["a"]).all() for file in files)
    return len({sha256(file).hexdigest() for file in files})


found = {n: hashes({key: "x" for key in keys[:n]} or None) for n in range(5)}
print("metadata entries: different files of 50 saves:", found)
assert found[0] == found[1] == 1, "one content, one file: as expected, but for what follows"
assert found[2] == 2 and found[4] > 6, "the order of the metadata no longer changes"
PYTHON
echo "seen: the same content, saved again, is another file"
