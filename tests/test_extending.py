"""A format, a target and a metric of one's own, as docs/development/extending.md adds them, go the whole way."""

import io
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Literal, Self

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

from tests.models.tiny import save_tiny
from ulbq import formats
from ulbq.artifacts.shards import LazyTensors, write_index, write_shard
from ulbq.commands import inspection, kernel_table
from ulbq.config.convert import TARGETS, ConvertRequest
from ulbq.config.evaluate import EvaluateRequest
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import InputError
from ulbq.evaluation.evaluated import EvaluatedModel
from ulbq.evaluation.measurer import Measurer
from ulbq.evaluation.metrics import METRICS
from ulbq.evaluation.metrics.base import Metric
from ulbq.evaluation.results import Measured, ModelScores, Results
from ulbq.export.fit import Candidate
from ulbq.export.rules import Reader
from ulbq.export.targets import base
from ulbq.formats.bits import BaseScheme, Format, TensorSpec, pack_planes, packed_length, unpack_planes
from ulbq.kernels import LAYOUTS, Case, choose
from ulbq.methods import METHODS, Rtn
from ulbq.methods.base import BlockResult, BlockTask, check_packed
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.nn.quant_linear import QuantLinear
from ulbq.pipeline.convert import convert
from ulbq.pipeline.evaluate import evaluate
from ulbq.pipeline.inspect import inspect
from ulbq.pipeline.quantize import quantize

TOKENS = torch.randint(3, 250, (1, 16), generator=torch.Generator().manual_seed(3))


class TernaryScheme(BaseScheme):
    """``Ŵ = s · (q − 1)`` with ``q`` from 0 to 2 and one scale a row."""

    format: Literal["ternary"] = "ternary"

    @property
    def bits(self) -> int:
        return 2

    @property
    def group_size(self) -> int:
        return -1

    @property
    def label(self) -> str:
        return "t2"

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        shape = (2, out_features, packed_length(in_features))
        return {
            "codes": TensorSpec(dtype="uint8", shape=shape, role="codes"),
            "scales": TensorSpec(dtype="float16", shape=(out_features, 1), role="scales"),
        }


