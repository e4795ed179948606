"""From an exception to one sentence and an exit code.

Knows wording and codes; knows nothing about verbs. What is not listed here is a bug of ours and keeps
its traceback.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import typer

from vlm_adapt import dist
from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError

PIPE, USER, LOST, INTERRUPTED = 1, 2, 3, 130
RANK_PATIENCE = 10.0  # seconds in which a launcher ends the other ranks once the main one has spoken
UsageError: Any = typer.BadParameter.__mro__[1]  # click's, wherever typer keeps click


def guarded(verb: Callable[[], int | None], words: Sequence[str]) -> int:
    """Run a verb and turn what a user can mend into a sentence.

    Args:
        words: the arguments, for suggestions.

    Returns:
        what the verb returns (None is 0); 1 the reader of our output has gone, 2 the user's to mend,
        3 another rank has gone, 130 Ctrl-C.
    """
    try:
        code = verb()
        sys.stdout.flush()
        return code or 0
    except UserError as error:
        say(str(error))
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
        else:
            say(usage_sentence(error, words))
    except (KeyboardInterrupt, typer.Abort):
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        leave_pipe()
        return PIPE
    except Exception as error:
        sentence = memory_sentence(error)
        if sentence is not None:
            say(sentence)
            return USER
        sentence = lost_sentence(error)
        if sentence is None:
            raise
        print(f"vlm-adapt: {sentence}", file=sys.stderr, flush=True)
        return LOST
    return USER


def say(sentence: str) -> None:
    """The sentence on standard error, once for all ranks of a run.

    What is wrong for one rank is mostly wrong for all, so the others wait until the launcher has ended
    them. Whoever is still there then has a trouble of its own, and says so.
    """
    sentence = " ".join(sentence.split())
    if not dist.is_main():
        time.sleep(RANK_PATIENCE)
        sentence = f"rank {dist.rank()}: {sentence}"
    try:
        print(f"vlm-adapt: {sentence}", file=sys.stderr, flush=True)
    except OSError:
        pass  # nobody listens; the exit code says it


def leave_pipe() -> None:
    """The reader of our output has gone: let Python's last flush not fail on it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def usage_sentence(error: Any, arguments: Sequence[str]) -> str:
    """What is wrong with the arguments, and what was probably meant.

    Args:
        error: click's UsageError.
    """
    context = getattr(error, "ctx", None)
    command = getattr(context, "command", None)
    where = getattr(context, "command_path", "vlm-adapt")
    verb = where.removeprefix("vlm-adapt ")
    option = getattr(error, "option_name", None)
    if command is None or option is None or "no such option" not in error.format_message().lower():
        message = error.format_message().rstrip(".").replace("\n", " ")
        return f"{message[:1].lower()}{message[1:]} (see {where} --help)"
    known = [name for one in command.params for name in one.opts if name.startswith("--")] + ["--help"]
    given = next((word for word in arguments if word.startswith(option)), option)
    setting = given.lstrip("-").replace("-", "_") if "=" in given else "train.max_steps=100"
    near = nearest(option, known)
    if any(one.name == "overrides" for one in command.params) and ("." in option or not near):
        return f"{verb} has no option '{option}': settings are written without dashes, as in {setting}"
    return f"{verb} has no option '{option}'{near or ': it has ' + ', '.join(known)}"


def memory_sentence(error: BaseException) -> str | None:
    """What to lower when the memory is not enough; None for any other error."""
    text = str(error)
    # torch's own class is not imported for this; on the CPU it raises a plain RuntimeError.
    cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text
    if not (isinstance(error, MemoryError) or cpu or type(error).__name__ == "OutOfMemoryError"):
        return None
    what = "GPU" if type(error).__name__ == "OutOfMemoryError" else "main"
    return (
        f"the {what} memory is not enough: lower train.per_device_train_batch_size (and raise "
        "train.gradient_accumulation_steps), evaluate.batch_size or model.vision.image_size, set "
        "train.gradient_checkpointing=true, or spread the model with train.deepspeed=zero3"
    )


# What gloo and nccl say when the process at the other end has gone, or does not answer.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
_LATE = ("Timed out waiting", "Watchdog caught collective operation timeout", "wait timeout after")


def lost_sentence(error: BaseException) -> str | None:
    """What to say when another rank of the run has died or hangs; None for any other error."""
    text = str(error)
    if dist.world_size() == 1 or not isinstance(error, RuntimeError):
        return None
    gone, late = (any(words in text for words in known) for known in (_GONE, _LATE))
    if not (gone or late):
        return None
    what = "another rank has ended" if gone else "another rank did not answer in time"
    return (
        f"rank {dist.rank()} of {dist.world_size()}: {what}, and the run cannot go on without it: the reason "
        "stands in that rank's own output (a kill by the system's memory killer stands in none); the same "
        "command goes on from the last checkpoint"
    )
