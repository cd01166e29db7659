"""Adapters against the peft library, whose numbers they have to be."""

import peft
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from ulbq.config.adapter import AdapterConfig
from ulbq.formats import AffineScheme, affine
from ulbq.nn.adapter import AdaptedLinear, Adapter
from ulbq.nn.quant_linear import QuantLinear

IN, OUT = 24, 10


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.q_proj = layer
        # peft asks the first parameter for the model's device.
        self.norm = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs() -> torch.Tensor:
    return torch.randn(2, 7, IN, generator=seeded(9))


def dense(bias: bool) -> nn.Linear:
    layer = nn.Linear(IN, OUT, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(1)))
    return layer


def packed(bias: bool) -> QuantLinear:
    scheme = AffineScheme(bits=3, group_size=8)
    codes = torch.randint(8, (OUT, IN), generator=seeded(2))
    scales = torch.rand(OUT, 3, generator=seeded(3)) + 0.1
    layer = QuantLinear(scheme, IN, OUT, bias=bias)
    layer.assign(affine.pack(scheme, codes, scales, torch.randint(8, (OUT, 3), generator=seeded(4))))
    if layer.bias is not None:
        layer.bias.data.copy_(torch.randn(OUT, generator=seeded(5)))
    return layer


def trained(weight: torch.Tensor, *, dora: bool, dropout: float = 0.0) -> Adapter:
    """An adapter that changes a good deal."""
    adapter = Adapter(AdapterConfig(rank=4, alpha=6, dropout=dropout, dora=dora), IN, OUT, generator=seeded(6))
    adapter.init_magnitude(weight)
    with torch.no_grad():
        adapter.lora_b.copy_(torch.randn(OUT, 4, generator=seeded(7)))
        if adapter.magnitude is not None:
            adapter.magnitude.mul_(torch.rand(OUT, generator=seeded(8)) + 0.5)
    return adapter


def by_peft(layer: nn.Module, adapter: Adapter) -> nn.Module:
    """The layer under peft's own adapter of the same values."""
    config = adapter.config
    wrapped = peft.get_peft_model(
        Model(layer),
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            use_dora=config.dora,
            target_modules=["q_proj"],
        ),
    )
    own = {"lora_A.weight": adapter.lora_a, "lora_B.weight": adapter.lora_b, "lora_magnitude_vector": adapter.magnitude}
    values = {f"base_model.model.q_proj.{name}": value for name, value in own.items() if value is not None}
    assert values.keys() == peft.get_peft_model_state_dict(wrapped).keys()
    peft.set_peft_model_state_dict(wrapped, values)
    return wrapped.eval()


