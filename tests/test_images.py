"""Preprocessing: the official fixture, both patch paths, and images of every brokenness."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import golden
from PIL import Image, PngImagePlugin

from nexus_min import images as images_module
from nexus_min.images import (
    bound_image,
    center_crop_view,
    load_image,
    patch_rows,
    reference_view,
    resize,
    smart_resize,
    to_image,
    to_latent_image,
    to_patches,
)

WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)


@pytest.fixture(scope="module")
def official():
    return golden("02")


def sample_image(h: int, w: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def gradient(kind: int, w: int, h: int) -> Image.Image:
    """The fixture's integer gradients."""
    y, x = np.mgrid[:h, :w]
    if kind == 0:
        rgb = x * 255 // (w - 1), y * 255 // (h - 1), (3 * (x + y)) % 256
    else:
        rgb = (
            (5 * x + 3 * y + x * y // 64) % 256,
            (3 * x + 255 - y % 256) % 256,
            ((x * x + y * y) // 128) % 256,
        )
    return Image.fromarray(np.stack(rgb, axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# ---- parity ------------------------------------------------------------------------------------


def test_parity_smart_resize_table(official):
    tensors, meta = official
    table = tensors["out/smart_resize_table"].tolist()
    assert len(table) == 36
    for h, w, max_pixels, *want in table:
        got = smart_resize(h, w, min_pixels=meta["config"]["min_pixels"], max_pixels=max_pixels)
        assert list(got) == want, (h, w, max_pixels)


@pytest.mark.parametrize("i", range(3))
def test_parity_small_images(official, assert_parity, i):
    tensors, meta = official
    image = Image.fromarray(tensors[f"in/image{i}_hwc_uint8"].numpy())
    bounded = bound_image(image)
    assert list(bounded.size) == meta["notes"]["small"][i]["bounded_wh"]
    want = tensors[f"out/image{i}_bounded_hwc_uint8"]
    assert_parity("image processor", f"02 image{i} bounded", np.array(bounded), want, 0)
    rows, grid = to_patches(bounded)
    assert torch.equal(grid, tensors[f"out/image{i}_grid_thw"]) and grid.dtype == torch.int64
    assert_parity(
        "image processor", f"02 image{i} rows", rows, tensors[f"out/image{i}_pixel_values"]
    )


@pytest.mark.parametrize("i", range(2))
def test_parity_big_images(official, assert_parity, i):
    tensors, meta = official
    note = meta["notes"]["big"][i]
    image = gradient(note["gradient_kind"], *note["size_wh"])
    assert hashlib.sha256(image.tobytes()).hexdigest() == note["input_sha256"]
    bounded = bound_image(image)
    assert list(bounded.size) == note["bounded_wh"]
    assert hashlib.sha256(bounded.tobytes()).hexdigest() == note["bounded_sha256"]
    rows, grid = to_patches(bounded)
    assert grid.tolist() == note["grid_thw"]
    want = tensors[f"out/big{i}_rows"]
    assert_parity("image processor", f"02 big{i} rows", rows[tensors[f"out/big{i}_rows_idx"]], want)
    means = tensors[f"out/big{i}_sum_per_row_f64"] / rows.shape[1]
    assert_parity("image processor", f"02 big{i} row means", rows.double().mean(1), means)


def test_parity_reference_view(official, assert_parity):
    tensors, _ = official
    view = reference_view(Image.fromarray(tensors["in/image0_hwc_uint8"].numpy()), 56)
    want = tensors["out/ref_bilinear56_hwc_uint8"]
    assert_parity("image processor", "02 reference view", np.array(view), want, 0)
    rows, _ = to_patches(view)
    assert_parity(
        "image processor", "02 reference rows", rows, tensors["out/ref_bilinear56_pixel_values"]
    )


@pytest.mark.parametrize("size,name", [(252, "target252"), (504, "source504")])
def test_parity_wide(official, size, name):
    """To the byte, whatever Pillow's order: a training target and source that are not square."""
    wide = Image.fromarray(official[0]["in/wide_hwc_uint8"].numpy())
    digest = hashlib.sha256(resize(wide, size, size).tobytes()).digest()
    assert digest == bytes(official[0][f"out/{name}_sha256"].tolist())


def test_parity_white_target(official, assert_parity):
    tensors, _ = official
    rows, grid = to_patches(Image.new("RGB", (252, 252), "white"))
    assert torch.equal(grid, tensors["out/white252_grid"])
    assert_parity("image processor", "02 white row", rows[0], tensors["out/white252_row0"])


# ---- sizes -------------------------------------------------------------------------------------


def test_smart_resize_stays_within_bounds():
    for h, w in [(1, 200), (7, 1000), (5000, 26), (513, 511), (4000, 3000)]:
        new_h, new_w = smart_resize(h, w)
        assert new_h % 28 == new_w % 28 == 0
        assert 3136 <= new_h * new_w <= 262640


@pytest.mark.parametrize(
    "args, message",
    [
        ((1, 201), "1 x 201"),
        ((402, 2), "402 x 2"),
        ((0, 5), "h 0"),
        ((5, -1), "w -1"),
        ((5, 5, 28, 100, 99), "max_pixels 99"),
    ],
)
def test_smart_resize_errors(args, message):
    with pytest.raises(ValueError, match=message):
        smart_resize(*args)


def test_center_crop_view_takes_the_middle():
    image = Image.new("RGB", (90, 30), "red")
    image.paste("blue", (30, 0, 60, 30))
    assert center_crop_view(image, 14).getcolors() == [(196, (0, 0, 255))]
    assert center_crop_view(image.rotate(90, expand=True), 14).getcolors() == [(196, (0, 0, 255))]


# ---- patches -----------------------------------------------------------------------------------


def test_batched_path_equals_pil_path():
    images = [sample_image(56, 84, seed) for seed in range(4)]
    batch = torch.stack([torch.from_numpy(np.array(x)) for x in images]).permute(0, 3, 1, 2) / 255
    rows, grid = patch_rows(batch)
    want_rows, want_grid = to_patches(images)
    assert torch.equal(grid, want_grid) and grid.tolist() == [[1, 4, 6]] * 4
    torch.testing.assert_close(rows, want_rows, atol=1e-6, rtol=0)


def test_images_of_several_sizes_and_types_are_concatenated():
    images = [sample_image(56, 84), sample_image(28, 28, 1)]
    rows, grid = to_patches([np.array(images[0]), torch.from_numpy(np.array(images[1]))])
    parts = [to_patches(x) for x in images]
    assert torch.equal(rows, torch.cat([p[0] for p in parts]))
    assert grid.tolist() == [[1, 4, 6], [1, 2, 2]]


def test_row_order_and_columns():
    """Patch k of the natural order, spelled out: 2x2 units row by row, columns (c, t, p, p)."""
    image = torch.rand(1, 3, 56, 84)
    rows, _ = patch_rows(image)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    k = 0
    for top, left in [(0, 0), (0, 28), (0, 56), (28, 0), (28, 28), (28, 56)]:
        for y, x in [(0, 0), (0, 14), (14, 0), (14, 14)]:
            patch = image[0, :, top + y :, left + x :][:, :14, :14]
            want = ((patch - mean) / std)[:, None].expand(3, 2, 14, 14).flatten()
            torch.testing.assert_close(rows[k], want)
            k += 1
    assert k == len(rows)


def test_patch_rows_are_differentiable():
    image = torch.rand(2, 3, 28, 56, requires_grad=True)
    patch_rows(image)[0].sum().backward()
    want = 2 / torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)  # two frames
    torch.testing.assert_close(image.grad, want.expand(2, 3, 28, 56))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: patch_rows(torch.zeros(1, 3, 30, 28)), "30, 28"),
        (lambda: patch_rows(torch.zeros(3, 28, 28)), r"\[3, 28, 28\]"),
        (lambda: patch_rows(torch.zeros(1, 4, 28, 28)), r"\[1, 4, 28, 28\]"),
        (lambda: patch_rows(torch.zeros(1, 3, 28, 28, dtype=torch.uint8)), "uint8"),
        (lambda: patch_rows(torch.zeros(0, 3, 28, 28)), "B >= 1"),
        (lambda: to_patches([]), "at least one"),
        (lambda: to_patches(sample_image(28, 27)), "28, 27"),
        (lambda: to_patches(np.zeros((28, 28, 3), np.float32)), "float32"),
        (lambda: to_patches(np.zeros((3, 28, 28), np.uint8)), r"\[3, 28, 28\]"),
        (lambda: to_image(torch.zeros(2, 3, 4, 4)), r"\[2, 3, 4, 4\]"),
        (lambda: to_image(torch.zeros(1, 4, 4)), r"\[1, 4, 4\]"),
        (lambda: to_image(torch.full((3, 4, 4), torch.nan)), "48 NaN"),
    ],
)
def test_wrong_inputs_name_the_sizes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- autoencoder side --------------------------------------------------------------------------


