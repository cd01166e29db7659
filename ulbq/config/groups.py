"""Groups of options that methods share: of formats, solvers, training, adapters and saliency.

A field is an option of ``ulbq quantize``, of recipes and of the plan, and a field of
:class:`~ulbq.config.quantize.QuantizeRequest`. Methods are put together from the groups in :mod:`ulbq.config.methods`.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from ulbq.config.adapter import AdapterConfig, AdapterForm
from ulbq.config.options import (
    ADAPTER,
    CODEBOOKS,
    COLUMNS,
    FORMAT,
    MOST,
    STAGES,
    TRAINING,
    Bits,
    Count,
    Option,
    Settings,
    Share,
)
from ulbq.config.training import TokenSettings, TrainSettings
from ulbq.errors import UsageError

HessianKind = Literal["plain", "guided", "two-sided"]
Allocation = Literal["global", "layer", "outlier", "hessian"]
Zeros = Literal["none", "output", "input"]

MOST_OUTLIER_BITS = 0.25
"""A weight: what all candidates for outliers take that a look at a matrix keeps."""


def k_group_size(bits: int) -> int:
    """Columns that share a scale in llama.cpp's K type of so many bits."""
    return 32 if bits == 4 else 16


class MethodOptions(Settings):
    """What every method's ``Options`` is made of. Building one raises UsageError where values do not go together.

    Attributes:
        calibrated: whether the method needs calibration samples.
        grouped: whether the format has groups of columns, so that ``group_size`` means something.
        preset_epochs: whether a preset's epochs are meant for the method, which otherwise trains only when told to.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    calibrated: ClassVar[bool] = True
    grouped: ClassVar[bool] = True
    preset_epochs: ClassVar[bool] = True

    @property
    def zero_points(self) -> bool:
        """Whether the format has zero points that are integers."""
        return False

    @property
    def own_groups(self) -> int | None:
        """Columns that share a scale, -1 for none, where the format says how many; None where ``group_size`` does."""
        return None if self.grouped else -1

    @classmethod
    def taken(cls) -> frozenset[str]:
        """Names of the options that mean something to the method."""
        return frozenset(cls.model_fields)

    def idle(self) -> dict[str, str]:
        """Options that the others leave without a meaning, and what would give them one."""
        return {}

    def in_effect(self) -> dict[str, Any]:
        """Every option that the others leave a meaning, with its value."""
        off = self.idle()
        return {name: value for name, value in self if name in self.taken() and name not in off}

    @model_validator(mode="after")
    def _refuse_what_would_do_nothing(self) -> Self:
        for name, needed in sorted(self.idle().items()):
            if name in self.model_fields_set:
                value = getattr(self, name)
                option = f"`{name}={value}`" if isinstance(value, str) else f"`{name}`"
                raise UsageError(
                    f"{option} means nothing without {needed}.", hint=f"Add {needed}, or leave out {option}."
                )
        return self


class BitsOptions(MethodOptions):
    """Of all formats: bits of a code."""

    bits: Annotated[Bits, Option("1, 2, 3, 4 or 8; claq takes 2, 3 or 4.", FORMAT, "N", primary=True)] = 2


class AffineOptions(BitsOptions):
    """Of the affine format. Without a zero point both orientations of the grid are tried."""

    symmetric: Annotated[bool, Option("Fixed zero point, or one a group.", FORMAT, flag="--symmetric/--asymmetric")] = (
        False
    )

    mid_rise: Annotated[
        bool,
        Option(
            "Levels of a symmetric grid: as many on both sides and none at zero, or one at zero.",
            FORMAT,
            flag="--mid-rise/--mid-tread",
        ),
    ] = False

    @property
    def zero_points(self) -> bool:
        """Whether the format has zero points that are integers."""
        return not self.symmetric

    def idle(self) -> dict[str, str]:
        """Zero points that are stored move the levels, and two levels without a zero point have none at zero."""
        needed = "`symmetric`" if not self.symmetric else "`bits` 2 or more" if self.bits == 1 else None
        return super().idle() | ({} if needed is None else {"mid_rise": needed})


class SequenceOptions(TokenSettings, MethodOptions):
    """Of methods that solve the layers of a block one after the other, by the second moments of their inputs."""

    hessian: Annotated[
        HessianKind,
        Option(
            "What an error at a layer's outputs costs: the same everywhere; for each token by the gradients of the "
            "loss there (guided); or for each two outputs together, too (two-sided).",
            COLUMNS,
            planned=True,
        ),
    ] = "plain"
    damping: Annotated[
        Share, Option("Share of the mean diagonal that is added to the Hessian's diagonal.", COLUMNS, "X", planned=True)
    ] = 0.01
    true_sequential: Annotated[
        bool,
        Option(
            "Let layers read what the quantized ones before them in the block give.",
            COLUMNS,
            flag="--true-sequential/--one-pass",
        ),
    ] = True
    all_experts: Annotated[
        bool, Option("Show every expert of a mixture every token, not only those that are sent to it.", COLUMNS)
    ] = False
    target_inputs: Annotated[
        Literal["full", "quantized"],
        Option(
            "A layer shall give what it gives in the full-precision model (asymmetric calibration), or what its weight "
            "would give on the inputs that the quantized blocks before it make.",
            COLUMNS,
        ),
    ] = "quantized"

    @property
    def gathering(self) -> dict[str, Any]:
        """How second moments are gathered, by the names of :func:`~ulbq.methods.in_sequence.solve_in_sequence`."""
        full_inputs = self.target_inputs == "full"
        return {"weighting": self.token_weighting, "all_experts": self.all_experts, "full_inputs": full_inputs}

    def idle(self) -> dict[str, str]:
        """Gradients say how much a token counts."""
        return super().idle() | ({} if self.hessian == "plain" else {"token_weighting": "`hessian=plain`"})


class CompensationOptions(SequenceOptions):
    """Of methods that make the error of each column good in the columns after it (GPTQ, CLAQ)."""

    act_order: Annotated[bool, Option("Take columns with the largest inputs first.", COLUMNS)] = True
    column_block: Annotated[
        Count, Option("Columns after which errors are handed on to all others; changes speed alone.", COLUMNS, "N")
    ] = 128


class UniformOptions(AffineOptions):
    """Of formats whose groups have levels at equal distances."""

    k_quant: Annotated[
        bool,
        Option(
            "Scales in two levels, as llama.cpp's Q2_K, Q3_K and Q4_K have them: 2, 3 or 4 bits, and layers whose "
            "inputs 256 divides (rtn, gptq, efficientqat).",
            FORMAT,
        ),
    ] = False

    @property
    def zero_points(self) -> bool:
        """Whether the format has zero points that are integers."""
        return super().zero_points and not self.k_quant

    @property
    def own_groups(self) -> int | None:
        """Columns that share a scale, -1 for none, where the format says how many; None where ``group_size`` does."""
        return k_group_size(self.bits) if self.k_quant else super().own_groups

    def idle(self) -> dict[str, str]:
        """K types have the grid that goes with their bits."""
        off = super().idle()
        return off | dict.fromkeys(("symmetric", "mid_rise"), "`k_quant=False`") if self.k_quant else off

    @model_validator(mode="after")
    def _check_k_quant(self) -> Self:
        if self.k_quant and self.bits not in {2, 3, 4}:
            raise UsageError(
                f"`k_quant` has 2, 3 or 4 bits (Q2_K, Q3_K, Q4_K), not {self.bits}.", hint="Give `bits=2`, 3 or 4."
            )
        return self


class RoundingOptions(UniformOptions):
    """Of methods that find codes without training."""

    bits: Bits = 4
    search: Annotated[bool, Option("Shrink each group's range where that lowers its error (rtn, gptq).", FORMAT)] = True


class BudgetOptions(BitsOptions):
    """Of methods that give out bits where they pay; ``bits`` are what everything has at least."""

    target_bits: Annotated[
        Annotated[float, Field(gt=0, allow_inf_nan=False)] | None,
        Option(
            "True bits a weight to spend, all that is stored counted: columns (claq) or layers that matter get wider "
            "codes.",
            CODEBOOKS,
            "X",
            default="none, all alike",
        ),
    ] = None


class UniformBudgetOptions(UniformOptions, BudgetOptions):
    """Of formats whose groups have levels at equal distances, their widths out of one budget."""

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.k_quant and self.target_bits is not None:
            raise UsageError(
                "`target_bits` gives out widths of affine codes, not of K types.",
                hint="Leave out `k_quant` or `target_bits`; `--plan` gives layers K types of other widths.",
            )
        return self


class CodebookOptions(BudgetOptions):
    """Of column codebooks (CLAQ); ``bits`` are those of columns that are not widened."""

    grouped: ClassVar[bool] = False

    bits: Literal[2, 3, 4] = 2
    allocation: Annotated[
        Allocation,
        Option(
            "Who gets the bits: by the loss that a bit saves, in each layer or across all; or the first columns of an "
            "order, by extreme values or by the Hessian, as published.",
            CODEBOOKS,
        ),
    ] = "layer"
    outlier_bits: Annotated[
        Share | None,
        Option(
            "Of these bits, how many go to single values that are stored as they are.",
            CODEBOOKS,
            "X",
            default="as pays; by an order none",
        ),
    ] = None
    refit: Annotated[bool, Option("Fit all codebooks together after the pass.", CODEBOOKS)] = True
    sweeps: Annotated[
        int,
        Field(ge=0, le=MOST),
        Option(
            "How often codes may move after the fit, column by column, and the codebooks be fitted anew; as long as it "
            "lowers a layer's error on the samples held out.",
            CODEBOOKS,
            "N",
        ),
    ] = 0
    as_published: Annotated[
        bool,
        Option(
            "What the authors' code does, its slips included; bits are nominal.",
            CODEBOOKS,
            flag="--as-published/--as-meant",
        ),
    ] = False

    @property
    def allocated(self) -> bool:
        """Whether there are bits to give out."""
        return self.target_bits is not None or bool(self.outlier_bits)

    @property
    def surveyed(self) -> bool:
        """Whether all layers have to be seen before bits are given out."""
        return self.allocated and self.allocation == "global"

    def idle(self) -> dict[str, str]:
        """A budget that is not there is not given out; codes move once the codebooks are fitted."""
        off = super().idle() | ({} if self.allocated else {"allocation": "`target_bits`"})
        return off if self.refit else off | {"sweeps": "`refit`"}

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, data: Any) -> Any:
        """The authors' code has orders only, no fit of all columns, and plain squares."""
        if not isinstance(data, dict) or not data.get("as_published"):
            return data
        if data.get("refit"):
            raise UsageError("`refit` is not as published.", hint="Leave out `refit` or `as_published`.")
        for name, published in (("hessian", "plain"), ("target_inputs", "quantized")):
            if data.get(name, published) != published:
                raise UsageError(
                    f"`{name}={data[name]}` is not as published.", hint=f"Leave out `{name}` or `as_published`."
                )
        if data.get("allocation") in {"global", "layer"}:
            raise UsageError(
                f"`allocation={data['allocation']}` is not as published.", hint="Take `allocation=outlier` or hessian."
            )
        more = data.get("target_bits") is not None or data.get("outlier_bits")
        meant = {"token_weighting": "uniform"} | ({"allocation": "outlier"} if more else {})
        return {**meant, **data, "refit": False}

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        reserved, target = self.outlier_bits or 0.0, self.target_bits
        if self.allocation in {"global", "layer"} and reserved > MOST_OUTLIER_BITS:
            raise UsageError(
                f"`outlier_bits={reserved:g}` is more than the {MOST_OUTLIER_BITS:g} that outliers can take by loss.",
                hint="Give fewer, or `allocation=outlier`.",
            )
        if target is None:
            return self
        if self.bits == 4:
            raise UsageError(
                "`target_bits` widens columns, and none is wider than the 4 bits of `bits`.",
                hint="Give `outlier_bits`, or fewer `bits`.",
            )
        if target - reserved <= self.bits:
            outliers = f" and {reserved:g} for outliers" if reserved else ""
            raise UsageError(
                f"`target_bits={target:g}` leaves nothing beside codes of {self.bits} bits{outliers}.",
                hint="Raise it, or leave it out for columns of one width.",
            )
        if self.as_published and target - reserved > 4:
            raise UsageError(f"`target_bits={target:g}` is more than 4 bits.", hint="Give fewer.")
        return self


