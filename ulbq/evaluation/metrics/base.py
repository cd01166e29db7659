"""What every metric has: how it is measured, and how it is shown in tables, on pages and on model cards."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from markupsafe import Markup

from ulbq.evaluation.results import Measured, ModelScores, Results

if TYPE_CHECKING:
    from ulbq.blockwise.streamed import AnyModel
    from ulbq.evaluation.evaluated import EvaluatedModel
    from ulbq.evaluation.measurer import Measurer


class Published(NamedTuple):
    """A number on a model card: its name there, what the Hub calls the data and the metric, how much was measured."""

    name: str
    data: str
    metric: str
    extent: str


@dataclass(frozen=True)
class Shown:
    """One number of one model, as people read it.

    Attributes:
        label: name of its row in tables; an arrow towards the better side is added.
        value: the number.
        text: the same, written out.
        better: 1 where more is better, -1 where less is, 0 where neither.
        tile: its name at the top of a page about a single model; empty where it does not stand there.
        published: how model cards show it; None: not at all.
        chance: what guessing would give; None where nobody can say.
        delta: how its difference from the parent's is written, as a format; empty: it is not.
    """

    label: str
    value: float
    text: str
    better: int
    tile: str = ""
    published: Published | None = None
    chance: float | None = None
    delta: str = ""


class Figure(NamedTuple):
    """A drawing of a page, with its title and caption; ``legend`` says whether it wants the models' colours told."""

    title: str
    caption: str
    drawing: Markup
    legend: bool = False


class Metric(ABC):
    """A metric of ``eval``.

    Attributes:
        name: of its value in :class:`~ulbq.evaluation.results.ModelScores`, and so in ``results.json``.
        section: the heading that its rows stand under.
        always: whether the full-precision parent of a measured model is measured even with ``parent_scores=False``.
    """

    name: ClassVar[str]
    section: ClassVar[str]
    always: ClassVar[bool] = False

    @abstractmethod
    def measure(self, measurer: "Measurer", candidate: "EvaluatedModel", model: "Callable[[], AnyModel]") -> Any:
        """Take it, in steps that a resumed run need not repeat (:meth:`Measurer.step`, :meth:`Measurer.score`).

        Args:
            measurer: what is measured (``measurer.request`` is what was asked), and how.
            candidate: the model on disk.
            model: loads it, once for all metrics.

        Returns:
            What is kept in the results: a ``dict[str, Measured]``, or what ``ModelScores`` has a field for. Nothing, as
            in ``{}`` or None, where it was not asked for.
        """

    def numbers(self, scores: ModelScores) -> Sequence[Shown]:
        """The numbers of one model."""
        found: dict[str, Measured] = getattr(scores, self.name, {})
        return [Shown(label, one.value, one.text, one.better, tile=label) for label, one in found.items()]

    def notes(self, results: Results) -> list[str]:
        """What a reader must know to compare these numbers with others."""
        return []

    def figure(self, results: Results) -> Figure | None:
        """A drawing for the page; None where there is nothing to draw."""
        return None
