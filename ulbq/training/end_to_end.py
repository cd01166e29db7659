"""End-to-end training: the whole quantized model learns from the text, or from its full-precision self."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from ulbq import distributed
from ulbq.artifacts.shards import LazyTensors, write_shard
from ulbq.config.end_to_end import EndToEndSettings
from ulbq.training.distill import hidden_error, mean_loss, term_shares, token_terms
from ulbq.training.head import in_chunks, sum_in_chunks
from ulbq.training.optimizer import Group, make_optimizer, rate_factor
from ulbq.training.samples import Samples
from ulbq.training.student import Student
from ulbq.training.teacher import Lesson, Teacher

# Float32 copies of a chunk's logits that live together: themselves, log-probabilities, gradients; the teacher's too.
_COPIES, _COPIES_TAUGHT = 4, 10


class Epoch(BaseModel):
    """How the training stood after an epoch; number 0 is the start.

    Attributes:
        error: loss of the held-out samples.
        best: number of the best epoch so far.
        best_error: its loss.
        steps: optimizer steps so far.
        finite: whether loss and gradients always were; if not, the training ended here.
        seconds: wall time of this epoch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    number: int
    error: float
    best: int
    best_error: float
    steps: int
    finite: bool = True
    seconds: float = 0.0


class EndToEndTrainer:
    """Trains a student in place, and keeps what each epoch left on disk.

    Args:
        student: who learns.
        teacher: None for ``ce``.
        samples: the text.
        settings: loss, rates and the rest.
        folder: for the states of the epochs.
        seed: of the order of the samples, of dropout and of the steps without adapter.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        samples: Samples,
        settings: EndToEndSettings,
        *,
        folder: Path,
        seed: int,
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._samples = samples
        self._settings = settings
        self._folder = folder
        self._seed = seed
        decays = settings.block.decays()
        self._groups = [
            Group(student.roles[role], rate, decays.get(role, 0.0))
            for role, rate in settings.rates().items()
            if student.roles.get(role)
        ]
        self._trained = [p for group in self._groups for p in group.parameters]
        for parameter in self._trained:
            parameter.requires_grad_(True)
        adapted = any(layer.adapter is not None for layer in student.layers.values())
        self._share = settings.block.base_share if adapted else 0.0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps."""
        return math.ceil(self._samples.training / self._settings.accumulation)

    def train(
        self, done: list[Epoch], on_epoch: Callable[[Epoch, list[Path]], None], on_step: Callable[[float], None]
    ) -> Epoch:
        """Train what is left of the epochs, and leave the student in the state of the best one.

        Args:
            done: what earlier runs reported, in order.
            on_epoch: called after each epoch, number 0 first, with the files that hold its state: once it has noted
                them, the epoch need not be repeated.
            on_step: called after each optimizer step with its loss.

        Returns:
            The last epoch. Where its ``best`` is 0 nothing improved on the start, and the student is of no use.
        """
        epochs = list(done)
        if not epochs:
            start = self.heldout()
            epochs.append(Epoch(number=0, error=start, best=0, best_error=start, steps=0, finite=math.isfinite(start)))
            on_epoch(epochs[0], [])
        last = epochs[-1]
        unfinished = last.finite and last.number < self._settings.epochs and self._trained
        if unfinished:
            optimizer = make_optimizer(self._groups)
            if last.number:
                self._load(last.number, optimizer)
            while last.finite and last.number < self._settings.epochs:
                last = self._epoch(last, optimizer, on_step)
                distributed.check_agreement(self._trained, f"what epoch {last.number} of the end-to-end training left")
                files = self._save(last.number, optimizer) if last.finite else []
                on_epoch(last, files)
                distributed.on_main(self._tidy, last)
        if last.best:
            self._load(last.best, None)
        return last

    @torch.no_grad()
    def heldout(self) -> float:
        """Mean loss of the held-out samples; with and without the adapter by share."""
        indices = torch.arange(self._samples.training, len(self._samples.tokens))
        adapted = self._mean(indices, adapted=True)
        return adapted if not self._share else (1 - self._share) * adapted + self._share * self._mean(indices, False)

    def _mean(self, indices: torch.Tensor, adapted: bool) -> float:
        with self._student.fast():
            own = sum(self._loss(part, adapted).item() * share for part, share in self._parts(indices))
        return distributed.total(own)[0]

    def _parts(self, indices: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
        """Samples in the portions that run at once, each with its share of all predictions that count.

        Of several processes each gets its share of the portions, which may be none.
        """
        whole = self._samples.predictions(indices)
        share = -(-len(indices) // distributed.size())
        parts = distributed.own(indices.split(min(share, self._settings.together(self._samples.tokens.shape[1]))))
        return [(part, self._samples.predictions(part) / whole) for part in parts]

    def _loss(self, indices: torch.Tensor, adapted: bool) -> torch.Tensor:
        """Loss of a batch, a scalar in nats a token (and the hidden states' error)."""
        settings, student = self._settings, self._student
        batch = self._samples.batch(indices)
        states, hidden = student.run(batch.tokens, hidden=settings.loss == "kl-hidden", adapted=adapted)
        batch = batch.to(states.device)
        lesson = self._lesson(indices) if settings.taught else None
        states, following = states.flatten(0, 1), batch.following.flatten()

        def terms(states: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, ...]:
            prediction = None if lesson is None else lesson.predict(places)
            logits = student.head.logits(states[places])
            return token_terms(settings.loss, logits, following[places], prediction, settings.gamma)

        places = batch.counted.flatten().nonzero().squeeze(1)
        chunk = student.head.chunk(_COPIES if lesson is None else _COPIES_TAUGHT)
        if settings.loss == "dad":  # its weights are known when all tokens are
            found = in_chunks(partial(terms, states), places, chunk)
            loss = mean_loss(settings.loss, found, following[places])
        else:
            shares = term_shares(settings.loss, following[places])

            def part(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
                values = terms(states, places)
                return torch.stack([v.sum() * share for v, share in zip(values, shares, strict=True)]).sum()

            loss = sum_in_chunks(part, states, places, chunk)
        if hidden is not None and lesson is not None and lesson.hidden is not None:
            outputs, targets = ([layer[batch.counted] for layer in layers] for layers in (hidden, lesson.hidden))
            loss = loss + settings.hidden_weight * hidden_error(outputs, targets)
        return loss

    def _lesson(self, indices: torch.Tensor) -> Lesson:
        if self._teacher is None:
            raise ValueError(f"the loss {self._settings.loss} needs a teacher")
        return self._teacher.lesson(indices)

    def _epoch(self, last: Epoch, optimizer: torch.optim.AdamW, on_step: Callable[[float], None]) -> Epoch:
        """One pass over the samples; it ends where a loss or gradient is not finite."""
        started, settings, number = time.monotonic(), self._settings, last.number + 1
        factor = rate_factor(settings.block, settings.epochs * self.steps_per_epoch)
        # Everything random follows from the epoch's number, whatever happened before: a resumed run draws the same.
        generator = torch.Generator().manual_seed(self._seed + 104729 * number)
        order = torch.randperm(self._samples.training, generator=generator)
        steps, finite = last.steps, True
        # Not all that the machine has: of several processes each has its own device.
        with torch.random.fork_rng({p.device for p in self._trained if p.device.type == "cuda"}):
            torch.manual_seed(self._seed + 104729 * number + 7907 * distributed.rank())
            for batch in order.split(settings.accumulation):
                adapted = not (self._share and torch.rand((), generator=generator).item() < self._share)
                for group, parameters in zip(optimizer.param_groups, self._groups, strict=True):
                    group["lr"] = parameters.rate * factor(steps)
                finite, loss = self._step(batch, optimizer, adapted)
                if not finite:
                    break
                steps += 1
                on_step(loss)
        error = self.heldout() if finite else math.inf
        better = math.isfinite(error) and error < last.best_error
        return Epoch(
            number=number,
            error=error,
            best=number if better else last.best,
            best_error=error if better else last.best_error,
            steps=steps,
            finite=math.isfinite(error),
            seconds=round(time.monotonic() - started, 3),
        )

    def _step(self, batch: torch.Tensor, optimizer: torch.optim.AdamW, adapted: bool) -> tuple[bool, float]:
        """One optimizer step on a batch of samples, a few of which run at once; whether it could be made, its loss."""
        total = 0.0
        with self._student.fast():
            for part, share in self._parts(batch):
                loss = self._loss(part, adapted) * share
                loss.backward()
                total += loss.item()
        (total,) = distributed.total(total)
        distributed.sum_gradients(self._trained)
        # Without a limit it only measures.
        norm = nn.utils.clip_grad_norm_(self._trained, self._settings.block.clip or math.inf)
        finite = math.isfinite(total) and math.isfinite(norm.item())
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        return finite, total

    def _file(self, number: int) -> Path:
        return self._folder / f"epoch-{number:05d}.safetensors"

    def _save(self, number: int, optimizer: torch.optim.AdamW) -> list[Path]:
        """Write parameters and moments."""
        tensors: dict[str, torch.Tensor] = {}
        for index, parameter in enumerate(self._trained):
            tensors[f"{index:06d}.value"] = parameter
            for name, value in optimizer.state[parameter].items():
                tensors[f"{index:06d}.{name}"] = value
        write_shard(self._file(number), tensors)
        return [self._file(number)]

    @torch.no_grad()
    def _load(self, number: int, optimizer: torch.optim.AdamW | None) -> None:
        """Read an epoch's parameters, and its moments where an optimizer is to go on from them."""
        stored = LazyTensors([self._file(number)])
        for index, parameter in enumerate(self._trained):
            parameter.copy_(stored.read(f"{index:06d}.value"))
            prefix = f"{index:06d}."
            if optimizer is not None:
                moments = ("step", "exp_avg", "exp_avg_sq")
                state = {name: stored.read(prefix + name) for name in moments if prefix + name in stored.names}
                optimizer.state[parameter] = {name: value.to(parameter.device) for name, value in state.items()}

    def _tidy(self, last: Epoch) -> None:
        """Remove the states that nothing goes back to."""
        kept = {self._file(last.number), self._file(last.best)}
        for path in self._folder.glob("epoch-*.safetensors"):
            if path not in kept:
                path.unlink()
