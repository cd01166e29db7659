"""Full-precision teachers of a whole model: one that runs every time, and one whose predictions are kept."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from ulbq import distributed
from ulbq.blockwise.activations import ActivationStore
from ulbq.blockwise.streamed import StreamedModel
from ulbq.finetuning.examples import Examples
from ulbq.finetuning.head import Head, in_chunks, positions_at_once
from ulbq.finetuning.losses import Predicted, best_guesses, predicted
from ulbq.models.blocks import block_list
from ulbq.training.precision import Precision

TEACHER_COPIES = 4
"""Float32 copies of a chunk's logits while its best guesses are found: themselves, and the rest without them."""


@dataclass(frozen=True)
class Targets:
    """What a teacher predicts of some examples, as long as their batch is.

    Attributes:
        predict: its predictions of the successors of tokens, given as int64 ``[n]`` places in ``batch · length``.
        hidden: outputs ``[batch, length, hidden]`` of all blocks; None from a teacher that keeps none.
    """

    predict: Callable[[torch.Tensor], Predicted]
    hidden: list[torch.Tensor] | None = None


class Teacher(Protocol):
    """Who knows the right predictions for the examples of a run."""

    def targets(self, indices: torch.Tensor) -> Targets:
        """The examples' targets, on the run's device."""
        ...


