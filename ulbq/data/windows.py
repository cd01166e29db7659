"""From texts to one stream of tokens, and from the stream to windows."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from ulbq.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PIECE = 1 << 22  # characters tokenised in one call; a tokenizer's bookkeeping takes some 100 bytes a token


def leading_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """``[bos_token_id]`` where the tokenizer puts that token before every text, else ``[]``."""
    first: list[int] = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def token_stream(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase", limit: int) -> torch.Tensor:
    """Tokens of the texts joined with blank lines, without special tokens.

    Args:
        texts: read only until there are enough tokens.
        tokenizer: the model's.
        limit: the most tokens that are wanted.

    Returns:
        int64 ``[n]``, ``n <= limit``. Up to four million characters are tokenised in one call, as if the text had never
        been apart; beyond that the joints of the pieces may differ by a token.
    """
    parts = [torch.empty(0, dtype=torch.int64)]
    missing = limit
    for piece in _pieces(texts):
        ids = tokenizer(piece, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        parts.append(torch.tensor(ids[:missing], dtype=torch.int64))
        missing -= len(parts[-1])
        if not missing:
            break
    return torch.cat(parts)


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """The joined text in pieces of at most ``_PIECE`` characters, cut between texts unless one alone is longer."""
    held: list[str] = []
    size = 0
    separator = ""
    for text in texts:
        part = separator + text
        separator = "\n\n"
        if held and size + len(part) > _PIECE:
            yield "".join(held)
            held, size = [], 0
        *whole, part = [part[start : start + _PIECE] for start in range(0, len(part), _PIECE)] or [""]
        yield from whole
        held.append(part)
        size += len(part)
    if held:
        yield "".join(held)


def draw_windows(
    stream: torch.Tensor, samples: int, length: int, generator: torch.Generator, name: str = "The text"
) -> torch.Tensor:
    """Random windows of a token stream, in the order of the text.

    The windows are disjoint where ``n >= samples * length``. With less text they overlap, evenly, by at most a half.

    Args:
        stream: int64 ``[n]``.
        samples: number of windows.
        length: tokens a window.
        generator: draws the positions.
        name: what the error calls the text.

    Returns:
        int64 ``[samples, length]``.

    Raises:
        InputError: windows would overlap by more than a half, or one alone does not fit.
    """
    total, half = stream.numel(), (length + 1) // 2
    if total < length + (samples - 1) * half:
        raise _too_little(name, total, samples, length)
    # Random gaps between windows laid out at a fixed stride: every position is reached and none overlaps its neighbour
    # by more than the stride leaves.
    stride = min(length, (total - length) // (samples - 1)) if samples > 1 else 0
    slack = total - length - (samples - 1) * stride
    gaps = torch.randint(slack + 1, (samples,), generator=generator).sort().values
    starts = gaps + stride * torch.arange(samples)
    return stream[starts.unsqueeze(1) + torch.arange(length)]


def _too_little(name: str, total: int, samples: int, length: int) -> InputError:
    half = (length + 1) // 2
    needed = length + (samples - 1) * half
    fitting = 1 + (total - length) // half if total >= length else 0
    advice = f"at most `samples={fitting}` fit" if fitting else "not even one sample fits"
    return InputError(
        f"{name} holds {total:,} tokens; {samples} samples of {length} need at least {needed:,}.",
        hint=f"At this length {advice}; lower `samples` or `sequence_length`, or give more text.",
    )
