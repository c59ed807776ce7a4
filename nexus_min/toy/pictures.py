"""Images of the toy world as tensors and as grids for the eye, and shares of exact ones."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from ..images import patch_rows
from ..model.vision import QwenViT
from . import score
from .world import Rng, Scene, held_out, random_scene

MARGIN = 80  # pixels on the left of a grid, for the names of its rows


def to_unit(images: list[np.ndarray]) -> Tensor:
    """uint8 images -> [B, 3, H, W] in [0, 1]."""
    return rearrange(torch.from_numpy(np.stack(images)), "B h w C -> B C h w").float() / 255


def resize(images: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """PIL's resizing without rounding: [B, 3, n, n] in [0, 1] -> [B, 3, size, size].

    Two matrix products: several times faster than torch's antialiased `interpolate`.
    """
    weights = resampling(images.shape[-1], size, mode)
    with torch.autocast("cpu", enabled=False):
        return (weights @ (images @ weights.T)).clamp(0, 1)


@cache
def resampling(n: int, size: int, mode: str) -> Tensor:
    """Weights [size, n] of n pixels in each of `size` pixels, by torch's own antialiasing."""
    identity = torch.eye(n)[None, None]
    return F.interpolate(identity, size=(size, n), mode=mode, antialias=True)[0, 0]


def to_uint8(images: Tensor) -> np.ndarray:
    """[-1, 1] -> uint8 [B, H, W, 3], truncating as the official code does."""
    pixels = ((images.detach() / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    return rearrange(pixels, "B C h w -> B h w C").numpy()


def save_grid(path: Path, **rows: np.ndarray) -> None:
    """Write a PNG of rows of ten images uint8 [n, H, W, 3], twice as large, beside their names."""
    strips = [rearrange(row[:10], "n h w C -> h (n w) C") for row in rows.values()]
    image = Image.fromarray(np.concatenate(strips))
    image = image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)
    page = Image.new("RGB", (image.width + MARGIN, image.height), "white")
    page.paste(image, (MARGIN, 0))
    for i, name in enumerate(rows):
        corner = 6, image.height * i // len(rows) + 6
        ImageDraw.Draw(page).text(corner, name.replace("_", "\n"), "black")
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def scenes(
    rng: Rng, n: int, detail: float = 0.4, most: int = 4, least: int = 1, **options: float
) -> list[Scene]:
    """n `random_scene`s of `least` to `most` objects that are not held out."""
    found: list[Scene] = []
    while len(found) < n:
        scene = random_scene(rng, int(rng.integers(least, most + 1)), detail, **options)
        found += [] if held_out(scene.key) else [scene]
    return found


def embed_views(visual: QwenViT, images: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """Images [B, 3, H, W] in [0, 1] -> image embeddings [B, N, C] of their view at `size` px."""
    pixels, grid = patch_rows(resize(images, size, mode))
    tokens = visual(pixels, tuple(map(tuple, grid.tolist())))
    return rearrange(tokens, "(B N) C -> B N C", B=len(images))


def are_exact(images: np.ndarray, wanted: list[Scene]) -> list[bool]:
    """For each image, whether the checker reads it as exactly its scene."""
    return [r.is_exactly(s) for r, s in zip(score.read(images), wanted, strict=True)]


def exactness(images: np.ndarray, wanted: list[Scene]) -> float:
    """Share of images that the checker reads as exactly their scene."""
    return float(np.mean(are_exact(images, wanted)))


def agreement(images: np.ndarray, truth: np.ndarray) -> float:
    """Share of images that the checker reads as the true ones."""
    return exactness(images, [reading.scene for reading in score.read(truth)])
