"""Prompt tuning: learned embeddings before the words of every text, on a frozen language.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning": n x d numbers. Knows how a
language keeps places for learned vectors and how peft writes them; knows nothing about batches or blocks.
Also here: what all methods with vectors of that kind share.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.method import Gathered, Method, read_tensors
from vlm_adapt.adapt.place import Place
from vlm_adapt.errors import UserError

VECTORS = "prompt_embeddings"  # peft's key of what every prompt comes down to
LATENT = "latent.safetensors"  # what the vectors are made of, where they have an encoder
COMMON = 5000  # words to begin with: vocabularies of byte pairs and sentence pieces list frequent ones first


class Vectors(nn.Module):
    """n learned vectors of some width, as they are."""

    def __init__(self, tokens: int, width: int, std: float = 1.0, device: torch.device | str | None = None):
        super().__init__()
        self.prompt_embeddings = nn.Parameter(torch.empty(tokens, width, device=device).normal_(0, std))

    def forward(self) -> Tensor:
        """vectors [n, width]."""
        return self.prompt_embeddings.clone()  # ZeRO-3 takes the parameter away again after the call


class SoftPrompt(Method):
    """Vectors with places of their own at the start of every text.

    Args:
        num_virtual_tokens: how many places (n).

    A subclass says what makes the vectors (`build`) and what peft calls it (`words`). Where an encoder makes
    them, `save` writes the vectors alone, `save_latent` the encoder; without the latter an adapter goes on
    as plain vectors.
    """

    sides = ("language",)
    identity = False
    adds_tokens = True
    file_name = "adapter_model.safetensors"
    embeds = True

    def __init__(self, num_virtual_tokens: int):
        super().__init__()
        self.virtual_tokens = whole(self.name, num_virtual_tokens=num_virtual_tokens)
        self.prompt: Any = None
        self.module: nn.Module | None = None
        self.module_name = ""

    def build(self, device: torch.device | str) -> nn.Module:
        """A fresh module that gives vectors [n, width] when it is called."""
        raise AttributeError("a soft prompt says what makes its vectors")

    def words(self) -> dict[str, Any]:
        """What peft's configuration must say; empty where peft cannot compute the same."""
        raise AttributeError("a soft prompt says how peft writes it")

    def attach(self, place: Place) -> None:
        """Take places in every text and make the vectors that go there."""
        part: Any = place.part
        self.part = part
        if place.chosen is not None:
            raise UserError(f"adapt: '{self.name}' is seen from every block: leave `blocks` of its line out")
        self.prompt = part.prompts.add(self.virtual_tokens, self.vectors, self.embeds)
        number = sum(name.startswith(self.name) for name, _ in part.named_children())
        self.module_name = f"{self.name}_{number + 1}"
        self._hold(self.build(place.device))

    def _hold(self, module: nn.Module) -> None:
        assert self.part is not None
        self.part.add_module(self.module_name, module)
        self.module = module
        self.parameters = dict(module.named_parameters())

    def vectors(self) -> Tensor:
        """The vectors as they are now, in float32: encoders of a few tokens gain nothing by less."""
        assert self.module is not None
        device = next(self.module.parameters()).device.type
        with torch.autocast(device, enabled=False):
            return self.module()

    def set_active(self, active: bool) -> None:
        """Take the places, or leave texts as they are without."""
        self.prompt.active = active
        super().set_active(active)

    @property
    def encoded(self) -> bool:
        """Whether the vectors are made by an encoder."""
        return not isinstance(self.module, Vectors)

    def bytes_stored(self) -> int:
        """Bytes of the vectors, without an encoder's."""
        assert self.module is not None
        if not self.encoded:
            return super().bytes_stored()
        return self.virtual_tokens * self.width * 4

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        part: Any = self.part
        return int(part.width)

    # Files ---------------------------------------------------------------------------------------

    def save(self, folder: Path, tensors: Gathered) -> None:
        """Write the vectors, in peft's own format where peft computes the same."""
        if self.encoded:
            module = self.build("meta")
            module.load_state_dict(dict(tensors), assign=True)
            with torch.no_grad():
                tensors = {VECTORS: module.eval()()}
        super().save(folder, tensors)
        if words := self.words():
            part: Any = self.part
            config = part.config
            common = {
                "task_type": "SEQ_2_SEQ_LM" if part.seq2seq else "CAUSAL_LM",
                "inference_mode": True,
                "base_model_name_or_path": None,
                "num_virtual_tokens": self.virtual_tokens,
                "num_transformer_submodules": 1,
                "num_attention_heads": config.num_attention_heads,
                "num_layers": config.num_hidden_layers,
                "token_dim": self.width,
            }
            text = json.dumps(common | words, indent=2)
            (folder / "adapter_config.json").write_text(text, encoding="utf-8")

    def save_latent(self, folder: Path, tensors: Gathered) -> None:
        """Write the encoder, to go on with it."""
        if self.encoded:
            from safetensors.torch import save_file

            folder.mkdir(parents=True, exist_ok=True)
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / LATENT)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The encoder where it was kept, else the vectors; these then go on without one."""
        if self.encoded and (folder / LATENT).is_file():
            return read_tensors(folder / LATENT, self.parameters)
        if self.encoded:
            before = next(iter(self.parameters.values()))
            plain = Vectors(self.virtual_tokens, self.width, device=before.device)
            tensors = read_tensors(folder / self.file_name, dict(plain.named_parameters()))
            self._hold(plain.requires_grad_(before.requires_grad))
            return tensors
        return read_tensors(folder / self.file_name, self.parameters)


class PromptTuning(SoftPrompt):
    """n learned embeddings before every text.

    Args:
        num_virtual_tokens: n.
        init: `vocabulary` (words drawn from the 5,000 first, as in the paper), `text` (the words of
            `init_text`, repeated or cut to n), or `random` (uniform in -0.5 to 0.5).
        init_text: words to begin with.
    """

    name = "prompt_tuning"
    summary = "learned embeddings before the words of every text"
    paper = "Lester et al. 2021, arXiv 2104.08691"
    example = {"num_virtual_tokens": 4}

    def __init__(self, num_virtual_tokens: int = 20, init: str | None = None, init_text: str | None = None):
        super().__init__(num_virtual_tokens)
        self.init = init or ("vocabulary" if init_text is None else "text")
        if self.init not in ("vocabulary", "text", "random"):
            raise UserError(f"adapt: prompt_tuning's init is vocabulary, text or random, not '{init}'")
        if (self.init == "text") != bool(init_text):
            raise UserError("adapt: prompt_tuning's `init: text` and its `init_text` go together")
        self.init_text = init_text

    def build(self, device: torch.device | str) -> nn.Module:
        """The embeddings, from words where there are any."""
        module = Vectors(self.virtual_tokens, self.width, device=device)
        with torch.no_grad():
            module.prompt_embeddings.uniform_(-0.5, 0.5)
            if self.init != "random" and torch.device(device).type != "meta":
                part: Any = self.part
                module.prompt_embeddings.copy_(part.embed(self._ids(part).to(device)))
        return module

    def _ids(self, part: Any) -> Tensor:
        if self.init == "vocabulary":
            count = part.model.get_input_embeddings().num_embeddings
            return torch.randint(0, min(COMMON, count), (self.virtual_tokens,))
        if part.tokenizer is None:
            raise UserError("adapt: prompt_tuning has no tokenizer to read init_text with: leave it out")
        ids = part.tokenizer.encode(self.init_text, add_special_tokens=False)
        if not ids:
            raise UserError(f"adapt: prompt_tuning's init_text '{self.init_text}' holds no word")
        times = math.ceil(self.virtual_tokens / len(ids))
        return torch.tensor(ids * times)[: self.virtual_tokens]

    def words(self) -> dict[str, Any]:
        """peft's PROMPT_TUNING."""
        return {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}


def whole(method: str, **values: Any) -> int:
    """The one value, a whole number from 1.

    Raises:
        UserError: it is none.
    """
    ((name, value),) = values.items()
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"adapt: {method}'s {name} is a whole number from 1, not {value!r}")
    return value
