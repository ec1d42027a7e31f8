"""Results of a method over its seeds: means and standard deviations of the stream's metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from slm_fast.measures import (
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    final_forgetting,
    forgetting_by_step,
    forward_transfer,
)
from slm_fast.report.figures import Spread
from slm_fast.report.markup import isolated
from slm_fast.report.runs import Method, Run, Stage


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and standard deviation over seeds; None if any value is undefined."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return Spread(mean(known), stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True)
class Result:
    """A method after the tasks it has learned (`learned`, in order), over the seeds that learned all of these."""

    method: Method
    learned: Sequence[str]
    complete: bool

    def measure(self, of: Callable[[Sequence[Mapping[str, float]], Sequence[str]], float | None]) -> Spread | None:
        """A metric of `slm_fast.measures`, over seeds."""
        return spread([of([stage.accuracy for stage in seed.stages], self.learned) for seed in self.method.farthest])

    @property
    def title(self) -> str:
        """The method's title, for use within a sentence."""
        return isolated(self.method.title)

    @property
    def average(self) -> Spread:
        found = self.measure(average_accuracy)
        assert found is not None
        return found

    @property
    def forgetting(self) -> Spread | None:
        return self.measure(final_forgetting)

    def forgetting_by_step(self) -> list[float | None]:
        """F_k after each task, mean over seeds; None after the first."""
        matrices = [[stage.accuracy for stage in seed.stages] for seed in self.method.farthest]
        by_seed = [forgetting_by_step(matrix, self.learned) for matrix in matrices]
        found = [spread(values) for values in zip(*by_seed, strict=True)]
        return [None if value is None else value.mean for value in found]

    @property
    def backward(self) -> Spread | None:
        return self.measure(backward_transfer)

    @property
    def incremental(self) -> Spread | None:
        return self.measure(average_incremental_accuracy)

    @property
    def forward(self) -> Spread | None:
        """Forward transfer; None unless tasks were also evaluated before they were learned."""
        return spread(
            [
                forward_transfer([stage.accuracy for stage in seed.stages], self.learned, seed.untrained)
                for seed in self.method.farthest
            ]
        )

    def also(self, what: str) -> Spread | None:
        """Another metric after the last task: the mean over the tasks that have it."""
        found = []
        for seed in self.method.farthest:
            known = [own[what] for own in (seed.stages[-1].also[name] for name in self.learned) if what in own]
            found.append(mean(known) if known else None)
        return spread(found)

    @property
    def routing(self) -> Spread | None:
        """Routing accuracy, mean over tasks; None for a method with oracle task IDs or without task predictions."""
        if self.method.told:
            return None
        found = []
        for seed in self.method.farthest:
            routed = [seed.stages[-1].routed[name] for name in self.learned]
            known = [share for share in routed if share is not None]
            found.append(mean(known) if len(known) == len(routed) else None)
        return spread(found)

    def by_task(self, of: Callable[[Stage], Mapping[str, float | None]], name: str) -> Spread | None:
        """A task's value after the last learned task."""
        return spread([of(seed.stages[-1]).get(name) for seed in self.method.farthest])

    def cost(self, what: str, of: Callable[[Sequence[float]], float]) -> float | None:
        """A cost over all stages of all seeds, aggregated by `of`; None if any is unknown."""
        values = [stage.costs[what] for seed in self.method.farthest for stage in seed.stages]
        known = [value for value in values if value is not None]
        return of(known) if known and len(known) == len(values) else None

    def last_cost(self, what: str) -> float | None:
        """A cost after the last stage, mean over seeds."""
        found = spread([seed.stages[-1].costs[what] for seed in self.method.farthest])
        return None if found is None else found.mean

    def seconds(self, what: str, of: Callable[[Sequence[float]], float]) -> float | None:
        """A duration of `SECONDS`: CPU time if known, which other load hardly affects, else wall-clock time."""
        known = self.cost(f"{what}_cpu_seconds", of)
        return self.cost(f"{what}_seconds", of) if known is None else known

    def milliseconds_a_row(self, what: str) -> float | None:
        """After the last task: the time to "answer" a row, or to only "route" it."""
        rows, seconds = self.last_cost("rows_answered"), self.last_cost(f"{what}_cpu_seconds")
        seconds = self.last_cost(f"{what}_seconds") if seconds is None else seconds
        return None if not rows or seconds is None else 1000 * seconds / rows

    def matrix(self, tasks: Sequence[str]) -> list[list[float | None]]:
        """Accuracy matrix R, mean over seeds: [after task][on task], None where a task was not evaluated."""
        found: list[list[float | None]] = []
        for n in range(len(self.learned)):
            stages = [seed.stages[n].accuracy for seed in self.method.farthest]
            found.append([mean(s[name] for s in stages) if all(name in s for s in stages) else None for name in tasks])
        return found

    def averages(self) -> list[float]:
        """After each task, the average accuracy on the tasks learned so far."""
        matrix = self.matrix(self.learned)
        return [mean(value for value in row[: n + 1] if value is not None) for n, row in enumerate(matrix)]

    def confusion(self) -> Counter[tuple[str, str]] | None:
        """Row counts by (task, predicted task) over seeds; None if not saved or no task is predicted.

        Raises WorkError for damaged answers.
        """
        if self.method.told:
            return None
        found = [seed.answers() for seed in self.method.farthest]
        known = [answers for answers in found if answers is not None]
        total: Counter[tuple[str, str]] = Counter()
        for name in self.learned:  # in learning order
            for answers in known:
                total.update({pair: rows for pair, rows in sorted(answers.items()) if pair[0] == name})
        return total or None


def results(run: Run) -> list[Result]:
    """The methods, best first. Those that are advantaged come after the others, and those that have learned fewer tasks
    last."""
    found = [Result(m, run.tasks[: m.stages], m.stages == len(run.tasks)) for m in run.methods]
    return sorted(
        found, key=lambda one: (-one.method.stages, one.method.advantaged, -one.average.mean, one.method.name)
    )


def leads(ranked: Sequence[Result]) -> list[Result]:
    """The methods that have learned the most tasks, best first; none that is advantaged if there are others."""
    far = [result for result in ranked if len(result.learned) == len(ranked[0].learned)]
    return [result for result in far if not result.method.advantaged] or far


def many(count: int, what: str) -> str:
    """A number of things: "1 task", "2 tasks"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
