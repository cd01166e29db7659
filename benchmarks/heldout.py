"""Perplexity on a text that no choice has seen: 12 windows of 1024 tokens of WikiText-2 ``test``, bfloat16.

They are the windows behind the first 32, on which the other benchmarks measure: in a mirror that has parts of the set
alone, ``validation`` may be the beginning of ``test``.

python benchmarks/heldout.py SOURCE [SOURCE ...]
"""

import argparse

import torch

from ulbq.data.registry import texts
from ulbq.data.windows import token_stream
from ulbq.evaluation.perplexity import perplexity
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.runtime import calm_threads

WINDOWS, CONTEXT, MEASURED = 12, 1024, 32


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    options = parser.parse_args()
    calm_threads()
    for name in options.sources:
        source = resolve(name)
        tokens = token_stream(texts("wikitext2", "test"), source.tokenizer(), (MEASURED + WINDOWS) * CONTEXT)
        windows = tokens.view(-1, CONTEXT)[MEASURED:]
        model = load_model(source, dtype=torch.bfloat16)
        print(name, round(perplexity(model, windows, batch_size=2).value, 2), flush=True)


if __name__ == "__main__":
    main()
