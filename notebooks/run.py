"""Run notebooks in place: `python notebooks/run.py [NAMES]`, e.g. `05` or `05_image_slots`.

Without a name: all of them except 12, which needs the real weights. Outputs and images are stored. Times,
widgets and versions are removed, so that a diff shows what changed. A cell that fails ends the run;
that notebook stays as it was.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
NEEDS_WEIGHTS = ("12",)


def select(names: list[str]) -> list[Path]:
    """The notebooks whose file names start so. ValueError for a name that none has."""
    files = sorted(HERE.glob("[0-9][0-9]_*.ipynb"))
    if not names:
        return [f for f in files if not f.name.startswith(NEEDS_WEIGHTS)]
    names = [Path(name).name for name in names]
    if unknown := [n for n in names if not any(f.name.startswith(n) for f in files)]:
        raise ValueError(f"no notebook starts with {', '.join(unknown)}")
    return [f for f in files if f.name.startswith(tuple(names))]


def execute(file: Path, timeout: int = 600):
    """Run the cells of a notebook from the top in a fresh kernel; -> the notebook with outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(file, as_version=4)
    resources = {"metadata": {"path": str(HERE)}}
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources=resources, record_timing=False
    )
    return client.execute()


def tidy(notebook) -> None:
    """Drop widgets, times and versions; number the cells; join what a cell printed in parts."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        keep = ("jupyter", "tags")
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in keep}
        cell.get("outputs", [])[:] = joined(cell.get("outputs", []))


def joined(outputs: list) -> list:
    """Outputs with neighboring parts of one stream joined."""
    merged = []
    for output in outputs:
        last = merged[-1] if merged else {}
        if output.output_type == "stream" and output.get("name") == last.get("name"):
            last.text += output.text
        else:
            merged.append(output)
    return merged


def main(names: list[str]) -> int:
    """Run them one by one and print how long each took."""
    try:
        files = select(names)
        import nbformat
    except (ImportError, ValueError) as error:
        is_import = isinstance(error, ImportError)
        hint = "; pip install -r notebooks/requirements.txt" if is_import else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2
    for file in files:
        start = time.time()
        notebook = execute(file)
        tidy(notebook)
        nbformat.write(notebook, file)
        print(f"{file.name}: {time.time() - start:.0f} s, {file.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
