"""Published recipes, each composed of a quantizer or solver and a way to train."""

from ulbq.methods.apiq import ApiQ
from ulbq.methods.base import Method
from ulbq.methods.binary_mos import BinaryMos
from ulbq.methods.claq import Claq
from ulbq.methods.db_llm import DbLlm
from ulbq.methods.efficientqat import EfficientQat
from ulbq.methods.gptq import Gptq
from ulbq.methods.rtn import Rtn
from ulbq.methods.trellis import TrellisMethod
from ulbq.methods.ulb_sapr import UlbSapr

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (DbLlm, EfficientQat, ApiQ, UlbSapr, BinaryMos, Claq, TrellisMethod, Gptq, Rtn)
}
"""Every method by the name that ``--method`` takes."""

__all__ = ["METHODS", "ApiQ", "BinaryMos", "Claq", "DbLlm", "EfficientQat", "Gptq", "Rtn", "TrellisMethod", "UlbSapr"]
