import pytest
import torch

from tests.formats.columns import random_columns
from ulbq import formats
from ulbq.formats import AffineScheme, AnyScheme, BinaryMosScheme, CodebookScheme, DualBinaryScheme, codebook
from ulbq.formats.affine import pack
from ulbq.nn.quant_linear import QuantLinear, linear_layer

SCHEME = AffineScheme(bits=3, group_size=8)


def packed(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(8, (5, 24), generator=generator)
    scales = torch.rand(5, 3, generator=generator)
    return pack(SCHEME, codes, scales, torch.randint(8, (5, 3), generator=generator))


def layer(cache: bool = False, bias: bool = False) -> QuantLinear:
    made = QuantLinear(SCHEME, 24, 5, bias=bias, cache=cache)
    made.assign(packed())
    return made


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_a_linear_layer_with_the_dequantized_weight(cache: bool, dtype: torch.dtype) -> None:
    made = layer(cache, bias=True)
    assert made.bias is not None
    made.bias.data.uniform_(-1, 1)
    x = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = formats.dequantize(SCHEME, packed(), 24, dtype)
    expected = torch.nn.functional.linear(x, weight, made.bias.to(dtype))
    for _ in range(2):
        if cache or dtype == torch.float32:
            assert torch.equal(made(x), expected)
        else:  # the bias is added to a product that was rounded before
            torch.testing.assert_close(made(x), expected, rtol=2**-7, atol=2**-7)


def test_the_cache_keeps_one_weight_until_the_dtype_or_the_tensors_change() -> None:
    made = layer(cache=True)
    first = made.weight_dense(torch.float32)
    assert made.weight_dense(torch.float32) is first
    assert made.weight_dense(torch.bfloat16).dtype == torch.bfloat16
    made.assign(packed(seed=1))
    assert torch.equal(made.weight_dense(torch.float32), formats.dequantize(SCHEME, packed(seed=1), 24))
    assert layer().weight_dense(torch.float32) is not layer().weight_dense(torch.float32)


@pytest.mark.parametrize("columns", [False, True])
def test_the_cache_does_not_outlive_a_move_to_another_device(columns: bool) -> None:
    made = random_layer(SCHEMES[-1], cache=True) if columns else layer(cache=True)
    made.weight_dense(torch.float32)
    assert made.to("meta").weight_dense(torch.float32).is_meta


WIDTHS = [2] * 14 + [4] * 3 + [3] + [2] * 6
SCHEMES = [
    *(SCHEME, DualBinaryScheme(group_size=8), BinaryMosScheme(experts=4, zeros="input"), CodebookScheme(bits=3)),
    CodebookScheme(widths={2: 20, 3: 1, 4: 3}, outliers=7),
]


def random_layer(scheme: AnyScheme, *, bias: bool = False, cache: bool = False) -> QuantLinear:
    """Whatever bits: every code means something, save that only some sets of outliers are sets."""
    generator = torch.Generator().manual_seed(3)
    made = QuantLinear(scheme, 24, 5, bias=bias, cache=cache)
    if isinstance(scheme, CodebookScheme) and scheme.outliers:
        made.assign(codebook.pack(*random_columns(5, WIDTHS, scheme.outliers)))
        return made
    for tensor in made.tensors().values():
        if tensor.dtype == torch.uint8:
            tensor.random_(256, generator=generator)
        else:
            tensor.normal_(generator=generator)
    return made


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_every_format_multiplies_as_it_says(scheme: AnyScheme, cache: bool) -> None:
    made = random_layer(scheme, bias=True, cache=cache)
    assert made.bias is not None
    made.bias.data.fill_(0.5)
    x = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(1))
    factor = formats.matrix(scheme, made.tensors(), 24)
    for _ in range(2):
        expected = formats.multiply(scheme, made.tensors(), x, factor, made.bias)
        torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", [1, 4])
