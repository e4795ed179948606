"""The vision-language model: 1 tower, 2 connector, 3 splice, 4 masks, 5 language.

Knows the order of the road; knows nothing about files, adaptation methods or engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.connectors.connector import Connector
from vlm_adapt.connectors.packed import PackedFeatures
from vlm_adapt.data.collate import Batch
from vlm_adapt.data.patches import Patches
from vlm_adapt.language.language import Generation, Language, LanguageInput
from vlm_adapt.language.places import Prompt
from vlm_adapt.models.feature_cache import FeatureCache
from vlm_adapt.models.mask_token import MaskToken
from vlm_adapt.models.masks import layout, without_places
from vlm_adapt.models.objectives import OBJECTIVES
from vlm_adapt.models.splice import splice
from vlm_adapt.vision.navit_tower import NativeTower
from vlm_adapt.vision.packing import Packed
from vlm_adapt.vision.tower import Tower


class VisionLanguageModel(nn.Module):
    """A tower and a language joined by a connector.

    Args:
        tower, connector, language: the parts.
        layers: depths of the tower whose features the connector reads.
        state_size: length of state vectors, 0 for none (PaLM-E's state estimation vectors, eq. 3).
    """

    def __init__(
        self,
        tower: Tower,
        connector: Connector,
        language: Language,
        layers: Sequence[int] = (-1,),
        state_size: int = 0,
    ):
        super().__init__()
        self.vision, self.connector, self.language = tower, connector, language
        self.layers, self.state_size = tuple(layers), state_size
        self.objective = "language"
        self.teacher: Any = None  # of the objective `distillation`; no module, so that nobody trains it
        self.feature_cache: FeatureCache | None = None  # for stages in which the tower is frozen
        self.penalties: list[Callable[[], Tensor | None]] = []  # of the methods that train
        self.stop_ids: set[int] = set()  # tokens at which an answer ends
        self.compute_dtype = next(language.parameters()).dtype
        self.masks: MaskToken | None = None  # of models/mask_build.py, as all that follows
        self.mask_vision: Tower | None = None  # None: masks are drawn on the features of `vision`
        self.mask_layers: tuple[int, ...] = (-1,)
        self.mask_cache: FeatureCache | None = None
        self.mask_weights = (2.0, 0.5)  # of binary cross-entropy and dice
        self.state_projector = (
            nn.Sequential(
                nn.Linear(state_size, language.width), nn.GELU(), nn.Linear(language.width, language.width)
            )
            if state_size
            else None
        )

    def parts(self) -> dict[str, nn.Module]:
        """The parts that an adaptation plan speaks of; the state projector belongs to the connector."""
        parts: dict[str, nn.Module] = {"vision": self.vision, "connector": self.connector}
        if self.state_projector is not None:
            parts["connector"] = nn.ModuleDict(
                {"connector": self.connector, "state_projector": self.state_projector}
            )
        parts["language"] = self.language
        return parts if self.masks is None else parts | {"masks": self.masks}

    def image_tokens(self, images: Tensor | Patches) -> Tensor:
        """uint8 images [N, C, H, W] -> tokens [N, K, D]; of native sizes -> [U, D], image after image."""
        return self.connector(self.seen(images))

    def seen(self, images: Tensor | Patches) -> list[Tensor] | PackedFeatures:
        """As `features`, from what is kept of a frozen tower where it is kept."""
        if self.feature_cache is not None:
            return self.feature_cache(self.features, images)
        return self.features(images)

    def features(self, images: Tensor | Patches) -> list[Tensor] | PackedFeatures:
        """uint8 images [N, C, H, W] -> features_NPD of each layer that the connector reads; or packed."""
        return features_of(self.vision, images, self.layers)

    def mask_features(self, batch: Batch, features: list[Tensor]) -> Tensor:
        """features_JPE on which masks are drawn: of the masks' own tower, or the last of the model's own."""
        assert batch.masks is not None
        if self.mask_vision is None:
            return features[-1]
        tower = self.mask_vision

        def compute(images: Any) -> Any:
            return features_of(tower, images, self.mask_layers)

        compute = compute if self.mask_cache is None else partial(self.mask_cache, compute)
        (features_JPE,) = compute(batch.masks.scenes_JCHW)
        return features_JPE

    def inputs(self, batch: Batch, tokens: Tensor | None = None) -> LanguageInput:
        """Steps 1 to 4: everything before the language. `tokens` are the images', if they are known."""
        if not self.language.prompts.tokens and batch.prompt_positions_DP.numel():
            batch = without_places(batch)
        embeds_BTD = self.language.embed(batch.ids_BT).to(self.compute_dtype)
        tokens = self.image_tokens(batch.images) if tokens is None else tokens
        embeds_BTD = splice(embeds_BTD, tokens.flatten(0, -2), batch.image_positions_K)
        if self.state_projector is not None:
            states_SF = batch.states_SF
            if not len(states_SF):
                states_SF = states_SF.new_zeros(1, self.state_size)
            embeds_BTD = splice(embeds_BTD, self.state_projector(states_SF), batch.state_positions_S)
        embeds_BTD, places = self._prompted(embeds_BTD, batch)
        valid_BT = batch.documents_BT > 0
        if self.language.seq2seq:
            ids_BU, writers_BW = batch.decoder_ids_BU, batch.writers_BW
            return LanguageInput(
                embeds_BTD, valid_BT, decoder_ids_BU=ids_BU, writers_BW=writers_BW, places=places
            )
        texts = layout(batch, told=bool(places))
        if batch.plain and not places:
            return LanguageInput(embeds_BTD, valid_BT, writers_BW=batch.writers_BW, layout=texts)
        positions_BT = batch.positions_BT
        for places_N in places.values():  # rotary embeddings turn nothing at position 0
            positions_BT = positions_BT.flatten().index_fill(0, places_N, 0).view_as(positions_BT)
        return LanguageInput(
            embeds_BTD,
            valid_BT,
            positions_BT=positions_BT,
            branches_BT=batch.branches_BT,
            writers_BW=batch.writers_BW,
            layout=texts,
            places=places,
        )

    def _prompted(self, embeds_BTD: Tensor, batch: Batch) -> tuple[Tensor, dict[Prompt, Tensor]]:
        """Soft prompts put in their places, and the places of what goes into the blocks."""
        shares = self.language.prompts.share(batch.prompt_positions_DP)
        for prompt, places_N in shares.items():
            if prompt.embeds:
                tokens_PD = prompt.make()
                texts = max(1, len(places_N) // prompt.tokens)
                embeds_BTD = splice(embeds_BTD, tokens_PD.expand(texts, -1, -1).flatten(0, 1), places_N)
        return embeds_BTD, {prompt: places_N for prompt, places_N in shares.items() if not prompt.embeds}

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over targets of the stage's loss (float32 scalar), and each target's own [N], detached."""
        total, losses_N = OBJECTIVES.load(self.objective)(self, batch)
        for penalty in self.penalties:
            # The sum is divided by the tokens of the whole step: so a penalty counts once in it.
            value = penalty()
            total = total if value is None else total + value * len(losses_N)
        return total, losses_N

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Logits [B, T, V] (decoder positions for encoder-decoders); for checks, not for training."""
        return self.language.logits(self.language.hidden(self.inputs(batch)))

    @torch.no_grad()
    def generate(self, batch: Batch, settings: Generation, stop_ids: set[int]) -> list[list[int]]:
        """An answer for every writer of the batch, in order; ids without the stop token."""
        return self.language.generate(self.inputs(batch), settings, stop_ids)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass, in the tower and in the language."""
        part: Any
        for part in (self.vision, self.language):
            # Beside a side network a part keeps nothing, so there is nothing to recompute in it.
            (part.ladder or part).set_activation_checkpointing(enabled)


def features_of(
    tower: Tower, images: Tensor | Patches, layers: Sequence[int]
) -> list[Tensor] | PackedFeatures:
    """uint8 images [N, C, H, W] -> features_NPD of each layer; or packed, for images of native sizes."""
    if isinstance(images, Tensor):
        return tower(tower.normalise(images), layers)
    assert isinstance(tower, NativeTower)
    pixels_TV = tower.normalise(images.pixels_TV)
    packed = Packed(pixels_TV, images.places_T, images.grids, images.lengths)
    return PackedFeatures(tower(packed, layers), *tower.shapes(packed))
