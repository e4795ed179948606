"""RefCOCO, RefCOCO+ and RefCOCOg: expressions that mean one object, its box and mask.

Yu et al. 2016, arXiv:1608.00272; Mao et al. 2016, arXiv:1511.02283."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from vlm_adapt.data.convert.coco_detection import read_instances, sample
from vlm_adapt.data.convert.common import Conversion, ImageFolders, Recipe, existing, read_json
from vlm_adapt.data.convert.masks import corners, number_of
from vlm_adapt.data.convert.plain_pickle import read_pickle
from vlm_adapt.data.convert.polygons import check_shape
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError

WORDINGS = ("sent", "raw")


def _read_refs(path: str) -> list[dict[str, Any]]:
    """The entries of a refs file, a pickle or JSON."""
    file = existing(path, "refs file")
    with open(file, "rb") as stream:
        start = stream.read(1)
    found = read_json(path, "refs file") if start in (b"[", b" ", b"\n") else read_pickle(path, "refs file")
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise UserError(f"{path} is not a refs file: it should hold a list of references")
    return found


def _expressions(conversion: Conversion, entry: dict[str, Any], wording: str) -> list[str]:
    texts = []
    try:
        found = [str(sentence[wording]).strip() for sentence in entry["sentences"]]
    except (KeyError, TypeError) as error:
        raise BadSample("reference without sentences", repr(error)) from error
    for number, text in enumerate(found):
        if text:
            texts.append(text)
        else:
            conversion.lose(f"{entry.get('ref_id')} (sentence {number})", "empty expression")
    if not texts:
        raise BadSample("reference without an expression")
    return texts


def _referred(entry: dict[str, Any], by_id: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    """The annotation that a reference means."""
    if isinstance(entry.get("ann_id"), list):
        raise BadSample("reference to none or several objects", str(entry["ann_id"]))
    annotation = by_id.get(number_of(entry.get("ann_id"), "object"))
    if annotation is None or annotation["image_id"] != entry["image_id"]:
        raise BadSample("reference to an object that the instances do not list", str(entry.get("ann_id")))
    return annotation


def convert(
    conversion: Conversion,
    *,
    refs: str,
    instances: str,
    images: str,
    split: str = "train",
    wording: str = "sent",
) -> Iterator[Recipe]:
    """Samples `{referring: [{expressions, box, mask, id}], id}`, one an image, in the order of the refs.

    Args:
        refs: `refs(unc).p`, `refs(google).p`, `refs(umd).p`, or the same list as JSON.
        instances: `instances.json`, with polygons or run lengths.
        images: the folder of COCO's train2014 or train2017, or several joined by `::`.
        split: train, val, testA, testB or test, as the refs file has them.
        wording: `sent`, in lower case without punctuation, or `raw`, as people wrote.
    """
    if wording not in WORDINGS:
        raise UserError(f"wording '{wording}' is neither of {', '.join(WORDINGS)}")
    folders = ImageFolders(images)
    entries = _read_refs(refs)
    splits = Counter(str(entry.get("split")) for entry in entries)
    if split not in splits:
        raise UserError(f"{refs} has no split '{split}': it has {', '.join(sorted(splits))}")
    source = read_instances(instances)
    by_id = {entry.get("id"): entry for entries in source.annotations.values() for entry in entries}
    grouped: dict[int, list[dict[str, Any]]] = {}
    for entry in entries:
        if str(entry.get("split")) != split:
            continue
        try:
            image = number_of(entry.get("image_id"), "image")
            if image not in source.images:
                raise BadSample("reference in an image that the instances do not list", str(image))
            grouped.setdefault(image, []).append(entry)
        except BadSample as error:
            conversion.lose(f"reference {entry.get('ref_id')}", error)
    conversion.total = len(grouped)
    for number, group in grouped.items():
        referring: list[dict[str, Any]] = []
        masks: dict[int, int] = {}
        segmentations: list[Any] = []
        for entry in group:
            try:
                annotation = _referred(entry, by_id)
                _, height, width = source.images[number]
                box = corners(annotation.get("bbox"), width, height)
                check_shape(annotation.get("segmentation"), height, width)
                expressions = _expressions(conversion, entry, wording)
            except BadSample as error:
                conversion.lose(f"{number} reference {entry.get('ref_id')}", error)
                continue
            if annotation["id"] not in masks:  # several references may mean one object
                masks[annotation["id"]] = len(segmentations)
                segmentations.append(annotation["segmentation"])
            referring.append(
                {
                    "expressions": expressions,
                    "box": box,
                    "mask": masks[annotation["id"]],
                    "id": str(entry.get("ref_id")),
                }
            )
        if not referring:
            conversion.lose(str(number), "image without a reference")
            continue
        name, height, width = source.images[number]
        path = folders.named(name)
        if not path.is_file():  # train2017 has the same photographs under their numbers alone
            try:
                path = folders.numbered(number)
            except BadSample as error:
                conversion.lose(str(number), error)
                continue
        record = {"referring": referring, "id": str(number)}
        yield Recipe(f"{number:012d}", sample, (path, (height, width), record, segmentations))
