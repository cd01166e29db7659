"""What ``eval`` measures: one object a metric, in the order in which they are taken and shown."""

from ulbq.evaluation.metrics.base import Metric
from ulbq.evaluation.metrics.fidelity import FidelityMetric
from ulbq.evaluation.metrics.perplexity import PerplexityMetric
from ulbq.evaluation.metrics.prompts import PromptsMetric
from ulbq.evaluation.metrics.tasks import TasksMetric

METRICS: dict[str, Metric] = {
    metric.name: metric for metric in (PromptsMetric(), PerplexityMetric(), FidelityMetric(), TasksMetric())
}
"""By their names in results."""
