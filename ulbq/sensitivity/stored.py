"""Scores on disk: one safetensors file a block, 16 bits a score and a float32 scale a layer."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ulbq.artifacts import SaliencyLayer, SaliencyManifest, read_manifest
from ulbq.artifacts.shards import LazyTensors, write_shard
from ulbq.config.saliency import SaliencyDtype
from ulbq.errors import InputError
from ulbq.models.blocks import Linear
from ulbq.sensitivity.spectrum import Spectrum

# The largest stored value. bfloat16 has the exponents of float32 and is as fine at any size; float16 reaches furthest
# down where it starts at its very top: its smallest number is then 1e-12 of the largest score.
_CEILING: dict[SaliencyDtype, tuple[torch.dtype, float]] = {
    "bf16": (torch.bfloat16, 1.0),
    "fp16": (torch.float16, 65504.0),
}
_SLICES = 64
_COLUMNS = 8


def block_file(index: int) -> str:
    """File name of a block's scores."""
    return f"saliency-block-{index:05d}.safetensors"


class Saliency:
    """Reads stored scores, one layer at a time.

    Args:
        folder: where the blocks' files lie.
        layers: summaries of the layers in them, as :func:`compute_saliency` returns them.
        manifest: of an artifact.
    """

    def __init__(self, folder: Path, layers: Iterable[SaliencyLayer], manifest: SaliencyManifest | None = None) -> None:
        self._folder = folder
        self._layers = {layer.name: layer for layer in layers}
        files = [folder / block_file(index) for index in sorted({layer.block for layer in self._layers.values()})]
        sums = {} if manifest is None else {name: entry.sha256 for name, entry in manifest.files.items()}
        self._tensors = LazyTensors(files, sums)
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path | str) -> "Saliency":
        """Open an artifact. Raises InputError where there is none, or one of another kind."""
        path = Path(path)
        manifest = read_manifest(path)
        if not isinstance(manifest, SaliencyManifest):
            raise InputError(
                f"'{path}' is an artifact of kind '{manifest.kind}' and holds no saliency scores.",
                hint="Make them with 'ulbq saliency MODEL'.",
            )
        return cls(path, manifest.layers, manifest)

    @property
    def digest(self) -> str | None:
        """The artifact's manifest digest; None for scores that are no artifact."""
        return self.manifest.digest if self.manifest is not None else None

    def row(self, linear: str) -> torch.Tensor:
        """Scores of a layer as they are stored, float32 ``[out, in]``, or ``[1, in]`` where a column has one score.

        Raises:
            InputError: there are none for this layer, or they have another shape than the manifest says.
        """
        if linear not in self._layers:
            raise InputError(
                f"'{self._folder}' holds no scores for '{linear}'.", hint="They were computed for another model."
            )
        stored, scale = self._tensors.read(linear), self._tensors.read(f"{linear}.scale")
        shape = self._layers[linear].shape
        if stored.shape not in (shape, (1, shape[1])):
            raise InputError(
                f"'{self._folder}' stores the scores of '{linear}' as {list(stored.shape)}, not {list(shape)}.",
                hint="Run 'ulbq inspect --verify' on it.",
            )
        return stored.float() * scale

    def score(self, linear: str) -> torch.Tensor:
        """Non-negative scores of a layer's weights, float32 ``[out, in]``, on the CPU. Raises as :meth:`row`."""
        return self.row(linear).expand(self._layers[linear].shape)


def write_scores(
    path: Path, block: int, prefix: str, scores: Mapping[Linear, torch.Tensor], dtype: SaliencyDtype
) -> tuple[SaliencyLayer, ...]:
    """Write the scores of one block and sum them up.

    Args:
        path: the file.
        block: index of the block.
        prefix: full name of the block, with the dot.
        scores: float32 ``[out, in]`` or ``[1, in]``, finite and non-negative, of each layer.
        dtype: of the stored values.
    """
    tensors: dict[str, torch.Tensor] = {}
    layers = []
    for linear, given in scores.items():
        values = given.detach().cpu()
        stored, scale = _encode(values, dtype)
        tensors[linear.name] = stored
        tensors[f"{linear.name}.scale"] = scale
        layers.append(_summary(linear, block, prefix, values, stored.float() * scale))
    write_shard(path, tensors)
    return tuple(layers)


def _encode(values: torch.Tensor, dtype: SaliencyDtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored values between 0 and the dtype's ceiling, and the scale that they are multiplied by."""
    kind, ceiling = _CEILING[dtype]
    scale = values.max() / ceiling
    shrunk = values / scale if scale > 0 else torch.zeros_like(values)
    return shrunk.clamp_max(ceiling).to(kind), scale


def _summary(linear: Linear, block: int, prefix: str, values: torch.Tensor, decoded: torch.Tensor) -> SaliencyLayer:
    times = linear.out_features // values.shape[0]
    spectrum = Spectrum()
    spectrum.add(values, times=times)
    columns = values.sum(0, dtype=torch.float64) * times
    total = spectrum.total
    shares = columns / (total or 1.0)
    best = shares.topk(min(_COLUMNS, len(shares)))
    difference = (decoded - values).abs().sum(dtype=torch.float64).item() * times
    return SaliencyLayer(
        name=linear.name,
        block=block,
        projection=linear.name.removeprefix(prefix),
        shape=(linear.out_features, linear.in_features),
        total=total,
        largest=values.max().item(),
        top=spectrum.top(),
        columns=tuple(_short(part.sum().item()) for part in shares.tensor_split(min(_SLICES, len(shares)))),
        top_columns=tuple((int(i), _short(best.values[n].item())) for n, i in enumerate(best.indices)) if total else (),
        rounding=difference / (total or 1.0),
        vanished=((decoded == 0) & (values > 0)).double().mean().item(),
    )


def _short(share: float) -> float:
    """A share as the manifest tells it: there are hundreds a layer, and nobody reads a seventh digit."""
    return round(share, 6)
