from types import SimpleNamespace

import pytest
import torch
from jinja2 import TemplateError

from tests.data.byte_tokenizer import ByteTokenizer
from ulbq.data.openings import Openings, text_tokens


class Words(ByteTokenizer):
    """Bytes, then four words, a token that opens a turn and one that closes it."""

    added_tokens_decoder = {i: SimpleNamespace(special=True) for i in (256, 257, 262, 263)}  # noqa: RUF012
    all_special_ids = [256, 257]  # noqa: RUF012
    words = ("Once", " The", "code", "JSON")
    chat_template: str | None = "a template"

    def __len__(self) -> int:
        return 264

    def batch_decode(self, rows: torch.Tensor) -> list[str]:  # type: ignore[override]
        return [self.words[i - 258] if i >= 258 else chr(i) for (i,) in rows.tolist()]

    def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> str:
        return f"<{messages[0]['content']}>\n<"

    def __call__(self, text: str, *, add_special_tokens: bool = True, **options: bool) -> dict[str, list[int]]:
        return {"input_ids": [{"<": 262, ">": 263}.get(character, ord(character)) for character in text]}


def drawn(openings: Openings, count: int = 300) -> list[list[int]]:
    return openings.draw(count, torch.Generator().manual_seed(0))


def test_the_kinds_take_turns() -> None:
    openings = Openings(Words(), 264, limit=8)  # type: ignore[arg-type]
    found = drawn(openings)
    assert len({tokens[0] for tokens in found[::3]}) > 60  # any token of text
    assert all(len(tokens) == 1 and not openings.banned[tokens[0]] for tokens in found[::3])
    assert {tokens[0] for tokens in found[1::3]} == {258}  # a capital and letters behind it
    assert {tuple(tokens) for tokens in found[2::3]} == {(262, 258)}
    assert openings.answering == [263, 262]


def test_no_special_token_is_text_nor_any_beyond_the_vocabulary() -> None:
    assert text_tokens(Words(), 264).tolist() == [*range(256), 258, 259, 260, 261]  # type: ignore[arg-type]
    openings = Openings(Words(), 100, limit=8)  # type: ignore[arg-type]
    assert openings.banned.tolist() == [False] * 100
    assert not openings.chat
    assert not openings.answering


@pytest.mark.parametrize("reason", ["no template", "too long", "refused", "the question is dropped"])
def test_without_a_template_that_can_be_used_nobody_asks(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*messages: object, **options: bool) -> str:
        raise TemplateError("the first message must be of the system")

    tokenizer = Words()
    if reason == "no template":
        tokenizer.chat_template = None
    if reason == "refused":
        monkeypatch.setattr(tokenizer, "apply_chat_template", refuse)
    if reason == "the question is dropped":
        monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *messages, **options: "Hello.")
    openings = Openings(tokenizer, 264, limit=1 if reason == "too long" else 8)  # type: ignore[arg-type]
    assert all(len(tokens) == 1 for tokens in drawn(openings))
    assert openings.answering == []


def test_without_words_any_token_opens_a_text() -> None:
    tokenizer = Words()
    tokenizer.words = ("x", "y", "z", "0")
    assert len({tokens[0] for tokens in drawn(Openings(tokenizer, 264, limit=8))[1::3]}) > 60  # type: ignore[arg-type]
