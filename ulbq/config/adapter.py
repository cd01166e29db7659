"""The form of a low-rank adapter."""

from typing import Annotated

from ulbq.config.options import ADAPTER, Count, Layers, Option, Part, Positive, Settings

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class AdapterForm(Settings):
    """What fixes an adapter's shape and its training.

    ``targets`` are last parts of layers' names (``q_proj``) or more of them (``mlp.up_proj``), as in peft's
    ``target_modules``.
    """

    rank: Annotated[Count, Option("Of the adapter.", ADAPTER, "N", planned=True)] = 64
    alpha: Annotated[Positive, Option("The adapter is scaled by alpha / rank.", ADAPTER, "X")] = 16.0
    dropout: Annotated[Part, Option("Share of the adapter's inputs dropped in training.", ADAPTER, "X")] = 0.0
    dora: Annotated[bool, Option("Learn the rows' magnitudes too, or not.", ADAPTER, flag="--dora/--lora")] = False
    targets: Annotated[
        Layers, Option("Layers with an adapter, as in q_proj,v_proj.", ADAPTER, "NAME,…", default="all", offers=LAYERS)
    ] = ()


class AdapterConfig(AdapterForm):
    """Form of an adapter."""

    @property
    def scaling(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank

    def matches(self, linear: str) -> bool:
        """Whether a layer of that name, in full or inside its block, gets an adapter."""
        return not self.targets or any(linear == target or linear.endswith(f".{target}") for target in self.targets)

    def bits(self, out_features: int, in_features: int) -> int:
        """Stored bits of one layer's adapter."""
        return 16 * (self.rank * (out_features + in_features) + (out_features if self.dora else 0))