def test_a_mixture_is_no_linear_function_unless_it_has_one_expert(experts: int) -> None:
    made = random_layer(BinaryMosScheme(experts=experts), cache=True)
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    y, dense = made(x), x @ made.weight_dense(torch.float32).T
    difference = ((y - dense).norm() / y.norm()).item()
    assert difference < 1e-5 if experts == 1 else difference > 0.2


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_packed_tensors_keep_their_dtypes_and_values_when_the_model_is_cast(scheme: AnyScheme) -> None:
    made = random_layer(scheme, bias=True)
    before = {name: tensor.clone() for name, tensor in made.tensors().items()}
    block = torch.nn.Sequential(made).to(torch.bfloat16).float().half()
    assert block[0].bias.dtype == torch.float16
    for name, tensor in made.tensors().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    moved = block.to("meta", torch.bfloat16)[0]
    assert {name: tensor.dtype for name, tensor in moved.tensors().items()} == {
        name: tensor.dtype for name, tensor in before.items()
    }
    assert all(tensor.is_meta for tensor in moved.tensors().values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"scales": torch.zeros(5, 4, dtype=torch.float16)},
        {"scales": torch.zeros(5, 3)},
        {"codes": torch.zeros(2, 5, 3, dtype=torch.uint8)},
    ],
)
def test_tensors_that_do_not_fit_are_refused(wrong: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        layer().assign({**packed(), **wrong})
    with pytest.raises(ValueError, match="zeros"):
        layer().assign({name: tensor for name, tensor in packed().items() if name != "zeros"})


def test_only_dense_linear_layers_are_handed_out() -> None:
    block = torch.nn.ModuleDict({"dense": torch.nn.Linear(2, 2), "packed": layer()})
    assert linear_layer(block, "dense") is block["dense"]
    with pytest.raises(TypeError, match="packed"):
        linear_layer(block, "packed")


class TestWeight:
    """What peft and others see of a packed layer."""

    def test_it_is_a_linear_layer_without_a_weight_of_its_own(self) -> None:
        made = layer(bias=True)
        assert isinstance(made, torch.nn.Linear)
        assert [name for name, _ in made.named_parameters()] == ["bias"]
        assert set(made.state_dict()) == {"bias", "codes", "scales", "zeros"}
        assert torch.equal(made.weight, formats.dequantize(SCHEME, packed(), 24))
        assert not made.weight.requires_grad

    @pytest.mark.parametrize("cache", [False, True])
    def test_its_dtype_is_that_of_the_module(self, cache: bool) -> None:
        made = QuantLinear(SCHEME, 24, 5, dtype=torch.bfloat16, cache=cache)
        assert made.weight.dtype == torch.bfloat16
        assert made.to(torch.float16).weight.dtype == torch.float16
        assert made.to("cpu").weight.dtype == torch.float16
        assert made.to("meta", torch.float32).weight.dtype == torch.float32

    def test_reading_it_costs_nothing_where_it_is_kept(self) -> None:
        made = layer(cache=True)
        made(torch.zeros(1, 24))
        assert made.weight.data_ptr() == made.weight_dense(torch.float32).data_ptr()

    @pytest.mark.parametrize("cache", [False, True])
    def test_nobody_can_write_to_it(self, cache: bool) -> None:
        made = layer(cache)
        before = made(torch.eye(24))
        with pytest.raises(TypeError, match="cannot be changed"):
            made.weight.data += 1
        with pytest.raises(AttributeError):
            made.weight = torch.zeros(5, 24)
        with pytest.raises(KeyError):
            made.weight = torch.nn.Parameter(torch.zeros(5, 24))
        assert torch.equal(made(torch.eye(24)), before)

    def test_what_is_computed_from_it_is_a_plain_tensor(self) -> None:
        weight = layer().weight
        x = torch.zeros(2, 24, requires_grad=True)
        for computed in (weight + 1, weight.to(torch.bfloat16), torch.nn.functional.linear(x, weight), weight.T):
            assert type(computed) is torch.Tensor
