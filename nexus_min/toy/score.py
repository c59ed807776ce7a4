"""The exact checker: reads the scene back out of a picture, and scores pictures against what was asked.

Every cell is explained as "background plus one coloured template": the colour that leaves the least residue,
the coverage along the line background -> colour, and the template (shape, size, style, half-pixel offset)
with the largest Tanimoto overlap. A cell that none explains holds an `unknown` object, and a picture with one
is never exact. On true renderings it is exact (tests/test_toy.py), also under noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .world import (
    BACKGROUNDS,
    CENTRES,
    COLOURS,
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
RESIDUE = 55.0  # grey levels (rms) off the background-colour line beyond which a colour is unknown
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
    """What the checker saw: a scene, the smallest overlap among its cells, and whether all was explained."""

    scene: Scene
    known: bool
    overlap: float

    def is_exactly(self, scene: Scene) -> bool:
        """Same objects in the same cells, same background, same style, nothing else."""
        return self.known and self.scene.key == scene.key


def read_background(images: np.ndarray) -> np.ndarray:
    """Index into BACKGROUNDS of the commonest background colour of each picture: [B, H, W, 3] -> [B]."""
    palette = np.float32(list(BACKGROUNDS.values()) + list(COLOURS.values()))
    pixels = images.reshape(len(images), -1, 3).astype(np.float32)
    nearest = ((pixels[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
    counts = np.stack([(nearest == k).sum(1) for k in range(len(BACKGROUNDS))], 1)
    return counts.argmax(1)


def _cells(images: np.ndarray) -> np.ndarray:
    half = CROP // 2
    rows = [
        images[:, y - half : y + half, x - half : x + half] for y in CENTRES for x in CENTRES
    ]
    return np.stack(rows, 1).astype(np.float32)  # [B, 9, CROP, CROP, 3]


def read(images: np.ndarray) -> list[Reading]:
    """Read the scenes of pictures uint8 [B, 64, 64, 3]. Raises ValueError on another size."""
    if images.ndim != 4 or images.shape[1:] != (64, 64, 3):
        raise ValueError(f"pictures must be [B, 64, 64, 3], got {images.shape}")
    backgrounds = read_background(images)
    names, masks, energies = _templates()
    base = np.float32(list(BACKGROUNDS.values()))[backgrounds][:, None, None, None]
    delta = (_cells(images) - base).reshape(len(images), 9, -1, 3)
    readings = []
    for index, picture in enumerate(delta):
        readings.append(_read_one(picture, int(backgrounds[index]), names, masks, energies))
    return readings


def _read_one(delta: np.ndarray, background: int, names, masks, energies) -> Reading:
    name = list(BACKGROUNDS)[background]
    lines = np.float32(list(COLOURS.values())) - np.float32(BACKGROUNDS[name])  # [8, 3]
    along = (delta @ lines.T) / (lines**2).sum(1)  # [9, P, 8] coverage if it were that colour
    coverage = np.clip(along, 0.0, 1.0)
    residue = ((delta[:, :, None] - coverage[..., None] * lines) ** 2).sum(-1)  # [9, P, 8]
    best = residue.sum(1).argmin(1)
    objects, styles, worst = [], set(), 1.0
    for cell in range(9):
        alpha = coverage[cell, :, best[cell]]
        alpha = np.where(alpha > 0.3, alpha, 0.0)
        energy = float((alpha**2).sum())
        off = residue[cell, :, best[cell]]
        if energy < EMPTY:
            if (off > 60.0**2).sum() > EMPTY:  # something is there, in no known colour
                return Reading(Scene((), name), False, 0.0)
            continue
        inner = masks @ alpha
        overlap = inner / (energies + energy - inner)
        winner = int(overlap.argmax())
        rms = float(np.sqrt(off[alpha > 0.5].mean())) if (alpha > 0.5).any() else 0.0
        worst = min(worst, float(overlap[winner]))
        shape, size, style = names[winner]
        styles.add(style)
        if overlap[winner] < OVERLAP or rms > RESIDUE:
            worst = min(worst, 0.0)
        objects.append(Object(shape, list(COLOURS)[best[cell]], size, cell))
    style = styles.pop() if len(styles) == 1 else ("filled" if not styles else UNKNOWN)
    return Reading(Scene(tuple(objects), name, style), worst >= OVERLAP and style != UNKNOWN, worst)


def l1_outside(picture: np.ndarray, target: np.ndarray, source: np.ndarray) -> float:
    """Mean |picture - target| in [0, 1] over the pixels that the edit leaves alone (target == source)."""
    same = np.abs(target.astype(int) - source.astype(int)).max(-1) == 0
    if not same.any():
        raise ValueError("the edit touches every pixel: nothing is outside it")
    return float(np.abs(picture.astype(float) - target.astype(float))[same].mean() / 255)
