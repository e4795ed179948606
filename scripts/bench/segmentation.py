"""What segmenters learn on real photographs, beside baselines that learn nothing: one table.

    python scripts/bench/segmentation.py                 trains what is not there yet, then the table
    python scripts/bench/segmentation.py --table         only what is there
    python scripts/bench/segmentation.py --plans         methods on TinyViT, 50 steps each: another table

Four things are measured on CamVid's val (101 frames) and on 20 of COCO's photographs:

- a segmenter trained on CamVid's 11 classes (configs/lseg_camvid.yaml);
- one that never saw cars, pedestrians and trees (configs/lseg_unseen.yaml), asked for them by name;
- one on COCO's photographs without every fifth of their classes (by their numbers), asked for all;
- "automobile" in place of "car": how much of the one's mask is the other's.

Beside each: always the likeliest class, and the untrained bridge of bridge.py. Needs the shards that
data/README.md makes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

FIGURES = ("miou", "pixel_accuracy", "miou_seen", "miou_unseen", "harmonic_miou")
COCO_TEST, COCO_TRAIN = 20, 80


def coco_unseen() -> list[str]:
    """Every fifth class of COCO's photographs that is seen in those held out."""
    from vlm_adapt.config.schema import Data, Source
    from vlm_adapt.data.mask_reader import MaskReader
    from vlm_adapt.image_spec import ImageSpec

    reader = MaskReader([Source(shards="data/coco128")], ImageSpec((64, 64)), 0, Data(augment=None))
    labels = reader.whole(0).labels
    return list(labels[2::5])


def overrides(name: str) -> list[str]:
    """What a run changes in its configuration."""
    if name != "coco":
        return []
    unseen = json.dumps(coco_unseen())
    return [
        "output_dir=outputs/lseg_coco",
        f"data.train=[{{shards: data/coco128, limit: {COCO_TRAIN}, "
        f"task: {{name: masks, leave_out: {unseen}}}}}]",
        "data.evaluate=[{shards: outputs/coco128-test.tar}]",
        f"evaluate.unseen={unseen}",
        "train.max_steps=200",
    ]


def held_out() -> None:
    """The last of COCO's photographs as a shard of their own."""
    import tarfile

    path = Path("outputs/coco128-test.tar")
    if path.is_file():
        return
    path.parent.mkdir(exist_ok=True)
    with tarfile.open("data/coco128/000000.tar") as source:
        members = source.getmembers()
        keys = list(dict.fromkeys(member.name.split(".")[0] for member in members))[-COCO_TEST:]
        with tarfile.open(path, "w") as target:
            for member in members:
                if member.name.split(".")[0] in keys:
                    target.addfile(member, source.extractfile(member))


STEPS = 50  # of each plan
TOWER = {"model": "timm:tiny_vit_5m_224", "weights": "package:mobile-sam-tinyvit", "image_size": [288, 384]}
FULL = {"method": "full", "where": "connector", "learning_rate": 2e-3}


def vision(method: str, learning_rate: float, **settings: Any) -> list[dict[str, Any]]:
    """A line on the tower."""
    return [{"method": method, "where": "vision", "learning_rate": learning_rate, **settings}]


PLANS: dict[str, list[dict[str, Any]]] = {
    "head alone": [],
    "full": vision("full", 2e-4),
    "norm_tuning": vision("norm_tuning", 1e-3),
    "lora": vision("lora", 1e-3, r=8),
    "adaptformer": vision("adaptformer", 1e-3, bottleneck=16),
    "visual_prompt_windows": vision("visual_prompt_windows", 1e-2),
    "conv_lora": vision("conv_lora", 1e-3, r=4),
}
RUNS = {
    "camvid": ("configs/lseg_camvid.yaml", "outputs/lseg_camvid"),
    "unseen": ("configs/lseg_unseen.yaml", "outputs/lseg_unseen"),
    "coco": ("configs/lseg_unseen.yaml", "outputs/lseg_coco"),
}


def train(name: str) -> None:
    """Train a run unless it has finished; how long it took is kept beside it."""
    from vlm_adapt.cli import main as verb

    config, output = RUNS[name]
    seconds, cpu = time.monotonic(), time.process_time()
    code = verb(["train", config, *overrides(name)])
    if code:
        raise SystemExit(code)
    if not (kept := Path(output) / "seconds.json").is_file():
        spent = {"wall": time.monotonic() - seconds, "cpu": time.process_time() - cpu}
        kept.write_text(json.dumps(spent))


def bridge_scores(run: Any) -> dict[str, Any]:
    """The untrained bridge on what a run is scored on."""
    from bridge import Bridge

    from vlm_adapt.data.mask_reader import MaskReader
    from vlm_adapt.evaluate.segment import evaluate

    class Assembled:
        """What the evaluation asks of a model."""

        model = Bridge((360, 480))

        def reader(self, sources: Any, seed: int, data: Any) -> Any:
            """Samples with masks."""
            return MaskReader(sources, self.model.image_spec, seed, data)

    settings = run.evaluate.model_copy(update={"window": "whole", "loss": False})
    return evaluate(Assembled(), run.data, settings).metrics  # type: ignore[arg-type]


