"""Models that go on from one text on a GPU by a CUDA graph: a step for one token is recorded once, and replayed.

To launch a step's kernels one by one from Python takes far longer than their work on one token. What is recorded has
fixed addresses, so keys and values lie in room that is taken before, and positions are tensors on the device.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from ulbq.errors import ResourceError
from ulbq.kernels.triton_launch import on
from ulbq.models.compiled_decoding import ROTATIONS, addresses, watched
from ulbq.nn.experts import Experts, Fusion
from ulbq.printable import one_line

Made = TypeVar("Made")

_LEAST = 256
"""Tokens that there is room for at least."""
_AHEAD = 256
"""New tokens that room is made for before any is written: a text may end long before it is as long as it may be."""
_AMPLE = 4
"""Room kept from the text before is taken for another if it is at most so many times too large: all of it is read."""
_WARM_UPS = 2
_ATTENTIONS = ("sdpa", "eager")
# What calls of a module depend on that is no tensor: factors, of attention and adapters, and which adapters peft takes.
_SWITCHES = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")


def unsupported_reason(model: PreTrainedModel, device: torch.device | None = None) -> str | None:
    """Why a model's steps are not recorded on a device, its own where none is given; None where they are."""
    kind = (device or model.device).type
    name = type(model).__name__
    if kind != "cuda":
        return f"on {kind}: CUDA GPUs"
    if not type(model).__module__.startswith("transformers.") or not model._can_compile_fullgraph:
        return f"{name}: models whose kernels do not depend on values"
    if any(isinstance(module, Experts) or Fusion.of(module) for module in model.modules()):
        return "experts: which of them are called has to be known on the host"
    if model.config._attn_implementation not in _ATTENTIONS:
        return f"attention '{model.config._attn_implementation}': {' or '.join(_ATTENTIONS)}"
    if any(type(layer) is not StaticLayer for layer in StaticCache(model.config, 1).layers):
        return "attention of a window, or none: of all tokens"
    if getattr(model.config, "alibi", False):
        return "distances added to the scores: rotary positions"
    rotation = getattr(getattr(model.base_model, "rotary_emb", None), "rope_type", None)
    if rotation not in ROTATIONS:
        return f"rotary positions '{rotation}': one of {', '.join(sorted(ROTATIONS))}"
    return "its modules are watched" if watched(model) else None


