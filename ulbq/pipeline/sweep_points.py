"""A sweep's runs by setting: what each measured over its seeds, and which settings no other beats."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean

from ulbq.artifacts import SweepRun
from ulbq.evaluation.results import Measured, ModelScores, Results

MEAN_ACCURACY = "mean of tasks"


def measured(scores: ModelScores) -> dict[str, tuple[float, int]]:
    """The numbers that models are compared by, each with 1 where more is better, -1 where less is."""
    found = {f"perplexity, {text}": (one.value, -1) for text, one in scores.perplexity.items()}
    if scores.fidelity is not None:
        found["mean KL, nats"] = (scores.fidelity.mean_kl, -1)
    tasks: dict[str, Measured] = {}
    for task, _, _, one in scores.task_metrics:
        tasks.setdefault(task, one)  # the metric that it names first
    found |= {task: (one.value, one.better) for task, one in tasks.items()}
    if len(tasks) > 1 and all(one.higher_is_better for one in tasks.values()):
        found[MEAN_ACCURACY] = (mean(one.value for one in tasks.values()), 1)
    return found


@dataclass(frozen=True)
class Point:
    """One setting.

    Attributes:
        runs: one a seed.
        values: of each number, one a seed.
    """

    setting: str
    runs: tuple[SweepRun, ...]
    values: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """True bits a weight, the mean over the seeds."""
        return mean(run.bits for run in self.runs)

    def value(self, name: str) -> float:
        """The mean over the seeds."""
        return mean(self.values[name])

    def spread(self, name: str) -> tuple[float, float]:
        """The least and the most over the seeds."""
        return min(self.values[name]), max(self.values[name])


def by_setting(runs: Iterable[SweepRun], results: Results) -> list[Point]:
    """The settings in the order of their runs."""
    scores = {one.subject.name: measured(one) for one in results.models}
    grouped: dict[str, list[SweepRun]] = {}
    for run in runs:
        grouped.setdefault(run.setting, []).append(run)
    return [
        Point(
            setting,
            tuple(members),
            {name: tuple(scores[run.name][name][0] for run in members) for name in scores[members[0].name]},
        )
        for setting, members in grouped.items()
    ]


def front(points: Sequence[Point], name: str, better: int) -> list[Point]:
    """The Pareto front: the settings that no other beats in a number with as few bits; the fewest bits first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda one: (one.bits, -better * one.value(name))):
        if not found or better * point.value(name) > better * found[-1].value(name):
            found.append(point)
    return found
