"""What models wrote on from prompts, as people read it."""

from ulbq.evaluation.results import Continuation, Results
from ulbq.printable import one_line


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
