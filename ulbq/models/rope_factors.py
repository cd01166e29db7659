"""The rotary frequencies of newer Llamas, which a GGUF file holds as factors, and a configuration as four numbers."""

import math
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROPE_FACTORS = "rope_freqs.weight"
"""Name in a GGUF file of what the rotary frequencies are divided by, float32 ``[rotary width / 2]``."""

_TYPICAL = (8192.0, 1.0, 4.0)  # original context and the bounds of all Llamas from 3.1 on
_TOLERANCE = 1e-3


def scale_frequencies(config: PreTrainedConfig, factors: torch.Tensor) -> bool:
    """Set the rotary embedding of ``config`` so that its frequencies are divided by some factors.

    High frequencies stay, low ones are divided by the largest factor, and those between by a mixture that is linear in
    the frequency: Llama 3.1's rule. The bound of the low frequencies counts as 1, since only its ratios to the others
    mean anything.

    Args:
        config: of a model whose rotary frequencies are not scaled; unchanged where the answer is no.
        factors: float32 ``[rotary width / 2]``.

    Returns:
        Whether transformers then divides by these factors.
    """
    if torch.all(factors == 1):
        return True
    before: dict[str, float] = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in before or not bool(factors.isfinite().all()) or float(factors.min()) <= 0:
        return False
    width = 2 * len(factors)
    plain = 1.0 / before["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    if not bool(plain.isfinite().all()):
        return False
    most = float(factors.max())
    for context, low, high in (_TYPICAL, *_fitted(plain, factors.double(), most)):
        config.rope_parameters = before | {
            "rope_type": "llama3",
            "factor": most,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": round(context),
        }
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        if len(scaled) == len(plain) and torch.allclose(plain / scaled, factors.double(), rtol=_TOLERANCE):
            return True
    config.rope_parameters = before
    return False


def _fitted(plain: torch.Tensor, factors: torch.Tensor, most: float) -> list[tuple[float, float, float]]:
    """Context and bounds that mixtures between two frequencies at least speak of; none where there are fewer."""
    kept = (1 / factors - 1 / most) / (1 - 1 / most)  # share of the frequency that is not divided
    between = (kept > _TOLERANCE) & (kept < 1 - _TOLERANCE)
    if int(between.sum()) < 2:
        return []
    turns = plain[between] / (2 * math.pi)
    slope, start = (
        torch.linalg.lstsq(torch.stack([turns, torch.ones_like(turns)], dim=1), kept[between].unsqueeze(1))
        .solution.flatten()
        .tolist()
    )
    # kept = (context × turns - low) / (high - low), with a low of 1.
    if not (start < 0 < slope) or not math.isfinite(slope / start):
        return []
    return [(-slope / start, 1.0, 1 - 1 / start)]


def rope_type(config: PreTrainedConfig) -> str:
    """Transformers' name of the rotary embedding."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return str(parameters.get("rope_type", "default"))
