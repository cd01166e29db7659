"""Samples that the model writes itself, so that calibration works with no data at all.

Data-free calibration as in LLM-QAT (Liu et al., 2023, https://arxiv.org/abs/2305.17888): texts go on from an opening by
plain sampling at temperature 1, so that they follow the model's own distribution. Samples hold many short texts side by
side: their number and variety count for more than their length.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ulbq.data.calibration import Calibration
from ulbq.data.openings import Openings
from ulbq.data.windows import leading_tokens
from ulbq.errors import NumericsError, UsageError
from ulbq.progress import Phase, Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT_LENGTH = 64
"""Tokens of one text of a calibration sample."""

_CACHE_MEMORY = 1 << 30  # bytes of keys and values that texts written side by side may take


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
    sample. Special tokens are written in answers to chats alone, whose template has them. All random numbers are drawn
    on the CPU: the same seed, model and device give the same samples.

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
    openings = Openings(tokenizer, model.config.get_text_config().vocab_size, limit=each // 2)
    drawn = openings.draw(samples * -(-room // each), generator)
    at_once = max(1, _CACHE_MEMORY // (len(leading) + each) // _cache_bytes(model))
    batches = [drawn[first : first + at_once] for first in range(0, len(drawn), at_once)]
    with (progress or Silent()).phase("Writing samples", len(batches) * (each - 1)) as phase:
        texts = torch.cat([_write(model, batch, leading, each, openings, generator, phase) for batch in batches])
    # In a random order: a sample has texts of all kinds.
    texts = texts[torch.randperm(len(texts), generator=generator)].reshape(samples, -1)[:, :room]
    return Calibration("self", torch.cat([torch.tensor(leading).long().expand(samples, -1), texts], dim=1), seed)


def _cache_bytes(model: "PreTrainedModel") -> int:
    """Keys and values of one token, in bytes, at most."""
    config = model.config.get_text_config()
    return int(2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize)


def _write(
    model: "PreTrainedModel",
    begun: Sequence[Sequence[int]],
    leading: Sequence[int],
    length: int,
    openings: Openings,
    generator: torch.Generator,
    phase: Phase,
) -> torch.Tensor:
    """Texts ``[batch, length]`` int64 that go on from openings, one forward pass a token for all of them."""
    device = model.device
    given = torch.full((len(begun), length), -1)
    for row, opening in zip(given, begun, strict=True):
        row[: len(opening)] = torch.tensor(opening)
    banned = openings.banned.repeat(len(begun), 1)
    chats = torch.tensor([len(opening) > 1 for opening in begun])
    banned[chats] = banned[chats].index_fill(1, torch.tensor(openings.answering).long(), False)
    given, banned = given.to(device), banned.to(device)
    tokens = given[:, :1]
    step = torch.cat([torch.tensor(leading, device=device).long().expand(len(tokens), -1), tokens], dim=1)
    cache = None
    while tokens.shape[1] < length:
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        if not logits.isfinite().all():
            raise NumericsError(
                "The model's logits are not finite.", hint="Try fp32: --precision of quantize, --dtype of eval."
            )
        step = _draw(logits.masked_fill_(banned, -torch.inf), generator)
        wanted = given[:, tokens.shape[1]].unsqueeze(1)
        step = torch.where(wanted < 0, step, wanted)
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
