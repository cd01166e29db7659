"""How a question is laid out for a model to answer: in training, and when it is asked.

Both come from here, so that a model is asked as it was taught. Three layouts:

* ``chat``: the tokenizer's own chat template;
* ``alpaca``: Alpaca's prompt, which LLM-Adapters takes for its arithmetic and commonsense sets, and ApiQ after it;
* ``gsm8k``: the question, then LoftQ's and ApiQ's words, to think step by step and to close with the number. Where
  GSM8K marks the number with ``####``, the answer says "The final answer is: ".

Prompt and answer are tokenised apart, because a prompt stands alone too when the model is asked.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from ulbq.config.run import Template
from ulbq.data.files import ROLES, first, joined_turns
from ulbq.errors import InputError, UsageError
from ulbq.limits import bounded
from ulbq.printable import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FINAL_ANSWER = "The final answer is: "
"""What stands before the number that closes an answer in the layout ``gsm8k``."""

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_GSM8K = "{instruction}\nAnswer the above question. First think step by step and then answer the final number.\n"
_GSM8K_MARK = "#### "

_NEXT: dict[Template, tuple[str, ...]] = {
    "chat": (),
    "alpaca": ("### Instruction", "### Input", "### Response", "Below is an instruction that describes a task"),
    "gsm8k": ("\nAnswer the above question.",),
}


_SOME_TEXT = "\ue000"  # begins like nothing that a template writes

# What a template raises, by its own words or because it is broken, when it is compiled and when it is run.
_TEMPLATE_ERRORS = (
    *(TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, RuntimeError),
    *(SyntaxError, TypeError, ValueError),
)


class Turn(NamedTuple):
    """What one side of a chat said; ``role`` is ``user``, ``assistant`` or ``system``."""

    role: str
    content: str


class Piece(NamedTuple):
    """Tokens, and whether they are learnt."""

    tokens: list[int]
    learnt: bool


def choose_template(asked: Template | None, tokenizer: "PreTrainedTokenizerBase") -> Template:
    """The layout to train with: as asked, else the tokenizer's chat template where it has one, else Alpaca's prompt.

    Raises:
        UsageError: a chat template that the tokenizer does not have.
    """
    has_one = bool(getattr(tokenizer, "chat_template", None))
    if asked == "chat" and not has_one:
        raise UsageError("`template=chat`: the tokenizer has no chat template.", hint="Take `template=alpaca`.")
    return asked or ("chat" if has_one else "alpaca")


def prompt_tokens(
    template: Template, question: str, tokenizer: "PreTrainedTokenizerBase", *, context: str = "", where: str
) -> list[int]:
    """Tokens of a prompt that stands alone: those that stand before the answer in training, and no others.

    Args:
        template: the layout.
        question: what is asked.
        tokenizer: the model's.
        context: Alpaca's ``input``; empty for none.
        where: file and line, for errors.

    Raises:
        UsageError: a chat template that the tokenizer does not have.
        InputError: the chat template refuses the question.
    """
    if template != "chat":
        from ulbq.data.windows import leading_tokens  # not above: a Tab reads names of tasks without torch

        return [*leading_tokens(tokenizer), *_tokens(_prompt(template, question, context), tokenizer)]
    choose_template(template, tokenizer)
    messages = _messages([Turn("user", question)], context)
    opening = _opening(messages, tokenizer, where)
    return _tokens(opening or render_chat(messages, tokenizer, ask=True, where=where), tokenizer)


def lay_out(
    template: Template, turns: Sequence[Turn], tokenizer: "PreTrainedTokenizerBase", *, context: str = "", where: str
) -> list[Piece]:
    """Tokens of a chat that ends with an answer, of which the answers are learnt.

    Args:
        template: the layout; all but ``chat`` hold one question and its answer.
        turns: in order; the last one is the assistant's. Empty answers on the way are not learnt.
        tokenizer: the model's; it has a chat template where the layout is ``chat``.
        context: Alpaca's ``input``; empty for none.
        where: file and line, for errors.

    Raises:
        InputError: the layout cannot hold the chat, or the answer.
    """
    if template == "chat":
        return _chat(turns, tokenizer, context, where)
    if [turn.role for turn in turns] != ["user", "assistant"]:
        raise InputError(
            f"{where}: a chat of more than a question and its answer, which `template={template}` cannot hold.",
            hint="It takes a tokenizer with a chat template.",
        )
    question, answer = (turn.content for turn in turns)
    if template == "gsm8k":
        answer = _with_final_answer(answer, where)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return [
        Piece(prompt_tokens(template, question, tokenizer, context=context, where=where), False),
        Piece([*_tokens(answer, tokenizer), *end], True),
    ]


class ChatWriter:
    """Writes chats of a calibration file as the tokenizer's template has them, where it has one; else what was said.

    Args:
        tokenizer: the model's.

    Attributes:
        written: chats so far.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self.written = 0

    def __call__(self, where: str, turns: Sequence[Any]) -> str | None:
        """The chat as text. Raises InputError where the template refuses it."""
        self.written += 1
        if not getattr(self._tokenizer, "chat_template", None):
            return joined_turns(where, turns)
        sides = [turn for turn in turns if isinstance(turn, Mapping)]
        told = [(first(side, ("role", "from")) or "", first(side, ("content", "value"))) for side in sides]
        messages = [{"role": ROLES.get(role, role), "content": content} for role, content in told if content]
        hint = "Mend the row, or give the text itself in a column 'text'."
        return render_chat(messages, self._tokenizer, ask=False, where=where, hint=hint) if messages else None


