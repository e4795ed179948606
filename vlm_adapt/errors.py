"""The one exception that a user may see.

Knows nothing about what went wrong. The command line prints its message as one sentence and exits
with code 2; every other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """Bad input, an unusable file, or a machine that cannot do what was asked.

    The message is one clear sentence: what is wrong, where, and what to do about it.
    """
