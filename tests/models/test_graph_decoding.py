"""Tokens by a recorded step are those of transformers; what a GPU records is run again here in its place."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, PreTrainedModel

from tests.models import recorded
from tests.models.test_compiled_decoding import packed_model
from tests.models.tiny import FAMILIES, MIXTURES, tiny_config, tiny_model, tiny_tokenizer
from ulbq import kernels
from ulbq.errors import NumericsError, ResourceError
from ulbq.formats import AffineScheme
from ulbq.kernels import dispatch
from ulbq.models import decoding, graph_decoding
from ulbq.models.adapter_files import calm_peft
from ulbq.models.compiled_decoding import addresses
from ulbq.models.decoding import TextStream, greedy, last_logits, write_on
from ulbq.models.experts import unfuse
from ulbq.models.graph_decoding import GraphDecoder, record, unsupported_reason
from ulbq.nn.quant_linear import QuantLinear

GPU = torch.device("cuda")
SCHEME = AffineScheme(bits=2, group_size=32)
TAKEN = ("llama", "qwen2", "qwen3", "olmo2", "phi3", "smollm3", "seed_oss", "granite", "gemma", "gpt_neox")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Steps are recorded without a GPU; counts the recordings by the room that they have."""
    rooms: list[int] = []

    def record(step: Callable[[], torch.Tensor], rewind: Callable[[], object]) -> Any:
        made = recorded.record(step, rewind)
        rooms.append(1)
        return made

    monkeypatch.setattr(graph_decoding, "record", record)
    yield rooms
    graph_decoding._KEPT.clear()


@torch.inference_mode()
def logits(model: PreTrainedModel, tokens: torch.Tensor, start: int, room: int | None = None) -> torch.Tensor:
    """Of what comes behind the first tokens, read at once, and behind each of the others."""
    decoder = GraphDecoder(model, room or len(tokens) + 1, last_logits(model))
    made = [decoder(part).clone() for part in (tokens[:start], *tokens[start:].split(1))]
    decoder.keep()
    return torch.stack(made)


@torch.inference_mode()
def plain(model: PreTrainedModel, tokens: torch.Tensor, start: int) -> torch.Tensor:
    return model(tokens[None]).logits[0, start - 1 :].float()


def some_tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", TAKEN)
def test_families(family: str) -> None:
    model = tiny_model(tiny_config(family))
    assert unsupported_reason(model, GPU) is None
    tokens = some_tokens(40)
    for start in (1, 7):
        torch.testing.assert_close(logits(model, tokens, start), plain(model, tokens, start), rtol=1e-4, atol=1e-4)


