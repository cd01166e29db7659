"""What a target of ``convert`` is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from transformers import AutoConfig, PreTrainedModel

from ulbq.config.run import DtypeName
from ulbq.export.dense import shard_names
from ulbq.export.fit import Candidate
from ulbq.export.rules import Reader
from ulbq.models.blocks import skeleton
from ulbq.models.skeleton import auto_class
from ulbq.models.source import ModelSource

FULL_PRECISION = "it is in full precision, or quantized by another tool, and this target takes artifacts"
"""Why a target that takes packed layers alone does not take a model without any."""


@dataclass(frozen=True)
class Conversion:
    """What a target is asked to write.

    Attributes:
        source: the model; ``candidate`` says what it is made of.
        dtype: of the tensors that are not packed.
        keeps: leave those in the dtype that they are stored in, save matrices in more than half precision.
        merge_adapter: make the adapter a part of the weights; else it is copied beside them.
        untie: store a tied head by itself too.
        fast_types: of types that hold the same weights, take one that is fast everywhere, not the smallest.
    """

    source: ModelSource
    candidate: Candidate
    dtype: DtypeName
    keeps: bool = False
    merge_adapter: bool = False
    untie: bool = False
    fast_types: bool = False


@dataclass(frozen=True)
class Written:
    """What a target wrote.

    Attributes:
        stored: how the weights are stored, for people.
        names: of all files.
        saved: bits less than in the artifact, by part of its accounting.
        warning: what whoever loads it should know.
        bits: that the artifact's packed layers take now; None where they are all dense.
        tables: names of the packed tables and heads that are still packed.
    """

    stored: str
    names: list[str]
    saved: Mapping[str, int] = field(default_factory=dict)
    warning: str | None = None
    bits: int | None = None
    tables: Collection[str] = ()


class Target(ABC):
    """A layout that models are converted to.

    Attributes:
        name: that ``--to`` takes.
        readers: the engines that read it, by their names in :data:`ulbq.export.targets.ENGINES`.
        keeps: whether its readers cast what they load, so that tensors which are not packed keep their stored dtypes.
        varies: whether layers with zero points take less than :meth:`bits` says where those happen to allow it.
        merges: whether an adapter can become a part of what is written.
        is_artifact: whether that is an artifact of ulbq's own again, with its manifest and its card.
        library: for the Hub.
        opened: what is said once transformers has opened what was written, the begin of a sentence.
        adapter_place: where an adapter lies that is not merged, and for whom.
        adapter_commands: how it is taken by the engines that take one, for the card.
    """

    name: ClassVar[str]
    readers: ClassVar[Mapping[str, Reader]] = {}
    varies: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    keeps: ClassVar[bool] = False
    is_artifact: ClassVar[bool] = False
    library: ClassVar[str] = "transformers"
    opened: ClassVar[str] = "Opened again"
    adapter_place: ClassVar[str] = "in `adapter/`, for peft"
    adapter_commands: ClassVar[Mapping[str, str]] = {
        "transformers": '`PeftModel.from_pretrained(model, "DIR/adapter")` on the model that transformers loaded',
        "vllm": "vLLM takes `--enable-lora --lora-modules tuned=DIR/adapter`, with `--max-lora-rank` for ranks above "
        "16",
    }

    @abstractmethod
    def unsupported_reason(self, candidate: Candidate, *, merge_adapter: bool = False) -> str | None:
        """Why the target cannot hold a model, as the end of a sentence; None where it can."""

    @abstractmethod
    def bits(self, candidate: Candidate, *, merge_adapter: bool = False) -> int:
        """What the packed layers of a model take that the target holds, by their schemes and shapes."""

    @abstractmethod
    def write(self, conversion: Conversion, folder: Path, on_step: Callable[[str], None]) -> Written:
        """Write all but card and manifest.

        Args:
            conversion: of a model that :meth:`unsupported_reason` lets through.
            folder: exists.
            on_step: called with a name after each of :meth:`steps`.

        Raises:
            InputError: a tensor is missing.
            NumericsError: a tensor does not fit the dtype, or what was written does not read back.
            ResourceError: the disk is full or refuses.
        """

    def check(self, source: ModelSource) -> str | None:
        """Look at what else a model must have, before anything is written. Raises InputError; returns a warning."""
        return None

    def dtype(self, source: ModelSource, asked: DtypeName | None) -> DtypeName:
        """That of the tensors that are not packed: what was asked for, else the artifact's own. Raises UsageError."""
        return asked or ("fp16" if source.config.dtype in (torch.float16, "float16") else "bf16")

    def steps(self, source: ModelSource) -> int:
        """How often :meth:`write` tells how far it is: for every shard."""
        return len(shard_names(skeleton(source)))

    def unopened_reason(self, candidate: Candidate, folder: Path) -> str | None:
        """Why transformers cannot open here what was written, as a whole sentence; None where it can."""
        return None

    def load(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        """What was written, as transformers opens it."""
        kind = auto_class(AutoConfig.from_pretrained(folder, local_files_only=True))
        model: PreTrainedModel = kind.from_pretrained(folder, dtype=dtype, local_files_only=True)
        return model


def layer_reason(candidate: Candidate, reason: Callable[..., str | None]) -> str | None:
    """The first layer of which ``reason(scheme, shape)`` has something to say, and what."""
    for name, layer in candidate.layers.items():
        why = reason(layer.scheme, layer.shape)
        if why is not None:
            return f"'{name}' is {layer.scheme.format} {layer.scheme.label}, and {why}"
    return None
