"""How texts begin that a model writes itself.

What a text begins with decides what it becomes, and samples want variety. A text opens with any token of the vocabulary
(code, lists and other languages get their turn), with a capitalised word (prose), or as a question in the model's chat
template, where it has one, as most people will talk to it.
"""

from typing import TYPE_CHECKING

import torch
from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\u2402question\u2403"
"""Stands for what a user asks while the template around it is looked for."""


class Openings:
    """Draws openings for a tokenizer's model.

    Args:
        tokenizer: the model's.
        vocabulary: size of the model's embedding; tokens beyond it are never taken.
        limit: the most tokens of an opening; a template that leaves less room is not used.

    Attributes:
        banned: bool ``[vocabulary]``, tokens that are no text.
        chat: tokens of the template before a question; empty where there is no template that can be used.
        answering: ids of the special tokens between a question and its answer, which chats may hold.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", vocabulary: int, limit: int) -> None:
        self.banned = torch.ones(vocabulary, dtype=torch.bool)
        self._tokens = text_tokens(tokenizer, vocabulary)
        self.banned[self._tokens] = False
        self._words = _capitalised(tokenizer, self._tokens)
        before, behind = _around_a_question(tokenizer)
        fits = 0 < len(before) < limit and max(before + behind) < vocabulary
        self.chat = before if fits else []
        self.answering = [index for index in behind if fits and self.banned[index]]

    def draw(self, count: int, generator: torch.Generator) -> list[list[int]]:
        """``count`` openings, the kinds in turns."""
        kinds = [self._any, self._word] + [self._question] * bool(self.chat)
        return [kinds[index % len(kinds)](generator) for index in range(count)]

    def _any(self, generator: torch.Generator) -> list[int]:
        return [_one(self._tokens, generator)]

    def _word(self, generator: torch.Generator) -> list[int]:
        return [_one(self._words, generator)]

    def _question(self, generator: torch.Generator) -> list[int]:
        return [*self.chat, _one(self._words, generator)]


def _one(tokens: torch.Tensor, generator: torch.Generator) -> int:
    return int(tokens[torch.randint(len(tokens), (), generator=generator)])


def text_tokens(tokenizer: "PreTrainedTokenizerBase", vocabulary: int) -> torch.Tensor:
    """Ids below ``vocabulary`` of every token that is not special, int64, ascending."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added.union(tokenizer.all_special_ids)
    return torch.tensor(
        [index for index in range(min(len(tokenizer), vocabulary)) if index not in special], dtype=torch.int64
    )


def _capitalised(tokenizer: "PreTrainedTokenizerBase", tokens: torch.Tensor) -> torch.Tensor:
    """Those of the tokens that decode to a capital and more letters behind it; all of them where none does."""
    texts = tokenizer.batch_decode(tokens.unsqueeze(1))
    words = [index for index, text in zip(tokens.tolist(), texts, strict=True) if _is_word(text)]
    return torch.tensor(words) if words else tokens


def _is_word(text: str) -> bool:
    return len(text) > 1 and text.isalpha() and text.istitle()


def _around_a_question(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Tokens of the chat template before a question, and those from its end to the answer; empty without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return [], []
    asked = [{"role": "user", "content": _MARK}]
    try:
        text = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    except TemplateError:  # one that wants more than a question is no template for this
        return [], []
    before, found, behind = text.partition(_MARK)
    if not found:
        return [], []
    return tuple(tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, behind))
