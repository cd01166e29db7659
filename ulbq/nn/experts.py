"""A mixture's experts as linear layers of their own, where transformers holds all of them in a few large tensors.

So nobody who quantizes, packs, adapts or exports linear layers has to know of experts.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, cast

import torch
from torch import nn

from ulbq.kernels.banks import Routes
from ulbq.kernels.ops.linear import is_plain
from ulbq.nn.together import Together


@dataclass(frozen=True)
class Fusion:
    """How a module of transformers holds its experts fused: ``gate_up_proj [E, 2·I, H]`` and ``down_proj [E, H, I]``.

    Attributes:
        experts: how many there are.
        gated: whether an expert has a gate; without one, ``up_proj`` stands alone.
        transposed: each matrix is stored as ``[in, out]``.
        concatenated: the rows of a gate come before those of the other half; else the two take turns.
        biased: whether the layers add biases, ``gate_up_proj_bias [E, 2·I]`` and ``down_proj_bias [E, H]``.
        scaled: what enters are the tokens once for each expert, times what its router gives it, zeros for none.
        single: an expert is one matrix, ``weight [E, out, in]``, and what enters is sorted by expert.
        identity: a choice beyond the last expert gives the token itself; else nothing.
        flat: the module ``mlp`` inside has the matrices, those of all experts below each other: ``w1`` of the gates,
            ``v1`` beside them and ``w2``, which is transposed, ``[E·I, H]`` each.
    """

    experts: int
    gated: bool = True
    transposed: bool = False
    concatenated: bool = True
    biased: bool = False
    scaled: bool = False
    single: bool = False
    identity: bool = False
    flat: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """That of a module that transformers' ``use_experts_implementation`` marks, or should; None for others."""
        unmarked = _UNMARKED.get(type(module).__name__)
        if unmarked is not None and "flat" in unmarked:
            return cls(int(cast(Any, module).num_experts), **unmarked)
        last = module._parameters.get("weight" if unmarked and "single" in unmarked else "down_proj")
        if last is None or last.dim() != 3:
            return None
        if unmarked is not None:
            return cls(len(last), **unmarked)
        marks = [getattr(module, name, None) for name in ("has_gate", "is_transposed", "is_concatenated", "has_bias")]
        return cls(len(last), *map(bool, marks)) if all(isinstance(mark, bool) for mark in marks) else None

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of an expert's linear layers, in execution order."""
        if self.single:
            return ("linear",)
        return ("gate_proj", "up_proj", "down_proj") if self.gated else ("up_proj", "down_proj")

    def shape(self, fused: torch.Size, projection: str) -> tuple[int, int]:
        """``(out, in)`` of a linear layer of an expert, by that of the fused weight."""
        if self.flat:
            sizes = (fused[0] // self.experts, fused[1])
            return sizes[::-1] if projection == "down_proj" else sizes
        rows, columns = (fused[-1], fused[-2]) if self.transposed else (fused[-2], fused[-1])
        return (rows // 2 if self.gated and projection != "down_proj" else rows, columns)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of a linear layer's parameters."""
        return ("weight", "bias") if self.biased else ("weight",)

    def fused(self, projection: str, kind: str) -> str:
        """Name of the fused parameter that holds one of the linear layers' parameters."""
        if self.single:
            return kind
        if self.flat:
            return _FLAT[projection]
        name = "gate_up_proj" if self.gated and projection != "down_proj" else projection
        return name if kind == "weight" else f"{name}_bias"

    def take(self, fused: torch.Tensor, expert: int, projection: str) -> torch.Tensor:
        """An expert's weight ``[out, in]`` or bias ``[out]`` out of the fused tensor; a view of it where one can be."""
        if self.flat:
            own = fused.view(self.experts, -1, fused.shape[-1])[expert]
            return (own.T if projection == "down_proj" else own).contiguous()
        own = fused[expert].T if self.transposed and fused.dim() == 3 else fused[expert]
        if self.gated and projection != "down_proj":
            second = projection == "up_proj"
            own = own.chunk(2)[second] if self.concatenated else own[second::2]
        return own.contiguous()

    def join(self, experts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The fused tensors of all experts, each given by names such as ``gate_proj.weight``."""
        if self.flat:
            rows = {name: [one[f"{name}.weight"] for one in experts] for name in self.projections}
            rows["down_proj"] = [one.T for one in rows["down_proj"]]
            return {_FLAT[name]: torch.cat(ones) for name, ones in rows.items()}
        return {
            self.fused(projection, kind): torch.stack([self._row(one, projection, kind) for one in experts])
            for kind in self.kinds
            for projection in self.projections[-2:]
        }

    def _row(self, expert: Mapping[str, torch.Tensor], projection: str, kind: str) -> torch.Tensor:
        own = expert[f"{projection}.{kind}"]
        if self.gated and projection == "up_proj":
            pair = [expert[f"gate_proj.{kind}"], own]
            own = torch.cat(pair) if self.concatenated else torch.stack(pair, 1).flatten(0, 1)
        return own.T if self.transposed and own.dim() == 2 else own


_UNMARKED: dict[str, dict[str, bool]] = {
    "Llama4TextExperts": {"transposed": True, "scaled": True},
    "Step3p7Experts": {},
    "LongcatFlashExperts": {"identity": True},
    "JetMoeParallelExperts": {"gated": False, "single": True},
    "DbrxExperts": {"flat": True},
}
"""Classes of fused experts that transformers does not mark, and how they differ from most."""

_FLAT = {"gate_proj": "mlp.w1", "up_proj": "mlp.v1", "down_proj": "mlp.w2"}
"""DBRX's names of its matrices."""


class Experts(nn.ModuleList):
    """Takes the place of a fused module: same call, same result but for rounding, a linear layer for every matrix.

    Expert 7 is the child ``7``, its layers ``7.gate_proj``, ``7.up_proj`` and ``7.down_proj``, as checkpoints on the
    Hub and engines name them. What a token gets of its experts is added up in a fixed order.

    Args:
        fused: a module with a :class:`Fusion`; its activation, numbers and whatever else it holds are taken over.

    Attributes:
        fusion: of the module whose place it takes.
        shown: numbers of experts that are shown every token, for those who watch the layers; the result is the same.
    """

    # Taken over from the fused module.
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    has_post_expert_norm = False
    post_expert_norm: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        fusion = Fusion.of(fused)
        if fusion is None:
            raise TypeError(f"{type(fused).__name__} holds no fused experts")
        # Numbers and functions that the family's own gate asks for by name, and norms; the experts come after them.
        vars(self).update({name: value for name, value in vars(fused).items() if name not in vars(self)})
        gone = {fusion.fused(projection, kind) for projection in fusion.projections for kind in fusion.kinds}
        self._parameters |= {name: value for name, value in fused._parameters.items() if name not in gone}
        self._buffers |= fused._buffers
        for name, module in fused.named_children():
            if fusion.flat:
                self.act_fn = module.get_submodule("activation_fn")
            else:
                self.add_module(name, module)
        self._gate: Callable[[nn.Module, torch.Tensor], torch.Tensor] = vars(type(fused)).get("_apply_gate", _gate)
        self.fusion = fusion
        self.shown: Collection[int] = ()
        self._together: dict[str, Together] = {}
        weights = {name: fused.get_parameter(fusion.fused(name, "weight")) for name in fusion.projections}
        for number in range(fusion.experts):
            expert = nn.Module()
            for name, weight in weights.items():
                rows, columns = fusion.shape(weight.shape, name)
                linear = nn.Linear(columns, rows, bias=fusion.biased, device=weight.device, dtype=weight.dtype)
                expert.add_module(name, linear.requires_grad_(weight.requires_grad))
            self.add_module(str(number), expert)

    def __getstate__(self) -> dict[str, Any]:
        # Copies have matrices of their own.
        return vars(self) | {"_together": {}}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self._together.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Each token's experts, weighted and added up.

        Args:
            hidden_states: ``[tokens, in]``.
            top_k_index: int64 ``[tokens, k]`` its experts; a number beyond the last one stands for none, or, with the
                fusion's ``identity``, for the token itself.
            top_k_weights: ``[tokens, k]`` how much each counts.
        """
        chosen = top_k_index.flatten()
        alone = len(hidden_states) == 1 and not self.shown
        if alone and max(numbers := chosen.tolist()) < self.fusion.experts:
            # Nothing to sort.
            routes = Routes([(number, at, at + 1) for at, number in enumerate(numbers)], None, len(numbers))
        else:
            routes = Routes.of(chosen, self.fusion.experts)
        made = self._at_once(hidden_states, chosen, routes)
        if made is None:
            made = self._in_turn(hidden_states, routes)
        weighted = made * top_k_weights.flatten().unsqueeze(-1)
        # In the tokens' order: their sums do not depend on who else is there.
        result: torch.Tensor = weighted.unflatten(0, top_k_index.shape).sum(1)
        return result.to(hidden_states.dtype)

    def _at_once(self, x: torch.Tensor, chosen: torch.Tensor, routes: Routes) -> torch.Tensor | None:
        """What each choice gives, ``[choices, out]``, by one product a projection; None where experts go in turn."""
        whole = bool(routes.jobs) and routes.jobs[-1][2] == routes.places
        if self.shown or not whole or not is_plain(x):
            return None
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not all(self._is_together(projection, x, routes) for projection in self.fusion.projections):
            return None
        *entering, last = (self._together[name] for name in self.fusion.projections)
        out = last(self._gated([one(x, chosen, routes) for one in entering]), chosen, routes)
        return self.post_expert_norm(out) if self.has_post_expert_norm else out

    def _is_together(self, projection: str, x: torch.Tensor, routes: Routes) -> bool:
        """Whether one call makes a projection of all chosen experts; it is looked at anew where their layers are."""
        found = self._together.get(projection)
        if found is None or not all(found.is_current(n, self._layer(n, projection)) for n, *_ in routes.jobs):
            found = Together([self._layer(number, projection) for number in range(self.fusion.experts)])
            self._together[projection] = found
        return found.takes(x, routes)

    def _layer(self, number: int, projection: str) -> nn.Module:
        # Not by names joined and taken apart: this is done for every expert of every token.
        expert: Any = self._modules[str(number)]
        layer: nn.Module = expert._modules[projection]
        return layer

    def _in_turn(self, hidden_states: torch.Tensor, routes: Routes) -> torch.Tensor:
        """What each choice gives, ``[choices, out]``, one expert after the other."""
        if routes.order is None:
            return torch.cat([self._outputs(number, hidden_states[:]) for number, *_ in routes.jobs])
        tokens = routes.order // max(1, routes.places // max(1, len(hidden_states)))
        rows = {number: tokens[begin:end] for number, begin, end in routes.jobs}
        made = [
            self._run(number, hidden_states, rows.get(number, tokens[:0]))
            for number in range(self.fusion.experts)
            if number in rows or number in self.shown
        ]
        none = routes.places - sum(map(len, rows.values()))
        if none or not made:
            beyond = hidden_states[tokens[routes.places - none :]]
            made.append(beyond if self.fusion.identity else torch.zeros_like(beyond))
        back = torch.empty_like(routes.order)
        back.scatter_(0, routes.order, torch.arange(routes.places, device=back.device))
        return torch.cat(made)[back]

    def _run(self, number: int, hidden_states: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        """What one expert makes of some tokens."""
        # A tensor of its own each time: who watches tells by it which layers read the same.
        if number in self.shown:
            return self._outputs(number, hidden_states[:])[rows]
        return self._outputs(number, hidden_states[rows])

    def _outputs(self, number: int, x: torch.Tensor) -> torch.Tensor:
        expert = self[number]
        out: torch.Tensor = expert.get_submodule("down_proj")(self._inner(expert, x))
        return self.post_expert_norm(out) if self.has_post_expert_norm else out

    def _inner(self, expert: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What an expert's last layer reads."""
        return self._gated([expert.get_submodule(name)(x) for name in self.fusion.projections[:-1]])

    def _gated(self, pair: list[torch.Tensor]) -> torch.Tensor:
        if not self.fusion.gated:
            return self.act_fn(pair[0])
        joined = torch.cat(pair, -1) if self.fusion.concatenated else torch.stack(pair, -1).flatten(-2)
        gated: torch.Tensor = self._gate(self, joined)
        return gated


class ScaledExperts(Experts):
    """Llama 4's, whose inputs its router scales: one that sees all tokens sees them as their own experts do."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Each expert's outputs.

        Args:
            hidden_states: ``[experts · tokens, in]``, of each expert the scaled tokens; zeros that are not sent to it.
        """
        tokens = hidden_states.view(self.fusion.experts, -1, hidden_states.shape[-1])
        sent = tokens.any(-1)
        result = torch.zeros_like(tokens)
        for number, (own, chosen) in enumerate(zip(tokens, sent, strict=True)):
            rows = chosen.nonzero().flatten()
            if number in self.shown:
                mean = tokens.sum(0) / sent.sum(0).clamp(min=1).unsqueeze(-1)
                own = torch.where(chosen.unsqueeze(-1), own, mean)
            if len(rows) or number in self.shown:
                result[number, rows] = self._run(number, own, rows).to(result.dtype)
        return result.view_as(hidden_states)


class SortedExperts(Experts):
    """JetMoe's, a matrix each: one that sees all tokens sees those that were sent to the others."""

    def forward(self, inputs: torch.Tensor, expert_size: list[int]) -> torch.Tensor:  # type: ignore[override]
        """Each expert's outputs.

        Args:
            inputs: ``[rows, in]``, those of an expert behind those of the one before it.
            expert_size: how many rows each has.
        """
        made, begin = [], 0
        for number, rows in enumerate(expert_size):
            if rows or number in self.shown:
                made.append(self._run(number, inputs, slice(begin, begin + rows)))
            begin += rows
        return torch.cat(made) if made else self._outputs(0, inputs)

    def _outputs(self, number: int, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self._layer(number, "linear")(x)
        return made


class FlatExperts(Experts):
    """DBRX's, which sees the tokens of a batch in their sequences."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Each token's experts, weighted and added up.

        Args:
            hidden_states: ``[sequences, tokens, in]``.
            top_k_index: int64 ``[sequences · tokens, k]``, its experts.
            top_k_weights: ``[sequences · tokens, k]`` how much each counts.
        """
        made = super().forward(hidden_states.flatten(0, -2), top_k_index, top_k_weights)
        return made.view(len(hidden_states), -1, made.shape[-1])


def single_experts(fused: nn.Module) -> Experts | None:
    """What takes the place of a module; None for one that holds no fused experts."""
    fusion = Fusion.of(fused)
    if fusion is None:
        return None
    if fusion.flat:
        return FlatExperts(fused)
    return (ScaledExperts if fusion.scaled else SortedExperts if fusion.single else Experts)(fused)


def _gate(module: nn.Module, joined: torch.Tensor) -> torch.Tensor:
    """Of families that have none of their own: the activation of the first half times the second."""
    gate, up = joined.chunk(2, dim=-1)
    result: torch.Tensor = module.get_submodule("act_fn")(gate) * up
    return result


class Place(NamedTuple):
    """Where a linear layer stands that is an expert's.

    Attributes:
        owner: name of the :class:`Experts`.
        expert: number of the expert.
        projection: the layer's own name.
    """

    owner: str
    expert: int
    projection: str

    def like(self, other: "Place") -> bool:
        """Whether another expert of the same mixture has the other place."""
        return (self.owner, self.projection) == (other.owner, other.projection)


def place_of(block: nn.Module, linear: str) -> Place | None:
    """Where a layer of a block stands among experts; None for one that is none of theirs."""
    parts = linear.rsplit(".", 2)
    if len(parts) < 3 or not isinstance(block.get_submodule(parts[0]), Experts):
        return None
    return Place(parts[0], int(parts[1]), parts[2])


@contextmanager
def showing(experts: Mapping[Experts, Collection[int]]) -> Iterator[None]:
    """Show every token to these experts, by their numbers, while the context lasts."""
    before = {one: one.shown for one in experts}
    for one, numbers in experts.items():
        one.shown = numbers
    try:
        yield
    finally:
        for one, numbers in before.items():
            one.shown = numbers
