"""The room that a model's weights take, on disk and in memory."""

from typing import TYPE_CHECKING

from ulbq.blockwise.streamed import StreamedModel
from ulbq.evaluation.evaluated import EvaluatedModel
from ulbq.evaluation.results import WeightSize
from ulbq.models.adapter_files import adapter_folder
from ulbq.models.gguf import GgufTensors
from ulbq.models.load import model_memory
from ulbq.nn.quant_linear import QuantLinear

if TYPE_CHECKING:
    from ulbq.blockwise.streamed import AnyModel


def weight_size(candidate: EvaluatedModel, model: "AnyModel") -> WeightSize:
    """Size of a model's weights, those of its adapter too where it is measured with it.

    Args:
        candidate: the model on disk.
        model: the same, loaded; packed weights are brought into the layout that products take. Of a streamed one, what
            it would hold then.
    """
    if isinstance(model, StreamedModel):
        held = model.held
    else:
        for layer in model.modules():
            if isinstance(layer, QuantLinear):
                layer.prepare()
        held = model_memory(model).weights
    source = candidate.source
    files = source.weight_files()
    if candidate.adapter and (folder := adapter_folder(source)) is not None:
        files += folder.glob("*.safetensors")
    return WeightSize(
        on_disk=sum(file.stat().st_size for file in files),
        in_memory=held,
        gguf_types=source.tensors.types if isinstance(source.tensors, GgufTensors) else (),
    )
