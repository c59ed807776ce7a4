"""The tables of the READMEs that the code itself can fill.

python tests/readme.py                     print all tables
python tests/readme.py core wings          print some; `parity` runs the parity tests
python tests/readme.py core wings --write  put them into their file, between their markers
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from house import CORE_FILES, HOME, PACKAGE, SOURCES, count_lines, text_of
from safetensors import safe_open

README = HOME / "README.md"
WINGS = {  # files or folders of the package, and scripts: what they are for
    "tokenizer.py images.py": "text and images <-> ids and tensors",
    "model/text_encoders.py": "CLIP and T5, for empty and negative prompts only",
    "model/packing.py model/gradients.py": "fast training, equal to the plain one; read last",
    "weights*.py formats.py parts.py ../weights_loader.py": "the official files <-> the models",
    "offload.py": "memory profiles: resident, staged or stream; fp8",
    "chat.py batch.py": "conversations and batches, clients of the pipeline",
    "__main__.py cli.py png.py": "the command line",
    "train ../train_tiny.py": "training: the loop, optimizers, data, fine-tuning, LoRA",
    "scale": "full-scale training on many GPUs, and an estimate of what it takes",
    "toy": "the toy world of the tiny model: scenes, prompts, stages, scores",
    "app": "the web page",
}


def core() -> str:
    """Markdown table of the twelve core files in reading order."""
    rows = ["| file | lines | what it is |", "|---|---:|---|"]
    for file in CORE_FILES:
        about = ast.get_docstring(ast.parse(text_of(file))).split("\n\n")[0].replace("\n", " ")
        name = file.relative_to(PACKAGE).as_posix()
        rows.append(f"| [`{name}`]({name}) | {count_lines(file)} | {about} |")
    rows.append(f"| **the core** | **{count_lines(*CORE_FILES)}** | |")
    return "\n".join(rows)


def reading() -> str:
    """The core files in reading order, with their lines."""
    names = [
        (file.stem, file.relative_to(HOME).as_posix(), count_lines(file)) for file in CORE_FILES
    ]
    files = " → ".join(f"[`{stem}`]({name}) {lines}" for stem, name, lines in names)
    return f"{files}: {count_lines(*CORE_FILES)} lines in all."


def wing_files(names: str) -> list[Path]:
    """The source files of a key of WINGS."""
    patterns = [name if name.endswith(".py") else f"{name}/*.py" for name in names.split()]
    return sorted(f.resolve() for pattern in patterns for f in PACKAGE.glob(pattern))


def label(name: str) -> str:
    """`name` in Markdown, as a link where the folder has a README."""
    readme = PACKAGE / name / "README.md"
    text = f"`{name.removeprefix('../')}{'' if name.endswith('.py') else '/'}`"
    return f"[{text}]({readme.relative_to(PACKAGE).as_posix()})" if readme.is_file() else text


def wings() -> str:
    """Markdown table of all other source."""
    rows = ["| wing | lines | what it is for |", "|---|---:|---|"]
    for names, about in WINGS.items():
        labels = ", ".join(label(name) for name in names.split())
        rows.append(f"| {labels} | {count_lines(*wing_files(names))} | {about} |")
    rows.append(f"| **all source, with the core** | **{count_lines(*SOURCES)}** | |")
    return "\n".join(rows)


def maths() -> str:
    """Markdown table of the README: four towers of the parity table, as stored."""
    chosen = {
        "vision": "Qwen2.5-VL's vision tower",
        "slots": "its decoder, 81 slots",
        "mmdit": "FLUX.1's MMDiT",
        "autoencoder": "FLUX.1's autoencoder",
    }
    rows = ["| ours beside the official one | largest error | limit |", "|---|---:|---:|"]
    stored = [[c.strip() for c in r.split("|")] for r in section("parity")[1].split("\n")]
    errors = {row[1]: row[3:5] for row in stored}
    rows += [f"| {chosen[tower]} | {' | '.join(errors[tower])} |" for tower in chosen]
    return "\n".join(rows)


def parity() -> str:
    """Markdown table: tower, where its error is largest, the error, its limit, the test."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "parity.json")
        command = [sys.executable, "-m", "pytest", "-q", "-k", "parity", "-p", "no:cacheprovider"]
        subprocess.run(
            [*command, "--deselect", "tests/test_readme.py", str(HOME)],
            check=True,
            cwd=HOME,
            env=os.environ | {"PARITY_RECORD": str(record)},
            stdout=subprocess.DEVNULL,
        )
        worst = json.loads(record.read_text("utf-8"))
    rows = ["| tower | official fixture | largest error | limit | test |", "|---|---|---|---|---|"]
    for tower, (error, limit, reference, test) in sorted(worst.items()):
        test = test.split("[")[0]
        rows.append(f"| {tower} | {reference} | {error:.0e} | {limit:.0e} | `{test}` |")
    return "\n".join(rows)


