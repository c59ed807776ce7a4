"""Time and memory of loading the same files: ours, transformers' and diffusers'.

    python tests/benchmarks/loading.py        10 GB of files in a temporary folder
    python tests/benchmarks/loading.py DIR    in DIR, which is kept, and reused when it is there

Every load is a process of its own, ours and theirs in turn, after all files were read once: they
come from the page cache. Mapped weights are not read before they are used, so there are two times:
until the model is there, and until one byte of every page of its parameters has been read as well.
Both begin after the imports, which have their own line; "CPU" is what the process itself worked,
which other work on the machine does not change. Copied is the growth of anonymous memory,
as a share of the file; mapped pages are not copies, they count in the peak alone. The peers load
with their defaults, in the stored bf16; diffusers from flux1-dev, and from a copy under its own
names, which spares it the conversion. Needs Linux and tests/requirements.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

BEGIN = time.perf_counter()
TESTS = Path(__file__).resolve().parents[1]
HOME, FLUX = "Nexus-GenV2", "FLUX/FLUX.1-dev"
CONVERTED = f"{FLUX}/transformer/diffusion_pytorch_model.safetensors"
PACKAGES = ("torch", "safetensors", "einops", "transformers", "diffusers", "accelerate")

# ---- what is loaded; imports first, so that the returned function does nothing but load ---------


def our_ar(folder: Path) -> Callable:
    from nexus_min import weights as loader

    config = loader.load_config(folder)
    return lambda: loader.load_ar(folder / HOME, config)


def their_ar(folder: Path) -> Callable:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration as Model

    return lambda: Model.from_pretrained(folder / HOME, dtype=torch.bfloat16)


def our_mmdit(folder: Path, file: str = f"{FLUX}/flux1-dev.safetensors") -> Callable:
    from nexus_min import weights as loader

    config = loader.load_config(folder)
    return lambda: loader.load_mmdit(folder / file, config)


def their_mmdit(folder: Path) -> Callable:
    import torch
    from diffusers import FluxTransformer2DModel as Model

    file, config = folder / FLUX / "flux1-dev.safetensors", str(folder / FLUX / "transformer")
    return lambda: Model.from_single_file(str(file), config=config, torch_dtype=torch.bfloat16)


def their_converted(folder: Path) -> Callable:
    import torch
    from diffusers import FluxTransformer2DModel as Model

    return lambda: Model.from_pretrained(folder / FLUX / "transformer", torch_dtype=torch.bfloat16)


def convert(folder: Path) -> None:
    """Write flux1-dev again, under diffusers' own names."""
    their_mmdit(folder)().save_pretrained(folder / FLUX / "transformer")


def our_decoder(folder: Path) -> Callable:
    return our_mmdit(folder, f"{HOME}/generation_decoder.bin")


class Case(NamedTuple):
    """One model: its files, and who reads them."""

    title: str
    files: str
    ours: Callable
    theirs: Callable | None = None
    their_files: str | None = None  # None: the same


CASES = {
    "ar": Case(
        "AR model, load_ar / transformers from_pretrained",
        f"{HOME}/model-*.safetensors",
        our_ar,
        their_ar,
    ),
    "mmdit": Case(
        "MMDiT, load_mmdit / diffusers from_single_file",
        f"{FLUX}/flux1-dev.safetensors",
        our_mmdit,
        their_mmdit,
    ),
    "converted": Case(
        "MMDiT, load_mmdit / diffusers from_pretrained of its own copy",
        f"{FLUX}/flux1-dev.safetensors",
        our_mmdit,
        their_converted,
        CONVERTED,
    ),
    "decoder": Case(
        "MMDiT of a decoder, load_mmdit (the peers do not read this file)",
        f"{HOME}/generation_decoder.bin",
        our_decoder,
    ),
}

# ---- one load ----------------------------------------------------------------------------------


