"""One example and weights of few bytes, compiled by Numba. Import this module only to run them.

Most of the time goes into reading the rows of the open units. So rows are stored in few bytes (float32, bfloat16, or
int8 with a scale per row) and each is read once, eight at a time, because a processor can follow about that many
streams. Rows of few bytes are prefetched, because the processor does not predict them in time. Numbers are multiplied
and added as float32.

Units are split into a fixed number of parts, each with its own sums, so results do not depend on the order of threads.
"""

from typing import Any

import numpy as np

from gatelet.kernels.backends.numba import gather as g
from gatelet.kernels.backends.numba import narrow_vector as n
from gatelet.kernels.backends.numba import vector as v
from gatelet.kernels.backends.numba.kernels import activate, compiled, open_word

ROWS = n.ROWS
NEAR = 64
"""Numbers of a part's scratch memory before its list of units."""
THIRD = 32
"""Bytes of them before the products with a third map."""
arguments, rows_dots, rows_axpy, take, lowest = g.arguments, n.rows_dots, n.rows_axpy, v.take, v.lowest
widen, round_to_half = n.widen, n.round_to_half
read, write, read_word, write_word, clear = v.read, v.write, v.read_word, v.write_word, v.clear


@compiled
def listed(
    target: Any, gate: Any, units: Any, group: Any, first: Any, last: Any, one: Any
) -> Any:  # pragma: no cover (compiled)
    """List the open units of words ``first`` to ``last``, 16 bytes each; return how many."""
    count = 0
    for word in range(first, last):
        bits = open_word(gate, word, units, group, 4, one)
        while bits != 0:
            write_word(target + 16 * count, 64 * word + lowest(bits))
            bits &= bits - 1
            count += 1
    return count


@compiled
def evenly(left: Any) -> Any:  # pragma: no cover (compiled)
    """Return how many of the rows that are left are taken together: at most ROWS, and no single row at the end."""
    turns = (left + ROWS - 1) // ROWS
    return (left + turns - 1) // turns


@compiled
def shifted(z: Any, scales: Any, bias: Any, unit: Any, one: Any) -> Any:  # pragma: no cover (compiled)
    """Return a product with its row's scale and bias."""
    if scales != 0:
        z *= read(scales + 4 * unit, one)
    return z + read(bias + 4 * unit, one) if bias != 0 else z


@compiled
def hidden_of(
    near: Any,
    k: Any,
    some: Any,
    later: Any,
    x: Any,
    width: Any,
    w1: Any,
    s1: Any,
    b1: Any,
    w3: Any,
    s3: Any,
    b3: Any,
    code: Any,
    kind: Any,
    one: Any,
) -> None:  # pragma: no cover (compiled)
    """Write act(W1 x + b1) ∘ (W3 x + b3) of k listed units, at most ROWS; a factor without weights is left out."""
    if w1 != 0:
        rows_dots(k, some, later, w1, x, width, near, kind)
    if w3 != 0:
        rows_dots(k, some, later, w3, x, width, near + THIRD, kind)
    for e in range(k):
        unit, h = read_word(some + 16 * e), one
        if w1 != 0:
            h = activate(shifted(read(near + 4 * e, one), s1, b1, unit, one), code, one)
        if w3 != 0:
            h *= shifted(read(near + THIRD + 4 * e, one), s3, b3, unit, one)
        write(near + 4 * e, h)


@compiled
def add_rows(
    near: Any, rows: Any, count: Any, weight: Any, target: Any, width: Any, kind: Any, one: Any
) -> None:  # pragma: no cover (compiled)
    """Add the listed rows, each times the number that stands behind it in the list."""
    i = 0
    while i < count:
        k = evenly(count - i)
        some, later = rows + 16 * i, rows + 16 * min(i + k, count - k)
        for e in range(k):
            write(near + 4 * e, read(some + 16 * e + 8, one))
        rows_axpy(k, some, later, weight, target, width, near, kind)
        i += k


