"""The EfficientQAT authors' Block-AP loop, for ``block_time.py``, from a folder with their repository.

Their files stay as they are. What today's transformers and a machine without CUDA ask for is put in their place from
outside: a decoder layer that returns a tuple and makes its own position embeddings (cached, so that they cost nothing),
autocast and storage in the run's precision instead of float16, and a stand-in for the Triton kernels, which the loop
does not call. The learning rates are those of their 2-bit scripts.
"""

import re
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lap import Done, Laps
from torch import nn


class Clock:
    """Stands where their loop wants a logger: what it reports tells when a block starts, and how long epochs took."""

    def __init__(self, laps: Laps, steps_per_epoch: int) -> None:
        self._laps = laps
        self._steps_per_epoch = steps_per_epoch
        self._epochs = 0

    def info(self, message: str) -> None:
        """Take one line of their log."""
        print(message, file=sys.stderr)
        if started := re.search(r"Start quantize blocks (\d+)", message):
            self._laps.finish(self._epochs * self._steps_per_epoch)
            self._epochs = 0
            self._laps.start(int(started[1]))
        elif took := re.search(r" epoch \d+ .* time ([0-9.e+-]+)", message):
            self._epochs += 1
            self._laps.add("training", float(took[1]))


def main() -> None:
    """Quantize the first blocks."""
    laps = Laps()
    task = laps.task
    torch.set_num_threads(task["threads"])
    from transformers import AutoModelForCausalLM

    half = torch.bfloat16 if task["precision"] == "bf16" else torch.float32
    _stand_in(task, half)
    import quantize.block_ap as theirs

    store = theirs.BlockTrainDataset

    def stored(size: int, length: int, hidden: int, dtype: torch.dtype, **kwargs: Any) -> Any:
        return store(size, length, hidden, half, **kwargs)

    theirs.BlockTrainDataset = stored
    tokens = torch.load(task["tokens"])
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=half)
    for parameter in model.parameters():
        parameter.requires_grad = False
    _adapt(model)
    samples, batch_size = task["samples"], task["batch_size"]
    rates = {"quant_lr": 1e-4, "weight_lr": 2e-5, "min_lr_factor": 20, "wd": 0, "early_stop": 0}
    loading = {"num_workers": 0, "prefetch_factor": None, "off_load_to_disk": False, "cache_dir": task["scratch"]}
    args = Namespace(
        **rates,
        **loading,
        epochs=task["passes"],
        batch_size=batch_size,
        train_size=samples,
        val_size=len(tokens) - samples,
        training_seqlen=tokens.shape[1],
        wbits=task["bits"],
        group_size=task["group_size"],
        real_quant=False,
    )
    loader = [(row.unsqueeze(0), None) for row in tokens]
    try:
        theirs.block_ap(model, args, loader[:samples], loader[samples:], Clock(laps, -(-samples // batch_size)))
    except Done:
        return


def _stand_in(task: dict[str, Any], half: torch.dtype) -> None:
    """Prepare for their imports, and for calls that want CUDA."""
    sys.path.insert(0, str(Path(task["efficientqat"]).resolve()))
    packer, colours = ModuleType("quantize.int_linear_real"), ModuleType("termcolor")
    packer.QuantLinear = colours.colored = None  # type: ignore[attr-defined]
    sys.modules["quantize.int_linear_real"] = packer
    sys.modules.setdefault("termcolor", colours)
    device = torch.device(task["device"]).type
    torch.cuda.amp.autocast = lambda: torch.autocast(device, dtype=torch.bfloat16, enabled=half == torch.bfloat16)  # type: ignore[assignment, misc]
    if device == "cpu":
        torch.cuda.max_memory_allocated = lambda device=None: 0
    nn.Module.half = lambda self: self.to(half)  # type: ignore[method-assign]


def _adapt(model: nn.Module) -> None:
    """Let the model's layers be called as theirs were."""
    inner: Any = model.model
    kind = type(inner.layers[0])
    forward, rotary, cached = kind.forward, inner.rotary_emb, {}

    def called(self: nn.Module, hidden: torch.Tensor, attention_mask: Any, position_ids: torch.Tensor) -> Any:
        key = (hidden.dtype, position_ids.shape)
        if key not in cached:
            cached[key] = rotary(hidden, position_ids)
        positions = {"position_ids": position_ids, "position_embeddings": cached[key]}
        return (forward(self, hidden, attention_mask=attention_mask, **positions),)

    kind.forward = called


if __name__ == "__main__":
    begun = time.perf_counter()
    main()
    print(f"{time.perf_counter() - begun:.0f} s in all", file=sys.stderr)
