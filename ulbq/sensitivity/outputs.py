"""What an error at a layer's outputs costs, told by the gradients of the loss there.

To second order an error ``E`` of a layer's weight costs ``Σ_t (g_tᵀ E x_t)²``, with ``x_t`` what the layer reads of a
token and ``g_t`` the gradient of the loss at its output. Two ways to make that small enough to be kept:

* a weight for each token in each group of outputs, ``s_t = mean_j g_tj²``, so that a group of rows has the Hessian
  ``Σ_t s_t x_t x_tᵀ`` (GuidedQuant, https://arxiv.org/abs/2505.07004);
* second moments between the outputs beside those weights, ``H_out = Σ_t |x_t|² g_t g_tᵀ``: each is the whole summed up
  over its other side, and their Kronecker product is taken for it (YAQA, https://arxiv.org/abs/2505.22988).
"""

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ulbq import distributed
from ulbq.artifacts.shards import LazyTensors, write_shard
from ulbq.blockwise.samples import Samples
from ulbq.errors import NumericsError
from ulbq.models.blocks import ModelStructure
from ulbq.models.source import ModelSource
from ulbq.nn.quant_linear import linear_layer
from ulbq.progress import Progress
from ulbq.sensitivity.passing import BACK, Passing
from ulbq.sensitivity.settings import PassSettings

_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class OutputSettings(PassSettings):
    """What is computed.

    Attributes:
        groups: of each layer's outputs, as even as may be, in order.
        between: second moments between the outputs, too.
        seed: of tokens that the model itself predicts, whose loss counts; None for the loss of the text's own.
    """

    groups: int
    between: bool
    seed: int | None


class OutputCosts(NamedTuple):
    """Of one layer.

    Attributes:
        tokens: ``[samples, length, groups]`` float32. Times the mean squared input, their mean is 1 in every group.
        between: ``[out, out]`` float32; None where it was not asked for.
    """

    tokens: torch.Tensor
    between: torch.Tensor | None


def output_file(index: int) -> str:
    """File name of a block's costs."""
    return f"outputs-block-{index:05d}.safetensors"


def read_outputs(folder: Path, index: int, linears: tuple[str, ...], device: torch.device) -> dict[str, OutputCosts]:
    """What was computed of a block's layers, by their names inside the block."""
    stored = LazyTensors([folder / output_file(index)])
    names = set(stored.names)

    def costs(linear: str) -> OutputCosts:
        between = f"{linear}.between"
        tokens = stored.read(f"{linear}.tokens").to(device)
        return OutputCosts(tokens, stored.read(between).to(device) if between in names else None)

    return {linear: costs(linear) for linear in linears}


def weigh_outputs(
    model: PreTrainedModel,
    source: ModelSource,
    found: ModelStructure,
    samples: Samples,
    settings: OutputSettings,
    folder: Path,
    *,
    scratch: Path,
    progress: Progress,
    done: Set[int],
    on_block: Callable[[int], None],
) -> None:
    """Write the costs of every block's layers, one file a block; see :func:`output_file`.

    Args:
        model: a skeleton of the source's model.
        found: its structure; every layer reads every token.
        samples: of text.
        folder: for the files.
        scratch: for activations beyond the settings' ``activation_memory``.
        progress: told how it goes.
        done: blocks whose files an earlier run wrote. They are only passed through, with the same result for the rest.
        on_block: called as soon as a block's file is written.

    Raises:
        InputError: tokens that the model cannot take, or a model whose blocks are no plain chain.
        ResourceError: the disk is full.
        NumericsError: a loss or a cost is not finite.
    """
    if len(done) == found.n_blocks:
        return
    with progress.phase("Weighing outputs", found.n_blocks * (1 + BACK)) as phase:
        passing = Passing(model, source, samples, settings, scratch)
        for index, block, _ in passing.both_ways(done, phase, settings.seed):
            block.requires_grad_(False)
            prefix = f"{found.blocks_prefix}.{index}."
            names = [linear.name.removeprefix(prefix) for linear in found.linears[index]]
            with _watching_outputs({name: linear_layer(block, name) for name in names}, settings) as sums:
                passing.backward(index, block)
            if index not in done:
                tensors = {
                    key: part for name in names for key, part in sums[name].tensors(name, samples.tokens.shape).items()
                }
                if bad := next((name for name, part in tensors.items() if not part.isfinite().all()), None):
                    raise NumericsError(
                        f"The gradients at '{prefix}{bad.rpartition('.')[0]}' are not finite.",
                        hint="Try `precision=fp32`; the model may be damaged.",
                    )
                write_shard(folder / output_file(index), tensors)
                on_block(index)


