"""Windows, scales and mirrored images against a plain mean over windows; a stand-in for the segmenter.

Knows the seam (embed, label_logits, image_spec); the segmenter itself is tested elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm_adapt.data.images import resize
from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.models import dense_inference
from vlm_adapt.models.dense_inference import DenseInference
from vlm_adapt.models.dense_windows import bilinear, starts

WINDOW = (16, 24)
CLOSE = 2e-5  # float32, sums in another order; logits are of the order of 1


class Stub(nn.Module):
    """Four channels a place from one convolution of stride 2, six embeddings; labels are seeded by name.

    `halo` > 0: a block that looks at neighbours and is not linear, and, with `bottleneck`, at all labels.
    """

    def __init__(self, halo: int = 0, bottleneck: bool = False):
        super().__init__()
        self.image_spec = ImageSpec(WINDOW, mean=(0.4, 0.5, 0.6), resize="crop", interpolation="bilinear")
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.block = nn.Conv2d(1, 1, 3, padding=1)
        self.halo, self.bottleneck, self.runs, self.most = halo, bottleneck, 0, 0

    def embed(self, pixels_NCHW: Tensor) -> Tensor:
        assert pixels_NCHW.dtype == torch.uint8 and tuple(pixels_NCHW.shape[2:]) == WINDOW
        self.runs += len(pixels_NCHW)
        return functional.normalize(self.conv(pixels_NCHW.float() / 64 - 2), dim=1)

    def label_logits(self, embeddings_NEhw: Tensor, names: list[str], size: tuple[int, int]) -> Tensor:
        labels_LE = torch.stack(
            [torch.randn(6, generator=torch.Generator().manual_seed(sum(map(ord, name)))) for name in names]
        )
        logits_NLhw = torch.einsum("nehw,le->nlhw", embeddings_NEhw, labels_LE)
        for _ in range(self.halo):
            flat = logits_NLhw.flatten(0, 1)[:, None]
            found = self.block(flat)[:, 0].view_as(logits_NLhw)
            found = found + logits_NLhw.amax(1, keepdim=True) if self.bottleneck else found
            logits_NLhw = found.relu()
        self.most = max(self.most, logits_NLhw.numel())
        return functional.interpolate(logits_NLhw, size, mode="bilinear", align_corners=True)


def photograph(height: int, width: int, seed: int = 1) -> np.ndarray:
    generator = np.random.default_rng(seed)
    rough = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    spec = ImageSpec((height, width), resize="squash", interpolation="bilinear")
    return np.ascontiguousarray(resize(rough, spec).transpose(1, 2, 0))


def names(count: int) -> list[str]:
    return [f"label {'x' * number}" for number in range(count)]


@torch.no_grad()
def mean_of_windows(
    stub: Stub, pixels_HWC: np.ndarray, labels: list[str], base: int, scales: tuple[float, ...], flip: bool
) -> np.ndarray:
    """Whole arrays, a window at a time, as the evaluation is told in words."""
    height, width = pixels_HWC.shape[:2]
    total = torch.zeros(len(labels), height, width)
    for scale in scales:
        factor = math.ceil(base * scale) / max(height, width)
        size = (max(1, math.floor(height * factor + 0.5)), max(1, math.floor(width * factor + 0.5)))
        scaled = resize(pixels_HWC, replace(stub.image_spec, resize="squash", size=size))
        padded = (max(size[0], WINDOW[0]), max(size[1], WINDOW[1]))
        canvas = torch.tensor([102, 128, 153], dtype=torch.uint8)[:, None, None].repeat(1, *padded)
        canvas[:, : size[0], : size[1]] = torch.from_numpy(scaled)
        sums, count = torch.zeros(len(labels), *padded), torch.zeros(padded)
        for top in starts(padded[0], WINDOW[0], 1 / 3):
            for left in starts(padded[1], WINDOW[1], 1 / 3):
                here = (slice(top, top + WINDOW[0]), slice(left, left + WINDOW[1]))
                window = canvas[:, *here][None]
                found = stub.label_logits(stub.embed(window), labels, WINDOW)[0]
                if flip:
                    found = found + stub.label_logits(stub.embed(window.flip(-1)), labels, WINDOW)[0].flip(-1)
                    found = found / 2
                sums[:, *here] += found
                count[here] += 1
        mean = (sums / count)[:, : size[0], : size[1]]
        total += functional.interpolate(mean[None], (height, width), mode="bilinear", align_corners=True)[0]
    return (total / len(scales)).numpy()


@pytest.mark.parametrize("size", [(37, 53), (16, 24), (90, 31), (7, 9), (1, 3), (64, 200)])
@pytest.mark.parametrize("labels", [2, 9])  # fewer than channels: kept as logits; more: as embeddings
def test_equals_the_plain_mean(size: tuple[int, int], labels: int) -> None:
    stub, pixels, scales = Stub(), photograph(*size), (0.5, 1.0, 1.75)
    whole = mean_of_windows(stub, pixels, names(labels), 40, scales, True)
    found = DenseInference(stub, scales=scales, flip=True, base_size=40).scores(pixels, names(labels))
    assert found.shape == (labels, *size)
    assert np.abs(found - whole).max() < CLOSE


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("labels", [3, 11])
def test_a_block_that_looks_at_neighbours(bottleneck: bool, labels: int) -> None:
    """Bands of few rows see what whole maps see; at a map's own edge the block pads as ever."""
    stub, pixels = Stub(halo=2, bottleneck=bottleneck), photograph(50, 70)
    whole = mean_of_windows(stub, pixels, names(labels), 45, (1.0, 1.5), True)
    inference = DenseInference(
        stub, scales=(1.0, 1.5), flip=True, base_size=45, values_at_once=3000, kept=20_000
    )
    assert np.abs(inference.scores(pixels, names(labels)) - whole).max() < CLOSE


