"""Answers as OpenAI's API lays them out: https://platform.openai.com/docs/api-reference."""

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from ulbq.models.decoding import Ending


class Kind(NamedTuple):
    """A kind of answer.

    Attributes:
        whole, chunk: what an answer, and a piece of one, are called.
        prefix: of their ids.
    """

    whole: str
    chunk: str
    prefix: str


CHAT = Kind("chat.completion", "chat.completion.chunk", "chatcmpl")
TEXT = Kind("text_completion", "text_completion", "cmpl")


class Envelope:
    """What one answer, or all pieces of it, say of themselves."""

    def __init__(self, kind: Kind, model: str) -> None:
        self._kind = kind
        self._head = {"id": f"{kind.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, ending: Ending, usage: Mapping[str, int]) -> dict[str, Any]:
        """An answer in one piece."""
        said: dict[str, Any] = {"text": text}
        if self._kind is CHAT:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return self._object(self._kind.whole, [_choice(said, ending)], usage=usage)

    def opening(self) -> list[dict[str, Any]]:
        """What comes before the first piece."""
        if self._kind is TEXT:
            return []
        return [self._object(self._kind.chunk, [_choice({"delta": {"role": "assistant", "content": ""}}, None)])]

    def piece(self, text: str) -> dict[str, Any]:
        """A piece of the answer."""
        said = {"delta": {"content": text}} if self._kind is CHAT else {"text": text}
        return self._object(self._kind.chunk, [_choice(said, None)])

    def closing(self, ending: Ending, usage: Mapping[str, int] | None) -> list[dict[str, Any]]:
        """What comes after the last piece: why it ended, and the numbers of tokens where they are wanted."""
        last: dict[str, Any] = {"delta": {}} if self._kind is CHAT else {"text": ""}
        chunks = [self._object(self._kind.chunk, [_choice(last, ending)])]
        return chunks if usage is None else [*chunks, self._object(self._kind.chunk, [], usage=usage)]

    def _object(self, name: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self._head, "object": name, "choices": choices, **more}


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Numbers of tokens; one that ended the answer counts."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def model_object(name: str, created: int) -> dict[str, Any]:
    """The model, as ``GET /v1/models`` lists it."""
    return {"id": name, "object": "model", "created": created, "owned_by": "ulbq"}


def error_object(message: str, *, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """What is wrong, as clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(data: Mapping[str, Any] | str) -> str:
    """One server-sent event: an object, or a word."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"


def _choice(said: Mapping[str, Any], ending: Ending | None) -> dict[str, Any]:
    return {"index": 0, **said, "logprobs": None, "finish_reason": ending}