class ExpertOptions(BitsOptions):
    """Of the mixture of scales (BinaryMoS)."""

    grouped: ClassVar[bool] = False

    bits: Literal[1] = 1
    experts: Annotated[Count, Option("Pairs of scales to mix (binary-mos).", FORMAT, "N", planned=True)] = 4
    zeros: Annotated[Zeros, Option("A zero point for each output or input channel (binary-mos).", FORMAT)] = "none"

    @classmethod
    def taken(cls) -> frozenset[str]:
        """Names of the options that mean something to the method."""
        return super().taken() | {"router_lr"}


class TrainOptions(TrainSettings, MethodOptions):
    """All of the block-wise training's settings; a method without a router has no rate for one."""

    @classmethod
    def taken(cls) -> frozenset[str]:
        """Names of the options that mean something to the method."""
        return super().taken() - {"router_lr"}

    def settings(self) -> TrainSettings:
        """The settings alone."""
        return TrainSettings.model_validate(self.model_dump(include=set(TrainSettings.model_fields)))

    def idle(self) -> dict[str, str]:
        """Constant rates leave nothing."""
        return super().idle() | ({"final_lr_factor": "`schedule=cosine`"} if self.schedule == "constant" else {})


class AdapterOptions(AdapterForm, MethodOptions):
    """Of the low-rank adapter beside each layer."""

    adapter: Annotated[
        bool, Option("Train a low-rank adapter beside the weights; it is stored in adapter/.", ADAPTER)
    ] = False

    def adapter_config(self) -> AdapterConfig | None:
        """Form of the adapter; None for no adapter."""
        if not self.adapter:
            return None
        return AdapterConfig.model_validate(self.model_dump(include=set(AdapterConfig.model_fields)))

    def idle(self) -> dict[str, str]:
        """An adapter that is not there has neither a form nor rates."""
        if self.adapter:
            return super().idle()
        names = (*AdapterConfig.model_fields, "adapter_lr", "adapter_weight_decay", "base_share", "penalize")
        return super().idle() | dict.fromkeys(names, "`adapter`")


class GranularityOptions(MethodOptions):
    """Of methods that can train layer by layer, in execution order."""

    granularity: Annotated[
        Literal["block", "layer"], Option("Match each block's output, or each layer's.", TRAINING)
    ] = "block"


class SaliencyOptions(MethodOptions):
    """Of methods that weigh by scores of the weights."""

    saliency: Annotated[
        str,
        Option(
            "What weighs the penalty, or the layers that share a budget: an artifact, a kind to compute now, or none.",
            STAGES,
            "DIR|KIND|none",
            offers=("fisher", "gradient", "hessian", "wanda", "magnitude", "none"),
        ),
    ] = "none"
