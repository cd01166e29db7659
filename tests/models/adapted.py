"""An artifact's adapter by our own modules."""

import torch

from ulbq.models.adapter_files import ADAPTER_FOLDER, load_adapters
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource
from ulbq.nn.adapter import AdaptedLinear

TOKENS = torch.arange(64).view(2, 32)


def simulated(source: ModelSource) -> torch.Tensor:
    """Logits of the packed base under our own adapters."""
    model = load_model(source, dtype=torch.float32, adapter=False)
    for name, adapter in load_adapters(model, source.path / ADAPTER_FOLDER).items():
        model.set_submodule(name, AdaptedLinear(model.get_submodule(name), adapter))
    with torch.no_grad():
        return model(TOKENS).logits