def dequantize(
    scheme: TernaryScheme, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return ((unpack_planes(tensors["codes"], in_features).float() - 1) * tensors["scales"].float()).to(dtype)


class Ternary(Rtn):
    """Rounds to the nearest of three."""

    Options = Rtn.Options

    @classmethod
    def from_options(cls, options: object, group_size: int) -> Self:
        return cls(TernaryScheme(), search=False)  # type: ignore[arg-type]

    def quantize_block(self, task: BlockTask) -> BlockResult:
        packed = {}
        for linear in task.linears:
            weight = task.weight(linear)
            scales = weight.abs().mean(1, keepdim=True).half()
            codes = (weight / scales.float()).round().clamp(-1, 1) + 1
            packed[linear] = {"codes": pack_planes(codes.to(torch.uint8), 2), "scales": scales}
            check_packed(linear, self.scheme, packed[linear], (codes - 1) * scales.float())
        return BlockResult(packed)


@pytest.fixture
def ternary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact in a format that ulbq does not have."""
    monkeypatch.setitem(formats.FORMATS, "ternary", Format(TernaryScheme, dequantize))
    monkeypatch.setitem(METHODS, "rtn", Ternary)
    source = save_tiny("llama", tmp_path / "tiny", tied=False)
    return quantize(QuantizeRequest(source=str(source), method="rtn", device="cpu", out=tmp_path / "q"))[0]


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_model(resolve(path), dtype=torch.float32)(TOKENS).logits
    return found


def shown(path: Path) -> str:
    """What ``inspect`` prints."""
    told = io.StringIO()
    inspection.show(Console(file=told, width=200), inspect(path), layers=True)
    return told.getvalue()


def test_a_format_of_ones_own(ternary: Path, tmp_path: Path) -> None:
    source = resolve(ternary)
    name = "model.layers.0.mlp.up_proj"
    assert source.packed[name] == TernaryScheme()
    model = load_model(source, dtype=torch.float32)
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    x = torch.randn(3, layer.in_features)
    weight = dequantize(TernaryScheme(), source.read_packed(name), layer.in_features)
    torch.testing.assert_close(layer(x), x @ weight.T)
    assert torch.equal(layer.weight_dense(torch.float32), weight)
    assert "ternary" in shown(ternary)
    dense, _ = convert(ConvertRequest(source=str(ternary), to="dense", dtype="fp32", out=tmp_path / "d"))
    assert torch.equal(LazyTensors.folder(dense).read(f"{name}.weight"), weight)
    torch.testing.assert_close(logits(dense), logits(ternary))
    with pytest.raises(InputError, match="integer codes") as caught:
        convert(ConvertRequest(source=str(ternary), to="gptq", out=tmp_path / "g"))
    assert caught.value.hint == "Targets that can hold it: dense, gguf, half."


def test_no_kernel_takes_a_format_that_it_does_not_know(ternary: Path) -> None:
    for device in ("cpu", "cuda"):
        choice = choose(Case(TernaryScheme(), 64, 128, device, torch.bfloat16, 1))  # type: ignore[arg-type]
        assert choice.layout is LAYOUTS[-1]
    told = io.StringIO()
    kernel_table.show_kernels(Console(file=told, width=300), inspect(ternary))
    assert "affine, dual_binary, binary_mos only" in told.getvalue()


class Norms(base.Target):
    """The norms and nothing else."""

    name = "norms"
    readers: ClassVar = {"transformers": Reader("load_norms(DIR)", rank=9)}

    def unsupported_reason(self, candidate: Candidate, *, merge_adapter: bool = False) -> str | None:
        return None if candidate.config.model_type == "llama" else "its norms are none of Llama's"

    def bits(self, candidate: Candidate, *, merge_adapter: bool = False) -> int:
        return 0

    def write(self, conversion: base.Conversion, folder: Path, on_step: Callable[[str], None]) -> base.Written:
        source = conversion.source
        kept = {name: source.read(name) for name in source.names if name.endswith("norm.weight")}
        write_shard(folder / "norms.safetensors", kept)
        write_index(folder, {"norms.safetensors": list(kept)})
        on_step("norms")
        return base.Written(f"{len(kept)} norms", ["norms.safetensors", "model.safetensors.index.json"])

    def steps(self, source: object) -> int:
        return 1

    def unopened_reason(self, candidate: Candidate, folder: Path) -> str | None:
        return "Norms alone do not run."


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that ulbq does not have."""
    module = ModuleType("ulbq.export.targets.norms")
    module.TARGET = Norms()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(TARGETS, "norms", "the norms alone")


@pytest.mark.usefixtures("norms")
def test_a_target_of_ones_own(tmp_path: Path) -> None:
    tiny = save_tiny("llama", tmp_path / "tiny", tied=False)
    asked = {"method": "rtn", "bits": 4, "group_size": 32, "device": "cpu"}
    source, _ = quantize(QuantizeRequest(source=str(tiny), out=tmp_path / "q", **asked))

    def ask(source: Path, out: str) -> ConvertRequest:
        # Which names a request takes is settled when its class is made.
        return ConvertRequest(source=str(source), out=tmp_path / out).model_copy(update={"to": "norms"})

    path, manifest = convert(ask(source, "n"))
    assert manifest.target == "norms"
    assert manifest.files.keys() == {"norms.safetensors", "model.safetensors.index.json", "README.md"}
    kept = {name for name in resolve(tiny).names if name.endswith("norm.weight")}
    assert LazyTensors.folder(path).names == kept
    card = (path / "README.md").read_text()
    assert "| transformers | `load_norms(DIR)` | CPU or GPU | 16 |" in card
    assert f"Stored as norms: {len(kept)} norms" in card
    assert "norms, bf16" in shown(path)
    with pytest.raises(InputError, match=r"cannot be converted to norms: its norms are none of Llama's") as caught:
        convert(ask(save_tiny("qwen2", tmp_path / "other"), "x"))
    assert caught.value.hint == "Targets that can hold it: dense, gguf."
    with pytest.raises(InputError, match="converted for other engines"):
        resolve(path)


class Entropy(Metric):
    """How sure a model is of the next token."""

    name = "entropy"
    section = "Entropy"

    def measure(
        self, measurer: Measurer, candidate: EvaluatedModel, model: Callable[[], PreTrainedModel]
    ) -> dict[str, Measured]:
        def work() -> dict[str, Measured]:
            with torch.no_grad():
                log_p = model()(TOKENS).logits.float().log_softmax(-1)
            return {"mean, nats": Measured(value=float(-(log_p.exp() * log_p).sum(-1).mean()), higher_is_better=False)}

        if not measurer.request.entropy:  # type: ignore[attr-defined]
            return {}
        return measurer.step(f"{candidate.name}: entropy", dict[str, Measured], work)

    def notes(self, results: Results) -> list[str]:
        return ["Entropy: of sixteen tokens."] if any("entropy" in dict(scores) for scores in results.models) else []


class WithEntropy(EvaluateRequest):
    entropy: bool = False

    @property
    def asks(self) -> bool:
        return self.entropy or super().asks


def test_a_metric_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "entropy", Entropy())
    tiny = save_tiny("llama", tmp_path / "tiny", tied=False)
    asked = {"method": "rtn", "bits": 2, "group_size": 32, "device": "cpu"}
    made, _ = quantize(QuantizeRequest(source=str(tiny), out=tmp_path / "q", **asked))

    def measured(out: str, *sources: Path, **options: bool) -> tuple[Path, ModelScores]:
        paths = tuple(map(str, sources))
        path, manifest = evaluate(WithEntropy(sources=paths, out=tmp_path / out, dtype="fp32", device="cpu", **options))
        return path, Results.model_validate(manifest.results).models[-1]

    one, scores = measured("one", made, entropy=True, parent_scores=False)
    value = json.loads((one / "results.json").read_text())["models"][0]["entropy"]["mean, nats"]["value"]
    assert 0 < value < 6
    assert scores.fidelity is None
    page = (one / "report.html").read_text()
    assert f'<div class="value">{value:.4f}</div><div class="label">mean, nats</div>' in page
    assert "Entropy: of sixteen tokens." in page
    for path in (one, measured("both", one, measured("two", tiny, entropy=True)[0])[0]):
        assert re.search(rf"Entropy *\n +mean, nats ↓ .*{value:.4f}", shown(path))
    # What another version measured is read, and left out.
    monkeypatch.delitem(METRICS, "entropy")
    assert f"{value:.4f}" not in shown(one)
