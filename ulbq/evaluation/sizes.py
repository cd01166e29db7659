"""The room that a model's weights take, on disk and in memory."""

from typing import TYPE_CHECKING

from ulbq.evaluation.evaluated import EvaluatedModel
from ulbq.evaluation.results import WeightSize
from ulbq.models.adapter_files import adapter_folder
from ulbq.models.gguf import GgufTensors
from ulbq.models.load import model_memory
from ulbq.nn.quant_linear import QuantLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def weight_size(candidate: EvaluatedModel, model: "PreTrainedModel") -> WeightSize:
    """Size of a model's weights, those of its adapter too where it is measured with it.

    Args:
        candidate: the model on disk.
        model: the same, loaded; packed weights are brought into the layout that products take.
    """
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.prepare()
    source = candidate.source
    files = source.weight_files()
    if candidate.adapter and (folder := adapter_folder(source)) is not None:
        files += folder.glob("*.safetensors")
    return WeightSize(
        on_disk=sum(file.stat().st_size for file in files),
        in_memory=model_memory(model).weights,
        gguf_types=source.tensors.types if isinstance(source.tensors, GgufTensors) else (),
    )
