"""A causal language model as benchmark tasks use it: likelihoods of given answers, and answers that it writes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ulbq import distributed
from ulbq.blockwise.streamed import StreamedModel, whole_model
from ulbq.errors import InputError, ResourceError, UsageError
from ulbq.evaluation.text import sequences_per_batch, tokens_per_batch
from ulbq.models.decoding import keeps_logits, last_logits
from ulbq.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ulbq.blockwise.streamed import AnyModel, PassedBlocks

T = TypeVar("T")

Row = tuple[int, ...]
Score = tuple[float, bool]
"""Log-likelihood of an answer in nats, and whether it is what greedy decoding would write."""

_WAVE = 16 << 30  # bytes of hidden states that pass the blocks of a streamed model together
_DEFAULT_LENGTH = 2048  # tokens, where the configuration names no longest input


class LanguageModel:
    """Scores and writes text, in batches that fit. Several processes share the sequences and learn all answers.

    Args:
        model: in eval mode, on its device.
        tokenizer: the model's own.
        batch_size: sequences a batch; None: as many as the device's memory takes.
        progress: told about every answer.
        label: what the progress calls the model.

    Attributes:
        max_length: longest input in tokens; what is longer loses its beginning.
        end_token: the end-of-text token.
        first_token: what stands before a text that has nothing before it.

    Raises:
        InputError: the tokenizer names no end-of-text token.
    """

    def __init__(
        self,
        model: "AnyModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        batch_size: int | None = None,
        progress: Progress | None = None,
        label: str = "the model",
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                "The tokenizer names no end-of-text token, which tasks need.", hint="Give it an eos_token."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.progress = progress or Silent()
        self.label = label
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length: int = longest or _DEFAULT_LENGTH
        self.end_token = int(tokenizer.eos_token_id)
        self.first_token = self.end_token if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)

    def encode(self, text: str, *, special: bool | None = None) -> list[int]:
        """Token ids; ``special`` None adds the tokenizer's special tokens unless the text starts with them already."""
        if special is None:
            special = not text.startswith(self.decode(self.first_token))
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special)
        return ids

    def decode(self, token: int) -> str:
        """The text of one token."""
        return str(self.tokenizer.decode([token]))

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """Score answers given what stands before them.

        Answers that differ in their last token only are read off the same logits: a question whose four answers are one
        token each costs one sequence. Sequences come longest first, so that a batch too large shows at once.

        Args:
            pairs: tokens before the answer, at least one, and tokens of the answer, at least one.

        Raises:
            ResourceError: not even one sequence fits into the device's memory.
        """
        askers: dict[Row, list[int]] = {}
        for number, (before, answer) in enumerate(pairs):
            askers.setdefault(tuple((before + answer)[-(self.max_length + 1) : -1]), []).append(number)
        answers = {row: [pairs[number][1][-len(row) :] for number in numbers] for row, numbers in askers.items()}
        scores: dict[int, Score] = {}
        budget = tokens_per_batch(self.model)
        own = distributed.own(sorted(askers, key=len, reverse=True))
        with self.progress.phase(f"Answers scored by {self.label}", sum(len(askers[row]) for row in own)) as phase:
            for wave, passed in self._waves(own, budget):
                start = 0
                for batch in _by_budget(wave, budget, self.batch_size):
                    for row, found in zip(batch, self._score(batch, answers, passed, start), strict=True):
                        scores |= zip(askers[row], found, strict=True)
                        phase.advance(len(found))
                    start += len(batch)
        return _in_order(scores)

    def _waves(self, rows: Sequence[Row], budget: int) -> Iterator[tuple[Sequence[Row], "PassedBlocks | None"]]:
        """Rows, longest first, by what passes the blocks of a streamed model together; all rows of one in memory."""
        model = self.model
        if not isinstance(model, StreamedModel):
            yield rows, None
            return
        while rows:
            longest = len(rows[0])
            most = max(1, _WAVE // (model.config.get_text_config().hidden_size * model.dtype.itemsize * longest))
            # Each passes as if it were as long as the longest: not more than twice the work.
            wave = [row for row in rows[:most] if 2 * len(row) >= longest]
            size = self.batch_size or max(1, budget // longest)
            yield wave, model.pass_blocks(_padded(wave), size)
            rows = rows[len(wave) :]

    def _score(
        self, batch: Sequence[Row], answers: Mapping[Row, list[list[int]]], passed: "PassedBlocks | None", start: int
    ) -> list[list[Score]]:
        """Scores of each row's answers; a batch that does not fit into the device's memory is halved.

        Args:
            batch: the rows.
            answers: of all rows.
            passed: the rows of a wave behind the blocks of a streamed model; None of one in memory.
            start: number of the first row in its wave.
        """
        # Padding on the right needs no mask: a causal model lets no token see what follows it.
        padded = _padded(batch)
        first = min(len(row) - max(map(len, answers[row])) for row in batch)
        try:
            if passed is None:
                logits = self._logits(padded.to(self.model.device), first)
            else:
                logits = passed.logits(slice(start, start + len(batch)), slice(first, padded.shape[1]))
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise ResourceError(
                    f"The device has no memory for a prompt of {len(batch[0])} tokens.", hint="Try `device=cpu`."
                ) from error
        else:
            return [
                [_answer_score(row_logits[: len(row) - first], answer) for answer in answers[row]]
                for row, row_logits in zip(batch, logits, strict=True)
            ]
        # Only here, behind the handler: while the error lives, so do the activations of the frames that it passed.
        half = len(batch) // 2
        before = self._score(batch[:half], answers, passed, start)
        return before + self._score(batch[half:], answers, passed, start + half)

    def _logits(self, tokens: torch.Tensor, first: int) -> torch.Tensor:
        """Logits ``[b, t - first, vocabulary]`` from position ``first`` on; where the model can, no others are made."""
        model = whole_model(self.model)
        if not keeps_logits(model):
            every: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
            return every[:, first:]
        kept = torch.arange(first, tokens.shape[1], device=tokens.device)
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False, logits_to_keep=kept).logits
        return logits

    def write(
        self, prompts: Sequence[str], *, stops: Sequence[str], new_tokens: int, sampling: Mapping[str, Any]
    ) -> list[str]:
        """Continue prompts: :meth:`write_after` the tokens of texts."""
        rows = [self.encode(prompt) for prompt in prompts]
        return self.write_after(rows, stops=stops, new_tokens=new_tokens, sampling=sampling)

    @torch.inference_mode()
    def write_after(
        self, rows: Sequence[list[int]], *, stops: Sequence[str], new_tokens: int, sampling: Mapping[str, Any]
    ) -> list[str]:
        """Continue prompts, batches of similar length side by side, the longest first.

        A batch's prompts are filled up on the left, out of sight of the model, and no answer sees its neighbours. But
        sums of another shape round otherwise: in half precision, and hardly ever in float32, another batch size may
        take another token where two are almost equally likely.

        Args:
            rows: tokens, at least one each; a prompt too long to leave room for its answer loses its beginning.
            stops: an answer ends where it first holds one of these, but may still show what follows.
            new_tokens: longest answer in tokens.
            sampling: options of transformers' ``generate``; empty: greedy.

        Raises:
            UsageError: the model's longest input has no room for the answer.
            ResourceError: the device has no memory for a single answer.
        """
        room = self.max_length - new_tokens
        if room < 1:
            raise UsageError(f"An answer may take {new_tokens} tokens; the model holds {self.max_length} in all.")
        order = distributed.own(sorted(range(len(rows)), key=lambda number: -len(rows[number])))
        texts: dict[int, str] = {}
        with self.progress.phase(f"Answers written by {self.label}", len(order)) as phase:
            start = 0
            while start < len(order):
                longest = min(len(rows[order[start]]), room) + new_tokens
                numbers = order[start : start + (self.batch_size or sequences_per_batch(self.model, longest))]
                written = self._write([rows[number][-room:] for number in numbers], stops, new_tokens, sampling)
                texts |= zip(numbers, written, strict=True)
                start += len(numbers)
                phase.advance(len(numbers))
        return _in_order(texts)

    def _write(
        self, rows: list[list[int]], stops: Sequence[str], new_tokens: int, sampling: Mapping[str, Any]
    ) -> list[str]:
        """Answers to one batch; one that does not fit into the device's memory is halved."""
        model, length, device = whole_model(self.model), max(map(len, rows)), self.model.device
        pad = self.end_token if self.tokenizer.pad_token_id is None else int(self.tokenizer.pad_token_id)
        try:
            generated: torch.Tensor = model.generate(  # type: ignore[operator]
                input_ids=torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device),
                attention_mask=torch.tensor(
                    [[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device
                ),
                max_new_tokens=new_tokens,
                pad_token_id=pad,
                eos_token_id=ends_of(model, self.end_token),
                stopping_criteria=StoppingCriteriaList([_StopAt(stops, length, self.tokenizer)]),
                **{"do_sample": False, **sampling},
                **last_logits(model),
            )
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise ResourceError(
                    f"The device has no memory to answer a prompt of {length} tokens.", hint="Try `device=cpu`."
                ) from error
        else:
            return [str(text) for text in self.tokenizer.batch_decode(generated[:, length:], skip_special_tokens=True)]
        # Behind the handler, as in _score: the error holds keys and values.
        half = len(rows) // 2
        return [text for part in (rows[:half], rows[half:]) for text in self._write(part, stops, new_tokens, sampling)]


class _StopAt(StoppingCriteria):
    """Ends each sequence once its new text holds one of the stop sequences."""

    def __init__(self, stops: Sequence[str], prompt: int, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.stops = [stop for stop in stops if stop]
        self.prompt = prompt
        self.tokenizer = tokenizer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        written = self.tokenizer.batch_decode(input_ids[:, self.prompt :])
        return torch.tensor([any(stop in text for stop in self.stops) for text in written], device=input_ids.device)


def ends_of(model: "PreTrainedModel", end_token: int) -> list[int]:
    """Tokens that end an answer: the tokenizer's end of text, which training closes with, and the model's own ends."""
    settings = model.generation_config
    own = None if settings is None else settings.eos_token_id
    named = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([end_token, *map(int, named)]))


def _in_order(found: Mapping[int, T]) -> list[T]:
    """What all processes found by number, as a list."""
    everything = {number: value for share in distributed.gather(found) for number, value in share.items()}
    return [everything[number] for number in range(len(everything))]


def _answer_score(logits: torch.Tensor, answer: list[int]) -> Score:
    """Score an answer by the last ``len(answer)`` rows of logits ``[n, vocabulary]``, in float32."""
    wanted = torch.tensor(answer, device=logits.device)
    log_probs = logits[-len(answer) :].float().log_softmax(-1)
    chosen = log_probs.gather(1, wanted.unsqueeze(1))
    return float(chosen.sum()), bool((log_probs.argmax(-1) == wanted).all())


def _padded(rows: Sequence[Row]) -> torch.Tensor:
    """Int64 ``[rows, longest]``."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def _by_budget(rows: Sequence[Row], budget: int, most: int | None) -> Iterator[Sequence[Row]]:
    """Split rows, longest first, into batches of ``most`` rows, or of at most ``budget`` tokens with their padding."""
    start = 0
    while start < len(rows):
        size = most or max(1, budget // len(rows[start]))
        yield rows[start : start + size]
        start += size
