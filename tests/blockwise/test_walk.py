import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.models.tiny import FAMILIES, save_tiny
from ulbq.blockwise import walk as walk_module
from ulbq.blockwise.activations import ActivationStore
from ulbq.blockwise.arguments import run_block
from ulbq.blockwise.samples import Samples
from ulbq.blockwise.walk import BlockWalk
from ulbq.errors import InputError, ResourceError
from ulbq.models.blocks import block_list, load_block, load_outer, skeleton
from ulbq.models.source import ModelSource, resolve

_CPU = torch.device("cpu")


def some_tokens(samples: int = 5, length: int = 32, vocabulary: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (samples, length), generator=generator)


def open_stream(source: ModelSource, tokens: torch.Tensor, directory: Path, **options: Any) -> BlockWalk:
    chosen = {"dtype": torch.float32, "device": _CPU, "limit": 0, "directory": directory, "batch_size": 2} | options
    return BlockWalk(skeleton(source), source, Samples(tokens), **chosen)


def through_all_blocks(source: ModelSource, tokens: torch.Tensor, directory: Path) -> torch.Tensor:
    """Hidden states behind the last block."""
    model = skeleton(source)
    stream = open_stream(source, tokens, directory)
    hidden = stream.hidden.get(slice(None))
    with torch.no_grad():
        for index, kwargs in enumerate(stream.block_kwargs):
            hidden = run_block(load_block(model, source, index, torch.float32), hidden, kwargs, range(len(hidden)))
    return hidden


class _Fixed(nn.Module):
    """A block that knows its answer."""

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.answer


