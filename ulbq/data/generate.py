"""Samples that the model writes itself, so that calibration works with no data at all.

Data-free calibration as in LLM-QAT (Liu et al., 2023, https://arxiv.org/abs/2305.17888): texts go on from a random
token by sampling, and a sample holds several side by side. Some samples begin with a chat, where the model has a
template for one: it is shown where a user's message begins, and writes the message and the answer, as in Magpie (Xu et
al., 2024, https://arxiv.org/abs/2406.08464).
"""

from collections.abc import Sequence
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
    room: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Let a full-precision model write its own samples.

    A beginning-of-text token stands in front of each text where the tokenizer puts one, and once in front of each
    sample; no other special token is ever written, but in chats those of the template. Every second sample begins with
    a chat, where the tokenizer has a template that leaves half of a text. All random numbers are drawn on the CPU: the
    same seed, model and device give the same samples, but for the rounding of other sums where ``room`` lets more texts
    be written side by side.

    Args:
        model: in eval mode, on any device, in any floating dtype.
        tokenizer: the model's.
        samples: number of samples.
        length: tokens a sample, a beginning-of-text token included.
        seed: of the draw.
        text_length: tokens of each text in a sample, of a chat too, the last one cut; None for one text, which fills
            it, and no chats.
        room: bytes that texts written side by side may take, where that is more than the usual half GiB: a model whose
            weights are read for every token wants few turns.
        progress: told of every step.

    Raises:
        UsageError: fewer than one sample of two tokens.
        NumericsError: the model's logits are not finite.
    """
    if samples < 1 or length < 2:
        raise UsageError(
            "Calibration needs at least one sample of two tokens.", hint="See `samples`, `sequence_length`."
        )
    generator = torch.Generator().manual_seed(seed)
    leading = torch.tensor(leading_tokens(tokenizer), dtype=torch.int64)
    whole = length - len(leading)
    each = min(whole, text_length or whole)
    vocabulary = model.config.get_text_config().vocab_size
    allowed = text_tokens(tokenizer, vocabulary)
    chat = _chat(tokenizer, leading, allowed, vocabulary, each) if text_length else None
    begun = range(0, samples, _CHATS) if chat else range(0)
    count = -(-whole // each)
    starts = allowed[torch.randint(len(allowed), (samples * count - len(begun), 1), generator=generator)]
    writer = _Writer(model, leading, each, allowed, generator)
    at_once = _at_once(model.config, model.dtype, len(leading) + each)
    parts = max(1, min(len(starts), -(-samples * count // at_once)))
    shares = zip(starts.tensor_split(parts), torch.arange(len(begun)).tensor_split(parts), strict=True)
    turns = [writer.turn(some, chat, len(asked)) for some, asked in shares]
    together = max(1, room // _MEMORY)
    texts, chats = writer.write_all(turns, chat, together, progress or Silent())
    return Calibration("self", _rows(leading, texts, chats, begun, samples, length), seed)


def _rows(
    leading: torch.Tensor,
    texts: Sequence[torch.Tensor],
    chats: Sequence[torch.Tensor],
    begun: range,
    samples: int,
    length: int,
) -> torch.Tensor:
    """Samples ``[samples, length]`` of texts in their order; those whose number is in ``begun`` begin with a chat."""
    count = (len(texts) + len(chats)) // samples
    more, asked_for = iter(texts), iter(chats)
    rows = [
        [next(asked_for if index in begun and not place else more) for place in range(count)]
        for index in range(samples)
    ]
    return torch.stack([torch.cat([leading, *row])[:length] for row in rows])


class _Chat(NamedTuple):
    """How a chat begins, int64 ``[n]``, and what may stand in it beside text: ids of special tokens, int64."""

    opening: torch.Tensor
    special: torch.Tensor


def _chat(
    tokenizer: "PreTrainedTokenizerBase", leading: torch.Tensor, allowed: torch.Tensor, vocabulary: int, length: int
) -> _Chat | None:
    """A chat of ``length`` tokens; None where there is no template, or none that leaves half of them."""
    before, between = question_frame(tokenizer)
    if len(leading) and before[:1] == leading.tolist():
        before = before[1:]
    if not 0 < len(before) <= length // 2 or max(before + between) >= vocabulary:
        return None
    special = sorted(set(between).difference(allowed.tolist()))
    return _Chat(torch.tensor(before), torch.tensor(special, dtype=torch.int64))


class _Turn(NamedTuple):
    """Texts that are written side by side.

    Attributes:
        starts: their first tokens, int64 ``[texts, 1]``.
        before: uniform numbers, float32 ``[steps, texts]``, of tokens that texts write before the chats begin.
        after: ``[steps, texts + chats]``, of those behind.
    """

    starts: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor

    @classmethod
    def joined(cls, turns: Sequence["_Turn"]) -> "_Turn":
        """Several as one, its chats behind all texts."""
        texts = [turn.after[:, : len(turn.starts)] for turn in turns]
        chats = [turn.after[:, len(turn.starts) :] for turn in turns]
        return cls(
            torch.cat([turn.starts for turn in turns]),
            torch.cat([turn.before for turn in turns], 1),
            torch.cat([*texts, *chats], 1),
        )


def writing_memory(config: "PreTrainedConfig", dtype: torch.dtype, samples: int, length: int, room: int = 0) -> int:
    """Bytes that :func:`self_samples` takes beside the model, for samples of short texts."""
    texts, tokens, most = _texts(config, dtype, samples, length, room)
    return min(texts, most) * _text_bytes(config, dtype, tokens)


def writing_passes(config: "PreTrainedConfig", dtype: torch.dtype, samples: int, length: int, room: int) -> int:
    """How often the model runs to write them."""
    texts, tokens, most = _texts(config, dtype, samples, length, room)
    return -(-texts // most) * (tokens - 1)


def _texts(
    config: "PreTrainedConfig", dtype: torch.dtype, samples: int, length: int, room: int
) -> tuple[int, int, int]:
    """How many texts of how many tokens samples hold, and how many are written side by side."""
    tokens = min(length, TEXT_LENGTH)
    most = _at_once(config, dtype, tokens) * max(1, room // _MEMORY)
    return samples * -(-length // tokens), tokens, most


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


class _Writer:
    """Lets a model write texts of one length, one forward pass a token for all of them.

    Args:
        model: in eval mode.
        leading: what stands in front of every text, int64 ``[0]`` or ``[1]``.
        length: tokens of a text, without that.
        allowed: tokens that may be written, int64.
        generator: of the draws.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        leading: torch.Tensor,
        length: int,
        allowed: torch.Tensor,
        generator: torch.Generator,
    ) -> None:
        self._model = model
        self._leading = leading
        self._length = length
        self._generator = generator
        self._banned = torch.ones(model.config.get_text_config().vocab_size, dtype=torch.bool)
        self._banned[allowed] = False
        self._last = last_logits(model)

    def turn(self, starts: torch.Tensor, chat: _Chat | None, chats: int) -> _Turn:
        """Texts that go on from ``starts`` ``[n, 1]``, and so many chats, with the random numbers of every token."""
        begun = 1 if chat is None else len(chat.opening)

        def draw(steps: int, count: int) -> torch.Tensor:
            each = [torch.rand(count, generator=self._generator) for _ in range(steps)]
            return torch.stack(each) if each else torch.empty(0, count)

        return _Turn(starts, draw(begun - 1, len(starts)), draw(self._length - begun, len(starts) + chats))

    def write_all(
        self, turns: Sequence[_Turn], chat: _Chat | None, together: int, progress: Progress
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The texts of turns, and their chats, so many turns ``together``."""
        texts, chats = list[torch.Tensor](), list[torch.Tensor]()
        steps = -(-len(turns) // together) * (self._length - 1)
        with batched_attention(self._model.device), progress.phase("Writing samples", steps) as phase:
            for first in range(0, len(turns), together):
                turn = _Turn.joined(turns[first : first + together])
                written = self.write(turn, chat, phase)
                texts.extend(written[: len(turn.starts)])
                chats.extend(written[len(turn.starts) :])
        return texts, chats

    def write(self, turn: _Turn, chat: _Chat | None, phase: Phase) -> torch.Tensor:
        """The texts of a turn, and its chats behind them: int64 ``[texts + chats, length]``."""
        no_text, starts = self._banned.nonzero().squeeze(1), turn.starts
        if chat is None:
            return self._go_on(starts, turn.after, [(slice(None), no_text)], phase)
        # Texts first come to where the chats begin: all of them then are as long, and go on side by side.
        opening = chat.opening.expand(turn.after.shape[1] - len(starts), -1)
        if len(starts):
            begun = self._go_on(starts, turn.before, [(slice(None), no_text)], phase)
        else:
            begun = opening[:0]
            phase.advance(opening.shape[1] - 1)
        no_chat = self._banned.index_fill(0, chat.special, False).nonzero().squeeze(1)
        never = [(slice(0, len(starts)), no_text), (slice(len(starts), None), no_chat)]
        return self._go_on(torch.cat([begun, opening]), turn.after, never, phase)

    def _go_on(
        self, tokens: torch.Tensor, drawn: torch.Tensor, never: list[tuple[slice, torch.Tensor]], phase: Phase
    ) -> torch.Tensor:
        """Texts ``[batch, n]`` continued by a token for each row of ``drawn [steps, batch]``.

        ``never`` says which rows may not write what.
        """
        model, cache, length = self._model, None, tokens.shape[1] + len(drawn)
        never = [(rows, banned.to(model.device)) for rows, banned in never]
        tokens = tokens.to(model.device)
        step = torch.cat([self._leading.to(model.device).expand(len(tokens), -1), tokens], dim=1)
        for at in drawn:
            output = model(input_ids=step, past_key_values=cache, use_cache=True, **self._last)
            if cache is None:
                cache = output.past_key_values
                take_room(cache, len(self._leading) + length)
            logits = output.logits[:, -1].float()
            # The ends tell of all: one that is not a number is both.
            if not torch.stack(logits.aminmax()).isfinite().all():
                raise NumericsError(
                    "The model's logits are not finite.", hint="Try fp32: `precision` of quantize, `dtype` of eval."
                )
            for rows, banned in never:
                logits[rows].index_fill_(1, banned, -torch.inf)
            step = _draw(logits, at.unsqueeze(1))
            tokens = torch.cat([tokens, step], dim=1)
            phase.advance()
        return tokens.cpu()


def _draw(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One token of each row ``[batch, vocabulary]``, int64 ``[batch, 1]``.

    It is where its number of ``uniform [batch, 1]`` cuts the cumulated probabilities; a multinomial draw would want an
    exponential for every token of the vocabulary.
    """
    cumulated = logits.softmax(-1).cumsum_(-1)
    total = cumulated[:, -1:]
    at = uniform.to(logits.device) * total
    # Rounded up to the total it would lie behind every token, the impossible ones included.
    at = torch.minimum(at, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, at, right=True)
