"""Which labels a sample's semantic mask shows, for tasks that ask for masks in words.

Knows masks and labels; knows nothing about wording. The mask that an answer means is found by
`token_masks.mask_of`.
"""

from __future__ import annotations

import numpy as np

from vlm_adapt.data.masks import check_values, count_values, ignored_value, read_mask
from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.sample import Sample


def labels_shown(sample: Sample) -> dict[str, float]:
    """Each label that the semantic mask shows, by its share of the image's pixels, in the order of `labels`.

    Values of one name are added up; ignored pixels count for the image's size only.

    Raises:
        BadSample: there is no semantic mask, no labels, or a value without one.
    """
    if sample.mask is None:
        raise BadSample("no semantic mask", "KEY.mask.png is missing")
    names = [name.strip() for name in sample.record.get("labels", ())]
    if not names:
        raise BadSample("mask without labels", f"the record has {', '.join(sample.record)}")
    mask_HW = read_mask(sample.mask)
    check_values(mask_HW, names)
    counts = count_values(mask_HW)
    counts[ignored_value(mask_HW)] = 0
    shown: dict[str, float] = {}
    for value in np.flatnonzero(counts).tolist():
        shown[names[value]] = shown.get(names[value], 0.0) + int(counts[value]) / mask_HW.size
    return shown
