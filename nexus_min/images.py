"""Images <-> tensors: what the vision tower reads, what the autoencoder reads, what a user sees.

The preprocessing behind figure 2 of Nexus-Gen (252 px -> 81, 504 px -> 324 tokens). Official:
`smart_resize` of qwen_vl_utils 0.0.11, `Qwen2VLImageProcessor` of transformers 4.49, `bound_image`
of Nexus-Gen's `image_editing.py`.

Conventions: patch rows hold (pixel/255 - mean) / std with CLIP's constants, images for the
autoencoder lie in [-1, 1]. Sizes are (h, w); PIL's own are (w, h). An image from outside is
untrusted: `load_image` alone opens files.
"""

import io
import math
import os
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
MIN_PIXELS, MAX_PIXELS = 3136, 262640  # bounds of `smart_resize`
MAX_FILE_PIXELS = 50_000_000
# Formats that Pillow decodes itself: none of them starts another program, as EPS would.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
ImageLike = Image.Image | np.ndarray | Tensor  # an array or a tensor is uint8 [H, W, 3]


def smart_resize(
    h: int, w: int, factor: int = 28, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Multiples of `factor` close to (h, w), with an area within bounds and about this aspect."""
    if min(h, w, factor, min_pixels) < 1 or min_pixels > max_pixels:
        bounds = f"factor {factor}, min_pixels {min_pixels}, max_pixels {max_pixels}"
        raise ValueError(f"sizes must be positive and bounds ordered: h {h}, w {w}, {bounds}")
    if max(h, w) > 200 * min(h, w):
        raise ValueError(f"the sides of an image may differ by a factor of 200, got {h} x {w}")
    # Python rounds half to even, and so does the official function
    new_h, new_w = (max(factor, round(side / factor) * factor) for side in (h, w))
    if new_h * new_w > max_pixels:
        beta = math.sqrt(h * w / max_pixels)
        new_h, new_w = (max(factor, math.floor(s / beta / factor) * factor) for s in (h, w))
    elif new_h * new_w < min_pixels:
        beta = math.sqrt(min_pixels / (h * w))
        new_h, new_w = (math.ceil(s * beta / factor) * factor for s in (h, w))
    return new_h, new_w


def bound_image(
    image: Image.Image, factor: int = 28, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """RGB image at the size of `smart_resize`, BICUBIC: what the AR model reads."""
    h, w = smart_resize(image.height, image.width, factor, min_pixels, max_pixels)
    return resize(image, h, w)


def resize(image: Image.Image, h: int, w: int, how: int = Image.Resampling.BICUBIC) -> Image.Image:
    """RGB image at h x w: first the width, then the height. Pillow 13 alone may turn them round."""
    image = to_rgb(image)
    return image.resize((w, image.height), how).resize((w, h), how)


def reference_view(image: Image.Image, size: int) -> Image.Image:
    """RGB image squeezed to size x size, BILINEAR: the source as the editing decoder reads it."""
    return resize(image, size, size, Image.Resampling.BILINEAR)


def center_crop_view(image: Image.Image, size: int) -> Image.Image:
    """RGB center square at size x size, BICUBIC: a training target."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return resize(image.crop((left, top, left + side, top + side)), size, size)


def patch_rows(
    images: Tensor, patch_size: int = 14, merge_size: int = 2, temporal_patch_size: int = 2
) -> tuple[Tensor, Tensor]:
    """Equal-sized images [B, 3, H, W] in [0, 1] -> (pixel_values [N, 3*2*14*14], grid_thw [B, 3]).

    Rows have the natural order of the vision tower, columns are (c, t, p, q). Differentiable.
    """
    unit = patch_size * merge_size
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be float [B, 3, H, W], got {describe(images)}")
    n, _, height, width = images.shape
    if not images.numel() or height % unit or width % unit:
        raise ValueError(f"sides must be multiples of {unit}, B >= 1: got {tuple(images.shape)}")
    mean, std = images.new_tensor((MEAN, STD))[..., None, None]
    # (h w) counts merged units, (i j) the patches of a unit; t repeats the one frame
    pattern = "B c (h i p) (w j q) -> (B h w i j) (c t p q)"
    sizes = {"i": merge_size, "j": merge_size, "p": patch_size, "q": patch_size}
    rows = repeat((images - mean) / std, pattern, t=temporal_patch_size, **sizes)
    grid = torch.tensor([[1, height // patch_size, width // patch_size]] * n, device="cpu")
    return rows, grid


def to_patches(image: ImageLike | Sequence[ImageLike], *sizes: int) -> tuple[Tensor, Tensor]:
    """One image or several -> (pixel_values [N, 3*2*14*14] fp32, grid_thw [n, 3]).

    Sides must be multiples of 28 (see `bound_image`). `sizes` are the last three of `patch_rows`.
    """
    images = image if isinstance(image, list | tuple) else [image]
    if not images:
        raise ValueError("to_patches needs at least one image")
    runs = groupby(map(to_unit_range, images), key=lambda x: x.shape)  # images of one size
    parts = [patch_rows(torch.stack(list(run)), *sizes) for _, run in runs]
    pixel_values, grid_thw = zip(*parts, strict=True)
    return torch.cat(pixel_values), torch.cat(grid_thw)


def to_unit_range(image: ImageLike) -> Tensor:
    """PIL image or uint8 [H, W, 3] -> fp32 [3, H, W] in [0, 1]."""
    if isinstance(image, Image.Image):
        image = np.array(to_rgb(image))
    pixels = torch.as_tensor(image, device="cpu")
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"an image must be PIL or uint8 [H, W, 3], got {describe(pixels)}")
    return rearrange(pixels, "H W c -> c H W").float() * (1 / 255)


def to_latent_image(image: Image.Image, h: int, w: int) -> Tensor:
    """RGB image resized (BICUBIC) to h x w -> [1, 3, h, w] in [-1, 1], for the autoencoder."""
    return to_unit_range(resize(image, h, w))[None] * 2 - 1


def to_image(x: Tensor) -> Image.Image:
    """[3, H, W] or [1, 3, H, W] in [-1, 1] (clipped) -> PIL RGB; truncates, as officially."""
    if x.ndim not in (3, 4) or x.shape[-3] != 3 or x.numel() != x.shape[-3:].numel():
        raise ValueError(f"to_image takes [3, H, W] or [1, 3, H, W], got {describe(x)}")
    if n := int((~x.isfinite()).sum()):
        reason = "the weights are broken, or their dtype is too narrow"
        raise ValueError(f"an image of {tuple(x.shape)} has {n} NaN or infinite values: {reason}")
    pixels = (x.detach().float() / 2 + 0.5).clamp(0, 1) * 255
    pixels = rearrange(pixels.reshape(x.shape[-3:]), "c H W -> H W c")
    return Image.fromarray(pixels.to(device="cpu", dtype=torch.uint8).contiguous().numpy())


def describe(x: Tensor | np.ndarray) -> str:
    """Type and shape for an error message."""
    return f"{x.dtype} {list(x.shape)}"


def load_image(
    source: str | os.PathLike | bytes | Image.Image | np.ndarray, max_pixels: int | None = None
) -> Image.Image:
    """A path, the bytes of a file, a PIL image or an array -> upright RGB image.

    Transparency is laid over white; an animation gives its first frame. Any failure is a ValueError
    of one line. `max_pixels` (of a file, by default 50 million) is checked before decoding.
    """
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else type(source).__name__
    try:
        if isinstance(source, np.ndarray):
            source = from_array(source)
        if isinstance(source, Image.Image):
            return decode_image(source, max_pixels)
        with open_image(source) as image:
            return decode_image(image, max_pixels)
    except Exception as error:  # Pillow's decoders raise a dozen kinds on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot read image {name!r}: {reason}") from error


def open_image(source: str | os.PathLike | bytes) -> Image.Image:
    """Read the header of a file or of its bytes; pixels are decoded later."""
    if isinstance(source, bytes | bytearray | memoryview):
        source = io.BytesIO(source)
    elif not isinstance(source, str | os.PathLike):
        raise ValueError("expected a path, bytes, a PIL image or an array")
    elif not Path(source).is_file():  # a pipe or a device would block
        raise ValueError("it is not a file" if Path(source).exists() else "no such file")
    Image.init()  # fills Image.OPEN; an older Pillow lacks some formats
    with warnings.catch_warnings():  # about many pixels: `decode_image` refuses them itself
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])


def decode_image(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """Check the size, decode, apply the EXIF orientation, convert to RGB."""
    if max_pixels is None:  # a PIL image without `tile` is already decoded
        max_pixels = MAX_FILE_PIXELS if getattr(image, "tile", None) else math.inf
    if not 0 < image.width * image.height <= max_pixels:
        raise ValueError(f"{image.width} x {image.height} is not within 1..{max_pixels} pixels")
    with warnings.catch_warnings():  # about a part that is larger than the header's size
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image.load()
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:  # broken EXIF fails in many ways; the image is still good
            image = image.copy()
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB (itself if it is); transparency over white, high bit depths to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return to_8_bits(image).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "PA"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Modes I;16, I and F -> L; values out of range are clipped."""
    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    # I and F do not state their range: take the smallest usual one that holds the values
    ranges = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
    top = next((r for r in ranges if values.max() <= r), 65535)
    return Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))


def from_array(array: np.ndarray) -> Image.Image:
    """[H, W] or [H, W, 1..4] of bool, uint8, uint16 or float in [0, 1] -> PIL."""
    array = array[..., 0] if array.shape[2:] == (1,) else array
    if array.ndim < 2 or array.shape[2:] not in ((), (2,), (3,), (4,)) or not array.size:
        raise ValueError(f"an array must be [H, W] or [H, W, 1..4], got {describe(array)}")
    if array.dtype == bool or array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"floats must lie in [0, 1], got {array.min()} to {array.max()}")
        array = (array.astype(np.float32) * 255).round()
    elif array.dtype == np.uint16:
        array = (array / 257).round()
    elif array.dtype != np.uint8:
        raise ValueError(f"an array must be bool, uint8, uint16 or float, got {describe(array)}")
    return Image.fromarray(array.astype(np.uint8))
