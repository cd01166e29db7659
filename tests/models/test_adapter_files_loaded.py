"""Adapters on packed models, through peft and through :func:`load_model`."""

from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.models.adapted import TOKENS, simulated
from tests.models.stored import write_quantized, write_random_adapter
from tests.models.tiny import save_tiny
from tests.strangers.conftest import reseal
from ulbq.config.adapter import AdapterConfig
from ulbq.errors import InputError
from ulbq.formats import AffineScheme, DualBinaryScheme
from ulbq.models.adapter_files import ADAPTER_FOLDER
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource, resolve

AFFINE = AffineScheme(bits=3, group_size=32)
ROWS = AffineScheme(bits=2, group_size=-1, symmetric=True)
DUAL = DualBinaryScheme(group_size=16)
CONFIG = AdapterConfig(rank=4, alpha=6)


@pytest.fixture
def parent(tmp_path: Path) -> ModelSource:
    """Has biases, which a packed layer keeps dense, and a tied head."""
    return resolve(save_tiny("qwen2", tmp_path / "parent", tied=True))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("targets", [(), ("q_proj", "mlp.down_proj"), ("layers.1.mlp.up_proj",)])
def test_peft_loads_it_onto_the_packed_base(
    parent: ModelSource, tmp_path: Path, dora: bool, targets: tuple[str, ...]
) -> None:
    config = CONFIG.model_copy(update={"dora": dora, "targets": targets})
    source = resolve(write_quantized(parent, tmp_path / "q", AFFINE, config))
    base = load_model(source, dtype=torch.float32, adapter=False)
    with torch.no_grad():
        alone = base(TOKENS).logits
        by_peft = peft.PeftModel.from_pretrained(base, source.path / "adapter")(TOKENS).logits
        loaded = load_model(source, dtype=torch.float32)
        assert torch.equal(loaded(TOKENS).logits, by_peft)
    torch.testing.assert_close(by_peft, simulated(source), atol=1e-4, rtol=0)
    assert (by_peft - alone).abs().max() > 0.1
    assert isinstance(loaded, PreTrainedModel)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    adapted = sum(isinstance(module, LoraLayer) for module in loaded.modules())
    assert adapted == {0: 21, 1: 1, 2: 6}[len(targets)]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_it_trains_on_the_packed_base(parent: ModelSource, tmp_path: Path, dora: bool) -> None:
    config = CONFIG.model_copy(update={"dora": dora})
    source = resolve(write_quantized(parent, tmp_path / "q", DUAL, config))
    base = load_model(source, dtype=torch.float32, adapter=False)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft.PeftModel.from_pretrained(base, source.path / "adapter", is_trainable=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 21 * (3 if dora else 2)
    optimizer = torch.optim.SGD(trained.values(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    after = {name.replace(".base_layer.", "."): t for name, t in base.state_dict().items() if "lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_fresh_adapter_of_pefts_own_goes_beside_packed_layers(parent: ModelSource, tmp_path: Path) -> None:
    source = resolve(write_quantized(parent, tmp_path / "q", ROWS))
    model = load_model(source, dtype=torch.bfloat16)
    with torch.no_grad():
        alone = model(TOKENS).logits
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
        assert torch.equal(wrapped(TOKENS).logits, alone)


def test_generates(parent: ModelSource, tmp_path: Path) -> None:
    source = resolve(write_quantized(parent, tmp_path / "q", AFFINE, CONFIG))
    model = load_model(source, dtype=torch.bfloat16)
    out = model.generate(TOKENS[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (1, 35)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_what_peft_misplaces_is_refused(tmp_path: Path, dora: bool) -> None:
    """It takes a shared expert's projections for those of the fused experts."""
    moe = resolve(save_tiny("deepseek", tmp_path / "parent"))
    config = CONFIG.model_copy(update={"dora": dora})
    scheme = AffineScheme(bits=3, group_size=16)
    source = resolve(write_quantized(moe, tmp_path / "q", scheme, config, fused_experts=True))
    with pytest.raises(InputError, match="onto other layers than it is for, in a 'deepseek_v3'"):
        load_model(source, dtype=torch.float32)


def listed(path: Path) -> None:
    """Name the adapter that came later in the artifact's manifest."""
    reseal(path, listed=tuple(f"{ADAPTER_FOLDER}/{file.name}" for file in (path / ADAPTER_FOLDER).iterdir()))


def test_an_adapter_of_another_model_is_refused(parent: ModelSource, tmp_path: Path) -> None:
    path = write_quantized(parent, tmp_path / "q", AFFINE)
    weights = {"model.layers.0.self_attn.q_proj": torch.zeros(64, 32)}
    write_random_adapter(path / ADAPTER_FOLDER, CONFIG, weights)
    listed(path)
    with pytest.raises(
        InputError, match=r"another model: 'model\.layers\.0\.self_attn\.q_proj' is no layer of \[64, 32"
    ):
        load_model(resolve(path), dtype=torch.float32)


def test_a_layer_without_its_tensors_is_refused(parent: ModelSource, tmp_path: Path) -> None:
    path = write_quantized(parent, tmp_path / "q", AFFINE)
    weights = {f"model.layers.{i}.self_attn.q_proj": torch.zeros(64, 64) for i in range(2)}
    write_random_adapter(path / ADAPTER_FOLDER, CONFIG, weights)
    file = path / ADAPTER_FOLDER / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "layers.1" not in name}, file)
    listed(path)
    with pytest.raises(InputError, match=r"lacks the tensors of 'model\.layers\.1\.self_attn\.q_proj'"):
        load_model(resolve(path), dtype=torch.float32)
    assert load_model(resolve(path), dtype=torch.float32, adapter=False)