def test_packed_layers_and_eager_attention() -> None:
    model, tokens = packed_model("llama", SCHEME), some_tokens(20)
    torch.testing.assert_close(logits(model, tokens, 4), plain(model, tokens, 4), rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("eager")
    assert unsupported_reason(model, GPU) is None
    torch.testing.assert_close(logits(model, tokens, 4), plain(model, tokens, 4), rtol=1e-4, atol=1e-4)


def test_room_grows_with_the_text(stand_in: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_decoding, "_LEAST", 8)
    monkeypatch.setattr(graph_decoding, "_AHEAD", 4)
    model, tokens = tiny_model(tiny_config("llama")), some_tokens(40)
    found = logits(model, tokens, 5, room=200)
    torch.testing.assert_close(found, plain(model, tokens, 5), rtol=1e-4, atol=1e-4)
    # 16, 32, 64.
    assert len(stand_in) == 3


def test_the_next_text_replays_what_was_recorded(stand_in: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config("llama"))
    logits(model, some_tokens(60), 50)
    tokens = some_tokens(20, seed=1)
    found = logits(model, tokens, 3)
    assert len(stand_in) == 1
    torch.testing.assert_close(found, plain(model, tokens, 3), rtol=1e-4, atol=1e-4)
    # Much less than the room: the whole of it would be looked at for every token.
    monkeypatch.setattr(graph_decoding, "_LEAST", 8)
    logits(model, tokens, 3, room=30)
    assert len(stand_in) == 2


@pytest.mark.parametrize("change", ["tensor", "module", "factor"])
def test_a_changed_model_is_recorded_anew(stand_in: list[int], change: str) -> None:
    model, tokens = packed_model("llama", SCHEME), some_tokens(12)
    logits(model, tokens, 3)
    mlp = model.base_model.layers[1].mlp
    if change == "tensor":
        model.base_model.norm.weight.data = 2 * model.base_model.norm.weight.data
    elif change == "module":
        mlp.up_proj, mlp.gate_proj = mlp.gate_proj, mlp.up_proj
    else:
        model.base_model.layers[0].self_attn.scaling *= 2
    found = logits(model, tokens, 3)
    assert len(stand_in) == 2
    torch.testing.assert_close(found, plain(model, tokens, 3), rtol=1e-4, atol=1e-4)


def test_values_that_change_in_place_need_no_recording(stand_in: list[int]) -> None:
    model, tokens = tiny_model(tiny_config("llama")), some_tokens(12)
    logits(model, tokens, 3)
    with torch.no_grad():
        model.base_model.norm.weight.mul_(2)
    found = logits(model, tokens, 3)
    assert len(stand_in) == 1
    torch.testing.assert_close(found, plain(model, tokens, 3), rtol=1e-4, atol=1e-4)


def test_dense_weights_that_are_made_anew_are_recorded_anew(
    stand_in: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "best", lambda *_: kernels.STORED)
    model, tokens = packed_model("llama", SCHEME), some_tokens(12)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    for layer in layers:
        layer.cache = True
    logits(model, tokens, 3)
    assert all(layer.cached_bytes for layer in layers)
    kept, before = [layer._kept for layer in layers], addresses(model)
    state = model.state_dict()
    model.load_state_dict(state | {name: 2 * value for name, value in state.items() if name.endswith("up_proj.scales")})
    found = logits(model, tokens, 3)
    # Values were copied into the same tensors; the dense weights alone lie elsewhere.
    assert addresses(model) == before
    assert kept[0] is not layers[0]._kept
    assert len(stand_in) == 2
    torch.testing.assert_close(found, plain(model, tokens, 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["off", "factor"])
def test_adapters_that_are_switched_are_recorded_anew(stand_in: list[int], change: str) -> None:
    model, tokens = tiny_model(tiny_config("llama")), some_tokens(12)
    config = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    with calm_peft(model):
        wrapped = get_peft_model(model, config).eval()
    assert unsupported_reason(model, GPU) is None
    adapted = logits(model, tokens, 3)
    torch.testing.assert_close(adapted, plain(model, tokens, 3), rtol=1e-4, atol=1e-4)
    if change == "off":
        wrapped.base_model.disable_adapter_layers()
    else:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.scale_layer(2.0)
    found = logits(model, tokens, 3)
    assert len(stand_in) == 2
    torch.testing.assert_close(found, plain(model, tokens, 3), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, adapted, atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [{}, {"repetition_penalty": 1.3}, {"do_sample": True, "temperature": 0.7, "top_p": 0.8}, {"do_sample": True}],
    ids=str,
)
def test_what_is_written_is_what_transformers_writes(changes: dict[str, Any], stand_in: list[int]) -> None:
    model, tokenizer = packed_model("llama", SCHEME), tiny_tokenizer()
    settings, tokens, texts = greedy(30, at_least=3) | changes, list(range(60, 67)), []
    with (
        patch.object(decoding, "products", return_value=None),
        patch.object(graph_decoding, "unsupported_reason", return_value=None),
    ):
        for graphs in (True, False):
            torch.manual_seed(1)
            stream = TextStream(tokenizer)
            ending = write_on(model, tokenizer, tokens, settings, stream, cuda_graphs=graphs)
            texts.append((stream.text, stream.new_tokens, ending))
    assert texts[0] == texts[1]
    assert texts[0][0]
    assert len(stand_in) == 1


def test_a_text_whose_predictions_are_not_finite_leaves_nothing(stand_in: list[int]) -> None:
    model, tokenizer = tiny_model(tiny_config("llama")), tiny_tokenizer()
    said: list[str] = []

    def spoil(piece: str) -> None:
        """Behind the first token, which is recorded."""
        said.append(piece)
        if stand_in:
            model.base_model.norm.weight.data.fill_(torch.nan)

    stream = TextStream(tokenizer, spoil)
    with (
        patch.object(decoding, "products", return_value=None),
        patch.object(graph_decoding, "unsupported_reason", return_value=None),
        pytest.raises(NumericsError),
    ):
        write_on(model, tokenizer, list(range(60, 67)), greedy(30, at_least=30), stream)
    assert said
    assert len(stand_in) == 1
    assert model not in graph_decoding._KEPT


def test_a_recording_has_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's for recordings stays on the GPU of the first one, and is the current one behind a failure."""
    current: list[Any] = ["usual"]
    entered: list[Any] = []

    class Context:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.stream

        def __exit__(self, *_: object) -> None:
            current[0] = self.before

    class Graph(Context):
        def __init__(self, _: object, stream: Any = "of the first GPU", **__: str) -> None:
            super().__init__(stream)

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation failed due to\na previous error")  # and the stream stays

    side = Mock(name="side")
    for name, stand_in in {
        "Stream": lambda: side, "current_stream": Mock(), "CUDAGraph": Mock(), "stream": Context, "graph": Graph,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with pytest.raises(ResourceError, match="due to a previous error"):
        record(lambda: entered.append(current[0]), lambda: None)
    assert entered == [side] * 3
    assert current == ["usual"]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in TAKEN])
def test_attention_of_a_window_is_left_to_transformers(family: str) -> None:
    assert "of a window" in str(unsupported_reason(tiny_model(tiny_config(family)), GPU))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_are_left_to_transformers(family: str, fused: bool) -> None:
    model = tiny_model(tiny_config(family))
    if not fused:  # as they are unless an artifact stores them otherwise
        unfuse(model, None)
    assert unsupported_reason(model, GPU) is not None


def test_others_are_left_to_transformers() -> None:
    model = tiny_model(tiny_config("llama"))
    assert unsupported_reason(model) == "on cpu: CUDA GPUs"
    hook = model.base_model.register_forward_hook(lambda *_: None)
    assert unsupported_reason(model, GPU) == "its modules are watched"
    hook.remove()
    longer = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    stretched = tiny_model(tiny_config("llama", rope_parameters=longer))
    assert "rotary positions 'dynamic'" in str(unsupported_reason(stretched, GPU))
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    falcon = tiny_model(AutoConfig.for_model("falcon", alibi=True, **sizes))
    assert "distances" in str(unsupported_reason(falcon, GPU))


def test_recorded_steps_go_with_their_model() -> None:
    model = tiny_model(tiny_config("llama"))
    decoder = GraphDecoder(model, 20, {})
    with torch.inference_mode():
        decoder(some_tokens(4))
    decoder.keep()
    gone = weakref.ref(model)
    del model, decoder
    gc.collect()
    assert gone() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stands in: steps are recorded and replayed, for two texts each that outgrow their room."""
    for name, value in {"record": record, "_LEAST": 8, "_AHEAD": 4}.items():
        monkeypatch.setattr(graph_decoding, name, value)
    for index in range(torch.cuda.device_count()):
        model = packed_model("llama", SCHEME).to(torch.device("cuda", index))
        assert unsupported_reason(model) is None
        for seed in range(2):
            tokens = some_tokens(40, seed).to(model.device)
            found = logits(model, tokens, 5, room=200)
            torch.testing.assert_close(found, plain(model, tokens, 5), rtol=1e-3, atol=1e-3)


def test_a_text_that_was_left_to_the_next_takes_no_more_tokens() -> None:
    model, tokens = tiny_model(tiny_config("llama")), some_tokens(6)
    decoder = GraphDecoder(model, 8, last_logits(model))
    decoder(tokens[:5])
    decoder.keep()
    with pytest.raises(RuntimeError, match="left to the next"):
        decoder(tokens[5:])
