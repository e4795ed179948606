"""Scores of generated text against references: pure functions of strings, without torch.

A metric is `score(predictions, references, kinds=None) -> dict` over a whole set of samples. `METRICS` names
them; `SAMPLE_SCORES` names, for each, the function that gives one number per sample (for pictures and for
error bars). A new metric is one new file and one line in each table.
"""

from vlm_adapt.choices import Choices

METRICS = Choices(
    "metric",
    {
        "caption": "vlm_adapt.metrics.caption:score",
        "exact_match": "vlm_adapt.metrics.exact:score",
        "vqa": "vlm_adapt.metrics.vqa:score",
    },
)

SAMPLE_SCORES = Choices(
    "metric",
    {
        "caption": "vlm_adapt.metrics.caption:sample_scores",
        "exact_match": "vlm_adapt.metrics.exact:sample_scores",
        "vqa": "vlm_adapt.metrics.vqa:sample_scores",
    },
)
