"""Images of native sizes end to end: read, trained, saved, evaluated and spoken about; packed is alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from forks import write
from test_connectors import OPTIONS

from vlm_adapt.chat.session import Session
from vlm_adapt.config.load import validate
from vlm_adapt.data.collate import collate
from vlm_adapt.data.images import decode
from vlm_adapt.data.patches import ImagePatches, load, picture
from vlm_adapt.data.problems import Account
from vlm_adapt.errors import UserError
from vlm_adapt.evaluate.checkpoint import evaluate_checkpoint
from vlm_adapt.language.language import Generation
from vlm_adapt.models.build import build
from vlm_adapt.models.feature_cache import FeatureCache
from vlm_adapt.models.restore import restore
from vlm_adapt.train.journal import read_journal
from vlm_adapt.train.run import train

NATIVE = {"max_patches": 24, "min_patches": 2, "sequence": 40}
NAVIT = {"patch": 8, "width": 32, "depth": 2, "heads": 4, "max_side": 24}
DRAWN = NATIVE | {"drop": {"mean": 0.4, "deviation": 0.2}, "resolution": [16, 40]}
SIZES = [(24, 20), (40, 16), (9, 60), (33, 33), (200, 8)]


def shard(path: Path, count: int = 12, images: int = 1, first: int = 0) -> Path:
    samples = []
    for number in range(first, first + count):
        asked = [{"question": "what color is the shape?", "answer": tiny.WORDS.split()[number % 9]}]
        members = {"json": json.dumps({"questions": asked}).encode()}
        for place in range(images):
            members[f"{place}.png"] = tiny.image(number, *SIZES[(number + place) % len(SIZES)])
        samples.append((f"s{number:04d}", members))
    return tiny.shard(path, samples)


@pytest.fixture(scope="module")
def folder(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("native")
    shard(made / "train.tar")
    shard(made / "test.tar", 4, first=100)
    shard(made / "pairs.tar", 4, images=2)
    shard(made / "text.tar", 2, images=0)
    return made


def tree(parts: Path, folder: Path, output: str, native: dict[str, Any] = NATIVE, **changes: Any) -> Any:
    vision = {"model": "navit:tiny", "weights": "random:0", "options": NAVIT | {"native": native}}
    usual = {"model__vision": vision, "data__train": [{"shards": str(folder / "train.tar")}]}
    return tiny.run_tree(parts, str(folder / output), **(usual | changes))


def assembled(parts: Path, folder: Path, **changes: Any) -> Any:
    run = validate(tree(parts, folder, "unused", **changes), "test")
    made = build(run.model, torch.float32)
    return made, made.reader(run.data.train, 0, run.data)


def rows_of(reader: Any, numbers: Any = None, epoch: int = 0) -> list[Any]:
    account = Account()
    wanted = range(len(reader)) if numbers is None else numbers
    rows = [row for number in wanted for row in reader.training(number, epoch, number, account)]
    assert not account.refused
    return rows


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("kind", ["navit", "vit"])
def test_a_batch_is_each_sample_alone(parts: Path, folder: Path, name: str, kind: str) -> None:
    changes: dict[str, Any] = {"model__connector": {"name": name, **OPTIONS[name]}}
    if kind == "vit":
        changes["model__vision"] = {"model": str(parts / "vit"), "options": {"native": NATIVE}}
    changes["data__train"] = [{"shards": str(folder / "pairs.tar")}, {"shards": str(folder / "train.tar")}]
    made, reader = assembled(parts, folder, **changes)
    rows = rows_of(reader, range(8))
    batch = collate(rows, **made.collate_options)
    assert batch.patches is not None and len(batch.patches) == 12
    assert all(r * c <= 24 for r, c in batch.patches.grids) and len(set(batch.patches.grids)) > 3
    if name == "pixel_shuffle":
        assert all(r % 2 == c % 2 == 0 for r, c in batch.patches.grids)
    lengths = [length for row in rows for length in row.image_lengths]
    expected = [made.model.connector.tokens(*grid) for grid in batch.patches.grids]
    assert lengths == expected == batch.image_lengths_I.tolist()
    together = made.model.logits(batch)
    for place, row in enumerate(rows):
        alone = made.model.logits(collate([row], **made.collate_options))[0]
        # Logits of a random language around 3: the same sums in products of other shapes.
        assert (together[place, : len(alone)] - alone).abs().max() < 2e-5


def test_draws_are_the_samples_own(parts: Path, folder: Path) -> None:
    """Lengths are known before pixels are decoded; every epoch draws anew; evaluation draws nothing."""
    made, reader = assembled(parts, folder, native=DRAWN)
    first, again, later = rows_of(reader), rows_of(reader), rows_of(reader, epoch=1)
    shares = []
    for row, same, other in zip(first, again, later, strict=True):
        mine, its = row.pixels[0], same.pixels[0]
        assert row.image_lengths == [len(mine.places_P)] == same.image_lengths
        assert np.array_equal(mine.patches_PV, its.patches_PV) and np.array_equal(mine.places_P, its.places_P)
        assert (np.diff(mine.places_P) > 0).all() and mine.places_P[-1] < mine.grid[0] * mine.grid[1]
        shares.append(len(mine.places_P) / (mine.grid[0] * mine.grid[1]))
        assert mine.grid != other.pixels[0].grid or not np.array_equal(
            mine.places_P, other.pixels[0].places_P
        )
    assert min(shares) < 0.7 and len(set(shares)) > 4
    measured = [length for n in range(len(reader)) for length in reader.measure(n, 0, n)]
    assert measured == [len(row) for row in first]
    sample, phrasing = reader.sample(3)
    (prompt,) = reader.prompts(sample, phrasing)
    whole = prompt.row.pixels[0]
    assert len(whole.places_P) == whole.grid[0] * whole.grid[1]
    # Patches that stay are those of the same image cut whole.
    row = first[3]
    same = reader.pixels(sample, like=[row.pixels[0]])[0]
    assert same.grid == row.pixels[0].grid
    assert np.array_equal(same.patches_PV[row.pixels[0].places_P], row.pixels[0].patches_PV)


def test_a_batch_without_images_runs_the_tower(parts: Path, folder: Path) -> None:
    for connector in (
        {"name": "mlp"},
        {"name": "pixel_shuffle"},
        {"name": "resampler", **OPTIONS["resampler"]},
    ):
        data = [{"shards": str(folder / "text.tar")}]
        made, reader = assembled(parts, folder, model__connector=connector, data__train=data)
        for rows in (rows_of(reader), []):
            batch = collate(rows, **made.collate_options)
            assert len(batch.patches) == 1 and not len(batch.image_positions_K)
            assert not batch.patches.pixels_TV.any()
            made.model.zero_grad()
            made.model(batch)[0].backward()
            for side in (made.model.vision, made.model.connector):
                assert all(p.grad is not None and not p.grad.any() for p in side.parameters())


def test_a_cached_feature_is_the_feature(parts: Path, folder: Path) -> None:
    made, reader = assembled(parts, folder)
    patches = collate(rows_of(reader), **made.collate_options).patches
    asked: list[int] = []

    def compute(some: Any) -> Any:
        asked.append(len(some))
        return made.model.features(some)

    cache = FeatureCache(size=20)
    with torch.no_grad():
        direct = made.model.features(patches)
        for images, computed in (([0, 1, 2], [3]), ([2, 3, 0], [3, 1]), ([4, 3], [3, 1, 1])):
            found = cache(compute, patches.select(images))
            expected = direct.select(images)
            assert asked == computed
            assert found.grids == expected.grids and found.lengths == expected.lengths
            # Computed among other images: the same sums in products of other shapes.
            assert (found.layers[0] - expected.layers[0]).abs().max() < 1e-6


def test_pixels_of_patches_are_the_images(parts: Path, folder: Path) -> None:
    """An image whose sides are whole patches comes back as it was; others come back resized."""
    made, reader = assembled(parts, folder)
    spec = made.model.vision.image_spec
    data = tiny.image(3, 40, 16)
    image = load(data, spec)
    assert isinstance(image, ImagePatches) and image.grid == (2, 5) and image.shape == (3, 16, 40)
    assert np.array_equal(picture(image, 8), decode(data))
    assert np.array_equal(image.patches_PV[6].reshape(8, 8, 3), decode(data)[8:16, 8:16])
    assert load(tiny.image(3, 400, 160), spec).grid == (3, 8)


BOTH = [
    {"method": "full", "where": "vision", "learning_rate": 1e-3},
    {"method": "full", "where": "connector"},
    {"method": "lora", "where": "language", "r": 4},
]


def test_a_run_from_images_to_answers(parts: Path, folder: Path, tmp_path: Path) -> None:
    """Several texts a row, patches dropped and resolutions drawn, blocks recomputed, all parts trained."""
    held_out = [{"shards": str(folder / "test.tar")}]
    settings = tree(
        parts,
        folder,
        "run",
        DRAWN,
        adapt=BOTH,
        data__batching="packed",
        data__evaluate=held_out,
        train__max_steps=2,
        train__save_steps=2,
        train__gradient_checkpointing=True,
        model__connector={"name": "mlp", "normalise": "data"},
        evaluate__blind=True,
    )
    run = validate(settings, "test")
    assert train(run) == 0
    steps = [line for line in read_journal(folder / "run") if "event" not in line]
    assert len(steps) == 2 and all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in steps)
    made, _, checkpoint = restore(folder / "run")
    fresh = build(run.model, torch.float32)
    moved = [
        (mine - its).abs().max() > 0
        for mine, its in zip(made.model.vision.parameters(), fresh.model.vision.parameters(), strict=True)
    ]
    assert all(moved)
    scores = evaluate_checkpoint(checkpoint)
    assert scores is not None
    session = Session.open(checkpoint, settings=Generation(4))
    replies = []
    for seed, size in enumerate([(64, 16), (10, 50), (24, 24)]):
        (tmp_path / "a.png").write_bytes(tiny.image(seed, *size))
        replies.append("".join(session.ask("what color is the shape?", [tmp_path / "a.png"])))
    grids = [turn.pixels[0].grid for turn in session.history.turns]
    row = session.history.prompt(4)[0]
    assert len(set(grids)) == 3 and row.image_lengths == [rows * columns for rows, columns in grids]
    assert len(replies) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("tower", "deepspeed"), [("navit", "zero2"), ("vit", "zero3")])
def test_two_processes_have_the_losses_of_one(
    parts: Path, folder: Path, server: Any, tower: str, deepspeed: str
) -> None:
    """14 samples, 2 of text alone; the tower trains too."""
    vision = {"model__vision": {"model": str(parts / "vit"), "options": {"native": DRAWN}}}
    runs = []
    for processes, size, stage in ((1, 8, "zero0"), (2, 4, deepspeed)):
        settings = tree(
            parts,
            folder,
            f"{tower}-{stage}",
            DRAWN,
            adapt=BOTH,
            data__train=[{"shards": str(folder / "train.tar")}, {"shards": str(folder / "text.tar")}],
            train__max_steps=6,
            train__save_steps=0,
            train__per_device_train_batch_size=size,
            train__deepspeed=stage,
            **(vision if tower == "vit" else {}),
        )
        server.run(["train", write(settings)], ranks=processes)
        journal = read_journal(Path(settings["output_dir"]))
        runs.append([line for line in journal if "event" not in line])
    one, two = runs
    assert len(one) == len(two) == 6
    for mine, its in zip(one, two, strict=True):
        # As in test_world: float32 sums in another order, carried on by Adam.
        assert its["loss"] == pytest.approx(mine["loss"], rel=3e-6)
        assert its["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-5)


def test_what_does_not_fit_together_is_one_sentence(parts: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="PixelShuffle connector needs every patch"):
        assembled(parts, folder, native=DRAWN, model__connector={"name": "pixel_shuffle"})
    with pytest.raises(UserError, match="grid is for images of one size"):
        assembled(parts, folder, model__connector={"name": "mlp", "grid": 2})