def memory(name: str) -> int:
    """Bytes of RssAnon (copies), or of VmHWM (peak of all, mapped pages included), till now."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def touch(model) -> None:
    """Read one byte of every page of every parameter."""
    import torch

    for p in model.parameters():
        p.detach().reshape(-1).view(torch.uint8)[::4096].sum().item()


def measure(load: Callable) -> dict[str, float]:
    """Seconds and bytes of one load."""
    before, start, worked = memory("RssAnon"), time.perf_counter(), time.process_time()
    model = load()
    seconds, work = time.perf_counter() - start, time.process_time() - worked
    copied, peak = memory("RssAnon") - before, memory("VmHWM") / 1e9
    touch(model)
    return {
        "imports, s": start - BEGIN,
        "ready, s": seconds,
        "ready, CPU s": work,
        "touched, s": time.perf_counter() - start,
        "touched, CPU s": time.process_time() - worked,
        "copied when ready": copied,
        "copied when touched": memory("RssAnon") - before,
        "peak RSS ready, GB": peak,
        "peak RSS touched, GB": memory("VmHWM") / 1e9,
    }


# ---- all of them -------------------------------------------------------------------------------


def versions(python: str) -> dict[str, str]:
    """Versions of all packages in that interpreter; exits when one is missing."""
    code = (
        "import importlib.metadata as m, json\n"
        "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions()}))"
    )
    try:
        have = json.loads(subprocess.check_output([python, "-c", code]))
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"cannot run {python}: {error}") from None
    if missing := [name for name in PACKAGES if name not in have]:
        raise SystemExit(
            f"{python} lacks {', '.join(missing)}: pip install -r requirements.txt, then"
            " -r tests/requirements.txt, or name another interpreter with --python"
        )
    return {name: have[name] for name in PACKAGES}


def prepare(python: str, folder: Path, gigabytes: str) -> None:
    """Write the files that are not there yet."""
    if not (folder / "nexus_min.json").is_file():
        make = [sys.executable, str(TESTS / "make_release.py"), str(folder)]
        subprocess.run([*make, "--gigabytes", gigabytes], check=True)
    if not (folder / CONVERTED).is_file():
        child(python, folder, "--convert")


def run(python: str, case: str, side: str, folder: Path) -> dict[str, float]:
    """One load in a fresh process, with its files in the page cache."""
    files = CASES[case].their_files if side == "theirs" else None
    for file in folder.glob(files or CASES[case].files):
        with open(file, "rb", buffering=0) as data:
            while data.read(1 << 24):
                pass
    return json.loads(child(python, folder, "--measure", case, side).splitlines()[-1])


def child(python: str, folder: Path, *options: str) -> str:
    """What this script prints with these options in a process of its own; exits when it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TESTS.parent)}
    command = [python, __file__, str(folder), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def compare(python: str, name: str, folder: Path, repeats: int) -> None:
    """Print one table: medians, and the ratio of the medians."""
    case = CASES[name]
    size = sum(file.stat().st_size for file in folder.glob(case.files))
    sides = ("ours", "theirs") if case.theirs else ("ours",)
    runs = {side: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            runs[side].append(run(python, name, side, folder))
    print(f"\n{case.title}\n{case.files}, {size / 1e9:.2f} GB, {repeats} loads each")
    print("".join(f"{head:>24}" for head in ("", *sides, "ours/theirs")[: 2 * len(sides)]))
    for key in runs["ours"][0]:
        unit = size if key.startswith("copied") else 1
        columns = [sorted(r[key] / unit for r in runs[side]) for side in sides]
        print(f"{key:>24}" + "".join(f"{spread(c):>24}" for c in columns) + ratio(columns))


def spread(values: list[float]) -> str:
    return f"{median(values):.3f} ({values[0]:.3f}-{values[-1]:.3f})"


def ratio(columns: list[list[float]]) -> str:
    return f"{median(columns[0]) / median(columns[1]):>24.3f}" if len(columns) == 2 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="default: temporary")
    parser.add_argument(
        "--gigabytes", default="4", metavar="N", help="AR model and MMDiT, together"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--python", default=sys.executable, help="where the peers are installed")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--convert", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert:
        return convert(args.folder)
    if args.measure:
        load = getattr(CASES[args.measure[0]], args.measure[1])(args.folder)
        return print(json.dumps(measure(load)))
    found = versions(args.python)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        prepare(args.python, folder, args.gigabytes)
        print(", ".join(f"{name} {version}" for name, version in found.items()))
        print("median (least-most)")
        for name in CASES:
            compare(args.python, name, folder, args.repeats)


if __name__ == "__main__":
    main()
