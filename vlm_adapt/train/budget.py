"""How many bad samples a run bears: in all, of each source, and one after another.

Knows counts, limits and the file that names every refusal; knows nothing about samples. Ranks share
their counts at every step, so all of them stop together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_adapt import dist
from vlm_adapt.config.schema import Data
from vlm_adapt.data.problems import Account
from vlm_adapt.errors import UserError

ENOUGH_TO_JUDGE = 50  # samples read before a share of refusals can stop a run
FILE = "refused.jsonl"
COUNTS = ("read", "used", "refused", "tokens")


class Budget:
    """Counts of all ranks, judged after every step.

    Args:
        data: its limits.
        names: of the sources.
        before: the account of the steps before.
        lost: samples that the shards' indexes already found unusable.
        folder: where every refusal is named, in `refused.jsonl`.
    """

    def __init__(self, data: Data, names: Sequence[str], before: Account, lost: int, folder: Path):
        self.data, self.names, self.folder = data, list(names), folder
        self.sources = {
            name: {what: before.sources.get(name, {}).get(what, 0) for what in COUNTS} for name in names
        }
        self.lost = lost
        self.in_a_row = dict.fromkeys(self.names, 0)  # of this rank
        self.longest = 0

    def counts(self, account: Account) -> list[float]:
        """This rank's numbers of a step, to be totalled over the ranks."""
        numbers: list[float] = []
        for name in self.names:
            own: Mapping[str, int] = account.sources.get(name) or dict.fromkeys(COUNTS, 0)
            numbers += [float(own[what]) for what in COUNTS]
            self.in_a_row[name] = own["refused"] + (0 if own["used"] else self.in_a_row[name])
            numbers.append(float(self.in_a_row[name] >= self.data.max_refused_in_a_row))
        return numbers

    def add(self, totals: Sequence[float], account: Account, step: int) -> None:
        """Enter the totals of a step; write down what was refused in it.

        Raises:
            UserError: a limit is passed.
        """
        size, over = len(COUNTS) + 1, ""
        refused = 0.0
        for place, name in enumerate(self.names):
            own = totals[place * size : (place + 1) * size]
            refused += own[2]
            for what, count in zip(COUNTS, own[:-1], strict=True):
                self.sources[name][what] += int(count)
            if own[-1]:
                over = f"{self.data.max_refused_in_a_row} and more of '{name}' in a row"
        if refused:  # all ranks know, so all of them come here
            self.write(step, [one for part in dist.gather(account.fresh) for one in part])
        account.fresh = []
        self._judge(over)

    def write(self, step: int, refusals: Sequence[tuple[str, str, str]]) -> None:
        """Name refusals (source, key, why) in the file."""
        if not dist.is_main() or not refusals:
            return
        path = self.folder / FILE
        try:
            with path.open("a", encoding="utf-8") as file:
                for source, key, why in refusals:
                    line = {"step": step, "source": source, "key": key, "reason": why}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"'{path}' cannot be written ({error.strerror}): free some space") from error

    def total(self, what: str) -> int:
        """A count over all sources."""
        return sum(counts[what] for counts in self.sources.values())

    def _judge(self, over: str) -> None:
        read, refused = self.total("read"), self.total("refused") + self.lost
        if not over and read >= ENOUGH_TO_JUDGE and refused > self.data.max_refused * read:
            over = f"{refused} of {read} samples (data.max_refused {self.data.max_refused})"
        for source, (name, counts) in zip(self.data.train, self.sources.items(), strict=True):
            limit = source.max_refused
            if over or limit is None or counts["read"] < ENOUGH_TO_JUDGE:
                continue
            if counts["refused"] > limit * counts["read"]:
                over = (
                    f"{counts['refused']} of {counts['read']} samples of '{name}' (its max_refused {limit})"
                )
        if over:
            self.stop(f"{over} were refused")

    def stop(self, what: str) -> None:
        """End the run on every rank, with the reasons and where all keys are.

        Raises:
            UserError: always.
        """
        reasons: dict[str, int] = {}
        path = self.folder / FILE
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                why = json.loads(line)["reason"].partition(":")[0]
                reasons[why] = reasons.get(why, 0) + 1
        worst = sorted(reasons.items(), key=lambda one: -one[1])[:4]
        named = ", ".join(f"{count} x {why}" for why, count in worst)
        raise UserError(f"{what}: {named or 'no reason was noted'}; '{path}' names every one of them")

    def shares(self) -> dict[str, dict[str, Any]]:
        """For the journal: what each source gave so far, in samples and learned tokens, and its share."""
        samples, tokens = max(1, self.total("used")), max(1, self.total("tokens"))
        return {
            name: {
                "samples": counts["used"],
                "learned_tokens": counts["tokens"],
                "share_of_samples": round(counts["used"] / samples, 4),
                "share_of_tokens": round(counts["tokens"] / tokens, 4),
            }
            for name, counts in self.sources.items()
        }
