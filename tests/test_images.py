"""Decoding and resizing: right pixels from every format, a named refusal for everything else."""

import io
import random
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_adapt.data.images import _scale, decode, load_image, resize
from vlm_adapt.data.problems import Account, BadSample, Problem
from vlm_adapt.data.sample import parse_sample
from vlm_adapt.image_spec import ImageSpec

COCO = Path(__file__).parents[2] / "shared" / "data" / "coco_mini" / "images" / "val"


def picture(height=48, width=64, seed=0) -> np.ndarray:
    """A smooth coloured picture with some noise. uint8 HWC"""
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([255 * x / width, 255 * y / height, 128 + 100 * np.sin(x / 5)], axis=-1)
    return (base + np.random.default_rng(seed).normal(0, 8, base.shape)).clip(0, 255).astype(np.uint8)


def encode(image, format="PNG", **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["PNG", "BMP", "PPM", "TIFF"])
def test_lossless_formats_are_exact(format):
    assert np.array_equal(decode(encode(picture(), format)), picture())


def test_jpeg_equals_pil():
    data = encode(picture(), "JPEG", quality=90, subsampling=0)
    assert np.abs(decode(data).astype(int) - np.asarray(Image.open(io.BytesIO(data)))).max() <= 2


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": "4:1:1"}, {"keep_rgb": True}])
def test_unusual_jpegs(options):
    assert (
        np.abs(decode(encode(picture(), "JPEG", quality=95, **options)).astype(int) - picture()).mean() < 12
    )


