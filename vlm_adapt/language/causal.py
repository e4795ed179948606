"""Decoder-only language models: whatever AutoModelForCausalLM loads.

Knows how to call a transformers decoder with embeddings and a mask of its own; knows nothing about
images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.language.decode import decode
from vlm_adapt.language.language import Generation, Language, LanguageInput, additive_mask


class CausalLanguage(Language):
    """A causal language model; `LanguageInput.allow_BTT` may open parts of it both ways (prefix-LM)."""

    seq2seq = False

    @property
    def decoder(self) -> nn.Module:
        """The model without its head."""
        decoder = self.model.get_decoder()
        return getattr(self.model, self.model.base_model_prefix) if decoder is self.model else decoder

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder's blocks in order."""
        return list(block_list(self.decoder, self.config.num_hidden_layers))

    def hidden(self, inputs: LanguageInput) -> Tensor:
        """Last hidden states [B, T, D]."""
        return self._run(inputs, use_cache=False).last_hidden_state

    def _run(self, inputs: LanguageInput, **more: Any) -> Any:
        mask: Any = None
        if inputs.allow_BTT is not None:
            keys_BK = inputs.positions_BT
            if keys_BK is None:
                keys_BK = torch.arange(inputs.allow_BTT.shape[-1], device=inputs.allow_BTT.device)[None]
            mask = self._masks(inputs.allow_BTT, keys_BK, keys_BK, inputs.embeds_BTD.dtype)
        return self.decoder(
            inputs_embeds=inputs.embeds_BTD, attention_mask=mask, position_ids=inputs.positions_BT, **more
        )

    def _masks(self, allow_BQK: Tensor, queries_BQ: Tensor, keys_BK: Tensor, dtype: torch.dtype) -> Any:
        """One mask, or one by kind of layer where some layers see only a window of the past."""
        mask = additive_mask(allow_BQK, dtype)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        window = getattr(self.config, "sliding_window", None)
        if "sliding_attention" not in kinds or not window or allow_BQK.shape[-1] <= window:
            return mask
        near = (queries_BQ[:, :, None] - keys_BK[:, None, :]) < window
        masks = {"full_attention": mask, "sliding_attention": additive_mask(allow_BQK & near, dtype)}
        return {kind: masks[kind] for kind in kinds}

    @torch.no_grad()
    def generate(self, inputs: LanguageInput, settings: Generation, stop_ids: set[int]) -> list[list[int]]:
        """Write an answer for every row of prompts.

        Args:
            inputs: prompts padded on the LEFT, with `allow_BTT` set when a row is padded.

        Returns:
            token ids of each row, without the stop token.
        """
        output = self._run(inputs, use_cache=True)
        valid_BK, dtype = inputs.valid_BT, inputs.embeds_BTD.dtype
        keys_BK = inputs.positions_BT
        if keys_BK is None:
            keys_BK = torch.arange(valid_BK.shape[1], device=valid_BK.device).expand_as(valid_BK)
        cache = output.past_key_values

        def step(ids_B: Tensor) -> Tensor:
            nonlocal valid_BK, keys_BK
            next_B1 = keys_BK[:, -1:] + 1
            valid_BK = torch.cat([valid_BK, torch.ones_like(valid_BK[:, :1])], 1)
            keys_BK = torch.cat([keys_BK, next_B1], 1)
            mask = None
            if inputs.allow_BTT is not None:
                mask = self._masks(valid_BK[:, None], next_B1, keys_BK, dtype)
            output = self.decoder(
                inputs_embeds=self.embed(ids_B[:, None]).to(dtype),
                attention_mask=mask,
                position_ids=next_B1,
                past_key_values=cache,
                use_cache=True,
            )
            return self.logits(output.last_hidden_state[:, -1])

        return decode(self.logits(output.last_hidden_state[:, -1]), step, settings, stop_ids)


def block_list(module: nn.Module, count: int) -> nn.ModuleList:
    """The first ModuleList with as many entries as the configuration has layers.

    Raises:
        AttributeError: the architecture keeps its blocks in another way.
    """
    for child in module.modules():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise AttributeError(f"{type(module).__name__} has no list of {count} blocks")
