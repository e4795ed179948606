"""The model of a run: what each kind of model is made of.

Knows names, types and defaults; knows nothing about building them. Further keys of an open section
(connector, head, decoder) are checked by that part, against its own signature.
"""

from __future__ import annotations

from math import inf
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator


class Section(BaseModel):
    """A frozen part of a run; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OpenSection(BaseModel):
    """A frozen part of a run whose further keys belong to the part that it names."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The keys beyond the declared ones."""
        return dict(self.model_extra or {})


class Vision(Section):
    """The tower. `model` is `open_clip:NAME`, `timm:NAME`, `hf:NAME`, `navit:SIZE` or a folder."""

    model: str
    weights: str = "hub:"
    image_size: int | tuple[int, int] | None = Field(
        None, description="pixels a side, or [height, width]; None is the model's own"
    )
    layers: tuple[int, ...] = Field((-1,), min_length=1, description="depths whose features are read")
    options: dict[str, Any] = {}

    @field_validator("image_size")
    @classmethod
    def _has_pixels(cls, value: Any) -> Any:
        if value is not None and min(value if isinstance(value, tuple) else (value,)) < 1:
            raise ValueError("an image has at least one pixel a side")
        return value


class Connector(OpenSection):
    """From tower features to language tokens; further keys go to the connector named."""

    name: str = "mlp"


class Language(Section):
    """The language model: a hub name, `package:NAME` or a folder."""

    model: str
    weights: str = "hub:"
    template: Literal["auto", "tokenizer", "plain", "bare"] = "auto"
    system: str | None = Field(None, description="system message; None is the template's own default")
    prefix_lm: bool = Field(False, description="read the prompt both ways (PaLI, PaliGemma)")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    max_length: int = Field(2048, gt=8, description="tokens a sample may have, images included")


class Decoder(OpenSection):
    """SAM's prompt encoder and mask decoder; further keys go to it."""

    weights: str = "random:"


class Masks(OpenSection):
    """A token of the language that asks for a mask, and what draws it (LISA, arXiv 2308.00692)."""

    token: str = "<seg>"
    vision: Vision | None = Field(None, description="a tower for the masks; None shares the model's own")
    decoder: Decoder = Decoder()


class Model(Section):
    """Tower, connector and language; `state_size` is the length of state vectors, 0 for none."""

    kind: Literal["vision_language"] = "vision_language"
    vision: Vision
    connector: Connector = Connector()
    language: Language
    state_size: int = Field(0, ge=0)
    masks: Masks | None = None


class Head(OpenSection):
    """From tower features to an embedding a pixel; further keys go to the head named."""

    name: str = "dpt"
    regularisation: Literal["none", "depthwise", "bottleneck"] = "none"
    regularisation_depth: int = Field(1, gt=0, description="how often the block is repeated")
    regularisation_activation: Literal["relu", "lrelu", "tanh"] = Field(
        "lrelu", description="between blocks; LSeg's is lrelu"
    )


class TextEncoder(Section):
    """What embeds the names of labels: `open_clip:NAME`, `hf:NAME`, `package:NAME` or a folder."""

    model: str
    weights: str = "hub:"
    templates: tuple[str, ...] = Field(("{}",), min_length=1, description="sentences around a name")
    options: dict[str, Any] = {}


class Segmenter(Section):
    """Language-driven segmentation (LSeg, arXiv 2201.03546): tower, dense head, text encoder."""

    kind: Literal["segmenter"]
    vision: Vision
    head: Head = Head()
    text: TextEncoder
    temperature: float | Literal["learned"] = Field(
        1 / 0.07, description="of the cosines, before the softmax; `learned` begins there"
    )

    @field_validator("temperature")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if value != "learned" and not 0 < value < inf:
            raise ValueError("the temperature is a number above 0, or `learned`")
        return value


class Promptable(Section):
    """Masks from points, boxes, masks and, with a text encoder, words (SAM, arXiv 2304.02643)."""

    kind: Literal["promptable"]
    vision: Vision
    decoder: Decoder = Decoder()
    text: TextEncoder | None = None


KINDS: dict[str, type[BaseModel]] = {
    "vision_language": Model,
    "segmenter": Segmenter,
    "promptable": Promptable,
}


def _kind(value: Any) -> Any:
    given = value.get("kind", "vision_language") if isinstance(value, dict) else getattr(value, "kind", None)
    return given if isinstance(given, str) else None


AnyModel = Annotated[
    Annotated[Model, Tag("vision_language")]
    | Annotated[Segmenter, Tag("segmenter")]
    | Annotated[Promptable, Tag("promptable")],
    Discriminator(_kind),
]
