"""Two to 64 examples in one pass over the rows, compiled by Numba. Import this module only to run them.

Units are taken in blocks of 64. A unit's row is read once, from end to end as memory likes it, for all of its examples,
whose own rows stay in the second-level cache; meanwhile the next open unit's row is prefetched. What is written by
(example, unit) stays near until its block is done: columns of a large matrix share a few cache sets, so that writing
them one by one would cost more than the products.
"""

from typing import Any

import numpy as np

from gatelet.kernels.backends.numba import gather as g
from gatelet.kernels.backends.numba import narrow_vector as n
from gatelet.kernels.backends.numba import vector as v
from gatelet.kernels.backends.numba.kernels import activate, compiled
from gatelet.kernels.backends.numba.narrow_kernels import shifted

MOST = n.MOST
EXAMPLES = 64
"""The most examples: the bits of a word."""
TOGETHER = 8
"""So many units are taken together."""
LOOKS = 4
"""Blocks that are looked at before, for how many examples units are open."""
NUMBERS = 4 * EXAMPLES
"""Bytes of a unit's numbers, one for each of its examples."""
COLUMNS, LIST = 256, 256 + 512
VALUES = LIST + 2 * 64 * 16
THIRD = VALUES + TOGETHER * NUMBERS
TILES = THIRD + TOGETHER * NUMBERS
"""Where a thread's memory holds, behind results of products: columns of bits, the open units of two blocks, some units'
values, other numbers of theirs, and the blocks of numbers that are written."""
TILE = 256
"""Bytes of an example's numbers in a block of units."""
arguments, row_dots, row_spread = g.arguments, n.row_dots, n.row_spread
take, lowest, ones, columns = v.take, v.lowest, v.ones, v.nonzero_columns
ask_to_write, clear, copy = v.prefetch_to_write, v.clear, v.copy
read, write, read_word, write_word, read_index = v.read, v.write, v.read_word, v.write_word, v.read_index


@compiled
def some_of(mask: Any) -> Any:  # pragma: no cover (compiled)
    """Return the lowest examples of a mask, at most MOST: a byte each."""
    places, k = 0, 0
    while mask != 0 and k < MOST:
        places |= lowest(mask) << (8 * k)
        mask &= mask - 1
        k += 1
    return places


@compiled
def without(mask: Any, k: Any) -> Any:  # pragma: no cover (compiled)
    """Return a mask without its k lowest examples."""
    for _ in range(k):
        mask &= mask - 1
    return mask


@compiled
def examples_of(gate: Any, place: Any, gates: Any, examples: Any, one: Any) -> Any:  # pragma: no cover (compiled)
    """Return the examples, as bits, for which a gate is open."""
    mask = 0
    for b in range(examples):
        if read(gate + (b * gates + place) * 4, one) != 0:
            mask |= 1 << b
    return mask


@compiled
def list_block(
    near: Any, target: Any, gate: Any, word: Any, examples: Any, units: Any, group: Any, one: Any
) -> Any:  # pragma: no cover (compiled)
    """List a block's open units with their examples as bits, 16 bytes each; return how many."""
    first, last, gates = 64 * word, min(64 * word + 64, units), units // group
    whole = group == 1 and last - first == 64
    if whole:
        start = gate + first * 4
        columns(start, gates * 4, min(examples, 32), near + COLUMNS, one)
        if examples > 32:
            columns(start + 32 * gates * 4, gates * 4, examples - 32, near + COLUMNS + 256, one)
    count, mask, known = 0, 0, -1
    for unit in range(first, last):
        if whole:
            mask = read_index(near + COLUMNS + 4 * (unit - first))
            if examples > 32:
                mask |= read_index(near + COLUMNS + 256 + 4 * (unit - first)) << 32
        elif unit // group != known:
            known = unit // group
            mask = examples_of(gate, known, gates, examples, one)
        if mask != 0:
            write_word(target + 16 * count, unit)
            write_word(target + 16 * count + 8, mask)
            count += 1
    return count


