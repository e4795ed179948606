"""What other libraries say in every run and no user needs. Knows their switches; hides no warning of use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """While parts are loaded: no bar of transformers a part (downloads keep theirs), no guess of DeepSpeed's.

    DeepSpeed warns that it found no GPU; where there is none it is told so beforehand.
    """
    import logging as records

    import torch
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    bars, downloads = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()
    # A hub that does not answer is told once, in a sentence of ours, and not at every try.
    tries = records.getLogger("huggingface_hub.utils._http")
    level = tries.level
    tries.setLevel(records.ERROR)
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        tries.setLevel(level)
        if bars:
            logging.enable_progress_bar()
