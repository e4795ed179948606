"""What converters of visual questions share: recipes for an image and what is asked about it.

Knows samples of one or of several questions; knows nothing about any one dataset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlm_adapt.data.convert.common import Recipe, image_sample, safe_key
from vlm_adapt.data.problems import BadSample

GROUPED = "one sample an image, with a list of questions; False gives one sample a question"


def _asked(places: Sequence[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """An image and all its questions. A recipe."""
    try:
        return image_sample([places], record)
    except BadSample as error:
        detail = f"{error.detail}, with its {len(record['questions'])} question(s)"
        raise BadSample(error.reason, detail) from error


def question_recipes(
    key: str,
    image_id: str,
    places: Sequence[str],
    items: Sequence[Mapping[str, Any]],
    group: bool,
    more: Mapping[str, Any] | None = None,
) -> Iterator[Recipe]:
    """Recipes for what is asked about one image.

    Args:
        key: of the image; a question's key is this and its id.
        places: where the image may lie, the first that has a file.
        items: `{id, question, answers, ...}`.
        group: one sample for all, else one a question.
        more: fields of the image, for every record.
    """
    more = more or {}
    if group:
        yield Recipe(key, _asked, (places, {"questions": items, "id": image_id, **more}))
        return
    for item in items:
        yield Recipe(f"{key}-{safe_key(item['id'])}", image_sample, ((places,), {**item, **more}))
