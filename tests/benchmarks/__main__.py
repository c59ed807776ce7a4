"""All benchmarks that need no GPU, one process each: a table, and `results.json` beside this file.

    python -m tests.benchmarks                    # all; more than 15 minutes on 2 AVX2 cores
    python -m tests.benchmarks vision language    # some; the others' rows stay in the file

Peers come from `tests/requirements.txt`. A module has `rows()`, which yields `common.Row`s.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path

from .common import HEADER, measure

MODULES = ("slots", "language", "vision", "training", "diffusion", "autoencoder", "batch")
RESULTS = Path(__file__).with_name("results.json")


def main(names: list[str]) -> None:
    context, found, failed = multiprocessing.get_context("spawn"), [], False
    if RESULTS.is_file():
        found = [row for row in json.loads(RESULTS.read_text()) if row["module"] not in names]
    print(HEADER)
    for name in names:
        queue, start = context.Queue(), time.perf_counter()
        process = context.Process(target=measure, args=(name, queue))
        process.start()
        while (item := queue.get()) is not None:
            print(item[0], flush=True)
            found.append(item[1] | {"module": name})
        process.join()
        failed = failed or process.exitcode != 0
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    RESULTS.write_text(json.dumps(found, indent=1), "utf-8")
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:] or list(MODULES))