class GraphDecoder:
    """A model and a text that grows by any number of tokens at first, and by one after the other behind them.

    Args:
        model: one that :func:`unsupported_reason` has nothing against, in eval mode.
        room: tokens that the text may have.
        first: further options of the pass over the beginning of the text.
    """

    def __init__(self, model: PreTrainedModel, room: int, first: dict[str, Any]) -> None:
        self._model, self._most, self._first = model, room, first
        self._length = 0
        self._step: RecordedStep | None = None

    @torch.inference_mode()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read tokens ``[n]``; logits ``[vocabulary]`` float32 of what comes behind the last one, until the next."""
        length = self._length
        self._length += len(tokens)
        if length == 0:
            return self._read(tokens)
        if self._step is None:
            raise RuntimeError("this text has been left to the next")
        if length == self._step.room:
            wider = RecordedStep(self._model, 2 * length)
            wider.take(self._step.cache, length)
            self._step = wider
        return self._step(self._model, tokens)

    def keep(self) -> None:
        """Leave what was recorded to the next text of this model. No more tokens may come."""
        if self._step is not None:
            _KEPT[self._model] = _state(self._model), self._step
        self._step = None

    def _read(self, tokens: torch.Tensor) -> torch.Tensor:
        cache: Any = DynamicCache()
        out = self._model(tokens[None], past_key_values=cache, use_cache=True, **self._first)
        wanted = max(_LEAST, min(self._most, len(tokens) + _AHEAD))
        # Taken away: another thread may write a text of its own. And first, so that two lie in memory at no time.
        state, step = _KEPT.pop(self._model, (None, None))
        if step is None or state != _state(self._model) or not wanted <= step.room <= _AMPLE * wanted:
            step = None
            step = RecordedStep(self._model, 1 << (wanted - 1).bit_length())
        step.take(cache, len(tokens))
        self._step = step
        logits: torch.Tensor = out.logits[0, -1]
        return logits.float()


class RecordedStep:
    """One token through a model, and room for the tokens before it. It is recorded by its first call.

    Args:
        model: whose keys and values they are. It is not kept.
        room: tokens.

    Attributes:
        cache: keys and values.
    """

    def __init__(self, model: PreTrainedModel, room: int) -> None:
        self.room = room
        self.cache: Any = StaticCache(model.config, room)
        self._token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self._position = torch.zeros_like(self._token)
        self._places = torch.arange(room, device=model.device)
        self._length = 0
        self._recorded: tuple[torch.Tensor, Callable[[], object]] | None = None

    def take(self, cache: Any, length: int) -> None:
        """Begin behind the first tokens of another cache."""
        for own, other in zip(self.cache.layers, cache.layers, strict=True):
            if not own.is_initialized:
                own.lazy_initialization(other.keys, other.values)
            own.keys[:, :, :length] = other.keys[:, :, :length]
            own.values[:, :, :length] = other.values[:, :, :length]
        self._length = length
        self._rewind()

    def __call__(self, model: PreTrainedModel, token: torch.Tensor) -> torch.Tensor:
        """Read a token ``[1]``; logits ``[vocabulary]`` float32, which the next call overwrites."""
        with on(self._token):
            self._token.copy_(token[None])
            if self._recorded is None:
                self._recorded = record(lambda: self._run(model), self._rewind)
            logits, replay = self._recorded
            replay()
        self._length += 1
        return logits

    def _run(self, model: Any) -> torch.Tensor:
        """What is recorded."""
        # Places beyond hold zeros, or what an earlier text left there.
        mask = torch.zeros_like(self._places, dtype=model.dtype).masked_fill_(
            (self._places > self._position).flatten(), -torch.inf
        )
        out = model(
            self._token,
            attention_mask=mask.view(1, 1, 1, -1),
            position_ids=self._position,
            past_key_values=self.cache,
            use_cache=True,
        )
        self._position += 1
        logits: torch.Tensor = out.logits[0, -1].float()
        return logits

    def _rewind(self) -> None:
        """Go back behind the tokens so far."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self._length)
        self._position.fill_(self._length)


_KEPT = WeakKeyDictionary[nn.Module, tuple[Hashable, RecordedStep]]()


def _state(model: nn.Module) -> Hashable:
    """What changes with all that a recording holds for: addresses, those of kept dense weights too, and switches."""
    held = [vars(module) for module in model.modules()]
    kept = tuple(value.data_ptr() for own in held for value in own.values() if isinstance(value, torch.Tensor))
    # Spelled out, since peft changes lists and dictionaries in place.
    return addresses(model), kept, repr([[own.get(name) for name in _SWITCHES] for own in held])


def record(step: Callable[[], Made], rewind: Callable[[], object]) -> tuple[Made, Callable[[], object]]:
    """Record what a function launches on the current GPU.

    Args:
        step: launches the same kernels on the same memory each time, and waits for none.
        rewind: undoes what a step did.

    Returns:
        What the function gave, whose tensors a replay overwrites, and the function that replays it.

    Raises:
        ResourceError: the driver refuses.
    """
    side, current, graph = torch.cuda.Stream(), torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    side.wait_stream(current)
    # The stream is ours: torch's own for recordings is on the GPU of the first one, and a failure leaves it current.
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):  # compiles kernels, and takes what memory they keep
            rewind()
            step()
        rewind()
        try:
            # What other threads do on the GPU meanwhile does not end the recording.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                made = step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ResourceError(
                f"A token's work cannot be recorded as a CUDA graph ({one_line(str(error))}).",
                hint="Launch it kernel by kernel: `cuda_graphs=false`.",
            ) from error
    current.wait_stream(side)
    return made, graph.replay
