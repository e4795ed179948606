"""Attention for models of transformers that let it be chosen: text by text, whatever the device has for that.

A mask says what it is (`texts.TextMask`, a BlockMask, a plain tensor, none) and `interface.attend` chooses by
that, so that a block that is computed again in the backward pass is computed in the same way.
"""

from vlm_adapt.attention.interface import NAME, attend, fits, register

__all__ = ["NAME", "attend", "fits", "register"]
