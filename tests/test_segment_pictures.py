"""Colours, overlays, legends, the page of samples, and what a run's report says of masks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from drawn import drawing
from PIL import Image

from vlm_adapt.errors import UserError
from vlm_adapt.report.colours import colours, distance
from vlm_adapt.report.html import write_report
from vlm_adapt.report.regions import borders, entries, fit_mask, overlay, picture_size, share_text, veiled
from vlm_adapt.report.segmentation import CELL, samples_page, write_samples

STREET = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()


def test_colours_are_a_labels_own() -> None:
    usual = dict(zip(STREET, colours(STREET), strict=True))
    backwards = STREET[::-1]
    assert dict(zip(backwards, colours(backwards), strict=True)) == usual
    assert colours(["tree"]) == [usual["tree"]] and colours(["sky", "cat", "sky"])[::2] == [usual["sky"]] * 2
    assert usual["tree"][1] > max(usual["tree"][0], usual["tree"][2])  # green, as readers expect
    expected = [
        "other",
        "sky",
        "tree",
        "grass",
        "water",
        "road",
        "pavement",
        "people",
        "sign",
        "soil",
        "house",
        "car",
    ]
    together = colours(expected)  # each keeps its own beside all others
    assert [colours([name])[0] for name in expected] == together
    assert min(distance(*pair) for pair in itertools.combinations(together, 2)) > 0.05


@pytest.mark.parametrize(("count", "apart"), [(2, 0.17), (5, 0.17), (7, 0.13), (12, 0.09), (30, 0.03)])
def test_colours_can_be_told_apart(count: int, apart: float) -> None:
    """By readers with usual vision and by the colour-blind; black and white are 1 apart."""
    for words in ("thing", "label", "class"):
        found = colours([f"{words} {place}" for place in range(count)])
        assert min(distance(*pair) for pair in itertools.combinations(found, 2)) >= apart
    street = colours(STREET)
    assert min(distance(*pair) for pair in itertools.combinations(street, 2)) > 0.06


def test_distance_is_that_of_who_sees_least() -> None:
    assert distance((0, 0, 0), (255, 255, 255)) == pytest.approx(1, abs=1e-3)
    red, green = (180, 60, 30), (95, 110, 30)  # one brown for those without green cones
    assert distance(red, green) < 0.5 * np.linalg.norm(np.array(red) - green) / 255


def test_a_thousand_labels_have_colours() -> None:
    assert len(colours([str(place) for place in range(1000)])) == 1000


def test_veil_and_border() -> None:
    pixels = np.full((40, 60, 3), 100, np.uint8)
    mask = np.zeros((40, 60), np.uint16)
    mask[:, 30:], mask[30:] = 1, 65535
    shown = veiled(pixels, mask, [(200, 0, 0), (0, 0, 200)], 0.5)
    assert shown[5, 5].tolist() == [150, 50, 50] and shown[5, 50].tolist() == [50, 50, 150]
    assert shown[38, 5].tolist() == [100, 100, 100]  # no label: as it was
    edge = borders(mask)
    assert edge[5, 30] > 0.5 and edge[5, 20] == 0 and shown[5, 30].min() > 120
    assert veiled(pixels, mask * 0 + 9, [], 0.5).tolist() == pixels.tolist()


def test_the_image_is_not_covered_and_the_legend_is_outside() -> None:
    pixels = np.asarray(drawing(300, 200))
    mask = np.zeros((200, 300), np.uint16)
    names, palette = ["sky", "cat"], colours(["sky", "cat"])
    page = overlay(pixels, mask, names, palette, [1.0, 0.0], opacity=0.0)
    width, height = picture_size(300, 200)
    assert page.width == width and page.height > height
    bare = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
    assert (np.asarray(page)[:height] == np.asarray(bare)).all()
    tall = overlay(pixels.transpose(1, 0, 2), mask.T, names, palette, [1.0, 0.0])
    assert tall.height == picture_size(200, 300)[1] and tall.width > picture_size(200, 300)[0]
    assert overlay(pixels, mask, names, palette, None).size == (width, height)


def test_prompts_are_drawn_where_they_are() -> None:
    pixels, mask = np.zeros((100, 160, 3), np.uint8), np.full((100, 160), 65535, np.uint16)
    asked = ([(40, 50, 1), (120, 50, 0)], [(10, 10, 60, 90)])
    page = np.asarray(overlay(pixels, mask, [], [], None, 0.5, *asked)).astype(int)
    factor = 640 / 160
    inside, outside = (page[round(50 * factor) - 4, round(x * factor) + 4] for x in (40, 120))
    assert inside.tolist() == [0, 114, 178] and outside.tolist() == [213, 94, 0]
    assert page[round(30 * factor), round(10 * factor) + 1].tolist() == [255, 255, 255]
    assert page[round(50 * factor), round(80 * factor)].tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3000, 10), (5000, 4000)])
def test_pictures_of_any_size(size: tuple[int, int]) -> None:
    pixels, mask = np.zeros((size[1], size[0], 3), np.uint8), np.zeros((size[1], size[0]), np.uint16)
    page = overlay(pixels, mask, ["a" * 300], colours(["a"]), [1.0])
    assert max(page.size) < 3000 and min(page.size) > 20


def test_legends_count_what_is_small() -> None:
    palette = [(1, 2, 3)] * 4
    lines = entries([0.7, 0.0001, 0.2999, 0.0], ["a", "b", "c", "d"], palette)
    assert [(one.name, one.note) for one in lines] == [("a", "70 %"), ("c", "30 %"), ("and 1 smaller", "")]
    assert [share_text(one) for one in (0, 0.0004, 0.0042, 0.0994, 1)] == [
        "0 %",
        "<0.1 %",
        "0.4 %",
        "9.9 %",
        "100 %",
    ]


def test_masks_are_fitted_without_new_values() -> None:
    mask = np.array([[0, 7], [7, 0]], np.uint16)
    assert fit_mask(mask, (4, 6)).tolist() == np.kron(mask, np.ones((3, 2), int)).tolist()
    assert fit_mask(np.arange(9).reshape(3, 3), (1, 1)).tolist() == [[4]]


def test_page_of_samples(tmp_path: Path) -> None:
    pixels = np.asarray(drawing())
    truth = np.zeros((40, 60), np.int16)
    truth[20:], truth[:, :9] = 1, -1
    rows = [(pixels, truth, np.ones((40, 60), np.uint16), "first"), (pixels, truth, truth)]
    write_samples(tmp_path / "samples.png", rows, ["sky", "grass", "cat"])
    with Image.open(tmp_path / "samples.png") as page:
        found = np.asarray(page.convert("RGB")).astype(int)
    assert page.width > 3 * CELL and not list(tmp_path.glob(".*"))
    grass = colours(["sky", "grass", "cat"])[1]
    right = found[100, -50]
    assert np.abs(right - (0.22 * np.array((90, 170, 250)) + 0.78 * np.array(grass))).max() < 4
    assert samples_page([], ["sky"]).width == page.width
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_samples(tmp_path / "file" / "samples.png", rows, ["sky", "grass"])


def test_a_report_shows_classes_and_samples(tmp_path: Path) -> None:
    figures = {
        "miou": 0.41,
        "pixel_accuracy": 0.83,
        "per_class": {"car|automobile": {"iou": 0.6}, "<b>sky": {"iou": 0.9}},
        "absent": ["cow"],
        "pixels": 12_345,
        "baselines": {"majority": {"class": "sky", "miou": 0.1, "pixel_accuracy": 0.3}},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(figures))
    (tmp_path / "predictions.jsonl").write_text(json.dumps({"key": "a", "miou": 0.4}) + "\n")
    lines = [{"event": "evaluate", "step": step, "metrics": figures | {"miou": step / 10}} for step in (1, 2)]
    (tmp_path / "journal.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    write_samples(tmp_path / "samples.png", [], ["sky"])
    page = write_report(tmp_path).read_text()
    assert "IoU by class" in page and page.index("&lt;b&gt;sky") < page.index(">car ")
    assert "always saying sky has 10.0" in page and "neither true nor predicted: cow" in page
    assert "data:image/jpeg;base64," in page and "<strong>41.0" in page
    assert "Held out: miou" in page and "Held out: pixels" not in page
