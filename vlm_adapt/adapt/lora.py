"""Low-rank adaptation through peft, on any part, with the variants that peft's settings choose.

W + (lora_alpha / r) B A, with A random and B zero at the start (Hu et al. 2021, LoRA, section 4.1).
Knows which settings change the base's weights or need data; the formulas are peft's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm_adapt.adapt import tuner_targets
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.tuner import Tuner
from vlm_adapt.errors import UserError

if TYPE_CHECKING:
    from vlm_adapt.adapt.directions import Directions

CHANGES_BASE = ("pissa", "olora", "loftq")  # starts that take the first B A out of W, or quantise W
NEEDS = {
    "corda": "peft's preprocess_corda before the first step",
    "lora_ga": "gradients of data before the first step",
}
UNFIT = {
    "alora_invocation_tokens": "it looks for tokens in ids, and images have none",
    "monteclora_config": "its loss has a term that only peft's own model adds",
    "arrow_config": "it chooses among adapters trained before",
    "eva_config": "ranks stay where they are here; leave it out",
    "corda_config": NEEDS["corda"],
    "lora_ga_config": NEEDS["lora_ga"],
}


class Lora(Tuner):
    """LoRA on the linear layers, convolutions or fused attentions of a part.

    Args:
        r: rank.
        lora_alpha: the update is scaled by lora_alpha / r (twice r by default).
        lora_dropout: dropout on the adapter's input.
        target_modules: `all-linear` (of the part's blocks), a name, or a list of names: a layer is
            chosen when its dotted name ends with one of them.
        settings: further fields of peft's LoraConfig. `use_dora` (Liu et al. 2024, arXiv 2402.09353),
            `use_rslora` (Kalajdzievski 2023, arXiv 2312.03732), `init_lora_weights`: `pissa` (Meng et al.
            2024, arXiv 2404.02948), `eva` (Paischer et al. 2024, arXiv 2410.07170: A from what layers read
            of the first batches), `loftq` (Li et al. 2023, arXiv 2310.08659), `olora`, `orthogonal`, …

    Raises:
        UserError: a target matches nothing, or peft refuses the settings.
    """

    name = "lora"
    kind = "LORA"
    summary = "low-rank updates of linear layers (DoRA, rsLoRA, PiSSA, EVA, OLoRA, LoftQ by peft's settings)"
    paper = "Hu et al. 2021, arXiv 2106.09685"
    layers = ("linear", "conv", "attention")
    example = {"r": 4}

    def __init__(
        self,
        r: int = 8,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        target_modules: str | Sequence[str] = "all-linear",
        **settings: Any,
    ):
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise UserError(f"adapt: LoRA's r is a whole number from 1, not {r!r}")
        start = settings.get("init_lora_weights", True)
        for key, reason in UNFIT.items():
            if settings.get(key) is not None:
                raise UserError(f"adapt: '{self.name}' cannot take '{key}': {reason}")
        if start in NEEDS:
            raise UserError(
                f"adapt: init_lora_weights '{start}' needs {NEEDS[start]}, which a plan does not have: take "
                "'pissa' or 'orthogonal', which need the weights alone"
            )
        self.on_meta, self.looks = False, start == "eva"
        self.changes_base = isinstance(start, str) and start.lower().startswith(CHANGES_BASE)
        self.changes_base = self.changes_base or settings.get("kasa_config") is not None
        if self.changes_base:
            self.stacks = False
        if start == "mica":
            self.reads_values = True
        if settings.get("use_dora"):  # it divides by the norm of the whole weight
            self.additive = self.nests = False
            self.reads_values = True
        alpha = 2 * r if lora_alpha is None else lora_alpha
        super().__init__(target_modules, r=r, lora_alpha=alpha, lora_dropout=lora_dropout, **settings)
        self.originals: list[tuple[Any, Tensor]] = []

    def configure(self, names: Sequence[str]) -> Any:
        """As in Tuner, with a fused attention of our own."""
        from vlm_adapt.adapt.fused_attention import FusedAttention

        config = super().configure(names)
        if self.on_meta and self.changes_base:
            config.init_lora_weights = True  # shapes are the same, and there are no values to decompose
        config._register_custom_module({nn.MultiheadAttention: FusedAttention})
        return config

    def attach(self, place: Place) -> None:
        """As in Tuner; weights of the base that the start changes are kept on the CPU, to switch back."""
        from vlm_adapt.adapt.fast_lora import speed_up

        self.on_meta = place.device.type == "meta"
        before: dict[int, Tensor] = {}
        if self.changes_base and not self.on_meta:
            for name in self.choose(place):
                layer: Any = place.inner.get_submodule(name)
                base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
                if isinstance(base._parameters.get("weight"), nn.Parameter):
                    before[id(base)] = base.weight.detach().to("cpu", copy=True)
        start = self.settings.get("init_lora_weights")
        turned = [n for n in self.choose(place) if type(place.inner.get_submodule(n)).__name__ == "Conv1D"]
        if turned and start in ("olora", "loftq"):
            raise UserError(
                f"adapt: init_lora_weights '{start}' cannot start on '{turned[0]}', whose weight lies the "
                "other way round (GPT-2): take 'pissa'"
            )
        super().attach(place)
        speed_up(self.inner)
        for layer in self.my_layers():
            layer.register_forward_pre_hook(_leave_to_autocast)
            base = layer.get_base_layer()
            if id(base) in before:
                self.originals.append((base, before[id(base)]))

    def watch(self) -> Directions | None:
        """What EVA sees of the first batches; None for other starts."""
        from vlm_adapt.adapt.directions import Directions

        return (
            Directions([layer for layer in self.my_layers() if self.adapter in layer.lora_A], self.adapter)
            if self.looks
            else None
        )

    def set_active(self, active: bool) -> None:
        """As in Tuner, with the base's own weights while it does not act."""
        if active != self.active:
            for number, (base, other) in enumerate(self.originals):
                if hasattr(base.weight, "ds_id"):
                    raise UserError(
                        f"'{self.name}' with this start is not switched under ZeRO-3: use another stage"
                    )
                self.originals[number] = (base, base.weight.detach().to("cpu", copy=True))
                base.weight.data = other.to(base.weight.device)
        super().set_active(active)

    @torch.no_grad()
    def merge(self) -> None:
        """As in Tuner."""
        self.set_active(True)
        super().merge()
        self.originals = []


def choose_layers(place: Place, inner: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Dotted names, below the library's own model, of the linear layers that `targets` means."""
    return tuner_targets.choose_layers(place, targets, ("linear",), "lora")


def _leave_to_autocast(layer: Any, inputs: tuple[Any, ...]) -> None:
    """Autocast brings input and adapter to one dtype itself; peft's own cast would copy twice more."""
    layer.cast_input_dtype_enabled = not torch.is_autocast_enabled(inputs[0].device.type)
