"""Answers of one model to many who ask: one after the other, in the order in which they came."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ulbq import runtime
from ulbq.errors import ResourceError
from ulbq.models.decoding import Ending, TextStream
from ulbq.serving.generator import TextGenerator


@dataclass
class AnswerJob:
    """One answer that is wanted.

    Attributes:
        tokens: of the prompt.
        settings: as of :meth:`TextGenerator.settings`.
        stops: strings that end it.
        seed: of its draws; None goes on with those of the answer before.
        ending: why it ended; ``stop`` before.
        new_tokens: how many there are so far.
    """

    tokens: list[int]
    settings: dict[str, Any]
    stops: Sequence[str] = ()
    seed: int | None = None
    ending: Ending = field(default="stop", init=False)
    stream: TextStream | None = field(default=None, init=False)

    @property
    def new_tokens(self) -> int:
        """Tokens of the answer so far."""
        return max(self.stream.new_tokens, 0) if self.stream else 0


class Worker:
    """Does one job after the other. One thread computes, always the same.

    Args:
        generator: with its model loaded.
    """

    def __init__(self, generator: TextGenerator) -> None:
        self.generator = generator
        self._thread = ThreadPoolExecutor(1, "generator")
        self._waiting: set[TextStream] = set()
        self._closed = False

    async def answer(self, job: AnswerJob) -> AsyncIterator[str]:
        """Pieces of the answer as they come. Whoever closes this iterator before its end stops the answer.

        Raises:
            ResourceError: the server is being stopped.
            NumericsError: the model's predictions are not finite.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def hand_on(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        job.stream = stream = TextStream(self.generator.tokenizer, hand_on, job.stops)
        self._waiting.add(stream)
        stream.stopped = self._closed
        work = loop.run_in_executor(self._thread, self._write, job, stream, hand_on)
        work.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may wait for it any more
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            job.ending = await work
        finally:
            stream.stopped = True
            self._waiting.discard(stream)
        if self._closed:
            raise ResourceError("The server is being stopped.")

    def close(self) -> None:
        """Stop the answer that is being written, and all that wait."""
        self._closed = True
        for stream in self._waiting:
            stream.stopped = True

    def _write(self, job: AnswerJob, stream: TextStream, hand_on: Any) -> Ending:
        try:
            if stream.stopped:
                return "stop"
            if job.seed is not None:
                runtime.seed_everything(job.seed)
            return self.generator.write(job.tokens, job.settings, stream)
        finally:
            hand_on(None)
