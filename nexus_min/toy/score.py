"""The exact checker: it reads the scene back out of an image, as a detector does for GenEval.

It explains every cell as background plus one template (shape, size, style, half-pixel offset) in
one color. An image with a cell that no template explains is not `known`, and never exact. The
checker reads every true rendering exactly, also under noise (tests/test_toy.py).
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from . import world
from .world import CENTERS, CROP, Object, Scene

OVERLAP = 0.7  # Tanimoto overlap below which a cell's content is unknown
EMPTY = 10.0  # squared coverage (pixels) below which a cell is empty
FAINT = 0.3  # coverage below which a pixel is background
RESIDUE = 55.0  # gray levels (rms) off the background-color line beyond which a color is unknown
STRANGE = 60.0  # the same for one pixel of an empty cell
SPECKS = 24  # such pixels in an empty cell beyond which it is unknown (noise makes up to 12)
BACKGROUNDS, COLORS = (np.float32(list(x.values())) for x in (world.BACKGROUNDS, world.COLORS))


@dataclass(frozen=True)
class Reading:
    """A scene, whether every cell was explained, and the smallest overlap of a cell."""

    scene: Scene
    known: bool
    overlap: float

    def is_exactly(self, scene: Scene) -> bool:
        """Same objects in the same cells, same background, same style, nothing else."""
        return self.known and self.scene.key == scene.key


@cache
def _templates() -> tuple[list[tuple[str, str, str]], np.ndarray, np.ndarray]:
    """(shape, size, style) of each template, its coverage [T, P] and its energy [T]."""
    looks = list(product(world.SHAPES, world.RADIUS, world.STYLES, world.JITTER, world.JITTER))
    masks = np.stack([world.sprite(*look).ravel() for look in looks])
    return [look[:3] for look in looks], masks, (masks**2).sum(1)


def read(images: np.ndarray) -> list[Reading]:
    """Read the scenes of images uint8 [B, 64, 64, 3]."""
    if images.ndim != 4 or images.shape[1:] != (64, 64, 3):
        raise ValueError(f"images must be [B, 64, 64, 3], got {images.shape}")
    return [_read_one(image.astype(np.float32)) for image in images]


def _read_one(image: np.ndarray) -> Reading:
    palette = np.concatenate([BACKGROUNDS, COLORS])
    nearest = ((image.reshape(-1, 1, 3) - palette) ** 2).sum(-1).argmin(-1)
    commonest = np.bincount(nearest, minlength=len(palette))[: len(BACKGROUNDS)].argmax()
    background, base = list(world.BACKGROUNDS)[commonest], BACKGROUNDS[commonest]
    lines = COLORS - base  # the directions background -> color [8, 3]
    looks, masks, energies = _templates()
    objects, styles, worst = [], set(), 1.0
    for cell, (y, x) in enumerate(product(CENTERS, CENTERS)):
        window = image[y - CROP // 2 : y + CROP // 2, x - CROP // 2 : x + CROP // 2]
        delta = window.reshape(-1, 3) - base  # [P, 3]
        coverage = np.clip((delta @ lines.T) / (lines**2).sum(1), 0.0, 1.0)  # [P, 8]
        residue = ((delta[:, None] - coverage[..., None] * lines) ** 2).sum(-1)  # off the line
        color = residue.sum(0).argmin()
        alpha, residue = coverage[:, color], residue[:, color]
        alpha = np.where(alpha > FAINT, alpha, 0.0)
        if (alpha**2).sum() < EMPTY:
            if (residue > STRANGE**2).sum() > SPECKS:  # something in no known color
                return Reading(Scene((), background), False, 0.0)
            continue
        inner = masks @ alpha
        overlap = inner / (energies + (alpha**2).sum() - inner)  # Tanimoto
        core = residue[alpha > 0.5]
        if len(core) and np.sqrt(core.mean()) > RESIDUE:
            worst = 0.0  # an unknown color
        worst = min(worst, float(overlap.max()))
        shape, size, style = looks[overlap.argmax()]
        objects.append(Object(shape, list(world.COLORS)[color], size, cell))
        styles.add(style)
    style = "unknown" if len(styles) > 1 else styles.pop() if styles else "filled"
    known = worst >= OVERLAP and style != "unknown"
    return Reading(Scene(tuple(objects), background, style), known, worst)


def l1_unedited(image: np.ndarray, target: np.ndarray, source: np.ndarray) -> float:
    """Mean |image - target| in [0, 1] over the pixels where target == source, all [H, W, 3]."""
    same = (target == source).all(-1)
    if not same.any():
        raise ValueError("the edit touches every pixel: nothing is outside it")
    return float(np.abs(image.astype(float) - target.astype(float))[same].mean() / 255)
