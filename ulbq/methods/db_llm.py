"""DB-LLM (Chen et al., 2024, https://arxiv.org/abs/2402.11960): dual-binary weights, trained block by block.

The authors published no code. Against the paper's description this differs in three ways, meant for
few samples: the starting scales are searched by activation-weighted error instead of taken from the largest weight,
rates are relative to each group's step, and training is block-wise instead of end to end. The paper's
deviation-aware distillation is a loss of the whole model and no part of this.
"""

import torch

from ulbq.formats.dual_binary import DualBinaryScheme
from ulbq.methods.base import BlockResult, BlockTask, Packed, check_packed
from ulbq.nn.quant_linear import linear_layer
from ulbq.quantizers.dual_binary import DualBinaryQuantizer, search_scales
from ulbq.training.block import BlockTrainer, TrainedLinear
from ulbq.training.settings import TrainSettings


class DbLlm:
    """Flexible dual binarization with block-wise training.

    Args:
        scheme: the group size.
        settings: of the training.
        train_weights: let the weights move (quantization-aware training); otherwise only scales and norms train.
    """

    name = "db-llm"
    calibrated = True

    def __init__(self, scheme: DualBinaryScheme, settings: TrainSettings, *, train_weights: bool = True) -> None:
        self.scheme = scheme
        self.epochs = settings.epochs
        self.augmented = settings.augmented_loss
        self._settings = settings
        self._train_weights = train_weights

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Search the start, train, pack."""
        if task.data is None:
            raise ValueError("db-llm needs activations")
        quantizers = {linear: self._install(task, linear) for linear in task.linears}
        outcome = BlockTrainer(task.block, task.data, self._settings, task.precision).train(task.seed, task.on_epoch)
        packed = {linear: self._pack(linear, quantizer) for linear, quantizer in quantizers.items()}
        trained = {name: p.detach() for name, p in task.block.named_parameters() if p.requires_grad}
        dense = {name: value for name, value in trained.items() if not name.startswith(_inside(task.linears))}
        return BlockResult(packed, dense, outcome)

    def _install(self, task: BlockTask, linear: str) -> DualBinaryQuantizer:
        weight = task.weight(linear)
        group_size = weight.shape[1] if self.scheme.group_size == -1 else self.scheme.group_size
        scales = search_scales(weight, task.importance[linear], group_size)
        quantizer = DualBinaryQuantizer(weight, scales, self.scheme, train_weights=self._train_weights)
        task.block.set_submodule(linear, TrainedLinear(quantizer, linear_layer(task.block, linear).bias))
        return quantizer

    def _pack(self, linear: str, quantizer: DualBinaryQuantizer) -> Packed:
        packed = quantizer.finalize()
        with torch.no_grad():
            check_packed(linear, self.scheme, packed, quantizer())
        return packed


def _inside(linears: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{linear}." for linear in linears)
