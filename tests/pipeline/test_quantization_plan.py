"""Requests: which options a method takes, what is filled in, and what is refused."""

from typing import Any

import pytest

from ulbq.config.methods import method_options
from ulbq.config.quantize import PRESETS, QuantizeRequest, check_options, options_of, resolve, takes
from ulbq.config.stages import Stage
from ulbq.errors import UsageError
from ulbq.methods import METHODS
from ulbq.pipeline.quantization_plan import build_method

OPT = {"name": "opt", "epochs": 1}
OWN = {"name": "mixed", "epochs": 1, "penalty": 0.5}
CALIBRATED = sorted(name for name, method in METHODS.items() if method.Options.calibrated)


def asked(**options: Any) -> QuantizeRequest:
    return QuantizeRequest.model_validate(options)


def completed(**options: Any) -> QuantizeRequest:
    request = asked(**options)
    check_options(request)
    return resolve(request, "quick").record


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_a_method_can_be_asked_for(method: str) -> None:
    assert takes(method) <= QuantizeRequest.model_fields.keys()


def test_every_option_of_a_request_is_some_methods() -> None:
    for_all = {"source", "method", "recipe", "rotate", "skip", "only", "allow_partial", "seed", "device", "data_dir"}
    for_all |= {"offline", "out", "force", "log_to", "plan", "embedding_bits", "head_bits"}
    assert QuantizeRequest.model_fields.keys() - for_all == frozenset[str]().union(*map(takes, METHODS))


@pytest.mark.parametrize("method", METHODS)
def test_a_completed_request_is_complete(method: str) -> None:
    full = completed(method=method)
    assert resolve(full, "best").record == full
    assert build_method(full).scheme.group_size == full.group_size
    again = QuantizeRequest.model_validate_json(full.model_dump_json())
    assert again == full


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_are_the_methods(method: str) -> None:
    full, options = completed(method=method), method_options(method)
    for name, field in options.model_fields.items():
        value = getattr(full, name, None)
        if value is not None and name != "epochs":
            assert value == field.default, name


@pytest.mark.parametrize("method", CALIBRATED)
def test_a_preset_gives_way_to_what_is_explicit(method: str) -> None:
    full = completed(method=method, preset="best", samples=7)
    best = PRESETS["best"]
    epochs = {"gptq": None, "trellis": 0, "claq": 0}.get(method, best.epochs)
    assert (full.samples, full.sequence_length, full.epochs) == (7, best.sequence_length, epochs)
    assert full.preset == "best"


def test_the_machines_preset_is_no_part_of_a_request_that_needs_none() -> None:
    assert completed(method="db-llm", samples=4, sequence_length=32, epochs=1).preset is None
    assert completed(method="db-llm", samples=4).preset == "quick"
    assert completed(method="gptq", samples=4, sequence_length=32).preset is None


def test_stages_bring_their_own_epochs() -> None:
    full = completed(method="ulb-sapr", stages=[{"name": "wpt", "epochs": 3}, {"name": "opt", "epochs": 2}])
    assert full.epochs == 5
    assert full.stages == (Stage(name="wpt", epochs=3), Stage(name="opt", epochs=2))
    assert build_method(full).needs.epochs == 5
    with pytest.raises(UsageError, match=r"`epochs=4` contradicts the stages: wpt 3"):
        completed(method="ulb-sapr", epochs=4, stages=[{"name": "wpt", "epochs": 3}])


