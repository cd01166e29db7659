import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.data.byte_tokenizer import ByteTokenizer
from tests.models.tiny import tiny_tokenizer
from ulbq.data import windows
from ulbq.data.windows import draw_windows, leading_tokens, token_stream
from ulbq.errors import InputError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(total=st.integers(2, 400), samples=st.integers(1, 12), length=st.integers(2, 60), seed=st.integers(0, 99))
def test_windows_are_spread_slices_of_the_stream(total: int, samples: int, length: int, seed: int) -> None:
    assume(total >= length + (samples - 1) * ((length + 1) // 2))
    drawn = draw_windows(torch.arange(total), samples, length, seeded(seed))
    starts = drawn[:, 0]
    assert drawn.shape == (samples, length)
    assert torch.equal(drawn, starts[:, None] + torch.arange(length))
    assert starts.min() >= 0
    assert starts.max() + length <= total
    apart = length if total >= samples * length else (length + 1) // 2
    assert (starts.diff() >= apart).all()


def test_every_position_is_reached() -> None:
    firsts = [draw_windows(torch.arange(11), 2, 4, seeded(seed)) for seed in range(200)]
    assert {int(window[0, 0]) for window in firsts} == {0, 1, 2, 3}
    assert {int(window[1, 0]) for window in firsts} == {4, 5, 6, 7}


@pytest.mark.parametrize("length", [6, 7])
def test_too_little_text_says_what_fits(length: int) -> None:
    half = (length + 1) // 2
    needed = length + 3 * half
    assert draw_windows(torch.arange(needed), 4, length, seeded()).shape == (4, length)
    with pytest.raises(InputError) as caught:
        draw_windows(torch.arange(needed - 1), 4, length, seeded(), "notes.txt")
    assert caught.value.message == f"notes.txt holds {needed - 1} tokens; 4 samples of {length} need at least {needed}."
    assert "at most `samples=3` fit" in caught.value.hint
    assert draw_windows(torch.arange(needed - 1), 3, length, seeded()).shape == (3, length)


def test_text_shorter_than_a_window() -> None:
    with pytest.raises(InputError) as caught:
        draw_windows(torch.arange(5), 1, 6, seeded())
    assert "not even one sample fits" in caught.value.hint


def test_stream_is_the_joined_text_without_special_tokens() -> None:
    tokenizer = tiny_tokenizer(400)
    texts = ["the one", "", " and = the other = \n"]
    expected = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    assert token_stream(texts, tokenizer, 1000).tolist() == expected
    assert token_stream(texts, ByteTokenizer(bos=True), 1000).tolist() == list("\n\n".join(texts).encode())


def test_stream_is_cut_at_the_limit_and_reads_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_PIECE", 10)
    read = []

    def endless() -> Iterator[str]:
        for number in itertools.count():
            read.append(number)
            yield f"text {number}"

    stream = token_stream(endless(), ByteTokenizer(), 25)
    assert ByteTokenizer.read(stream.tolist()) == "text 0\n\ntext 1\n\ntext 2\n\nt"
    assert read == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("piece", [1, 3, 7, 100])
def test_pieces_lose_nothing(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(windows, "_PIECE", piece)
    texts = ["", "a", "", "", "a much longer text", "b"]
    assert ByteTokenizer.read(token_stream(texts, ByteTokenizer(), 1000).tolist()) == "\n\n".join(texts)


def test_texts_are_tokenised_together_as_far_as_a_piece_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_PIECE", 6)
    pieces = []

    class Noting(ByteTokenizer):
        def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
            pieces.append(text)
            return super().__call__(text, **options)

    token_stream(["a", "b", "c", "d", "e", "f", "0123456789", "g"], Noting(), 1000)
    assert pieces == ["a\n\nb", "\n\nc\n\nd", "\n\ne\n\nf", "\n\n0123", "456789", "\n\ng"]


def test_no_text_is_an_empty_stream() -> None:
    assert token_stream([], ByteTokenizer(), 10).shape == (0,)


def test_leading_token_is_what_the_tokenizer_puts_in_front() -> None:
    assert leading_tokens(ByteTokenizer(bos=True)) == [256]
    assert leading_tokens(ByteTokenizer(bos=False)) == []
    assert leading_tokens(tiny_tokenizer()) == []  # has such a token but does not use it
