"""Encoder-decoder language models (T5, mT5, UL2; the form of PaLI).

Knows how to hand embeddings to the encoder and ids to the decoder; knows nothing about images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
        """Write an answer for every row; padding may be on either side of the prompts."""
        encoded = self._encode(inputs)
        state: dict[str, object] = {"cache": None}

        def step(ids_B: Tensor) -> Tensor:
            output = self.model.get_decoder()(
                input_ids=ids_B[:, None],
                encoder_hidden_states=encoded,
                encoder_attention_mask=inputs.valid_BT.long(),
                past_key_values=state["cache"],
                use_cache=True,
            )
            state["cache"] = output.past_key_values
            return self.logits(output.last_hidden_state[:, -1])

        first = torch.full((len(encoded),), self.start_id, device=encoded.device)
        return decode(step(first), step, settings, stop_ids)
