"""``generate``: a model goes on from a prompt, and tells how fast it was and what it held in memory."""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from ulbq import runtime
from ulbq.config.generate import GenerateRequest
from ulbq.data.prompts import render_chat
from ulbq.errors import InputError, UsageError
from ulbq.models.decoding import TextStream, check_prompt, check_room, greedy, write_on
from ulbq.models.load import load_model, model_memory
from ulbq.models.source import ModelSource, resolve
from ulbq.progress import Progress, Silent

_CHAT_PENALTY = 1.1  # of repetitions in an answer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Generation(BaseModel):
    """What was written, and what it took.

    Attributes:
        model: name of the model.
        device: its name, and the number of threads on a CPU.
        text: what was written, without the prompt.
        prompt_tokens, new_tokens: their numbers; a token that ended the text counts.
        prefill_seconds: from the start to the first new token.
        decode_seconds: from the first new token to the last.
        tokens_per_second: new tokens after the first in ``decode_seconds``; None where there was one only.
        weight_memory: bytes of the model's weights in memory.
        cache_memory: bytes of dense copies that the prefill cache holds beside them; 0 without it.
        peak_memory: largest resident memory of the process, in bytes, all libraries included.
        device_memory: largest memory taken on a GPU, in bytes; None on a CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    device: str
    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float | None
    weight_memory: int
    cache_memory: int
    peak_memory: int
    device_memory: int | None = None


def generate(
    request: GenerateRequest, on_text: Callable[[str], object] = lambda text: None, progress: Progress | None = None
) -> Generation:
    """Go on from a prompt.

    Args:
        request: what to do.
        on_text: called with every piece of text as soon as it is known.
        progress: told how it goes.

    Raises:
        UsageError: options that do not go together, an empty prompt, one that leaves no room for new tokens.
        InputError: a source that is no model, or one without a chat template where that is asked for.
        ResourceError: the model, the device or memory are not to be had.
        NumericsError: the model's predictions are not finite.
    """
    progress = progress or Silent()
    settings = _settings(request)
    device = runtime.resolve_device(request.device)
    source = resolve(request.source, offline=request.offline, verify=request.verify)
    source.tell(progress)
    tokenizer = source.tokenizer()
    tokens = _encode(request, source, tokenizer)
    check_room(source, len(tokens), request.max_new_tokens)
    with progress.phase(f"Loading {source.name}"):
        model = load_model(
            source,
            dtype=DTYPES[request.dtype],
            device=device,
            adapter=request.adapter,
            prefill_cache=request.prefill_cache,
        )
    stream = TextStream(tokenizer, on_text)
    runtime.seed_everything(request.seed)
    write_on(model, tokenizer, tokens, settings, stream)
    memory = model_memory(model)
    return Generation(
        model=source.name,
        device=runtime.describe_device(device),
        text=stream.text,
        prompt_tokens=len(tokens),
        new_tokens=stream.new_tokens,
        prefill_seconds=round(stream.prefill_seconds, 4),
        decode_seconds=round(stream.decode_seconds, 4),
        tokens_per_second=stream.tokens_per_second,
        weight_memory=memory.weights,
        cache_memory=memory.cache,
        peak_memory=runtime.peak_memory(),
        device_memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _settings(request: GenerateRequest) -> dict[str, Any]:
    """How many tokens, and how each is chosen; nothing else of a model's own generation settings has a say in it."""
    temperature = request.temperature
    if temperature == 0 and request.top_p is not None:
        raise UsageError(
            "`temperature=0` takes the likeliest token, and `top_p` has nothing to draw from.",
            hint="Leave one of them out.",
        )
    penalty = request.repetition_penalty or (_CHAT_PENALTY if request.chat else 1.0)
    plain = {**greedy(request.max_new_tokens), "repetition_penalty": penalty}
    if not temperature and request.top_p is None:
        return plain
    return {
        **plain,
        "do_sample": True,
        "temperature": 1.0 if temperature is None else temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
    }


def _encode(request: GenerateRequest, source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    check_prompt(request.prompt)
    if not request.chat:
        return list(tokenizer.encode(request.prompt))
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"'{source.given}' has no chat template.", hint="Leave out `chat`: the model goes on from the bare text."
        )
    messages = [{"role": "user", "content": request.prompt}]
    hint = "Leave out `chat`: the model goes on from the bare text."
    text = render_chat(messages, tokenizer, ask=True, where=f"'{source.given}'", hint=hint)
    return list(tokenizer.encode(text, add_special_tokens=False))
