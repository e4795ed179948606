"""peft's tuners that choose layers in their own way: IA3's feed-forwards, and rows of the embedding.

Knows where they go; the formulas are peft's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.tuner import Tuner
from vlm_adapt.adapt.tuner_targets import choose_layers
from vlm_adapt.errors import UserError

# The second layer of a feed-forward, by the names of transformers, timm and open_clip.
FEED_FORWARD = ("down_proj", "fc2", "wo", "w2", "c_proj", "fc_out", "dense_4h_to_h", "linear2", "dense")
ATTENTION = ("attn", "attention")


class Ia3(Tuner):
    """Vectors that scale the outputs of layers; of a feed-forward's second layer, its input.

    Settings are those of peft's IA3Config. `feedforward_modules`: names of the layers whose input is scaled
    (by default the second layers of feed-forwards among the targets). The paper takes k, v and those.
    """

    name = "ia3"
    kind = "IA3"
    summary = "vectors that scale keys, values and inner activations"
    paper = "Liu et al. 2022, arXiv 2205.05638"
    layers = ("linear", "conv")
    additive = False
    example: dict[str, Any] = {}  # noqa: RUF012

    def attach(self, place: Place) -> None:
        """As in Tuner, with the feed-forward's layers told apart."""
        wanted = self.settings.get("feedforward_modules")
        names = choose_layers(place, self.targets, self.layers, self.name)
        self.feed_forward = [name for name in names if _is_feed_forward(name)]
        if wanted is not None:
            self.feed_forward = choose_layers(place, wanted, self.layers, self.name) if wanted else []
            missing = sorted(set(self.feed_forward) - set(names))
            if missing:
                raise UserError(
                    f"adapt: '{missing[0]}' is among feedforward_modules of 'ia3' and not among "
                    "target_modules: name it in both"
                )
        super().attach(place)

    def configure(self, names: Sequence[str]) -> Any:
        """As in Tuner."""
        settings = self.settings
        try:
            self.settings = settings | {"feedforward_modules": list(getattr(self, "feed_forward", []))}
            return super().configure(names)
        finally:
            self.settings = settings

    def written_config(self) -> Any:
        """As in Tuner."""
        config = super().written_config()
        config.feedforward_modules = list(self.feed_forward)
        return config


def _is_feed_forward(name: str) -> bool:
    """The second layer of a feed-forward: named like one, and not below an attention."""
    *above, last = name.split(".")
    if any(word in piece.lower() for piece in above for word in ATTENTION):
        return False
    return last in FEED_FORWARD and (last != "dense" or above[-1:] == ["output"])


class TrainableTokens(Tuner):
    """Chosen rows of the embedding train, the others stay; a tied head follows.

    Args:
        token_indices: ids of the rows.
        init_weights: whether they start as they are; else from random numbers.
    """

    name = "trainable_tokens"
    kind = "TRAINABLE_TOKENS"
    summary = "chosen rows of the embedding"
    paper = "peft (trainable tokens); Lester et al. 2021 train such rows alone, arXiv 2104.08691"
    sides = ("language",)
    layers = ("embedding",)
    additive = False
    nests = False
    example = {"token_indices": [2, 294, 306]}

    def __init__(self, token_indices: Sequence[int], init_weights: bool = True):
        ids = list(token_indices) if isinstance(token_indices, list | tuple) else []
        whole = all(isinstance(number, int) and number >= 0 for number in ids)
        if not ids or not whole or len(set(ids)) < len(ids):
            raise UserError("adapt: 'trainable_tokens' takes token_indices, a list of different ids from 0")
        super().__init__([], token_indices=ids, init_weights=init_weights)

    @classmethod
    def extra_settings(cls) -> list[str]:
        """None beyond the constructor's own."""
        return []

    def choose(self, place: Place) -> list[str]:
        """The input embedding, wherever it is."""
        inner: Any = place.inner
        embedding = inner.get_input_embeddings()
        rows = embedding.weight.shape[0]
        highest = max(self.settings["token_indices"])
        if highest >= rows:
            raise UserError(
                f"adapt: 'trainable_tokens' has id {highest}, and there are {rows} rows in the embedding"
            )
        return [next(name for name, module in inner.named_modules() if module is embedding)]

    def _check_company(self) -> None:
        super()._check_company()
        mine = set(self.settings["token_indices"])
        for other in self._others_on(self.inner.get_submodule(self.names[0])):
            both = mine & set(other.settings.get("token_indices", ()))
            if both:
                raise UserError(
                    f"adapt: two lines of 'trainable_tokens' have id {min(both)}: leave it to one of them"
                )
