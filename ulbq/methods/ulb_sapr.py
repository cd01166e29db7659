"""ULB-SAPR (Cao & Aref, 2025, https://arxiv.org/abs/2504.13932): ApiQ that holds salient weights in place.

To the block's output loss comes ``λ Σ S (W_eff − W)²`` over the quantized weights, S a saliency (the empirical Fisher
information of the full-precision model unless told otherwise), in stages: ``wpt`` minimizes the penalty alone,
``mixed`` both, ``opt`` the output loss alone. λ is relative here (:mod:`ulbq.training.penalty`): it has no unit and
does not grow with the model.
"""

from typing import ClassVar

from ulbq.config.groups import MethodOptions
from ulbq.config.methods import UlbSaprOptions
from ulbq.methods.apiq import ApiQ


class UlbSapr(ApiQ):
    """ApiQ with saliency-weighted weight preservation."""

    name: ClassVar[str] = "ulb-sapr"
    Options: ClassVar[type[MethodOptions]] = UlbSaprOptions
