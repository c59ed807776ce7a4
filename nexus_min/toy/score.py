"""The exact checker: reads the scene back out of an image, and says how sure it is.

Every cell is explained as "background plus one colored template": the color that leaves the least
residue, the coverage along the line background -> color, and the template (shape, size, style,
half-pixel offset) with the largest Tanimoto overlap. An image with a cell that none explains is
not `known`, and never exact. On true renderings it is exact (tests/test_toy.py), also under noise.
It plays GenEval's detector; the official code has no counterpart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .world import (
    BACKGROUNDS,
    CANVAS,
    CENTRES,
    COLORS,
    CROP,
    JITTER,
    RADIUS,
    SHAPES,
    STYLES,
    Object,
    Scene,
    sprite,
)

OVERLAP = 0.7  # Tanimoto overlap below which a cell's content is unknown
EMPTY = 10.0  # squared coverage (pixels) below which a cell is empty
FAINT = 0.3  # coverage below which a pixel is background
RESIDUE = 55.0  # grey levels (rms) off the background-color line beyond which a color is unknown
STRANGE = 60.0  # the same for one pixel of a cell that seems empty
SPECKS = 24  # pixels that strange in a cell that noise and texture explain (they make up to 12)
UNKNOWN = "unknown"


@lru_cache(maxsize=1)
def _templates() -> tuple[list[tuple[str, str, str]], np.ndarray, np.ndarray]:
    names, masks = [], []
    for shape in SHAPES:
        for size in RADIUS:
            for style in STYLES:
                for dx in JITTER:
                    for dy in JITTER:
                        names.append((shape, size, style))
                        masks.append(sprite(shape, size, style, float(dx), float(dy)).ravel())
    stack = np.stack(masks)
    return names, stack, (stack**2).sum(1)


@dataclass(frozen=True)
class Reading:
    """What the checker saw: a scene, whether all was explained, the smallest overlap of a cell."""

    scene: Scene
    known: bool
    overlap: float

    def is_exactly(self, scene: Scene) -> bool:
        """Same objects in the same cells, same background, same style, nothing else."""
        return self.known and self.scene.key == scene.key


def read_background(images: np.ndarray) -> np.ndarray:
    """Index into BACKGROUNDS of each image's commonest one: [B, H, W, 3] -> [B]."""
    palette = np.float32(list(BACKGROUNDS.values()) + list(COLORS.values()))
    pixels = images.reshape(len(images), -1, 3).astype(np.float32)
    nearest = ((pixels[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
    counts = np.stack([(nearest == k).sum(1) for k in range(len(BACKGROUNDS))], 1)
    return counts.argmax(1)


def _cells(images: np.ndarray) -> np.ndarray:
    half = CROP // 2
    rows = [images[:, y - half : y + half, x - half : x + half] for y in CENTRES for x in CENTRES]
    return np.stack(rows, 1).astype(np.float32)  # [B, 9, CROP, CROP, 3]


def read(images: np.ndarray) -> list[Reading]:
    """Read the scenes of images uint8 [B, 64, 64, 3]. ValueError on another size."""
    if images.ndim != 4 or images.shape[1:] != (CANVAS, CANVAS, 3):
        raise ValueError(f"images must be [B, {CANVAS}, {CANVAS}, 3], got {images.shape}")
    names, backgrounds = list(BACKGROUNDS), read_background(images)
    base = np.float32(list(BACKGROUNDS.values()))[backgrounds][:, None, None, None]
    delta = (_cells(images) - base).reshape(len(images), 9, -1, 3)
    return [_read_one(d, names[k]) for d, k in zip(delta, backgrounds, strict=True)]


def _unmix(delta: np.ndarray, background: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Differences from the background [9, P, 3] -> each cell's color, coverage and residue.

    The color [9] (index into COLORS) is the one that leaves the least squared residue [9, P]
    beside the line background -> color; the coverage [9, P] in [0, 1] is the place on that line.
    """
    lines = np.float32(list(COLORS.values())) - np.float32(BACKGROUNDS[background])  # [8, 3]
    coverage = np.clip((delta @ lines.T) / (lines**2).sum(1), 0.0, 1.0)  # [9, P, 8]
    residue = ((delta[:, :, None] - coverage[..., None] * lines) ** 2).sum(-1)
    color = residue.sum(1).argmin(1)
    pick = (np.arange(9), slice(None), color)
    return color, coverage[pick], residue[pick]


def _match(alpha: np.ndarray, residue: np.ndarray) -> tuple[tuple[str, str, str], float]:
    """The best template (shape, size, style) for a cell's coverage [P], and its overlap.

    The overlap is 0 when what lies under the coverage is not of the color it was unmixed with.
    """
    names, masks, energies = _templates()
    inner = masks @ alpha
    overlap = inner / (energies + (alpha**2).sum() - inner)
    winner = int(overlap.argmax())
    core = residue[alpha > 0.5]
    strange = len(core) > 0 and np.sqrt(core.mean()) > RESIDUE
    return names[winner], 0.0 if strange else float(overlap[winner])


def _read_one(delta: np.ndarray, background: str) -> Reading:
    """Read one image from its cells' differences from the background: [9, P, 3]."""
    colors, coverage, residues = _unmix(delta, background)
    objects, styles, worst = [], set(), 1.0
    for cell, (alpha, residue) in enumerate(zip(coverage, residues, strict=True)):
        alpha = np.where(alpha > FAINT, alpha, 0.0)
        if (alpha**2).sum() < EMPTY:
            if (residue > STRANGE**2).sum() > SPECKS:  # something in no known color
                return Reading(Scene((), background), False, 0.0)
            continue
        (shape, size, style), overlap = _match(alpha, residue)
        objects.append(Object(shape, list(COLORS)[colors[cell]], size, cell))
        styles.add(style)
        worst = min(worst, overlap)
    style = STYLES[0] if not styles else styles.pop() if len(styles) == 1 else UNKNOWN
    known = worst >= OVERLAP and style != UNKNOWN
    return Reading(Scene(tuple(objects), background, style), known, worst)


def l1_outside(picture: np.ndarray, target: np.ndarray, source: np.ndarray) -> float:
    """Mean |image - target| in [0, 1] over the pixels that the edit leaves alone.

    All uint8 [H, W, 3]; left alone is where target == source. ValueError when nothing is.
    """
    same = np.abs(target.astype(int) - source.astype(int)).max(-1) == 0
    if not same.any():
        raise ValueError("the edit touches every pixel: nothing is outside it")
    return float(np.abs(picture.astype(float) - target.astype(float))[same].mean() / 255)
