"""Stages in words."""

import pytest
from pydantic import TypeAdapter

from ulbq.config.stages import STAGE_KEYS, STAGE_NAMES, Stage, Stages
from ulbq.errors import UsageError

STAGES: TypeAdapter[tuple[Stage, ...]] = TypeAdapter(Stages)


def test_stages_are_read_in_their_order() -> None:
    read = STAGES.validate_python(["wpt:epochs=15,penalty=0.1,scale-lr=1e-2", "opt:epochs=5"])
    assert read == (Stage(name="wpt", epochs=15, penalty=0.1, scale_lr=0.01), Stage(name="opt", epochs=5))


def test_every_field_of_a_stage_can_be_typed_and_is_shown_so() -> None:
    for name in STAGE_NAMES:
        text = f"{name}:" + ",".join(f"{key}=1" for key in STAGE_KEYS)
        [stage] = STAGES.validate_python([text])
        assert stage.model_fields_set == Stage.model_fields.keys()
        assert str(stage) == text


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("wtp:epochs=1", "no stage 'wtp'", "wpt, mixed, opt"),
        ("wpt", "names no epochs", "wpt:epochs=N"),
        ("wpt:epoch=1", "has no 'epoch'", "Did you mean epochs"),
        ("wpt:zzz=1", "has no 'zzz'", "Keys:"),
        ("wpt:epochs=1.5", "'1.5' is no whole number", "epochs=N"),
        ("wpt:epochs=1,penalty=nan", "'nan' is no number", "penalty=N"),
        ("wpt:epochs=1,penalty=-1", "'-1' is no number", "penalty=N"),
        ("wpt:epochs=1,epochs=2", "stands there twice", "Leave one out"),
        ("wpt:epochs", "'' is no whole number", "epochs=N"),
    ],
)
def test_other_words_are_refused(text: str, said: str, hint: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        STAGES.validate_python([text])
    assert hint in refused.value.hint