def test_to_latent_image_range_and_layout():
    image = Image.new("RGB", (10, 6), RED)
    x = to_latent_image(image, 16, 32)
    assert x.shape == (1, 3, 16, 32)
    assert x[0, 0].min() == 1 and x[0, 1:].max() == -1


def test_to_image_truncates_and_clips():
    x = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0])  # 0.5 * 255 = 127.5 -> 127
    image = to_image(x.expand(3, 2, 5))
    assert image.size == (5, 2) and image.mode == "RGB"
    assert np.array(image)[0, :, 0].tolist() == [0, 0, 127, 255, 255]
    assert np.array_equal(np.array(to_image(x.expand(1, 3, 2, 5).bfloat16())), np.array(image))


def test_latent_image_round_trip_within_one_level():
    image = sample_image(24, 40)
    back = np.array(to_image(to_latent_image(image, 24, 40)), dtype=int)
    assert np.abs(back - np.array(image, dtype=int)).max() <= 1  # truncation may lose one


# ---- load_image: modes -------------------------------------------------------------------------


def gray16(value: int) -> Image.Image:
    return Image.fromarray(np.full((4, 6), value, np.uint16))


def palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (6, 4), 1)
    image.putpalette([*BLACK, *RED])
    if transparent:
        image.info["transparency"] = 1
    return image