def test_what_has_no_meaning_stays_open() -> None:
    full = completed(method="apiq", adapter=False, train_weights=False, schedule="constant")
    assert {full.rank, full.alpha, full.adapter_lr, full.base_share, full.weight_lr, full.final_lr_factor} == {None}
    assert full.end_to_end_epochs is None
    assert full.saliency is None
    build_method(full)


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"method": "apiq", "adapter": False, "rank": 4}, "`adapter`"),
        ({"method": "db-llm", "rank": 4}, "`adapter`"),
        ({"method": "ulb-sapr", "adapter": False, "penalize": "after-adapter"}, "`adapter`"),
        ({"method": "db-llm", "train_weights": False, "weight_lr": 0.1}, "`train_weights`"),
        ({"method": "apiq", "schedule": "constant", "final_lr_factor": 0.1}, "`schedule=cosine`"),
        ({"method": "apiq", "saliency": "fisher"}, "`penalty`"),
        ({"method": "ulb-sapr", "penalty": 0, "penalize": "after-adapter"}, "`penalty`"),
        ({"method": "ulb-sapr", "saliency": "fisher", "stages": [{"name": "opt", "epochs": 1}]}, "`penalty`"),
        ({"method": "db-llm", "gradient_accumulation": 2}, "`end_to_end`"),
        ({"method": "db-llm", "end_to_end": "ce", "teacher": "cached"}, "`end_to_end=kl`"),
        ({"method": "db-llm", "end_to_end": "kl", "teacher_top_k": 8}, "`teacher=cached`"),
        ({"method": "db-llm", "granularity": "layer", "norm_lr": 0.1}, "`granularity=block`"),
        ({"method": "binary-mos", "experts": 1, "router_lr": 0.1}, "`experts` 2 or more"),
        ({"method": "ulb-sapr", "penalty": 0.1, "stages": [OPT]}, "a wpt or mixed stage without its own penalty"),
        ({"method": "ulb-sapr", "penalty": 0.1, "stages": [OWN]}, "a wpt or mixed stage without its own penalty"),
        ({"method": "apiq", "saliency": "fisher", "stages": [OPT]}, "`penalty`"),
        (
            {"method": "db-llm", "train_weights": False, "end_to_end": "kl", "end_to_end_train": "all"},
            "`train_weights`",
        ),
        ({"method": "efficientqat", "train": "grid", "weight_lr": 0.1}, "`train=all`"),
        ({"method": "rtn", "k_quant": True, "symmetric": True}, "`k_quant=False`"),
        ({"method": "efficientqat", "train": "clipping", "end_to_end": "ce", "end_to_end_train": "all"}, "`train=all`"),
        ({"method": "efficientqat", "train": "weights", "scale_lr": 0.1}, "`train=all`"),
        ({"method": "db-llm", "end_to_end_gamma": 1}, "`end_to_end=dad`"),
        ({"method": "db-llm", "end_to_end": "kl-hidden", "end_to_end_gamma": 1}, "`end_to_end=dad`"),
        ({"method": "db-llm", "end_to_end": "dad", "end_to_end_hidden_weight": 1}, "`end_to_end=kl-hidden`"),
        ({"method": "apiq", "train_weights": False, "stages": [{**OPT, "weight_lr": 1}]}, "`train_weights`"),
        ({"method": "apiq", "adapter": False, "stages": [{**OPT, "adapter_lr": 1}]}, "`adapter`"),
        ({"method": "db-llm", "stages": [{**OPT, "adapter_weight_decay": 1}]}, "`adapter`"),
        ({"method": "binary-mos", "experts": 1, "stages": [{**OPT, "router_lr": 1}]}, "`experts` 2 or more"),
        (
            {"method": "db-llm", "granularity": "layer", "end_to_end": "ce", "stages": [{**OPT, "norm_lr": 1}]},
            "`granularity=block`",
        ),
    ],
)
def test_options_that_others_leave_without_a_meaning_are_refused(options: dict[str, Any], needed: str) -> None:
    with pytest.raises(UsageError, match=f"means nothing without {needed}[.]") as refused:
        check_options(asked(**options))
    assert needed in refused.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"method": "db-llm", "granularity": "layer", "end_to_end": "ce", "norm_lr": 0.1},
        {"method": "binary-mos", "experts": 2, "stages": [{**OPT, "router_lr": 1}]},
        {"method": "ulb-sapr", "penalty": 0.1, "stages": [OPT, {"name": "mixed", "epochs": 1}]},
        {"method": "db-llm", "adapter": True, "stages": [{**OPT, "adapter_lr": 1, "adapter_weight_decay": 1}]},
        {"method": "db-llm", "train_weights": False, "end_to_end": "kl", "end_to_end_train": "scales"},
        {"method": "efficientqat", "train": "weights", "end_to_end": "ce", "scale_lr": 0.1},
        {"method": "efficientqat", "train": "rounding", "optimizer": "sign", "weight_lr": 0.1},
    ],
)
def test_options_that_do_something_are_taken(options: dict[str, Any]) -> None:
    full = completed(**options)
    assert resolve(full, "best").record == full
    build_method(full)


@pytest.mark.parametrize("method", ["apiq", "db-llm", "binary-mos"])
def test_a_stage_of_the_penalty_alone_wants_a_penalty(method: str) -> None:
    alone = {"name": "wpt", "epochs": 1}
    with pytest.raises(UsageError, match="its lambda is 0") as refused:
        check_options(asked(method=method, stages=[alone]))
    assert "`penalty=X`, or penalty=X" in refused.value.hint
    with pytest.raises(UsageError, match="its lambda is 0"):
        check_options(asked(method="ulb-sapr", stages=[{**alone, "penalty": 0}]))
    completed(method=method, stages=[{**alone, "penalty": 1}])
    completed(method=method, stages=[alone], penalty=1)
    completed(method="ulb-sapr", stages=[alone])


