"""The connector's warm start: its objective, its statistics, and the cache of a frozen tower's features."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from vlm_adapt.config.load import validate
from vlm_adapt.config.schema import Run
from vlm_adapt.data.collate import collate
from vlm_adapt.errors import UserError
from vlm_adapt.models.build import Assembled, build
from vlm_adapt.models.feature_cache import FeatureCache
from vlm_adapt.models.objectives.embedding import embedding
from vlm_adapt.models.restore import restore
from vlm_adapt.train.run import train

FULL = [{"method": "full", "where": "connector", "learning_rate": 2e-3}]


def tree(folder: Path, **changes: object) -> dict[str, object]:
    return tiny.run_tree(folder, model__connector={"name": "mlp", "normalise": "data"}, adapt=FULL, **changes)


def assembled(folder: Path) -> tuple[Run, Assembled]:
    run = validate(tree(folder), "test")
    return run, build(run.model, torch.float32)


def test_the_objective_is_its_formula(tmp_path: Path) -> None:
    run, made = assembled(tmp_path)
    reader = made.reader(run.data.train, 0, run.data)
    rows = [row for number in (0, 1, 4) for row in reader.rows(*_first(reader, number))]
    batch = collate(rows, **made.collate_options)
    total, losses_N = embedding(made.model, batch)

    table = made.model.language.model.get_input_embeddings().weight.detach()
    center = table[:: max(1, len(table) // 4096)].mean(0)
    tokens_NKD = made.model.image_tokens(batch.pixels_ICHW)
    expected, place = [], 0
    for number, row in enumerate(rows):
        pooled = tokens_NKD[number].mean(0) - center
        wanted = torch.zeros_like(pooled)
        for word in row.targets:
            if int(word) not in made.stop_ids:
                unit = torch.nn.functional.normalize(table[word] - center, dim=0)
                wanted = wanted + unit * torch.log1p(torch.tensor(float(word))) / torch.log(
                    torch.tensor(float(len(table)))
                )
        loss = 1 - torch.dot(pooled, wanted) / (pooled.norm() * wanted.norm())
        expected += [loss] * len(row.targets)
        place += len(row.targets)
    # float32 sums of 32 terms in another order: 2e-7 seen
    torch.testing.assert_close(losses_N, torch.stack(expected).detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(total.detach(), losses_N.sum(), atol=1e-5, rtol=0)
    total.backward()
    assert all(p.grad is not None for p in made.model.connector.parameters())


def _first(reader, number: int):
    sample, phrasing = reader.sample(number)
    pairs = [(q["question"], q["answer"]) for q in sample.record["questions"]]
    return sample, [phrasing.template.questions(pairs, 1)]


def test_text_alone_has_no_loss_but_runs_the_connector(tmp_path: Path) -> None:
    tiny.questions_shard(tmp_path / "text.tar", 3, images=0)
    run = validate(tree(tmp_path, data__train=[{"shards": str(tmp_path / "text.tar")}]), "test")
    made = build(run.model, torch.float32)
    reader = made.reader(run.data.train, 0, run.data)
    sample, phrasing = reader.sample(0)
    rows = reader.rows(sample, [phrasing.template.questions([("what?", "red")], 0)])
    total, _ = embedding(made.model, collate(rows, **made.collate_options))
    assert float(total.detach()) == 0.0
    total.backward()
    assert all(float(p.grad.abs().sum()) == 0 for p in made.model.connector.parameters())


def test_statistics_give_unit_channels_and_stay_with_the_checkpoint(tmp_path: Path) -> None:
    run = validate(tree(tmp_path, train__max_steps=2), "test")
    assert train(run) == 0
    made, _, _ = restore(tmp_path / "out")
    gather = made.model.connector.gather
    assert not gather.wants_data
    reader = made.reader(run.data.train, 0, run.data)
    pixels = [torch.from_numpy(reader.pixels(reader.sample(n)[0])[0]) for n in range(len(reader))]
    with torch.no_grad():
        (features_NPV,) = made.model.features(torch.stack(pixels))
        normal = gather([features_NPV]).flatten(0, 1)
    # 24 images of 4 patches: all of them gave the statistics, so means are 0 and deviations 1
    torch.testing.assert_close(normal.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.std(0), torch.ones(32), atol=1e-4, rtol=0)


def test_a_cached_feature_is_the_feature(tmp_path: Path) -> None:
    _, made = assembled(tmp_path)
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    asked: list[int] = []

    def compute(some: torch.Tensor) -> list[torch.Tensor]:
        asked.append(len(some))
        return made.model.features(some)

    cache = FeatureCache(size=8)
    with torch.no_grad():
        direct = made.model.features(pixels)[0]
        first = cache(compute, pixels)[0]
        again = cache(compute, pixels[[4, 0, 0]])[0]
    assert asked == [5]
    # The same image in another batch: matrix products may add in another order
    torch.testing.assert_close(first, direct, atol=1e-5, rtol=0)
    assert torch.equal(again, first[[4, 0, 0]])
    assert len(FeatureCache(2).kept) == 0
    small = FeatureCache(2)
    small(compute, pixels)
    assert len(small.kept) == 2


def test_two_stages_warm_up_and_tune(tmp_path: Path) -> None:
    stages = [
        {"name": "align", "train": {"objective": "embedding", "cache_features": 50, "max_steps": 12}},
        {"name": "tune", "train": {"max_steps": 2}},
    ]
    run = validate(tree(tmp_path, stages=stages, train__learning_rate=5e-3), "test")
    assert train(run) == 0
    lines = [
        line for line in (tmp_path / "out" / "journal.jsonl").read_text().splitlines() if '"loss"' in line
    ]
    assert len(lines) == 14


def test_a_cache_needs_a_frozen_tower(tmp_path: Path) -> None:
    lora = [*FULL, {"method": "lora", "where": "vision", "r": 2}]
    run = validate(tree(tmp_path, train__cache_features=5) | {"adapt": lora}, "test")
    with pytest.raises(UserError, match="frozen tower"):
        train(run)
