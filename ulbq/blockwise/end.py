"""The end of a model, from hidden states behind the last block to logits."""

from typing import Any

import torch
from transformers import PreTrainedModel

from ulbq.blockwise.activations import Hidden
from ulbq.models.blocks import block_list, empty_copy, materialize
from ulbq.models.source import ModelSource
from ulbq.models.tables import head_from_disk


class ModelEnd:
    """Final norm and head, however an architecture writes them (scaled, soft-capped, tied or not).

    The model itself runs, each of its blocks replaced by one that returns the hidden states in question. What comes
    behind the blocks treats every position by itself, so that a long sequence may go through in chunks.

    Args:
        model: a skeleton; it stays as it is.
        dtype: of the parameters; None for the skeleton's own.
        device: where they lie.
        extras: values that a block returns behind the hidden states; None where it returns no tuple.
        head_on_disk: read the head anew for all logits that are asked for at a time, where it can be read in parts.

    Attributes:
        device: as given.
        vectors: parameters of one dimension, by full name.

    Raises:
        InputError, NumericsError: as :func:`ulbq.models.blocks.materialize`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: ModelSource,
        dtype: torch.dtype | None,
        device: torch.device,
        *,
        extras: int | None,
        head_on_disk: bool = False,
    ) -> None:
        self.device = device
        self._outer = empty_copy(model)
        prefix, blocks = block_list(self._outer)
        if head_on_disk:
            head_from_disk(self._outer, source.rows, dtype or model.dtype, device)
        unread = _untied_embedding(self._outer)
        materialize(self._outer, source, dtype, device=device, without=(f"{prefix}.", *unread))
        # The stand-ins know this list and not the model, which would be a cycle that keeps the head in memory.
        self._arriving: list[Hidden] = []
        arriving = self._arriving

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return arriving[0] if extras is None else (arriving[0], *(None for _ in range(extras)))

        for block in blocks:
            block.forward = stand_in
        inside = {id(parameter) for parameter in blocks.parameters()}
        self.vectors = {name: p for name, p in self._outer.named_parameters() if p.dim() == 1 and id(p) not in inside}

    def logits(self, hidden: Hidden) -> torch.Tensor:
        """Logits ``[batch, n, vocabulary]`` of hidden states ``[batch, n, hidden]``, in the head's own dtype."""
        self._arriving[:] = [hidden]
        logits: torch.Tensor = self._outer(inputs_embeds=hidden.detach(), use_cache=False).logits
        self._arriving.clear()
        return logits


def _untied_embedding(outer: PreTrainedModel) -> tuple[str, ...]:
    """Name, with the dot, of an embedding that the head does not share: nothing here looks a token up."""
    embedding, head = outer.get_input_embeddings(), outer.get_output_embeddings()
    if head is None or embedding.weight is head.weight:
        return ()
    return tuple(f"{name}." for name, module in outer.named_modules() if module is embedding)