def test_the_settings_of_the_losses_reach_the_phase() -> None:
    dad = build_method(completed(method="db-llm", end_to_end="dad", end_to_end_gamma=0.25)).needs.end_to_end
    hidden = build_method(completed(method="db-llm", end_to_end="kl-hidden", end_to_end_hidden_weight=10))
    assert dad is not None
    assert dad.dad_gamma == 0.25
    assert hidden.needs.end_to_end is not None
    assert hidden.needs.end_to_end.hidden_weight == 10


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        ({"method": "db-llm", "stages": [{**OPT, "router_lr": 1}]}, "opt:router-lr` means nothing to", "Leave it"),
        ({"method": "ulb-sapr", "stages": [{**OPT, "penalty": 1}]}, "opt:penalty` means nothing", "mixed"),
        ({"method": "rtn", "penalty": 0.1}, "`penalty` means nothing to `method=rtn`", "ulb-sapr"),
        ({"method": "rtn", "calibration": "c4"}, "`calibration` means nothing to `method=rtn`", "db-llm"),
        ({"method": "db-llm", "search": True}, "`search` means nothing to `method=db-llm`", "rtn"),
        ({"method": "awq"}, "There is no method 'awq'", "rtn"),
        ({"method": "db-llm", "bits": 3}, "cannot take `bits=3`", "`bits`"),
        ({"method": "gptq", "epochs": 3}, "`epochs` means nothing to `method=gptq`", "db-llm"),
        ({"method": "rtn", "damping": 0.1}, "`damping` means nothing to `method=rtn`", "gptq"),
        ({"method": "gptq", "tied_scales": True}, "`tied_scales` means nothing to `method=gptq`", "db-llm"),
        ({"method": "apiq", "k_quant": True}, "`k_quant` means nothing to `method=apiq`", "efficientqat, gptq, rtn"),
        ({"method": "efficientqat", "k_quant": True, "train": "all"}, "`train=all` moves scales", "`train=weights`"),
        ({"method": "rtn", "k_quant": True, "bits": 8}, "2, 3 or 4 bits .*, not 8", "`bits=2`"),
        (
            {"method": "gptq", "k_quant": True, "group_size": 64},
            "`group_size=64` means nothing to `k_quant`",
            "Leave out",
        ),
    ],
)
def test_what_a_method_does_not_take_is_refused(options: dict[str, Any], said: str, hint: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        check_options(asked(**options))
    assert hint in refused.value.hint


def test_a_stages_own_lambda_gives_the_penalty_a_meaning() -> None:
    stages = [{"name": "mixed", "epochs": 1, "penalty": 0.5}]
    assert completed(method="apiq", stages=stages, saliency="fisher").saliency == "fisher"


def test_the_options_reach_the_method() -> None:
    full = completed(method="apiq", bits=3, group_size=-1, rank=8, dora=True, targets=["q_proj"], weight_lr=0.5)
    method = build_method(full)
    assert method.scheme.bits == 3
    assert method.scheme.group_size == -1
    adapter = method.needs.adapter
    assert adapter is not None
    assert (adapter.rank, adapter.dora, adapter.targets) == (8, True, ("q_proj",))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_open_in_full(method: str) -> None:
    full = resolve(asked(method=method, seed=3), "quick", rotate=True, calibration="wikitext2")
    assert full.options == options_of(full.record)
    assert (full.seed, full.rotate, full.record.rotate, full.calibration) == (3, True, True, "wikitext2")
    for name in ("group_size", "precision"):
        assert getattr(full, name) == getattr(full.record, name)
    looks = METHODS[method].Options.calibrated
    assert (full.samples > 0, full.sequence_length > 0, full.activation_memory > 0) == (looks, looks, looks)
    assert (full.phase, full.text, full.text_samples) == (None, None, full.samples)


def test_a_phase_of_its_own_text_draws_no_more_calibration_samples() -> None:
    own = resolve(asked(method="db-llm", end_to_end="kl", end_to_end_data="c4", end_to_end_samples=500), "quick")
    assert (own.text, own.text_samples, own.drawn_samples) == ("c4", 500, 96)
    shared = resolve(asked(method="db-llm", end_to_end="kl", end_to_end_samples=500), "quick")
    assert (shared.text, shared.text_samples, shared.drawn_samples) == (None, 500, 500)
