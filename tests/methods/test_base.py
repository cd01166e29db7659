import pytest
import torch

from ulbq.errors import NumericsError
from ulbq.formats import AffineScheme, dual_binary
from ulbq.formats.dual_binary import DualBinaryScheme
from ulbq.methods.base import BlockTask, check_packed
from ulbq.methods.rtn import Rtn
from ulbq.methods.training import half_vector
from ulbq.training.precision import Precision

SCHEME = DualBinaryScheme(group_size=8)


def matrix(largest: float = 1.0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A packed matrix and the float32 weight that its scales stood for."""
    generator = torch.Generator().manual_seed(0)
    planes = torch.randint(2, (2, 4, 16), generator=generator)
    scales = torch.rand(2, 4, 2, generator=generator) * largest
    dense = (planes.unflatten(2, (2, 8)) * scales.unsqueeze(-1)).sum(0).flatten(1)
    return dual_binary.pack(SCHEME, planes, scales), dense


def test_the_rounding_of_the_scales_is_no_difference() -> None:
    check_packed("layer", SCHEME, *matrix())


def test_another_weight_is_one() -> None:
    packed, dense = matrix()
    dense[2, 5] += 0.01 * dense.abs().max()
    with pytest.raises(NumericsError, match="'layer'"):
        check_packed("layer", SCHEME, packed, dense)


@pytest.mark.parametrize("largest", [1e6, 1e-9])
def test_scales_that_float16_cannot_hold_are_noticed(largest: float) -> None:
    packed, dense = matrix(largest)
    if largest < 1:
        dense *= 100  # all of it below float16's smallest number, and yet no zeros
    with pytest.raises(NumericsError):
        check_packed("layer", SCHEME, packed, dense)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_matrix_of_zeros_can_be_rounded(bits: int, symmetric: bool) -> None:
    block = torch.nn.Sequential(torch.nn.Linear(16, 4, bias=False))
    block.requires_grad_(False)
    block[0].weight.zero_()
    cpu = Precision(torch.device("cpu"), torch.float32)
    task = BlockTask(0, block, ("0",), {}, None, cpu, 0, lambda error: None)
    packed = Rtn(AffineScheme(bits=bits, group_size=8, symmetric=symmetric)).quantize_block(task).packed["0"]
    assert packed["scales"].count_nonzero() == 0


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.0, -0.3, 0.0], torch.float16),
        ([1.0, 1e5], torch.float32),  # beyond float16's range
        ([1.0, 1e-7], torch.float32),  # below where it rounds finely
    ],
)
def test_trained_vectors_are_stored_in_half_precision_where_that_holds_them(
    values: list[float], dtype: torch.dtype
) -> None:
    stored = half_vector(torch.tensor(values))
    assert stored.dtype == dtype
    torch.testing.assert_close(stored.float(), torch.tensor(values), rtol=1e-3, atol=0)