@compiled
def ask_for_some(
    target: Any, first: Any, i: Any, some: Any, count: Any, examples: Any, units: Any
) -> None:  # pragma: no cover (compiled)
    """Prefetch the numbers of the block of units that begins with ``first``, to read or write them.

    They are asked for little by little: here for those of ``some`` of ``count`` steps, the first of which is step i.
    """
    if target != 0:
        for b in range(examples * i // count, examples * (i + some) // count):
            for line in range(0, TILE, 64):
                ask_to_write(target + (b * units + first) * 4 + line)


@compiled
def next_block(rows: Any, count: Any, listed: Any) -> Any:  # pragma: no cover (compiled)
    """Move the units behind the first ``count`` to the front of the list; return how many they are."""
    for i in range(2 * (listed - count)):
        write_word(rows + 8 * i, read_word(rows + 16 * count + 8 * i))
    return listed - count


@compiled
def put_block(target: Any, tile: Any, word: Any, examples: Any, units: Any) -> None:  # pragma: no cover (compiled)
    """Copy a block's numbers (examples, 64) to their places in (examples, units)."""
    first = 64 * word
    for b in range(examples):
        copy(target + (b * units + first) * 4, tile + TILE * b, min(64, units - first) * 4)


@compiled
def dots_of(
    near: Any,
    rows: Any,
    count: Any,
    listed: Any,
    weight: Any,
    size: Any,
    x: Any,
    width: Any,
    target: Any,
    kind: Any,
) -> None:  # pragma: no cover (compiled)
    """Write ⟨row, x[b]⟩ of the first ``count`` listed units and their examples, NUMBERS bytes for each unit."""
    for i in range(count):
        mask, at = read_word(rows + 16 * i + 8), target + NUMBERS * i
        row = weight + read_word(rows + 16 * i) * width * size
        soon = weight + read_word(rows + 16 * min(i + 1, listed - 1)) * width * size
        while mask != 0:
            k = min(ones(mask), MOST)
            row_dots(k, row, x, width * 4, some_of(mask), width, soon, at, kind)
            mask = without(mask, k)
            at += 4 * k


@compiled
def spread_of(
    rows: Any, count: Any, listed: Any, weight: Any, size: Any, y: Any, width: Any, scales: Any, kind: Any
) -> None:  # pragma: no cover (compiled)
    """Add the rows of the first ``count`` listed units, times their scales, to y of their examples."""
    for i in range(count):
        mask, at = read_word(rows + 16 * i + 8), scales + NUMBERS * i
        row = weight + read_word(rows + 16 * i) * width * size
        soon = weight + read_word(rows + 16 * min(i + 1, listed - 1)) * width * size
        while mask != 0:
            k = min(ones(mask), MOST)
            row_spread(k, row, y, width * 4, some_of(mask), width, at, soon, kind)
            mask = without(mask, k)
            at += 4 * k


@compiled
def crowded(
    near: Any, gate: Any, examples: Any, units: Any, group: Any, most: Any, one: Any
) -> Any:  # pragma: no cover (compiled)
    """Return whether an open unit has more than ``most`` examples on average, in a few blocks spread over the units."""
    words, pairs, count = (units + 63) // 64, 0, 0
    for i in range(min(LOOKS, words)):
        listed = list_block(near, near + LIST, gate, i * words // min(LOOKS, words), examples, units, group, one)
        count += listed
        for k in range(listed):
            pairs += ones(read_word(near + LIST + 16 * k + 8))
    return pairs > most * count


# Long: the kernels are nested functions, because Numba fixes their types and widths by what they close over.
def _make(kind: Any) -> dict[str, Any]:
    """Return the kernels, not yet compiled, for weights stored like ``kind``."""
    size, one = kind.itemsize, np.float32(1)

    def linear(p: Any) -> None:
        """out = act(x Wᵀ + bias) ∘ gate and, unless its address is 0, pre = x Wᵀ + bias; both zero where closed.

        A task is ``span`` blocks of units.
        """
        # fmt: off
        (
            counter, x, weight, scales, bias, gate, out, pre, examples, units, width, group, code, most, told, scratch,
            stride, span,
        ) = arguments(p, 18)
        # fmt: on
        near = scratch + take(counter + 8) * stride
        words, gates, rows = (units + 63) // 64, units // group, near + LIST
        tile, tile_pre = near + TILES, near + TILES + TILE * examples
        if most < examples and crowded(near, gate, examples, units, group, most, one):
            write_word(told, 1)
            return
        while True:
            first = take(counter) * span
            if first >= words:
                break
            last = min(first + span, words)
            listed = list_block(near, rows, gate, first, examples, units, group, one)
            for word in range(first, last):
                count = listed
                if word + 1 < last:
                    listed += list_block(near, rows + 16 * count, gate, word + 1, examples, units, group, one)
                clear(tile, TILE * examples)
                if pre != 0:
                    clear(tile_pre, TILE * examples)
                for i in range(0, count, TOGETHER):
                    some, these = rows + 16 * i, min(count - i, TOGETHER)
                    ask_for_some(out, 64 * word, i, these, count, examples, units)  # it is written at the end
                    ask_for_some(pre, 64 * word, i, these, count, examples, units)
                    dots_of(near, some, these, listed - i, weight, size, x, width, near + VALUES, kind)
                    for u in range(these):
                        unit, mask = read_word(some + 16 * u), read_word(some + 16 * u + 8)
                        own, at = unit if group == 1 else unit // group, near + VALUES + NUMBERS * u
                        while mask != 0:
                            b = lowest(mask)
                            mask &= mask - 1
                            place = TILE * b + 4 * (unit & 63)
                            z = shifted(read(at, one), scales, bias, unit, one)
                            at += 4
                            if pre != 0:
                                write(tile_pre + place, z)
                            write(tile + place, activate(z, code, one) * read(gate + (b * gates + own) * 4, one))
                put_block(out, tile, word, examples, units)
                if pre != 0:
                    put_block(pre, tile_pre, word, examples, units)
                listed = next_block(rows, count, listed)

    def ffn(p: Any) -> None:
        """out[part] = Σ_n hidden[b, n] · W2[n] over the part's units; hidden = act(x W1ᵀ + b1) ∘ (x W3ᵀ + b3) ∘ gate.

        Without W3 its factor is left out; without W1 hidden is x, of ``units`` numbers each.
        """
        # fmt: off
        (
            counter, x, w1, s1, b1, w3, s3, b3, gate, w2, s2, out, examples, units, width, outputs, group, code,
            most, told, scratch, stride, parts,
        ) = arguments(p, 23)
        # fmt: on
        near = scratch + take(counter + 8) * stride
        words, gates, rows = (units + 63) // 64, units // group, near + LIST
        values, thirds = near + VALUES, near + THIRD
        if most < examples and crowded(near, gate, examples, units, group, most, one):
            write_word(told, 1)
            return
        while True:
            part = take(counter)
            if part >= parts:
                break
            target = out + part * examples * outputs * 4
            clear(target, examples * outputs * 4)
            first, last = part * words // parts, (part + 1) * words // parts
            listed = list_block(near, rows, gate, first, examples, units, group, one) if first < last else 0
            for word in range(first, last):
                count = listed
                if word + 1 < last:
                    listed += list_block(near, rows + 16 * count, gate, word + 1, examples, units, group, one)
                for i in range(0, count, TOGETHER):
                    some, these = rows + 16 * i, min(count - i, TOGETHER)
                    if w1 != 0:
                        dots_of(near, some, these, listed - i, w1, size, x, width, values, kind)
                    if w3 != 0:
                        dots_of(near, some, these, listed - i, w3, size, x, width, thirds, kind)
                    for u in range(these):
                        unit, mask, at = read_word(some + 16 * u), read_word(some + 16 * u + 8), NUMBERS * u
                        own = unit if group == 1 else unit // group
                        factor = read(s2 + 4 * unit, one) if s2 != 0 else one
                        while mask != 0:
                            b, h = lowest(mask), factor
                            mask &= mask - 1
                            if w1 != 0:
                                h *= read(gate + (b * gates + own) * 4, one)
                                h *= activate(shifted(read(values + at, one), s1, b1, unit, one), code, one)
                            else:
                                h *= read(x + (b * units + unit) * 4, one)
                            if w3 != 0:
                                h *= shifted(read(thirds + at, one), s3, b3, unit, one)
                            write(values + at, h)
                            at += 4
                    spread_of(some, these, listed - i, w2, size, target, outputs, values, kind)
                listed = next_block(rows, count, listed)

    return {kernel.__name__: kernel for kernel in (linear, ffn)}


few = g.Kernels(_make)
