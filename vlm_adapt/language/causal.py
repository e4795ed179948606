"""Decoder-only language models: whatever AutoModelForCausalLM loads.

Knows how to call a transformers decoder with embeddings and a mask of its own; knows nothing about
images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vlm_adapt.errors import UserError
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
        """One mask, or one by kind of layer where only some layers see a window of the past.

        Raises:
            UserError: the attention backend takes no mask.
        """
        if "flash" in str(self.config._attn_implementation):
            raise UserError(
                f"attention '{self.config._attn_implementation}' takes no mask, which branches, a two-way "
                "prompt and padded prompts need: set model.language.attention to 'sdpa'"
            )
        kinds = set(getattr(self.config, "layer_types", None) or ())
        window = int(getattr(self.config, "sliding_window", None) or 0)
        windowed = 0 < window < allow_BQK.shape[-1] and kinds != {"full_attention"}
        mask = additive_mask(allow_BQK, dtype)
        if not windowed:
            return mask
        near = additive_mask(allow_BQK & ((queries_BQ[:, :, None] - keys_BK[:, None, :]) < window), dtype)
        if not kinds:  # Mistral, Phi-3: every layer has the window
            return near
        masks = {"full_attention": mask, "sliding_attention": near}
        return {kind: masks[kind] for kind in kinds}

    @torch.no_grad()
    def generate(self, inputs: LanguageInput, settings: Generation, stop_ids: set[int]) -> list[list[int]]:
        """Write an answer after every writer of every row, all at once.

        Branches of a row go on in parallel: one step feeds one token of each, which sees the prefix,
        its own branch and what it has written. So the questions of an image share one cache.

        Args:
            inputs: prompts padded on the right; `writers_BW` are the positions after which answers
                begin, -1 where a row has fewer; by default each row's last token.

        Returns:
            token ids, without the stop token, for every writer in order (a row's writers together).
        """
        valid_BK, dtype, device = inputs.valid_BT, inputs.embeds_BTD.dtype, inputs.embeds_BTD.device
        writers_BW = inputs.writers_BW
        if writers_BW is None:
            writers_BW = (valid_BK.sum(1) - 1)[:, None]
        there_BW = writers_BW >= 0
        at_BW = writers_BW.clamp_min(0)
        keys_BK, branches_BK = inputs.positions_BT, inputs.branches_BT
        if keys_BK is None:
            keys_BK = torch.arange(valid_BK.shape[1], device=device).expand_as(valid_BK)
        if branches_BK is None:
            branches_BK = torch.zeros_like(keys_BK)
        branch_BW, next_BW = branches_BK.gather(1, at_BW), keys_BK.gather(1, at_BW) + 1
        masked = inputs.allow_BTT is not None or not bool(valid_BK.all()) or writers_BW.shape[1] > 1

        # A cache that drops what leaves a window would drop the tokens of the wrong branch or row: it
        # goes by place in the row, and padding and other branches' tokens take places too.
        output = self._run(inputs, use_cache=True, past_key_values=DynamicCache())
        cache, hidden_BTD = output.past_key_values, output.last_hidden_state
        first_BWD = hidden_BTD.gather(1, at_BW[:, :, None].expand(-1, -1, hidden_BTD.shape[-1]))

        def step(ids_N: Tensor) -> Tensor:
            nonlocal valid_BK, keys_BK, branches_BK, next_BW
            assert keys_BK is not None and branches_BK is not None
            ids_BW = torch.zeros_like(at_BW)
            ids_BW[there_BW] = ids_N
            valid_BK = torch.cat([valid_BK, there_BW], 1)
            keys_BK = torch.cat([keys_BK, next_BW], 1)
            branches_BK = torch.cat([branches_BK, branch_BW], 1)
            mask = None
            if masked:
                key_branch = branches_BK[:, None, :]
                allow_BWK = valid_BK[:, None, :] & ((key_branch == 0) | (key_branch == branch_BW[:, :, None]))
                count = writers_BW.shape[1]
                allow_BWK[:, :, -count:] |= torch.eye(count, dtype=torch.bool, device=device)
                mask = self._masks(allow_BWK, next_BW, keys_BK, dtype)
            output = self.decoder(
                inputs_embeds=self.embed(ids_BW).to(dtype),
                attention_mask=mask,
                position_ids=next_BW,
                past_key_values=cache,
                use_cache=True,
            )
            next_BW = next_BW + 1
            return self.logits(output.last_hidden_state[there_BW])

        return decode(self.logits(first_BWD[there_BW]), step, settings, stop_ids)


def block_list(module: nn.Module, count: int) -> nn.ModuleList:
    """The first ModuleList with as many entries as the configuration has layers.

    Raises:
        AttributeError: the architecture keeps its blocks in another way.
    """
    for child in module.modules():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise AttributeError(f"{type(module).__name__} has no list of {count} blocks")
