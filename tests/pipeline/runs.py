"""Requests on tiny models, and what comes of them."""

from pathlib import Path
from typing import Any

import torch

from ulbq import formats
from ulbq.config.quantize import QuantizeRequest
from ulbq.models.blocks import materialize, skeleton
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.progress import Silent

TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(5))


def request(source: Path, out: Path, **changes: Any) -> QuantizeRequest:
    """A request that minds no experts in full precision."""
    settings = {"device": "cpu", "offline": True, "allow_partial": True, **changes}
    return QuantizeRequest(source=str(source), out=out, **settings)


def db_llm(source: Path, out: Path, samples: Path, **changes: Any) -> QuantizeRequest:
    size = {"group_size": 32, "samples": 8, "sequence_length": 32, "epochs": 2, "precision": "fp32"}
    return request(source, out, **{"method": "db-llm", "calibration": str(samples), **size, **changes})


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def logits(folder: Path, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = load_model(resolve(folder), dtype=torch.float32)(tokens).logits
        return result


def simulated_logits(dense: Path, packed: Path) -> torch.Tensor:
    """Logits of the full-precision model with the artifact's dequantized weights and norms put in."""
    source, original = resolve(packed), resolve(dense)
    model = skeleton(original)
    materialize(model, original, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            linear = name.removesuffix(".weight")
            if linear in source.packed:
                tensors = source.read_packed(linear)
                parameter.copy_(formats.dequantize(source.packed[linear], tensors, parameter.shape[1]))
            else:
                parameter.copy_(source.read(name))
        result: torch.Tensor = model(TOKENS).logits
        return result


class StopAt(Silent):
    """Interrupts the run when the journal has so many blocks."""

    def __init__(self, folder: Path, blocks: int) -> None:
        self._journal = folder.with_name(folder.name + ".partial") / ".journal.jsonl"
        self._blocks = blocks

    def phase(self, name: str, total: int | None = None, *, rounds: int | None = None) -> Any:
        outer = self

        class Phase:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *error: object) -> None:
                return None

            def advance(self, steps: int = 1, detail: str = "") -> None:
                if outer._journal.exists() and outer._journal.read_text().count("\n") > outer._blocks:
                    raise KeyboardInterrupt

        return Phase()
