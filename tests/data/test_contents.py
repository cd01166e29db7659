"""What samples hold: counted by hand."""

import pytest
import torch

from tests.data.byte_tokenizer import ByteTokenizer
from ulbq.data.contents import Contents, contents, repeated, scripts


def test_scripts_are_shares_of_the_letters() -> None:
    assert scripts(["abc 123 абв", "漢字ab"]) == {"Latin": 0.5, "Cyrillic": 0.3, "Han": 0.2}
    assert scripts(["1, 2"]) == {}
    # What stands there once in a thousand letters is no language.
    assert scripts(["a" * 999 + "я"]) == {"Latin": 0.999}


def test_runs_that_occurred_before() -> None:
    different = torch.arange(64).reshape(2, 32)
    assert repeated(different) == 0.0
    assert repeated(different[:1].expand(4, -1)) == 0.75
    # Shifted by three tokens: 14 of its 17 runs are the first one's.
    shifted = torch.stack([torch.arange(32), torch.arange(3, 35)])
    assert repeated(shifted) == pytest.approx(14 / 34)
    assert repeated(torch.tensor([[5, 5, 5]])) == 0.0  # shorter than a run: it is one


def test_special_tokens_count_and_are_no_letters() -> None:
    tokens = torch.tensor([[256, *b"abc"], [*b"de", 257, 257]])
    found = contents(tokens, ByteTokenizer())
    assert found == Contents(tokens=8, scripts={"Latin": 1.0}, special=3 / 8, repeated=0.0)
    assert found.words == "8 tokens; letters Latin 100%; 37.5% special tokens; 0.0% of runs of 16 tokens repeated"
    assert found.record() == {"tokens": 8, "scripts": {"Latin": 1.0}, "special": 0.375, "repeated": 0.0}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"chats": 1.0}, "chats alone"),
        ({"tokens": 399}, "holds 399 tokens, few"),
        ({"repeated": 0.3}, "repeats itself: 30%"),
    ],
)
def test_what_a_person_must_know(changes: dict[str, float], sentence: str) -> None:
    fine = {"tokens": 400, "scripts": {}, "special": 0.0, "repeated": 0.2, "chats": 0.9}
    assert Contents(**fine).warnings(100) == []
    (warning,) = Contents(**(fine | changes)).warnings(100)
    assert sentence in warning
