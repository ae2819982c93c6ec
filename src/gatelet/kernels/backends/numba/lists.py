"""The products over lists of open units, as functions of tensors. No tensor of examples × units exists.

Lists by example are two int64 tensors, as in the CSR format: example b has ``units[starts[b]:starts[b + 1]]`` open.
Numbers of pairs (values, coefficients, their gradients) are tensors (pairs,) in the same order. For (B, K) indices,
``pattern.fixed_starts(B, K)`` are the starts and ``indices.flatten()`` the units.

* A decoder, y[b] = Σ values · W[n] + bias, is ``by_example``. Its backward pass, for the gradient g (B, D) of y, is
  ``backward(g, weight, values, turned(starts, units, N))``: the gradients of the values, and the touched rows of the
  weight's gradient.
* An encoder whose indices are given, z = ⟨x[b], W[n]⟩ + bias, is ``dots``. From the gradient c (pairs,) of its values,
  the gradient of x is ``by_example(c, weight, None, starts, units)``; those of weight and bias are
  ``by_unit(c, x, turned(…))``.
* An encoder that finds the indices itself is ``top_k``.
"""

from array import array
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gatelet.kernels.backends.numba import memory, team
from gatelet.kernels.backends.numba.list_kernels import PAIR, products, turning

TASK = 256
"""About this many pairs make a task."""
DIGIT = 11
"""The most bits of a unit's number that one pass of the sort takes: its 2048 counters stay in cache."""


class Turned(NamedTuple):
    """Lists by unit, for the units that are open for any example, in order.

    Attributes:
        touched: their numbers, (U,).
        starts: (U + 1,): the pairs of ``touched[t]`` are ``starts[t]`` to ``starts[t + 1]``.
        examples: the example of each pair, (pairs,), ascending within a unit.
        places: the place of each pair in the lists by example.
        units: N.
    """

    touched: Tensor
    starts: Tensor
    examples: Tensor
    places: Tensor
    units: int


def dots(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | int,
    units: Tensor,
    wrong: "array[int] | None" = None,
) -> Tensor:
    """Return ⟨x[b], weight[n]⟩ + bias[n] for every pair (b, n) of the lists.

    Args:
        x: (B, D).
        weight: (N, D).
        bias: (N,).
        starts: (B + 1,) int64, or K if every example has so many units.
        units: (pairs,) int64; in range, and in any order within an example, unless ``wrong`` is given.
        wrong: one number, 0. It becomes 1, and the result is of no use, if a list does not ascend within 0 … N - 1.

    Returns:
        (pairs,).
    """
    (batch, width), pairs = x.shape, len(units)
    values = x.new_empty(pairs)
    if not pairs:
        return values
    products.run(
        *("dots", _bits(x), team.threads(pairs * width)),
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=_address(bias),
        starts=_starts(starts),
        most=_most(starts),
        units=units.data_ptr(),
        values=values.data_ptr(),
        examples=batch,
        count=len(weight),
        width=width,
        span=_span(batch, pairs),
        pairs=pairs,
        wrong=0 if wrong is None else wrong.buffer_info()[0],
    )
    return values


def by_example(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | int,
    units: Tensor,
    wrong: "array[int] | None" = None,
) -> Tensor:
    """Return y (B, D), y[b] = bias + Σ values · weight[n] over the list of b.

    Args:
        values: (pairs,), as the lists order them.
        weight: (N, D).
        bias: (D,).
        starts: (B + 1,) int64, or K if every example has so many units.
        units: (pairs,) int64; in range, and in any order within an example, unless ``wrong`` is given.
        wrong: one number, 0. It becomes 1, and the result is of no use, if a list does not ascend within 0 … N - 1.

    Returns:
        (B, D).
    """
    width, pairs = weight.shape[1], len(units)
    batch = len(starts) - 1 if isinstance(starts, Tensor) else pairs // starts
    out = weight.new_empty((batch, width))
    products.run(
        *("by_example", _bits(weight), team.threads(pairs * width)),
        values=values.data_ptr(),
        weight=weight.data_ptr(),
        bias=_address(bias),
        starts=_starts(starts),
        most=_most(starts),
        units=units.data_ptr(),
        out=out.data_ptr(),
        examples=batch,
        count=len(weight),
        width=width,
        span=_span(batch, pairs),
        pairs=pairs,
        wrong=0 if wrong is None else wrong.buffer_info()[0],
    )
    return out


