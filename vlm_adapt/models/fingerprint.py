"""Which base an adapter belongs to: a short mark of each part, taken before anything is adapted.

Knows parameters, configurations and hashes; knows nothing about files. An adapter on other weights than it
was trained on answers, but wrongly, and nothing else would tell.

The marks name what a part is, not what its library calls things: they are made of shapes, of the numbers in
the configuration that change what is computed, and of a few values of every weight, all in no order. Values
are rounded to bfloat16 first, so that a base in float32 and the same in bfloat16 agree. Position tables are
left out of the values: they are interpolated to the image's size, and other versions of torch may round
otherwise. A connector's weights are those that a seed gives; they count where it was not trained in full.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm_adapt.connectors import connector_options
from vlm_adapt.errors import UserError

if TYPE_CHECKING:
    from vlm_adapt.config.schema import Model
    from vlm_adapt.models.vlm import VisionLanguageModel

Fingerprint = dict[str, dict[str, str]]
VALUES = 64  # of each weight, evenly spread
# What changes the computation and cannot be seen in shapes; keys that a library adds later do not count.
TELLING = (
    *("num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "head_dim", "num_kv_heads"),
    *("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj", "dense_act_fn"),
    *("layer_norm_eps", "rms_norm_eps", "layer_norm_epsilon", "norm_eps", "sliding_window", "patch_size"),
    *("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "logits_scaling", "rope_theta"),
    *("attention_multiplier", "embedding_multiplier", "residual_multiplier", "query_pre_attn_scalar"),
)
POSITIONS = ("pos_embed", "position_embed", "positional_embed", "relative_position_bias")


@torch.no_grad()
def fingerprint(model: VisionLanguageModel, config: Model) -> Fingerprint:
    """The marks of a model that nothing has been attached to.

    Returns:
        by part: `name`, `config` and `weights` (empty where they are drawn at random without a seed, so that
        no two models share them).
    """
    vision, language, connector = config.vision, config.language, config.connector
    defaults = connector_options(connector.name)
    given = {key: value for key, value in connector.options.items() if defaults.get(key) != value}
    plain: dict[str, Any] = {
        "name": connector.name,
        "options": given,
        "layers": list(model.vision.resolve(model.layers)),
    }
    plain |= {"width": model.language.width, "state_size": config.state_size}
    return {
        "vision": marks(model.vision, vision.model, vision.weights),
        "connector": {
            "name": connector.name,
            "config": _digest([json.dumps(plain, sort_keys=True)]),
            "weights": _digest(_samples(model.parts()["connector"])),
        },
        "language": marks(model.language, language.model, language.weights),
    } | _of_masks(model, config)


def _of_masks(model: VisionLanguageModel, config: Model) -> Fingerprint:
    """The marks of what draws masks, and of its own tower."""
    if model.masks is None or config.masks is None:
        return {}
    words = config.masks
    plain = {"token": words.token, "options": words.decoder.options, "layers": list(model.mask_layers)}
    found = {"masks": own_marks(model.masks, f"mask decoder ({words.decoder.weights})", plain)}
    if model.mask_vision is not None and words.vision is not None:
        found["mask tower"] = marks(model.mask_vision, words.vision.model, words.vision.weights)
    return found


@torch.no_grad()
def marks(part: nn.Module, model: str, weights: str) -> dict[str, str]:
    """The marks of a part that a library gave: a tower, a language or a text encoder."""
    drawn = weights == "random:"
    return {
        "name": _name(model, weights),
        "config": _digest([*_shapes(part), _telling(part)]),
        "weights": "" if drawn else _digest(_samples(part)),
    }


@torch.no_grad()
def own_marks(part: nn.Module, name: str, plain: Mapping[str, Any]) -> dict[str, str]:
    """The marks of a part of our own, whose weights a seed gives; `plain` is what else it computes by."""
    words = json.dumps(dict(plain), sort_keys=True, default=str)
    return {
        "name": name,
        "config": _digest([*_shapes(part), words]),
        "weights": _digest(_samples(part)),
    }


def check_base(
    wanted: Mapping[str, Mapping[str, str]] | None,
    here: Fingerprint | None,
    whose: str,
    labels: Collection[str] = (),
) -> None:
    """Refuse what was trained on another base.

    Args:
        wanted: as saved with it; None for a checkpoint of a time when none was.
        here: of the model that it is loaded into; empty marks (no values were there) agree with all.
        whose: names it in the sentence.
        labels: its methods; what a connector was before it was trained in full is no matter.

    Raises:
        UserError: with both names, and which part differs in what.
    """
    if not wanted or not here:
        return
    for part, ours in here.items():
        theirs = wanted.get(part, {})
        for mark, meaning in (("config", "another architecture"), ("weights", "other weights")):
            before, now = theirs.get(mark, ""), ours.get(mark, "")
            if (part, mark) == ("connector", "weights") and "connector-full" in labels:
                continue
            if before and now and before != now and (part, mark) == ("connector", "weights"):
                raise UserError(
                    f"{whose} builds on a connector '{ours['name']}' that was drawn with another seed and "
                    "not trained in full: give both the same seed, or train the connector with method full"
                )
            if before and now and before != now:
                name, other = theirs.get("name", "?"), ours["name"]
                beside = " of the same name, whose files have changed" if name == other else ""
                raise UserError(
                    f"{whose} was trained on the {part} '{name}', and this is '{other}'{beside}: it has "
                    f"{meaning}; give the one that it was trained on"
                )


def _name(model: str, weights: str) -> str:
    return model if weights == "hub:" else f"{model} ({weights})"


def _shapes(part: nn.Module) -> list[str]:
    return [str(list(parameter.shape)) for parameter in part.parameters()]


def _telling(part: nn.Module) -> str:
    """The telling numbers of a library's configuration, where there is one."""
    config: Any = getattr(getattr(part, "model", None), "config", None)
    if config is None:
        return type(part).__name__
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    plain = config.to_dict()
    rope = plain.get("rope_parameters") or plain.get("rope_scaling") or {}
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    found = {key: value for key, value in (plain | theta).items() if key in TELLING and value is not None}
    return json.dumps([plain.get("model_type"), found], sort_keys=True, default=str)


def _samples(part: nn.Module) -> list[str]:
    """Shape and some values of every weight; none of the meta device."""
    found = []
    for name, parameter in part.named_parameters():
        if parameter.device.type == "meta":
            return []
        if any(word in name for word in POSITIONS):
            continue
        found.append(f"{list(parameter.shape)} {_values(parameter)}")
    return found


def _values(parameter: Tensor) -> str:
    flat, count = parameter.detach().reshape(-1), parameter.numel()
    places = torch.linspace(0, count - 1, min(VALUES, count), dtype=torch.float64, device=flat.device).long()
    rounded = flat[places].to(torch.bfloat16).view(torch.int16)
    return hashlib.blake2b(rounded.cpu().numpy().tobytes(), digest_size=8).hexdigest()


def _digest(pieces: Iterable[str]) -> str:
    """32 letters of some texts in any order; nothing for none."""
    ordered = sorted(pieces)
    return hashlib.blake2b("\n".join(ordered).encode(), digest_size=16).hexdigest() if ordered else ""