def logits_from(source: ModelSource, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """What norm and head make of hidden states."""
    model = skeleton(source)
    load_outer(model, source, torch.float32)
    blocks = block_list(model)[1]
    for index in range(len(blocks)):
        blocks[index] = _Fixed(hidden)
    with torch.no_grad():
        logits: torch.Tensor = model(tokens, use_cache=False).logits
    return logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_gives_the_whole_models_logits(family: str, tied: bool, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "model", tied=tied, shard_size="100KB" if tied else "1GB")
    tokens = some_tokens()
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    source = resolve(folder)
    with torch.no_grad():
        expected = whole(tokens).logits
    got = logits_from(source, tokens, through_all_blocks(source, tokens, tmp_path))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


_SMALL = {"vocab_size": 256, "hidden_size": 64}
_OTHERS: dict[str, dict[str, Any]] = {
    # Its blocks return tuples, and the model takes their first element.
    "falcon": _SMALL | {"num_hidden_layers": 3, "num_attention_heads": 4},
    # Positions come from a table, not from rotations; another module holds the blocks.
    "opt": _SMALL | {"ffn_dim": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "word_embed_proj_dim": 64},
    "mpt": {"vocab_size": 256, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
}


@pytest.mark.parametrize("model_type", _OTHERS)
def test_architectures_with_other_habits(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **_OTHERS[model_type])).eval()
    whole.save_pretrained(tmp_path / "model")
    tokens = some_tokens()
    seen: list[torch.Tensor] = []
    last = block_list(whole)[1][-1]
    last.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        whole(tokens)
    hidden = through_all_blocks(resolve(tmp_path / "model"), tokens, tmp_path)
    torch.testing.assert_close(hidden, seen[0], atol=1e-4, rtol=0)


def test_layer_types_have_masks_of_their_own(tmp_path: Path) -> None:
    source = resolve(save_tiny("gemma3", tmp_path))
    sliding, full, again = open_stream(source, some_tokens(), tmp_path).block_kwargs
    assert sliding["attention_mask"].shape[0] == 1
    assert sliding["attention_mask"] is again["attention_mask"]
    masked = full["attention_mask"] is None or not torch.equal(full["attention_mask"], sliding["attention_mask"])
    assert masked
    assert not torch.equal(full["position_embeddings"][0], sliding["position_embeddings"][0])


@pytest.mark.parametrize("tied", [False, True])
def test_blocks_are_called_alike_where_no_embeddings_are_read(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve(str(save_tiny("llama", tmp_path / "model", tied=tied)))
    wanted = open_stream(source, some_tokens(), tmp_path)
    read: list[str] = []
    monkeypatch.setattr(
        ModelSource, "read", lambda self, name, read_it=ModelSource.read: read.append(name) or read_it(self, name)
    )
    found = open_stream(source, some_tokens(), tmp_path, embeddings=False)
    assert not any("embed" in name or "head" in name for name in read)
    assert not found.hidden.get(slice(None)).any()
    assert found.hidden.shape == wanted.hidden.shape
    for one, other in zip(found.block_kwargs, wanted.block_kwargs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_skeleton_stays_a_skeleton(tiny_llama: Path, tmp_path: Path) -> None:
    source = resolve(tiny_llama)
    model = skeleton(source)
    forwards = [block.forward for block in block_list(model)[1]]
    BlockWalk(
        model, source, Samples(some_tokens()), dtype=torch.float32, device=_CPU, limit=1 << 20, directory=tmp_path
    )
    assert all(parameter.is_meta for parameter in model.parameters())
    assert [block.forward for block in block_list(model)[1]] == forwards


def test_the_embeddings_are_let_go_of_at_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when the garbage collector happens to come by: they can be gigabytes."""
    seen = []
    materialize = walk_module.materialize

    def note(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        seen.append(weakref.ref(module))
        materialize(module, *args, **kwargs)

    monkeypatch.setattr(walk_module, "materialize", note)
    gc.disable()
    try:
        kept = open_stream(resolve(tiny_llama), some_tokens(), tmp_path)
        assert [reference() for reference in seen] == [None]
    finally:
        gc.enable()
    assert len(kept.hidden) == len(some_tokens())


def test_gradients_flow_through_a_block(tiny_llama: Path, tmp_path: Path) -> None:
    source = resolve(tiny_llama)
    stream = open_stream(source, some_tokens(), tmp_path)
    block = load_block(skeleton(source), source, 0, torch.float32).requires_grad_(True)

    def loss() -> torch.Tensor:
        return run_block(block, stream.hidden.get([0, 3]), stream.block_kwargs[0], [0, 3]).square().mean()

    loss().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        # Along the gradient, the loss rises by the gradient's length.
        step, length = 1e-2, parameter.grad.norm()
        with torch.no_grad():
            parameter += step * parameter.grad / length
            above = loss()
            parameter -= 2 * step * parameter.grad / length
            below = loss()
            parameter += step * parameter.grad / length
        assert ((above - below) / (2 * step)).item() == pytest.approx(length.item(), rel=2e-2), name


@pytest.mark.parametrize(("token", "message"), [(256, "token 256.* 0 to 255"), (-7, "token -7")])
def test_tokens_of_another_tokenizer_are_refused(tiny_llama: Path, tmp_path: Path, token: int, message: str) -> None:
    tokens = some_tokens()
    tokens[2, 5] = token
    with pytest.raises(InputError, match=message):
        open_stream(resolve(tiny_llama), tokens, tmp_path)


def test_samples_beyond_the_positions_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="257 tokens are longer than the model's 256 positions"):
        open_stream(resolve(tiny_llama), some_tokens(1, 257), tmp_path)


def test_model_that_works_between_its_blocks_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve(tiny_llama)

    def scaled_between(self: PreTrainedModel, input_ids: torch.Tensor, use_cache: bool) -> None:
        hidden = self.get_input_embeddings()(input_ids)
        for block in block_list(self)[1]:
            hidden = block(hidden) * 2

    model = skeleton(source)
    monkeypatch.setattr(type(model), "forward", scaled_between)
    monkeypatch.setattr(walk_module, "load_block", lambda model, *_: _Fixed(torch.zeros(1)))
    with pytest.raises(InputError, match="straight from block to block"):
        BlockWalk(model, source, Samples(some_tokens()), dtype=torch.float32, device=_CPU, limit=0, directory=tmp_path)


def test_arguments_tied_to_the_batch_are_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("bloom", vocab_size=256, hidden_size=64, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="'alibi'"):
        open_stream(resolve(tmp_path / "model"), some_tokens(), tmp_path)


class TestActivationStore:
    @pytest.fixture(params=["memory", "disk"])
    def store(self, request: pytest.FixtureRequest, tmp_path: Path) -> ActivationStore:
        limit = 1 << 20 if request.param == "memory" else 6 * 4 * 8 * 2 - 1
        store = ActivationStore((6, 4, 8), torch.bfloat16, limit=limit, directory=tmp_path / "scratch")
        assert store.in_memory == (request.param == "memory")
        return store

    def test_gives_back_what_was_set(self, store: ActivationStore) -> None:
        values = torch.randn(6, 4, 8)
        store.set(0, values[:4])
        store.set(4, values[4:])
        expected = values.bfloat16()
        assert (len(store), store.nbytes) == (6, 384)
        assert torch.equal(store.get(slice(None)), expected)
        assert torch.equal(store.get([5, 0, 5]), expected[[5, 0, 5]])
        assert torch.equal(store.get(torch.tensor([3, 1])), expected[[3, 1]])

    @pytest.mark.parametrize("indices", [slice(0, 2), [0, 1]])
    def test_what_was_taken_is_a_copy(self, store: ActivationStore, indices: slice | list[int]) -> None:
        store.set(0, torch.ones(6, 4, 8))
        taken = store.get(indices)
        store.set(0, torch.zeros(6, 4, 8))
        assert torch.equal(taken, torch.ones(2, 4, 8, dtype=torch.bfloat16))
        taken.zero_()
        assert store.get([5]).sum() == 0

    def test_copy_is_independent(self, store: ActivationStore) -> None:
        store.set(0, torch.ones(6, 4, 8))
        other = store.copy()
        store.set(0, torch.zeros(6, 4, 8))
        assert other.in_memory == store.in_memory
        assert torch.equal(other.get(slice(None)), torch.ones(6, 4, 8, dtype=torch.bfloat16))

    def test_gradients_are_left_behind(self, store: ActivationStore) -> None:
        store.set(0, torch.ones(6, 4, 8, requires_grad=True))
        assert not store.get([0]).requires_grad

    def test_leaves_no_file(self, store: ActivationStore, tmp_path: Path) -> None:
        store.set(0, torch.ones(6, 4, 8))
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    def test_full_disk_is_said_before_anything_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_space(*_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.posix_fallocate", no_space)
        with pytest.raises(ResourceError, match="disk is full"):
            ActivationStore((6, 4, 8), torch.float32, limit=0, directory=tmp_path)


def test_activations_on_disk_equal_those_in_memory(tiny_llama: Path, tmp_path: Path) -> None:
    source = resolve(tiny_llama)
    stores = [open_stream(source, some_tokens(), tmp_path, limit=limit).hidden for limit in (0, 1 << 30)]
    assert [store.in_memory for store in stores] == [False, True]
    assert torch.equal(stores[0].get(slice(None)), stores[1].get(slice(None)))


def test_configuration_is_not_changed_by_streaming(tiny_llama: Path, tmp_path: Path) -> None:
    source = resolve(tiny_llama)
    before = copy.deepcopy(source.config.to_dict())
    open_stream(source, some_tokens(), tmp_path)
    assert source.config.to_dict() == before


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_embedding_in_half_precision_is_looked_up_as_it_is_stored(
    family: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve(save_tiny(family, tmp_path / "m", tied=tied, dtype=torch.bfloat16))
    found: list[torch.dtype] = []
    embed = walk_module.embed

    def watched(outer: PreTrainedModel, *given: Any) -> torch.Tensor:
        found.append(outer.get_input_embeddings().weight.dtype)
        return embed(outer, *given)

    monkeypatch.setattr(walk_module, "embed", watched)
    halved = open_stream(source, some_tokens(), tmp_path).hidden.get(slice(None))
    monkeypatch.setattr(walk_module, "tables_as_stored", lambda *given, **options: None)
    assert torch.equal(halved, open_stream(source, some_tokens(), tmp_path).hidden.get(slice(None)))
    # Gemma's embedding multiplies, too.
    assert {*found} == ({torch.bfloat16, torch.float32} if family == "llama" else {torch.float32})