@pytest.mark.parametrize("flip", [False, True])
def test_bands_and_strips_change_nothing(flip: bool) -> None:
    stub, pixels, labels = Stub(), photograph(61, 83), names(40)
    usual = DenseInference(stub, scales=(1.0, 1.5), flip=flip)
    classes, confidence = usual.classes(pixels, labels)
    once, stub.runs = stub.runs, 0
    frugal = DenseInference(
        stub, scales=(1.0, 1.5), flip=flip, windows_at_once=1, values_at_once=10_000, kept=900
    )
    again, sure = frugal.classes(pixels, labels)
    assert stub.runs > once  # in strips: the price of little memory is to run windows again
    assert np.abs(confidence - sure).max() < CLOSE
    assert (classes == again).mean() > 0.999  # ties may fall to either side
    assert classes.dtype == np.uint16 and confidence.dtype == np.float32


def test_classes_and_confidence_are_those_of_the_scores() -> None:
    inference, pixels = DenseInference(Stub(), flip=True), photograph(40, 40)
    scores = torch.from_numpy(inference.scores(pixels, names(5))).softmax(0)
    classes, confidence = inference.classes(pixels, names(5))
    best, place = scores.max(0)
    assert (place.numpy() == classes).all()
    assert np.abs(best.numpy() - confidence).max() < CLOSE


def test_a_handicap_is_taken_off_the_logits() -> None:
    inference, pixels = DenseInference(Stub(), window="whole"), photograph(30, 40)
    handicap = [0.0, 3.0, 0.5, 0.0, 9.0]
    classes, confidence = inference.classes(pixels, names(5), handicap)
    logits = torch.from_numpy(inference.scores(pixels, names(5))) - torch.tensor(handicap)[:, None, None]
    best, place = logits.softmax(0).max(0)
    assert (place.numpy() == classes).all()
    assert np.abs(best.numpy() - confidence).max() < CLOSE
    assert (classes != inference.classes(pixels, names(5))[0]).any()


def test_memory_is_bounded_by_values_not_by_labels() -> None:
    """What a call of label_logits makes stays below the bound, and so does every band."""
    stub, pixels, labels = Stub(), photograph(80, 120), names(300)
    inference = DenseInference(stub, values_at_once=50_000)
    bands = [band for _, band in inference._bands(pixels, labels)]
    assert max(band.numel() for band in bands) <= 50_000 < 300 * 80 * 120
    assert sum(band.shape[1] for band in bands) == 80
    assert stub.most <= 2 * 50_000  # rows on both sides of a band are made too


