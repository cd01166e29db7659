"""Full-precision teachers of a whole model: one that runs every time, and one whose predictions are kept."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from ulbq.models.blocks import block_list
from ulbq.models.stream import ActivationStore
from ulbq.training.distill import Predicted, best_guesses, predicted
from ulbq.training.precision import Precision


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of some samples.

    Attributes:
        prediction: of every token's successor, ``[batch, length, ...]``.
        hidden: outputs ``[batch, length, hidden]`` of all blocks; None from a teacher that keeps none.
    """

    prediction: Predicted
    hidden: list[torch.Tensor] | None = None


class Teacher(Protocol):
    """Who knows the right predictions for the samples of a run."""

    def lesson(self, indices: torch.Tensor) -> Lesson:
        """The samples' lesson, on the run's device."""
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
        """Logits ``[batch, length, vocabulary]``, and the blocks' outputs where wanted, else None."""
        self._taken = [] if hidden else None
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
        taken, self._taken = self._taken, None
        return logits, taken

    def _take(self, block: nn.Module, arguments: Any, output: Any) -> None:
        if self._taken is not None:
            self._taken.append(output[0] if isinstance(output, tuple) else output)


class StreamedTeacher:
    """Runs the full-precision model for every lesson.

    Args:
        model: all of it, on the device, in the dtype of the run's matrix products.
        tokens: int64 ``[samples, length]``.
        precision: of the run.
        hidden: whether lessons have hidden states.
    """

    def __init__(
        self, model: PreTrainedModel, tokens: torch.Tensor, precision: Precision, *, hidden: bool = False
    ) -> None:
        self._model = model
        self._tokens = tokens
        self._precision = precision
        self._hidden = hidden
        self._tap = HiddenTap(block_list(model)[1])

    @torch.no_grad()
    def logits(self, indices: torch.Tensor) -> torch.Tensor:
        """Logits ``[batch, length, vocabulary]`` of some samples."""
        return self._tap.run(self._model, self._tokens[indices].to(self._precision.device), hidden=False)[0]

    @torch.no_grad()
    def lesson(self, indices: torch.Tensor) -> Lesson:
        """The samples' lesson over the whole vocabulary."""
        tokens = self._tokens[indices].to(self._precision.device)
        logits, hidden = self._tap.run(self._model, tokens, hidden=self._hidden)
        return Lesson(predicted(logits), hidden)


class CachedTeacher:
    """Keeps the best guesses of one pass: float32 log-probabilities and int32 tokens, on disk beyond a limit.

    Args:
        teacher: who is asked once; it may be dropped afterwards.
        tokens: int64 ``[samples, length]``.
        top_k: guesses a token; the rest is one lump.
        device: where lessons go.
        limit: bytes that may stay in memory.
        directory: for what is beyond.
        on_sample: called after each sample.

    Raises:
        ResourceError: the disk has no room for them.
    """

    def __init__(
        self,
        teacher: StreamedTeacher,
        tokens: torch.Tensor,
        *,
        top_k: int,
        device: torch.device,
        limit: int,
        directory: Path,
        on_sample: Callable[[], None] = lambda: None,
    ) -> None:
        self._device = device
        self._stores: tuple[ActivationStore, ActivationStore] | None = None
        for index in range(len(tokens)):
            guesses = best_guesses(teacher.logits(torch.tensor([index])), top_k)
            if guesses.ids is None:
                raise TypeError("best guesses have names")
            if self._stores is None:
                shape = (len(tokens), tokens.shape[1], guesses.ids.shape[-1])
                wider = (*shape[:2], shape[2] + 1)
                self._stores = (
                    ActivationStore(wider, torch.float32, limit=limit // 2, directory=directory),
                    ActivationStore(shape, torch.int32, limit=limit // 2, directory=directory),
                )
            self._stores[0].set(index, guesses.values)
            self._stores[1].set(index, guesses.ids)
            on_sample()

    def lesson(self, indices: torch.Tensor | Sequence[int]) -> Lesson:
        """The samples' lesson over best guesses and lump."""
        if self._stores is None:
            raise ValueError("there are no samples")
        values, ids = (store.get(indices).to(self._device) for store in self._stores)
        return Lesson(Predicted(values, ids.long()))
