"""Which kernels would run a quantized artifact's layers on this machine, and why not others."""

from collections import Counter

import torch

from ulbq.artifacts import QuantizedManifest
from ulbq.artifacts.records import Record
from ulbq.errors import InputError
from ulbq.formats import read_scheme
from ulbq.kernels import Case, choose
from ulbq.models import compiled_decoding, graph_decoding
from ulbq.models.adapter_files import adapter_folder
from ulbq.models.load import unfilled_model
from ulbq.models.source import resolve

ROWS = (1, 16, 512)
"""A token at a time, a small batch, a prompt."""
DTYPES = (torch.bfloat16, torch.float32)


WRITERS = {"compiled": compiled_decoding.unsupported_reason, "cuda graph": graph_decoding.unsupported_reason}
"""What makes a text's tokens, in that order; transformers where no other does. Each tells why it does not."""


class Plan(Record):
    """What layers of one kind would run on.

    Attributes:
        label: of their scheme.
        layers: how many there are.
        dtype: of the activations.
        backends: by the number of rows, those of ``ROWS``.
        passed_over: why better backends do not take them, once each.
    """

    label: str
    layers: int
    dtype: str
    backends: dict[int, str]
    passed_over: tuple[str, ...]


def plans(manifest: QuantizedManifest, device: str) -> list[Plan]:
    """Which backend takes which layers. Raises InputError for a format that this version does not know."""
    found: dict[tuple[str, str, tuple[str, ...], tuple[str, ...]], int] = Counter()
    for layer in (*manifest.layers, *manifest.tables):
        try:
            scheme = read_scheme(layer.scheme)
        except ValueError as error:
            raise InputError(f"This version does not know the format of '{layer.name}'.") from error
        for dtype in DTYPES:
            choices = [choose(Case(scheme, *layer.shape, device, dtype, rows)) for rows in ROWS]
            reasons = [f"{name}: {why}" for each in choices for name, why in each.passed_over.items()]
            names = tuple(each.layout.name for each in choices)
            short = str(dtype).removeprefix("torch.")
            found[scheme.label, short, names, tuple(dict.fromkeys(reasons))] += 1
    return [
        Plan(
            label=label,
            layers=count,
            dtype=dtype,
            backends=dict(zip(ROWS, names, strict=True)),
            passed_over=reasons,
        )
        for (label, dtype, names, reasons), count in found.items()
    ]


def writers(path: str, device: torch.device) -> dict[str, str | None]:
    """Why each of :data:`WRITERS` does not write an artifact's texts in bfloat16 on a device; None where it does.

    Raises:
        InputError: the artifact makes no model.
    """
    source = resolve(path, offline=True, verify=False)
    model = unfilled_model(source, torch.bfloat16)
    found = {name: reason(model, device) for name, reason in WRITERS.items()}
    if adapter_folder(source) is not None:  # beside layers that compiled code takes alone
        found["compiled"] = found["compiled"] or "an adapter: none, as of `adapter=false`"
    return found
