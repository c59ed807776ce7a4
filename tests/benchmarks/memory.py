"""Most memory that a command takes, all its processes together, looked at twice a second.

    python -m tests.benchmarks.memory python train_tiny.py --minutes 30

Prints the resident bytes (RSS) summed over the processes, in which what they share counts once for
each, and those of the largest. The status is the command's.
"""

from __future__ import annotations

import subprocess
import sys

from .common import require


def resident(pid: int) -> list[int]:
    """Resident bytes of a process and of each that it has started."""
    psutil, found = require("psutil"), [0]
    try:
        started = psutil.Process(pid)
        for process in (started, *started.children(recursive=True)):
            found.append(process.memory_info().rss)
    except psutil.NoSuchProcess:
        pass  # one has just ended: the next look counts the others
    return found


def main(command: list[str]) -> int:
    """Run the command, print its peaks, and return its status."""
    if not command:
        raise SystemExit(__doc__)
    most = largest = 0
    with subprocess.Popen(command) as child:
        while child.poll() is None:
            bytes_now = resident(child.pid)
            most, largest = max(most, sum(bytes_now)), max(largest, *bytes_now)
            try:
                child.wait(0.5)
            except subprocess.TimeoutExpired:
                pass
    print(f"peak memory: {most / 1e9:.2f} GB; largest process {largest / 1e9:.2f} GB")
    return child.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
