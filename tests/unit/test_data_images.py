"""Faults and properties of `vugen.data.images`: every kind of picture a person may hand over."""
import io
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from vugen.data.images import (MAX_PIXELS, center_crop, fit_square, grid, load_image, photograph_path, sample_photographs, save_png, to_pil, to_tensor)
from vugen.errors import UserError

RAMP = np.linspace(0, 255, 64, dtype=np.uint8)[None].repeat(40, 0)
COLOURS = np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 90)], 2)


def encoded(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def one_bit_png(width, height):
    packer, row = zlib.compressobj(9), b"\0" + b"\xff" * (-(-width // 8))
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_lossless_formats_come_back_exactly(format):
    image = Image.fromarray(COLOURS)
    assert np.array_equal(np.array(load_image(encoded(image, format))), COLOURS)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF"])
def test_lossy_formats_come_back_nearly(format):
    got = np.array(load_image(encoded(Image.fromarray(COLOURS), format, quality=95))).astype(int)
    assert abs(got - COLOURS).mean() < 6


def test_sixteen_bit_grey_is_scaled_not_clipped():
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    for format in ("PNG", "TIFF"):
        assert np.array_equal(np.array(load_image(encoded(deep, format)))[:, :, 0], RAMP)


def test_sixteen_bit_rgb_png_is_scaled():
    rows = b"".join(b"\0" + struct.pack(">" + "HHH" * 4, *([65535, 32896, 0] * 4)) for _ in range(4))
    data = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert load_image(data).getpixel((1, 1)) == (255, 128, 0)


def test_float_tiff_is_stretched_over_its_range():
    unit = Image.fromarray((RAMP / 255).astype(np.float32))
    assert np.array_equal(np.array(load_image(encoded(unit, "TIFF")))[:, :, 0], RAMP)


def test_cmyk_jpeg_keeps_its_colours():
    got = np.array(load_image(encoded(Image.fromarray(COLOURS).convert("CMYK"), "JPEG", quality=95))).astype(int)
    assert abs(got - COLOURS).mean() < 8


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_white(mode):
    image = Image.new(mode, (4, 4), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    image.paste((0, 0, 0, 255) if mode == "RGBA" else (0, 255), (0, 0, 2, 4))
    got = np.array(load_image(encoded(image, "PNG")))
    assert (got[:, 2:] == 255).all() and (got[:, :2] == 0).all()


def test_palette_with_one_transparent_entry_is_laid_over_white():
    image = Image.new("P", (4, 2), 0)
    image.putpalette([0, 0, 0, 200, 30, 30])
    image.paste(1, (0, 0, 2, 2))
    for format in ("PNG", "GIF"):
        got = np.array(load_image(encoded(image, format, transparency=0)))
        assert (got[:, 2:] == 255).all() and (got[:, :2] == (200, 30, 30)).all()


def test_rgb_with_a_transparent_colour_is_laid_over_white():
    data = encoded(Image.new("RGB", (3, 3), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert (np.array(load_image(data)) == 255).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black", "red")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (np.array(load_image(data)) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    "The red corner is where a viewer shows it"
    upright = np.zeros((30, 60, 3), np.uint8)
    upright[:15, :20] = (255, 0, 0)
    undo = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}[orientation]
    image = Image.fromarray(upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image.transpose(undo) if undo is not None else image
    for format, options in (("PNG", {}), ("JPEG", {"quality": 95})):
        got = np.array(load_image(encoded(stored, format, exif=exif, **options))).astype(int)
        assert got.shape == upright.shape and abs(got - upright).mean() < 6


def test_one_bit_and_grey_become_rgb():
    assert load_image(encoded(Image.new("1", (3, 3), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(Image.new("L", (3, 3), 77), "PNG")).getpixel((0, 0)) == (77, 77, 77)


@pytest.mark.parametrize("format,share", [("PNG", .5), ("JPEG", .5), ("JPEG", .9), ("GIF", .5), ("WEBP", .5), ("BMP", .5), ("PNG", .1)])
def test_truncated_files_are_refused(tmp_path, format, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, format)
    file = tmp_path / f"half.{format.lower()}"
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=f"half.{format.lower()}"): load_image(file)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_never_raise_anything_but_a_user_error(seed):
    generator = np.random.default_rng(seed)
    format = ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO"][seed % 8]
    data = bytearray(encoded(Image.fromarray(COLOURS), format))
    for place in generator.integers(0, len(data), 12): data[place] = generator.integers(0, 256)
    try: assert load_image(bytes(data)).mode == "RGB"
    except UserError as error: assert str(error).endswith(".")


@pytest.mark.parametrize("content,words", [
    (b"", "0 bytes"), (b"\x00\x01\x02garbage", "cannot be read"), (b"<svg></svg>", "SVG"), (b"<?xml version='1.0'?>\n<svg/>", "SVG"),
    (b"<!DOCTYPE html><p>", "web page"), (b"%PDF-1.7", "PDF"), (b"version https://git-lfs.github.com/spec/v1", "lfs pull"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read")])
def test_files_that_are_no_pictures_are_named(tmp_path, content, words):
    file = tmp_path / "upload.png"
    file.write_bytes(content)
    for source in (file, str(file), content):
        with pytest.raises(UserError, match=words): load_image(source)
    with pytest.raises(UserError, match="upload.png"): load_image(file)


@pytest.mark.parametrize("source,words", [("nowhere/cat.png", "does not exist"), ("https://example.org/cat.png", "web address"), (".", "folder"),
                                          (3, "int"), (None, "NoneType"), (np.zeros((2, 2, 7)), "shape"), (np.zeros((0, 4)), "shape")])
def test_things_that_are_no_files(source, words):
    with pytest.raises(UserError, match=words): load_image(source)


@pytest.mark.parametrize("width,height", [(10_000, 10_000), (20_000, 20_000), (60_000, 2_000)])
def test_bombs_are_refused_from_the_header(width, height):
    data, began = one_bit_png(width, height), time.perf_counter()
    tracemalloc.start()
    with pytest.raises(UserError, match="million pixels"): load_image(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.perf_counter() - began < 0.5 and peak < 5e6


def test_a_long_narrow_picture_is_scaled_down():
    assert load_image(one_bit_png(10_000, 20)).size == (2048, 4)
    assert load_image(one_bit_png(20, 10_000)).size == (4, 2048)
    assert load_image(one_bit_png(10_000, 1), max_side=100).size == (100, 1)
    assert 10_000 * 20 < MAX_PIXELS


def test_the_limit_holds_for_pillow_images_and_arrays_too():
    for source in (Image.new("RGB", (20, 20)), np.zeros((20, 20, 3), np.uint8), encoded(Image.new("RGB", (20, 20)), "PNG")):
        with pytest.raises(UserError, match="limit"): load_image(source, max_pixels=399)
        assert load_image(source, max_pixels=400).size == (20, 20)


def test_the_source_is_left_as_it_was():
    image = Image.new("RGBA", (3, 3), (0, 0, 0, 0))
    load_image(image)
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (0, 0, 0, 0)


@pytest.mark.parametrize("size", [(32, 32), (200, 100), (7, 300), (1, 1)])
@pytest.mark.parametrize("crop", [True, False])
def test_tensors_are_square_and_in_range(size, crop):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    tensor = to_tensor(image, 48, crop)
    assert tensor.shape == (1, 3, 48, 48) and tensor.dtype == torch.float32 and 0 <= tensor.min() and tensor.max() <= 1


def test_shrinking_is_antialiased():
    stripes = Image.fromarray(np.tile(np.array([[[0] * 3, [255] * 3]], np.uint8), (64, 32, 1)))
    assert abs(to_tensor(stripes, 8) - 0.5).max() < 0.02


def test_padding_keeps_the_whole_picture_and_cropping_its_shape():
    tall = Image.fromarray(np.zeros((90, 30, 3), np.uint8))
    assert np.array(fit_square(tall, 30, False)).mean() == pytest.approx(255 * 2 / 3, abs=1)
    assert np.array(fit_square(tall, 30, True)).max() == 0


def test_tensor_and_picture_are_inverse():
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(np.array(to_pil(to_tensor(Image.fromarray(pixels), 16))), pixels)
    assert to_pil(torch.tensor([2.0, -1.0, 0.5]).view(3, 1, 1)).getpixel((0, 0)) == (255, 0, 128)


@pytest.mark.parametrize("tensor,words", [(torch.zeros(2, 3, 4, 4), "shape"), (torch.zeros(4, 4), "shape"), (torch.full((3, 2, 2), torch.inf), "not finite")])
def test_tensors_that_are_no_picture(tensor, words):
    with pytest.raises(UserError, match=words): to_pil(tensor)


def test_png_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.png"
    save_png(Image.new("RGB", (4, 4), "red"), path)
    before = path.read_bytes()

    class Broken:
        def save(self, file, format):
            open(file, "wb").write(b"half")
            raise RuntimeError("disk full")
    with pytest.raises(RuntimeError): save_png(Broken(), path)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_grid_places_pictures_in_reading_order():
    colours = ["red", "lime", "blue"]
    sheet = grid([Image.new("RGB", (8, 8), colour) for colour in colours], columns=2, height=16, gap=2)
    assert sheet.size == (38, 38)
    assert [sheet.getpixel(place) for place in ((5, 5), (25, 5), (5, 25))] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    with pytest.raises(UserError): grid([])
    with pytest.raises(ValueError): grid([Image.new("RGB", (8, 8))] * 2, labels=["one"])


def test_photographs_come_from_installed_packages_alone(monkeypatch):
    import socket
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("a connection was opened"))
    assert set(sample_photographs(("cat", "temple"))) == {"cat", "temple"}
    with pytest.raises(UserError, match="unicorn"): photograph_path("unicorn")


@pytest.mark.parametrize("width,height,size", [(64, 64, 16), (128, 64, 16), (64, 192, 32)])
def test_the_training_crop_averages_areas(width, height, size):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    cut = np.asarray(center_crop(Image.fromarray(pixels), size)).astype(float)
    factor, side = min(width, height) // size, min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    middle = pixels[top:top + side, left:left + side].astype(float)
    means = middle.reshape(size, factor, size, factor, 3).mean((1, 3))  # a power of two: the bicubic step has nothing to do
    assert cut.shape == (size, size, 3) and np.abs(cut - means).max() <= np.log2(factor)  # one rounding a halving


@pytest.mark.parametrize("width,height,size", [(37, 300, 32), (31, 20, 64), (1000, 999, 256), (65, 64, 64)])
def test_the_training_crop_gives_squares_of_any_picture(width, height, size):
    gradient = Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1))).convert("RGB")
    cut = np.asarray(center_crop(gradient, size))
    assert cut.shape == (size, size, 3) and abs(float(cut.mean()) - 127.5) < 3 and (np.diff(cut[size // 2, :, 0].astype(int)) >= -1).all()  # centred and not mirrored
