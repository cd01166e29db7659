"""Block-wise training: one decoder block with quantized weights learns the output of its full-precision self."""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import nn

from ulbq import distributed
from ulbq.config.stages import Stage
from ulbq.config.training import OptimizerKind, Role, TrainSettings
from ulbq.training.objective import BlockData, Objective, Penalty, Validation
from ulbq.training.optimizer import (
    Group,
    half_adamw,
    lr_factor,
    make_optimizer,
    parameters_by_role,
    sign_descent,
)
from ulbq.training.parts import SplitTrained, Trained
from ulbq.training.pieces import Pieces
from ulbq.training.precision import Precision

_RETRY_FACTOR = 0.25
_OPTIMIZERS: dict[OptimizerKind, Callable[[Sequence[Group], float], torch.optim.Optimizer]] = {
    "adamw": make_optimizer,
    "adamw-bf16": half_adamw,
    "sign": sign_descent,
}


@dataclass(frozen=True)
class TrainOutcome:
    """How a block's training went; errors are held-out output losses.

    Attributes:
        fallback: no training improved on the closed-form start, which is what the block now holds.
        diverged: a loss was not finite at least once.
        sinks: held-out tokens that became attention sinks, which they are not in full precision.
        at_once: samples of a step that ran at once, as the device had no room for more; 0 where it had for all.
    """

    start_error: float
    end_error: float
    steps: int
    retries: int
    fallback: bool
    diverged: bool
    sinks: int = 0
    at_once: int = 0


