"""The training of a whole model: on the text, by its full-precision self, or on a task's answers."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ulbq import distributed, runtime
from ulbq.artifacts.shards import LazyTensors, write_shard
from ulbq.config.finetuning import FinetuneSettings
from ulbq.finetuning.checkpoint import TrainerCheckpoint
from ulbq.finetuning.examples import Examples
from ulbq.finetuning.head import in_chunks, sum_in_chunks
from ulbq.finetuning.losses import hidden_error, mean_loss, term_shares, token_terms
from ulbq.finetuning.student import Student
from ulbq.finetuning.teacher import Targets, Teacher
from ulbq.progress import Phase
from ulbq.tracking import Log, nowhere
from ulbq.training.optimizer import Group, make_optimizer
from ulbq.training.pieces import Pieces
from ulbq.training.sharding import Gradients, clip_parts, like, on_host

# Float32 copies of a chunk's logits that live together: themselves, log-probabilities, gradients; the teacher's too.
LOGIT_COPIES, LOGIT_COPIES_TAUGHT = 4, 10
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


OnCheckpoint = Callable[[TrainerCheckpoint, list[Path]], None]


class Trainer:
    """Trains a student in place, and keeps its states on disk.

    Args:
        student: who learns.
        teacher: None for ``ce``.
        examples: those that train, and those that validate.
        settings: loss, learning rates and the rest.
        schedule: from the settings and the number of all steps to the rates' factor at a step.
        seeds: of an epoch, counted from 1: of the order of its examples, of dropout and of the steps without adapter.
        folder: for the states.
        log: told every step's loss, and what the validation examples lose.

    Attributes:
        trained: the parameters.
        steps: of all epochs.
        pieces: that steps were taken in.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        examples: Examples,
        settings: FinetuneSettings,
        *,
        schedule: Callable[[FinetuneSettings, int], Callable[[int], float]],
        seeds: Callable[[int], int],
        folder: Path,
        log: Log = nowhere,
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._examples = examples
        self._settings = settings
        self._seeds = seeds
        self._folder = folder
        self._log = log
        decays = settings.weight_decays()
        self._groups = [
            Group(student.roles[role], rate, decays.get(role, 0.0))
            for role, rate in settings.learning_rates().items()
            if student.roles.get(role)
        ]
        self.trained = [p for group in self._groups for p in group.parameters]
        for parameter in self.trained:
            parameter.requires_grad_(True)
        self._gradients = Gradients(student.blocks, self.trained) if student.sharded else None
        adapted = any(layer.adapter is not None for layer in student.layers.values())
        self._share = settings.base_share if adapted else 0.0
        self.pieces = Pieces()
        if examples.ragged:
            runtime.map_large_blocks()
        self._steps_per_epoch = math.ceil(examples.training / settings.batch_size)
        self.steps = settings.steps(examples.training)
        self._factor = schedule(settings, self.steps)
        # Not all that the machine has: of several processes each has its own device.
        self._devices = sorted({p.device for p in self.trained if p.device.type == "cuda"}, key=str)

    def train(self, last: TrainerCheckpoint | None, bar: Phase, on_checkpoint: OnCheckpoint) -> TrainerCheckpoint:
        """Train what is left, and leave the student in the last state, or in the best one where that is kept.

        Args:
            last: what an earlier run noted last; None to begin, with an evaluation.
            bar: counts steps.
            on_checkpoint: told every checkpoint, the start and a failed one included, with the file of its state if it
                has one; what it has noted is not repeated.

        Returns:
            How the training ended. Where the best is kept and its step is 0, nothing was better than the start.
        """
        self._started = time.monotonic() - (0.0 if last is None else last.seconds)
        if last is None:
            last = self._timed(self._evaluated(TrainerCheckpoint(), bar))
            on_checkpoint(last, [])
        elif last.step:
            bar.advance(last.step, f"{last.step} steps were done")
        if self.trained and not last.is_over(self.steps):
            optimizer = make_optimizer(self._groups)
            with torch.random.fork_rng(self._devices):
                if last.step:
                    self._load(last.step, optimizer)
                while not last.is_over(self.steps):
                    last = self._epoch(last, optimizer, bar, on_checkpoint)
        kept = self._kept(last)[-1]
        if kept:
            self._load(kept, None)
        return last

    @torch.no_grad()
    def evaluate(self, bar: Phase) -> float:
        """Mean loss of the validation examples; with and without the adapter by share."""
        indices = torch.arange(self._examples.training, len(self._examples))
        adapted = self._mean(indices, True, bar)
        return (
            adapted if not self._share else (1 - self._share) * adapted + self._share * self._mean(indices, False, bar)
        )

    def _mean(self, indices: torch.Tensor, adapted: bool, bar: Phase) -> float:
        own, parts = 0.0, self._parts(indices)
        with self._student.fast():
            for number, (part, share) in enumerate(parts, 1):
                own += self._loss(part, adapted).item() * share
                bar.advance(0, f"validation {number} of {len(parts)}")
        return distributed.total(own)[0]

    def _parts(self, indices: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
        """Examples in the portions that run at once, each with its share of all predictions that count.

        Of several processes each gets its share of the portions, which may be none, and cuts them as its memory wants.
        Those that run a sharded model run it equally often: who has one portion less repeats one that does not count.
        """
        whole = self._examples.predictions(indices)
        share = -(-len(indices) // distributed.size())
        every = indices.split(min(share, self._settings.together(self._examples.length)))
        parts = distributed.own(every)
        pieces = [piece for part in parts for piece in self.pieces.split(part)]
        found = [(piece, self._examples.predictions(piece) / whole) for piece in pieces]
        if self._student.sharded and len(parts) < math.ceil(len(every) / distributed.size()):
            found.append((every[0], 0.0))
        return found

    def _loss(self, indices: torch.Tensor, adapted: bool) -> torch.Tensor:
        """Loss of a few examples, a scalar in nats a token (and the hidden states' error)."""
        settings, student = self._settings, self._student
        batch = self._examples.batch(indices)
        states, hidden = student.run(batch.tokens, hidden=settings.loss == "kl-hidden", adapted=adapted)
        # Counted on the host, where the device need not be waited for.
        places = batch.counted.flatten().nonzero().squeeze(1).to(states.device)
        batch = batch.to(states.device)
        targets = self._targets(indices) if settings.needs_teacher else None
        states, following = states.flatten(0, 1), batch.following.flatten()

        def terms(states: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, ...]:
            prediction = None if targets is None else targets.predict(places)
            logits = student.head.logits(states[places])
            return token_terms(settings.loss, logits, following[places], prediction, settings.dad_gamma)

        chunk = student.head.chunk(LOGIT_COPIES if targets is None else LOGIT_COPIES_TAUGHT)
        if settings.loss == "dad":  # its weights are known when all tokens are
            found = in_chunks(partial(terms, states), places, chunk)
            loss = mean_loss(settings.loss, found, following[places])
        else:
            shares = term_shares(settings.loss, following[places])

            def part(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
                values = terms(states, places)
                return torch.stack([v.sum() * share for v, share in zip(values, shares, strict=True)]).sum()

            loss = sum_in_chunks(part, states, places, chunk)
        if hidden is not None and targets is not None and targets.hidden is not None:
            ours, theirs = ([layer.flatten(0, 1)[places] for layer in layers] for layers in (hidden, targets.hidden))
            loss = loss + settings.hidden_weight * hidden_error(ours, theirs)
        return loss

    def _targets(self, indices: torch.Tensor) -> Targets:
        if self._teacher is None:
            raise ValueError(f"the loss {self._settings.loss} needs a teacher")
        return self._teacher.targets(indices)

    def _epoch(
        self,
        last: TrainerCheckpoint,
        optimizer: torch.optim.AdamW,
        bar: Phase,
        on_checkpoint: OnCheckpoint,
    ) -> TrainerCheckpoint:
        """What is left of a pass over the examples; it ends where something is not finite."""
        epoch, before = divmod(last.step, self._steps_per_epoch)
        # Everything random follows from the epoch's number, whatever happened before: a resumed run draws the same.
        seed = self._seeds(epoch + 1)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self._examples.training, generator=generator)
        if not before:
            _seed_own(seed)
        for number, batch in enumerate(order.split(self._settings.batch_size)):
            adapted = not (self._share and torch.rand((), generator=generator).item() < self._share)
            if number < before:
                continue
            for group, parameters in zip(optimizer.param_groups, self._groups, strict=True):
                group["lr"] = parameters.lr * self._factor(last.step)
            last = self._step(last, batch, optimizer, adapted)
            if not last.failed:
                loss = last.losses[-1][1]
                bar.advance(1, f"loss {loss:.4f}")
                self._log(last.step, {"loss": loss, "lr": optimizer.param_groups[0]["lr"]})
                due = self._is_due(last.step, self._settings.eval_every)
                # Where the last state is kept, whoever stores it measures it as it is stored.
                if due and (self._settings.keep_best or last.step < self.steps):
                    last = self._evaluated(last, bar)
            if last.failed or self._is_due(last.step, self._settings.save_every):
                last = self._saved(last, optimizer, on_checkpoint)
            if last.failed:
                break
        return last

    def _is_due(self, step: int, every: int | None) -> bool:
        """Whether something is that is done every so many steps, every epoch for None, and after the last one."""
        return step == self.steps or (every != 0 and step % (every or self._steps_per_epoch) == 0)

    def _step(
        self, last: TrainerCheckpoint, batch: torch.Tensor, optimizer: torch.optim.AdamW, adapted: bool
    ) -> TrainerCheckpoint:
        """One optimizer step on a batch of examples, a few of which run at once."""

        def gradients() -> torch.Tensor:
            summed = torch.zeros((), dtype=torch.float64, device=self.trained[0].device)
            with self._student.fast():
                for part, share in self._parts(batch):
                    loss = self._loss(part, adapted) * share
                    loss.backward()
                    summed += loss.detach()
            return summed

        def undo() -> None:
            optimizer.zero_grad()
            for layer in self._student.layers.values():
                layer.matrix = None

        at_once = min(self._settings.together(self._examples.length), len(batch))
        # The others would not know of a second try.
        summed = gradients() if self._student.sharded else self.pieces.run(at_once, gradients, undo)
        norm = self._joined_gradients().double()
        # Read together: a GPU is waited for once a step.
        own, size = torch.stack([summed.to(norm), norm]).tolist()
        (total,) = distributed.total(own)
        failed = "loss" if not math.isfinite(total) else "" if math.isfinite(size) else "gradient"
        if not failed:
            optimizer.step()
        optimizer.zero_grad()
        if self._examples.ragged:  # what a step leaves free rarely fits the next one
            runtime.give_back_memory()
        step = last.step + 1
        losses = last.losses if failed else (*last.losses, (step, total))
        return last.model_copy(update={"step": step, "losses": losses, "failed": failed})

    def _joined_gradients(self) -> torch.Tensor:
        """Add up what processes have found, and clip it; returns the norm before that."""
        largest = self._settings.clip or math.inf  # without a limit it only measures
        if self._gradients is not None:
            self._gradients.settle()
            return clip_parts(self.trained, largest)
        distributed.sum_gradients(self.trained)
        return nn.utils.clip_grad_norm_(self.trained, largest)

    def _evaluated(self, last: TrainerCheckpoint, bar: Phase) -> TrainerCheckpoint:
        error = self.evaluate(bar)
        bar.advance(0, f"validation loss {error:.4f}")
        self._log(last.step, {"validation_loss": error})
        failed = "" if math.isfinite(error) else "evaluation"
        return last.model_copy(update={"evaluations": (*last.evaluations, (last.step, error)), "failed": failed})

    def _saved(
        self, last: TrainerCheckpoint, optimizer: torch.optim.AdamW, on_checkpoint: OnCheckpoint
    ) -> TrainerCheckpoint:
        """Write the state of a checkpoint that did not fail, tell of it, and remove what nothing goes back to."""
        if not self._student.sharded:
            distributed.check_agreement(self.trained, f"what step {last.step} of the training left")
        files = [] if last.failed else [self._file(last.step)]
        for file in files:
            write_shard(file, self._state(optimizer))
        last = self._timed(last)
        on_checkpoint(last, files)
        distributed.on_main(self._tidy, last)
        return last

    def _timed(self, last: TrainerCheckpoint) -> TrainerCheckpoint:
        seconds = round(time.monotonic() - self._started, 3)
        return last.model_copy(update={"kept": self._kept(last), "seconds": seconds})

    def _kept(self, last: TrainerCheckpoint) -> tuple[int, ...]:
        """Steps whose states are kept: the last one's where it goes on, and that which the student is left in."""
        going = () if last.failed else (last.step,)
        return (*going, last.best[0]) if self._settings.keep_best else going or (0,)

    def _file(self, step: int) -> Path:
        return self._folder / f"step-{step:07d}.safetensors"

    def _state(self, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
        """Parameters, moments, and the generators of all processes."""
        tensors: dict[str, torch.Tensor] = {}
        for index, parameter in enumerate(self.trained):
            tensors[f"{index:06d}.value"] = on_host(parameter)
            for name, value in optimizer.state[parameter].items():
                tensors[f"{index:06d}.{name}"] = on_host(value)
        own = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]
        for rank, states in enumerate(distributed.gather(own)):
            tensors |= {f"generator.{rank}.{number}": state for number, state in enumerate(states)}
        return tensors

    @torch.no_grad()
    def _load(self, step: int, optimizer: torch.optim.AdamW | None) -> None:
        """Read a step's parameters, and its moments and generators where an optimizer is to go on from them."""
        stored = LazyTensors([self._file(step)])
        for index, parameter in enumerate(self.trained):
            parameter.copy_(like(parameter, stored.read(f"{index:06d}.value")))
            prefix = f"{index:06d}."
            if optimizer is not None:
                state = {name: stored.read(prefix + name) for name in _MOMENTS if prefix + name in stored.names}
                optimizer.state[parameter] = {
                    name: like(parameter, value) if value.dim() else value.to(parameter.device)
                    for name, value in state.items()
                }
        if optimizer is not None:
            prefix = f"generator.{distributed.rank()}."
            if f"{prefix}0" not in stored.names:  # of a process more than there were
                _seed_own(self._seeds(1 + step // self._steps_per_epoch))
                return
            torch.set_rng_state(stored.read(f"{prefix}0"))
            for number, device in enumerate(self._devices, 1):
                torch.cuda.set_rng_state(stored.read(f"{prefix}{number}"), device)

    def _tidy(self, last: TrainerCheckpoint) -> None:
        """Remove the states that nothing goes back to."""
        kept = {self._file(step) for step in last.kept}
        for path in self._folder.glob("step-*.safetensors"):
            if path not in kept:
                path.unlink()


def _seed_own(seed: int) -> None:
    """Have torch's own generators draw something else in each process."""
    torch.manual_seed(seed + 7907 * distributed.rank())
