"""Decoder-only language models: whatever AutoModelForCausalLM loads.

Knows how to call a transformers decoder with embeddings and a mask of its own; knows nothing about
images. What a batch's texts need, and what the device has, decides how attention is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vlm_adapt.attention import NAME, kernels
from vlm_adapt.attention.guard import texts_must_arrive
from vlm_adapt.attention.interface import FLASH
from vlm_adapt.errors import UserError
from vlm_adapt.language.decode import decode
from vlm_adapt.language.language import Generation, Language, LanguageInput
from vlm_adapt.language.layout import Layout, additive_mask, near
from vlm_adapt.language.packing import check_packing
from vlm_adapt.language.places import renumbered


class CausalLanguage(Language):
    """A causal language model; `LanguageInput.allow_BTT` may open parts of it both ways (prefix-LM)."""

    seq2seq = False
    packing_checked = False  # whether this model was seen to keep the texts of a row apart

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
        """Last hidden states [B, T, D]; where texts can be worked off one after another, 0 at padding.

        Raises:
            UserError: several texts share a row and the model cannot keep them apart.
        """
        layout, name = inputs.layout, self.config._attn_implementation
        if layout is None:
            return self._run(inputs, use_cache=False).last_hidden_state
        if layout.packed and not self.packing_checked:
            self.packing_checked = True
            check_packing(self)
        if name == FLASH and layout.causal:
            return self._flat(inputs, layout, flash=True)
        if name == NAME and self._by_text(inputs.embeds_BTD, layout):
            return self._flat(inputs, layout, flash=False)
        if not layout.plain and (name == "flex_attention" or (name == NAME and self._by_blocks(inputs))):
            masks = self._by_kind(layout.block_mask, layout.longest)
            return self._run(inputs, masks, use_cache=False).last_hidden_state
        return self._run(inputs, use_cache=False).last_hidden_state

    def _shapes(self, embeds_BTD: Tensor) -> tuple[Any, ...]:
        """What a kernel must be able to do: heads, key heads, width, dtype, device."""
        config, device = self.config, embeds_BTD.device
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        dtype = embeds_BTD.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return heads, getattr(config, "num_key_value_heads", None) or heads, width, dtype, device

    def _drops(self) -> bool:
        """Whether attention is dropped out, which no kernel of texts or blocks does."""
        names = ("attention_dropout", "attn_pdrop", "attn_dropout")
        return self.training and any(getattr(self.config, name, None) for name in names)

    def _by_text(self, embeds_BTD: Tensor, layout: Layout) -> bool:
        """Whether texts can be worked off one after another, without padding between them."""
        if embeds_BTD.device.type == "cpu":
            return len(layout.places_N) > 0  # a rank without a share runs its row of padding
        windows = bool(getattr(self.config, "sliding_window", None))
        if not layout.causal or self._drops() or not len(layout.places_N):
            return False
        return kernels.usable(*self._shapes(embeds_BTD), windows) is not None

    def _by_blocks(self, inputs: LanguageInput) -> bool:
        """Whether FlexAttention works here, which skips blocks of what nobody sees."""
        embeds_BTD = inputs.embeds_BTD
        can = getattr(type(self.model), "_supports_flex_attn", False) and not self._drops()
        return can and embeds_BTD.is_cuda and kernels.flex_usable(*self._shapes(embeds_BTD))

    def _flat(self, inputs: LanguageInput, layout: Layout, flash: bool) -> Tensor:
        """All texts as one row without padding; their places in the batch are found again afterwards."""
        embeds_BTD, places_N = inputs.embeds_BTD, layout.places_N
        batch, length, _ = embeds_BTD.shape
        embeds_ND = embeds_BTD.flatten(0, 1)
        padded = len(places_N) < len(embeds_ND)
        mask: Any = None
        more: dict[str, Any] = {}
        if flash:
            starts_S = torch.tensor(layout.starts, dtype=torch.int32, device=embeds_ND.device)
            more = {"cu_seq_lens_q": starts_S, "cu_seq_lens_k": starts_S}
            more |= {"max_length_q": layout.longest, "max_length_k": layout.longest}
        else:
            dtype = self._shapes(embeds_BTD)[3]
            mask = self._by_kind(lambda window: layout.text_mask(dtype, window), layout.longest)
        positions_BT = layout.positions_BT if inputs.positions_BT is None else inputs.positions_BT
        taken = renumbered(inputs.places, places_N, batch * length) if inputs.places else None
        with texts_must_arrive(), self.prompts.during(taken):
            hidden_ND = self.decoder(
                inputs_embeds=(embeds_ND[places_N] if padded else embeds_ND)[None],
                attention_mask=mask,
                position_ids=layout.flat(positions_BT)[None],
                use_cache=False,
                **more,
            ).last_hidden_state[0]
        if padded:
            nothing_PD = hidden_ND.new_zeros(batch * length, hidden_ND.shape[-1])
            hidden_ND = nothing_PD.index_copy(0, places_N, hidden_ND)
        return hidden_ND.unflatten(0, (batch, length))

    def _run(self, inputs: LanguageInput, mask: Any = None, **more: Any) -> Any:
        allow_BTT, positions_BT = inputs.seen_BTT if mask is None else None, inputs.positions_BT
        if allow_BTT is not None:
            keys_BK = positions_BT
            if keys_BK is None:
                keys_BK = torch.arange(allow_BTT.shape[-1], device=allow_BTT.device)[None]
            mask = self._masks(allow_BTT, keys_BK, keys_BK, inputs.embeds_BTD.dtype)
        with self.prompts.during(inputs.places):
            return self.decoder(
                inputs_embeds=inputs.embeds_BTD, attention_mask=mask, position_ids=positions_BT, **more
            )

    def _masks(self, allow_BQK: Tensor, queries_BQ: Tensor, keys_BK: Tensor, dtype: torch.dtype) -> Any:
        """One mask, or one by kind of layer where only some layers see a window of the past.

        Raises:
            UserError: the attention backend takes no mask.
        """
        if "flash" in str(self.config._attn_implementation):
            raise UserError(
                f"attention '{self.config._attn_implementation}' takes no mask, which branches, a two-way "
                "prompt, a learned prefix and padded prompts need: set model.language.attention to 'sdpa'"
            )

        def mask(window: int) -> Tensor:
            close_BQK = allow_BQK & near(queries_BQ, keys_BK, window) if window else allow_BQK
            return additive_mask(close_BQK, dtype)

        return self._by_kind(mask, allow_BQK.shape[-1])

    def _by_kind(self, make: Callable[[int], Any], longest: int) -> Any:
        """The mask that `make` gives for a window (0 for none), or one by kind of layer.

        Args:
            longest: tokens of which none is out of sight in a window of as many.
        """
        kinds = set(getattr(self.config, "layer_types", None) or ())
        window = int(getattr(self.config, "sliding_window", None) or 0)
        if not 0 < window < longest or kinds == {"full_attention"}:
            return make(0)
        if not kinds:  # Mistral, Phi-3: every layer has the window
            return make(window)
        windows = {"full_attention": 0, "sliding_attention": window}
        return {kind: make(windows[kind]) for kind in kinds}

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
        masked = inputs.seen_BTT is not None or not bool(valid_BK.all()) or writers_BW.shape[1] > 1

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
            states_ND = output.last_hidden_state[there_BW]
            if settings.on_states:
                settings.on_states(ids_N, states_ND)
            return self.logits(states_ND)

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
