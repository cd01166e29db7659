"""A model goes on from a prompt, one token after the other, and the clock runs beside it."""

import inspect
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from ulbq.errors import NumericsError, UsageError
from ulbq.models import graph_decoding
from ulbq.models.attention import own_attention
from ulbq.models.compiled_decoding import Decoder, products
from ulbq.models.graph_decoding import GraphDecoder
from ulbq.models.source import ModelSource
from ulbq.models.stop_strings import StopStrings

Ending = Literal["stop", "length"]
"""Why a text ended: the model or a string said so, or there was room for no more."""

# Tokens of the prompt that the first new ones are spelled after: some tokenizers drop a space that stands first.
_BEFORE = 8
# What a decoder puts where bytes do not make a character yet.
_UNFINISHED = "\ufffd"


def keeps_logits(model: PreTrainedModel) -> bool:
    """Whether the model takes ``logits_to_keep``, and so makes no logits that nobody reads."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def last_logits(model: PreTrainedModel) -> dict[str, Any]:
    """Options of a forward pass whose last logits alone are wanted; none where the model has no such option.

    The position is an index: behind a slice, as of ``logits_to_keep=1``, torch copies the head once for every row.
    """
    return {"logits_to_keep": torch.tensor([-1], device=model.device)} if keeps_logits(model) else {}


def take_room(cache: Any, length: int) -> None:
    """Let a cache take the room for ``length`` tokens now, in place, as far as it is transformers' growing one.

    That one is copied for every token, which costs time, and leaves holes in memory that are soon larger than itself.
    """
    if not isinstance(cache, DynamicCache):
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            cache.layers[index] = _RoomyLayer(layer.keys, layer.values, length)


class _RoomyLayer(DynamicLayer):
    """Keys and values ``[batch, heads, n, width]`` at the beginning of room for ``length`` tokens."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self._length = 0
        self._room = [states.new_empty(*states.shape[:2], length, states.shape[3]) for states in (keys, values)]
        self.update(keys, values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and return all of them."""
        start, self._length = self._length, self._length + key_states.shape[2]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start : self._length] = states
        self.keys, self.values = (room[:, :, : self._length] for room in self._room)
        return self.keys, self.values


def check_prompt(prompt: str) -> None:
    """Refuse what is no text to go on from. Raises UsageError."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError("The prompt is not UTF-8.") from error
    if not prompt.strip():
        raise UsageError("The prompt is empty.", hint="Give a beginning, such as 'Once upon a time'.")


def check_room(source: ModelSource, prompt: int, new_tokens: int) -> None:
    """Refuse ``prompt`` tokens that leave no room for so many new ones. Raises UsageError."""
    most = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if most is None or prompt + new_tokens <= most:
        return
    left = f"At most `max_new_tokens={most - prompt}`." if prompt < most else "Shorten the prompt."
    raise UsageError(
        f"A prompt of {prompt:,} tokens and {new_tokens:,} new ones are more than the {most:,} that "
        f"'{source.given}' holds.",
        hint=left,
    )


def batched_attention(device: torch.device) -> AbstractContextManager[None]:
    """While it lasts, single tokens of a batch look back by batched products, in models whose attention is torch's.

    Torch's kernel for the CPU takes far longer for one query than for many, and wants the keys once for every head that
    shares them. What has a mask stays torch's. In bfloat16 scores are rounded before the softmax.
    """
    return own_attention(_attend, device)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor | None:
    batch, heads, length, width = query.shape
    if length != 1:
        return None
    scores = query.view(batch, key.shape[1], -1, width) @ key.transpose(2, 3)
    weights = (scores.float() * scaling).softmax(-1).to(value.dtype)
    return (weights @ value).view(batch, heads, 1, -1)


def greedy(new_tokens: int, *, at_least: int = 0) -> dict[str, Any]:
    """Settings for :func:`write_on`: the likeliest token every time, at most ``new_tokens``.

    No end of text counts before ``at_least`` tokens are written. A model's own settings for sampling have no say.
    """
    return {
        "max_new_tokens": new_tokens,
        "min_new_tokens": at_least,
        **{"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
        **{"num_beams": 1, "repetition_penalty": 1.0},
    }


class TextStream(BaseStreamer):
    """Turns tokens into text as they come; a character whose bytes are spread over tokens comes when it is whole.

    Args:
        tokenizer: the model's own.
        on_text: called with every piece.
        stops: strings at whose first the text ends; it does not hold that one.

    Attributes:
        text: all pieces so far.
        stopped: one of ``stops`` came. Whoever has heard enough sets it, from any thread: at most one token follows.
        times: when the prompt and each new token came, in seconds of :func:`time.perf_counter`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        on_text: Callable[[str], object] = lambda text: None,
        stops: Sequence[str] = (),
    ) -> None:
        self.text = ""
        self.stopped = False
        self.times: list[float] = []
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._stops = StopStrings(stops)
        self._tokens: list[int] = []
        # Tokens from `start` on are decoded together, those before `said` have been handed out.
        self._start = self._said = 0

    @property
    def new_tokens(self) -> int:
        """Tokens so far; one that ended the text counts."""
        return len(self.times) - 1

    @property
    def last_token(self) -> int:
        """The newest token, or the prompt's last."""
        return self._tokens[-1]

    @property
    def prefill_seconds(self) -> float:
        """From the start to the first new token."""
        return self.times[1] - self.times[0]

    @property
    def decode_seconds(self) -> float:
        """From the first new token to the last."""
        return self.times[-1] - self.times[1]

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens after the first in :attr:`decode_seconds`; None where there was one only."""
        return round((self.new_tokens - 1) / self.decode_seconds, 2) if self.new_tokens > 1 else None

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt ``[1, n]``, then one token ``[1]`` after the other."""
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            self._tokens = value.flatten()[-_BEFORE:].tolist()
            self._said = len(self._tokens)
            return
        self._tokens += value.flatten().tolist()
        piece = self._piece()
        if piece and not piece.endswith(_UNFINISHED):
            self._start, self._said = self._said, len(self._tokens)
            self._say(piece)

    def end(self) -> None:
        """Hand out what is left."""
        self._say(self._piece(), last=True)
        self._said = len(self._tokens)

    def _piece(self) -> str:
        known, whole = self._decode(self._tokens[self._start : self._said]), self._decode(self._tokens[self._start :])
        return whole[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _say(self, piece: str, *, last: bool = False) -> None:
        piece = self._stops.let_through(piece, last=last)
        self.stopped |= self._stops.found
        if piece:
            self.text += piece
            self._on_text(piece)


@torch.inference_mode()
def write_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[int],
    settings: dict[str, Any],
    stream: TextStream,
    *,
    cuda_graphs: bool = True,
) -> Ending:
    """Go on from a prompt until the model, ``settings`` or ``stream`` end the text.

    Args:
        model: in eval mode, on its device.
        tokenizer: the model's own.
        tokens: of the prompt, at least one.
        settings: options of transformers' ``GenerationConfig``, as of :func:`greedy`.
        stream: gets the prompt and every new token.
        cuda_graphs: on a GPU, record the work of a token once and replay it, where the model allows it.

    Returns:
        Why the text ended.

    Raises:
        NumericsError: the model's predictions are not finite.
        ResourceError: the work of a token cannot be recorded.
    """
    own = model.generation_config
    ends = own.eos_token_id if own is not None and own.eos_token_id is not None else tokenizer.eos_token_id
    all_ends = ends if isinstance(ends, list) else [ends]
    padding = all_ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.tensor([list(tokens)], device=model.device)
    compiled, room = products(model), len(tokens) + settings["max_new_tokens"]
    if compiled is not None:
        _write(Decoder(model, compiled, room), ids, settings, all_ends, stream)
    elif cuda_graphs and graph_decoding.unsupported_reason(model) is None:
        decoder = GraphDecoder(model, room, last_logits(model))
        _write(decoder, ids, settings, all_ends, stream)
        decoder.keep()
    else:
        model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(**settings, eos_token_id=ends, pad_token_id=padding),
            logits_processor=LogitsProcessorList([_Finite()]),
            stopping_criteria=StoppingCriteriaList([_Stopped(stream)]),
            streamer=stream,
        )
    return "stop" if stream.stopped or stream.last_token in all_ends else "length"


def _write(
    decoder: Callable[[torch.Tensor], torch.Tensor],
    ids: torch.Tensor,
    settings: dict[str, Any],
    ends: list[int],
    stream: TextStream,
) -> None:
    """As transformers does with these settings, which takes milliseconds for every token beside its work."""
    processors, prompt = _processors(settings), ids.shape[1]
    stream.put(ids)
    token = ids[0]
    while True:
        scores = decoder(token).unsqueeze(0)
        if ids.shape[1] - prompt < settings["min_new_tokens"] and None not in ends:
            scores[:, ends] = -torch.inf
        if processors:
            scores = processors(ids, scores)  # type: ignore[arg-type]
        best, token = scores.max(-1)
        _check_finite(best)
        if settings["do_sample"]:
            token = torch.multinomial(scores.softmax(-1), 1)[0]
        ids = torch.cat([ids, token.unsqueeze(0)], 1)
        stream.put(token)
        if stream.stopped or stream.last_token in ends or ids.shape[1] - prompt == settings["max_new_tokens"]:
            break
    stream.end()


def _processors(settings: dict[str, Any]) -> LogitsProcessorList:
    """What transformers does to scores for these settings, in its order."""
    found = LogitsProcessorList()
    if settings["repetition_penalty"] != 1:
        found.append(RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    if settings["do_sample"] and settings["temperature"] != 1:
        found.append(TemperatureLogitsWarper(settings["temperature"]))
    if settings["do_sample"] and settings["top_p"] < 1:
        found.append(TopPLogitsWarper(settings["top_p"]))
    return found


class _Stopped(StoppingCriteria):
    """Ends the text where its reader has heard enough."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.new_full((len(input_ids),), self._stream.stopped, dtype=torch.bool)


class _Finite(LogitsProcessor):
    """Changes nothing, and refuses predictions from which any token could follow."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        _check_finite(scores.amax())
        return scores


def _check_finite(best: torch.Tensor) -> None:
    """Refuse the score of the likeliest token. Minus infinity is what tokens have that are out of the question."""
    if not bool(best.isfinite()):
        raise NumericsError(
            "The model's predictions are not finite.",
            hint="Try `dtype=fp32`; 'ulbq eval' tells whether it is sound.",
        )
