"""What a saliency artifact says of every layer."""

from ulbq.artifacts.records import Count, Record, Size


class SaliencyLayer(Record):
    """Summary of one layer's scores.

    Attributes:
        block: index of the block that holds the layer.
        projection: the layer's name inside its block, ``self_attn.q_proj``.
        shape: ``(out_features, in_features)``.
        total: sum of the scores of all weights.
        largest: the largest score of a weight.
        top: share of ``total`` that the highest 0.1, 1 and 10 % of the weights hold, by ``"0.1"``, ``"1"``, ``"10"``.
        columns: share of ``total`` in each of up to 64 even slices of the columns, in order.
        top_columns: the columns with the highest sums, each with its share of ``total``.
        rounding: absolute difference between the stored and the computed scores, summed, relative to ``total``.
        vanished: share of the weights whose score is positive and was stored as zero.
    """

    name: str
    block: Count
    projection: str
    shape: tuple[Size, Size]
    total: float
    largest: float
    top: dict[str, float]
    columns: tuple[float, ...]
    top_columns: tuple[tuple[Count, float], ...]
    rounding: float
    vanished: float

    @property
    def mean(self) -> float:
        """Mean score of a weight."""
        return self.total / (self.shape[0] * self.shape[1])


class BlockScores(Record):
    """A block whose scores are written.

    Attributes:
        loss: mean cross-entropy of the samples, nats a token; None for kinds that need none.
    """

    index: Count
    layers: tuple[SaliencyLayer, ...]
    loss: float | None = None
