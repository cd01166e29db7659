"""What models wrote on from prompts, as people read it: lines for a terminal, a section for the page."""

import unicodedata
from html import escape

from ulbq.evaluation.results import Continuation, Results

NOTHING = "(nothing: the model ended its text at once)"
"""Stands where a text should."""

# Characters that show nothing and may tell a terminal, or the writing beside them, what to do.
_CONTROL = frozenset({"Cc", "Cf", "Cs"})


def by_prompt(results: Results) -> dict[str, dict[str, Continuation]]:
    """What every model wrote, by prompt and the model's name, both in order of first appearance."""
    found: dict[str, dict[str, Continuation]] = {}
    for scores in results.models:
        for one in scores.continuations:
            found.setdefault(one.prompt, {})[scores.subject.name] = one
    return found


def visible(text: str) -> str:
    """A text without control and format characters; line feeds and tabs stay."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) not in _CONTROL)


def one_line(text: str) -> str:
    """A text in one line, without control characters; :data:`NOTHING` where nothing is left."""
    return " ".join(visible(" ".join(text.split())).split()) or NOTHING


def words_section(results: Results) -> str:
    """The section with everything that was written, as HTML; empty where nothing was."""
    found = by_prompt(results)
    if not found:
        return ""
    several = sum(map(len, found.values())) > len(found)
    told = "Written greedily, so that the words are the models' first choice"
    told += " and both may be compared." if several else "."
    drawn = "".join(
        f'<h3 class="prompt">{escape(visible(prompt))}</h3><dl>'
        f"{''.join(_one(name, one) for name, one in written.items())}</dl>"
        for prompt, written in found.items()
    )
    return f'<section class="words"><h2>In their own words</h2><p class="caption">{escape(told)}</p>{drawn}</section>'


def _one(name: str, written: Continuation) -> str:
    pace = "" if written.tokens_per_second is None else f" · {written.tokens_per_second:.1f} tokens per second"
    text = visible(written.text).strip("\n")
    style = "" if text.strip() else ' class="nothing"'
    return (
        f"<dt>{escape(name)} <span>{written.new_tokens} tokens{pace}</span></dt>"
        f"<dd{style}>{escape(text if text.strip() else NOTHING)}</dd>"
    )