def decoder(
    batch: int, most: int, count: int, width: int, bits: int, shape: tuple[int, ...]
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor | None]:
    """Return a function of values, weight, bias and indices that does what :func:`by_example` does, with fewer steps.

    All must be contiguous, the indices int64. The function checks these and returns None if they are wrong.

    Args:
        batch: B.
        most: K, at least 1.
        count: N.
        width: D.
        bits: of a number.
        shape: of the result, B · D numbers.
    """
    pairs = batch * most
    addresses = dict.fromkeys(("values", "weight", "bias", "units", "out", "wrong"))
    sizes = {"starts": 0, "most": most, "examples": batch, "count": count, "width": width, "pairs": pairs}
    run = products.prepare("by_example", bits, **addresses, **sizes, span=_span(batch, pairs))

    def call(values: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor) -> Tensor | None:
        out, wrong = weight.new_empty(*shape), array("q", (0,))
        threads, shift = team.threads(pairs * width), 0 if bias is None else bias.data_ptr()
        data = (values.data_ptr(), weight.data_ptr(), shift, indices.data_ptr(), out.data_ptr())
        run(threads, *data, wrong.buffer_info()[0])
        return None if wrong[0] else out

    return call


def turned(starts: Tensor, units: Tensor, count: int) -> Turned:
    """Return the lists by unit, by a stable radix sort: its time grows with the pairs, not with the units.

    Args:
        starts: (B + 1,) int64.
        units: (pairs,) int64, in range.
        count: N, below 2³¹.
    """
    pairs, batch = len(units), len(starts) - 1
    examples, places = torch.empty_like(units), torch.empty_like(units)
    if not pairs:
        return Turned(units, units.new_zeros(1), examples, places, count)
    threads = team.threads(8 * pairs)
    parts = max(min(threads, pairs), 1)
    length = max((count - 1).bit_length(), 1)
    passes = -(-length // DIGIT)
    bits = -(-length // passes)
    records, other = units.new_empty(pairs * PAIR // 8), units.new_empty(pairs * PAIR // 8)
    counters = units.new_empty(parts << bits)
    lists = {"starts": starts.data_ptr(), "units": units.data_ptr()}
    span = _span(batch, pairs)
    turning.run("pairs_of", 32, threads, **lists, records=records.data_ptr(), examples=batch, span=span)
    for k in range(passes):
        digit = {"shift": k * bits, "bits": bits, "parts": parts, "pairs": pairs, "counters": counters.data_ptr()}
        turning.run("count", 32, threads, records=records.data_ptr(), **digit)
        turning.run("place", 32, 1, counters=counters.data_ptr(), parts=parts, bits=bits)
        turning.run("scatter", 32, threads, records=records.data_ptr(), sorted_records=other.data_ptr(), **digit)
        records, other = other, records
    args = {"records": records.data_ptr(), "counters": counters.data_ptr(), "pairs": pairs, "parts": parts}
    turning.run("heads", 32, threads, touched=0, starts=0, examples=0, places=0, **args)
    found = counters[:parts]
    touched = units.new_empty(int(found.sum()))
    first = units.new_empty(len(touched) + 1)
    found.copy_(found.cumsum(0) - found)
    into = {"touched": touched.data_ptr(), "starts": first.data_ptr()}
    turning.run("heads", 32, threads, **into, examples=examples.data_ptr(), places=places.data_ptr(), **args)
    return Turned(touched, first, examples, places, count)


def by_unit(
    values: Tensor | None,
    table: Tensor,
    lists: Turned,
    *,
    weight: Tensor | None = None,
    dense: bool = False,
    need_rows: bool = True,
    need_total: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return Σ values · table[b] and Σ values over the pairs of each unit, and ⟨weight[n], table[b]⟩ of each pair.

    Args:
        values: (pairs,), in the order of the lists by example; None if only the products with ``weight`` are wanted.
        table: (B, D), the examples.
        lists: from ``turned``.
        weight: (N, D), or None.
        dense: return the sums of all N units (zero where no pair is open), not only of the touched ones.
        need_rows: whether to return the first result.
        need_total: whether to return the second result.

    Returns:
        (U, D) or (N, D), (U,) or (N,), (pairs,); None for each that is not needed.
    """
    width, pairs, count = table.shape[1], len(lists.places), len(lists.touched)
    rows = lists.units if dense else count
    sums = memory.empty(table, (rows, width)) if values is not None and need_rows else None
    total = table.new_empty(rows) if values is not None and need_total else None
    found = None if weight is None else table.new_empty(pairs)
    if not pairs:
        return (None if sums is None else sums.zero_()), (None if total is None else total.zero_()), found
    threads = team.threads(pairs * width)
    scratch = table.new_empty(threads * 128)
    products.run(
        *("by_unit", _bits(table), threads),
        values=_address(values),
        table=table.data_ptr(),
        weight=_address(weight),
        touched=lists.touched.data_ptr(),
        starts=lists.starts.data_ptr(),
        examples=lists.examples.data_ptr(),
        places=lists.places.data_ptr(),
        sums=_address(sums),
        total=_address(total),
        products=_address(found),
        count=count,
        units=lists.units,
        width=width,
        dense=int(dense),
        scratch=scratch.data_ptr(),
        stride=128 * table.element_size(),
        span=_span(count, pairs),
        pairs=pairs,
    )
    return sums, total, found


def backward(grad: Tensor, weight: Tensor, values: Tensor, lists: Turned, dense: bool = False) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``by_example``'s values (pairs,) and weight (its touched rows only, unless ``dense``).

    One pass over the units forms both, so each row of the weight is read once and in order.

    Args:
        grad: (B, D), the gradient of y.
        weight: (N, D).
        values: (pairs,).
        lists: from ``turned``.
        dense: return the weight's gradient (N, D), not only its touched rows (U, D).
    """
    sums, _, found = by_unit(values, grad, lists, weight=weight, dense=dense, need_total=False)
    assert sums is not None
    assert found is not None
    return found, sums


def as_sparse(rows: Tensor, lists: Turned) -> Tensor:
    """Return rows (U, …) of touched units as a coalesced sparse COO tensor (N, …), which torch.optim takes."""
    shape = (lists.units, *rows.shape[1:])
    return torch.sparse_coo_tensor(lists.touched[None], rows, shape, is_coalesced=True, check_invariants=False)


def add_rows(weight: Tensor, rows: Tensor, lists: Turned, scale: float) -> None:
    """Add scale · rows[t] to weight[touched[t]] in place: a step of gradient descent on the touched rows only."""
    count, width = rows.shape
    if not rows.numel():
        return
    factor, order = rows.new_full((1,), scale), torch.arange(count, device=rows.device)
    products.run(
        *("add_rows", _bits(rows), team.threads(rows.numel())),
        rows=rows.data_ptr(),
        touched=lists.touched.data_ptr(),
        weight=weight.data_ptr(),
        scale=factor.data_ptr(),
        order=order.data_ptr(),
        count=count,
        width=width,
        span=TASK,
    )


BLOCK, CHUNK = 1024, 1024
"""Latents and examples of one block of an encoder's product: 4 MB of float32, which are still in cache when read."""


def top_k(x: Tensor, weight: Tensor, bias: Tensor | None, most: int, *, half: bool = False) -> tuple[Tensor, Tensor]:
    """Return each example's ``most`` largest of x Wᵀ + b and their indices, in the order of the units.

    The product is formed in blocks. After each block an example keeps only candidates for its largest, so no (B, N)
    tensor exists. Of equals the first ones are taken. NaN counts as infinity.

    Args:
        x: (B, D).
        weight: (N, D).
        bias: (N,).
        most: K, at most N.
        half: form the product in bfloat16 (:mod:`screened` corrects it).

    Returns:
        values (B, K) and indices (B, K), sorted by index.
    """
    batch, units = len(x), len(weight)
    if not 1 <= most <= units:
        raise ValueError(f"most must be between 1 and the number of units, {units}, not {most}")
    # A list is cut when it is full, so more room means fewer cuts.
    room = 2 * most + 32
    bias = weight.new_zeros(units) if bias is None else bias
    values, names = x.new_empty((batch, room)), x.new_empty((batch, room), dtype=torch.int64)
    counts, floors = x.new_zeros(batch, dtype=torch.int64), x.new_full((batch,), torch.nan)
    buffer = x.new_empty(min(batch, CHUNK) * min(units, BLOCK))
    threads = team.threads(len(buffer))
    scratch = x.new_empty(threads * (room + 32))
    for b in range(0, batch, CHUNK):
        rows = min(CHUNK, batch - b)
        low = x[b : b + rows].bfloat16() if half else x
        for n in range(0, units, BLOCK):
            width = min(BLOCK, units - n)
            block = buffer[: rows * width].view(rows, width)
            if half:
                block.copy_(low @ weight[n : n + width].bfloat16().t())
            else:
                torch.mm(x[b : b + rows], weight[n : n + width].t(), out=block)
            products.run(
                *("select", _bits(x), threads),
                block=block.data_ptr(),
                bias=bias.data_ptr() + n * x.element_size(),
                values=values[b].data_ptr(),
                units=names[b].data_ptr(),
                counts=counts[b:].data_ptr(),
                floors=floors[b:].data_ptr(),
                examples=rows,
                width=width,
                first=n,
                most=most,
                room=room,
                last=int(n + width == units),
                scratch=scratch.data_ptr(),
                stride=(room + 32) * x.element_size(),
            )
    return values[:, :most].contiguous(), names[:, :most].contiguous()


def _starts(starts: Tensor | int) -> int:
    return starts.data_ptr() if isinstance(starts, Tensor) else 0


def _most(starts: Tensor | int) -> int:
    return 0 if isinstance(starts, Tensor) else starts


def _bits(tensor: Tensor) -> int:
    return 8 * tensor.element_size()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _span(lists: int, pairs: int) -> int:
    """Return how many lists make a task."""
    return max(1, TASK * lists // max(pairs, 1))
