"""Samples that the model writes itself, so that calibration works with no data at all.

Data-free calibration as in LLM-QAT (Liu et al., 2023, https://arxiv.org/abs/2305.17888): texts go on from a random
token by sampling, a little colder than the model's own distribution. Samples hold many short texts side by side: their
number and variety count for more than their length. Some of them begin with a chat, where the model has a template for
one: it is shown where a user's message begins, and writes the message and the answer, as in Magpie (Xu et al., 2024,
https://arxiv.org/abs/2406.08464).
"""

from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch

from ulbq.data.calibration import Calibration
from ulbq.data.prompts import question_frame
from ulbq.data.windows import leading_tokens
from ulbq.errors import NumericsError, UsageError
from ulbq.models.config import cache_bytes
from ulbq.models.decoding import batched_attention, last_logits, take_room
from ulbq.progress import Phase, Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TEXT_LENGTH = 128
"""Tokens of one text of a calibration sample."""

_CHATS = 2  # one sample of so many begins with a chat
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
    sample; no other special token is ever written, but in chats those of the template. Every second sample begins with
    a chat, where the tokenizer has a template that leaves half of the room. All random numbers are drawn on the CPU:
    the same seed, model and device give the same samples.

    Args:
        model: in eval mode, on any device, in any floating dtype.
        tokenizer: the model's.
        samples: number of samples.
        length: tokens a sample, a beginning-of-text token included.
        seed: of the draw.
        text_length: tokens of each text in a sample, the last one cut; None for one text, which fills it, and no chats.
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
    leading = torch.tensor(leading_tokens(tokenizer), dtype=torch.int64)
    room = length - len(leading)
    vocabulary = model.config.get_text_config().vocab_size
    allowed = text_tokens(tokenizer, vocabulary)
    chat = _chat(tokenizer, leading, allowed, vocabulary, room, text_length) if text_length else None
    begun = range(0, samples, _CHATS) if chat else range(0)
    each = min(room, text_length or room)
    counts = [-(-(room - (chat.length if chat and index in begun else 0)) // each) for index in range(samples)]
    starts = allowed[torch.randint(len(allowed), (sum(counts), 1), generator=generator)]
    works = [_Begun(starts, each, allowed)]
    if chat:
        works.append(chat._replace(openings=chat.openings.expand(len(begun), -1)))
    batches = [
        work._replace(openings=openings)
        for work in works
        for openings in work.openings.split(_at_once(model.config, model.dtype, len(leading) + work.length))
    ]
    writing = (progress or Silent()).phase("Writing samples", sum(batch.missing for batch in batches))
    with batched_attention(model.device), writing as phase:
        written = [text for batch in batches for text in _write(model, batch, leading, generator, phase)]
    texts, chats = iter(written[: len(starts)]), iter(written[len(starts) :])
    rows = [
        torch.cat([leading, *islice(chats, int(index in begun)), *islice(texts, count)])[:length]
        for index, count in enumerate(counts)
    ]
    return Calibration("self", torch.stack(rows), seed)


class _Begun(NamedTuple):
    """Texts ``[batch, length]`` that go on from openings ``[batch, n]`` with the tokens of ``allowed``, all int64."""

    openings: torch.Tensor
    length: int
    allowed: torch.Tensor

    @property
    def missing(self) -> int:
        """Tokens that each of them lacks."""
        return self.length - self.openings.shape[1]


def _chat(
    tokenizer: "PreTrainedTokenizerBase",
    leading: torch.Tensor,
    allowed: torch.Tensor,
    vocabulary: int,
    room: int,
    text_length: int,
) -> _Begun | None:
    """A chat whose question and answer are as long as a text.

    None where there is no template, or none that leaves them half of the room.
    """
    before, between = question_frame(tokenizer)
    if len(leading) and before[:1] == leading.tolist():
        before = before[1:]
    if not 0 < len(before) <= room // 2 or max(before + between) >= vocabulary:
        return None
    special = sorted(set(between).difference(allowed.tolist()))
    return _Begun(
        torch.tensor([before]),
        min(room, len(before) + text_length),
        torch.cat([allowed, torch.tensor(special, dtype=torch.int64)]),
    )


def writing_memory(config: "PreTrainedConfig", dtype: torch.dtype, samples: int, length: int) -> int:
    """Bytes that :func:`self_samples` takes beside the model, for samples of short texts."""
    tokens = min(length, TEXT_LENGTH)
    texts = samples * -(-length // tokens)
    return min(texts, _at_once(config, dtype, tokens)) * _text_bytes(config, dtype, tokens)


def _at_once(config: "PreTrainedConfig", dtype: torch.dtype, tokens: int) -> int:
    """Texts of so many tokens that are written side by side."""
    return max(1, _MEMORY // _text_bytes(config, dtype, tokens))


def _text_bytes(config: "PreTrainedConfig", dtype: torch.dtype, tokens: int) -> int:
    logits = int(config.get_text_config().vocab_size) * _LOGIT_BYTES
    return cache_bytes(config, dtype.itemsize) * tokens + logits


def text_tokens(tokenizer: "PreTrainedTokenizerBase", vocabulary: int) -> torch.Tensor:
    """Ids below ``vocabulary`` of every token that is not special, int64, ascending."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added.union(tokenizer.all_special_ids)
    return torch.tensor(
        [index for index in range(min(len(tokenizer), vocabulary)) if index not in special], dtype=torch.int64
    )


def _write(
    model: "PreTrainedModel",
    begun: _Begun,
    leading: torch.Tensor,
    generator: torch.Generator,
    phase: Phase,
) -> torch.Tensor:
    """The whole texts, int64 ``[batch, length]``, one forward pass a token for all of them."""
    tokens = begun.openings.to(model.device)
    step = torch.cat([leading.to(model.device).expand(len(tokens), -1), tokens], dim=1)
    banned = torch.ones(model.config.get_text_config().vocab_size, dtype=torch.bool)
    banned[begun.allowed] = False
    never, cache = banned.nonzero().squeeze(1).to(model.device), None
    last = last_logits(model)
    while tokens.shape[1] < begun.length:
        output = model(input_ids=step, past_key_values=cache, use_cache=True, **last)
        if cache is None:
            cache = output.past_key_values
            take_room(cache, len(leading) + begun.length)
        logits = output.logits[:, -1].float()
        # The ends tell of all: one that is not a number is both.
        if not torch.stack(logits.aminmax()).isfinite().all():
            raise NumericsError(
                "The model's logits are not finite.", hint="Try fp32: --precision of quantize, --dtype of eval."
            )
        step = _draw(logits.index_fill_(1, never, -torch.inf), generator)
        tokens = torch.cat([tokens, step], dim=1)
        phase.advance()
    return tokens.cpu()


def _draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token of each row ``[batch, vocabulary]``, int64 ``[batch, 1]``.

    It is where a uniform number cuts the cumulated probabilities; a multinomial draw would want an exponential for
    every token of the vocabulary.
    """
    cumulated = logits.softmax(-1).cumsum_(-1)
    total = cumulated[:, -1:]
    at = torch.rand(len(logits), 1, generator=generator).to(logits.device) * total
    # Rounded up to the total it would lie behind every token, the impossible ones included.
    at = torch.minimum(at, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, at, right=True)
