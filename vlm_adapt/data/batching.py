"""How samples become rows. A table only; a new way is one file and one line here."""

from vlm_adapt.choices import Choices

BATCHING = Choices(
    "batching",
    {
        "padded": "vlm_adapt.data.rows:PaddedRows",
        "bucketed": "vlm_adapt.data.rows:BucketedRows",
        "packed": "vlm_adapt.data.pack:PackedRows",
    },
)
