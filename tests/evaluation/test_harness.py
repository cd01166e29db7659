"""lm-eval through our adapter, against lm-eval's own Hugging Face wrapper, on a mirror of a few rows."""

from pathlib import Path

import pytest
import torch

from tests.evaluation.sample import write_mirror, write_rows
from tests.models.tiny import tiny_config, tiny_model
from ulbq.errors import InputError, ResourceError, UsageError
from ulbq.evaluation import harness
from ulbq.evaluation.task_data import member_tasks, mirrored

lm_eval = pytest.importorskip("lm_eval")

_real_manager = harness._manager

FOLDERS = ("piqa", "arc", "gsm8k", "hellaswag", "mmlu/default", "wikitext")


@pytest.fixture(scope="module", autouse=True)
def few_tasks():
    """A task manager that knows a few folders: to read all of lm-eval's takes as long as every other test here."""
    from lm_eval.tasks import TaskManager

    tasks = Path(lm_eval.__file__).parent / "tasks"
    manager = TaskManager(include_defaults=False, include_path=[tasks / folder for folder in FOLDERS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "_manager", lambda: manager)
        yield manager


def load(names, mirror, **options):
    return harness.load_tasks(harness.check_tasks(names), data_dir=mirror, offline=True, **options)


def test_likelihood_tasks_score_as_through_lm_evals_own_wrapper(model, tokenizer, mirror):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    names = ["piqa", "arc_easy", "arc_challenge"]
    found = harness.run_tasks(model, tokenizer, load(names, mirror, fewshot=1))
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    theirs = evaluate(wrapped, load(names, mirror, fewshot=1).loaded, log_samples=False)["results"]
    assert found.keys() == {"piqa", "arc_easy", "arc_challenge"}
    for name, score in found.items():
        assert score.fewshot == 1
        for metric, value in score.metrics.items():
            assert value.value == theirs[name][f"{metric},none"]
            assert value.stderr == pytest.approx(theirs[name][f"{metric}_stderr,none"])


def test_written_answers_equal_those_through_lm_evals_own_wrapper(tokenizer, mirror):
    from lm_eval.models.huggingface import HFLM

    from ulbq.evaluation.adapter import lm_eval_model
    from ulbq.evaluation.lm import LanguageModel

    model = tiny_model(tiny_config("llama", tied=False, max_position_embeddings=2048))
    task = load(["gsm8k"], mirror).loaded["tasks"]["gsm8k"]
    task.build_all_requests(limit=3)
    for request in task.instances:
        request.args[1]["max_gen_toks"] = 12
    ours = lm_eval_model(LanguageModel(model, tokenizer)).generate_until(task.instances)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3).generate_until(task.instances, disable_tqdm=True)
    assert len(ours) == 3
    assert ours == theirs


def test_whole_texts_score_as_through_lm_evals_own_wrapper(model, tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from ulbq.evaluation.adapter import lm_eval_model
    from ulbq.evaluation.lm import LanguageModel

    texts = ["a short one", "one of several windows " * 40]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0, ("t", 0, 1)) for text in texts]
    ours = lm_eval_model(LanguageModel(model, tokenizer)).loglikelihood_rolling(requests)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2).loglikelihood_rolling(requests)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_scores_record_version_samples_and_limit(model, tokenizer, mirror):
    scores = harness.run_tasks(model, tokenizer, load(["arc_easy"], mirror), limit=3)
    assert (scores["arc_easy"].samples, scores["arc_easy"].version, scores["arc_easy"].fewshot) == (3, "1.0", 0)
    assert list(scores["arc_easy"].metrics) == ["acc", "acc_norm"]


def test_tags_and_patterns_stand_for_their_tasks(mirror):
    assert load(["ai2_arc"], mirror).loaded["tasks"].keys() == {"arc_easy", "arc_challenge"}
    assert {"arc_easy", "arc_challenge"} <= set(harness.check_tasks(["arc_[ec]*"]))


def test_groups_stand_for_all_below_them(few_tasks):
    assert len(member_tasks(few_tasks.task_index, "mmlu")) == 57
    assert member_tasks(few_tasks.task_index, "ai2_arc") == {"arc_easy", "arc_challenge"}
    assert member_tasks(few_tasks.task_index, "nonsense") == set()


