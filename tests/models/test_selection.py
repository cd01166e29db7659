"""Which layers are quantized."""

import time

import pytest

from tests.models.tiny import tiny_config
from ulbq.errors import InputError
from ulbq.formats import AffineScheme
from ulbq.formats.trellis import TrellisScheme
from ulbq.models.blocks import Linear, ModelStructure, structure
from ulbq.models.selection import ASKED, Selection, fitting, matches, of_artifact, select
from ulbq.models.skeleton import empty_model

_PREFIX = "model.layers.0."


def made(*layers: tuple[str, int, int]) -> ModelStructure:
    """A model of one block."""
    linears = tuple(Linear(_PREFIX + name, rows, columns) for name, rows, columns in layers)
    return ModelStructure("model.layers", 1, ("model.embed",), "head", False, (linears,), ("head",))


@pytest.fixture
def llama() -> ModelStructure:
    return structure(empty_model(tiny_config("llama")))


def left(selected: Selection) -> list[str]:
    return [linear.name for block in selected.found.linears for linear in block]


def test_all_of_a_plain_model_are(llama: ModelStructure) -> None:
    assert select(llama, (), ()) == Selection(llama)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("down_proj", 3), ("mlp", 9), ("layers.1", 7), ("*_proj", 21), ("mlp.*", 9), ("q_pro?", 3), ("layers.*.mlp", 9)],
)
def test_patterns_are_parts_of_names(pattern: str, count: int, llama: ModelStructure) -> None:
    skipped, chosen = select(llama, (pattern,), ()), select(llama, (), (pattern,))
    assert (len(left(skipped)), len(left(chosen))) == (21 - count, count)
    assert set(left(skipped)).isdisjoint(left(chosen))
    assert skipped.reasons == dict.fromkeys(left(chosen), ASKED)
    assert skipped.found.skipped == (*left(chosen), "lm_head")


def test_skip_and_only_go_together(llama: ModelStructure) -> None:
    assert left(select(llama, ("layers.0", "layers.2"), ("o_proj", "q_proj"))) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.o_proj",
    ]


@pytest.mark.parametrize("pattern", ["proj", "layers.3", "gate", "q_proj.weight", "q.proj"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str, llama: ModelStructure) -> None:
    for skip, only in ((pattern,), ()), ((), (pattern,)):
        with pytest.raises(InputError, match=rf"^No linear layer of the model's blocks matches '{pattern}'") as caught:
            select(llama, skip, only)
        assert caught.value.hint.startswith("Its layers: q_proj, k_proj")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*_proj", True), ("q*j", True), ("layers.*.mlp", False), ("layers.*.self_attn.?_proj", True), ("*x", False),
        ("*a*t*n.q", True), ("*a*t*n.*q", True), ("l*s.1.**.q_proj", True), ("l*r.1", False), ("*" * 40 + "!", False),
        ("*a" * 40, False),
    ],
)  # fmt: skip
def test_stars_are_any_letters_between_dots(pattern: str, found: bool) -> None:
    start = time.process_time()
    assert matches(pattern, "model.layers.1.self_attn.q_proj", end="") is found
    assert not matches(pattern + "!", "model.layers.1." + "a" * 200)
    assert time.process_time() - start < 0.5


_DECIDING = (
    *("mlp.gate", "mlp.router.gate", "mlp.gate.wg", "mlp.router.classifier", "mlp.shared_expert_gate", "router.proj"),
    *("self_attn.indexer.wk", "mamba.dt_proj", "linear_attn.in_proj_a", "linear_attn.in_proj_b", "mlp.router_gate"),
    *("linear_attn.in_proj_ba", "altup.correction_coefs"),
)
_OTHERS = ("mlp.gate_proj", "mamba.in_proj", "linear_attn.in_proj_qkvz", "mlp.experts.0.gate_proj", "self_attn.wq_b")


def test_what_decides_stays_unless_it_is_named() -> None:
    found = made(*((name, 64, 64) for name in (*_DECIDING, *_OTHERS)))
    assert left(select(found, (), ())) == [_PREFIX + name for name in _OTHERS]
    assert left(select(found, (), ("layers.0",))) == [_PREFIX + name for name in _OTHERS]
    assert left(select(found, (), ("mlp.gate", "dt_proj"))) == [_PREFIX + "mlp.gate", _PREFIX + "mamba.dt_proj"]


class TestFitting:
    SCHEME = AffineScheme(bits=4, group_size=32)

    def test_a_small_layer_that_no_group_divides_stays(self) -> None:
        selected = fitting(Selection(made(("a", 64, 64), ("odd", 4, 2))), self.SCHEME, 32)
        assert left(selected) == [_PREFIX + "a"]
        assert selected.reasons == {_PREFIX + "odd": "groups of 32 do not divide its 2 inputs"}

    def test_a_group_size_that_divides_little_is_refused(self) -> None:
        found = made(("a", 64, 64), ("b", 64, 96), ("odd", 4, 2))
        with pytest.raises(InputError, match="64 does not divide the 96 inputs") as caught:
            fitting(Selection(found), AffineScheme(bits=4, group_size=64), 64)
        assert caught.value.hint == "Sizes that divide every layer: 16, 32, -1 (whole rows)."

    def test_a_format_that_few_layers_do_not_fit(self) -> None:
        scheme = TrellisScheme(bits=2)
        assert left(fitting(Selection(made(("a", 64, 64), ("odd", 8, 16))), scheme, -1)) == [_PREFIX + "a"]
        with pytest.raises(InputError, match=r"'model\.layers\.0\.odd': 40 × 64 weights cannot be cut"):
            fitting(Selection(made(("a", 64, 64), ("odd", 40, 64))), scheme, -1)

    def test_nothing_left_is_refused(self) -> None:
        with pytest.raises(InputError, match="No layer is left"):
            fitting(select(made(("a", 64, 64)), ("a",), ()), self.SCHEME, 32)


def test_an_artifact_goes_on_with_the_layers_that_it_has(llama: ModelStructure) -> None:
    packed = {"model.layers.1.mlp.up_proj": AffineScheme(bits=4, group_size=32)}
    assert left(of_artifact(llama, packed)) == ["model.layers.1.mlp.up_proj"]