class Asked(Protocol):
    """Who makes predictions of single examples."""

    def guesses(self, index: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Best guesses of one example: float32 ``[length, k + 1]``, the rest's last, and int64 ``[length, k]``."""
        ...


class HiddenTap:
    """Takes the blocks' outputs out of a model's forward pass.

    Args:
        blocks: the model's decoder blocks.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self._taken: list[torch.Tensor] | None = None
        for block in blocks:
            block.register_forward_hook(self._take)

    def run(self, model: PreTrainedModel, tokens: torch.Tensor, *, hidden: bool) -> tuple[torch.Tensor, Any]:
        """What the head reads, ``[batch, length, hidden]``, and the blocks' outputs where wanted, else None."""
        self._taken = [] if hidden else None
        states: torch.Tensor = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        taken, self._taken = self._taken, None
        return states, taken

    def _take(self, block: nn.Module, arguments: Any, output: Any) -> None:
        if self._taken is not None:
            self._taken.append(output[0] if isinstance(output, tuple) else output)


class StreamedTeacher:
    """Runs the full-precision model for every batch; its logits live for as long as a chunk's loss takes.

    Args:
        model: all of it, on the device, in the dtype of the run's matrix products.
        examples: the text.
        precision: of the run.
        hidden: whether targets have hidden states.
    """

    def __init__(
        self, model: PreTrainedModel, examples: Examples, precision: Precision, *, hidden: bool = False
    ) -> None:
        self._model = model
        self._examples = examples
        self._precision = precision
        self._hidden = hidden
        self._tap = HiddenTap(block_list(model)[1])
        # The model is in that dtype itself.
        self._head = Head(model, Precision(precision.device, torch.float32))

    @torch.no_grad()
    def targets(self, indices: torch.Tensor) -> Targets:
        """The examples' targets over the whole vocabulary."""
        tokens = self._examples.batch(indices).tokens.to(self._precision.device)
        states, hidden = self._tap.run(self._model, tokens, hidden=self._hidden)
        states, head = states.flatten(0, 1), self._head

        @torch.no_grad()
        def predict(places: torch.Tensor) -> Predicted:
            return predicted(head.logits(states[places]))

        return Targets(predict, hidden)

    @torch.no_grad()
    def guesses(self, index: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Best guesses of one example: float32 ``[length, k + 1]``, the rest's last, and int64 ``[length, k]``."""
        tokens = self._examples.batch(torch.tensor([index])).tokens.to(self._precision.device)
        states = self._tap.run(self._model, tokens, hidden=False)[0].squeeze(0)

        def guess(places: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return _named(best_guesses(self._head.logits(states[places]), k))

        values, ids = in_chunks(
            guess, torch.arange(len(states), device=states.device), self._head.chunk(TEACHER_COPIES)
        )
        return values, ids


class PassedTeacher:
    """A full-precision model that memory does not hold, through whose blocks all examples pass before it is asked.

    Its guesses are those of :class:`StreamedTeacher`; of examples of many lengths but for the rounding of sums over
    what fills them up.

    Args:
        model: in the dtype of the run's matrix products.
        examples: the text; of several processes each passes those that it is asked for.
    """

    def __init__(self, model: StreamedModel, examples: Examples) -> None:
        self._examples = examples
        own = torch.arange(distributed.rank(), len(examples), distributed.size())
        tokens = examples.batch(own).tokens if len(own) else torch.zeros(0, examples.length, dtype=torch.int64)
        self._passed = model.pass_blocks(tokens, 1)
        self._chunk = positions_at_once(model.config.get_text_config().vocab_size, TEACHER_COPIES, model.device)

    @torch.no_grad()
    def guesses(self, index: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`StreamedTeacher.guesses`."""
        row, length = index // distributed.size(), self._examples.batch(torch.tensor([index])).tokens.shape[1]

        def guess(places: torch.Tensor) -> tuple[torch.Tensor, ...]:
            chunk = slice(int(places[0]), int(places[-1]) + 1)
            return _named(best_guesses(self._passed.logits(slice(row, row + 1), chunk)[0], k))

        values, ids = in_chunks(guess, torch.arange(length), self._chunk)
        return values, ids


def _named(found: Predicted) -> tuple[torch.Tensor, torch.Tensor]:
    if found.ids is None:
        raise TypeError("best guesses have names")
    return found.values, found.ids


class CachedTeacher:
    """Keeps the best guesses of one pass: float32 log-probabilities and int32 tokens, on disk beyond a limit.

    Args:
        teacher: who is asked once; it may be dropped afterwards.
        examples: the text.
        top_k: guesses a token; the rest is one lump.
        device: where targets go.
        limit: bytes that may stay in memory.
        directory: for what is beyond.
        on_sample: called after each example.

    Raises:
        ResourceError: the disk has no room for them.
    """

    def __init__(
        self,
        teacher: Asked,
        examples: Examples,
        *,
        top_k: int,
        device: torch.device,
        limit: int,
        directory: Path,
        on_sample: Callable[[], None] = lambda: None,
    ) -> None:
        self._device = device
        self._examples = examples
        self._stores: tuple[ActivationStore, ActivationStore] | None = None
        count, length = len(examples), examples.length
        # Of several processes each asks for every n-th example, and tells the others.
        for first in range(0, count, distributed.size()):
            mine = first + distributed.rank()
            told = [guess.cpu() for guess in teacher.guesses(mine, top_k)] if mine < count else []
            every = [guesses for guesses in distributed.gather(told) if guesses]
            for index, (values, ids) in enumerate(every, first):
                if self._stores is None:
                    shape = (count, length, ids.shape[-1])
                    kept = (count, length, values.shape[-1])
                    self._stores = (
                        ActivationStore(kept, torch.float32, limit=limit // 2, directory=directory),
                        ActivationStore(shape, torch.int32, limit=limit // 2, directory=directory),
                    )
                for store, found in zip(self._stores, (values, ids), strict=True):
                    store.set(index, nn.functional.pad(found, (0, 0, 0, length - len(found))).unsqueeze(0))
                on_sample()

    def targets(self, indices: torch.Tensor) -> Targets:
        """The examples' targets over best guesses and lump."""
        if self._stores is None:
            raise ValueError("there are no examples")
        length = self._examples.batch(indices).tokens.shape[1]
        values, ids = (store.get(indices)[:, :length].flatten(0, 1).to(self._device) for store in self._stores)
        return Targets(lambda places: Predicted(values[places], ids[places].long()))
