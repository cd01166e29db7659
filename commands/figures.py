"""What a generation took, as people read it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .progress import duration

if TYPE_CHECKING:
    from ulbq.pipeline.generate import Generation


def summary(done: "Generation") -> Iterator[str]:
    """Speed and memory, a line each."""
    first = f"the first after {done.prompt_tokens:,} of the prompt in {done.prefill_seconds:.2f} s"
    if done.tokens_per_second is None:
        yield f"{done.new_tokens} token, {first}."
    else:
        pace = f"{done.new_tokens:,} tokens, {first}, the others in {duration(done.decode_seconds)}"
        yield f"{pace}: {done.tokens_per_second:.1f} tokens per second ({done.device})."
    held = f"Weights {_megabytes(done.weight_memory)}"
    if done.cache_memory:
        held += f", prefill cache {_megabytes(done.cache_memory)}"
    if done.device_memory is not None:
        held += f", at most {_megabytes(done.device_memory)} on the device"
    yield f"{held}; the process at most {_megabytes(done.peak_memory)}."


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
