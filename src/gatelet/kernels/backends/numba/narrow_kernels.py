"""One to sixteen examples and weights of few bytes, compiled by Numba. Import this module only to run them.

Most of the time goes into reading the rows of the units that are open for any example. So rows are stored in few bytes
(float32, bfloat16, or int8 with a scale per row) and each is read once. For a single example eight rows are read at a
time, because a processor can follow about that many streams; for several examples, one row at a time. Rows of few
bytes are prefetched, because the processor does not predict them in time. Numbers are multiplied and added as float32.

Units are split into a fixed number of parts, each with its own sums, so results do not depend on the order of threads.
"""

from typing import Any

import numpy as np

from gatelet.kernels.backends.numba import gather as g
from gatelet.kernels.backends.numba import narrow_vector as n
from gatelet.kernels.backends.numba import vector as v
from gatelet.kernels.backends.numba.kernels import activate, compiled, open_word

MOST, ROWS = n.MOST, n.ROWS
NEAR = 64
"""Numbers of a part's scratch memory before its list of units."""
arguments, row_dots, row_axpy = g.arguments, n.row_dots, n.row_axpy
rows_dots, rows_axpy = n.rows_dots, n.rows_axpy
take, lowest, ones = v.take, v.lowest, v.ones
read, write, read_word, write_word, clear = v.read, v.write, v.read_word, v.write_word, v.clear


@compiled
def listed(
    target: Any, gate: Any, examples: Any, units: Any, group: Any, first: Any, last: Any, one: Any
) -> Any:  # pragma: no cover (compiled)
    """List the units of words ``first`` to ``last`` that any example has open, with their masks; return how many."""
    count, gates = 0, units // group
    for word in range(first, last):
        either = 0
        for b in range(examples):
            bits = open_word(gate + b * gates * 4, word, units, group, 4, one)
            write_word(target - 8 * (b + 1), bits)
            either |= bits
        while either != 0:
            place = lowest(either)
            either &= either - 1
            mask = 0
            for b in range(examples):
                mask |= ((read_word(target - 8 * (b + 1)) >> place) & 1) << b
            write_word(target + 16 * count, 64 * word + place)
            write_word(target + 16 * count + 8, mask)
            count += 1
    return count


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
def shifted(z: Any, scales: Any, bias: Any, unit: Any, one: Any) -> Any:  # pragma: no cover (compiled)
    """Return a product with its row's scale and bias."""
    if scales != 0:
        z *= read(scales + 4 * unit, one)
    return z + read(bias + 4 * unit, one) if bias != 0 else z


