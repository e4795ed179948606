"""The verb `segment` around its model: files, folders, films, what is printed, and what goes wrong.

A stand-in finds the masks of drawings (drawn.py).
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from drawn import DrawnFinder, drawing, film
from PIL import Image
from safetensors import safe_open

from vlm_adapt.cli import main
from vlm_adapt.data.masks import read_mask
from vlm_adapt.errors import UserError
from vlm_adapt.segment.ask import Ask
from vlm_adapt.segment.labelled import Labelled
from vlm_adapt.segment.output import mask_png
from vlm_adapt.segment.result import NONE, Segmentation

WORDS = "cat|feline, grass, sky, dog"


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text("{}")
    monkeypatch.setattr("vlm_adapt.segment.run.Finder", DrawnFinder)
    monkeypatch.chdir(tmp_path)


def segment(*words: str) -> int:
    labels = () if any(word.startswith("--labels") for word in words) else ("--labels", WORDS)
    return main(["segment", "run", *labels, *words])


def test_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing().save("meadow.png")
    assert segment("--image", "meadow.png", "--output", "out", "--scores") == 0
    said = capsys.readouterr().out
    assert "meadow.png: 60 x 40" in said and "not found: dog" in said
    mask = read_mask(Path("out/meadow-mask.png").read_bytes())
    assert mask[0, 0] == 2 and mask[39, 0] == 1 and mask[20, 12] == 0
    share = (mask == 0).mean()
    line = next(line for line in said.splitlines() if line.startswith("cat"))
    assert f"{100 * share:.1f} %" in line and "feline" not in said
    with Image.open("out/meadow-mask.png") as written:
        assert written.mode == "P" and json.loads(written.text["labels"]) == ["cat", "grass", "sky", "dog"]
    with safe_open("out/meadow-scores.safetensors", "np") as file:
        scores = file.get_tensor("scores")
        assert scores.shape == (4, 40, 60) and scores.dtype == np.float16
        assert (scores.argmax(0) == mask).all() and json.loads(file.metadata()["labels"])[0] == "cat"
    with Image.open("out/meadow-overlay.png") as picture:
        assert picture.width == 640 and picture.height > 640 * 40 // 60  # shown larger; the legend is below
        page = np.asarray(picture.convert("RGB")).astype(int)
    above = page[20, 20]
    assert np.abs(above - (0.45 * np.array((90, 170, 250)) + 0.55 * np.array((86, 180, 233)))).max() < 3
    assert (page[-1] == 255).all()
    assert not list(tmp_path.rglob(".*part"))


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    drawing().save("meadow.png")
    assert segment("--image", "meadow.png", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["image"] == "meadow.png" and (told["width"], told["height"]) == (60, 40)
    assert [row["label"] for row in told["labels"]][-1] == "dog"
    assert sum(row["share"] for row in told["labels"]) == pytest.approx(1)
    assert told["labels"][0]["score"] > 0.9 and told["labels"][-1]["score"] is None
    assert Path(told["mask"]).is_file() and Path(told["overlay"]).is_file()


def test_a_folder_goes_on_past_damage(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("shots")
    (folder / "more").mkdir(parents=True)
    for name in ("frame2.png", "frame10.png", "more/one.png"):
        drawing().save(folder / name)
    drawing().save(folder / "frame2.jpg")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of a picture")
    (folder / "notes.txt").write_text("no image")
    assert segment("--image", "shots", "--output", "out") == 2
    said = capsys.readouterr()
    assert "broken.jpg" in said.out and "refused 1 x" in said.out
    assert "4 of 5 done" in said.err and "left out 1 files: neither image nor video" in said.err
    order = [line.split(":")[0] for line in said.out.splitlines() if line.startswith("shots")]
    assert order == ["shots/frame2.jpg", "shots/frame2.png", "shots/frame10.png", "shots/more/one.png"]
    assert Path("out/frame10-mask.png").is_file() and Path("out/more/one-mask.png").is_file()
    assert Path("out/frame2.jpg-mask.png").is_file() and Path("out/frame2.png-mask.png").is_file()


def test_results_in_the_same_folder_are_no_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    Path("shots").mkdir()
    drawing().save("shots/a.png")
    assert segment("--image", "shots", "--output", "shots") == 0
    assert segment("--image", "shots", "--output", "shots") == 0
    assert "left out 2 files: results of an earlier run" in capsys.readouterr().err
    assert sorted(path.name for path in Path("shots").iterdir()) == ["a-mask.png", "a-overlay.png", "a.png"]
    drawing().save("a-mask.png")
    drawing().save("a.png")
    assert segment("--image", "a.png", "--image", "a-mask.png") == 2
    assert "would replace 'a-mask.png'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["walk.gif", "walk.webp", "walk.png"])
def test_an_animation(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    film(Path(name), **({"lossless": True} if name.endswith("webp") else {}))
    assert segment("--image", name, "--output", "out") == 0
    assert "4 frames" in capsys.readouterr().out
    masks = [read_mask(path.read_bytes()) for path in sorted(Path("out/walk-masks").iterdir())]
    lefts = [int(np.flatnonzero((mask == 0).any(0))[0]) for mask in masks]
    assert lefts == [10, 15, 20, 25]
    with Image.open("out/walk-overlay.webp") as made:
        assert made.n_frames == 4 and made.size[0] == 640
        made.seek(3)
        made.load()
        assert made.info["duration"] == 80 or made.info["timestamp"] == 320


def fake_ffmpeg(folder: Path, frames: int = 3, fails: str = "", complains: str = "") -> None:
    """A program of that name: it tells of a video, gives frames as PPM, and keeps what it is fed."""
    script = f"""#!{sys.executable}
