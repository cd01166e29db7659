"""A model with its tokenizer, ready to go on from one prompt after another."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ulbq import runtime
from ulbq.config.generate import GenerationSettings
from ulbq.data.prompts import render_chat
from ulbq.errors import InputError, UsageError
from ulbq.models.decoding import Ending, TextStream, check_prompt, greedy, write_on
from ulbq.models.load import DTYPES
from ulbq.models.source import resolve
from ulbq.models.spread import load_spread
from ulbq.progress import Progress

_CHAT_PENALTY = 1.1  # of repetitions in an answer


class TextGenerator:
    """A model that writes. Its weights are read by :meth:`load`, so that a prompt can be refused before.

    Args:
        request: which model, and how it is to write.
        progress: told how it goes.

    Attributes:
        source: the model's files.
        tokenizer: the model's own.
        model: None before :meth:`load`.
        devices: where it may lie; it computes on the first where that has room for it.

    Raises:
        UsageError: options that do not go together.
        InputError: a source that is no model.
        ResourceError: the model or the device is not to be had.
    """

    def __init__(self, request: GenerationSettings, progress: Progress) -> None:
        if request.temperature == 0 and request.top_p is not None:
            raise UsageError(
                "`temperature=0` takes the likeliest token, and `top_p` has nothing to draw from.",
                hint="Leave one of them out.",
            )
        self._request = request
        self.devices = runtime.resolve_devices(request.device)
        self.source = resolve(request.source, offline=request.offline, verify=request.verify)
        self.source.tell(progress)
        self.tokenizer: PreTrainedTokenizerBase = self.source.tokenizer()
        self.model: PreTrainedModel | None = None

    def load(self, progress: Progress) -> PreTrainedModel:
        """Read the weights. Raises InputError, or ResourceError where memory does not hold them."""
        with progress.phase(f"Loading {self.source.name}"):
            self.model = load_spread(
                self.source,
                self.devices,
                dtype=DTYPES[self._request.dtype],
                adapter=self._request.adapter,
                prefill_cache=self._request.prefill_cache,
            )
        runtime.seed_everything(self._request.seed)
        return self.model

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer that the model holds together; None where it sets no limit."""
        most: int | None = getattr(self.source.config.get_text_config(), "max_position_embeddings", None)
        return most

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def text_tokens(self, prompt: str) -> list[int]:
        """Tokens of a text to go on from. Raises UsageError."""
        check_prompt(prompt)
        return list(self.tokenizer.encode(prompt))

    def chat_tokens(self, messages: Sequence[Mapping[str, str]], *, alone: bool = True) -> list[int]:
        """Tokens of a chat, with the beginning of an answer behind them.

        Args:
            messages: each with ``role`` and ``content``; at least one.
            alone: as of :func:`~ulbq.data.prompts.render_chat`.

        Raises:
            UsageError: the last message is empty, or no UTF-8.
            InputError: the model has no chat template, or it refuses the chat.
        """
        check_prompt(messages[-1]["content"])
        hint = "Leave out `chat`: the model goes on from the bare text."
        if not self.chats:
            raise InputError(f"'{self.source.given}' has no chat template.", hint=hint)
        chat = [dict(one) for one in messages]
        where = f"'{self.source.given}'"
        text = render_chat(chat, self.tokenizer, ask=True, where=where, hint=hint, alone=alone)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def settings(
        self,
        max_new_tokens: int,
        *,
        chat: bool,
        temperature: float | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
    ) -> dict[str, Any]:
        """How many tokens, and how each is chosen; a model's own generation settings have no say in it.

        Args:
            max_new_tokens: at most so many.
            chat: whether it is an answer.
            temperature, top_p, repetition_penalty: as in the request where None.
        """
        asked = self._request
        penalty = repetition_penalty or asked.repetition_penalty or (_CHAT_PENALTY if chat else 1.0)
        plain = {**greedy(max_new_tokens), "repetition_penalty": penalty}
        temperature = asked.temperature if temperature is None else temperature
        top_p = asked.top_p if top_p is None else top_p
        if temperature == 0 or (temperature is None and top_p is None):
            return plain
        drawn = {"temperature": 1.0 if temperature is None else temperature, "top_p": 1.0 if top_p is None else top_p}
        return {**plain, "do_sample": True, **drawn}

    def write(self, tokens: Sequence[int], settings: dict[str, Any], stream: TextStream) -> Ending:
        """Go on from a prompt, as :func:`~ulbq.models.decoding.write_on`; the model is loaded."""
        if self.model is None:
            raise RuntimeError("the model is not loaded")
        graphs = self._request.cuda_graphs
        return write_on(self.model, self.tokenizer, tokens, settings, stream, cuda_graphs=graphs)
