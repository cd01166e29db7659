"""``generate``: a model goes on from a prompt, and tells how fast it was and what it held in memory."""

from collections.abc import Callable

import torch

from ulbq import runtime
from ulbq.artifacts.records import Record
from ulbq.config.generate import GenerateRequest
from ulbq.models.decoding import TextStream, check_room
from ulbq.models.load import model_memory
from ulbq.progress import Progress, Silent
from ulbq.serving.generator import TextGenerator


class Generation(Record):
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
    generator = TextGenerator(request, progress)
    if request.chat:
        tokens = generator.chat_tokens([{"role": "user", "content": request.prompt}])
    else:
        tokens = generator.text_tokens(request.prompt)
    source = generator.source
    check_room(source, len(tokens), request.max_new_tokens)
    model = generator.load(progress)
    stream = TextStream(generator.tokenizer, on_text)
    generator.write(tokens, generator.settings(request.max_new_tokens, chat=request.chat), stream)
    memory = model_memory(model)
    used = sorted({tensor.device for tensor in (*model.parameters(), *model.buffers())}, key=str, reverse=True)
    gpus = [device for device in used if device.type == "cuda"]
    return Generation(
        model=source.name,
        device=" and ".join(runtime.describe_device(device) for device in used),
        text=stream.text,
        prompt_tokens=len(tokens),
        new_tokens=stream.new_tokens,
        prefill_seconds=round(stream.prefill_seconds, 4),
        decode_seconds=round(stream.decode_seconds, 4),
        tokens_per_second=stream.tokens_per_second,
        weight_memory=memory.weights,
        cache_memory=memory.cache,
        peak_memory=runtime.peak_memory(),
        device_memory=sum(map(torch.cuda.max_memory_allocated, gpus)) if gpus else None,
    )