import sys
words = sys.argv[1:]
if words[-1] == "-":
    for place in range({frames}):
        sys.stdout.buffer.write(b"P6\\n3 2\\n255\\n" + bytes([90, 170, 250] * 6))
    print({complains!r}, end="", file=sys.stderr)
elif words[-2] == "-i":
    print("  Duration: 00:00:01.50, start: 0", "  Stream #0:0: Video: h264, 3x2, 2 fps, 2 tbr", sep="\\n",
          file=sys.stderr)
    sys.exit(1)
elif {fails!r}:
    sys.stdin.buffer.read(100)
    sys.exit({fails!r})
else:
    open(words[-1].removeprefix("file:"), "wb").write(" ".join(words).encode() + sys.stdin.buffer.read())
"""
    folder.mkdir()
    (folder / "ffmpeg").write_text(script)
    (folder / "ffmpeg").chmod(stat.S_IRWXU)


def test_a_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("walk.mp4").write_bytes(b"a video")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert segment("--image", "walk.mp4") == 2
    assert "'ffmpeg', which is not on the PATH" in capsys.readouterr().err
    fake_ffmpeg(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert segment("--image", "walk.mp4", "--output", "out") == 0
    assert "walk.mp4: 3 x 2, 3 frames" in capsys.readouterr().out
    assert len(list(Path("out/walk-masks").iterdir())) == 3
    words, _, _ = Path("out/walk-overlay.mp4").read_bytes().partition(b".part.mp4")
    size = words.split(b"-s ")[1].split()[0].split(b"x")
    assert int(size[0]) == 640 and int(size[1]) % 2 == 0 and b"-r 2 " in words
    assert sorted(path.name for path in Path("out").iterdir()) == ["walk-masks", "walk-overlay.mp4"]


def test_a_video_that_is_damaged_further_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("walk.mp4").write_bytes(b"a video")
    fake_ffmpeg(tmp_path / "bin", frames=2, complains="error while decoding")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert segment("--image", "walk.mp4", "--output", "out") == 0
    assert "damaged: 2 frames could be read (ffmpeg: error while decoding)" in capsys.readouterr().err
    fake_ffmpeg(tmp_path / "none", frames=0, complains="moov atom not found")
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert segment("--image", "walk.mp4", "--output", "other") == 2
    assert "damaged video: walk.mp4 (moov atom not found)" in capsys.readouterr().err
    assert not [path for path in Path("other").rglob("*") if path.is_file()]


def test_a_video_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("walk.mp4").write_bytes(b"a video")
    fake_ffmpeg(tmp_path / "bin", frames=400, fails="av_interleaved_write_frame(): No space left on device")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert segment("--image", "walk.mp4", "--output", "out") == 2
    assert "'out/walk-overlay.mp4' cannot be written" in (said := capsys.readouterr().err)
    assert "No space left" in said and sorted(path.name for path in Path("out").iterdir()) == ["walk-masks"]


def test_a_full_disk_and_an_interrupt_leave_nothing_half(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawing().save("meadow.png")
    usual = Path.replace

    def full(self: Path, target: Path) -> Path:
        if "overlay" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return usual(self, target)

    monkeypatch.setattr(Path, "replace", full)
    assert segment("--image", "meadow.png", "--output", "out") == 2
    assert "no space left to write out/meadow-overlay.png" in capsys.readouterr().err
    assert [path.name for path in Path("out").iterdir()] == ["meadow-mask.png"]

    def interrupted(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    film(Path("walk.gif"))
    assert segment("--image", "walk.gif", "--output", "other") == 130
    assert not [path for path in Path("other").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--labels", ""), "the list of labels is empty"),
        (("--labels", "cat, cat"), "two labels are the same"),
        (("--labels", "cat,,dog"), "a label is empty"),
        (("--labels", "cat", "--labels-file", "x"), "give one of them"),
        (("--labels-file", "nowhere.txt"), "no file of labels 'nowhere.txt'"),
        (("--image", "nowhere.png"), "there is no image 'nowhere.png'"),
        (("--image", "empty"), "nothing to segment in 'empty'"),
        (("--scales", "1,big"), "--scales '1,big' is not numbers"),
        (("--point", "3"), "--point '3' is not x,y"),
        (("--point", "3,4,2"), "is not x,y"),
        (("--box", "9,9,3,3"), "is not left,top,right,bottom"),
        (("--output", "meadow.png"), "is a file: name a folder"),
        (("--point", "3,4", "--image", "other.png"), "places of one image"),
        (("--opacity", "2"), "opacity"),
    ],
)
def test_what_cannot_be_asked(
    words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("meadow.png", "other.png"):
        drawing().save(name)
    Path("empty").mkdir()
    image = () if words[1].startswith(("nowhere.png", "empty")) else ("--image", "meadow.png")
    assert segment(*image, *words) == 2
    said = capsys.readouterr().err
    assert sentence in said and len(said.strip().splitlines()) == 1


def test_one_damaged_image_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.jpg").write_bytes(b"nothing")
    assert segment("--image", "broken.jpg") == 2
    assert "cannot be segmented: not an image: broken.jpg" in capsys.readouterr().err


def test_labels_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    drawing().save("meadow.png")
    Path("labels.txt").write_text("cat|feline\n\nsky, blue or not\ngrass\n", encoding="utf-8")
    assert segment("--image", "meadow.png", "--labels-file", "labels.txt", "--json") == 0
    found = {row["label"] for row in json.loads(capsys.readouterr().out)["labels"]}
    assert found == {"cat", "sky, blue or not", "grass"}


def test_masks_of_many_labels_have_16_bits() -> None:
    classes = np.array([[0, 299], [NONE, 256]], np.uint16)
    names = [str(place) for place in range(300)]
    mask = read_mask(mask_png(Segmentation(classes, names), [(0, 0, 0)] * 300))
    assert mask.dtype == np.uint16 and (mask == classes).all()
    few = Segmentation(np.array([[0, 254, NONE]], np.uint16), names[:255])
    assert read_mask(mask_png(few, [(9, 9, 9)] * 255)).tolist() == [[0, 254, 255]]


def test_shares_and_scores() -> None:
    classes = np.array([[0, 0, 1, NONE]], np.uint16)
    confidence = np.array([[0.5, 0.7, 0.9, 0.1]], np.float32)
    found = Segmentation(classes, ["cat", "dog", "cow"], confidence)
    assert found.shares == [0.5, 0.25, 0]
    assert found.means[:2] == pytest.approx([0.6, 0.9]) and found.means[2] is None


def test_a_segmenter_takes_labels_only() -> None:
    with pytest.raises(UserError, match="give --labels"):
        Labelled.check(Ask(), None)
    with pytest.raises(UserError, match="--point is nothing that a segmenter can be asked"):
        Labelled.check(Ask(labels=("cat",), points=((1, 2, 1),)), None)
    with pytest.raises(UserError, match="go with 'sliding'"):
        Labelled.check(Ask(labels=("cat",), window="whole", scales=(1.0, 2.0)), None)
    Labelled.check(Ask(labels=("cat",), scales=(0.5, 1.0), flip=True, scores=True), None)
