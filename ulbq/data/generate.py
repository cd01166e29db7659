"""Samples that the model writes itself, so that calibration works with no data at all.

Data-free calibration as in LLM-QAT (Liu et al., 2023, https://arxiv.org/abs/2305.17888): texts go on from a random
token by plain sampling at temperature 1, so that they follow the model's own distribution. Samples hold many short
texts side by side: their number and variety count for more than their length.
"""

from typing import TYPE_CHECKING

import torch

from ulbq.data.calibration import Calibration
from ulbq.data.windows import leading_tokens
from ulbq.errors import NumericsError, UsageError
from ulbq.models.config import cache_bytes
from ulbq.models.decoding import batched_attention
from ulbq.progress import Phase, Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TEXT_LENGTH = 64
"""Tokens of one text of a calibration sample."""

_MEMORY = 512 << 20  # bytes that texts written side by side may take, the model not counted
_LOGIT_BYTES = 2 + 4 * 4  # of each token that may follow: its logit, and float32 copies on the way to a draw


@torch.inference_mode()
def self_samples(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    samples: int,
    length: int,
    seed: int = 0,
    text_length: int | None = TEXT_LENGTH,
    progress: Progress | None = None,
) -> Calibration:
    """Let a full-precision model write its own samples.

    A beginning-of-text token stands in front of each text where the tokenizer puts one, and once in front of each
    sample; no other special token is ever written. All random numbers are drawn on the CPU: the same seed, model and
    device give the same samples.

    Args:
        model: in eval mode, on any device, in any floating dtype.
        tokenizer: the model's.
        samples: number of samples.
        length: tokens a sample, a beginning-of-text token included.
        seed: of the draw.
        text_length: tokens of each text in a sample, the last one cut; None for one text, which fills it.
        progress: told of every step.

    Raises:
        UsageError: fewer than one sample of two tokens.
        NumericsError: the model's logits are not finite.
    """
    if samples < 1 or length < 2:
        raise UsageError(
            "Calibration needs at least one sample of two tokens.", hint="See --samples, --sequence-length."
        )
    generator = torch.Generator().manual_seed(seed)
    leading = leading_tokens(tokenizer)
    room = length - len(leading)
    each = room if text_length is None else min(room, text_length)
    allowed = text_tokens(tokenizer, model.config.get_text_config().vocab_size)
    starts = allowed[torch.randint(len(allowed), (samples * -(-room // each),), generator=generator)]
    batches = starts.split(_at_once(model.config, model.dtype, len(leading) + each))
    writing = (progress or Silent()).phase("Writing samples", len(batches) * (each - 1))
    with batched_attention(model.device), writing as phase:
        texts = torch.cat([_write(model, batch, leading, each, allowed, generator, phase) for batch in batches])
    texts = texts.reshape(samples, -1)[:, :room]
    return Calibration("self", torch.cat([torch.tensor(leading).long().expand(samples, -1), texts], dim=1), seed)


def writing_memory(config: "PreTrainedConfig", dtype: torch.dtype, samples: int, length: int) -> int:
    """Bytes that :func:`self_samples` takes beside the model, for samples of short texts."""
    tokens = min(length, TEXT_LENGTH)
    texts = samples * -(-length // tokens)
    return min(texts, _at_once(config, dtype, tokens)) * _text_bytes(config, dtype, tokens)


def _at_once(config: "PreTrainedConfig", dtype: torch.dtype, tokens: int) -> int:
    """Texts of so many tokens that are written side by side."""
    return max(1, _MEMORY // _text_bytes(config, dtype, tokens))


def _text_bytes(config: "PreTrainedConfig", dtype: torch.dtype, tokens: int) -> int:
    # Keys and values twice over: a growing cache is copied.
    logits = int(config.get_text_config().vocab_size) * _LOGIT_BYTES
    return 2 * cache_bytes(config, dtype.itemsize) * tokens + logits


def text_tokens(tokenizer: "PreTrainedTokenizerBase", vocabulary: int) -> torch.Tensor:
    """Ids below ``vocabulary`` of every token that is not special, int64, ascending."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added.union(tokenizer.all_special_ids)
    return torch.tensor(
        [index for index in range(min(len(tokenizer), vocabulary)) if index not in special], dtype=torch.int64
    )


def _write(
    model: "PreTrainedModel",
    starts: torch.Tensor,
    leading: list[int],
    length: int,
    allowed: torch.Tensor,
    generator: torch.Generator,
    phase: Phase,
) -> torch.Tensor:
    """Texts ``[batch, length]`` int64 that go on from their first tokens, one forward pass a token for all of them."""
    tokens = starts.unsqueeze(1).to(model.device)
    step = torch.cat([torch.tensor(leading, device=model.device).long().expand(len(tokens), -1), tokens], dim=1)
    banned = torch.ones(model.config.get_text_config().vocab_size, dtype=torch.bool)
    banned[allowed] = False
    banned, cache = banned.to(model.device), None
    while tokens.shape[1] < length:
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        if not logits.isfinite().all():
            raise NumericsError(
                "The model's logits are not finite.", hint="Try fp32: --precision of quantize, --dtype of eval."
            )
        step = _draw(logits.masked_fill_(banned, -torch.inf), generator)
        tokens = torch.cat([tokens, step], dim=1)
        phase.advance()
    return tokens.cpu()


def _draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token of each row ``[batch, vocabulary]``, int64 ``[batch, 1]``.

    It is where a uniform number cuts the cumulated probabilities; a multinomial draw would want an exponential for
    every token of the vocabulary.
    """
    cumulated = logits.softmax(-1).cumsum(-1)
    total = cumulated[:, -1:]
    at = torch.rand(len(logits), 1, generator=generator).to(logits.device) * total
    # Rounded up to the total it would lie behind every token, the impossible ones included.
    at = torch.minimum(at, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, at, right=True)
