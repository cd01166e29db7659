"""Published recipes, each composed of a quantizer or solver and a way to train."""

from ulbq.methods.db_llm import DbLlm
from ulbq.methods.rtn import Rtn

METHODS: dict[str, type[Rtn] | type[DbLlm]] = {Rtn.name: Rtn, DbLlm.name: DbLlm}
"""Every method by the name that ``--method`` takes."""

__all__ = ["METHODS", "DbLlm", "Rtn"]
