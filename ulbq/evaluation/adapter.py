"""Our language models behind lm-eval's model interface.

lm-eval's own Hugging Face wrapper would do, but for four things that matter here. It takes the likelihoods of a bf16
model in bf16, which ties answers that are not tied. It computes the logits of whole prompts, gigabytes of them, where
only the answers' are wanted. It finds its batch size by running out of memory, which on a CPU ends the process. And it
prints to standard output.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from ulbq.evaluation.lm import LanguageModel

_NEW_TOKENS = 256  # longest answer where a task names none; lm-eval's own default
_SAMPLING_ONLY = ("temperature", "top_p", "top_k", "min_p")


def lm_eval_model(language_model: LanguageModel) -> Any:
    """An ``lm_eval.api.model.TemplateLM`` that answers with the given model."""
    # The class stands inside a function because lm-eval need not be installed.
    from lm_eval.api.model import TemplateLM

    class Adapter(TemplateLM):  # type: ignore[misc]
        tokenizer = language_model.tokenizer
        max_length = language_model.max_length
        eot_token_id = language_model.end_token
        prefix_token_id = language_model.first_token

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return language_model.encode(string, special=add_special_tokens)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return language_model.score([(before, answer) for _, before, answer in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            return _rolling(language_model, [request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            return _answers(language_model, [request.args for request in requests])

    return Adapter()


def _rolling(language_model: LanguageModel, texts: Sequence[str]) -> list[float]:
    """Log-likelihood of whole texts, in windows of the model's longest input, each token predicted once."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    def windows() -> Iterator[tuple[int, tuple[list[int], list[int]]]]:
        for number, text in enumerate(texts):
            tokens = language_model.encode(text)
            for window in get_rolling_token_windows(
                tokens, language_model.first_token, language_model.max_length, context_len=1
            ):
                yield number, make_disjoint_window(window)

    pieces = list(windows())
    totals = [0.0] * len(texts)
    for (number, _), (score, _) in zip(pieces, language_model.score([pair for _, pair in pieces]), strict=True):
        totals[number] += score
    return totals


def _answers(language_model: LanguageModel, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Answers to prompts, each with lm-eval's own settings; prompts with equal ones are answered together."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

    texts = [""] * len(requests)
    order = sorted(range(len(requests)), key=lambda number: repr(requests[number][1]))
    for _, same in groupby(order, key=lambda number: repr(requests[number][1])):
        numbers = list(same)
        settings: dict[str, Any] = dict(normalize_gen_kwargs(requests[numbers[0]][1], _NEW_TOKENS))
        stops = handle_stop_sequences(settings.pop("until", None), eos=language_model.decode(language_model.end_token))
        new_tokens = int(settings.pop("max_gen_toks"))
        if not settings.get("do_sample"):
            settings = {name: value for name, value in settings.items() if name not in _SAMPLING_ONLY}
        prompts = [requests[number][0] for number in numbers]
        written = language_model.write(prompts, stops=stops, new_tokens=new_tokens, sampling=settings)
        for number, text in zip(numbers, written, strict=True):
            texts[number] = postprocess_generated_text(text, stops, None)
    return texts
