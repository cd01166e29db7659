"""Fine-tuning through transformers' Trainer: adapters, and scales where wanted, beside weights that stay packed."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ulbq import distributed, runtime
from ulbq.artifacts.shards import LazyTensors, store_shard
from ulbq.config.finetune import TunerSettings
from ulbq.data.lessons import Lesson
from ulbq.errors import NumericsError
from ulbq.training.batches import IGNORED, Listed, Order, batch
from ulbq.training.checkpoint import load_generators, load_optimizer, save_generators, save_optimizer
from ulbq.training.head import Head, in_chunks
from ulbq.training.precision import Precision

_TRAINED = "trained.safetensors"
_COPIES = 4  # of a chunk's logits that live together: as computed, float32, log-probabilities, gradients


class Answers(nn.Module):
    """A causal language model whose output is the loss of what is learnt.

    Logits exist for learnt positions alone, and for a chunk of them at a time: of a whole micro-batch they would take
    more memory than everything else together.

    Args:
        model: peft's or a plain one, on its device.
        precision: of the products.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self._precision = precision
        whole = model.get_base_model() if isinstance(model, PeftModel) else model
        if not isinstance(whole, PreTrainedModel):
            raise TypeError("no model of transformers")
        # Not as a submodule: it is within the model already.
        self._whole = (whole,)
        self._head = Head(whole, precision)

    def forward(
        self, tokens: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        """``loss``: the sum of the learnt tokens' cross-entropies, over their number or over a number that is given."""
        with self._precision.autocast():
            states = self._whole[0].base_model(input_ids=tokens, use_cache=False).last_hidden_state
        rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        if not len(rows):  # empty lessons alone: nothing to learn, and a gradient of zeros for everything that trains
            return {"loss": states.double().sum() * 0}
        asked, wanted = states[rows, columns], labels[rows, columns + 1]

        def losses(positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits = self._head.logits(asked[positions]).float()
            return (nn.functional.cross_entropy(logits, wanted[positions], reduction="none"),)

        positions = torch.arange(len(rows), device=labels.device)
        total = in_chunks(losses, positions, self._head.chunk(_COPIES))[0].double().sum()
        return {"loss": total / (len(rows) if num_items_in_batch is None else num_items_in_batch)}


@torch.no_grad()
def answer_loss(model: nn.Module, lessons: Iterable[Lesson], precision: Precision) -> float:
    """Mean cross-entropy of the learnt tokens of lessons, nats a token; one lesson runs at a time.

    Of several processes each brings its share of the lessons, and all get the mean over all of them. The model is in
    eval mode afterwards.
    """
    answers = Answers(model, precision).eval()
    total, count = 0.0, 0
    for lesson in lessons:
        found = batch([lesson], 0)
        total += answers(*(tensor.to(precision.device) for tensor in found), num_items_in_batch=1)["loss"].item()
        count += int((found.labels != IGNORED).sum())
    total, everything = distributed.total(total, count)
    return total / everything


class Watch:
    """What a run is told of on its way; each is called by all processes alike.

    Args:
        on_step: after each optimiser step with its number and loss.
        on_look: where it is time to look at the held-out lessons, with the step.
        on_save: once a checkpoint is complete, with its folder.
    """

    def __init__(
        self,
        on_step: Callable[[int, float], None],
        on_look: Callable[[int], None],
        on_save: Callable[[Path], None],
    ) -> None:
        self.on_step = on_step
        self.on_look = on_look
        self.on_save = on_save


class Tuner(Trainer):
    """transformers' Trainer with this run's optimiser, precision and checkpoints.

    Args:
        model: peft's, on its device; what trains has ``requires_grad``.
        lessons: what trains.
        settings: rates and the rest.
        precision: of the products.
        scales: those of the trainable parameters that are scales, by their names in the model.
        filler: token behind the ends of lessons.
        folder: for checkpoints.
        seed: of the order of the lessons and of dropout.
        watch: told how it goes.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        lessons: Sequence[Lesson],
        settings: TunerSettings,
        precision: Precision,
        *,
        scales: frozenset[str] = frozenset(),
        filler: int,
        folder: Path,
        seed: int,
        watch: Watch,
    ) -> None:
        self._settings = settings
        self._seed = seed
        self._scales = scales
        self._whole = model
        steps, processes = settings.steps(len(lessons)), distributed.size()
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.micro_batch,
            gradient_accumulation_steps=settings.batch_size // (settings.micro_batch * processes),
            lr_scheduler_type=_SCHEDULES[settings.schedule],
            # Never all of a run: the first of these steps has a rate of 0, and a run of one would learn nothing.
            warmup_steps=min(math.ceil(settings.warmup * steps), steps - 1),
            max_grad_norm=settings.clip,
            use_cpu=precision.device.type == "cpu",
            ddp_backend="gloo" if precision.device.type == "cpu" and processes > 1 else None,
            ddp_find_unused_parameters=False if processes > 1 else None,
            # Packed weights are buffers, and never change.
            ddp_broadcast_buffers=False if processes > 1 else None,
            save_strategy="steps",
            save_steps=settings.save_every,
            # Two: the older one is the resumed run's until the newer one is noted.
            save_total_limit=2,
            logging_steps=1,
            logging_nan_inf_filter=False,
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=precision.device.type == "cuda",
            remove_unused_columns=False,
            seed=(seed + 7907 * distributed.rank()) % 2**32,  # of dropout, each process's own
        )
        stay_on(precision.device, arguments)
        if settings.checkpointing:
            # Reentrant, blocks whose inputs are not trained (the first one) would get no gradients.
            model.activation_checkpointing_enable({"use_reentrant": False})
        super().__init__(
            model=Answers(model, precision),
            args=arguments,
            train_dataset=Listed(lessons, settings.micro_batch * processes if processes > 1 else 1),
            data_collator=lambda some: batch(some, filler)._asdict(),
            callbacks=[_Reporter(watch, settings, folder)],
        )
        self.remove_callback(PrinterCallback)  # it prints to standard output

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by name."""
        return {name: parameter for name, parameter in self._whole.named_parameters() if parameter.requires_grad}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, with rates and decays of our own for adapter and scales."""
        if self.optimizer is None:
            settings, trained = self._settings, self.trained
            adapter = {name: p for name, p in trained.items() if name not in self._scales}
            groups = [
                ([p for p in adapter.values() if p.dim() > 1], settings.adapter_rate, settings.adapter_decay),
                ([p for p in adapter.values() if p.dim() == 1], settings.adapter_rate, 0.0),
                ([trained[name] for name in sorted(self._scales)], settings.scale_rate, settings.scale_decay),
            ]
            named = [{"params": some, "lr": rate, "weight_decay": decay} for some, rate, decay in groups if some]
            self.optimizer = torch.optim.AdamW(named)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        listed = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(listed, Listed):
            raise TypeError("no lessons of ours")
        return Order(listed, self._seed)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The Trainer calls for this in every process, and two that write one file take it from each other.
        if not distributed.is_main():
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        store_shard(folder / _TRAINED, {name: parameter.detach() for name, parameter in self.trained.items()})

    # The Trainer's own four pickle.
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if distributed.is_main():
            save_optimizer(Path(output_dir), self._stepping, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(Path(checkpoint), self._stepping, self.lr_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        save_generators(Path(output_dir), distributed.rank())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_generators(Path(checkpoint), distributed.rank())

    @property
    def _stepping(self) -> torch.optim.Optimizer:
        if self.optimizer is None:
            raise ValueError("there is no optimizer yet")
        return self.optimizer

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        stored = LazyTensors([Path(resume_from_checkpoint) / _TRAINED])
        for name, parameter in self.trained.items():
            parameter.copy_(stored.read(name))


def stay_on(device: torch.device, arguments: TrainingArguments) -> None:
    """Have a Trainer run on the device that its model is on, and on no other.

    Where one process sees several GPUs, the Trainer would take the first whatever the model is on, and spread each
    batch over all of them: other batches and other steps than were planned. ``torchrun``'s processes have one each.
    """
    if device.type != "cuda" or distributed.size() > 1:
        return
    own = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    torch.cuda.set_device(own)
    arguments._n_gpu = 1
    arguments.__dict__["_setup_devices"] = own  # where its cached property of that name lies


class _Reporter(TrainerCallback):
    """Passes on what a run does, and ends it where its numbers are not finite."""

    def __init__(self, watch: Watch, settings: TunerSettings, folder: Path) -> None:
        self._watch = watch
        self._settings = settings
        self._folder = folder

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        logs = more.get("logs") or {}
        if "loss" not in logs:
            return  # the summary at the end
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise NumericsError(
                f"The {what} is not finite in step {state.global_step} of the fine-tuning.",
                hint="Try a lower `adapter_rate`, a longer `warmup` or `precision=fp32`, with another -o.",
            )
        self._watch.on_step(state.global_step, loss)
        every = self._settings.eval_every
        if every and state.global_step % every == 0 and state.global_step < state.max_steps:
            model = more["model"]
            self._watch.on_look(state.global_step)
            model.train()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        # Every step has another length: what it leaves free rarely fits the next one.
        runtime.give_back_memory()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._watch.on_save(self._folder / f"checkpoint-{state.global_step}")


_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
