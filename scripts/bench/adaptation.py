"""Every adaptation method on one real small task: what it stores, keeps in memory, costs, and learns.

The task: SmolLM2-135M and TinyViT answer easy-vqa's questions about colour and shape, after a short warm
start of the connector that all methods share (one a seed). Each method trains beside the connector at about
the same number of weights where its definition lets it choose (plans.py). What is scored are the questions of
held-out images: the mean of colour's and shape's accuracy.

    python scripts/bench/adaptation.py                       all methods, 3 seeds: hours on one core
    python scripts/bench/adaptation.py --only lora,bitfit --seeds 1 --steps 20
    python scripts/bench/adaptation.py --costs               costs alone, one method at a time
    python scripts/bench/adaptation.py --table               the tables and the plot of what is there
    python scripts/bench/adaptation.py --table --page docs/adaptation_costs.md   and put them into the page

Stopped, it goes on: a method and seed that has its file is not run again. Costs are CPU-seconds of one
thread; run them on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

from adaptation_table import into_page, read_results, tables, write_plot  # noqa: E402
from plans import PLANS  # noqa: E402

DATA = Path("data/easy-vqa")
KINDS = {"color": 1, "shape": 1}
ALIGN_STEPS, IMAGES = 200, 50


def tree_of(output: Path, seed: int, adapt: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """A run as plain values, from the quickstart's model."""
    from vlm_adapt.config.load import read_yaml

    return {
        "output_dir": str(output),
        "seed": seed,
        "model": read_yaml(Path("configs/quickstart.yaml"))["model"],
        "adapt": adapt,
        "data": {
            "train": [{"shards": str(DATA / "train"), "questions_per_kind": KINDS}],
            "evaluate": [{"shards": str(output.parent / "test.tar")}],
        },
        "train": {
            "max_steps": steps,
            "per_device_train_batch_size": 8,
            "learning_rate": 2e-3,
            "warmup_ratio": 0.05,
            "save_steps": 0,
            "deepspeed": "zero0",
        },
        "evaluate": {"batch_size": 32, "max_new_tokens": 6, "loss": False},
    }


def held_out(path: Path) -> None:
    """The first test images, with their questions about colour and shape alone."""
    if path.is_file():
        return
    with tarfile.open(DATA / "test" / "000000.tar") as source, tarfile.open(path, "w") as target:
        for number, member in enumerate(source):
            if number >= 2 * IMAGES:  # a picture and a record each
                break
            file = source.extractfile(member)
            assert file is not None
            data = file.read()
            if member.name.endswith(".json"):
                record = json.loads(data)
                record["questions"] = [one for one in record["questions"] if one["kind"] in KINDS]
                data = json.dumps(record).encode()
                member.size = len(data)
            target.addfile(member, io.BytesIO(data))


def align(output: Path, seed: int) -> Path:
    """The warm start of a seed: the connector turned towards the answers' words, the language not run."""
    folder = output / f"align-seed{seed}"
    tree = tree_of(folder, seed, [{"method": "full", "where": "connector"}], ALIGN_STEPS)
    tree["data"]["evaluate"] = []
    tree["data"]["train"][0]["limit"] = 1000
    tree["train"] |= {"objective": "embedding", "cache_features": 1000, "per_device_train_batch_size": 64}
    _train(tree)
    return folder / (folder / "latest").read_text().strip()


def _train(tree: dict[str, Any]) -> None:
    from vlm_adapt.config.load import validate
    from vlm_adapt.train.run import train

    code = train(validate(tree, "bench"))
    if code:
        raise SystemExit(code)


def with_connector(name: str, warm: Path | None) -> list[dict[str, Any]]:
    """The lines of a plan: the connector trains beside every method."""
    lines = [dict(line) for line in PLANS[name]]
    connector: dict[str, Any] = {"method": "full", "where": "connector", "learning_rate": 5e-4}
    if warm is not None:
        connector["start"] = str(warm)
    return [connector, *lines]


