from tests.evaluation.sample import continuation, model_scores, results, task_score
from ulbq.evaluation.results import Measured, ModelScores, WeightSize, Writing
from ulbq.evaluation.table import Row, describe, footnotes, rows

PARENT = model_scores("full", perplexity=24.19, tasks={"piqa": {"acc": 0.9}})
GOOD = model_scores("good", parent="full", method="db-llm", scheme="w2g64", bits_per_weight=2.5, perplexity=71, kl=0.5)
BAD = model_scores("bad", parent="full", method="rtn", scheme="w2g64", bits_per_weight=2.28, perplexity=356593.2, kl=7)


def named(found: list[Row]) -> dict[str, Row]:
    return {row.label: row for row in found}


def test_every_model_has_a_cell_in_every_row():
    found = rows(results(PARENT, GOOD, BAD))
    assert {len(row.cells) for row in found} == {3}
    table = named(found)
    assert table["method"].cells == ("full precision", "db-llm w2g64", "rtn w2g64")
    assert table["bits per weight"].cells == ("", "2.500", "2.280")
    assert table["wikitext2 ↓"].cells == ("24.19", "71.00", "356,593.20")
    assert table["same top token ↑"].cells == ("", "50.0%", "50.0%")


def test_rows_that_nobody_measured_are_left_out():
    assert [row.label for row in rows(results(model_scores("one", perplexity=10)))] == ["method", "wikitext2 ↓"]


def test_the_best_is_picked_among_the_compressed_models_by_the_better_direction():
    table = named(rows(results(PARENT, GOOD, BAD)))
    assert table["wikitext2 ↓"].best == {1}
    assert table["mean KL, nats a token ↓"].best == {1}
    assert table["bits per weight"].best == frozenset()
    # Equal values: none stands out.
    assert table["same top token ↑"].best == frozenset()


def test_ties_for_the_best_are_all_marked():
    twin = model_scores("twin", parent="full", perplexity=71)
    assert named(rows(results(PARENT, GOOD, BAD, twin)))["wikitext2 ↓"].best == {1, 3}


def test_a_single_compressed_model_is_not_called_the_best():
    assert not any(row.best for row in rows(results(PARENT, GOOD)))


def test_members_of_a_group_are_summed_up_by_the_group():
    scores = model_scores("one", tasks={"mmlu": {"acc": 0.3}})
    scores = scores.model_copy(
        update={"tasks": {**scores.tasks, "mmlu_law": task_score({"acc": 0.2}, member_of="mmlu")}}
    )
    assert [row.label for row in rows(results(scores))] == ["method", "mmlu acc ↑"]


def test_scores_carry_their_standard_error():
    assert named(rows(results(PARENT)))["piqa acc ↑"].cells == ("0.9000 ± 0.0100",)


def test_tasks_stand_beside_chance_and_the_parent():
    guessed = Measured(value=0.8, stderr=0.01, chance=0.5, higher_is_better=True)
    child = model_scores("small", parent="full", tasks={"piqa": {"acc": 0.8}, "boolq": {"acc": 0.4}})
    task = child.tasks["piqa"].model_copy(update={"metrics": {"acc": guessed}})
    child = child.model_copy(update={"tasks": child.tasks | {"piqa": task}})
    table = named(rows(results(PARENT, child)))
    assert table["piqa acc ↑, chance 0.500"].cells == ("0.9000 ± 0.0100", "0.8000 ± 0.0100 (−0.1000)")
    assert table["boolq acc ↑"].cells == ("", "0.4000 ± 0.0100")


def test_sizes_and_speed_stand_before_and_after():
    parent = model_scores(
        "full",
        weights=WeightSize(on_disk=96_600_000, in_memory=269_060_000, gguf_types=("Q4_1", "Q8_0")),
        continuations=[continuation("a", "b", 10.0)],
    )
    child = model_scores(
        "small",
        parent="full",
        weights=WeightSize(on_disk=89_900_000, in_memory=90_100_000),
        # 31 tokens in 3.1 seconds and 31 in 0.31: 62 in 3.41.
        continuations=[continuation("a", "b", 10.0), continuation("c", "d", 100.0)],
    )
    table = named(rows(results(parent, child)))
    assert table["size on disk"].cells == ("96.6 MB", "89.9 MB")
    assert table["weights in memory"].cells == ("269.1 MB", "90.1 MB")
    assert table["tokens per second ↑"].cells == ("10.0", "18.2")
    notes = " ".join(footnotes(results(parent, child)))
    assert "full is a GGUF file of Q4_1, Q8_0" in notes
    assert "dense ones in bfloat16, packed ones packed" in notes
    assert "Prompts: as bare text, continued greedily by at most 32 tokens" in notes
    assert "(cpu, 2 threads)" in notes


def test_other_devices_are_named_each():
    both = results(
        model_scores("a", continuations=[continuation("p", "x")]),
        model_scores("b", continuations=[continuation("p", "x", device="cpu, 8 threads")]),
    )
    assert any("(cpu, 2 threads; cpu, 8 threads)" in note for note in footnotes(both))


def test_a_speed_that_nobody_timed_has_no_cell():
    lone = model_scores("a", continuations=[continuation("p", "x", None)])
    assert "tokens per second ↑" not in named(rows(results(lone)))


def test_descriptions():
    assert [describe(scores.subject) for scores in (PARENT, GOOD)] == ["full precision", "db-llm w2g64"]
    assert describe(PARENT.subject.model_copy(update={"kind": "converted"})) == "converted"


def test_footnotes_tell_the_protocol():
    told = " ".join(footnotes(results(PARENT, GOOD)))
    assert "4 non-overlapping windows of 1,024 tokens" in told
    assert "8,192 positions of wikitext2" in told
    assert "all documents" in told
    assert "bfloat16" in told


def written(name: str, template: str, unanswered: int) -> ModelScores:
    writing = Writing(template=template, new_tokens=256, unanswered=unanswered)
    single = task_score({"exact_match": 0.1}).model_copy(update={"writing": writing})
    member = single.model_copy(update={"member_of": "both"})
    return model_scores(name).model_copy(update={"tasks": {"both": single, "a": member, "c": single}})


def test_how_answers_were_written_and_how_many_were_not_found_is_told():
    notes = footnotes(results(written("one", "alpaca", 0), written("two", "alpaca", 1200)))
    assert notes[0] == (
        "both, c: answers written greedily to all documents, laid out as alpaca, read by the published rules; "
        "± is the standard error."
    )
    # The group's own count is the sum of its members'.
    assert notes[1] == "two: no answer was found, which counts as wrong, in 1,200 of 100 (a), 1,200 of 100 (c)."
    assert len(notes) == 3
    assert not any("lm-eval" in note for note in notes)
    notes = footnotes(results(written("one", "alpaca", 0), written("two", "gsm8k", 0)))
    assert "laid out as alpaca for one, gsm8k for two," in notes[0]
    assert [pair[:2] for pair in written("one", "alpaca", 0).task_metrics] == [
        ("both", "exact_match"),
        ("a", "exact_match"),
        ("c", "exact_match"),
    ]
    mixed = written("one", "alpaca", 0)
    mixed.tasks["piqa"] = task_score({"acc": 0.5})
    assert any("lm-eval" in note for note in footnotes(results(mixed)))
