"""Encoder-decoder language models (T5, mT5, UL2; the form of PaLI).

Knows how to hand embeddings to the encoder and ids to the decoder; knows nothing about images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from vlm_adapt.language.causal import block_list
from vlm_adapt.language.decode import decode
from vlm_adapt.language.language import Generation, Language, LanguageInput


class Seq2SeqLanguage(Language):
    """An encoder-decoder; images and the prompt go to the encoder, learned text to the decoder."""

    seq2seq = True

    @property
    def blocks(self) -> list[nn.Module]:
        """Encoder blocks, then decoder blocks."""
        config, encoder = self.config, self.model.get_encoder()
        decoder_layers = getattr(config, "num_decoder_layers", None) or config.decoder_layers
        encoder_layers = getattr(config, "num_layers", None) or config.num_hidden_layers
        decoder = self.model.get_decoder()
        return [*block_list(encoder, encoder_layers), *block_list(decoder, decoder_layers)]

    @property
    def start_id(self) -> int:
        """The id that opens the decoder."""
        start = self.config.decoder_start_token_id
        return self.model.generation_config.decoder_start_token_id if start is None else start

    def _encode(self, inputs: LanguageInput) -> Tensor:
        return self.model.get_encoder()(
            inputs_embeds=inputs.embeds_BTD, attention_mask=inputs.valid_BT.long()
        ).last_hidden_state

    def hidden(self, inputs: LanguageInput) -> Tensor:
        """Last hidden states of the decoder, [B, U, D], before the head's scale."""
        assert inputs.decoder_ids_BU is not None
        with self.prompts.during(inputs.places):
            output = self.model.get_decoder()(
                input_ids=inputs.decoder_ids_BU,
                encoder_hidden_states=self._encode(inputs),
                encoder_attention_mask=inputs.valid_BT.long(),
                use_cache=False,
            )
        return output.last_hidden_state

    def logits(self, hidden_D: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V]; T5 and UMT5 with tied embeddings scale by D**-0.5."""
        tied = self.config.model_type in ("t5", "umt5") and bool(self.config.tie_word_embeddings)
        if getattr(self.config, "scale_decoder_outputs", tied):
            hidden_D = hidden_D * self.model.model_dim**-0.5
        return super().logits(hidden_D)

    @torch.no_grad()
    def generate(self, inputs: LanguageInput, settings: Generation, stop_ids: set[int]) -> list[list[int]]:
        """Write an answer for every row, after what its decoder has read so far (earlier answers).

        Args:
            inputs: prompts, padded on either side; `decoder_ids_BU` padded on the right up to
                `writers_BW`; by default the start token alone.
        """
        with self.prompts.during(inputs.places):
            encoded = self._encode(inputs)
        ids_BU = inputs.decoder_ids_BU
        if ids_BU is None or inputs.writers_BW is None:
            ids_BU = torch.full((len(encoded), 1), self.start_id, device=encoded.device)
            writers_B1 = torch.zeros_like(ids_BU)
        else:
            writers_B1 = inputs.writers_BW[:, :1]
        # Moved to the right end: T5 counts distances along the cache, which must have no gap.
        longest = int(writers_B1.max()) + 1
        places_BU = torch.arange(longest, device=encoded.device)[None] - (longest - 1 - writers_B1)
        ids_BU, valid_BU = ids_BU.gather(1, places_BU.clamp_min(0)), places_BU >= 0
        # Without a configuration it grows: a side network keeps its keys and values there too.
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        state: dict[str, Any] = {"cache": cache, "valid_BU": valid_BU.long()}

        def read(ids_BU: Tensor) -> Tensor:
            output = self.model.get_decoder()(
                input_ids=ids_BU,
                attention_mask=state["valid_BU"],
                encoder_hidden_states=encoded,
                encoder_attention_mask=inputs.valid_BT.long(),
                past_key_values=state["cache"],
                use_cache=True,
            )
            state["cache"] = output.past_key_values
            return self.logits(output.last_hidden_state[:, -1])

        def step(ids_B: Tensor) -> Tensor:
            state["valid_BU"] = nn.functional.pad(state["valid_BU"], (0, 1), value=1)
            return read(ids_B[:, None])

        with self.prompts.during(inputs.places):
            first_BV = read(ids_BU)  # keys and values of what the encoder said are kept from here on
        return decode(first_BV, step, settings, stop_ids)
