"""What a model writes on from a prompt, and how fast it decodes: for people to judge it and its parent side by side."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ulbq import runtime
from ulbq.blockwise.streamed import whole_model
from ulbq.config.run import Template
from ulbq.data.prompts import prompt_tokens
from ulbq.evaluation.results import Continuation
from ulbq.models.decoding import TextStream, greedy, write_on
from ulbq.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ulbq.blockwise.streamed import AnyModel

NEW_TOKENS = 32
"""The most that is written where nothing else is asked: two lines, enough to judge a model by."""


def opening(prompt: str, tokenizer: "PreTrainedTokenizerBase", template: Template | None) -> list[int]:
    """Tokens of a prompt: as a question in a layout, or as bare text where ``template`` is None.

    Raises:
        UsageError: a chat template that the tokenizer does not have.
        InputError: the chat template refuses the prompt.
    """
    if template is None:
        return list(tokenizer.encode(prompt))
    return prompt_tokens(template, prompt, tokenizer, where="`prompts`")


def continue_prompts(
    model: "AnyModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    *,
    template: Template | None = None,
    new_tokens: int = NEW_TOKENS,
    cuda_graphs: bool = True,
    progress: Progress | None = None,
    label: str = "the model",
) -> tuple[Continuation, ...]:
    """Let a model go on greedily from each prompt.

    Each prompt is written on from twice. The text is the first one's, which warms up kernels and caches; the second one
    is timed, and writes ``new_tokens`` tokens whether or not the model ends its text before: so two models that say
    differently much are timed over as many tokens.

    Args:
        model: in eval mode, on its device.
        tokenizer: the model's own.
        prompts: texts.
        template: how they are laid out; None: as bare text.
        new_tokens: the most that are written.
        cuda_graphs: as of :func:`~ulbq.models.decoding.write_on`.
        progress: told about every prompt.
        label: what the progress calls the model.

    Raises:
        UsageError, InputError: as :func:`opening`.
        NumericsError, ResourceError: as of :func:`~ulbq.models.decoding.write_on`.
    """
    found, whole, device = [], whole_model(model), runtime.describe_device(model.device)
    if whole is not model:
        device += ", blocks read from disk"
    with (progress or Silent()).phase(f"Prompts continued by {label}", len(prompts)) as phase:
        for prompt in prompts:
            tokens = opening(prompt, tokenizer, template)
            written, timed = TextStream(tokenizer), TextStream(tokenizer)
            for least, stream in ((0, written), (new_tokens, timed)):
                settings = greedy(new_tokens, at_least=least)
                write_on(whole, tokenizer, tokens, settings, stream, cuda_graphs=cuda_graphs)
            found.append(
                Continuation(
                    prompt=prompt,
                    template=template,
                    text=written.text,
                    new_tokens=written.new_tokens,
                    timed_tokens=timed.new_tokens,
                    tokens_per_second=timed.tokens_per_second,
                    device=device,
                )
            )
            phase.advance()
    return tuple(found)
