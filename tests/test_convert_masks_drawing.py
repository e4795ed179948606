"""COCO's polygons and run lengths against pycocotools' own output, and masks of every depth by value."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vlm_adapt.data.convert.polygons import check_shape, decode_runs, draw, draw_polygons
from vlm_adapt.data.masks import check_mask, check_values, count_values, encode_mask, ignored_value, read_mask
from vlm_adapt.data.problems import BadSample

# Polygons in an image of 24 x 22 (height x width), and what pycocotools 2.0 makes of them.
DRAWN = [
    (
        [[10.3, 2.1, 14.7, 20.9, 1.2, 8.4, 19.6, 7.7, 3.3, 21.5]],
        "P11g01O001A041I0871GG29MJ15172DM7OI270E2:0E0:OLM32:O100OQ2",
        84,
    ),
    (
        [[-3.5, -2.0, 12.4, 4.9, 30.2, 25.7, 5.5, 40.0]],
        "0`085L2M01O00001O001O001O001O1O2N1O1O1O1O1O2N",
        387,
    ),
    ([[2, 2, 9, 2, 9, 9, 2, 9], [6, 6, 15.5, 6, 15.5, 12.5]], "b17a0000000000004K11O1O001O1O0Z4", 79),
    ([[3.2, 4.1, 18.9, 4.6, 18.8, 5.2]], "T61g000000000000T5", 7),
]


@pytest.mark.parametrize("polygons, packed, area", DRAWN)
def test_polygons_as_pycocotools_draws_them(polygons, packed, area):
    mask_HW = draw_polygons(polygons, 24, 22)
    assert mask_HW.shape == (24, 22) and mask_HW.sum() == area
    assert (mask_HW == decode_runs({"size": [24, 22], "counts": packed}, 24, 22)).all()


def test_run_lengths():
    counts = [3, 5, 100, 1, 419]
    expected = np.repeat([0, 1, 0, 1, 0], counts).reshape(22, 24).T  # down columns
    assert (decode_runs({"size": [24, 22], "counts": counts}, 24, 22) == expected).all()
    with pytest.raises(BadSample, match="do not fill their image: 528 of 506 pixels"):
        decode_runs({"size": [23, 22], "counts": counts}, 23, 22)
    with pytest.raises(BadSample, match="mask and image differ in size: mask 22 x 24, image 24 x 22"):
        decode_runs({"size": [24, 22], "counts": counts}, 22, 24)
    for wrong, why in (("b17\x7f", "not in COCO's code"), ("b17o", "cut off"), ("oooooooooooooooo0", "code")):
        with pytest.raises(BadSample, match=why):
            decode_runs({"size": [24, 22], "counts": wrong}, 24, 22)
    for damaged in ({"counts": [1]}, {"size": [24, 22], "counts": [None]}, {"size": 5, "counts": []}):
        with pytest.raises(BadSample, match="without size and counts"):
            decode_runs(damaged, 24, 22)
    with pytest.raises(BadSample, match="do not fill"):
        decode_runs({"size": [24, 22], "counts": [-1, 529]}, 24, 22)


def test_several_run_lengths_are_one_mask():
    first, second = ({"size": [24, 22], "counts": counts} for counts in ([0, 5, 523], [10, 5, 513]))
    assert np.flatnonzero(draw([first, second], 24, 22).T).tolist() == [*range(5), *range(10, 15)]
    check_shape([first, second], 24, 22)
    with pytest.raises(BadSample, match="no pixels"):
        check_shape([{"size": [24, 22], "counts": [528]}] * 2, 24, 22)


def test_shapes_are_refused_before_they_are_drawn_just_as_when_they_are():
    random = np.random.default_rng(5)
    none = 0
    for _ in range(300):
        polygon = (random.uniform(-0.2, 1.2, (3, 2)) * random.uniform(0.02, 1) * [22, 24]).ravel().tolist()
        try:
            draw([polygon], 24, 22)
            check_shape([polygon], 24, 22)
        except BadSample as error:
            assert error.reason == "mask has no pixels"
            with pytest.raises(BadSample, match="mask has no pixels"):
                check_shape([polygon], 24, 22)
            none += 1
    assert 10 < none < 200  # both cases were met
    for wrong, why in (
        ([[1, 2, 3, 4]], "fewer than 3 points"),
        ([[1, 2, 3, 4, 5]], "not a list of x, y"),
        ([[1, 2, 3, 4, "a", 5]], "not a list of x, y"),
        ([[0, 0, 1e9, 0, 5, 5]], "far outside"),
        ([[0, 0, float("nan"), 0, 5, 5]], "far outside"),
        ([], "without a segmentation"),
        (None, "without a segmentation"),
        ({"size": [24, 22], "counts": [528]}, "no pixels"),
    ):
        for function in (draw, check_shape):
            with pytest.raises(BadSample, match=why):
                function(wrong, 24, 22)


def grey_png(values_HW: np.ndarray, bits: int, colour: int = 0) -> bytes:
    """A PNG written by hand, as PIL writes no grey of 2 and 4 bits."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    rows = b""
    for row in values_HW:
        word = "".join(f"{value:0{bits}b}" for value in row)
        word += "0" * (-len(word) % 8)
        rows += b"\0" + bytes(int(word[place : place + 8], 2) for place in range(0, len(word), 8))
    header = struct.pack(">IIBBBBB", values_HW.shape[1], values_HW.shape[0], bits, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(range(255, 255 - 3 * 2**bits, -1))) if colour == 3 else b""
    content = chunk(b"IHDR", header) + palette + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


