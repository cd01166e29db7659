"""The Viterbi search for trellis codes as a Triton kernel; :mod:`ulbq.kernels.trellis_launch` calls it.

:mod:`ulbq.solvers.trellis` says what is computed. Importing this needs the package ``triton``.
"""
# mypy: ignore-errors
# Kernels are a language of their own, without types. They take what they need as plain arguments; names in capitals are
# compiled in.

import triton
import triton.language as tl


@triton.jit
def search_kernel(
    sequences, values, origins, codes, found, BITS: tl.constexpr, STATE_BITS: tl.constexpr, LENGTH: tl.constexpr
):
    """Codes uint8 and values float32 of a sequence, ``[LENGTH]`` each; ``origins`` uint8 ``[LENGTH, 2^(L − K)]``.

    A program holds the costs of all states of its sequence in registers. Multiplications and additions must not be
    fused, so that the codes are those of every other machine.
    """
    HEADS: tl.constexpr = 1 << (STATE_BITS - BITS)
    HALF: tl.constexpr = LENGTH // 2
    program = tl.program_id(0).to(tl.int64)
    own = sequences + program * LENGTH
    origins += program * (HEADS * LENGTH)
    index = tl.arange(0, 1 << STATE_BITS)
    value = tl.load(values + index)
    cost = tl.zeros([1 << STATE_BITS], tl.float32)
    for at in range(0, LENGTH):
        cost = _step(cost, value, tl.load(own + (at + HALF) % LENGTH), origins + at * HEADS, BITS, HEADS)
    tl.debug_barrier()  # origins come from other threads
    state = tl.argmin(cost, 0).to(tl.int32)
    for back in range(1, LENGTH - HALF + 1):
        state = _before(state, origins + (LENGTH - back) * HEADS, BITS, HEADS)
    tl.debug_barrier()
    cost = tl.where(index == state, 0.0, 1e30)
    for at in range(0, LENGTH):
        cost = _step(cost, value, tl.load(own + at), origins + at * HEADS, BITS, HEADS)
    tl.debug_barrier()
    for back in range(1, LENGTH + 1):
        here = program * LENGTH + LENGTH - back
        tl.store(codes + here, (state & ((1 << BITS) - 1)).to(tl.uint8))
        tl.store(found + here, tl.load(values + state))
        state = _before(state, origins + (LENGTH - back) * HEADS, BITS, HEADS)


@triton.jit
def _step(cost, value, element, origins, BITS: tl.constexpr, HEADS: tl.constexpr):
    """Costs of all states one element later; where the cheapest way to each head came from goes to ``origins``."""
    MASK: tl.constexpr = (1 << BITS) - 1
    lead = tl.arange(0, 1 << BITS)[:, None]
    # Costs are not negative, so they compare as the integers that their bits are; the lowest bits say who it was.
    tagged = (tl.reshape(cost, (1 << BITS, HEADS)).to(tl.int32, bitcast=True) & ~MASK) | lead
    least = tl.min(tagged, 0)
    tl.store(origins + tl.arange(0, HEADS), (least & MASK).to(tl.uint8))
    of_heads = tl.broadcast_to(least.to(tl.float32, bitcast=True)[:, None], (HEADS, 1 << BITS))
    error = value - element
    return tl.reshape(of_heads, (HEADS << BITS,)) + error * error


@triton.jit
def _before(state, origins, BITS: tl.constexpr, HEADS: tl.constexpr):
    """The state one element earlier."""
    head = state >> BITS
    return tl.load(origins + head).to(tl.int32) * HEADS + head
