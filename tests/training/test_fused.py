"""What compiled kernels take over in a block that trains, and what they leave alone."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRotaryEmbedding

from ulbq.formats import AffineScheme
from ulbq.kernels import between, build
from ulbq.quantizers.affine import AffineQuantizer
from ulbq.solvers.rtn import round_to_nearest
from ulbq.training.fused import FusedParts
from ulbq.training.linear import TrainedLinear
from ulbq.training.precision import Precision

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

CPU = torch.device("cpu")
FLOATS = [torch.float32, torch.bfloat16]


def llama(activation: str = "silu") -> tuple[nn.Module, dict[str, object]]:
    """A block whose weights are quantized, as it trains."""
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_attention_heads=3,
        num_key_value_heads=1,
        hidden_act=activation,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    block = LlamaDecoderLayer(config, 0).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    scheme = AffineScheme(bits=4, group_size=16)
    for name, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear):
            weight = linear.weight.detach()
            start = round_to_nearest(weight, scheme)
            block.set_submodule(name, TrainedLinear(AffineQuantizer(weight, start.scales, start.zeros, scheme), None))
    hidden = torch.empty(1, 7, 48)
    return block, {"position_embeddings": LlamaRotaryEmbedding(config)(hidden, torch.arange(7)[None])}


def run(block: nn.Module, kwargs: dict[str, object], precision: Precision) -> dict[str, torch.Tensor]:
    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with precision.autocast():
        output = block(x, **kwargs)
    block.zero_grad()
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(2)))
    assert x.grad is not None
    return {"output": output.detach(), "x": x.grad} | {name: p.grad.clone() for name, p in block.named_parameters()}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    for name in ("rms_norm", "rotate", "gated"):
        real = getattr(between, name)

        def watched(*given: object, name: str = name, real=real, **named: object) -> object:
            calls.append(name)
            return real(*given, **named)

        monkeypatch.setattr(between, name, watched)
    return calls


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_block_gives_the_same_with_them(dtype: torch.dtype, counted: list[str]) -> None:
    block, kwargs = llama()
    precision = Precision(CPU, dtype)
    wanted = run(block, kwargs, precision)
    assert not counted
    with FusedParts(block, precision).active():
        found = run(block, kwargs, precision)
    assert sorted(counted) == ["gated", "rms_norm", "rms_norm", "rotate", "rotate"]
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


def test_everything_is_as_before_behind_an_error() -> None:
    block, kwargs = llama()
    rotation = modeling_llama.apply_rotary_pos_emb
    wanted = run(block, kwargs, Precision(CPU, torch.float32))
    with pytest.raises(RuntimeError, match="inside"), FusedParts(block, Precision(CPU, torch.float32)).active():
        raise RuntimeError("inside")
    assert modeling_llama.apply_rotary_pos_emb is rotation
    assert not any("forward" in vars(module) for module in block.modules())
    found = run(block, kwargs, Precision(CPU, torch.float32))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_forward_of_a_modules_own_comes_back() -> None:
    block, _ = llama()
    norm = block.get_submodule("input_layernorm")
    own = norm.forward
    norm.forward = own
    with FusedParts(block, Precision(CPU, torch.float32)).active():
        assert norm.forward is not own
    assert vars(norm)["forward"] is own


class Centred(nn.Module):
    """Looks like a root mean square norm by its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, (8,), self.weight, eps=self.eps)


def test_norms_with_another_formula_stay() -> None:
    norms = nn.ModuleList([GemmaRMSNorm(8), Centred(), nn.LayerNorm(8)])
    with FusedParts(norms, Precision(CPU, torch.float32)).active():
        assert not any("forward" in vars(norm) for norm in norms)


def test_rotations_of_another_kind_stay() -> None:
    """GLM rotates neighbours, not halves."""
    before = modeling_glm.apply_rotary_pos_emb
    part = type("Part", (nn.Module,), {"__module__": modeling_glm.__name__})()
    with FusedParts(part, Precision(CPU, torch.float32)).active():
        assert modeling_glm.apply_rotary_pos_emb is before


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu", "silu"])
def test_gates_of_another_kind_stay_however_small_their_weights(activation: str, size: float) -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=128, hidden_act=activation)
    torch.manual_seed(0)
    gates = nn.ModuleList([LlamaMLP(config)])
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.mul_(size)
    with FusedParts(gates, Precision(CPU, torch.float32)).active():
        assert ("forward" in vars(gates[0])) == (activation == "silu")


class Demanding(Centred):
    """A norm that is called with more than its name tells."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.weight * x * gate


def test_modules_that_take_more_stay() -> None:
    norms = nn.ModuleList([Demanding()])
    with FusedParts(norms, Precision(CPU, torch.float32)).active():
        assert "forward" not in vars(norms[0])


def test_a_norm_that_may_take_a_gate_gets_it() -> None:
    torch.manual_seed(0)
    norm, x, gate = BambaRMSNormGated(8, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    wanted, alone = norm(x, gate), norm(x)
    with FusedParts(nn.ModuleList([norm]), Precision(CPU, torch.float32)).active():
        assert "forward" in vars(norm)
        assert torch.equal(norm(x, gate), wanted)
        assert torch.equal(norm(x, gate=gate), wanted)
        torch.testing.assert_close(norm(x), alone)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_gates_of_another_kind_stay(activation: str) -> None:
    block, _ = llama(activation)
    with FusedParts(block, Precision(CPU, torch.float32)).active():
        assert "forward" not in vars(block.get_submodule("mlp"))


def test_nothing_is_taken_over_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "unavailable_reason", lambda: "no compiler")
    block, kwargs = llama()
    wanted = run(block, kwargs, Precision(CPU, torch.float32))
    with FusedParts(block, Precision(CPU, torch.float32)).active():
        found = run(block, kwargs, Precision(CPU, torch.float32))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
