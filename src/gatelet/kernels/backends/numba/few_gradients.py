"""The gradients of a layer, or of both layers of a feed-forward one, for at most 64 examples. Compiled by Numba.

As in :mod:`few_kernels`, one pass over the units reads each row once. It forms all gradients of a unit while its row is
near. The gradients of the weights, which are as large as the weights, are written past the caches.
"""

from typing import Any

import numpy as np

from gatelet.kernels.backends.numba import few_kernels as few
from gatelet.kernels.backends.numba import gather as g
from gatelet.kernels.backends.numba import narrow_vector as n
from gatelet.kernels.backends.numba import vector as v
from gatelet.kernels.backends.numba.kernels import activate, compiled, slope

MOST, TOGETHER, NUMBERS, TILE = few.MOST, few.TOGETHER, few.NUMBERS, few.TILE
LIST, VALUES, HIDDEN, TILES = few.LIST, few.VALUES, few.THIRD, few.TILES
"""Where a thread's memory holds what it does in :mod:`few_kernels`; hidden values in place of a third map's."""
list_block, next_block, put_block, ask_for_some = few.list_block, few.next_block, few.put_block, few.ask_for_some
dots_of, spread_of, some_of, without = few.dots_of, few.spread_of, few.some_of, few.without
arguments, row_sum, take, lowest, ones, clear = g.arguments, n.row_sum, v.take, v.lowest, v.ones, v.clear
read, write, read_word = v.read, v.write, v.read_word


@compiled
def sums_of(
    rows: Any, count: Any, x: Any, width: Any, scales: Any, target: Any, stream: Any, sums: Any, one: Any
) -> None:  # pragma: no cover (compiled)
    """Write the sums of x of the first ``count`` listed units' examples, times their scales, to the units' rows."""
    for i in range(count):
        mask, at, start = read_word(rows + 16 * i + 8), scales + NUMBERS * i, 0
        row = target + read_word(rows + 16 * i) * width * 4
        while mask != 0:
            k, places = min(ones(mask), MOST), some_of(mask)
            mask = without(mask, k)
            # Of more examples than MOST the sums stay near until they are complete.
            place, past = (row, stream) if mask == 0 else (sums, 0)
            row_sum(k, x, width * 4, places, width, at, start, place, past, one)
            at += 4 * k
            start = sums


@compiled
def no_sums_of(
    rows: Any, count: Any, first: Any, last: Any, width: Any, target: Any, stream: Any, sums: Any, one: Any
) -> None:  # pragma: no cover (compiled)
    """Write zeros to the rows of the units from ``first`` to ``last`` that are not among the ``count`` listed ones."""
    i = 0
    for unit in range(first, last):
        if i < count and read_word(rows + 16 * i) == unit:
            i += 1
        else:
            row_sum(0, sums, 0, 0, width, sums, 0, target + unit * width * 4, stream, one)


@compiled
def coefficients_of(
    rows: Any,
    count: Any,
    gate: Any,
    z: Any,
    upper: Any,
    units: Any,
    total: Any,
    values: Any,
    hidden: Any,
    tile: Any,
    code: Any,
    one: Any,
) -> None:  # pragma: no cover (compiled)
    """Write C = upper · gate · act'(z) and act(z) · gate of the first ``count`` listed units and their examples.

    Also C's sums over the examples, and upper · act(z) to the tile. If ``upper`` is 0, it stands in ``values``.
    """
    for u in range(count):
        unit, mask = read_word(rows + 16 * u), read_word(rows + 16 * u + 8)
        at, added = NUMBERS * u, one - one
        while mask != 0:
            b = lowest(mask)
            mask &= mask - 1
            place = (b * units + unit) * 4
            own = read(values + at, one) if upper == 0 else read(upper + place, one)
            h, value = read(gate + place, one), read(z + place, one)
            acted = activate(value, code, one)
            write(tile + TILE * b + 4 * (unit & 63), own * acted)
            write(hidden + at, h * acted)
            own *= h * slope(value, code, one)
            write(values + at, own)
            added += own
            at += 4
        if total != 0:
            write(total + 4 * unit, added)


def _make(kind: Any) -> dict[str, Any]:
    """Return the kernel, not yet compiled, for float32 numbers."""
    one = np.float32(1)

    def gradients(p: Any) -> None:
        """A part's rows of V1 and V2, which are the gradients of the weights; its sums over the examples; its columns
        of the gates' gradient; and its share of the gradient of x. A task is a part of the units.

        ``upper`` is the gradient of the layer's values (B, N) or, with W2, of the second layer's (B, O). What has the
        address 0 is left out; ``outputs`` is 0 without W2.
        """
        # fmt: off
        (
            counter, x, w1, v1, total, gate, z, upper, slopes, w2, v2, shares, examples, units, width, outputs, code,
            stream, scratch, stride, parts,
        ) = arguments(p, 21)
        # fmt: on
        near = scratch + take(counter + 8) * stride
        words, rows, tile, sums = (units + 63) // 64, near + LIST, near + TILES, near + TILES + TILE * examples
        values, hidden, given = near + VALUES, near + HIDDEN, upper if outputs == 0 else 0
        while True:
            part = take(counter)
            if part >= parts:
                break
            share = shares + part * examples * width * 4
            if shares != 0:
                clear(share, examples * width * 4)
            first, last = part * words // parts, (part + 1) * words // parts
            listed = list_block(near, rows, gate, first, examples, units, 1, one) if first < last else 0
            for word in range(first, last):
                count, begin = listed, 64 * word
                end = min(begin + 64, units)
                if word + 1 < last:
                    listed += list_block(near, rows + 16 * count, gate, word + 1, examples, units, 1, one)
                clear(tile, TILE * examples)
                if total != 0:
                    clear(total + begin * 4, (end - begin) * 4)
                if v1 != 0:
                    no_sums_of(rows, count, begin, end, width, v1, stream, sums, one)
                if v2 != 0:
                    no_sums_of(rows, count, begin, end, outputs, v2, stream, sums, one)
                for i in range(0, count, TOGETHER):
                    some, these, left = rows + 16 * i, min(count - i, TOGETHER), listed - i
                    # What the next block reads, and what this one writes at its end.
                    ask_for_some(z, begin + 64, i, these, count, examples, units)
                    ask_for_some(given, begin + 64, i, these, count, examples, units)
                    ask_for_some(slopes, begin, i, these, count, examples, units)
                    if outputs != 0:
                        dots_of(near, some, these, left, w2, 4, upper, outputs, values, kind)
                    coefficients_of(some, these, gate, z, given, units, total, values, hidden, tile, code, one)
                    if shares != 0:
                        spread_of(some, these, left, w1, 4, share, width, values, kind)
                    if v1 != 0:
                        sums_of(some, these, x, width, values, v1, stream, sums, one)
                    if v2 != 0:
                        sums_of(some, these, upper, outputs, hidden, v2, stream, sums, one)
                if slopes != 0:
                    put_block(slopes, tile, word, examples, units)
                listed = next_block(rows, count, listed)

    return {"gradients": gradients}


few_gradients = g.Kernels(_make)
