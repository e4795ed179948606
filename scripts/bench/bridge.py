"""The untrained bridge: an ImageNet classifier laid over an image, its guesses' names embedded as text.

A baseline for open-vocabulary segmentation without any mask: efficientnet-lite0 says at every place of its
last map which of 1,000 classes it sees; the ten likeliest names, embedded by MiniLM and weighted by their
probabilities, are the place's embedding, and a label is found by the cosine. From vectors the mean of
their kind is taken off first, which helps much (CamVid, a quarter of val, 360 x 480: 12.2 against 8.4 %
mIoU). It has the seam of models/segmenter.py, so that the same evaluation runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LIKELIEST = 10


class Bridge(nn.Module):
    """efficientnet-lite0 and MiniLM, both frozen, from their packages.

    Args:
        image_size: (height, width) of what it sees at once.
    """

    def __init__(self, image_size: tuple[int, int]):
        super().__init__()
        import timm
        from safetensors.torch import load_file
        from timm.data import ImageNetInfo

        from vlm_adapt import weights
        from vlm_adapt.config.models import TextEncoder
        from vlm_adapt.image_spec import ImageSpec
        from vlm_adapt.models.texts import text_encoder
        from vlm_adapt.text.labels import LabelEmbeddings

        file = weights.tensors_file(weights.fetch("efficientnet-lite0"))
        self.trunk: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
        self.trunk.load_state_dict(load_file(file))
        half = (0.5, 0.5, 0.5)
        self.image_spec = ImageSpec(image_size, half, half, "squash", "bicubic")
        encoder = text_encoder(TextEncoder(model="package:all-minilm-l6-v2"), torch.float32)
        self._labels = [LabelEmbeddings(encoder)]
        info = ImageNetInfo()
        names = [info.index_to_description(number).split(",")[0] for number in range(info.num_classes())]
        classes_CE = self._labels[0](names)
        self.register_buffer("classes_CE", classes_CE - classes_CE.mean(0), persistent=False)

    @torch.no_grad()
    def embed(self, pixels_NCHW: Tensor) -> Tensor:
        """uint8 images to embeddings_NEhw of length 1."""
        maps_NChw = self.trunk.forward_features((pixels_NCHW.float() / 255 - 0.5) / 0.5)
        logits_NhwC = self.trunk.classifier(maps_NChw.permute(0, 2, 3, 1))
        shares_NhwK, places_NhwK = logits_NhwC.softmax(-1).topk(LIKELIEST)
        classes_CE: Any = self.classes_CE
        embeddings_NhwE = (shares_NhwK[..., None] * classes_CE[places_NhwK]).sum(-2)
        return functional.normalize(embeddings_NhwE, dim=-1).permute(0, 3, 1, 2)

    @torch.no_grad()
    def label_logits(self, embeddings_NEhw: Tensor, names: Sequence[str], size: tuple[int, int]) -> Tensor:
        """logits_NLHW at `size`."""
        labels_LE = self._labels[0](list(names))
        labels_LE = functional.normalize(labels_LE - labels_LE.mean(0) * (len(names) > 1), dim=1)
        logits_NLhw = torch.einsum("nehw,le->nlhw", embeddings_NEhw, labels_LE) / 0.07
        return functional.interpolate(logits_NLhw, size, mode="bilinear", align_corners=True)

    def classes(
        self, embeddings_NEhw: Tensor, names: Sequence[str], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """(classes_NHW, scores_NHW)."""
        scores, classes = self.label_logits(embeddings_NEhw, names, size).max(1)
        return classes, scores