def test_modes():
    rgb = Image.fromarray(picture())
    assert np.array_equal(decode(encode(rgb.convert("L")))[..., 0], np.asarray(rgb.convert("L")))
    palette = rgb.quantize(16)
    assert np.array_equal(decode(encode(palette)), np.asarray(palette.convert("RGB")))
    assert decode(encode(rgb.convert("1"))).shape == (48, 64, 3)
    cmyk = encode(rgb.convert("CMYK"), "JPEG", quality=95)
    assert np.array_equal(decode(cmyk), np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB")))
    assert np.abs(decode(cmyk).astype(int) - picture()).mean() < 15  # not a negative of it
    grey16 = Image.fromarray(np.arange(256 * 4, dtype=np.uint16).reshape(4, 256) * 64)
    assert np.array_equal(decode(encode(grey16))[..., 1], np.asarray(grey16) >> 8)


def test_transparency_shows_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2, :, 0], rgba[:2, :, 3] = 200, 255
    pixels = decode(encode(rgba))
    assert (pixels[:2] == (200, 0, 0)).all() and (pixels[2:] == 255).all()
    two = Image.new("P", (2, 1))
    two.putpalette([9, 9, 9, 50, 60, 70])
    two.putpixel((1, 0), 1)
    assert decode(encode(two, transparency=0)).tolist() == [[[255] * 3, [50, 60, 70]]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(
        picture(), format, exif=exif, **({"quality": 95, "subsampling": 0} if format == "JPEG" else {})
    )
    from PIL import ImageOps

    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert decode(data).shape == expected.shape
    assert np.abs(decode(data).astype(int) - expected).max() <= 2


def png_header(width, height) -> bytes:
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def jpeg_header(width, height) -> bytes:
    data = bytearray(encode(picture(), "JPEG"))
    place = data.find(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    "data", [png_header(50_000, 50_000), jpeg_header(50_000, 50_000), png_header(9600, 12000)]
)
def test_bombs_are_refused_by_their_header(data):
    began = time.process_time()
    with pytest.raises(BadSample, match="image too large"):
        decode(data)
    assert time.process_time() - began < 0.5  # decoding 2.5 Gpx would take minutes and 7.5 GB


def test_bad_files_are_named():
    jpeg, png = encode(picture(200, 200), "JPEG"), encode(picture())
    for data, reason in [
        (b"", "empty image file"),
        (b"just a text that someone called a.jpg", "not an image"),
        (jpeg[: len(jpeg) // 2], "damaged JPEG"),
        (jpeg[:20], "not an image|damaged"),
        (png[: len(png) // 2], "damaged PNG"),
        (b"\xff\xd8", "not an image|damaged"),
    ]:
        with pytest.raises(BadSample, match=reason):
            decode(data)


def test_fuzzed_files_raise_nothing_else():
    source = random.Random(0)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = encode(picture(), format)
        for _ in range(40):
            data = bytearray(whole)
            for _ in range(source.randrange(1, 20)):
                data[source.randrange(len(data))] = source.randrange(256)
            try:
                assert decode(bytes(data), max_pixels=10**6).dtype == np.uint8
            except BadSample:
                pass


def test_noise_in_a_jpeg_is_not_read_as_a_picture():
    source, refused, by_pil = random.Random(1), 0, 0
    whole = encode(picture(200, 200), "JPEG")
    for _ in range(50):
        data = bytearray(whole)
        for _ in range(20):
            data[source.randrange(700, len(data) - 2)] = source.randrange(256)
        try:
            decode(bytes(data))
        except BadSample:
            refused += 1
        try:
            Image.open(io.BytesIO(bytes(data))).load()
        except OSError:
            by_pil += 1
    # Noise can spell a valid stream, which nobody can tell from a picture; PIL minds almost none of it.
    assert refused >= 35 and by_pil <= 15


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("shape", [(300, 400), (40, 30), (64, 64)])
def test_squash_is_within_one_grey_level_of_pil(interpolation, shape):
    source = picture(*shape)
    pixels = resize(source, ImageSpec((64, 80), interpolation=interpolation))
    method = getattr(Image.Resampling, interpolation.upper())
    expected = np.asarray(Image.fromarray(source).resize((80, 64), method)).transpose(2, 0, 1)
    assert pixels.shape == (3, 64, 80) and pixels.dtype == np.uint8
    assert pixels.transpose(1, 2, 0).flags.c_contiguous
    assert np.abs(pixels.astype(int) - expected).max() <= 1  # torch rounds between its two passes


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (33, 100), (20, 21)])
def test_crop_equals_clip_preprocessing(shape):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    source = picture(*shape)
    clip = Compose([Resize(56, InterpolationMode.BICUBIC), CenterCrop(56)])
    expected = np.asarray(clip(Image.fromarray(source))).transpose(2, 0, 1)
    pixels = resize(source, ImageSpec((56, 56), resize="crop"))
    # Enlarging by bicubic overshoots; torch clips between its two passes and PIL after them: 2 seen.
    assert np.abs(pixels.astype(int) - expected).max() <= (1 if min(shape) > 56 else 2)


def test_pad_keeps_the_aspect_and_fills_with_the_mean():
    white = np.full((20, 40, 3), 255, np.uint8)
    pixels = resize(white, ImageSpec((32, 32), mean=(0.5, 0.25, 0.0), resize="pad"))
    assert (pixels[:, 8:24] == 255).all()
    assert all((pixels[c, [0, 7, 24, 31]] == value).all() for c, value in enumerate((128, 64, 0)))


@pytest.mark.parametrize("way", ["squash", "crop", "pad"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50_000), (50_000, 1), (10, 3000)])
def test_extreme_aspects(way, shape):
    assert resize(np.full((*shape, 3), 7, np.uint8), ImageSpec((24, 16), resize=way)).shape == (3, 24, 16)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_what_a_crop_drops_is_not_computed_and_changes_nothing(interpolation):
    draws = np.random.default_rng(3)
    for _ in range(60):
        old, new = draws.integers(1, 300, 2), draws.integers(1, 200, 2)
        needed = tuple(int(draws.integers(1, side + 1)) for side in new)
        image = draws.integers(0, 256, (*old, 3)).astype(np.uint8)
        whole = _scale(image, *map(int, new), interpolation)[: needed[0], : needed[1]]
        part = _scale(image, *map(int, new), interpolation, needed)[: needed[0], : needed[1]]
        # One level in a value of a million: the scale is rounded once more.
        assert np.abs(whole.astype(int) - part.astype(int)).max() <= 1


def test_images_decoded_in_passing_do_not_share_memory():
    size = ImageSpec((48, 64))
    files = [encode(picture(seed=seed), "JPEG") for seed in (0, 1)]
    first, second = (load_image(file, size) for file in files)  # of the wanted size: nothing to resize
    assert np.array_equal(first, decode(files[0]).transpose(2, 0, 1))
    assert np.array_equal(second, decode(files[1]).transpose(2, 0, 1))


def test_decoding_needs_no_torch():
    code = "import sys, vlm_adapt.data.images, vlm_adapt.data.shards, vlm_adapt.data.sample; " \
           "assert 'torch' not in sys.modules and 'torchvision' not in sys.modules"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.skipif(not COCO.exists(), reason="needs shared/data")
def test_photographs():
    for path in sorted(COCO.glob("*.jpg"))[:20]:
        assert load_image(path.read_bytes(), ImageSpec((64, 64))).std() > 5


def test_samples_are_checked():
    good = b'{"caption": "a cat"}'
    sample = parse_sample("k", {"1.jpg": b"b", "0.png": b"a", "json": good, "mask.png": b"m", "txt": b"?"})
    assert (sample.images, sample.mask, sample.record) == ([b"a", b"b"], b"m", {"caption": "a cat"})
    assert parse_sample("k", {"json": good}).images == []
    for members, reason in [
        ({"jpg": b""}, "no json member"),
        ({"json": b"{"}, "cannot be read"),
        ({"json": b"[1]"}, "not an object"),
        ({"json": b'{"words": "x"}'}, "has none of"),
        ({"json": b'{"caption": " "}'}, "empty caption"),
        ({"json": b'{"captions": []}'}, "captions is not a list"),
        ({"json": b'{"question": "q?"}'}, "without answer"),
        ({"json": b'{"question": "q?", "answers": ["a", ""]}'}, "empty answers"),
        ({"json": b'{"questions": [{"question": "q?", "answer": ""}]}'}, "empty answer"),
        ({"json": b'{"messages": [{"role": "assistant", "content": ""}]}'}, "empty answer"),
        ({"json": b'{"messages": [{"role": "gpt", "content": "x"}]}'}, "no role"),
        ({"json": b'{"messages": [{"role": "user", "content": "x"}]}'}, "no answer"),
        ({"json": b'{"caption": "x", "state": [1, NaN]}'}, "finite"),
        ({"json": good, "0.jpg": b"", "2.jpg": b""}, "without a gap"),
        ({"json": good, "0.jpg": b"", "jpg": b""}, "without an order"),
    ]:
        with pytest.raises(BadSample, match=reason):
            parse_sample("k", members)


def test_accounts_add_up():
    one, two = Account(), Account()
    one.use(truncated=True)
    for number in range(8):
        two.refuse(
            f"k{number}", BadSample("one turn has 300 tokens" if number % 2 else "one turn has 4 tokens")
        )
    two.refuse("z", BadSample("image too large", "9 x 9"))
    two.lose_all([Problem("s.tar", "a", "cut off")])
    one.merge(Account.from_dict(two.to_dict()))
    assert (one.read, one.used, one.truncated, one.refusals) == (10, 1, 1, 10)
    assert one.refused == {"one turn has N tokens": 8, "image too large": 1, "cut off": 1}
    assert (
        one.examples["image too large"] == ["z (9 x 9)"] and len(one.examples["one turn has N tokens"]) == 5
    )
