"""The server, asked by the client that people have: ``openai``."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ulbq.config.generate import GenerateRequest, ServeRequest
from ulbq.errors import NumericsError
from ulbq.pipeline.generate import generate
from ulbq.progress import Silent
from ulbq.serving.generator import TextGenerator
from ulbq.serving.worker import Worker

pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import openai
import uvicorn

from ulbq.serving.app import Limits, build_app
from ulbq.serving.server import take_port

PROMPT = "once upon a time"
QUESTION = [{"role": "user", "content": "hello"}]
LONG = 200


class _Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Served(NamedTuple):
    """A server that runs.

    Attributes:
        client: of OpenAI's.
        port: of 127.0.0.1.
        generator: what the server speaks with.
        notes: a line for each answer.
    """

    client: Any
    port: int
    generator: TextGenerator
    notes: list[str]


@pytest.fixture(scope="module")
def served(tiny_llama: Path) -> Iterator[Served]:
    generator = TextGenerator(ServeRequest(source=str(tiny_llama), dtype="fp32", device="cpu"), Silent())
    generator.load(Silent())
    worker, progress = Worker(generator), _Notes()
    app = build_app(worker, Limits("tiny", LONG, ("127.0.0.1",)), progress)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    with take_port("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            yield Served(client, port, generator, progress.notes)
        server.should_exit = True
        worker.close()
        thread.join()


@pytest.fixture
def client(served: Served) -> Any:
    return served.client


def chat(client: Any, **changes: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": QUESTION, "max_tokens": 8, **changes})


def complete(client: Any, **changes: Any) -> Any:
    return client.completions.create(**{"model": "tiny", "prompt": PROMPT, "max_tokens": 8, **changes})


def post(served: Served, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_the_one_model(client):
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "ulbq"
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-4o' here; there is 'tiny'"):
        client.models.retrieve("gpt-4o")


@pytest.mark.parametrize("ask", [chat, complete])
def test_an_answer_is_what_generate_writes(client, tiny_llama, ask):
    prompt = {chat: "hello", complete: PROMPT}[ask]
    request = GenerateRequest(
        source=str(tiny_llama), prompt=prompt, chat=ask is chat, max_new_tokens=8, dtype="fp32", device="cpu"
    )
    expected = generate(request)
    found = ask(client)
    choice = found.choices[0]
    assert (choice.message.content if ask is chat else choice.text) == expected.text
    assert (choice.index, choice.finish_reason, found.model) == (0, "length", "tiny")
    numbers = found.usage
    assert (numbers.prompt_tokens, numbers.completion_tokens) == (expected.prompt_tokens, expected.new_tokens)
    assert numbers.total_tokens == expected.prompt_tokens + 8


@pytest.mark.parametrize("ask", [chat, complete])
def test_a_stream_brings_the_same_in_pieces(client, ask):
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    *said, last = chunks
    assert (last.choices, last.usage) == ([], whole.usage)
    choices = [chunk.choices[0] for chunk in said]
    assert [one.finish_reason for one in choices] == [*[None] * (len(choices) - 1), "length"]
    if ask is chat:
        assert choices[0].delta.role == "assistant"
        pieces = [one.delta.content or "" for one in choices]
        assert "".join(pieces) == whole.choices[0].message.content
    else:
        pieces = [one.text for one in choices]
        assert "".join(pieces) == whole.choices[0].text
    assert sum(map(bool, pieces)) > 1
    assert all(chunk.usage is None for chunk in ask(client, stream=True))


def test_events_end_as_the_protocol_has_it(served):
    status, raw = post(served, "/v1/completions", b'{"prompt": "once", "max_tokens": 2, "stream": true}')
    events = raw.decode().split("\n\n")
    assert status == 200
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(one.startswith("data: ") for one in events[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(client, stream):
    whole = complete(client, max_tokens=12).choices[0].text
    stop = whole[4:6]
    for given in (stop, ["not this", stop]):
        found = complete(client, max_tokens=12, stop=given, stream=stream)
        choices = [chunk.choices[0] for chunk in found] if stream else found.choices
        assert "".join(one.text for one in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_draws_follow_the_seed(client):
    def drawn(**more: Any) -> str:
        return complete(client, temperature=1.5, max_tokens=12, **more).choices[0].text

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn() != drawn()
    greedy = complete(client, max_tokens=12).choices[0].text
    assert complete(client, max_tokens=12, temperature=0, top_p=1).choices[0].text == greedy
    assert complete(client, max_tokens=12, top_p=1e-6).choices[0].text == greedy
    assert complete(client, max_tokens=12, extra_body={"repetition_penalty": 9}).choices[0].text != greedy


def test_an_answer_goes_back_as_it_came(client):
    first = chat(client).choices[0].message
    again = [*QUESTION, first, {"role": "user", "content": [{"type": "text", "text": "and you"}]}]
    plain = [*QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": "and you"}]
    found = chat(client, messages=again)
    assert found.choices[0].message.content == chat(client, messages=plain).choices[0].message.content
    assert found.usage.prompt_tokens > chat(client).usage.prompt_tokens


def test_developers_are_the_system_and_fields_of_no_consequence_are_taken(client):
    said = [{"role": "developer", "content": "Be brief."}, *QUESTION]
    neutral = {
        **{"n": 1, "user": "me", "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "logprobs": False},
        **{"response_format": {"type": "text"}, "store": False, "stop": None, "seed": None, "stream": False},
    }
    found = chat(client, messages=said, **neutral).choices[0].message.content
    system = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert found == chat(client, messages=system).choices[0].message.content


def test_an_answer_of_no_said_length_ends_at_the_limit(client):
    assert complete(client, max_tokens=None, prompt="a").usage.completion_tokens == LONG
    # The model holds 256 tokens, of which two of these letters take one.
    assert complete(client, max_tokens=None, prompt="a" * 496).usage.total_tokens == 256


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "sentence"),
    [
        ("completions", "{", 400, None, "The body is no JSON."),
        ("completions", "[" * 10_000, 400, None, "The body is no JSON."),
        ("completions", "[1]", 400, None, "should be an object"),
        ("completions", "{}", 400, "prompt", "prompt: Field required."),
        ("completions", {"prompt": ""}, 400, None, "The prompt is empty."),
        ("completions", {"prompt": ["a", "b"]}, 400, "prompt", "valid string"),
        ("completions", {"prompt": "a", "stop": ""}, 400, "stop", "at least 1 character"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ("completions", {"prompt": "a", "n": 2}, 400, "n", "n: Input should be 1."),
        ("completions", {"prompt": "a", "best_of_all": 2}, 400, "best_of_all", "There is no such field here."),
        ("completions", {"prompt": "a", "model": "b"}, 404, "model", "There is no model 'b' here; there is 'tiny'."),
        ("completions", {"prompt": "a", "max_tokens": 201}, 400, "max_tokens", "at most 200 tokens here, and 201"),
        ("completions", {"prompt": "a" * 400, "max_tokens": 100}, 400, None, "which leaves 56 of the 100"),
        ("completions", {"prompt": "a" * 600}, 400, None, "holds 256 tokens, and the prompt has 300."),
        ("chat/completions", {"messages": []}, 400, "messages", "at least 1 item"),
        ("chat/completions", {"messages": [{"role": "user", "content": " "}]}, 400, None, "The prompt is empty."),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages", "messages.0.role"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            *(400, "messages", "messages.0.content.0.type: Input should be 'text'."),
        ),
        ("chat/completions", {"messages": QUESTION, "tools": [{}]}, 400, "tools", "at most 0 items"),
        ("nothing", {}, 404, None, "Not Found"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_an_error_object(served, path, body, status, param, sentence):
    raw = (body if isinstance(body, str) else json.dumps(body)).encode()
    found, answer = post(served, f"/v1/{path}", raw)
    error = json.loads(answer)["error"]
    assert (found, error["type"], error["param"]) == (status, "invalid_request_error", param)
    assert sentence in error["message"]


def test_pages_of_the_web_do_not_get_at_it(served):
    body = b'{"prompt": "once", "max_tokens": 2}'
    assert post(served, "/v1/completions", body, **{"Content-Type": "text/plain"})[0] == 415
    assert post(served, "/v1/completions", body, Host="example.org")[0] == 400
    assert post(served, "/v1/completions", body, **{"Content-Type": "application/json; charset=utf-8"})[0] == 200


def test_a_body_without_an_end_is_refused(served, monkeypatch):
    monkeypatch.setattr("ulbq.serving.app._LONGEST_BODY", 1000)
    status, answer = post(served, "/v1/completions", json.dumps({"prompt": "a" * 2000}).encode())
    assert (status, json.loads(answer)["error"]["type"]) == (413, "invalid_request_error")


def test_a_model_without_a_template_takes_texts_alone(served, monkeypatch):
    monkeypatch.setattr(served.generator.tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="has no chat template"):
        chat(served.client)
    assert complete(served.client).choices[0].text


def test_many_at_once_get_each_their_own(client):
    prompts = [f"{number} times" for number in range(6)]
    expected = [complete(client, prompt=one).choices[0].text for one in prompts]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda one: complete(client, prompt=one).choices[0].text, prompts))
    assert found == expected


def test_an_error_on_the_way_is_told(served, monkeypatch):
    write = served.generator.write

    def fail(tokens: Any, settings: Any, stream: Any) -> Any:
        write(tokens, {**settings, "max_new_tokens": 3}, stream)
        raise NumericsError("The numbers went wrong.")

    monkeypatch.setattr(served.generator, "write", fail)
    with pytest.raises(openai.InternalServerError, match="The numbers went wrong") as caught:
        complete(served.client)
    assert caught.value.body["type"] == "server_error"
    with pytest.raises(openai.APIError, match="The numbers went wrong"):
        list(complete(served.client, stream=True))
    monkeypatch.undo()
    assert complete(served.client).choices[0].text


def test_a_defect_is_told_and_the_next_request_is_answered(served, monkeypatch):
    def fail(*given: Any) -> Any:
        raise ZeroDivisionError("by zero")

    with monkeypatch.context() as patch:
        patch.setattr(served.generator, "write", fail)
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError: by zero"):
            complete(served.client)
        with pytest.raises(openai.APIError, match="ZeroDivisionError: by zero"):
            list(complete(served.client, stream=True))
    assert complete(served.client).choices[0].text


@pytest.fixture
def written(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of tokens of the answers that were begun, slowed down so that there is time to leave."""
    counts: list[int] = []
    write = served.generator.write

    def slow(tokens: Any, settings: Any, stream: Any) -> Any:
        put = stream.put

        def late(value: Any) -> None:
            time.sleep(0.02)
            put(value)

        stream.put = late
        ending = write(tokens, settings, stream)
        counts.append(stream.new_tokens)
        return ending

    monkeypatch.setattr(served.generator, "write", slow)
    return counts


