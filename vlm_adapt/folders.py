"""Where the house keeps what it can fetch or make again.

Knows environment variables; knows nothing about what is kept.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The cache folder: `$VLM_ADAPT_CACHE`, else `vlm_adapt` under `$XDG_CACHE_HOME` or `~/.cache`."""
    chosen = os.environ.get("VLM_ADAPT_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "vlm_adapt"