@pytest.mark.parametrize("make", [dense, packed])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dora", [False, True])
class TestAgainstPeft:
    def test_outputs(self, make, bias: bool, dora: bool) -> None:
        layer = make(bias)
        adapter = trained(layer.weight, dora=dora)
        ours = AdaptedLinear(make(bias), adapter)(inputs())
        torch.testing.assert_close(ours, by_peft(layer, adapter)(inputs()), atol=1e-5, rtol=1e-5)
        assert (ours - layer(inputs())).abs().max() > 1

    def test_merged_weight(self, make, bias: bool, dora: bool) -> None:
        layer = make(bias)
        adapter = trained(layer.weight, dora=dora)
        merged = nn.functional.linear(inputs(), adapter.merged(layer.weight), layer.bias)
        torch.testing.assert_close(merged, by_peft(layer, adapter)(inputs()), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_gradients(self, make, bias: bool, dora: bool, dropout: float) -> None:
        """The base stays as it is, packed or not; A, B and the magnitudes learn."""
        layer = make(bias)
        adapter = trained(layer.weight, dora=dora, dropout=dropout)
        theirs = by_peft(layer, adapter).train()
        x = inputs().requires_grad_()
        torch.manual_seed(0)
        theirs(x).square().sum().backward()
        base = make(bias).requires_grad_(False)
        mine = inputs().requires_grad_()
        torch.manual_seed(0)
        adapter.train()
        output = adapter(mine, nn.functional.linear(mine, base.weight), lambda: base.weight)
        (output if base.bias is None else output + base.bias).square().sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(mine.grad, x.grad, atol=1e-3, rtol=1e-4)
        grads = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
        own = [adapter.lora_a.grad, adapter.lora_b.grad, *([adapter.magnitude.grad] if dora else [])]
        assert len(grads) == len(own) == 2 + dora
        for name, expected in grads.items():
            place = 0 if "lora_A" in name else 1 if "lora_B" in name else 2
            assert expected.abs().max() > 0
            torch.testing.assert_close(own[place], expected, atol=1e-2, rtol=1e-4)
        assert all(parameter.grad is None for parameter in base.parameters())


@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing(dora: bool) -> None:
    layer = dense(bias=True)
    adapter = Adapter(AdapterConfig(rank=3, dora=dora), IN, OUT, generator=seeded())
    adapter.init_magnitude(layer.weight)
    torch.testing.assert_close(AdaptedLinear(layer, adapter)(inputs()), layer(inputs()), atol=1e-5, rtol=1e-5)
    again = Adapter(AdapterConfig(rank=3, dora=dora), IN, OUT, generator=seeded())
    assert torch.equal(again.lora_a, adapter.lora_a)
    assert adapter.lora_a.abs().max() <= IN**-0.5


def test_a_row_of_zeros_stays_silent_and_finite_here_and_in_peft() -> None:
    layer = dense(bias=False)
    with torch.no_grad():
        layer.weight[3] = 0
    adapter = Adapter(AdapterConfig(rank=3, dora=True), IN, OUT, generator=seeded())
    adapter.init_magnitude(layer.weight)
    adapter.assign(adapter.tensors())  # as it comes back from the file
    for output in (AdaptedLinear(layer, adapter)(inputs()), by_peft(layer, adapter)(inputs())):
        assert torch.isfinite(output).all()
        torch.testing.assert_close(output, layer(inputs()), atol=1e-2, rtol=1e-2)
        assert not output[..., 3].any()


def test_the_weight_learns_through_the_output_with_the_norm_held_constant() -> None:
    adapter = trained(dense(bias=False).weight, dora=True)
    assert adapter.magnitude is not None
    weight = dense(bias=False).weight
    x = inputs()
    adapter(x, nn.functional.linear(x, weight), weight).sum().backward()
    norms = torch.linalg.vector_norm(weight + adapter.delta(), dim=1)
    expected = (adapter.magnitude / norms).outer(x.sum((0, 1)))
    torch.testing.assert_close(weight.grad, expected.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_it_keeps_the_dtype_and_runs_under_autocast(dora: bool) -> None:
    layer = dense(bias=True)
    adapter = trained(layer.weight, dora=dora)
    exact = AdaptedLinear(layer, adapter)(inputs())
    with torch.autocast("cpu", torch.bfloat16):
        assert adapter.delta().dtype == torch.float32
        cast = AdaptedLinear(layer, adapter)(inputs())
    half = AdaptedLinear(dense(bias=True).bfloat16(), adapter)(inputs().bfloat16())
    assert cast.dtype == half.dtype == torch.bfloat16
    for rounded in (cast, half):
        torch.testing.assert_close(rounded.float(), exact, atol=0.5, rtol=0.05)


def test_stored_tensors_come_back() -> None:
    adapter = trained(dense(bias=False).weight, dora=True)
    stored = adapter.tensors()
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert sum(tensor.nbytes for tensor in stored.values()) * 8 == adapter.config.bits(OUT, IN)
    other = Adapter(adapter.config, IN, OUT)
    other.assign(stored)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in other.tensors().items())
    with pytest.raises(ValueError, match="lora_B"):
        other.assign(stored | {"lora_B.weight": torch.zeros(OUT, 5)})
    with pytest.raises(ValueError, match="'lora_C' is unknown"):
        other.assign(stored | {"lora_C": torch.zeros(1)})


def test_targets_match_as_in_peft() -> None:
    assert AdapterConfig().matches("model.layers.0.mlp.up_proj")
    config = AdapterConfig(targets=("q_proj", "mlp.up_proj"))
    assert config.matches("model.layers.0.self_attn.q_proj")
    assert config.matches("mlp.up_proj")
    assert not config.matches("model.layers.0.experts.up_proj")
    assert not config.matches("model.layers.0.self_attn.seq_proj")


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"alpha": float("inf")}])
def test_forms_that_make_no_adapter_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        AdapterConfig.model_validate(wrong)


def test_peft_cannot_merge_into_a_packed_weight() -> None:
    layer = packed(bias=False)
    wrapped = by_peft(layer, trained(layer.weight, dora=False))
    before = layer(inputs())
    with pytest.raises(TypeError, match="merge-adapter"):
        wrapped.merge_and_unload()
    assert torch.equal(layer(inputs()), before)