@pytest.mark.parametrize(
    "bits, colour", [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (1, 3), (2, 3), (4, 3)], ids=str
)
def test_values_of_every_depth_are_read_as_they_were_written(bits, colour):
    values_HW = np.random.default_rng(0).integers(0, 2**bits, (5, 7))
    read = read_mask(grey_png(values_HW, bits, colour))
    assert (read == values_HW).all() and ignored_value(read) == (65535 if bits == 16 else 255)


def test_palettes_are_read_by_index():
    image = Image.fromarray(np.array([[0, 1, 255]], np.uint8), "P")
    image.putpalette([7, 7, 7] * 256)  # all of one colour
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=0)
    assert read_mask(buffer.getvalue()).tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("labels, kind, top", [(255, np.uint8, 254), (256, np.uint16, 255)])
def test_masks_come_back_as_they_were(labels, kind, top):
    mask_HW = np.array([[0, 3, top], [1, 2, np.iinfo(kind).max]], kind)
    read = read_mask(encode_mask(mask_HW, labels))
    assert read.dtype == kind and (read == mask_HW).all()
    assert (read_mask(encode_mask(mask_HW > 1)) == (mask_HW > 1)).all()
    for shape in ((1, 1), (1, 300), (300, 1), (97, 61)):
        noise_HW = np.random.default_rng(1).integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)
        data = encode_mask(noise_HW.T, labels)
        assert (read_mask(data) == noise_HW.T).all()
        counts = np.bincount(noise_HW.ravel(), minlength=np.iinfo(kind).max + 1)
        assert (count_values(noise_HW) == counts).all()


def png(mode: str, size=(4, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def test_what_is_no_mask():
    jpeg = io.BytesIO()
    Image.new("L", (4, 3)).save(jpeg, "JPEG")
    whole = encode_mask(np.random.default_rng(0).integers(0, 9, (30, 30)))
    for data, why in (
        (png("RGB"), "mask is RGB, it should have one channel"),
        (png("RGBA"), "mask is RGB with transparency"),
        (png("LA"), "mask is grey with transparency"),
        (jpeg.getvalue(), "mask is a JPEG"),
        (b"", "empty mask"),
        (b"GIF89a" + bytes(40), "not a PNG"),
        (whole[:80], "damaged mask"),
        (whole[:60] + b"\xff" + whole[61:], "damaged mask"),
        (whole[:20] + b"\x00\xff\xff\xff" + whole[24:], "mask too large"),
        (whole[:16] + bytes(8) + whole[24:], "mask has no pixels"),
    ):
        with pytest.raises(BadSample, match=why):
            read_mask(data)


def test_masks_against_their_images():
    mask = encode_mask(np.array([[0, 1, 255], [2, 2, 255]], np.uint8))
    check_mask(mask, (3, 2))
    check_mask(mask, (3, 2), ["a", "b", "c"])
    with pytest.raises(BadSample, match="mask and image differ in size: mask 3 x 2, image 2 x 3"):
        check_mask(mask, (2, 3))
    cut = mask[:40]  # the header alone says the size
    check_mask(cut, (3, 2))
    with pytest.raises(BadSample, match=r"without a label: value 2 \(2 pixels\), there are 2 labels"):
        check_mask(mask, (3, 2), ["a", "b"])
    with pytest.raises(BadSample, match="without a label: value 1"):
        check_mask(mask, (3, 2), ["a", "", "c"])
    with pytest.raises(BadSample, match="all pixels of the mask are ignored"):
        check_values(np.full((2, 2), 65535, np.uint16), ["a"] * 300)
