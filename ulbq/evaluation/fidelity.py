"""Fidelity: how close a compressed model's predictions stay to its full-precision parent's.

Unlike perplexity and task accuracy, which reward answers that are right by luck, this asks whether the model still says
what its parent says ("Accuracy is Not All You Need", Dutta et al. 2024), and it needs no labelled data.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from ulbq import distributed
from ulbq.errors import InputError, NumericsError
from ulbq.evaluation.results import Fidelity
from ulbq.evaluation.text import predictions, tokens_per_batch
from ulbq.progress import Progress, Silent

if TYPE_CHECKING:
    from ulbq.blockwise.streamed import AnyModel

_CHUNK = 128  # positions compared at a time: two float32 distributions each


class KeptLogits:
    """What a parent says of windows, kept in a folder for the next model that is compared with it.

    Args:
        load: gives the parent, where something is not kept yet.
        windows: gives what is read, from the parent: int64 ``[n, t]``.
        folder: empty at first; takes ``n * t * vocabulary`` values in the parent's dtype.
    """

    def __init__(
        self, load: "Callable[[], AnyModel]", windows: "Callable[[AnyModel], torch.Tensor]", folder: Path
    ) -> None:
        self._load = load
        self._folder = folder
        self._folder.mkdir(exist_ok=True)
        if not self._path("windows").exists():
            self._keep("windows", windows(self._model))
        self.windows = self._load_kept("windows")

    def predictions(self, windows: torch.Tensor, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches ``[b, t]`` of this process's windows and the logits ``[b, t, vocabulary]`` of them, on the CPU."""
        names = [f"{distributed.rank()}-{row}" for row in range(len(windows))]
        if not all(self._path(name).exists() for name in names):
            waiting = iter(names)
            for _, logits in predictions(self._model, windows, batch_size):
                for row in logits:
                    self._keep(next(waiting), row)
        for start in range(0, len(names), batch_size):
            rows = [self._load_kept(name) for name in names[start : start + batch_size]]
            yield windows[start : start + batch_size], torch.stack(rows)

    @cached_property
    def _model(self) -> "AnyModel":
        return self._load()

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        save_file({name: tensor.contiguous().cpu()}, self._path(name))

    def _load_kept(self, name: str) -> torch.Tensor:
        return load_file(self._path(name))[name]


@torch.inference_mode()
def fidelity(
    model: "AnyModel",
    parent: "AnyModel | KeptLogits",
    windows: torch.Tensor,
    *,
    text: str,
    batch_size: int | None = None,
    progress: Progress | None = None,
    label: str = "Fidelity",
) -> Fidelity:
    """Compare the next-token distributions of two models at every position. Several processes share the windows.

    Args:
        model: the compressed model, in eval mode.
        parent: the model that it was made from, in eval mode, on the same device; or what it says of the windows.
        windows: int64 ``[n, t]``, held-out text.
        text: what the windows are, for the record.
        batch_size: windows a batch; None: as many as the device's memory takes.
        progress: told about every window.
        label: what the progress calls the work.

    Raises:
        InputError: the two do not share a vocabulary.
        NumericsError: logits that are not finite.
        ResourceError: a batch does not fit into the device's memory.
    """
    divergences: list[torch.Tensor] = []
    agreeing = 0
    own = distributed.own(windows)
    size = batch_size or max(1, tokens_per_batch(model) // windows.shape[1])
    known = parent.predictions(own, size) if isinstance(parent, KeptLogits) else predictions(parent, own, size)
    both = zip(predictions(model, own, size), known, strict=True)
    with (progress or Silent()).phase(label, len(own)) as phase:
        for (batch, our_logits), (_, their_logits) in both:
            ours, theirs = our_logits.flatten(0, 1), their_logits.flatten(0, 1).to(our_logits.device)
            if ours.shape != theirs.shape:
                raise InputError(
                    f"The model has {ours.shape[-1]:,} logits, its parent {theirs.shape[-1]:,}.",
                    hint="Name the model that it was made from with `parent`.",
                )
            divergences.append(kl_divergence(theirs, ours).cpu())
            agreeing += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            phase.advance(len(batch), f"{float(divergences[-1].mean()):.3f} nats")
    kl = torch.cat([one for share in distributed.gather(divergences) for one in share])
    (all_agreeing,) = distributed.total(agreeing)
    if not bool(kl.isfinite().all()):
        raise NumericsError("The models' logits are not finite.", hint="Try `dtype=fp32`.")
    return Fidelity(
        text=text,
        tokens=kl.numel(),
        mean_kl=float(kl.mean()),
        p99_kl=float(kl.sort().values[int(0.99 * (kl.numel() - 1))]),
        top1_agreement=all_agreeing / kl.numel(),
    )


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``KL(reference || other)`` of each row in nats, float64 ``[n]``, from logits ``[n, vocabulary]`` of any dtype."""
    pieces = zip(reference.split(_CHUNK), other.split(_CHUNK), strict=True)
    return torch.cat([_kl(p.float().log_softmax(-1), q.float().log_softmax(-1)) for p, q in pieces])


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    # Where the parent gives a token no probability at all, the term is zero, not zero times infinity.
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill(log_p == -torch.inf, 0.0).sum(-1, dtype=torch.float64)
