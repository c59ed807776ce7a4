"""Most memory that a command takes, all its processes together, looked at twice a second.

    python -m tests.benchmarks.memory python train_tiny.py --minutes 30

Prints the resident bytes summed over the processes, which counts what they share once for each
(PSS, on Linux, counts it once), and those of the largest. The status is the command's.
"""

from __future__ import annotations

import subprocess
import sys

from .common import need


def resident(pid: int) -> list[tuple[int, int]]:
    """(RSS, PSS) in bytes of a process and of all that it has started; PSS 0 where unknown."""
    psutil, found = need("psutil"), [(0, 0)]
    try:
        started = psutil.Process(pid)
        for process in (started, *started.children(recursive=True)):
            memory = process.memory_full_info()
            found.append((memory.rss, getattr(memory, "pss", 0)))
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        pass  # one has just ended: the next look counts the others
    return found


def main(command: list[str]) -> int:
    """Run the command, print its peaks, and return its status."""
    if not command:
        raise SystemExit(__doc__)
    peaks = (0, 0, 0)
    with subprocess.Popen(command) as child:
        while child.poll() is None:
            rss, pss = zip(*resident(child.pid), strict=True)
            peaks = tuple(map(max, peaks, (sum(rss), sum(pss), max(rss))))
            try:
                child.wait(0.5)
            except subprocess.TimeoutExpired:
                pass
    total, shared_once, largest = (f"{peak / 1e9:.2f} GB" for peak in peaks)
    print(f"peak memory: RSS {total}, PSS {shared_once}; largest process {largest}")
    return child.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
