"""More of peft's tuners of linear layers by name, one tiny class each; see tuners.py.

Knows literals, and where a tuner needs a hand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.tuner import Tuner


class GraLora(Tuner):
    """LoRA on sub-blocks of the weight."""

    name = "gralora"
    kind = "GRALORA"
    summary = "k x k sub-blocks of the weight, each with its own low-rank update"
    paper = "Jung et al. 2025, arXiv 2505.20355"
    example = {"r": 4}


class DeLora(Tuner):
    """Normalised low-rank update with a trained strength."""

    name = "delora"
    kind = "DELORA"
    summary = "low-rank update of normalised components and a trained bound of its strength"
    paper = "Bini et al. 2025, arXiv 2503.18225"
    example = {"r": 4}


class HiRa(Tuner):
    """Low-rank product times the weight, entry by entry."""

    name = "hira"
    kind = "HIRA"
    summary = "W + W * (B A): high-rank update by a Hadamard product with the weight"
    paper = "Huang et al. 2025 (HiRA), ICLR 2025"
    layers = ("linear", "conv")
    additive = False
    nests = False
    example = {"r": 4}


class Lily(Tuner):
    """Low-rank experts shared across layers."""

    name = "lily"
    kind = "LILY"
    summary = "down-projections of neighbouring layers and a router over shared up-projections"
    paper = "Zhong et al. 2024, arXiv 2407.09946"
    mergeable = False
    example = {"r": 4}


class Miss(Tuner):
    """One small matrix, shared by shards of the weight."""

    name = "miss"
    kind = "MISS"
    summary = "one small matrix repeated over the shards of the weight"
    paper = "Kang et al. 2024, arXiv 2409.15371"
    example = {"r": 4}


class Peanut(Tuner):
    """The update is a small network of the weight."""

    name = "peanut"
    kind = "PEANUT"
    summary = "the update is a small network's function of the weight itself"
    paper = "Zhong et al. 2024 (PEANuT), arXiv 2410.01870"
    additive = False
    nests = False
    example = {"r": 4}


class Glora(Tuner):
    """Weight, bias and prompt-like terms together."""

    name = "glora"
    kind = "GLORA"
    summary = "low-rank scale and shift of the weight, and of the bias"
    paper = "Chavan et al. 2023, arXiv 2306.07967"
    additive = False
    nests = False
    example = {"r": 4}


class Psoft(Tuner):
    """Orthogonal tuning inside the principal subspace."""

    name = "psoft"
    kind = "PSOFT"
    summary = "rotation and two scales inside the weight's principal subspace of rank r"
    paper = "2025 (PSOFT), openreview FSHrinMArK"
    example = {"r": 4}


class Osf(Tuner):
    """The minor singular directions of the weight."""

    name = "osf"
    kind = "OSF"
    summary = "the weight's minor singular directions train, its major ones are kept"
    paper = "Nayak et al. 2025, arXiv 2504.07097"
    additive = False
    nests = False
    stacks = False
    example = {"effective_rank": 0.5}

    def attach(self, place: Place) -> None:
        """As in Tuner; peft's projection of gradients stays float32 where backward runs under autocast."""
        super().attach(place)
        for parameter in self.parameters.values():
            hooks: Any = parameter._backward_hooks
            for key, hook in (hooks or {}).items():
                hooks[key] = partial(_without_autocast, hook)


def _without_autocast(hook: Callable[[Tensor], Tensor], grad: Tensor) -> Tensor:
    with torch.autocast(grad.device.type, enabled=False):
        return hook(grad)


class Deft(Tuner):
    """Projection out of a subspace, and injection into it."""

    name = "deft"
    kind = "DEFT"
    summary = "takes r directions out of the weight and puts trained ones in"
    paper = "DEFT, as in peft 0.21"
    additive = False
    nests = False
    example = {"r": 4}


class Frod(Tuner):
    """Sparse rotation in bases shared by layers of one kind."""

    name = "frod"
    kind = "FROD"
    summary = "sparse full-rank update in a basis shared by all layers of one name"
    paper = "FRoD, AAAI 40, doi 10.1609/aaai.v40i31.39813"
    additive = False
    nests = False
    shares = True
    reads_values = True
    example = {"sparse_rate": 0.1, "progressbar": False}


class Beft(Tuner):
    """A vector added to the output."""

    name = "beft"
    kind = "BEFT"
    summary = "a trained vector added to a layer's output"
    paper = "2025 (BEFT), arXiv 2509.15974"
    mergeable = False