class _OutputSums:
    """What gradients at one layer's outputs add up to, sample by sample."""

    def __init__(self, out_features: int, device: torch.device, settings: OutputSettings) -> None:
        self._groups = min(settings.groups, out_features)
        self._tokens: list[torch.Tensor] = []
        self._total = torch.zeros(self._groups, dtype=torch.float64, device=device)
        self._between = torch.zeros(out_features, out_features, device=device) if settings.between else None
        self._fourth = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Take in one sample: ``[1, length, in]`` what the layer read, ``[1, length, out]`` the gradient."""
        rows, sizes = gradients.float().flatten(0, -2), inputs.float().flatten(0, -2).square().mean(1, keepdim=True)
        tokens = torch.stack([part.mean(1) for part in rows.square().tensor_split(self._groups, 1)], 1)
        self._tokens.append(tokens)
        self._total += (tokens * sizes).sum(0, dtype=torch.float64)
        if self._between is not None:
            rows = rows * sizes.sqrt()
            self._between.addmm_(rows.T, rows)
            self._fourth += rows.double().square().sum(1).square().sum()

    def tensors(self, name: str, shape: torch.Size) -> dict[str, torch.Tensor]:
        """What is stored of ``[samples, length]`` tokens, those of all processes together."""
        samples, length = shape
        tokens = torch.zeros(samples, length, self._groups, device=self._fourth.device)
        own = distributed.own(tokens)
        own.copy_(torch.stack(self._tokens) if len(own) else own)
        distributed.sum_(tokens, self._total)
        stored = {f"{name}.tokens": tokens * (samples * length / self._total.clamp_min(_TINY)).float()}
        if self._between is not None:
            distributed.sum_(self._between, self._fourth)
            stored[f"{name}.between"] = _shrunk(self._between, self._fourth.item(), samples * length)
        return {key: value.cpu() for key, value in stored.items()}


def _shrunk(total: torch.Tensor, fourth: float, count: int) -> torch.Tensor:
    """Second moments drawn towards a multiple of the identity as far as their noise asks for (Ledoit and Wolf, 2004).

    Args:
        total: ``[n, n]`` sum of ``v vᵀ``.
        fourth: sum of ``|v|⁴``.
        count: how many they are the sum of.
    """
    moments = total / count
    middle = moments.diagonal().mean()
    identity = torch.eye(len(moments), device=moments.device)
    spread = (moments - middle * identity).double().square().sum().item()
    noise = (fourth / count - moments.double().square().sum().item()) / count
    share = min(noise / spread, 1.0) if spread > 0 else 1.0
    return moments.mul_(1 - share).add_(identity, alpha=share * middle.item())


@contextmanager
def _watching_outputs(layers: Mapping[str, nn.Linear], settings: OutputSettings) -> Iterator[dict[str, _OutputSums]]:
    """Sums over the gradients at the outputs of layers that run forward and back while the context lasts."""
    device = settings.precision.device
    sums = {name: _OutputSums(layer.out_features, device, settings) for name, layer in layers.items()}

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def watch(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs = arguments[0].detach()
            output.register_hook(lambda gradient: sums[name].add(inputs, gradient))

        return watch

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
