"""METEOR 1.5 (Denkowski and Lavie 2014) through its own Java program, where that is installed.

The program is not ours to ship: it is used when `java` is on the path and the pycocoevalcap package, which
carries the jar, is installed; otherwise `why_absent()` says what is missing. Takes tokenised strings and
knows nothing about tokenising.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vlm_adapt.errors import UserError

JAR = "meteor-1.5.jar"


def find_jar() -> Path | None:
    """The jar inside an installed pycocoevalcap, without importing the package."""
    found = importlib.util.find_spec("pycocoevalcap")
    for place in (found.submodule_search_locations if found else None) or []:
        jar = Path(place) / "meteor" / JAR
        if jar.is_file():
            return jar
    return None


def why_absent() -> str | None:
    """Why METEOR cannot be computed here, in a sentence, or None if it can."""
    if shutil.which("java") is None:
        return "METEOR needs Java: there is no `java` on the path"
    if find_jar() is None:
        return f"METEOR needs {JAR}: install the package pycocoevalcap, which carries it"
    return None


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """The set's score and each sample's, 0 to 1.

    Raises:
        UserError: Java or the jar is absent, or the program stopped early (its last line is quoted).
    """
    reason = why_absent()
    if reason:
        raise UserError(reason)
    jar = find_jar()
    assert jar is not None
    command = ["java", "-jar", "-Xmx2G", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(
            command, cwd=jar.parent, stdin=pipe, stdout=pipe, stderr=complaints, encoding="utf-8"
        ) as java,
    ):
        assert java.stdin is not None and java.stdout is not None
        try:
            statistics = []
            for prediction, answers in zip(predictions, references, strict=True):
                guess = prediction.replace("|||", "").replace("  ", " ")
                java.stdin.write(" ||| ".join(["SCORE", *answers, guess]) + "\n")
                java.stdin.flush()  # a reply a line: without waiting for it, both pipes could fill up
                statistics.append(java.stdout.readline().strip())
            java.stdin.write(" ||| ".join(["EVAL", *statistics]) + "\n")
            java.stdin.flush()
            lines = [java.stdout.readline().strip() for _ in range(len(statistics) + 1)]
            values = [float(line) for line in lines]
        except (BrokenPipeError, ValueError) as error:
            java.kill()
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip().splitlines() or [str(error)]
            raise UserError(f"the METEOR program {jar.name} stopped early, saying: {said[-1]}") from error
        java.stdin.close()
    return values[-1], values[:-1]