def learn(name: str, seed: int, output: Path, steps: int) -> dict[str, Any]:
    """Train and score one method with one seed."""
    warm = output / f"align-seed{seed}"
    warm = warm / (warm / "latest").read_text().strip()
    folder = output / f"{name}-seed{seed}"
    started = time.process_time()
    _train(tree_of(folder, seed, with_connector(name, warm), steps))
    metrics = json.loads((folder / "metrics.json").read_text())
    return {
        "accuracy": sum(metrics["accuracy_by_kind"].values()) / len(KINDS),
        "by_kind": metrics["accuracy_by_kind"],
        "questions": metrics["samples_by_kind"],
        "steps": steps,
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def costs(name: str, seed: int, output: Path, timed: int = 5) -> dict[str, Any]:
    """What a method trains, stores, keeps for the backward pass, and takes a step; median of 5 after 2.

    With fewer `timed`, the median is of fewer; what is kept is that of the eighth batch in any case.
    """
    import resource

    import torch

    from vlm_adapt.adapt.saved_memory import saved_bytes
    from vlm_adapt.config.load import validate
    from vlm_adapt.models.build import build, compute_dtype
    from vlm_adapt.models.calibrate import calibrate
    from vlm_adapt.train.feed import build_feed

    torch.set_num_threads(1)
    run = validate(tree_of(output / "costs", 0, with_connector(name, None), 8), "bench")
    dtype = compute_dtype("auto")
    assembled = build(run.model, dtype, 0)
    plan = assembled.adapt([run.adapt])
    feed = build_feed(assembled, run, run, 0)
    calibrate(assembled, feed.reader, feed.plan)
    batches = [step.batches[0] for step in feed.stream.steps(feed.rows.start(), 8)]
    methods = [item.method for item in plan.attached]
    parameters = [p for method in methods for p in method.parameters.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    model, times = assembled.model.train(), []

    def one(batch: Any) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            total, losses = model(batch)
        (total / len(losses)).backward()
        optimizer.step()
        optimizer.zero_grad()

    for batch in batches[: 2 + timed]:
        started = time.process_time()
        one(batch)
        times.append(time.process_time() - started)
    with saved_bytes(model) as seen:
        one(batches[7])
    mine = [item for item in plan.attached if item.label != "connector-full"]
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for item in mine for p in item.method.parameters.values())
    return {
        "trained": trained,
        "share": trained / every,
        "stored": sum(item.method.bytes_stored() for item in mine if item.method.parameters),
        "saved_activations": seen.bytes,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "cpu_seconds_a_step": sorted(times[2:])[len(times[2:]) // 2],
        "dtype": str(dtype).removeprefix("torch."),
    }


def forked(work: Callable[[], dict[str, Any]], file: Path) -> int:
    """Run `work` in a process of its own, which writes its result to `file`; its process number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(file.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        result = work()
        file.with_suffix(".tmp").write_text(json.dumps(result, indent=1))
        os.replace(file.with_suffix(".tmp"), file)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_all(jobs: list[tuple[Path, Callable[[], dict[str, Any]]]], at_once: int) -> None:
    """Every job that has no file yet, some at a time; says how far it is and how long it will take."""
    todo = [(file, work) for file, work in jobs if not file.is_file()]
    print(f"{len(jobs) - len(todo)} done before, {len(todo)} to do, {at_once} at a time", file=sys.stderr)
    running: dict[int, Path] = {}
    started, done = time.monotonic(), 0
    queue = list(todo)
    while queue or running:
        while queue and len(running) < at_once:
            file, work = queue.pop(0)
            running[forked(work, file)] = file
        pid, status = os.wait()
        file = running.pop(pid)
        done += 1
        left = (time.monotonic() - started) / done * (len(todo) - done)
        outcome = "" if status == 0 else f" FAILED, see {file.with_suffix('.log')}"
        print(f"{done} of {len(todo)}: {file.stem}{outcome}; {left / 60:.0f} min left", file=sys.stderr)


def main() -> None:
    """Run what is asked for, then print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="methods, separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--at-once", type=int, default=1, help="processes, a thread each")
    parser.add_argument("--costs", action="store_true", help="costs alone")
    parser.add_argument("--timed", type=int, default=5, help="steps that are timed for the costs: 1 to 5")
    parser.add_argument("--table", action="store_true", help="only what is there")
    parser.add_argument("--page", type=Path, help="a page to put the tables into, the plot beside it")
    parser.add_argument("--output", type=Path, default=Path("outputs/adaptation"))
    given = parser.parse_args()
    names = given.only.split(",") if given.only else list(PLANS)
    unknown = [name for name in names if name not in PLANS]
    if unknown:
        parser.error(f"no method '{unknown[0]}': there are {', '.join(PLANS)}")
    output = given.output
    output.mkdir(parents=True, exist_ok=True)
    if not given.table:
        from vlm_adapt.cli import main as verb

        for part in ("mobile-sam-tinyvit", "smollm2-135m-instruct", "easy-vqa"):
            verb(["weights", "fetch", part])
        for split in ("train", "test"):
            verb(["shards", "write", "easy_vqa", "package:easy-vqa", str(DATA / split), f"split={split}"])
        held_out(output / "test.tar")
        # Imported once: each run is a fork.
        import deepspeed  # noqa: F401
        import peft  # noqa: F401
        import timm  # noqa: F401
        import torch
        import transformers.models.llama.modeling_llama  # noqa: F401

        import vlm_adapt.train.run  # noqa: F401

        torch.set_num_threads(1)
        bound = [
            (output / f"costs-{name}.json", lambda name=name: costs(name, 0, output, given.timed))
            for name in names
        ]
        if not given.costs:
            seeds = range(given.seeds)
            warm = [
                (output / f"align-{s}.json", lambda s=s: {"checkpoint": str(align(output, s))}) for s in seeds
            ]
            run_all(warm, given.at_once)
            work = [
                (output / f"{name}-{s}.json", lambda n=name, s=s: learn(n, s, output, given.steps))
                for s in seeds
                for name in names
            ]
            run_all(work, given.at_once)
        run_all(bound, 1)
    results = read_results(output, list(PLANS))
    print(tables(results))
    write_plot(results, output / "adaptation.png")
    print(f"\n{output / 'adaptation.png'}")
    if given.page:
        into_page(results, given.page)


if __name__ == "__main__":
    main()
