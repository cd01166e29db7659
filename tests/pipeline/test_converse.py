"""A conversation: what each answer knows of, and how it ends."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models.tiny import save_tiny
from ulbq.config.generate import ConverseRequest, GenerateRequest
from ulbq.errors import InputError, UsageError
from ulbq.pipeline.converse import Answer, converse
from ulbq.pipeline.generate import generate
from ulbq.serving.generator import TextGenerator

_COMMON: dict[str, Any] = {"dtype": "fp32", "device": "cpu"}


def talk(
    source: Path,
    *messages: str,
    on_text: Callable[[str], object] = lambda text: None,
    **changes: Any,
) -> list[Answer]:
    answers: list[Answer] = []
    waiting: Iterator[str] = iter(messages)
    request = ConverseRequest(source=str(source), **{"max_new_tokens": 8, **_COMMON, **changes})
    converse(request, lambda: next(waiting, None), on_text, answers.append)
    return answers


def test_every_answer_knows_of_what_was_said_before(tiny_llama):
    pieces: list[str] = []
    first, second = talk(tiny_llama, "hello", " \n", "and you", on_text=pieces.append)
    assert first.text + second.text == "".join(pieces)
    assert [one.ending for one in (first, second)] == ["length", "length"]
    # The template of these models writes a line for each message, and nothing before an answer.
    whole = f"user: hello\nassistant: {first.text}\nuser: and you\n"
    request = {"source": str(tiny_llama), "prompt": whole, "max_new_tokens": 8, "repetition_penalty": 1.1, **_COMMON}
    assert second.text == generate(GenerateRequest(**request)).text
    assert second.text != talk(tiny_llama, "and you")[0].text


def test_an_interrupt_ends_the_answer_alone(tiny_llama):
    heard: list[str] = []

    def hear(text: str) -> None:
        heard.append(text)
        if len(heard) == 2:
            raise KeyboardInterrupt

    first, second = talk(tiny_llama, "hello", "and you", on_text=hear)
    assert first.ending == "interrupt"
    assert first.text == "".join(heard[:2])
    assert second.ending == "length"
    whole = f"user: hello\nassistant: {first.text}\nuser: and you\n"
    request = {"source": str(tiny_llama), "prompt": whole, "max_new_tokens": 8, "repetition_penalty": 1.1, **_COMMON}
    assert second.text == generate(GenerateRequest(**request)).text


def test_a_message_without_an_answer_was_never_said(tiny_llama, monkeypatch):
    write = TextGenerator.write
    with monkeypatch.context() as patch:
        calls: list[int] = []

        def interrupted_at_first(self: TextGenerator, *given: Any) -> Any:
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return write(self, *given)

        patch.setattr(TextGenerator, "write", interrupted_at_first)
        first, second = talk(tiny_llama, "hello", "and you")
    assert (first.text, first.ending, first.new_tokens) == ("", "interrupt", 0)
    assert second == talk(tiny_llama, "and you")[0]


def test_the_last_answers_are_as_long_as_there_is_room_for(tiny_llama):
    # A token is a letter; the model holds 256.
    answers: list[Answer] = []
    waiting = iter(["a" * 200, "b" * 200])
    request = ConverseRequest(source=str(tiny_llama), max_new_tokens=100, **_COMMON)
    with pytest.raises(UsageError, match=r"The conversation has \d+ tokens, and '.*' holds 256"):
        converse(request, lambda: next(waiting, None), on_answer=answers.append)
    assert len(answers) == 1
    assert answers[0].new_tokens < 100


def test_a_model_without_a_template_is_refused_before_its_weights_are_read(tmp_path, monkeypatch):
    folder = save_tiny("llama", tmp_path / "base", tied=False)
    (folder / "chat_template.jinja").unlink()
    monkeypatch.delattr(TextGenerator, "load")
    with pytest.raises(InputError, match="no chat template"):
        talk(folder, "hello")
