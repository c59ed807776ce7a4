"""Image files; a PNG also records how its image was made, for `--like` to repeat it."""

import os
from pathlib import Path
from typing import Any

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_NAME = 220  # bytes of a file's name: the temporary file has a longer one, of at most 255
MAX_SCALE = 16


def check_output(output: str, scale: int = 1) -> None:
    """ValueError when no image can be written to `output`."""
    if not 1 <= scale <= MAX_SCALE:
        raise ValueError(f"--scale must be 1 to {MAX_SCALE}, got {scale}")
    if Path(output).suffix.lower() not in FORMATS:
        raise ValueError(f"output {output!r} must end in {', '.join(FORMATS)}")
    check_writable(Path(output))


def check_writable(path: Path) -> None:
    """ValueError when no file can be written to `path`."""
    if len(os.fsencode(path.name)) > MAX_NAME:
        raise ValueError(f"the name {path.name[:60]!r}... is longer than {MAX_NAME} bytes")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {str(path)!r}: no file can be made there")


def save_image(image: Any, path: Path, metadata: dict) -> None:
    """Write the image in one step, its pixels enlarged by the `scale` of the metadata."""
    from PIL.PngImagePlugin import PngInfo

    from .weights import replace_file

    info, kind, scale = PngInfo(), FORMATS[path.suffix.lower()], metadata.get("scale", 1)
    for key, value in metadata.items():
        info.add_text(key, str(value))
    options = {"pnginfo": info} if kind == "PNG" else {"quality": 95}
    image = image.resize((scale * image.width, scale * image.height), resample=0)  # nearest
    replace_file(path, lambda partial: image.save(partial, format=kind, **options))


def read_metadata(path: str) -> dict[str, str]:
    """What `save_image` has written into a PNG, unchecked. ValueError for any other file."""
    from .images import open_image

    try:
        with open_image(path) as image:
            saved = {name: text for name, text in image.info.items() if isinstance(text, str)}
    except Exception as error:  # Pillow's readers raise a dozen kinds on a broken file
        raise ValueError(f"cannot read {path!r}: {error}") from error
    if "message" in saved:
        raise ValueError(f"{path!r} was made in a conversation, on which it depends")
    if not {"prompt", "seed", "num_steps"} <= saved.keys():
        raise ValueError(f"{path!r} records no settings: no PNG of generate or edit")
    return saved


def versions() -> str:
    """The versions that an image depends on."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return ", ".join(f"{name} {version(name)}" for name in ("nexus_min", "torch"))
    except PackageNotFoundError as error:  # run from its folder, not installed
        return f"unknown ({error.name})"
