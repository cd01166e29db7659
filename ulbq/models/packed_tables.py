"""The table of tokens and the head, stored in few bits: which modules they are, and how they are stored."""

from torch import nn
from transformers import PreTrainedModel

from ulbq.errors import InputError, UsageError
from ulbq.formats import AffineScheme
from ulbq.models.blocks import Linear
from ulbq.nn.quant_linear import is_dense_linear

_GROUPS = {8: (64, 32, 16), 6: (256, 64, 32, 16), 4: (32, 16)}
"""Group sizes by bits. A block of GGUF's Q6_K has 256 weights, and holds six bits exactly where they have one scale; at
four bits short groups pay, and a block of Q4_0 has 32."""


def table_scheme(bits: int, columns: int) -> AffineScheme:
    """How a table of ``columns`` is stored: symmetric, so that the simple types of other tools hold it to the bit.

    Groups are of 64 weights, of 256 at six bits and of 32 at four; where these do not divide, of less, or whole rows.
    """
    group = next((size for size in _GROUPS[bits] if columns % size == 0), -1)
    return AffineScheme.model_validate({"bits": bits, "group_size": group, "symmetric": True})


def chosen_tables(
    model: PreTrainedModel, embedding_bits: int | None, head_bits: int | None
) -> dict[Linear, AffineScheme]:
    """The matrices that are stored in these bits; a head that is tied is the embedding's, under that name.

    Args:
        model: a skeleton, its tied parameters being one object.
        embedding_bits, head_bits: None to leave it as it is. Of a tied model either is that of both.

    Raises:
        UsageError: the two differ, and the model has one matrix for both.
        InputError: the model has none, or one that computes more than a lookup or a product.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    tied = head is not None and head.weight is embedding.weight
    if tied and None not in (embedding_bits, head_bits) and embedding_bits != head_bits:
        raise UsageError(
            f"`embedding_bits={embedding_bits}` and `head_bits={head_bits}` differ, and the head of this model is its "
            "table of tokens.",
            hint="Give one of the two: it counts for both.",
        )
    option = "embedding_bits" if embedding_bits is not None else "head_bits"
    if tied:
        embedding_bits, head_bits = embedding_bits or head_bits, None
    found: dict[Linear, AffineScheme] = {}
    if embedding_bits is not None:
        if type(embedding) is not nn.Embedding or (tied and not is_dense_linear(head)):
            raise _no_table(option, "a plain table of tokens", embedding)
        shape = (embedding.num_embeddings, embedding.embedding_dim)
        found[Linear(names[embedding], *shape)] = table_scheme(embedding_bits, shape[1])
    if head_bits is not None:
        if head is None or not is_dense_linear(head):
            raise _no_table("head_bits", "a plain linear head", head)
        found[Linear(names[head], head.out_features, head.in_features)] = table_scheme(head_bits, head.in_features)
    return found


def _no_table(option: str, wanted: str, module: nn.Module | None) -> InputError:
    what = "there is none" if module is None else f"it is a {type(module).__name__}, which computes more"
    return InputError(f"`{option}` wants {wanted} in the model, and {what}.", hint=f"Leave out `{option}`.")
