"""What models wrote, and the section of the page that shows it."""

from tests.evaluation.sample import continuation, model_scores, results
from ulbq.evaluation.report import report
from ulbq.evaluation.results import ModelScores
from ulbq.evaluation.words import by_prompt, silence

FULL = model_scores("full", continuations=[continuation("Once", " upon a time"), continuation("Two", " three")])
SMALL = model_scores("small", parent="full", continuations=[continuation("Once", " more\nand <more>")])


def page_of(*models: ModelScores) -> str:
    return report("t", results(*models), {}, created="now")


def test_texts_stand_together_by_prompt():
    found = by_prompt(results(FULL, SMALL))
    assert {prompt: list(written) for prompt, written in found.items()} == {"Once": ["full", "small"], "Two": ["full"]}


def test_the_section_shows_texts_as_text():
    page = page_of(FULL, SMALL)
    assert "<h2>In their own words</h2>" in page
    assert page.count("<dd>") == 3
    assert "<dd>more\nand &lt;more&gt;</dd>" in page
    assert "12 tokens · 40.0 tokens per second" in page


def test_a_text_of_nothing_is_told():
    blank = continuation("Once", "\n \x1b")
    at_once = blank.model_copy(update={"text": "", "new_tokens": 1})
    assert [silence(one) for one in (SMALL.continuations[0], blank, at_once)] == [
        "",
        "(blanks alone)",
        "(nothing: the model ended its text at once)",
    ]
    page = page_of(model_scores("silent", continuations=[at_once]))
    assert '<dd class="nothing">(nothing: the model ended its text at once)</dd>' in page
    assert "1 token · " in page


def test_no_section_without_a_text():
    assert "In their own words" not in page_of(model_scores("one", perplexity=3))
