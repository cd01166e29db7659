"""A table of tokens that stays packed, and the head that is tied to it."""

import torch
from torch import nn

from ulbq.formats import AffineScheme, AnyScheme
from ulbq.kernels import Product
from ulbq.nn.quant_linear import QuantLinear, is_dense_linear


class QuantEmbedding(QuantLinear):
    """Looks tokens up in a packed matrix ``[tokens, width]``; :meth:`multiply` multiplies by it, as a tied head does.

    Both read the one order in which products take the matrix: there is no second copy for lookups.

    Args:
        scheme: the matrix's format, symmetric.
        embedding: that it takes the place of.
        dtype: of what is looked up; casting the module changes it.

    Raises:
        ValueError: another format, or one with zero points.
    """

    def __init__(self, scheme: AnyScheme, embedding: nn.Embedding, *, dtype: torch.dtype = torch.float32) -> None:
        if not isinstance(scheme, AffineScheme) or not scheme.symmetric:
            raise ValueError(f"no table of tokens is {scheme.format} {scheme.label}")
        super().__init__(scheme, embedding.embedding_dim, embedding.num_embeddings, dtype=dtype)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[..., width]`` in ``dtype``, of int64 ``tokens`` ``[...]``."""
        self.prepare()
        layout, tensors = self._ready()
        found = layout.rows(self.scheme, tensors, tokens.flatten(), self.in_features, self.dtype)
        return found.view(*tokens.shape, self.in_features)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., width]`` to ``[..., tokens]``, as :meth:`QuantLinear.forward`."""
        return super().forward(x)


class TiedHead(nn.Module):
    """A head whose matrix is the table of tokens; it holds nothing but its bias.

    Args:
        table: of tokens.
        bias: of the head, if it has one.
    """

    bias: nn.Parameter | None

    def __init__(self, table: QuantEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        # In a tuple: as a module of its own it would be stored twice.
        self._table = (table,)
        self.in_features, self.out_features = table.in_features, table.out_features
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        """``[tokens, width]`` the dequantized weight, to be read only."""
        return self._table[0].weight

    def product(self, *, exact: bool) -> Product | None:
        """As :meth:`QuantLinear.product`; None where there is a bias."""
        return self._table[0].product(exact=exact) if self.bias is None else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., width]`` to ``[..., tokens]``."""
        product = self._table[0].multiply(x)
        return product if self.bias is None else product + self.bias.to(product.dtype)


def swap_table(root: nn.Module, name: str, table: QuantEmbedding, tied: list[str]) -> None:
    """Put a table in the place of an embedding, in place, and heads on it in those of the linear layers ``tied``."""
    root.set_submodule(name, table)
    for head in tied:
        layer = root.get_submodule(head)
        if not is_dense_linear(layer):
            raise TypeError(f"'{head}' is a {type(layer).__name__}, not a linear layer")
        root.set_submodule(head, TiedHead(table, layer.bias))
