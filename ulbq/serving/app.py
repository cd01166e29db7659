"""The requests that are taken, by OpenAI's API: chats, texts and the list of the one model that there is."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ulbq.errors import InputError, UlbqError, UsageError
from ulbq.progress import Progress
from ulbq.serving.bodies import ChatBody, CompletionBody, GenerationBody
from ulbq.serving.objects import CHAT, TEXT, Envelope, Kind, error_object, event, model_object, usage
from ulbq.serving.worker import AnswerJob, Worker

_LONGEST_BODY = 16 << 20  # bytes
_MOST_TOKENS = 2**31 - 1
# Of pydantic's errors, in this program's words.
_SENTENCES = {"json_invalid": "The body is no JSON", "extra_forbidden": "There is no such field here"}
_UNION_ARM = re.compile(r"str$|list\[")
_HUNG_UP = 499  # as nginx logs it; nobody reads it

_Body = TypeVar("_Body", bound=GenerationBody)


class RefusedError(Exception):
    """A request that is not as it should be.

    Attributes:
        status: of HTTP.
        param: the field that is wrong.
        code: what OpenAI's clients tell errors by.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class Limits(NamedTuple):
    """What requests may ask for.

    Attributes:
        model: name of the model.
        max_new_tokens: of one answer; None where only the model's context bounds it.
        hosts: names by which the server may be asked; ``*`` is any.
    """

    model: str
    max_new_tokens: int | None
    hosts: tuple[str, ...]


_EXPLAINED = (HTTPException, ClientDisconnect, RefusedError, ValidationError, UlbqError, Exception)


def build_app(worker: Worker, limits: Limits, progress: Progress) -> Starlette:
    """The application, for any server that speaks ASGI.

    Args:
        worker: where answers come from.
        limits: what requests may ask for.
        progress: told of every answer.
    """
    endpoints = _Endpoints(worker, limits, progress)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
            Route("/v1/completions", endpoints.completion, methods=["POST"]),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{name:path}", endpoints.model),
            Route("/health", _health),
        ],
        # A page of the web may lead its own name here; it is not to use the model of whoever looks at it.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(limits.hosts), www_redirect=False)],
        # Of what none of the others is, Starlette lets the server log the traceback as well.
        exception_handlers=dict.fromkeys(_EXPLAINED, _explain),
    )


