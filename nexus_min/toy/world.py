"""The toy world: small scenes of colored shapes, drawn as anti-aliased vectors.

A scene is one to four shapes on a 3x3 grid of cells over a plain background, filled or as an
outline drawing. No caption names two random things, which an editing decoder has to copy from the
source (paper, section 4.3): the jitter within a cell, and a faint texture of some backgrounds. The
cells do not line up with the 4x4 grid of image slots, so no slot owns an object.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

Rng = np.random.Generator
CANVAS = 64  # pixels a side
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS = {
    "red": (220, 35, 40), "green": (40, 160, 60), "blue": (45, 75, 220), "yellow": (245, 220, 50),
    "purple": (140, 50, 175), "orange": (245, 135, 25), "cyan": (60, 205, 220),
    "pink": (250, 150, 200),
}  # fmt: skip
BACKGROUNDS = {
    "white": (250, 250, 250), "gray": (128, 128, 128), "black": (15, 15, 15), "brown": (110, 70, 38)
}  # fmt: skip
RADIUS = {"small": 6.0, "large": 9.0}  # canvas pixels
STYLES = ("filled", "outline")
OUTLINE_SHARE = 0.25  # share of scenes that are outline drawings
STROKE = 1.65  # width of an outline, canvas pixels: wide enough for the checker
CENTERS = (11, 32, 53)  # of the 3x3 cells, along one axis
CROP = 22  # side of the square around a cell's center that holds any object in it
JITTER = tuple(half / 2 for half in range(-3, 4))  # offsets from the cell's center, canvas pixels
# What a prompt leaves open has one fixed answer: a regression cannot choose, it would average.
CANONICAL_COLOR = dict(zip(SHAPES, ("red", "blue", "green", "yellow", "purple"), strict=True))


@dataclass(frozen=True)
class Object:
    """One shape: its attributes, its cell (0..8, row-major) and its jitter in canvas pixels."""

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
    """A faint wave over the background: angle, phase (radians), period (px), gray levels."""

    angle: float
    period: float
    phase: float
    amplitude: float
    checks: bool


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    background: str = "white"
    style: str = "filled"
    texture: Texture | None = None

    @property
    def key(self) -> tuple:
        """Everything a caption can name, whatever the order of the objects."""
        return tuple(sorted(o.key for o in self.objects)), self.background, self.style


def held_out(*key: object) -> bool:
    """True for one key in ten, by hash; training never uses those."""
    return hashlib.md5(repr(key).encode()).digest()[0] < 26


def choice(rng: Rng, items):
    """A random item: the one that `rng.choice` draws, five times as fast."""
    return items[int(rng.integers(len(items)))]


def random_texture(rng: Rng) -> Texture:
    angle, period, phase = rng.uniform(0, np.pi), rng.uniform(5, 12), rng.uniform(0, 2 * np.pi)
    return Texture(angle, period, phase, rng.uniform(12, 20), rng.random() < 0.5)


def jittered(rng: Rng, obj: Object) -> Object:
    """The same object with a new random offset within its cell."""
    return replace(obj, dx=choice(rng, JITTER), dy=choice(rng, JITTER))


def random_object(rng: Rng, cell: int) -> Object:
    shape, color, size = (choice(rng, x) for x in (SHAPES, tuple(COLORS), tuple(RADIUS)))
    return jittered(rng, Object(shape, color, size, cell))


def random_scene(
    rng: Rng, count: int | None = None, detail: float = 0.0, outline: float = OUTLINE_SHARE
) -> Scene:
    """A random scene of `count` (1 to 4) objects; the share `detail` has a texture."""
    count = count or int(rng.integers(1, 5))
    cells = rng.choice(9, count, replace=False)
    return Scene(
        objects=tuple(random_object(rng, int(c)) for c in cells),
        background=choice(rng, tuple(BACKGROUNDS)),
        style="outline" if rng.random() < outline else "filled",
        texture=random_texture(rng) if rng.random() < detail else None,
    )


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Distance in canvas pixels to the edge of a shape of radius `r` at the origin; < 0 inside."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.88 * r
    if shape == "triangle":
        return np.maximum(y - 0.85 * r, (2.0 * abs(x) - y - r) / np.hypot(2.0, 1.0))
    if shape == "cross":
        arm = 0.48 * r
        across = np.maximum(abs(x) - r, abs(y) - arm)
        return np.minimum(across, np.maximum(abs(x) - arm, abs(y) - r))
    if shape == "star":  # fold the plane into one tenth of the star, then one edge
        sector = 2 * np.pi / 5
        angle = abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
        px, py = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
        bx, by = 0.54 * r * np.cos(sector / 2), 0.54 * r * np.sin(sector / 2)
        return ((px - r) * by + py * (r - bx)) / np.hypot(by, r - bx)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


@cache
def sprite(shape: str, size: str, style: str, dx: float, dy: float, scale: int = 1) -> np.ndarray:
    """Coverage in [0, 1] of one object over its cell: [CROP * scale, CROP * scale]."""
    axis = (np.arange(CROP * scale) + 0.5) / scale - CROP / 2
    edge = signed_distance(shape, axis[None, :] - dx, axis[:, None] - dy, RADIUS[size])
    if style == "outline":
        edge = np.maximum(edge, -(edge + STROKE))
    return np.clip(0.5 - edge * scale, 0.0, 1.0).astype(np.float32)


def render(scene: Scene, scale: int = 1) -> np.ndarray:
    """Draw a scene: uint8 [64*scale, 64*scale, 3]. Objects are vectors, so any scale is sharp."""
    image = np.empty((CANVAS * scale, CANVAS * scale, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    if t := scene.texture:
        axis = (np.arange(len(image), dtype=np.float32) + 0.5) * (1 / scale)
        x, y = axis[None, :], axis[:, None]
        wave = np.cos(2 * np.pi / t.period * (np.cos(t.angle) * x + np.sin(t.angle) * y) + t.phase)
        if t.checks:  # a second wave, across the first
            across = np.cos(t.angle) * y - np.sin(t.angle) * x
            wave = wave * np.cos(2 * np.pi / t.period * across + t.phase)
        image += (t.amplitude * wave)[..., None]
    for o in scene.objects:
        top, left = ((CENTERS[i] - CROP // 2) * scale for i in divmod(o.cell, 3))
        window = image[top : top + CROP * scale, left : left + CROP * scale]
        alpha = sprite(o.shape, o.size, scene.style, o.dx, o.dy, scale)[..., None]
        window += alpha * (np.float32(COLORS[o.color]) - window)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)
