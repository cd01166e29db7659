import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.stored import random_adapters
from ulbq.config.adapter import AdapterConfig
from ulbq.errors import InputError, NumericsError
from ulbq.models.adapter_files import read_adapter, write_adapter
from ulbq.nn.adapter import Adapter

_BLOCK = {"self_attn.q_proj": (6, 4), "mlp.up_proj": (8, 4)}


def adapters(config: AdapterConfig, names: dict[str, tuple[int, int]] | None = None) -> dict[str, Adapter]:
    shapes = names or {f"model.layers.{i}.{name}": shape for i in range(12) for name, shape in _BLOCK.items()}
    weights = {name: torch.ones(shape) for name, shape in shapes.items()}
    return random_adapters(config, weights, torch.Generator().manual_seed(0))


def write(folder: Path, config: AdapterConfig, made: dict[str, Adapter]) -> Path:
    tensors = {f"{name}.{short}": t for name, adapter in made.items() for short, t in adapter.tensors().items()}
    write_adapter(folder, config, tensors, "someone/Tiny-1B")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = AdapterConfig(rank=2, dora=True)
    return write(tmp_path / "adapter", config, adapters(config))


@pytest.mark.parametrize("dora", [False, True])
def test_it_comes_back(dora: bool, tmp_path: Path) -> None:
    config = AdapterConfig(rank=2, alpha=3.5, dropout=0.25, dora=dora)
    made = adapters(config)
    read, tensors = read_adapter(write(tmp_path / "adapter", config, made))
    assert read == config.model_copy(update={"targets": ("mlp.up_proj", "self_attn.q_proj")})
    assert tensors.keys() == made.keys()
    for name, adapter in made.items():
        expected = adapter.tensors()
        assert tensors[name].keys() == expected.keys()
        assert all(torch.equal(tensor, expected[short]) for short, tensor in tensors[name].items())


def test_the_configuration_is_pefts_own(folder: Path) -> None:
    read = peft.PeftConfig.from_pretrained(str(folder))
    assert isinstance(read, peft.LoraConfig)
    assert (read.r, read.lora_alpha, read.use_dora, read.task_type) == (2, 16, True, "CAUSAL_LM")
    assert (read.base_model_name_or_path, read.inference_mode, read.init_lora_weights) == (
        "someone/Tiny-1B",
        True,
        True,
    )
    assert '"lora_alpha": 16,' in (folder / "adapter_config.json").read_text()


def test_the_tensors_have_pefts_names(folder: Path) -> None:
    names = load_file(folder / "adapter_model.safetensors").keys()
    prefix = "base_model.model.model.layers.11.mlp.up_proj"
    assert {f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight", f"{prefix}.lora_magnitude_vector"} <= names
    assert len(names) == 12 * 2 * 3


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.0.q_proj", "model.layers.1.q_proj"],
        ["model.layers.1.q_proj"],
        ["model.layers.0.q_proj", "model.layers.0.up_proj", "model.layers.2.up_proj"],
        ["q_proj", "model.layers.1.experts.1.up_proj"],
    ],
)
def test_pefts_targets_are_exactly_the_adapted_layers(names: list[str], tmp_path: Path) -> None:
    every = [f"model.layers.{i}.{short}" for i in range(13) for short in ("q_proj", "up_proj", "experts.1.up_proj")]
    model = torch.nn.Module()
    for name in ["q_proj", "up_proj", "vision.layers.0.q_proj", *every]:
        at = model
        *above, last = name.split(".")
        for part in above:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = at.get_submodule(part)
        at.add_module(last, torch.nn.Linear(4, 4))
    config = AdapterConfig(rank=2)
    folder = write(tmp_path / "adapter", config, adapters(config, dict.fromkeys(names, (4, 4))))
    read = peft.PeftConfig.from_pretrained(str(folder))
    peft.inject_adapter_in_model(read, model)
    assert {name for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)} == set(names)
    targets = read_adapter(folder)[0].targets
    assert targets == (("q_proj",) if names[:2] == ["model.layers.0.q_proj", "model.layers.1.q_proj"] else targets)
    assert {name for name in names if read_adapter(folder)[0].matches(name)} == set(names)


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    config = AdapterConfig(rank=2)
    made = adapters(config)
    made["model.layers.3.mlp.up_proj"].lora_b.data[0, 0] = 1e6
    with pytest.raises(NumericsError, match=r"layers\.3\.mlp\.up_proj\.lora_B"):
        write(tmp_path / "adapter", config, made)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_rslora": True}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"r": 3}, "holds 'model.layers.0.mlp.up_proj.lora_A.weight'"),
        ({"use_dora": False}, "lora_magnitude_vector"),
    ],
)
def test_another_configuration_is_refused(folder: Path, change: dict[str, object], words: str) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=words.replace(".", r"\.")) as caught:
        read_adapter(folder)
    assert "`adapter=False`" in caught.value.hint


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_broken_configuration_is_named(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        read_adapter(folder)


@pytest.mark.parametrize("short", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
def test_a_missing_tensor_is_named(folder: Path, short: str) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[f"base_model.model.model.layers.3.mlp.up_proj.{short}"]
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"lacks tensors of 'model\.layers\.3\.mlp\.up_proj'"):
        read_adapter(folder)


def test_strangers_and_emptiness_are_refused(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.ones(2)}, file)
    with pytest.raises(InputError, match=r"lm_head\.weight', which is no part of an adapter"):
        read_adapter(folder)
    save_file({}, file)
    with pytest.raises(InputError, match="holds no adapter"):
        read_adapter(folder)