# Long: the kernels are nested functions, because Numba fixes their types and widths by what they close over.
def _make(kind: Any) -> dict[str, Any]:
    """Return the kernels, not yet compiled, for weights stored like ``kind``."""
    one = np.float32(1)

    def linear(p: Any) -> None:
        """out = act(x Wᵀ + bias) ∘ gate, zero where closed; a task is a part of the units.

        With ``half`` x, bias, gate and out are bfloat16: behind a part's list are float32 copies of what it reads and
        writes.
        """
        # fmt: off
        (
            counter, x, weight, scales, bias, gate, out, units, width, group, code, half, scratch, stride, parts,
        ) = arguments(p, 15)
        # fmt: on
        words, whole = (units + 63) // 64, out
        own = NEAR * 4 + 16 * 64 * ((words + parts - 1) // parts)
        read_x, read_bias, read_gate = x, bias, gate
        while True:
            part = take(counter)
            if part >= parts:
                break
            near = scratch + part * stride
            first, last = part * words // parts, (part + 1) * words // parts
            n0, n1 = 64 * first, min(64 * last, units)
            if half != 0 and n0 < n1:
                x, free = near + own, near + own + 4 * width
                widen(x, read_x, width)
                g0, g1 = n0 // group, (n1 - 1) // group + 1
                widen(free, read_gate + 2 * g0, g1 - g0)
                gate, free = free - 4 * g0, free + 4 * (g1 - g0)
                if bias != 0:
                    widen(free, read_bias + 2 * n0, n1 - n0)
                    bias, free = free - 4 * n0, free + 4 * (n1 - n0)
                out = free - 4 * n0
            clear(out + n0 * 4, (n1 - n0) * 4)
            rows = near + NEAR * 4
            count = listed(rows, gate, units, group, first, last, one)
            i = 0
            while i < count:
                k = evenly(count - i)
                some, later = rows + 16 * i, rows + 16 * min(i + k, count - k)
                hidden_of(near, k, some, later, x, width, weight, scales, bias, 0, 0, 0, code, kind, one)
                for e in range(k):
                    unit = read_word(some + 16 * e)
                    write(out + unit * 4, read(near + 4 * e, one) * read(gate + unit // group * 4, one))
                i += k
            if half != 0 and n0 < n1:
                round_to_half(whole + 2 * n0, out + 4 * n0, n1 - n0)

    def ffn(p: Any) -> None:
        """out[part] = Σ_n hidden_n · W2[n] over the part's units; hidden = act(x W1ᵀ + b1) ∘ (x W3ᵀ + b3) ∘ gate.

        Without W3 its factor is left out; without W1 hidden is the gate.
        """
        # fmt: off
        (
            counter, x, w1, s1, b1, w3, s3, b3, gate, w2, s2, out, units, width, outputs, group, code,
            scratch, stride, parts,
        ) = arguments(p, 20)
        # fmt: on
        words = (units + 63) // 64
        while True:
            part = take(counter)
            if part >= parts:
                break
            near, target = scratch + part * stride, out + part * outputs * 4
            clear(target, outputs * 4)
            rows = near + NEAR * 4
            count = listed(rows, gate, units, group, part * words // parts, (part + 1) * words // parts, one)
            i = 0
            while i < count:
                k = evenly(count - i)
                some, later = rows + 16 * i, rows + 16 * min(i + k, count - k)
                hidden_of(near, k, some, later, x, width, w1, s1, b1, w3, s3, b3, code, kind, one)
                for e in range(k):
                    unit = read_word(some + 16 * e)
                    h = read(near + 4 * e, one) * read(gate + unit // group * 4, one)
                    write(near + 4 * e, h * read(s2 + 4 * unit, one) if s2 != 0 else h)
                rows_axpy(k, some, later, w2, target, outputs, near, kind)
                i += k

    return {kernel.__name__: kernel for kernel in (linear, ffn)}


narrow = g.Kernels(_make)
