"""easy-vqa: 64x64 images of one coloured shape with questions about it (Victor Zhou, 2019).

Knows which folder of the wheel holds the data; the questions are read by the data room's converter.
The folder then holds `train/` and `test/`, each with `images/<id>.png` and `questions.json`, and
`answers.txt`.
"""

from __future__ import annotations

from pathlib import Path

from vlm_adapt.weights.archive import Archive
from vlm_adapt.weights.package import Package


def convert(archive: Path, folder: Path) -> None:
    """Write the wheel's data folder into `folder` as it is."""
    with Archive(archive) as wheel:
        wheel.extract("easy_vqa/data", folder, skip=(".DS_Store",))


PACKAGE = Package(
    name="easy-vqa",
    what="questions and answers on 5,000 images of shapes, 64x64 (data)",
    distribution="easy-vqa",
    version="1.0",
    archive="easy_vqa-1.0-py3-none-any.whl",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    size=3_215_672,
    size_on_disk=25_000_000,  # 5,000 files of a few hundred bytes, each a block of 4 kB
    licence="MIT",
    format=1,
    convert=convert,
)
