import pytest
import torch

from ulbq import formats
from ulbq.formats import AffineScheme
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
        assert torch.equal(made(x), expected)


def test_the_cache_keeps_one_weight_until_the_dtype_or_the_tensors_change() -> None:
    made = layer(cache=True)
    first = made.weight_dense(torch.float32)
    assert made.weight_dense(torch.float32) is first
    assert made.weight_dense(torch.bfloat16).dtype == torch.bfloat16
    made.assign(packed(seed=1))
    assert torch.equal(made.weight_dense(torch.float32), formats.dequantize(SCHEME, packed(seed=1), 24))
    assert layer().weight_dense(torch.float32) is not layer().weight_dense(torch.float32)


def test_the_cache_does_not_outlive_a_move_to_another_device() -> None:
    made = layer(cache=True)
    made.weight_dense(torch.float32)
    assert made.to("meta").weight_dense(torch.float32).is_meta


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
