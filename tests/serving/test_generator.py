"""A model that writes: why a text ends, and how its tokens are chosen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ulbq.config.generate import GenerationSettings
from ulbq.errors import InputError, UsageError
from ulbq.models.decoding import Ending, TextStream
from ulbq.progress import Silent
from ulbq.serving.generator import TextGenerator

PROMPT = "once upon a time"


@pytest.fixture(scope="module")
def generator(tiny_llama: Path) -> TextGenerator:
    made = TextGenerator(GenerationSettings(source=str(tiny_llama), dtype="fp32", device="cpu"), Silent())
    made.load(Silent())
    return made


def written(
    generator: TextGenerator,
    count: int,
    stops: tuple[str, ...] = (),
    on_text: Callable[[str], object] = lambda text: None,
) -> tuple[TextStream, Ending]:
    stream = TextStream(generator.tokenizer, on_text, stops)
    return stream, generator.write(generator.text_tokens(PROMPT), generator.settings(count, chat=False), stream)


def test_a_text_that_has_room_for_no_more_ends_by_its_length(generator):
    stream, ending = written(generator, 12)
    assert (ending, stream.new_tokens, stream.stopped) == ("length", 12, False)


def test_a_stop_string_ends_the_text_and_is_no_part_of_it(generator):
    whole = written(generator, 12)[0].text
    stop = whole[4:6]
    pieces: list[str] = []
    stream, ending = written(generator, 12, (stop, "nothing like it"), pieces.append)
    assert stream.text == "".join(pieces) == whole[: whole.index(stop)]
    assert ending == "stop"
    assert stream.new_tokens < 12


def test_what_might_have_been_a_stop_string_comes_at_the_end(generator):
    whole = written(generator, 12)[0].text
    stream, ending = written(generator, 12, (whole[-1] + "?",))
    assert (stream.text, ending) == (whole, "length")


def test_the_models_own_end_is_a_stop(generator, monkeypatch):
    first, _ = written(generator, 1)
    monkeypatch.setattr(generator.model.generation_config, "eos_token_id", first.last_token)
    stream, ending = written(generator, 1)
    assert (stream.new_tokens, ending) == (1, "stop")


def test_who_has_heard_enough_ends_the_text(generator):
    stream: TextStream

    def hear(text: str) -> None:
        stream.stopped = len(stream.text) > 3

    stream = TextStream(generator.tokenizer, hear)
    assert generator.write(generator.text_tokens(PROMPT), generator.settings(100, chat=False), stream) == "stop"
    assert stream.new_tokens < 20


@pytest.mark.parametrize(
    ("server", "asked", "drawn"),
    [
        ({}, {}, None),
        ({}, {"temperature": 0.5}, (0.5, 1.0)),
        ({}, {"top_p": 0.5}, (1.0, 0.5)),
        ({"temperature": 0.5}, {}, (0.5, 1.0)),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.7}, (0.7, 0.9)),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0}, None),
        ({}, {"temperature": 0, "top_p": 1}, None),
    ],
)
def test_what_a_request_says_goes_before_the_options(
    tiny_llama: Path, server: dict[str, Any], asked: dict[str, Any], drawn: tuple[float, float] | None
) -> None:
    found = TextGenerator(GenerationSettings(source=str(tiny_llama), device="cpu", **server), Silent()).settings(
        5, chat=True, **asked
    )
    assert (found["temperature"], found["top_p"]) == (drawn or (1.0, 1.0))
    assert found["do_sample"] == (drawn is not None)
    assert (found["max_new_tokens"], found["repetition_penalty"]) == (5, 1.1)


def test_penalties(tiny_llama: Path) -> None:
    plain = TextGenerator(GenerationSettings(source=str(tiny_llama), device="cpu"), Silent())
    own = TextGenerator(GenerationSettings(source=str(tiny_llama), device="cpu", repetition_penalty=1.3), Silent())
    assert plain.settings(5, chat=False)["repetition_penalty"] == 1.0
    assert own.settings(5, chat=False)["repetition_penalty"] == own.settings(5, chat=True)["repetition_penalty"] == 1.3
    assert own.settings(5, chat=True, repetition_penalty=2.0)["repetition_penalty"] == 2.0


def test_prompts_that_are_none(generator, monkeypatch):
    with pytest.raises(UsageError, match="empty"):
        generator.chat_tokens([{"role": "user", "content": " "}])
    monkeypatch.setattr(generator.tokenizer, "chat_template", None)
    assert not generator.chats
    with pytest.raises(InputError, match="no chat template"):
        generator.chat_tokens([{"role": "user", "content": "hi"}])