def agreement(checkpoint: str, one: str, other: str) -> dict[str, float]:
    """A checkpoint asked for a class by its name and by a synonym: both IoUs, and that of the two masks."""
    from vlm_adapt.data.mask_reader import MaskReader
    from vlm_adapt.models.dense_inference import DenseInference
    from vlm_adapt.models.restore import restore_any

    assembled, run, _ = restore_any(checkpoint)
    reader: MaskReader = assembled.reader(run.data.evaluate, 0, run.data)
    inference = DenseInference(assembled.model, window="whole")
    counts = dict.fromkeys(("one", "other", "both", "one_truth", "other_truth", "truth"), 0)
    for number in range(len(reader)):
        whole = reader.whole(number)
        place = whole.labels.index(one)
        renamed = [other if name == one else name for name in whole.labels]
        first = (inference.classes(whole.pixels_HWC, whole.labels)[0] == place) & (whole.mask_HW >= 0)
        second = (inference.classes(whole.pixels_HWC, renamed)[0] == place) & (whole.mask_HW >= 0)
        truth = whole.mask_HW == place
        for key, mask in (
            ("one", first),
            ("other", second),
            ("truth", truth),
            ("both", first & second),
            ("one_truth", first & truth),
            ("other_truth", second & truth),
        ):
            counts[key] += int(mask.sum())

    def iou(a: str, b: str, both: str) -> float:
        return counts[both] / max(1, counts[a] + counts[b] - counts[both])

    return {
        f"iou_{one}": iou("one", "truth", "one_truth"),
        f"iou_{other}": iou("other", "truth", "other_truth"),
        "iou_of_the_two": iou("one", "other", "both"),
    }


def plan_table() -> str:
    """Each plan trained for some steps on CamVid: what it trains, stores, costs and scores; Markdown."""
    from vlm_adapt.cli import main as verb

    lines = [
        "| on the tower | trained | of the tower | CPU-s a step | mIoU % | pixel accuracy % |",
        "|---|---|---|---|---|---|",
    ]
    for name, plan in PLANS.items():
        output = Path("outputs") / f"lseg_plan_{name.split()[0]}"
        if not (output / "metrics.json").is_file():
            # In a process of its own: each starts from the same random state, and its time is its own.
            started = os.times()
            child = os.fork()
            if not child:
                tower = json.dumps(TOWER | {"layers": [0, 1, 2, 3]})
                changes = [f"output_dir={output}", f"model.vision={tower}", f"train.max_steps={STEPS}"]
                changes += [f"adapt={json.dumps([FULL, *plan])}", "train.save_steps=0"]
                os._exit(verb(["train", "configs/lseg_camvid.yaml", *changes]))
            _, status = os.waitpid(child, 0)
            if status:
                raise SystemExit(f"'{name}' did not train")
            ended = os.times()
            spent = ended.children_user + ended.children_system
            spent -= started.children_user + started.children_system
            (output / "seconds.json").write_text(json.dumps({"cpu": spent}))
        metrics = json.loads((output / "metrics.json").read_text())
        parts = {row["part"]: row for row in json.loads((output / "parts.json").read_text())}
        trained = parts["vision"]["trainable"]
        share = trained / max(1, trained + parts["vision"]["frozen"])
        seconds = json.loads((output / "seconds.json").read_text())["cpu"] / STEPS
        lines.append(
            f"| {name} | {trained:,} | {100 * share:.1f} % | {seconds:.2f} | {100 * metrics['miou']:.1f} | "
            f"{100 * metrics['pixel_accuracy']:.1f} |"
        )
    return "\n".join(lines)


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"| | {' | '.join(FIGURES)} |", "|" + "---|" * (len(FIGURES) + 1)]
    for name, metrics in results.items():
        values = (metrics.get(figure) for figure in FIGURES)
        cells = ("" if value is None else f"{100 * value:.1f}" for value in values)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, score everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="runs, separated by commas")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--plans", action="store_true", help="methods on the tower, compared")
    parser.add_argument("--output", type=Path, default=Path("outputs/segmentation.json"))
    given = parser.parse_args()
    if given.plans:
        print(plan_table())
        return
    names = given.only.split(",") if given.only else list(RUNS)
    held_out()
    if not given.table:
        for name in names:
            train(name)
    from vlm_adapt.config.load import load_run
    from vlm_adapt.evaluate.checkpoint import score

    results: dict[str, Any] = {}
    for name in names:
        config, output = RUNS[name]
        metrics = json.loads((Path(output) / "metrics.json").read_text())
        results[f"{name}: trained"] = metrics
        if "unseen" in metrics:  # as it is, without a handicap of the seen
            results[f"{name}: no handicap"] = score(output, ["evaluate.handicap=0"])[0].metrics
        for kind, figures in metrics["baselines"].items():
            results[f"{name}: {kind}"] = figures
        results[f"{name}: untrained bridge"] = bridge_scores(load_run(config, overrides(name)))
    print(table(results))
    if "camvid" in names:
        results["automobile"] = agreement("outputs/lseg_camvid", "car", "automobile")
        print(json.dumps(results["automobile"], indent=1))
    given.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
