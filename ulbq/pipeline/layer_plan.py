"""Per-layer plans: a YAML file that gives layers, by patterns of their names, settings of their own."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError, field_validator

from ulbq import limits
from ulbq.artifacts.disk import write_atomically, writing
from ulbq.artifacts.names import local_path
from ulbq.artifacts.records import LayerRecord, Record
from ulbq.artifacts.small_files import read_small
from ulbq.artifacts.yaml_files import parse_yaml
from ulbq.errors import InputError, UsageError
from ulbq.formats import FORMATS, AnyScheme, read_scheme
from ulbq.models.blocks import Linear, ModelStructure, check_group
from ulbq.models.selection import matches
from ulbq.printable import one_line

if TYPE_CHECKING:
    from ulbq.pipeline.quantization_plan import QuantizePlan

_HINT = "A plan is a YAML map, as in 'mlp.down_proj: {bits: 4, group_size: 32}' and 'layers.0: {skip: true}'."


class LayerSettings(Record):
    """What a plan says of the layers of one pattern; None leaves what the run's options say."""

    bits: Literal[1, 2, 3, 4, 6, 8] | None = None
    group_size: int | None = None
    skip: bool = False

    @field_validator("bits", "group_size", mode="before")
    @classmethod
    def _no_switch(cls, value: object) -> object:
        if isinstance(value, bool):  # which Python takes for 0 or 1
            raise ValueError("input should be a number")
        return value


_OWN: dict[str, frozenset[str]] = {
    **dict.fromkeys(FORMATS, frozenset()),
    "affine": frozenset({"bits", "group_size"}),
    "dual_binary": frozenset({"group_size"}),
    "k_quant": frozenset({"bits"}),
    "trellis": frozenset({"bits"}),
}
"""What layers of a format may have of their own."""

LayerPlan = Mapping[str, LayerSettings]
"""Settings by pattern, as ``skip`` has them; where several match a layer, the later ones win, setting by setting."""


_PLAN = TypeAdapter(dict[str, LayerSettings])


def read_plan(given: str | None) -> LayerPlan:
    """A plan's settings; none where none is given. Raises InputError where it cannot be read or is no plan."""
    if given is None:
        return {}
    path = local_path(given)
    try:
        content = parse_yaml(read_small(path, limits.MANIFEST_SIZE).decode())
        if not isinstance(content, dict) or not all(isinstance(one, str) for one in content):
            raise ValueError("it is no map of patterns")
        if idle := [pattern for pattern, settings in content.items() if not isinstance(settings, dict)]:
            raise ValueError(f"'{one_line(idle[0])}' has no map of settings")
        found = _PLAN.validate_python(content)
    except OSError as error:
        raise InputError(f"The plan '{given}' cannot be read: {error.strerror}.", hint=_HINT) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        said = first["msg"].removeprefix("Value error, ").lower()
        where = one_line(".".join(map(str, first["loc"])))
        raise InputError(f"The plan '{given}' cannot be read: {where}: {said}.", hint=_HINT) from error
    except (ValueError, yaml.YAMLError) as error:
        cause = one_line(str(error))
        raise InputError(f"The plan '{given}' cannot be read: {cause}.", hint=_HINT) from error
    for pattern, settings in found.items():
        if all(value is None for value in settings.model_dump(exclude_unset=True).values()):
            raise InputError(f"The plan '{given}' says nothing of '{pattern}'.", hint=_HINT)
        if settings.group_size is not None:
            check_group(settings.group_size)
    return found


def skipped_by(plan: LayerPlan, found: ModelStructure) -> tuple[str, ...]:
    """Full names of the layers that a plan leaves out. Raises InputError for a pattern that no layer matches."""
    layers = found.layers
    for pattern in plan:
        if not any(matches(pattern, layer.name) for layer in layers):
            raise InputError(f"The plan's pattern '{pattern}' matches no linear layer of the model's blocks.")
    return tuple(layer.name for layer in layers if _settings(plan, layer).get("skip"))


def planned_schemes(plan: LayerPlan, layers: Sequence[Linear], scheme: AnyScheme) -> dict[str, AnyScheme]:
    """How layers are stored that have settings of their own, by full name.

    Raises:
        UsageError: the format has no such setting.
    """
    schemes: dict[str, AnyScheme] = {}
    for layer in layers:
        settings = {name: value for name, value in _settings(plan, layer).items() if name != "skip"}
        if not settings:
            continue
        idle = settings.keys() - _OWN[scheme.format]
        if idle:
            raise UsageError(
                f"The plan's `{min(idle)}` of '{layer.name}' means nothing to {scheme.format} codes.",
                hint="Leave it out, or take a method with affine codes: rtn, gptq, efficientqat, apiq.",
            )
        try:
            schemes[layer.name] = type(scheme).model_validate({**scheme.model_dump(), **settings})
        except ValidationError as error:
            said = error.errors(include_url=False)[0]["msg"].lower()
            raise UsageError(f"The plan's settings of '{layer.name}' do not go: {said}.") from error
    return schemes


def check_plan_file(path: Path, out: Path | None) -> None:
    """Refuse a file that a plan cannot be written to: what may be known before hours of work should be.

    Args:
        path: of the file.
        out: the artifact that the run writes, which holds files of its own alone; None where its name is not given.

    Raises:
        InputError: no file can be made there, or one that is no plan would be lost.
    """
    reason, folder = None, path.absolute().parent
    if out is not None and path.absolute().is_relative_to(out.absolute()):
        reason = "is the artifact, or lies in it"
    elif not folder.is_dir():
        reason = "is in no folder that exists"
    elif path.exists() and not path.is_file():
        reason = "is no file"
    elif not os.access(folder, os.W_OK):
        reason = "lies in a folder that cannot be written"
    elif path.is_file() and path.stat().st_size:
        try:
            read_plan(str(path))
        except (InputError, UsageError):
            reason = "exists and is no plan"
    if reason is not None:
        raise InputError(
            f"`write_plan`: '{path}' {reason}.", hint="Give the name of a new file, or of an earlier plan."
        )


def write_plan(path: Path, planned: "QuantizePlan", layers: Sequence[LayerRecord] | None = None) -> None:
    """Write what each layer gets as a plan that :func:`read_plan` takes.

    Args:
        path: of the file.
        planned: the run.
        layers: as they were made; None before they are.

    Raises:
        UsageError: a budget is given out only when the model has been looked at.
        ResourceError: the file cannot be written.
    """
    if layers is None and planned.request.target_bits is not None:
        raise UsageError(
            "What `target_bits` gives each layer is known only after a look at the model.",
            hint="Run it: the plan is written once the run is done.",
        )
    schemes = planned.schemes if layers is None else {layer.name: read_scheme(layer.scheme) for layer in layers}
    plan: dict[str, Any] = {
        name: {field: getattr(scheme, field) for field in ("bits", "group_size") if field in _OWN[scheme.format]}
        for name, scheme in schemes.items()
        if _OWN[scheme.format]
    }
    plan |= {name: {"skip": True} for name in planned.left_out}
    with writing(path.absolute().parent):
        text = yaml.safe_dump(plan, sort_keys=False, default_flow_style=None, width=120)
        write_atomically(path, text.encode())


def _settings(plan: LayerPlan, layer: Linear) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pattern, settings in plan.items():
        if matches(pattern, layer.name):
            found |= settings.model_dump(exclude_unset=True)
    return {name: value for name, value in found.items() if value is not None}
