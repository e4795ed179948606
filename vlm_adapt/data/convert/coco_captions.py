"""COCO captions: one sample an image, with all its captions. Chen et al. 2015, arXiv:1504.00325."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_adapt.data.convert.common import Conversion, ImageFolders, Recipe, image_sample, read_json, several
from vlm_adapt.errors import UserError


def convert(conversion: Conversion, *, annotations: str, images: str) -> Iterator[Recipe]:
    """Samples `{captions: [...], id}` in the order of the annotations' images.

    Args:
        annotations: `captions_*.json`, or several joined by `::`.
        images: the folder of the images, or several joined by `::`.
    """
    folders = ImageFolders(images)
    pictures: dict[int, str] = {}
    captions: dict[int, list[str]] = {}
    for path in several(annotations):
        content = read_json(path, "annotation file")
        try:
            for image in content["images"]:
                pictures[int(image["id"])] = image["file_name"]
            for entry in content["annotations"]:
                captions.setdefault(int(entry["image_id"]), []).append(entry["caption"].strip())
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path} is not a COCO caption file ({type(error).__name__}: {error})") from error
    conversion.total = len(pictures)
    for number in captions.keys() - pictures.keys():
        conversion.lose(str(number), "captions of an image that the file does not list")
    for number, name in pictures.items():
        texts = [text for text in captions.get(number, []) if text]
        if len(texts) < len(captions.get(number, [])):
            conversion.lose(f"{number} (a caption)", "empty caption")
        if not texts:
            conversion.lose(str(number), "image without captions")
            continue
        record = {"captions": texts, "id": str(number)}
        yield Recipe(f"{number:012d}", image_sample, ((folders.places(name),), record))