def test_who_leaves_a_stream_stops_the_answer(client, written):
    stream = complete(client, max_tokens=LONG, stream=True)
    next(iter(stream))
    stream.close()
    complete(client, max_tokens=1)
    assert written[0] < LONG / 2
    assert written[1] == 1


def test_who_hangs_up_stops_the_answer_and_one_that_waits_is_never_begun(served, written):
    body = json.dumps({"prompt": PROMPT, "max_tokens": LONG})
    connections = [http.client.HTTPConnection("127.0.0.1", served.port) for _ in range(2)]
    for connection in connections:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        time.sleep(0.2)
    for connection in reversed(connections):
        connection.close()
    assert complete(served.client, max_tokens=1).usage.completion_tokens == 1
    assert [written[0] < LONG / 2, written[1:]] == [True, [1]]


def test_who_leaves_in_the_middle_of_a_request_is_no_defect(served, caplog):
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
        time.sleep(0.2)
    assert complete(served.client, max_tokens=1).choices
    assert [one for one in caplog.records if one.levelname == "ERROR"] == []


def test_a_line_for_each_answer(served):
    del served.notes[:]
    complete(served.client, max_tokens=3)
    list(complete(served.client, max_tokens=1, stream=True))
    assert [note.partition(":")[0] for note in served.notes] == ["16 tokens in, 3 out", "16 tokens in, 1 out"]
    assert "tokens per second" in served.notes[0]
