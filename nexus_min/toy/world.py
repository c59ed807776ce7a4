"""The toy world: small scenes of colored shapes, drawn as anti-aliased vectors.

A scene is one to four shapes (more where the model only looks) on a 3x3 grid of cells, over a plain
background; it is filled or an outline drawing. Two things are random and named by no caption: the
sub-cell jitter of every object, and, in *detailed* images, a faint background texture with its
own angle, period and phase. They are what an editing decoder has to carry over from the source
image (paper, section 4.3). The nine cells do not line up with the 4x4 grid of image slots, so no
slot owns an object. It stands in for the paper's image corpora; the official code has no
counterpart.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

CANVAS = 64  # pixels a side
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS = {
    "red": (220, 35, 40),
    "green": (40, 160, 60),
    "blue": (45, 75, 220),
    "yellow": (245, 220, 50),
    "purple": (140, 50, 175),
    "orange": (245, 135, 25),
    "cyan": (60, 205, 220),
    "pink": (250, 150, 200),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "gray": (128, 128, 128),
    "black": (15, 15, 15),
    "brown": (110, 70, 38),
}
RADIUS = {"small": 6.0, "large": 9.0}  # canvas pixels
STYLES = ("filled", "outline")
OUTLINES = 0.25  # share of scenes that are outline drawings
STROKE = 1.65  # width of an outline, canvas pixels: never so thin that the checker drops it
CENTRES = (11, 32, 53)  # of the 3x3 cells, along one axis
CROP = 22  # side of the square around a cell's centre that holds any object in it
# offsets of an object from its cell's centre, canvas pixels
JITTER = tuple(half / 2 for half in range(-3, 4))
# What a prompt leaves open has one fixed answer: a regression cannot choose, it would average.
CANONICAL_COLOR = dict(zip(SHAPES, ("red", "blue", "green", "yellow", "purple"), strict=True))


@dataclass(frozen=True)
class Object:
    """One shape: what it is, its cell (0..8, row-major) and its jitter in canvas pixels."""

    shape: str
    color: str
    size: str = "large"
    cell: int = 4
    dx: float = 0.0
    dy: float = 0.0

    @property
    def key(self) -> tuple:
        """Everything a caption can name."""
        return self.shape, self.color, self.size, self.cell


@dataclass(frozen=True)
class Texture:
    """A faint wave over the background: angle, phase (radians), period (px), grey levels."""

    angle: float
    period: float
    phase: float
    amplitude: float
    checks: bool


@dataclass(frozen=True)
class Scene:
    """An image of the toy world."""

    objects: tuple[Object, ...]
    background: str = "white"
    style: str = "filled"
    texture: Texture | None = None

    @property
    def key(self) -> tuple:
        """Everything a caption can name, whatever the order of the objects."""
        return tuple(sorted(o.key for o in self.objects)), self.background, self.style


def held_out(*key: object) -> bool:
    """True for one key in ten, by hash: what has such a key is never trained on."""
    return hashlib.md5(repr(key).encode()).digest()[0] < 26


def choice(rng: np.random.Generator, items):
    """One of the items, each as likely; five times as fast as `rng.choice`, and the same one."""
    return items[int(rng.integers(len(items)))]


def random_texture(rng: np.random.Generator) -> Texture:
    """A texture with random angle, period 5-12 px, phase and strength."""
    return Texture(
        angle=float(rng.uniform(0, np.pi)),
        period=float(rng.uniform(5, 12)),
        phase=float(rng.uniform(0, 2 * np.pi)),
        amplitude=float(rng.uniform(12, 20)),
        checks=bool(rng.random() < 0.5),
    )


def jittered(rng: np.random.Generator, obj: Object) -> Object:
    """The same object at a new random place within its cell."""
    return replace(obj, dx=choice(rng, JITTER), dy=choice(rng, JITTER))


def random_object(rng: np.random.Generator, cell: int) -> Object:
    """An object with uniformly random shape, color, size and jitter in `cell`."""
    shape, color = choice(rng, SHAPES), choice(rng, tuple(COLORS))
    return jittered(rng, Object(shape, color, choice(rng, tuple(RADIUS)), cell))


def random_scene(
    rng: np.random.Generator,
    count: int | None = None,
    detail: float = 0.0,
    outline: float = OUTLINES,
) -> Scene:
    """A random scene of `count` (default 1 to 4) objects.

    Textured with probability `detail`, an outline drawing with probability `outline`.
    """
    count = count or int(rng.integers(1, 5))
    cells = rng.choice(9, count, replace=False)
    return Scene(
        objects=tuple(random_object(rng, int(c)) for c in cells),
        background=choice(rng, tuple(BACKGROUNDS)),
        style=STYLES[int(rng.random() < outline)],
        texture=random_texture(rng) if rng.random() < detail else None,
    )


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Distance in canvas pixels to the edge of a shape of radius `r` at the origin; < 0 inside."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.88 * r
    if shape == "triangle":
        slope = np.hypot(2.0, 1.0)
        return np.maximum(y - 0.85 * r, (2.0 * abs(x) - y - r) / slope)
    if shape == "cross":
        arm = 0.48 * r
        across = np.maximum(abs(x) - r, abs(y) - arm)
        return np.minimum(across, np.maximum(abs(x) - arm, abs(y) - r))
    if shape == "star":  # fold the plane into one tenth of the star, then one edge
        sector = 2 * np.pi / 5
        angle = np.arctan2(x, -y)
        angle = abs((angle + sector / 2) % sector - sector / 2)
        px, py = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
        bx, by = 0.54 * r * np.cos(sector / 2), 0.54 * r * np.sin(sector / 2)
        nx, ny = by, r - bx
        return ((px - r) * nx + py * ny) / np.hypot(nx, ny)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


@cache
def sprite(shape: str, size: str, style: str, dx: float, dy: float, scale: int = 1) -> np.ndarray:
    """Coverage in [0, 1] of one object over its cell: [CROP * scale, CROP * scale]."""
    axis = (np.arange(CROP * scale) + 0.5) / scale - CROP / 2
    edge = signed_distance(shape, axis[None, :] - dx, axis[:, None] - dy, RADIUS[size])
    if style == "outline":
        edge = np.maximum(edge, -(edge + STROKE))
    return np.clip(0.5 - edge * scale, 0.0, 1.0).astype(np.float32)


def _background(scene: Scene, size: int) -> np.ndarray:
    image = np.empty((size, size, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    if scene.texture:
        t = scene.texture
        axis = (np.arange(size, dtype=np.float32) + 0.5) * (CANVAS / size)
        u = np.cos(t.angle) * axis[None, :] + np.sin(t.angle) * axis[:, None]
        wave = np.cos(2 * np.pi / t.period * u + t.phase)
        if t.checks:
            v = np.cos(t.angle) * axis[:, None] - np.sin(t.angle) * axis[None, :]
            wave = wave * np.cos(2 * np.pi / t.period * v + t.phase)
        image += (t.amplitude * wave)[..., None]
    return image


def render(scene: Scene, scale: int = 1) -> np.ndarray:
    """Draw a scene: uint8 [64*scale, 64*scale, 3]. Objects are vectors, so any scale is sharp."""
    image = _background(scene, CANVAS * scale)
    for o in scene.objects:
        top = (CENTRES[o.cell // 3] - CROP // 2) * scale
        left = (CENTRES[o.cell % 3] - CROP // 2) * scale
        window = image[top : top + CROP * scale, left : left + CROP * scale]
        alpha = sprite(o.shape, o.size, scene.style, o.dx, o.dy, scale)[..., None]
        window += alpha * (np.float32(COLORS[o.color]) - window)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)
