"""Differences between methods that answered the same rows, paired by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from slm_fast.measures import paired_difference
from slm_fast.report.figures import Spread
from slm_fast.report.results import Result
from slm_fast.report.runs import Seed

REFERENCE = "reference"  # in place of a method's difference to itself
STANDARD_ERROR = "standard error"
Scores = Mapping[str, Mapping[str, float]]  # task -> row -> score


@dataclass(frozen=True)
class Comparison:
    """Compares methods with `reference`, whose answers are read once."""

    reference: Result
    known: dict[tuple[str, int], Scores | None] = field(default_factory=dict)

    def difference(self, other: Result) -> Spread | None:
        """The other method's average accuracy minus the reference's after the last task that both have learned, and its
        standard error (`paired_difference`), over the seeds that both have.

        None if they share no seed, or have not saved answers to the same rows.

        Raises WorkError for damaged answers.
        """
        learned = min(self.reference.learned, other.learned, key=len)
        theirs = {seed.folder.name: seed for seed in other.method.seeds if len(seed.stages) >= len(learned)}
        pairs: dict[str, list[dict[str, float]]] = {name: [] for name in learned}
        for seed in self.reference.method.seeds:
            if seed.folder.name not in theirs or len(seed.stages) < len(learned):
                continue
            ours, found = self._own(seed, len(learned)), theirs[seed.folder.name].scores(len(learned))
            for name in learned:
                first, second = (ours or {}).get(name), (found or {}).get(name)
                if not first or not second or first.keys() != second.keys():
                    return None
                pairs[name].append({row: second[row] - score for row, score in first.items()})
        return Spread(*paired_difference(pairs)) if all(pairs.values()) else None

    def _own(self, seed: Seed, done: int) -> Scores | None:
        place = seed.folder.name, done
        if place not in self.known:
            self.known[place] = seed.scores(done)
        return self.known[place]