def test_an_image_of_the_window_is_the_whole_image() -> None:
    stub, pixels = Stub(), photograph(*WINDOW)
    sliding = DenseInference(stub).scores(pixels, names(4))
    whole = DenseInference(stub, "whole").scores(pixels, names(4))
    direct = stub.label_logits(stub.embed(torch.from_numpy(pixels).permute(2, 0, 1)[None]), names(4), WINDOW)
    assert np.abs(sliding - whole).max() < CLOSE
    assert np.abs(whole - direct[0].detach().numpy()).max() < CLOSE


def test_whole_is_one_squash_and_one_way_back() -> None:
    stub, pixels = Stub(), photograph(45, 33)
    spec = replace(stub.image_spec, resize="squash")  # the stand-in's own says crop: a mask covers all
    squashed = torch.from_numpy(resize(pixels, spec).copy())
    direct = stub.label_logits(stub.embed(squashed[None]), names(4), (45, 33))[0].detach().numpy()
    assert np.abs(DenseInference(stub, "whole").scores(pixels, names(4)) - direct).max() < CLOSE
    assert stub.runs == 2


def test_mirrored_image_gives_mirrored_classes() -> None:
    stub, pixels = Stub(), photograph(32, 88)
    inference = DenseInference(stub, flip=True, base_size=88)
    usual = inference.scores(pixels, names(3))
    mirrored = inference.scores(np.ascontiguousarray(pixels[:, ::-1]), names(3))[:, :, ::-1]
    assert np.abs(usual - mirrored).max() < CLOSE
    lopsided = DenseInference(stub, base_size=88)
    mirrored = lopsided.scores(np.ascontiguousarray(pixels[:, ::-1]), names(3))[:, :, ::-1]
    assert np.abs(lopsided.scores(pixels, names(3)) - mirrored).max() > 0.01


def test_without_a_base_size_a_window_is_filled() -> None:
    stub = Stub()
    inference = DenseInference(stub)
    for size in ((10, 10), (400, 90), (31, 300), WINDOW):
        view = inference._views(photograph(*size))[0]
        assert view.size[0] >= WINDOW[0] and view.size[1] >= WINDOW[1]
        assert view.size == view.pixels_CHW.shape[1:]
        assert view.size[0] == WINDOW[0] or view.size[1] == WINDOW[1]
    strip = inference._views(photograph(3, 4000))[0]
    assert strip.size[1] == dense_inference.LONGEST * WINDOW[1]  # and no longer: a strip has a bound


@pytest.mark.parametrize("overlap", [0.0, 1 / 3, 0.5])
def test_windows_cover_all_and_overlap_enough(overlap: float) -> None:
    for length in range(24, 200):
        found = starts(length, 24, overlap)
        assert found[0] == 0 and found[-1] == length - 24
        gaps = np.diff(found)
        assert not len(gaps) or (gaps.max() <= max(1, math.floor(24 * (1 - overlap))) and gaps.min() > 0)
        mirrored = [length - 24 - one for one in reversed(found)]
        assert max(abs(one - other) for one, other in zip(found, mirrored, strict=True)) <= 1


@pytest.mark.parametrize(("few", "many"), [(1, 5), (5, 1), (7, 7), (3, 20), (20, 3), (2, 2)])
def test_the_matrix_is_torch_interpolation(few: int, many: int) -> None:
    values = torch.randn(1, 1, few, dtype=torch.float64)
    direct = functional.interpolate(values, many, mode="linear", align_corners=True)[0, 0]
    assert np.abs(bilinear(few, many) @ values[0, 0].numpy() - direct.numpy()).max() < 1e-12


def test_settings_that_cannot_work() -> None:
    stub, pixels = Stub(), photograph(20, 20)
    for wrong, words in (
        ({"window": "slide"}, "choose sliding or whole"),
        ({"scales": ()}, "at least one"),
        ({"scales": (1, float("nan"))}, "each from"),
        ({"window": "whole", "scales": (1, 2)}, "go with 'sliding'"),
        ({"overlap": 1}, "overlap is a share"),
        ({"base_size": 0}, "base_size is a number"),
    ):
        with pytest.raises(UserError, match=words):
            DenseInference(stub, **wrong)
    with pytest.raises(UserError, match="0 labels"):
        DenseInference(stub).classes(pixels, [])
