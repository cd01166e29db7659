"""Made-up scores, and a mirror of data sets small enough for tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ulbq.evaluation.results import (
    Continuation,
    Fidelity,
    Measured,
    ModelScores,
    Perplexity,
    Protocol,
    Results,
    Subject,
    TaskScore,
    WeightSize,
)

PROTOCOL = Protocol(context=1024, limit=None, fewshot=None, dtype="bfloat16", seed=0)

_WORDS = "the quick brown fox jumps over a lazy dog while seven wizards quietly mix potions under an old stone bridge"


def model_scores(
    name: str,
    *,
    parent: str | None = None,
    perplexity: float | None = None,
    kl: float | None = None,
    tasks: dict[str, dict[str, float]] | None = None,
    weights: WeightSize | None = None,
    continuations: Sequence[Continuation] = (),
    **subject: Any,
) -> ModelScores:
    """Scores of a model; a quantized one where it has a parent."""
    described = Subject(
        name=name, path=f"artifacts/{name}", kind="quantized" if parent else "model", parent=parent, **subject
    )
    measured = None if perplexity is None else Perplexity(value=perplexity, windows=4, context=1024, tokens=4092)
    compared = (
        None if kl is None else Fidelity(text="wikitext2", tokens=8192, mean_kl=kl, p99_kl=5 * kl, top1_agreement=0.5)
    )
    return ModelScores(
        subject=described,
        weights=weights,
        continuations=tuple(continuations),
        perplexity={"wikitext2": measured} if measured else {},
        fidelity=compared,
        tasks={task: task_score(metrics) for task, metrics in (tasks or {}).items()},
    )


def continuation(prompt: str, text: str, pace: float | None = 40.0, device: str = "cpu, 2 threads") -> Continuation:
    """What a model wrote in twelve tokens."""
    return Continuation(
        prompt=prompt,
        template=None,
        text=text,
        new_tokens=12,
        timed_tokens=32,
        tokens_per_second=pace,
        device=device,
    )


def task_score(metrics: dict[str, float], member_of: str | None = None) -> TaskScore:
    found = {name: Measured(value=value, stderr=0.01, higher_is_better=True) for name, value in metrics.items()}
    return TaskScore(metrics=found, samples=100, fewshot=0, version="1.0", member_of=member_of)


def results(*models: ModelScores) -> Results:
    return Results(protocol=PROTOCOL, models=models)


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_mirror(root: Path) -> Path:
    """A mirror with WikiText-2's test text, PIQA, ARC, GSM8K and six of LLM-Adapters' sets, a few rows of each."""
    words = _WORDS.split()
    lines = [" ".join(words[(line * 7 + i) % len(words)] for i in range(30)) for line in range(60)]
    write_rows(root / "Salesforce/wikitext/wikitext-2-raw-v1/test.jsonl", [{"text": line} for line in lines])
    pairs = [{"goal": words[i], "sol1": words[i + 1], "sol2": lines[i], "label": i % 2} for i in range(6)]
    write_rows(root / "baber/piqa/validation.jsonl", pairs)
    for config in ("ARC-Easy", "ARC-Challenge"):
        write_rows(root / "allenai/ai2_arc" / config / "test.jsonl", [_question(i, words) for i in range(5)])
        write_rows(root / "allenai/ai2_arc" / config / "train.jsonl", [_question(i, words) for i in range(5, 9)])
    sums = [{"question": f"What is {i} + {i}?", "answer": f"Add them. #### {2 * i}"} for i in range(6)]
    write_rows(root / "openai/gsm8k/main/test.jsonl", sums[:3])
    write_rows(root / "openai/gsm8k/main/train.jsonl", sums)
    for name in ("gsm8k", "svamp", "mawps"):
        counted = [{"instruction": f"What is {i} + {i}?", "output": "", "answer": f"{2 * i}.0"} for i in range(5)]
        write_rows(root / "llm-adapters" / name / "test.jsonl", counted)
    lettered = [{"instruction": f"Which is {i}? Answer Choices: (A) {i}", "answer": "ABCDE"[i]} for i in range(5)]
    write_rows(root / "llm-adapters/aqua/test.jsonl", lettered)
    truths = [{"instruction": f"Is {words[i]} a word?", "answer": ("true", "false")[i % 2]} for i in range(7)]
    write_rows(root / "llm-adapters/boolq/test.jsonl", truths)
    chosen = [{"instruction": " ".join(words[: 3 * i + 1]), "answer": f"solution{i % 2 + 1}"} for i in range(3)]
    write_rows(root / "llm-adapters/piqa/test.jsonl", chosen)
    return root


def _question(number: int, words: list[str]) -> dict[str, Any]:
    choices = {"text": words[number : number + 4], "label": ["A", "B", "C", "D"]}
    return {
        "id": str(number),
        "question": f"Which word is number {number}?",
        "choices": choices,
        "answerKey": "ABCD"[number % 4],
    }
