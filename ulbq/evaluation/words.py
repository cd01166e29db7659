"""What models wrote on from prompts, as people read it: lines for a terminal, a section for the page."""

from markupsafe import Markup

from ulbq.evaluation.markup import element, together
from ulbq.evaluation.results import Continuation, Results
from ulbq.printable import one_line, printable

_CAPTION = "Written greedily: every token is the one that the model finds likeliest."


def by_prompt(results: Results) -> dict[str, dict[str, Continuation]]:
    """What every model wrote, by prompt and the model's name, both in order of first appearance."""
    found: dict[str, dict[str, Continuation]] = {}
    for scores in results.models:
        for one in scores.continuations:
            found.setdefault(one.prompt, {})[scores.subject.name] = one
    return found


def silence(written: Continuation) -> str:
    """What stands in place of a text in which there is nothing to see; empty where there is something."""
    if one_line(written.text):
        return ""
    return "(nothing: the model ended its text at once)" if written.new_tokens == 1 else "(blanks alone)"


def words_section(results: Results) -> Markup:
    """The section with everything that was written, as HTML; empty where nothing was."""
    found = by_prompt(results)
    if not found:
        return Markup("")
    parts: list[Markup] = []
    for prompt, written in found.items():
        parts.append(element("h3", printable(prompt), class_="prompt"))
        parts.append(element("dl", *(_one(name, one) for name, one in written.items())))
    caption = element("p", _CAPTION, class_="caption")
    return element("section", element("h2", "In their own words"), caption, *parts, class_="words")


def _one(name: str, written: Continuation) -> Markup:
    count = f"{written.new_tokens} token{'' if written.new_tokens == 1 else 's'}"
    pace = "" if written.tokens_per_second is None else f" · {written.tokens_per_second:.1f} tokens per second"
    nothing = silence(written)
    said = element("dd", nothing or printable(written.text).strip(), class_="nothing" if nothing else None)
    return together([element("dt", f"{name} ", element("span", count + pace)), said])