class _Endpoints:
    """Where requests come in."""

    def __init__(self, worker: Worker, limits: Limits, progress: Progress) -> None:
        self._worker = worker
        self._limits = limits
        self._progress = progress
        self._started = int(time.time())

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_object(self._limits.model, self._started)]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(model_object(self._limits.model, self._started))

    async def chat(self, request: Request) -> Response:
        asked = await self._read(request, ChatBody)
        messages = [message.for_template() for message in asked.messages]
        return await self._answer(request, asked, self._worker.generator.chat_tokens(messages, alone=False), CHAT)

    async def completion(self, request: Request) -> Response:
        asked = await self._read(request, CompletionBody)
        return await self._answer(request, asked, self._worker.generator.text_tokens(asked.prompt), TEXT)

    async def _read(self, request: Request, kind: type[_Body]) -> _Body:
        """A request's body. Raises RefusedError, or ValidationError where it is no JSON or not as it should be."""
        # Other types of content a page of the web may send without being asked whether it may.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusedError("The Content-Type is not application/json.", status=415)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > _LONGEST_BODY:
                raise RefusedError(f"The body is larger than {_LONGEST_BODY >> 20} MiB.", status=413)
        asked = kind.model_validate_json(bytes(body))
        self._check_model(asked.model)
        return asked

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._limits.model):
            message = f"There is no model '{name}' here; there is '{self._limits.model}'."
            raise RefusedError(message, status=404, param="model", code="model_not_found")

    async def _answer(self, request: Request, asked: GenerationBody, tokens: list[int], kind: Kind) -> Response:
        settings = self._worker.generator.settings(
            self._room(asked.limit, len(tokens)),
            chat=kind is CHAT,
            temperature=asked.temperature,
            top_p=asked.top_p,
            repetition_penalty=asked.repetition_penalty,
        )
        job = AnswerJob(tokens, settings, asked.stop or (), asked.seed)
        envelope = Envelope(kind, self._limits.model)
        if asked.stream:
            events = self._events(job, envelope, with_usage=asked.with_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return await _unless_hung_up(request, self._whole(job, envelope))

    def _room(self, wanted: int | None, prompt: int) -> int:
        """New tokens that an answer may have. Raises RefusedError where that is none, or fewer than are wanted."""
        allowed, context = self._limits.max_new_tokens, self._worker.generator.context
        if wanted is not None and allowed is not None and wanted > allowed:
            message = f"An answer has at most {allowed:,} tokens here, and {wanted:,} are asked for."
            raise RefusedError(message, param="max_tokens")
        left = _MOST_TOKENS if context is None else context - prompt
        if left < (wanted or 1):
            message = f"The model holds {context:,} tokens, and the prompt has {prompt:,}"
            message += f", which leaves {left:,} of the {wanted:,} that are asked for." if left > 0 else "."
            raise RefusedError(message, code="context_length_exceeded")
        return wanted or min(left, allowed or left)

    async def _whole(self, job: AnswerJob, envelope: Envelope) -> Response:
        text = "".join([piece async for piece in self._worker.answer(job)])
        counted = usage(len(job.tokens), job.new_tokens)
        self._tell(job)
        return JSONResponse(envelope.whole(text, job.ending, counted))

    async def _events(self, job: AnswerJob, envelope: Envelope, *, with_usage: bool) -> AsyncIterator[str]:
        for chunk in envelope.opening():
            yield event(chunk)
        try:
            async for piece in self._worker.answer(job):
                yield event(envelope.piece(piece))
        except UlbqError as error:
            # The status is sent by now: what went wrong can only follow the text.
            yield event(error_object(error.message, status=500))
            return
        except Exception as error:
            yield event(error_object(_defect(error), status=500))
            raise
        counted = usage(len(job.tokens), job.new_tokens) if with_usage else None
        for chunk in envelope.closing(job.ending, counted):
            yield event(chunk)
        yield event("[DONE]")
        self._tell(job)

    def _tell(self, job: AnswerJob) -> None:
        if job.stream is None:  # nothing was written
            return
        pace = job.stream.tokens_per_second
        speed = "" if pace is None else f", {pace:.1f} tokens per second"
        self._progress.note(
            f"{len(job.tokens):,} tokens in, {job.new_tokens:,} out: the first after "
            f"{job.stream.prefill_seconds:.2f} s{speed}."
        )


async def _unless_hung_up(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """A response, or none where whoever asked leaves before: the work is stopped then."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=_HUNG_UP)
    finally:
        leaving.cancel()
        working.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _explain(request: Request, error: Exception) -> Response:
    """What went wrong as an error object."""
    param = code = headers = None
    match error:
        case RefusedError():
            status, message, param, code = error.status, str(error), error.param, error.code
        case ValidationError():
            status, (message, param) = 400, _complaint(error)
        case HTTPException():
            status, message, headers = error.status_code, error.detail, error.headers
        case UlbqError():
            status, message = 400 if isinstance(error, (UsageError, InputError)) else 500, error.message
        case ClientDisconnect():
            status, message = _HUNG_UP, "Whoever asked has left."
        case _:
            status, message = 500, _defect(error)
    said = error_object(message, status=status, param=param, code=code)
    return JSONResponse(said, status_code=status, headers=headers)


def _complaint(error: ValidationError) -> tuple[str, str | None]:
    """A sentence, and the field that it is about: of several ways to read a field, that which came farthest."""
    worst = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))
    message = _SENTENCES.get(worst["type"], worst["msg"])
    place = ".".join(part for part in map(str, worst["loc"]) if not _UNION_ARM.match(part))
    return (f"{place}: {message}.", str(worst["loc"][0])) if place else (f"{message}.", None)


def _defect(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
