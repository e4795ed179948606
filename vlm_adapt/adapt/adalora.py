"""AdaLoRA through peft: a budget of ranks that is shared out among the layers while training.

W + (lora_alpha / r) P Lambda Q with P and Q kept near orthogonal by a penalty, and the least important
entries of Lambda set to zero (Zhang et al. 2023, AdaLoRA, sections 3.1 to 3.3). Knows how to hand peft's own
allocator whole weights and gradients under every ZeRO stage, and to bring its masks back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.method import Gathered
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.tuner import Tuner
from vlm_adapt.adapt.whole import overwrite, whole
from vlm_adapt.errors import UserError

LATENT = "allocator.safetensors"
UNKNOWN = 10**9  # steps, until the run tells


class AdaLora(Tuner):
    """LoRA in the form of a singular value decomposition, whose ranks are allocated by importance.

    Settings are those of peft's AdaLoraConfig but `total_step`, which the run knows: `init_r` at the start,
    `target_r` on average at the end, `tinit` and `tfinal` steps without allocation at start and end, `deltaT`
    steps between two, `orth_reg_weight` of the penalty.
    """

    name = "adalora"
    kind = "ADALORA"
    summary = "LoRA as a decomposition whose ranks move to the layers that need them"
    paper = "Zhang et al. 2023, arXiv 2303.10512"
    layers = ("linear", "conv")
    stacks = False
    example = {"init_r": 4, "target_r": 2}

    def __init__(self, target_modules: str | Sequence[str] = "all-linear", **settings: Any):
        if "total_step" in settings:
            raise UserError("adapt: 'adalora' takes its total_step from the run: leave it out")
        super().__init__(target_modules, **settings)
        self.allocator: Any = None
        self.kept: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self.names_of: dict[str, str] = {}  # file key -> peft's own name, by which it keeps its averages

    def configure(self, names: Sequence[str]) -> Any:
        """As in Tuner, with steps to be told."""
        settings = self.settings
        try:
            self.settings = settings | {"total_step": UNKNOWN}
            return super().configure(names)
        finally:
            self.settings = settings

    def attach(self, place: Place) -> None:
        """As in Tuner."""
        for name in self.choose(place):
            if getattr(place.inner.get_submodule(name), "groups", 1) > 1:
                raise UserError(
                    f"adapt: 'adalora' cannot hold '{name}', a convolution in groups: leave it out"
                )
        super().attach(place)
        by_id = {id(parameter): name for name, parameter in self.inner.named_parameters()}
        self.names_of = {key: by_id[id(parameter)] for key, parameter in self.parameters.items()}
        from peft.tuners.adalora.layer import RankAllocator

        shapes = [(name, self.parameters[key]) for key, name in self.names_of.items()]
        self.allocator = RankAllocator(_named(shapes), self.config, self.adapter)

    def _name_tensors(self, tuner: nn.Module, before: set[int]) -> None:
        for layer in self.my_layers():  # a count, which peft makes trainable when it moves it to bf16
            layer.ranknum[self.adapter].requires_grad_(False)
        super()._name_tensors(tuner, before)

    def penalty(self) -> Tensor | None:
        """orth_reg_weight times the mean over all P and Q of the Frobenius norm of P^T P - I."""
        norms = []
        device = next(iter(self.parameters.values())).device
        with torch.autocast(device.type, enabled=False):
            for layer in self.my_layers():
                # Read through the layer: so ZeRO-3 brings them together.
                for factor in (layer.lora_A[self.adapter], layer.lora_B[self.adapter].T):
                    gram = factor @ factor.T
                    norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        mean: Tensor = torch.stack(norms).mean()
        return self.config.orth_reg_weight * mean

    def before_step(self, step: int, total: int, gradient: Callable[[nn.Parameter], Tensor | None]) -> None:
        """Keep the gradients that the optimizer is about to use."""
        if self.config.total_step != total:
            if self.config.tinit >= total - self.config.tfinal:
                raise UserError(
                    f"adapt: 'adalora' has no step left to allocate ranks: tinit {self.config.tinit} and "
                    f"tfinal {self.config.tfinal} are more than the stage's {total} steps"
                )
            self.config.total_step = total
        for key, parameter in self.parameters.items():
            found = gradient(parameter)
            if found is None:
                raise UserError(f"adapt: 'adalora' got no gradient of '{key}'")
            self.kept[key] = (parameter, found.detach().clone())

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Let peft's allocator see weights and gradients, and write its masks into Lambda."""
        from peft import AdaLoraModel

        copies: dict[str, nn.Parameter] = {}
        for key, (parameter, grad) in self.kept.items():
            copy = nn.Parameter(whole(parameter))
            copy.grad = grad.to(copy.device).reshape(copy.shape)
            copies[key] = copy
        before = {key: copy.detach().clone() for key, copy in copies.items() if ".lora_E" in key}
        model = _named([(self.names_of[key], copy) for key, copy in copies.items()])
        holder: Any = SimpleNamespace(
            peft_config={self.adapter: self.config},
            trainable_adapter_name=self.adapter,
            rankallocator=self.allocator,
            model=model,
        )
        # Counted from 1: so the last step, which is total_step, brings the last mask.
        AdaLoraModel.update_and_allocate(holder, step + 1)
        for key, old in before.items():
            if not torch.equal(old, copies[key]):
                overwrite(self.parameters[key], copies[key].detach())
        self.kept = {}

    # Files ---------------------------------------------------------------------------------------

    def written_config(self) -> Any:
        """As in Tuner; masked entries are zeros in the file, so a reader needs no pattern of ranks."""
        config = super().written_config()
        config.rank_pattern = None
        return config

    def save_latent(self, folder: Path, tensors: Gathered) -> None:
        """The allocator's running averages and its last mask, to go on."""
        from safetensors.torch import save_file

        found: dict[str, Tensor] = {}
        keys = {name: key for key, name in self.names_of.items()}
        for kind in ("exp_avg_ipt", "exp_avg_unc"):
            found |= {f"{keys[name]}#{kind}": t.cpu() for name, t in getattr(self.allocator, kind).items()}
        for name, mask in (self.config.rank_pattern or {}).items():
            found[f"{name}#mask"] = torch.tensor(mask)
        if found:
            save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / LATENT)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """As in Tuner, with the allocator's state where it was kept."""
        from safetensors.torch import load_file

        tensors = super().read(folder)
        path = folder / LATENT
        if path.is_file():
            state = load_file(path)
            for kind in ("exp_avg_ipt", "exp_avg_unc"):
                found = {n: state[f"{k}#{kind}"] for k, n in self.names_of.items() if f"{k}#{kind}" in state}
                device = next(iter(self.parameters.values())).device
                setattr(self.allocator, kind, {name: tensor.to(device) for name, tensor in found.items()})
            self.allocator.ipt = {name: torch.zeros_like(t) for name, t in self.allocator.exp_avg_ipt.items()}
            masks = {name.removesuffix("#mask"): t for name, t in state.items() if name.endswith("#mask")}
            self.config.rank_pattern = {name: mask.tolist() for name, mask in masks.items()} or None
        return tensors


def _named(pairs: Sequence[tuple[str, nn.Parameter]]) -> Any:
    """What peft's allocator asks of a model: names and parameters."""
    return SimpleNamespace(named_parameters=lambda: iter(pairs))
