"""How packed matrices go back into training, one entry a format."""

from typing import NamedTuple

from ulbq.quantizers.affine import AffineQuantizer
from ulbq.quantizers.base import Quantizer
from ulbq.quantizers.binary_mos import BinaryMosQuantizer
from ulbq.quantizers.codebook import CodebookQuantizer
from ulbq.quantizers.dual_binary import DualBinaryQuantizer
from ulbq.quantizers.fixed import FixedAffine, FixedBinaryMos, FixedDualBinary, FixedTrellis
from ulbq.quantizers.k_quant import FixedKQuant, KQuantizer


class Trainable(NamedTuple):
    """The trainable forms of a format.

    Attributes:
        free: where weights train and choose codes anew; the fixed form where no code can be chosen alone.
        fixed: where codes are fixed.
        method: whose training goes on where the method that found the codes has none of its own.
        fixed_bytes: memory of a weight whose code is fixed; None where it lies packed. Such a form asks for a weight's
            shape alone, any other for its values.
    """

    free: type[Quantizer]
    fixed: type[Quantizer]
    method: str
    fixed_bytes: float | None = None


TRAINABLE: dict[str, Trainable] = {
    "affine": Trainable(AffineQuantizer, FixedAffine, "apiq"),
    "binary_mos": Trainable(BinaryMosQuantizer, FixedBinaryMos, "binary-mos"),
    "codebook": Trainable(CodebookQuantizer, CodebookQuantizer, "claq", fixed_bytes=1.0),
    "dual_binary": Trainable(DualBinaryQuantizer, FixedDualBinary, "db-llm"),
    "k_quant": Trainable(KQuantizer, FixedKQuant, "efficientqat"),
    "trellis": Trainable(FixedTrellis, FixedTrellis, "trellis"),
}
"""By format."""