MODES = {
    "RGB": (Image.new("RGB", (6, 4), RED), RED),
    "RGBA opaque": (Image.new("RGBA", (6, 4), (255, 0, 0, 255)), RED),
    "RGBA clear": (Image.new("RGBA", (6, 4), (255, 0, 0, 0)), WHITE),
    "RGBA half": (Image.new("RGBA", (6, 4), (0, 0, 0, 51)), (204, 204, 204)),
    "RGBa": (Image.new("RGBA", (6, 4), (0, 0, 0, 51)).convert("RGBa"), (204, 204, 204)),
    "L": (Image.new("L", (6, 4), 90), (90, 90, 90)),
    "LA": (Image.new("LA", (6, 4), (0, 51)), (204, 204, 204)),
    "La": (Image.new("LA", (6, 4), (0, 51)).convert("La"), (204, 204, 204)),
    "PA": (palette(False).convert("PA"), RED),
    "P": (palette(False), RED),
    "P clear": (palette(True), WHITE),
    "CMYK": (Image.new("CMYK", (6, 4), (0, 255, 255, 0)), RED),
    "YCbCr": (Image.new("YCbCr", (6, 4), (90, 128, 128)), (90, 90, 90)),
    "HSV": (Image.new("HSV", (6, 4), (0, 255, 255)), RED),
    "1": (Image.new("1", (6, 4), 1), WHITE),
    "I;16": (gray16(90 * 257), (90, 90, 90)),
    "I;16 dark": (gray16(200), (1, 1, 1)),
    "I;16B": (Image.frombytes("I;16B", (6, 4), b"\x5a\x5a" * 24), (90, 90, 90)),
    "I 8 bits": (Image.new("I", (6, 4), 90), (90, 90, 90)),
    "I 16 bits": (Image.new("I", (6, 4), 90 * 257), (90, 90, 90)),
    "I out of range": (Image.new("I", (6, 4), 1 << 20), WHITE),
    "I negative": (Image.new("I", (6, 4), -5), BLACK),
    "F unit": (Image.new("F", (6, 4), 0.2), (51, 51, 51)),
    "F 8 bits": (Image.new("F", (6, 4), 51.0), (51, 51, 51)),
    "F NaN": (Image.new("F", (6, 4), float("nan")), BLACK),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    image, color = MODES[mode]
    got = load_image(image)
    assert got.mode == "RGB" and got.size == (6, 4)
    assert got.getcolors() == [(24, color)]


@pytest.mark.parametrize("mode", Image.MODES)
def test_no_mode_of_pillow_is_left_out(mode):
    got = load_image(Image.new(mode, (6, 4)))
    assert got.mode == "RGB" and got.size == (6, 4) and len(got.getcolors()) == 1


def test_rgb_with_a_transparent_color():
    image = Image.new("RGB", (6, 4), RED)
    got = load_image(encoded(image, transparency=RED))
    assert got.getcolors() == [(24, WHITE)]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG", "PPM"])
def test_formats_from_bytes_and_file(kind, tmp_path):
    image = Image.new("RGB", (6, 4), (250, 250, 250))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(image, kind, **options)
    (tmp_path / "image.of.any.name").write_bytes(data)
    sources = (
        data,
        bytearray(data),
        tmp_path / "image.of.any.name",
        str(tmp_path / "image.of.any.name"),
    )
    for source in sources:
        assert load_image(source).getcolors() == [(24, (250, 250, 250))]


def test_png_of_16_bits():
    assert load_image(encoded(gray16(90 * 257))).getcolors() == [(24, (90, 90, 90))]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation_gives_the_first_frame(kind):
    frames = [Image.new("RGB", (6, 4), c) for c in (WHITE, BLACK)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert load_image(data).getcolors() == [(24, WHITE)]


# EXIF orientation -> size seen, and where the dark top left quarter of 16 x 8 is seen
TURNS = {
    1: ((16, 8), "top left"),
    2: ((16, 8), "top right"),
    3: ((16, 8), "bottom right"),
    4: ((16, 8), "bottom left"),
    5: ((8, 16), "top left"),
    6: ((8, 16), "top right"),
    7: ((8, 16), "bottom right"),
    8: ((8, 16), "bottom left"),
    9: ((16, 8), "top left"),  # no such orientation
}


@pytest.mark.parametrize("turn", TURNS)
def test_exif_orientation_is_applied(turn):
    image, exif = Image.new("RGB", (16, 8), "white"), Image.Exif()
    image.paste("black", (0, 0, 8, 4))
    exif[0x0112] = turn
    got, ((w, h), where) = load_image(encoded(image, "PNG", exif=exif)), TURNS[turn]
    assert got.size == (w, h)
    corners = {"left": w // 4, "right": 3 * w // 4}, {"top": h // 4, "bottom": 3 * h // 4}
    dark = [f"{v} {u}" for u, x in corners[0].items() for v, y in corners[1].items()
            if got.getpixel((x, y)) == BLACK]  # fmt: skip
    assert dark == [where]


def test_broken_exif_is_ignored():
    data = encoded(Image.new("RGB", (6, 4), "white"), "JPEG", exif=b"Exif\0\0not a tiff at all")
    assert load_image(data).getcolors() == [(24, WHITE)]


def test_the_callers_image_is_left_alone():
    image = sample_image(8, 8)
    load_image(image).paste("red", (0, 0, 8, 8))
    assert np.array_equal(np.array(image), np.array(sample_image(8, 8)))


@pytest.mark.parametrize(
    "array, color",
    [
        (np.full((4, 6), 90, np.uint8), (90, 90, 90)),
        (np.full((4, 6, 1), 90, np.uint8), (90, 90, 90)),
        (np.full((4, 6, 3), 90, np.uint8), (90, 90, 90)),
        (np.full((4, 6, 2), (0, 51), np.uint8), (204, 204, 204)),
        (np.full((4, 6, 4), (0, 0, 0, 51), np.uint8), (204, 204, 204)),
        (np.full((4, 6, 3), 0.2), (51, 51, 51)),
        (np.full((4, 6), True), WHITE),
        (np.full((4, 6, 3), 65535, np.uint16), WHITE),
    ],
)
def test_arrays(array, color):
    assert load_image(array).getcolors() == [(24, color)]


# ---- load_image: what cannot be read -----------------------------------------------------------


def png_header(w: int, h: int) -> bytes:
    """A PNG that claims w x h pixels and holds none."""

    def chunk(tag: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def flipped(data: bytes) -> bytes:
    """The same file with a damaged middle."""
    middle = len(data) // 2
    return data[:middle] + bytes(b ^ 0xFF for b in data[middle : middle + 40]) + data[middle + 40 :]


BROKEN = {
    "empty": b"",
    "text": b"this is not an image\nat all",
    "truncated PNG": encoded(sample_image(40, 40))[:2000],
    "truncated JPEG": encoded(sample_image(40, 40), "JPEG")[:700],
    "truncated GIF": encoded(sample_image(40, 40), "GIF")[:1000],
    "truncated WEBP": encoded(sample_image(40, 40), "WEBP")[:300],
    "damaged PNG": flipped(encoded(sample_image(40, 40))),
    "no pixels": png_header(6, 4),
    "zero size": png_header(0, 4),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n%%EndComments\nshowpage\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_one_clear_line(kind, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(ValueError, match="broken.png") as from_file:
        load_image(path)
    with pytest.raises(ValueError, match="bytes") as from_bytes:
        load_image(BROKEN[kind])
    assert "\n" not in str(from_file.value) + str(from_bytes.value)


@pytest.mark.parametrize("size", [(8000, 8000), (12_000, 10_000), (60_000, 60_000)])
@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_size_is_checked_before_decoding(size):
    """The file holds no pixels at all, yet the error is about its size, without a warning."""
    with pytest.raises(ValueError, match="exceeds limit|not within"):
        load_image(png_header(*size))


def test_size_limit_is_a_parameter():
    assert load_image(sample_image(5, 10), max_pixels=50).size == (10, 5)
    for source in (sample_image(5, 10), encoded(sample_image(5, 10))):
        with pytest.raises(ValueError, match=r"10 x 5 is not within 1\.\.49"):
            load_image(source, max_pixels=49)
    with pytest.raises(ValueError, match="cannot read image") as error:  # no pixels: it was tried
        load_image(png_header(10_000, 6000), max_pixels=60_000_000)
    assert "not within" not in str(error.value)


def test_the_default_limit_is_for_what_is_yet_to_be_decoded(monkeypatch):
    monkeypatch.setattr(images_module, "MAX_FILE_PIXELS", 49)
    image = load_image(sample_image(5, 10))
    with pytest.raises(ValueError, match=r"10 x 5 is not within 1\.\.49"):
        load_image(encoded(image))
    lazy = Image.open(io.BytesIO(encoded(image)))
    with pytest.raises(ValueError, match=r"10 x 5 is not within 1\.\.49"):
        load_image(lazy)


def test_a_bomb_met_while_decoding_is_an_error(monkeypatch):
    """A part that is larger than the header said: Pillow warns, and would go on."""

    def load(self):
        warnings.warn("a decompression bomb", Image.DecompressionBombWarning, stacklevel=2)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(ValueError, match="cannot read image 'bytes': a decompression bomb"):
        load_image(encoded(sample_image(5, 10)))


@pytest.mark.parametrize("chunk", [b"zTXt", b"iCCP"])
def test_a_bomb_of_text(chunk):
    """64 MB of zeros in 64 KB of a text or of a color profile."""
    body = b"name\0\0" + zlib.compress(bytes(1 << 26))
    text = struct.pack(">I", len(body)) + chunk + body + struct.pack(">I", zlib.crc32(chunk + body))
    whole = encoded(sample_image(5, 10))
    tracemalloc.start()
    try:
        assert load_image(whole[:33] + text + whole[33:]).size == (10, 5)
    except ValueError as error:
        assert "\n" not in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize(
    "source, message",
    [
        ("no/such/file.png", "no/such/file.png.*no such file"),
        ("", "not a file|no such file"),
        ("nul\0byte.png", "cannot read image"),
        ("x" * 5000, "cannot read image"),
        (None, "NoneType.*expected a path"),
        (7, "int.*expected a path"),
        (Image.new("RGB", (0, 5)), "0 x 5"),
        (np.zeros((4, 6, 5), np.uint8), r"\[4, 6, 5\]"),
        (np.zeros((0, 6, 3), np.uint8), r"\[0, 6, 3\]"),
        (np.zeros(5, np.uint8), r"\[5\]"),
        (np.full((4, 6, 3), 2.0), r"\[0, 1\]"),
        (np.full((4, 6, 3), np.nan), r"\[0, 1\]"),
        (np.zeros((4, 6, 3), np.int64), "int64"),
        (np.zeros((4, 6, 3), complex), "complex"),
    ],
)
def test_wrong_sources_are_one_clear_line(source, message):
    with pytest.raises(ValueError, match=message) as error:
        load_image(source)
    assert "\n" not in str(error.value)


def test_directory_and_pipe(tmp_path):
    with pytest.raises(ValueError, match="it is not a file"):
        load_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="it is not a file"):  # opening it would block for ever
        load_image(tmp_path / "pipe.png")


def test_closed_image(tmp_path):
    sample_image(4, 4).save(tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    image.close()
    with pytest.raises(ValueError, match="PngImageFile"):
        load_image(image)