def test_members_of_a_group_are_told_from_the_group(mirror):
    found = {
        "results": {"a": {"acc,none": 0.2}, "b": {"acc,none": 0.4}},
        "groups": {"both": {"acc,none": 0.3, "acc_stderr,none": "N/A", "alias": "both"}},
        "group_subtasks": {"both": ["a", "b"]},
        "higher_is_better": {"a": {"acc": True}, "b": {"acc": True}, "both": {"acc": True}},
        "n-samples": {"a": {"effective": 3}, "b": {"effective": 4}},
        "n-shot": {"a": 5, "b": 5, "both": 5},
        "versions": {"a": 1.0, "b": 1.0, "both": 2},
    }
    scores = harness._scores(found, {"a": 0.5, "b": 0.25})
    assert list(scores) == ["both", "a", "b"]
    assert (scores["both"].samples, scores["both"].member_of, scores["both"].metrics["acc"].stderr) == (7, None, None)
    assert scores["a"].member_of == "both"
    # By their documents, 3 and 4.
    assert scores["both"].metrics["acc"].chance == pytest.approx((3 * 0.5 + 4 * 0.25) / 7)
    assert harness._scores(found, {"a": 0.5, "b": None})["both"].metrics["acc"].chance is None


def test_guessing_is_right_once_in_so_many_choices(model, tokenizer, mirror):
    scores = harness.run_tasks(model, tokenizer, load(["piqa", "arc_easy"], mirror), limit=2)
    assert {score.chance for score in scores["piqa"].metrics.values()} == {0.5}
    assert {score.chance for score in scores["arc_easy"].metrics.values()} == {0.25}


def test_an_unknown_task_is_answered_with_close_names():
    with pytest.raises(UsageError, match="no task 'piqaa'") as caught:
        harness.check_tasks(["piqaa"])
    assert "piqa" in caught.value.hint
    with pytest.raises(UsageError, match="no task 'svap'") as caught:
        harness.check_tasks(["svap"], others=("svamp", "aqua"))
    assert "Did you mean svamp?" in caught.value.hint


def test_tasks_that_overlap_are_refused(mirror):
    with pytest.raises(UsageError, match="both contain the task 'arc_easy'"):
        load(["ai2_arc", "arc_easy"], mirror)


def test_data_that_are_nowhere_are_an_error_before_any_model_is_loaded(mirror):
    with pytest.raises(ResourceError, match="'hellaswag' cannot be had") as caught:
        load(["hellaswag"], mirror)
    assert "`data_dir`" in caught.value.hint


def test_a_mirror_without_a_split_to_score_on_is_refused(tmp_path):
    write_rows(tmp_path / "baber/piqa/train.jsonl", [{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}])
    with pytest.raises(InputError, match="no split of it that task 'piqa' is scored on") as caught:
        load(["piqa"], tmp_path)
    assert "validation" in caught.value.hint


def test_a_mirror_with_other_columns_is_refused(tmp_path):
    write_rows(tmp_path / "baber/piqa/validation.jsonl", [{"question": "g", "label": 0}])
    with pytest.raises(InputError, match="'piqa' do not fit"):
        load(["piqa"], tmp_path)


def test_lm_evals_index_is_left_as_it_was(few_tasks, tmp_path):
    before = dict(few_tasks.task_index)
    folder = tmp_path / "yaml"
    folder.mkdir()
    with mirrored(few_tasks.task_index, {"piqa", "hellaswag"}, write_mirror(tmp_path / "mirror"), folder):
        assert few_tasks.task_index["piqa"].yaml_path.parent == folder
        assert few_tasks.task_index["hellaswag"] == before["hellaswag"]
    assert few_tasks.task_index == before


def test_nothing_is_printed(model, tokenizer, mirror, capfd):
    harness.run_tasks(model, tokenizer, load(["arc_easy"], mirror), limit=2)
    assert capfd.readouterr() == ("", "")


def test_bf16_answers_are_not_tied(tokenizer):
    """A bf16 log-likelihood has three digits: answers that a model tells apart would score the same."""
    from ulbq.evaluation.lm import LanguageModel

    model = tiny_model(tiny_config("llama", tied=False)).to(torch.bfloat16)
    scores = LanguageModel(model, tokenizer).score([([5, 6, 7], [answer]) for answer in range(3, 250)])
    exact = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].float().log_softmax(-1)
    assert [score for score, _ in scores] == pytest.approx(exact[3:250].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("default", "asked", "used"), [(None, None, 0), (None, 3, 3), (5, None, 5), (5, 0, 0), (0, 3, 0)]
)
def test_fewshot_follows_lm_evals_rule(default, asked, used):
    class Task:
        config = {"num_fewshot": default}  # noqa: RUF012
        seed = None

        def get_config(self, key):
            return self.config[key]

        def set_config(self, key, value):
            self.config = {key: value}

        def set_fewshot_seed(self, seed):
            self.seed = seed

    task = Task()
    harness._set_fewshot(task, asked)
    assert (task.config["num_fewshot"], task.seed) == (used, 1234)


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    _real_manager.cache_clear()
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="lm-eval, which is not installed") as caught:
        _real_manager()
    assert "ulbq[eval]" in caught.value.hint