def speed() -> str:
    """Markdown table of `tests/benchmarks/results.json`."""
    command = [sys.executable, "-m", "tests.benchmarks", "table"]
    return subprocess.check_output(command, cwd=HOME, text=True).strip()


TOY = PACKAGE / "toy/README.md"
PAPER = {  # of Nexus-Gen*, tuned for generation (table 3, GenEval): for orientation only
    "geneval-toy / single": 0.97,
    "geneval-toy / two": 0.93,
    "geneval-toy / counting": 0.64,
    "geneval-toy / colors": 0.88,
    "geneval-toy / position": 0.83,
    "geneval-toy / attribution": 0.62,
    "geneval-toy: all": 0.81,
}
OUTSIDE = {  # L1 outside the edits of textured images
    "l1_outside_editing": "L1 outside the edit, editing decoder",
    "l1_outside_generation": "L1 outside the edit, generation decoder",
    "l1_outside_no_texture": "L1 outside the edit, true target without texture",
    "ratio": "L1 outside the edit, editing : generation decoder",
}
SUMMARY = {  # rows of the README's table: rows of `eval`
    "images of short prompts (GenEval's six categories)": "geneval-toy: all",
    "images of long captions, the whole scene": "long captions",
    "answers to questions": "questions: all",
    "edits, the whole scene": "edits: all",
    "**as people type it**: images": "as typed / prompts",
    "**as people type it**: answers": "as typed / questions",
    "**as people type it**: edits": "as typed / edits",
}


def shipped_scores(language: str) -> dict[str, dict]:
    """Row of `eval` without its language -> its values. From

    python -m nexus_min eval --languages en --json tests/benchmarks/scores_en.json  # and zh
    """
    rows = json.loads((HOME / f"tests/benchmarks/scores_{language}.json").read_text("utf-8"))
    return {re.sub(rf" {language}\b| \(.*\)", "", row["name"]): row for row in rows}


def scores() -> str:
    """Markdown table of all scores of the shipped model."""
    both = [shipped_scores(language) for language in ("en", "zh")]
    rows = ["| score | English | Chinese | paper |", "|---|---|---|---|"]

    def add(name: str, show: Callable[[dict], str], label: str = "") -> None:
        cells = [show(score[name]) if name in score else "-" for score in both]
        rows.append(f"| {label or name} | {' | '.join(cells)} | {PAPER.get(label or name, '-')} |")

    english = both[0]
    for name in (name for name, row in english.items() if row["n"]):
        if not name.startswith("in training /"):
            add(name, lambda row: "{:.3f} [{:.2f}, {:.2f}]".format(row["rate"], *row["interval"]))
    for name in (name for name, row in english.items() if "told" in row):
        add(name, lambda row: f"{row['told']:.3f}", f"{name}: the plan is right")
    for key, label in OUTSIDE.items():
        add("L1 outside, editing / generation", lambda row, key=key: f"{row[key]:.4f}", label)
    return "\n".join(rows)


def summary() -> str:
    """Markdown table of the README: what comes out right, in both languages."""
    english, chinese = map(shipped_scores, ("en", "zh"))
    rows = ["| right, of 200 unseen cases of each kind | English | Chinese |", "|---|---:|---:|"]
    for label, name in SUMMARY.items():
        rows.append(f"| {label} | {english[name]['rate']:.2f} | {chinese[name]['rate']:.2f} |")
    return "\n".join(rows)


def making() -> str:
    """Markdown table of the stages that made the shipped model, by its metadata."""
    with safe_open(PACKAGE / "checkpoints/tiny/empty_prompt.safetensors", "pt") as file:
        facts = file.metadata()
    rows = ["| stage | steps | minutes |", "|---|---:|---:|"]
    for name, (_, steps, seconds) in json.loads(facts["stages"]).items():
        rows.append(f"| `{name}` | {steps} | {seconds / 60:.1f} |")
    return "\n".join([*rows, f"| `{facts['command']}` | | {float(facts['minutes']):.0f} |"])


TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "reading": (README, reading),
    "core": (PACKAGE / "README.md", core),
    "wings": (PACKAGE / "README.md", wings),
    "maths": (README, maths),
    "summary": (README, summary),
    "scores": (TOY, scores),
    "making": (TOY, making),
    "parity": (HOME / "tests/README.md", parity),
    "speed": (HOME / "tests/benchmarks/README.md", speed),
}


def section(name: str) -> tuple[str, str, str]:
    """The text of a table's file before, between and after its markers."""
    file = TABLES[name][0]
    parts = re.split(rf"(?<=<!-- {name} -->\n)|(?=\n<!-- end {name} -->)", file.read_text("utf-8"))
    if len(parts) != 3:
        raise ValueError(f"{file} needs once <!-- {name} --> and <!-- end {name} -->")
    return tuple(parts)


def main(words: list[str]) -> None:
    for name in [word for word in words if word != "--write"] or TABLES:
        file, make = TABLES[name]
        table = make()
        if "--write" in words:
            before, _, after = section(name)
            file.write_text(before + table + after, "utf-8")
        print(table, end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
