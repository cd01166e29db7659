"""How well models chat beside the default model, their parent: 24 questions, answered greedily by the parent.

``KL`` is the mean divergence of a model's predictions from the parent's over the tokens of the parent's answers, in
nats; ``first`` that of each answer's first token alone. ``empty`` counts the questions that a model's own answer says
nothing to, ``loops`` those whose answer says the same four words three times. Its answers to the first five are shown.

python benchmarks/chat.py SOURCE [SOURCE ...]
"""

import argparse
from collections import Counter
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ulbq.data.prompts import prompt_tokens
from ulbq.models.decoding import TextStream, greedy, write_on
from ulbq.models.load import load_model
from ulbq.models.source import default_model, resolve
from ulbq.runtime import calm_threads

QUESTIONS = (
    "What is the capital of France?",
    "Explain photosynthesis in simple terms.",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "What is 12 times 7?",
    "Give me three tips for better sleep.",
    "Write a Python function that adds two numbers.",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' into Spanish.",
    "What causes rain?",
    "Name five animals that live in Africa.",
    "Write an email to my boss asking for a day off.",
    "What is machine learning?",
    "Tell me a joke.",
    "How far is the Moon from the Earth?",
    "Summarize the story of Cinderella.",
    "What should I cook for dinner tonight?",
    "Why is the sky blue?",
    "List the planets of the solar system.",
    "How can I learn to play the guitar?",
    "What is the difference between a virus and a bacterium?",
    "Describe a sunny day in the mountains.",
    "What is the largest ocean?",
    "How do airplanes fly?",
)
SHOWN, ANSWER = 5, 48


class Asked(NamedTuple):
    """A question with the parent's answer.

    Attributes:
        tokens: of both, ``[1, n]``.
        start: where the answer begins.
        predictions: the parent's log-probabilities of the answer's tokens, ``[n - start, vocabulary]``.
    """

    tokens: torch.Tensor
    start: int
    predictions: torch.Tensor


def predictions(model: PreTrainedModel, tokens: torch.Tensor, start: int) -> torch.Tensor:
    """Log-probabilities of the tokens from ``start`` on, ``[n - start, vocabulary]``."""
    return model(tokens).logits[0, start - 1 : -1].float().log_softmax(-1)


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> str:
    """What a model answers, special tokens left out."""
    stream = TextStream(tokenizer)
    write_on(model, tokenizer, prompt, greedy(ANSWER), stream)
    return stream.text


def loops(text: str) -> bool:
    """Whether a text says the same four words three times."""
    words = text.split()
    return max(Counter(zip(words, words[1:], words[2:], words[3:], strict=False)).values(), default=0) >= 3


@torch.inference_mode()
def main() -> None:
    """Print a line for each model, and some of its answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    options = parser.parse_args()
    calm_threads()
    source = default_model(offline=True)
    tokenizer = source.tokenizer()
    prompts = [prompt_tokens("chat", question, tokenizer, where="the default model") for question in QUESTIONS]
    parent = load_model(source, dtype=torch.bfloat16)
    asked = []
    for prompt in prompts:
        said = tokenizer.encode(answer(parent, tokenizer, prompt), add_special_tokens=False)
        tokens = torch.tensor([[*prompt, *said]])
        asked.append(Asked(tokens, len(prompt), predictions(parent, tokens, len(prompt))))
    for name in options.sources:
        model = load_model(resolve(name), dtype=torch.bfloat16)
        found = []
        for one in asked:
            own = predictions(model, one.tokens, one.start)
            found.append((one.predictions.exp() * (one.predictions - own)).sum(-1))
        first = torch.stack([each[0] for each in found]).mean().item()
        answers = [answer(model, tokenizer, prompt) for prompt in prompts]
        empty = sum(not each.strip() for each in answers)
        looping = sum(map(loops, answers))
        mean = torch.cat(found).mean().item()
        print(f"{name}: KL {mean:.3f}, first {first:.3f}, empty {empty}, loops {looping} of {len(prompts)}")
        for question, each in zip(QUESTIONS[:SHOWN], answers, strict=False):
            print(f"  {question} {each.strip()!r}", flush=True)


if __name__ == "__main__":
    main()
