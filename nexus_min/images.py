"""Images <-> tensors: what the vision tower reads, what the autoencoder reads, what a user sees.

Equation: none; the preprocessing behind figure 2 of Nexus-Gen (252 px -> 81, 504 px -> 324 tokens).
Official: `smart_resize` of qwen_vl_utils 0.0.11, `Qwen2VLImageProcessor` of transformers 4.49,
`bound_image` of Nexus-Gen's `image_editing.py`.

Conventions: patch rows hold (pixel/255 - mean) / std with CLIP's constants; images for the
autoencoder lie in [-1, 1]; `patch_rows` takes [0, 1]. Sizes are (h, w); PIL's own are (w, h).
An image from outside is untrusted: `load_image` alone opens files.
"""

from __future__ import annotations

import io
import math
import os
import sys
import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image, ImageOps
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MIN_PIXELS = 3136
MAX_PIXELS = 262640
MAX_FILE_PIXELS = 50_000_000
# Formats that Pillow decodes itself: none of them starts another program, as EPS would.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

ImageLike = Image.Image | np.ndarray | Tensor  # an array or a tensor is uint8 [H, W, 3]


# --- sizes -------------------------------------------------------------------------------------


def smart_resize(
    h: int,
    w: int,
    factor: int = 28,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[int, int]:
    """Nearest (h, w) that are multiples of `factor`, area within bounds, aspect about kept.

    Rounds half to even, as Python does and the official function therefore too.
    Raises ValueError for an empty image, one longer than 200 times its width, or absurd bounds.
    """
    if min(h, w, factor, min_pixels) < 1 or min_pixels > max_pixels:
        raise ValueError(
            f"sizes must be positive and min_pixels <= max_pixels: h {h}, w {w}, "
            f"factor {factor}, min_pixels {min_pixels}, max_pixels {max_pixels}"
        )
    if max(h, w) > 200 * min(h, w):
        raise ValueError(f"the sides of an image may differ by a factor of 200, got {h} x {w}")
    new_h, new_w = (max(factor, round(side / factor) * factor) for side in (h, w))
    if new_h * new_w > max_pixels:
        beta = math.sqrt(h * w / max_pixels)
        new_h, new_w = (max(factor, math.floor(s / beta / factor) * factor) for s in (h, w))
    elif new_h * new_w < min_pixels:
        beta = math.sqrt(min_pixels / (h * w))
        new_h, new_w = (math.ceil(s * beta / factor) * factor for s in (h, w))
    return new_h, new_w


def bound_image(
    image: Image.Image,
    factor: int = 28,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """RGB image at the size of `smart_resize`, BICUBIC: what the AR model reads."""
    h, w = smart_resize(image.height, image.width, factor, min_pixels, max_pixels)
    return to_rgb(image).resize((w, h), Image.Resampling.BICUBIC)


def reference_view(image: Image.Image, size: int) -> Image.Image:
    """RGB image squeezed to size x size, BILINEAR: the source as the editing decoder sees it."""
    return to_rgb(image).resize((size, size), Image.Resampling.BILINEAR)


def center_crop_view(image: Image.Image, size: int) -> Image.Image:
    """RGB centre square at size x size, BICUBIC: a training target."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = to_rgb(image).crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC)


# --- images -> tensors -----------------------------------------------------------------------


def patch_rows(
    images: Tensor, patch_size: int = 14, merge_size: int = 2, temporal_patch_size: int = 2
) -> tuple[Tensor, Tensor]:
    """Equal-sized images [B, 3, H, W] in [0, 1] -> (pixel_values [P, 3*2*14*14], grid_thw [B, 3]).

    Rows in natural order (2x2 patches of a merged unit together), columns (c, t, p, p); the single
    frame is repeated to fill the temporal patch. Differentiable; the grid lives on the CPU.
    Raises ValueError when the shape is no such batch or the sides are not multiples of 28.
    """
    unit = patch_size * merge_size
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be float [B, 3, H, W], got {describe(images)}")
    n, _, height, width = images.shape
    if not n or not height or not width or height % unit or width % unit:
        raise ValueError(f"sides must be multiples of {unit}, B >= 1: got {tuple(images.shape)}")
    mean, std = images.new_tensor((MEAN, STD))[..., None, None]
    rows = repeat(
        (images - mean) / std,
        "B c (h i p) (w j q) -> (B h w i j) (c t p q)",
        i=merge_size,
        j=merge_size,
        p=patch_size,
        q=patch_size,
        t=temporal_patch_size,
    )
    grid = torch.tensor([[1, height // patch_size, width // patch_size]] * n, device="cpu")
    return rows, grid


def to_patches(
    image: ImageLike | Sequence[ImageLike],
    patch_size: int = 14,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
) -> tuple[Tensor, Tensor]:
    """One image, or several of any sizes -> (pixel_values [P, 3*2*14*14] fp32, grid_thw [n, 3]).

    Nothing is resized: bring sides to multiples of 28 first (`bound_image`, `reference_view`).
    Raises ValueError for an empty list, a wrong array, or sides that are not multiples of 28.
    """
    pictures = image if isinstance(image, list | tuple) else [image]
    if not pictures:
        raise ValueError("to_patches needs at least one image")
    sizes = (patch_size, merge_size, temporal_patch_size)
    alike = groupby(map(to_unit_range, pictures), key=lambda picture: picture.shape)
    parts = [patch_rows(torch.stack(list(group)), *sizes) for _, group in alike]
    pixel_values, grid_thw = zip(*parts, strict=True)
    return torch.cat(pixel_values), torch.cat(grid_thw)


def to_unit_range(picture: ImageLike) -> Tensor:
    """PIL image or uint8 [H, W, 3] -> fp32 [3, H, W] in [0, 1]."""
    if isinstance(picture, Image.Image):
        picture = np.array(to_rgb(picture))
    pixels = torch.as_tensor(picture)
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"an image must be PIL or uint8 [H, W, 3], got {describe(pixels)}")
    return rearrange(pixels, "H W c -> c H W").float() * (1 / 255)


def to_latent_image(image: Image.Image, h: int, w: int) -> Tensor:
    """RGB image resized (BICUBIC) to h x w -> [1, 3, h, w] in [-1, 1], for the autoencoder."""
    resized = to_rgb(image).resize((w, h), Image.Resampling.BICUBIC)
    return to_unit_range(resized)[None] * 2 - 1


def to_image(x: Tensor) -> Image.Image:
    """[3, H, W] or [1, 3, H, W] in [-1, 1] (clipped) -> PIL RGB; truncates, as officially.

    Raises ValueError for another shape or for values that are not finite.
    """
    if x.ndim not in (3, 4) or x.shape[-3] != 3 or x.numel() != x.shape[-3:].numel():
        raise ValueError(f"to_image takes [3, H, W] or [1, 3, H, W], got {describe(x)}")
    if odd := int((~x.isfinite()).sum()):
        raise ValueError(
            f"an image of {tuple(x.shape)} holds {odd} NaN or infinite values: the weights are "
            "broken, or their dtype too narrow"
        )
    pixels = (x.detach().float() / 2 + 0.5).clamp(0, 1) * 255
    pixels = rearrange(pixels.reshape(x.shape[-3:]), "c H W -> H W c")
    return Image.fromarray(pixels.to(device="cpu", dtype=torch.uint8).contiguous().numpy())


def describe(x: Tensor | np.ndarray) -> str:
    """Type and shape for an error message."""
    return f"{x.dtype} {list(x.shape)}"


# --- anything -> RGB image -------------------------------------------------------------------


def load_image(
    source: str | os.PathLike | bytes | Image.Image | np.ndarray,
    max_pixels: int | None = None,
) -> Image.Image:
    """A path, the bytes of a file, a PIL image or an array -> upright RGB image.

    Arrays: [H, W] or [H, W, 1..4]; bool, uint8, uint16, or float in [0, 1]. Transparency is laid
    over white, 16 bits become 8, an animation gives its first frame, EXIF orientation is applied.
    Raises ValueError, one line, for whatever cannot be read and for more than `max_pixels`, which
    is checked before anything is decoded. By default that is 50 million for what has not been
    decoded yet, and nothing else; Pillow itself refuses files of 179 million.
    """
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else type(source).__name__
    try:
        if isinstance(source, Image.Image):
            return finish(source, max_pixels)
        if isinstance(source, np.ndarray):
            return finish(from_array(source), max_pixels)
        with open_image(source) as image:
            return finish(image, max_pixels)
    except Exception as error:  # Pillow's decoders raise a dozen kinds on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot read image {name!r}: {reason}") from error


def open_image(source: str | os.PathLike | bytes) -> Image.Image:
    """Read the header of a file or of its bytes; pixels are decoded later."""
    if isinstance(source, bytes | bytearray | memoryview):
        stream = io.BytesIO(source)
    elif not isinstance(source, str | os.PathLike):
        raise ValueError("expected a path, bytes, a PIL image or an array")
    else:
        path = Path(source)
        if not path.is_file():  # also keeps away from pipes and devices, which would block
            raise ValueError("it is not a file" if path.exists() else "no such file")
        stream = path
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # older Pillows know fewer
    with warnings.catch_warnings():  # of many pixels: `finish` refuses them itself
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(stream, formats=formats)


def finish(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """Check the size, decode, turn upright, make RGB."""
    if max_pixels is None:
        max_pixels = MAX_FILE_PIXELS if getattr(image, "tile", None) else sys.maxsize
    if not 0 < image.width * image.height <= max_pixels:
        raise ValueError(f"{image.width} x {image.height} is not within 1..{max_pixels} pixels")
    with warnings.catch_warnings():  # of a part that is larger than the header said
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image.load()
        return to_rgb(upright(image))


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; an image with broken EXIF stays as it is."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the tag parser fails in as many ways as files are broken
        return image.copy()


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB (itself if it is); transparency over white, deep grey to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return deep_grey(image).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "PA"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def deep_grey(image: Image.Image) -> Image.Image:
    """Modes I;16, I and F -> L.

    Mode I;16 is 16 bits. I and F do not say their range: it is the least of 1 (F only), 255 and
    65535 that holds the values, and what lies outside is clipped.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    ranges = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
    top = next((r for r in ranges if values.max() <= r), 65535)
    return Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))


def from_array(array: np.ndarray) -> Image.Image:
    """[H, W] or [H, W, 1..4] of bool, uint8, uint16 or float in [0, 1] -> PIL."""
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or not 1 <= channels <= 4 or not array.size:
        raise ValueError(f"an array must be [H, W] or [H, W, 1..4], got {describe(array)}")
    if array.dtype == bool or array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"floats must lie in [0, 1], got {array.min()} to {array.max()}")
        array = (array.astype(np.float32) * 255).round()
    elif array.dtype == np.uint16:
        array = (array / 257).round()
    elif array.dtype != np.uint8:
        raise ValueError(f"an array must be bool, uint8, uint16 or float, got {describe(array)}")
    pixels = array.astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if array.ndim == 3 and channels == 1 else pixels)
