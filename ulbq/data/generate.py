"""Samples that the model writes itself, so that calibration works with no data at all.

Data-free calibration as in LLM-QAT (Liu et al., 2023): every sample starts at a random token of the vocabulary and goes
on by plain sampling at temperature 1, so that the samples follow the model's own distribution.
"""

from typing import TYPE_CHECKING

import torch

from ulbq.data.calibration import Calibration
from ulbq.data.windows import leading_tokens
from ulbq.errors import NumericsError, UsageError
from ulbq.progress import Phase, Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BATCH = 16  # samples written side by side; the key-value cache of one batch is what this costs in memory


@torch.inference_mode()
def self_samples(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    samples: int,
    length: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Let a full-precision model write its own calibration samples.

    No special token is ever written (an end-of-text token would end the sample early), except the beginning-of-text
    token in front where the tokenizer puts one. The draw happens on the CPU with a generator of its own: the same seed,
    model and device give the same samples.

    Args:
        model: in eval mode, on any device, in any floating dtype.
        tokenizer: the model's.
        samples: number of samples.
        length: tokens a sample, a beginning-of-text token included.
        seed: of the draw.
        progress: told of every step.

    Raises:
        UsageError: fewer than one sample of two tokens.
        NumericsError: the model's logits are not finite.
    """
    if samples < 1 or length < 2:
        raise UsageError(
            "Calibration needs at least one sample of two tokens.", hint="See --samples, --sequence-length."
        )
    progress = progress or Silent()
    generator = torch.Generator().manual_seed(seed)
    leading = torch.tensor(leading_tokens(tokenizer), dtype=torch.int64)
    allowed = _text_tokens(tokenizer, model.config.get_text_config().vocab_size)
    starts = allowed[torch.randint(len(allowed), (samples, 1), generator=generator)]
    openings = torch.cat([leading.expand(samples, -1), starts], dim=1).split(_BATCH)
    with progress.phase("Writing samples", len(openings) * (length - openings[0].shape[1])) as phase:
        written = [_continue(model, opening, length, allowed, generator, phase) for opening in openings]
    return Calibration("self", torch.cat(written), seed)


def _text_tokens(tokenizer: "PreTrainedTokenizerBase", vocabulary: int) -> torch.Tensor:
    """Ids below ``vocabulary`` of every token that is not special, int64, ascending."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added.union(tokenizer.all_special_ids)
    return torch.tensor(
        [index for index in range(min(len(tokenizer), vocabulary)) if index not in special], dtype=torch.int64
    )


def _continue(
    model: "PreTrainedModel",
    opening: torch.Tensor,
    length: int,
    allowed: torch.Tensor,
    generator: torch.Generator,
    phase: Phase,
) -> torch.Tensor:
    """``[batch, few]`` tokens continued to ``[batch, length]``, one forward pass a token."""
    tokens, step, cache = opening, opening, None
    while tokens.shape[1] < length:
        output = model(input_ids=step.to(model.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float().cpu()[:, allowed]
        if not logits.isfinite().all():
            raise NumericsError(
                "The model's logits are not finite.", hint="Try fp32: --precision of quantize, --dtype of eval."
            )
        step = allowed[torch.multinomial(logits.softmax(-1), 1, generator=generator)]
        tokens = torch.cat([tokens, step], dim=1)
        phase.advance()
    return tokens
