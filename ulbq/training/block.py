"""Block-wise training: one decoder block with quantized weights learns the output of its full-precision self."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ulbq.models.stream import ActivationStore, run_block
from ulbq.quantizers.dual_binary import DualBinaryQuantizer
from ulbq.training.losses import output_loss, token_weights
from ulbq.training.precision import Precision
from ulbq.training.settings import TrainSettings

_RETRY_FACTOR = 0.25


class TrainedLinear(nn.Module):
    """A linear layer whose weight a quantizer makes anew at every call.

    Args:
        quantizer: called with a dtype it gives the dequantized weight; ``trainable()`` gives its parameters by role,
            ``weights`` and ``scales``.
        bias: of the layer it stands for.
    """

    def __init__(self, quantizer: DualBinaryQuantizer, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return nn.functional.linear(x, self.quantizer(dtype), self.bias)


@dataclass(frozen=True)
class BlockData:
    """Inputs and targets of one block.

    Attributes:
        inputs: ``x_q [samples, length, hidden]``, the stream through the quantized blocks before.
        targets: ``f_fp(x_fp)``, the full-precision stream behind this block.
        augmented: ``f_fp(x_q)``, for the augmented loss; None without it.
        kwargs: the block's other arguments (position embeddings, mask), made for a batch of one.
        training: the first so many samples train, the rest are held out.
    """

    inputs: ActivationStore
    targets: ActivationStore
    augmented: ActivationStore | None
    kwargs: dict[str, Any]
    training: int


@dataclass(frozen=True)
class TrainOutcome:
    """How a block's training went; errors are held-out losses.

    Attributes:
        fallback: no training improved on the closed-form start, which is what the block now holds.
        diverged: a loss was not finite at least once.
    """

    start_error: float
    end_error: float
    steps: int
    retries: int
    fallback: bool
    diverged: bool


class BlockTrainer:
    """Trains the quantizers and norm weights of one block in place.

    Args:
        block: the block, its linears already replaced by :class:`TrainedLinear`.
        data: inputs and targets.
        settings: rates, epochs and the rest.
        precision: device and dtype.
    """

    def __init__(self, block: nn.Module, data: BlockData, settings: TrainSettings, precision: Precision) -> None:
        self._block = block
        self._data = data
        self._settings = settings
        self._precision = precision
        self._roles = self._parameters()

    def train(self, seed: int, on_epoch: Callable[[float], None] = lambda error: None) -> TrainOutcome:
        """Train, keep the parameters with the lowest held-out loss, and roll back what diverged or got worse.

        Args:
            seed: of the order of the samples.
            on_epoch: called with the held-out loss after each epoch.
        """
        start = self._snapshot()
        start_error = self._heldout()
        rate, retries, diverged = 1.0, 0, False
        while self._settings.epochs > 0:
            error, steps = self._attempt(rate, seed, on_epoch)
            diverged = diverged or not math.isfinite(error)
            if error < start_error:
                return TrainOutcome(start_error, error, steps, retries, False, diverged)
            self._restore(start)
            if retries == self._settings.retries:
                break
            retries += 1
            rate *= _RETRY_FACTOR
        fallback = self._settings.epochs > 0
        return TrainOutcome(start_error, start_error, 0, retries, fallback, diverged)

    def _attempt(self, rate: float, seed: int, on_epoch: Callable[[float], None]) -> tuple[float, int]:
        """One run over all epochs, leaving the best parameters; returns the best held-out loss and the steps taken."""
        settings, samples = self._settings, self._data.training
        steps_per_epoch = math.ceil(samples / settings.batch_size)
        optimizer, schedule = self._optimizer(rate, settings.epochs * steps_per_epoch)
        generator = torch.Generator().manual_seed(seed)
        best, best_error, waited, steps = self._snapshot(), math.inf, 0, 0
        for _ in range(settings.epochs):
            order = torch.randperm(samples, generator=generator)
            total = torch.zeros((), device=self._precision.device)
            for batch in order.split(settings.batch_size):
                loss = self._loss(batch)
                loss.backward()
                if settings.clip:
                    nn.utils.clip_grad_norm_([p for group in self._roles.values() for p in group], settings.clip)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                total += loss.detach()
                steps += 1
            error = self._heldout()
            on_epoch(error)
            if not (math.isfinite(error) and torch.isfinite(total)):
                return math.inf, steps
            if error < best_error:
                best, best_error, waited = self._snapshot(), error, 0
            else:
                waited += 1
                if waited >= settings.patience:
                    break
        self._restore(best)
        return best_error, steps

    def _loss(self, batch: torch.Tensor) -> torch.Tensor:
        data, device = self._data, self._precision.device
        targets = data.targets.get(batch).to(device)
        weights = token_weights(targets, self._settings.token_weighting)
        with self._precision.autocast():
            outputs = run_block(self._block, data.inputs.get(batch).to(device), data.kwargs)
        loss = output_loss(outputs, targets, weights)
        if data.augmented is not None:
            loss = loss + output_loss(outputs, data.augmented.get(batch).to(device), weights)
        return loss

    @torch.no_grad()
    def _heldout(self) -> float:
        indices = torch.arange(self._data.training, len(self._data.inputs))
        batches = indices.split(self._settings.batch_size)
        return sum(self._loss(batch).item() * len(batch) for batch in batches) / len(indices)

    def _parameters(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by role; everything else in the block is frozen."""
        self._block.requires_grad_(False)
        roles: dict[str, list[nn.Parameter]] = {"weights": [], "scales": [], "norms": []}
        owned: set[nn.Parameter] = set()
        for module in self._block.modules():
            if isinstance(module, TrainedLinear):
                for role, parameters in module.quantizer.trainable().items():
                    roles[role].extend(parameters)
                owned.update(module.parameters())
        if self._settings.norm_rate > 0:
            roles["norms"] = [p for p in self._block.parameters() if p not in owned and p.dim() == 1]
        for parameters in roles.values():
            for parameter in parameters:
                parameter.requires_grad_(True)
        return roles

    def _optimizer(self, rate: float, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        settings = self._settings
        rates = {"weights": settings.weight_rate, "scales": settings.scale_rate, "norms": settings.norm_rate}
        groups = [{"params": p, "lr": rate * rates[role]} for role, p in self._roles.items() if p]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        warmup = max(1, round(settings.warmup * steps))

        def factor(step: int) -> float:
            cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
            return min(1.0, (step + 1) / warmup) * (settings.final_rate + (1 - settings.final_rate) * cosine)

        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def _snapshot(self) -> list[torch.Tensor]:
        return [p.detach().clone() for group in self._roles.values() for p in group]

    @torch.no_grad()
    def _restore(self, snapshot: Sequence[torch.Tensor]) -> None:
        parameters = (p for group in self._roles.values() for p in group)
        for parameter, value in zip(parameters, snapshot, strict=True):
            parameter.copy_(value)
            parameter.grad = None
