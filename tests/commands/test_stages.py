"""``--stage`` in words."""

import pytest

from ulbq.commands.stages import keys, names, read_stages
from ulbq.errors import UsageError
from ulbq.training.stages import Stage


def test_stages_are_read_in_their_order() -> None:
    read = read_stages(["wpt:epochs=15,penalty=0.1,scale-rate=1e-2", "opt:epochs=5"])
    assert [Stage.model_validate(stage) for stage in read] == [
        Stage(name="wpt", epochs=15, penalty=0.1, scale_rate=0.01),
        Stage(name="opt", epochs=5),
    ]


def test_every_field_of_a_stage_can_be_typed() -> None:
    for name in names():
        text = f"{name}:" + ",".join(f"{key}=1" for key in keys())
        assert Stage.model_validate(read_stages([text])[0]).model_fields_set == Stage.model_fields.keys()


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
        read_stages([text])
    assert hint in refused.value.hint
