"""All benchmarks that need no GPU, one process each: a table, and `results.json` beside this file.

    python -m tests.benchmarks                    # all
    python -m tests.benchmarks vision language    # some; the others' rows stay in the file
    python -m tests.benchmarks table              # the table of README.md from that file

Peers come from `tests/requirements.txt`. A module has `rows()`, which yields `common.Row`s.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .common import HEADER, measure, seconds

MODULES = ("slots", "language", "vision", "training", "diffusion", "autoencoder", "batch")
RESULTS = Path(__file__).with_name("results.json")


TABLE = "| work | peer | fp32: ours | ratio | bf16: ours | ratio |\n|---|---|---|---|---|---|"


def table(rows: list[dict]) -> Iterator[str]:
    """A line for every work and peer: our seconds, and the peer's as a multiple of them.

    In brackets the most that the ratio could be, at equal work: if all but our matmuls and
    attention took no time, or these ran as fast as one large matmul, whichever is less.
    """
    yield TABLE
    works: dict[tuple, dict] = {}
    for row in rows:
        if row["peer"].startswith("our loop"):
            continue
        works.setdefault((row["work"], row["peer"]), {})[row["dtype"]] = row
    for (work, peer), found in works.items():
        cells, slots = [work, peer], work.startswith("81 slots")
        for row in (found.get("float32"), found.get("bfloat16")):
            if row is None:
                cells += ["", ""]
                continue
            shares = [s for s in (row["core"], row["share"]) if s and not slots]
            most = f" ({row['ratio'] / max(shares):.2f}x)" if shares else ""
            cells += [seconds(row["ours"]), f"{row['ratio']:.2f}x{most}"]
        yield "| " + " | ".join(cells) + " |"


def main(names: list[str]) -> None:
    if names == ["table"]:
        return print("\n".join(table(json.loads(RESULTS.read_text("utf-8")))))
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
