"""What each plan of scripts/bench/adaptation.py trains and stores, from shapes alone: seconds, no weights.

    python scripts/bench/adaptation_counts.py

Fills the table's first columns for methods whose costs were not measured yet. Knows how plans become runs;
knows nothing about training.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from adaptation import tree_of, with_connector  # noqa: E402
from plans import PLANS  # noqa: E402

OUTPUT = Path("outputs/adaptation")


def counts(name: str) -> dict[str, float]:
    """Trained and stored beside the connector, as adaptation.py's costs have them."""
    from vlm_adapt.config.load import validate
    from vlm_adapt.models.outline import outline

    run = validate(tree_of(OUTPUT / "counts", 0, with_connector(name, None), 8), "bench")
    (stage,) = outline(run)
    lines = [line for line in stage.lines if line.label != "connector-full"]
    trained = sum(line.count for line in lines)
    return {
        "trained": trained,
        "share": trained / stage.total,
        "stored": sum(line.bytes_stored for line in lines),
    }


def main() -> None:
    """Write what is not there yet."""
    import torch

    torch.set_num_threads(1)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for name in PLANS:
        file = OUTPUT / f"counts-{name}.json"
        if not file.is_file():
            file.write_text(json.dumps(counts(name), indent=1))
            print(name, json.loads(file.read_text()))


if __name__ == "__main__":
    main()