class BlockTrainer:
    """Trains the quantizers, adapters and norm weights of one block in place, stage after stage.

    Args:
        block: the block, its linears already replaced by :class:`TrainedLinear`.
        data: inputs and targets.
        settings: rates and the rest.
        precision: device and dtype.
        stages: what to minimize and how long; None for the output loss over ``settings.epochs``.
        penalty: on the weights, for the stages that want it.
        pieces: that steps of this run had to be taken in before.
        sharded: each of several processes has a part of gradients, moments and snapshots.
    """

    def __init__(
        self,
        block: nn.Module,
        data: BlockData,
        settings: TrainSettings,
        precision: Precision,
        *,
        stages: Sequence[Stage] | None = None,
        penalty: Penalty | None = None,
        pieces: Pieces | None = None,
        sharded: bool = False,
    ) -> None:
        self._block = block
        self._settings = settings
        self._sharded = sharded
        self._pieces = pieces or Pieces()
        self._samples = data.training
        self._stages = [Stage(epochs=settings.epochs)] if stages is None else list(stages)
        self._objective = Objective(block, data, settings, precision, penalty)
        self._roles = parameters_by_role(block, self._objective.layers.values())
        self._device = precision.device
        self._output: Validation | None = None  # of the parameters as they stand; None where unknown

    def train(self, seed: int, on_epoch: Callable[[float], None] = lambda error: None) -> TrainOutcome:
        """Train, keep in every stage the parameters with the lowest held-out loss, and roll back what got worse.

        Args:
            seed: of the order of the samples.
            on_epoch: called with the held-out loss after each epoch.
        """
        start = self._output = self._objective.validation_output()
        ends = [self._stage(stage, seed + 7919 * i, on_epoch) for i, stage in enumerate(self._stages) if stage.epochs]
        steps, retries = sum(end.steps for end in ends), sum(end.retries for end in ends)
        end = self._objective.validation_output() if self._output is None else self._output
        return TrainOutcome(
            start_error=start.error,
            end_error=end.error,
            steps=steps,
            retries=retries,
            fallback=bool(ends) and not steps,
            diverged=any(end.diverged for end in ends),
            sinks=end.sinks,
            at_once=self._pieces.fewest(),
        )

    def _stage(self, stage: Stage, seed: int, on_epoch: Callable[[float], None]) -> "_StageEnd":
        """One stage, tried again at lower rates where it did not improve on its own start."""
        groups = self._groups(stage)
        if not groups or not self._objective.learns(stage):
            return _StageEnd(0, 0, False)
        with closing(SplitTrained(groups, self._block) if self._sharded else Trained(groups)) as trained:
            return self._attempts(stage, trained, seed, on_epoch)

    def _attempts(self, stage: Stage, trained: Trained, seed: int, on_epoch: Callable[[float], None]) -> "_StageEnd":
        start, start_output = trained.snapshot(), self._output
        start_error = self._objective.validation_loss(stage, start_output)
        rate, retries, diverged = 1.0, 0, False
        while True:
            error, steps = self._attempt(stage, trained, rate, seed, on_epoch)
            diverged = diverged or not math.isfinite(error)
            if error < start_error:
                return _StageEnd(steps, retries, diverged)
            trained.restore(start)
            self._output = start_output
            if retries == self._settings.retries:
                return _StageEnd(0, retries, diverged)
            retries += 1
            rate *= _RETRY_FACTOR

    def _attempt(
        self, stage: Stage, trained: Trained, rate: float, seed: int, on_epoch: Callable[[float], None]
    ) -> tuple[float, int]:
        """One run over a stage's epochs, leaving the best parameters; returns the best held-out loss and the steps."""
        settings = self._settings
        steps_per_epoch = math.ceil(self._samples / settings.batch_size)
        optimizer = _OPTIMIZERS[settings.optimizer](trained.groups, rate)
        factor = lr_factor(settings, stage.epochs * steps_per_epoch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        generator = torch.Generator().manual_seed(seed)
        best, best_error, waited, steps = trained.snapshot(), math.inf, 0, 0
        for _ in range(stage.epochs):
            order = torch.randperm(self._samples, generator=generator)
            total = torch.zeros((), device=self._device)
            for batch in order.split(settings.batch_size):
                total += self._gradients(batch, stage, generator, trained)
                trained.settle(settings.clip)
                optimizer.step()
                optimizer.zero_grad()
                trained.moved()
                schedule.step()
                steps += 1
            output = self._objective.validation_output() if stage.output else None
            error = self._objective.validation_loss(stage, output)
            distributed.sum_(total)
            on_epoch(error)
            if not (math.isfinite(error) and torch.isfinite(total)):
                return math.inf, steps
            if error < best_error:
                best, best_error, waited = trained.snapshot(), error, 0
                self._output = output
            else:
                waited += 1
                if waited >= settings.patience:
                    break
        trained.restore(best)
        return best_error, steps

    def _gradients(
        self, batch: torch.Tensor, stage: Stage, generator: torch.Generator, trained: Trained
    ) -> torch.Tensor:
        """Loss of a batch, its gradients added up; in smaller parts where the device has no room for these."""
        before, at_once = generator.get_state(), self._settings.micro_batch or len(batch)

        def step() -> torch.Tensor:
            total = torch.zeros((), device=self._device)
            for part in batch.split(at_once):
                drawn = generator.get_state()
                for piece in self._pieces.split(part):
                    generator.set_state(drawn)  # all of a part draw what it would draw as a whole
                    loss = self._objective.training(piece, stage, generator) * (len(piece) / len(batch))
                    if loss.requires_grad:
                        loss.backward()
                    total += loss.detach()
                trained.went_back()
            return total

        def undo() -> None:
            generator.set_state(before)
            self._objective.forget()
            trained.forget()

        if self._sharded:  # the others would not know of a second try
            return step()
        return self._pieces.run(min(at_once, len(batch)), step, undo)

    def _groups(self, stage: Stage) -> list[Group]:
        """The optimizer's groups of a stage; whatever trains at a rate of 0 is frozen."""
        own = stage.model_dump(exclude_none=True)
        groups: list[Group] = []
        decays = self._settings.weight_decays()
        for role, rate in self._settings.learning_rates().items():
            singular = _SINGULAR[role]
            rate = own.get(f"{singular}_lr", rate)
            decay = own.get(f"{singular}_weight_decay", decays.get(role, 0.0))
            parameters = self._roles.get(role, [])
            for parameter in parameters:
                parameter.requires_grad_(rate > 0)
            if parameters and rate > 0:
                groups.append(Group(parameters, rate, decay))
        return groups


_SINGULAR: dict[Role, str] = {
    "weights": "weight",
    "scales": "scale",
    "norms": "norm",
    "adapter": "adapter",
    "router": "router",
}


@dataclass(frozen=True)
class _StageEnd:
    """What came of a stage; 0 steps where nothing was kept."""

    steps: int
    retries: int
    diverged: bool
