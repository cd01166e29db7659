"""What token samples hold: scripts, special tokens, repetitions."""

import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RUN = 16
"""Tokens of the runs that are looked for a second time."""

_REPETITIVE = 0.25
_FEWEST = 4  # tokens a value of the hidden state: with fewer, second moments of layers' inputs are mostly noise
_SHOWN = 0.005  # share of letters from which a script is named
_PRIME = 1_000_003
# First words of characters' names that are no script's own.
_SCRIPTS = {"CJK": "Han", "FULLWIDTH": "Latin", "HALFWIDTH": "Katakana", "MODIFIER": "Latin", "MICRO": "Greek"}


@dataclass(frozen=True)
class Contents:
    """What samples hold.

    Attributes:
        tokens: of all samples together, those that are held out among them.
        scripts: share of each script among the letters, the most frequent first; rare ones are left out.
        special: share of the tokens that are special ones.
        repeated: share of all runs of :data:`RUN` tokens that occurred before.
        chats: share of the text that is chats; None where nobody counted.
    """

    tokens: int
    scripts: dict[str, float]
    special: float
    repeated: float
    chats: float | None = None

    @property
    def words(self) -> str:
        """``24,576 tokens; letters Latin 99%, Greek 1%; 0.1% special tokens; 2.0% of runs of 16 tokens repeated``."""
        letters = ", ".join(f"{script} {share:.0%}" for script, share in self.scripts.items())
        parts = [f"{self.tokens:,} tokens", f"letters {letters}" if letters else "no letters"]
        parts += [f"{self.special:.1%} special tokens", f"{self.repeated:.1%} of runs of {RUN} tokens repeated"]
        return "; ".join(parts + ([f"{self.chats:.0%} chats"] if self.chats else []))

    def record(self) -> dict[str, Any]:
        """For the manifest; shares to four places."""
        shares = {"special": self.special, "repeated": self.repeated, "chats": self.chats}
        known = {name: round(share, 4) for name, share in shares.items() if share is not None}
        return {"tokens": self.tokens, "scripts": {name: round(s, 4) for name, s in self.scripts.items()}, **known}

    def warnings(self, hidden_size: int) -> list[str]:
        """What a person must know before a model with so wide a hidden state is calibrated on it."""
        found = []
        if self.chats == 1.0:
            found.append(
                "The calibration holds chats alone: what the model knows of other text may suffer. Plain text beside "
                "them, as in `calibration=chats.jsonl,wikitext2`, guards it."
            )
        if self.tokens < _FEWEST * hidden_size:
            found.append(
                f"The calibration holds {self.tokens:,} tokens, few for a model with {hidden_size:,} values a token: "
                "give more `samples`, or longer ones."
            )
        if self.repeated > _REPETITIVE:
            found.append(
                f"The calibration repeats itself: {self.repeated:.0%} of its runs of {RUN} tokens occurred before. "
                "Give more text, or other text."
            )
        return found


def contents(tokens: torch.Tensor, tokenizer: "PreTrainedTokenizerBase", chats: float | None = None) -> Contents:
    """Look at samples, int64 ``[samples, length]``.

    Args:
        tokenizer: the model's.
        chats: share of the text that is chats, where it is known.
    """
    special = torch.tensor(sorted(_special(tokenizer)), dtype=tokens.dtype)
    return Contents(
        tokens=tokens.numel(),
        scripts=scripts(tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True)),
        special=float(torch.isin(tokens, special).float().mean()),
        repeated=repeated(tokens),
        chats=chats,
    )


def scripts(texts: list[str]) -> dict[str, float]:
    """Share of each script among the letters of texts, by the first word of Unicode's name for each letter."""
    counts: Counter[str] = Counter()
    for character, count in Counter("".join(texts)).items():
        if character.isalpha():
            word = unicodedata.name(character, "").partition(" ")[0]
            counts[_SCRIPTS.get(word, word.title())] += count
    whole = counts.total()
    return {script: count / whole for script, count in counts.most_common() if count >= _SHOWN * whole}


def repeated(tokens: torch.Tensor) -> float:
    """Share of all runs of :data:`RUN` tokens that occurred before, at whatever place; by a 64-bit hash of each."""
    length = min(RUN, tokens.shape[1])
    runs = tokens.shape[1] - length + 1
    digest = torch.zeros(len(tokens), runs, dtype=torch.int64)
    for place in range(length):
        digest = digest * _PRIME + tokens[:, place : place + runs] + 1  # wraps around, as it may
    return 1.0 - float(torch.unique(digest).numel() / digest.numel())


def _special(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