def question_frame(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Tokens of the chat template before a user's first message, and between it and the answer.

    Both are empty where there is no template, or none that a message alone satisfies.
    """
    if not getattr(tokenizer, "chat_template", None):
        return [], []
    try:
        text = render_chat([{"role": "user", "content": _SOME_TEXT}], tokenizer, ask=True, where="The model")
    except InputError:
        return [], []
    before, found, between = text.partition(_SOME_TEXT)
    return (_tokens(before, tokenizer), _tokens(between, tokenizer)) if found else ([], [])


def next_question(template: Template) -> tuple[str, ...]:
    """Words that open another prompt in this layout: a model that writes them has finished its answer."""
    return _NEXT[template]


def _prompt(template: Template, question: str, context: str) -> str:
    if template == "gsm8k":
        return _GSM8K.format(instruction=f"{question}\n\n{context}" if context else question)
    layout = _ALPACA_WITH_INPUT if context else _ALPACA
    return layout.format(instruction=question, input=context)


def _with_final_answer(answer: str, where: str) -> str:
    found = answer.replace(_GSM8K_MARK, FINAL_ANSWER)
    if FINAL_ANSWER not in found:
        raise InputError(
            f"{where}: the answer does not end as `template=gsm8k` teaches it.",
            hint=f"It wants '{_GSM8K_MARK}' or '{FINAL_ANSWER}' before the number; `template=alpaca` takes any answer.",
        )
    return found


def _chat(turns: Sequence[Turn], tokenizer: "PreTrainedTokenizerBase", context: str, where: str) -> list[Piece]:
    """A chat as the tokenizer's template lays it out; what it puts behind each prompt is learnt."""
    messages = _messages(turns, context)
    pieces: list[Piece] = []
    before = ""
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        prompt = _opening(messages[:index], tokenizer, where) if index else before
        whole = render_chat(messages[: index + 1], tokenizer, ask=False, where=where)
        if prompt is None or not (prompt.startswith(before) and whole.startswith(prompt)):
            raise InputError(
                f"{where}: the chat template writes earlier turns anew, so the answers cannot be told.",
                hint="Take `template=alpaca`, or chats of one question and one answer.",
            )
        pieces.append(Piece(_tokens(prompt.removeprefix(before), tokenizer), False))
        pieces.append(Piece(_tokens(whole.removeprefix(prompt), tokenizer), bool(turn.content.strip())))
        before = whole
    return pieces


def _opening(messages: Sequence[dict[str, str]], tokenizer: "PreTrainedTokenizerBase", where: str) -> str | None:
    """What stands before an answer: as the template opens one, up to where it writes a finished one otherwise.

    Templates of models that think open an answer with ``<think>``, and write one that is finished without it. None
    where a template writes the chat itself otherwise once it has an answer.
    """
    asked = render_chat(messages, tokenizer, ask=True, where=where)
    answer = {"role": "assistant", "content": _SOME_TEXT}
    answered = render_chat([*messages, answer], tokenizer, ask=False, where=where)
    if answered.startswith(asked):
        return asked
    common = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(asked, answered, strict=False)))
    return common if len(common) >= len(render_chat(messages, tokenizer, ask=False, where=where)) else None


def _messages(turns: Sequence[Turn], context: str) -> list[dict[str, str]]:
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    if context:
        messages[0]["content"] += f"\n\n{context}"
    return messages


def render_chat(
    messages: Sequence[dict[str, str]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    ask: bool,
    where: str,
    hint: str = "",
    alone: bool = True,
) -> str:
    """A chat as the tokenizer's own template writes it.

    Args:
        messages: each with ``role`` and ``content``.
        tokenizer: the model's; it has a chat template.
        ask: open an answer behind the last message.
        where: the subject of the sentence where the template fails: file and line, or the model.
        hint: what to do then.
        alone: no other thread of this process computes, so that memory can be bounded beforehand.

    Raises:
        InputError: the template refuses the chat, is broken, or takes too long or too much memory.
    """
    hint = hint or "Most want user and assistant in turns. `template=alpaca` does without it."
    try:
        with bounded(f"{where}: the chat template", hint=hint, address_space=alone):
            return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask))
    except _TEMPLATE_ERRORS as error:
        why = one_line(str(error))[:200] or type(error).__name__
        raise InputError(f"{where}: the chat template refuses it ({why}).", hint=hint) from error


def _tokens(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    return found