# Long: the kernels are nested functions, because Numba fixes their types and widths by what they close over.
def _make(kind: Any) -> dict[str, Any]:
    """Return the kernels, not yet compiled, for weights stored like ``kind``."""
    size, one = kind.itemsize, np.float32(1)

    def linear(p: Any) -> None:
        """out = act(x Wᵀ + bias) ∘ gate, zero where closed; a task is a part of the units."""
        counter, x, weight, scales, bias, gate, out, examples, units, width, group, code, scratch, stride, parts = (
            arguments(p, 15)
        )
        words, gates = (units + 63) // 64, units // group
        while True:
            part = take(counter)
            if part >= parts:
                break
            near = scratch + part * stride
            first, last = part * words // parts, (part + 1) * words // parts
            for b in range(examples):
                begin, end = 64 * first, min(64 * last, units)
                clear(out + (b * units + begin) * 4, (end - begin) * 4)
            rows = near + NEAR * 4
            count = listed(rows, gate, examples, units, group, first, last, one)
            i = 0
            while examples == 1 and i < count:
                k = min(ROWS, count - i)
                later = rows + 16 * min(i + ROWS, count - k)
                rows_dots(k, rows + 16 * i, later, weight, x, width, near, kind)
                for e in range(k):
                    unit = read_word(rows + 16 * (i + e))
                    z = activate(shifted(read(near + 4 * e, one), scales, bias, unit, one), code, one)
                    write(out + unit * 4, z * read(gate + unit // group * 4, one))
                i += k
            for i in range(count if examples == 1 else 0, count):
                unit, mask = read_word(rows + 16 * i), read_word(rows + 16 * i + 8)
                later = weight + read_word(rows + 16 * min(i + 1, count - 1)) * width * size
                while mask != 0:
                    k, places = min(ones(mask), MOST), some_of(mask)
                    row_dots(k, weight + unit * width * size, x, width * 4, places, width, later, near, kind)
                    for e in range(k):
                        b = (places >> (8 * e)) & 255
                        mask &= mask - 1
                        z = activate(shifted(read(near + 4 * e, one), scales, bias, unit, one), code, one)
                        h = read(gate + (b * gates + unit // group) * 4, one)
                        write(out + (b * units + unit) * 4, z * h)

    def ffn(p: Any) -> None:
        """out[part] = Σ_n hidden[b, n] · W2[n] over the part's units; hidden = act(x W1ᵀ + b1) ∘ (x W3ᵀ + b3) ∘ gate.

        Without W3 there is no second factor; without W1 hidden is the gate.
        """
        (
            counter,
            x,
            w1,
            s1,
            b1,
            w3,
            s3,
            b3,
            gate,
            w2,
            s2,
            out,
            examples,
            units,
            width,
            outputs,
            group,
            code,
            scratch,
            stride,
            parts,
        ) = arguments(p, 21)
        words, gates = (units + 63) // 64, units // group
        while True:
            part = take(counter)
            if part >= parts:
                break
            near, target = scratch + part * stride, out + part * examples * outputs * 4
            clear(target, examples * outputs * 4)
            rows = near + NEAR * 4
            first, last = part * words // parts, (part + 1) * words // parts
            count = listed(rows, gate, examples, units, group, first, last, one)
            i = 0
            while examples == 1 and i < count:
                k = min(ROWS, count - i)
                some, later = rows + 16 * i, rows + 16 * min(i + ROWS, count - k)
                if w1 != 0:
                    rows_dots(k, some, later, w1, x, width, near, kind)
                if w3 != 0:
                    rows_dots(k, some, later, w3, x, width, near + 32, kind)
                for e in range(k):
                    unit = read_word(some + 16 * e)
                    h = read(gate + unit // group * 4, one)
                    if w1 != 0:
                        h *= activate(shifted(read(near + 4 * e, one), s1, b1, unit, one), code, one)
                    if w3 != 0:
                        h *= shifted(read(near + 32 + 4 * e, one), s3, b3, unit, one)
                    write(near + 4 * e, h * read(s2 + 4 * unit, one) if s2 != 0 else h)
                rows_axpy(k, some, later, w2, target, outputs, near, kind)
                i += k
            for i in range(count if examples == 1 else 0, count):
                unit, mask = read_word(rows + 16 * i), read_word(rows + 16 * i + 8)
                soon = read_word(rows + 16 * min(i + 1, count - 1))
                at, later = unit * width * size, soon * width * size
                while mask != 0:
                    k, places = min(ones(mask), MOST), some_of(mask)
                    if w1 != 0:
                        row_dots(k, w1 + at, x, width * 4, places, width, w1 + later, near, kind)
                    if w3 != 0:
                        row_dots(k, w3 + at, x, width * 4, places, width, w3 + later, near + 16, kind)
                    for e in range(k):
                        b = (places >> (8 * e)) & 255
                        mask &= mask - 1
                        h = read(gate + (b * gates + unit // group) * 4, one)
                        if w1 != 0:
                            h *= activate(shifted(read(near + 4 * e, one), s1, b1, unit, one), code, one)
                        if w3 != 0:
                            h *= shifted(read(near + 16 + 4 * e, one), s3, b3, unit, one)
                        write(near + 4 * e, h * read(s2 + 4 * unit, one) if s2 != 0 else h)
                    row, following = w2 + unit * outputs * size, w2 + soon * outputs * size
                    row_axpy(k, row, target, outputs * 4, places, outputs, following, near, kind)

    return {kernel.__name__: kernel for kernel in (linear, ffn)}


narrow = g.Kernels(_make)
