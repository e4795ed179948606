"""Ask a trained model about images from Python.

    python scripts/chat_demo.py CHECKPOINT IMAGE... --ask "What is this?" --ask "What color is it?"

The thin demo of `vlm_adapt.chat`; `vlm-adapt chat` is the comfortable form.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vlm_adapt.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Show the images to the model, ask each question in turn, and print the conversation."""
    parser = argparse.ArgumentParser(description="Ask a trained model about images.")
    parser.add_argument("checkpoint", help="a checkpoint folder or a run's output_dir")
    parser.add_argument("images", nargs="*", help="image files, shown with the first question")
    parser.add_argument("--ask", action="append", help="a question; may be repeated for several turns")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    given = parser.parse_args(arguments)

    from vlm_adapt.chat.session import Session
    from vlm_adapt.language.language import Generation

    try:
        session = Session.open(given.checkpoint, settings=Generation(given.max_new_tokens))
        images = given.images
        for question in given.ask or ["Describe the image."]:
            print(f"> {question}")
            for piece in session.ask(question, images):
                print(piece, end="", flush=True)
            print(flush=True)
            images = []
    except UserError as error:
        print(f"chat_demo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
