"""Prompts: what a model is asked with is what stood before the answer in training."""

from typing import Any

import pytest

from tests.data.byte_tokenizer import ByteTokenizer
from tests.models.tiny import tiny_tokenizer
from ulbq.config.run import Template
from ulbq.data.prompts import FINAL_ANSWER, Turn, choose_template, lay_out, next_question, prompt_tokens, question_frame
from ulbq.errors import InputError, UsageError

BYTES: Any = ByteTokenizer(bos=True)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
ASKED = "How much is {1} and 2?"
GSM8K_ANSWER = "1+2 = <<1+2=3>>3.\n#### 3"


def chatty() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def read(tokens: list[int]) -> str:
    return ByteTokenizer.read([token for token in tokens if token not in (BYTES.bos_token_id, BYTES.eos_token_id)])


@pytest.mark.parametrize("context", ["", "Some context."])
@pytest.mark.parametrize("template", ["chat", "alpaca", "gsm8k"])
def test_a_prompt_that_stands_alone_is_the_one_of_training(template: Template, context: str) -> None:
    for tokenizer in (chatty(), BYTES) if template != "chat" else (chatty(),):
        turns = [Turn("user", ASKED), Turn("assistant", GSM8K_ANSWER)]
        before, answer = lay_out(template, turns, tokenizer, context=context, where="here")
        assert (before.learnt, answer.learnt) == (False, True)
        assert prompt_tokens(template, ASKED, tokenizer, context=context, where="here") == before.tokens


def test_the_layout_of_gsm8k() -> None:
    asked = "\nAnswer the above question. First think step by step and then answer the final number.\n"
    turns = [Turn("user", ASKED), Turn("assistant", GSM8K_ANSWER)]
    prompt, answer = lay_out("gsm8k", turns, BYTES, where="here")
    assert prompt.tokens[0] == BYTES.bos_token_id
    assert read(prompt.tokens) == ASKED + asked
    assert read(answer.tokens) == f"1+2 = <<1+2=3>>3.\n{FINAL_ANSWER}3"
    assert answer.tokens[-1] == BYTES.eos_token_id
    own = lay_out("gsm8k", [Turn("user", ASKED), Turn("assistant", f"{FINAL_ANSWER}3")], BYTES, where="here")
    assert read(own[1].tokens) == f"{FINAL_ANSWER}3"
    with pytest.raises(InputError, match=r"a\.jsonl, line 3: the answer does not end"):
        lay_out("gsm8k", [Turn("user", ASKED), Turn("assistant", "The answer is 3.")], BYTES, where="a.jsonl, line 3")


@pytest.mark.parametrize("template", ["alpaca", "gsm8k"])
def test_the_next_question_is_told_by_words_of_the_layout(template: Template) -> None:
    again = read(prompt_tokens(template, ASKED, BYTES, where="here"))
    assert any(stop in again for stop in next_question(template))


def test_a_chat_template_has_to_be_there() -> None:
    assert choose_template(None, BYTES) == "alpaca"
    assert choose_template(None, chatty()) == "chat"
    assert choose_template("gsm8k", chatty()) == "gsm8k"
    with pytest.raises(UsageError, match="no chat template"):
        prompt_tokens("chat", ASKED, BYTES, where="here")
    refusing = chatty()
    refusing.chat_template = "{{ raise_exception('nothing suits me') }}"
    with pytest.raises(InputError, match=r"here: the chat template refuses it \(nothing suits me\)"):
        prompt_tokens("chat", ASKED, refusing, where="here")


def test_what_stands_around_a_question() -> None:
    tokenizer = chatty()
    before, between = question_frame(tokenizer)
    assert tokenizer.decode([*before, *tokenizer.encode(ASKED, add_special_tokens=False), *between]) == (
        f"<s>user\n{ASKED}</s>\n<s>assistant\n"
    )
    assert question_frame(BYTES) == ([], [])


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[0]['content'] | length }}", "{% if"])
def test_a_template_that_a_question_alone_does_not_satisfy_has_nothing_around_it(template: str) -> None:
    tokenizer = chatty()
    tokenizer.chat_template = template
    assert question_frame(tokenizer) == ([], [])
