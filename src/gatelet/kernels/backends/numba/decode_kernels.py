"""One token through a feed-forward block in one pass, compiled by Numba. Import this module only to run them.

The kernel decides which units are open: by the first product alone, or by estimates of both products from int8 copies.
It does not read the other rows of closed units. Units are split into a fixed number of parts, each with its own sums.
"""

from typing import Any

import numpy as np

from gatelet.kernels.backends.numba import gather as g
from gatelet.kernels.backends.numba.kernels import compiled
from gatelet.kernels.backends.numba.narrow_kernels import (
    NEAR,
    ROWS,
    add_rows,
    arguments,
    clear,
    hidden_of,
    read,
    read_word,
    rows_dots,
    shifted,
    take,
    write,
    write_word,
)


@compiled
def numbered(target: Any, first: Any, last: Any) -> Any:  # pragma: no cover (compiled)
    """List the units ``first`` to ``last``, 16 bytes each; return how many."""
    for unit in range(first, last):
        write_word(target + 16 * (unit - first), unit)
    return last - first


@compiled
def keep(
    rows: Any, kept: Any, some: Any, k: Any, near: Any, scale: Any, limit: Any, one: Any
) -> Any:  # pragma: no cover (compiled)
    """List those of k units, with their numbers, whose scaled number is above the limit; return how many are kept."""
    for e in range(k):
        unit, a = read_word(some + 16 * e), read(near + 4 * e, one)
        if abs(a) * read(scale + 4 * unit, one) > limit:
            write_word(rows + 16 * kept, unit)
            write(rows + 16 * kept + 8, a)
            kept += 1
    return kept


# Long: the kernels are nested functions, because Numba fixes their types and widths by what they close over.
def _make(kind: Any) -> dict[str, Any]:
    """Return the kernels, not yet compiled, for weights stored like ``kind``."""
    one, byte = np.float32(1), np.int8(1)

    def by_itself(p: Any) -> None:
        """out[part] = Σ_n hidden_n · W2[n] over the part's units that are open.

        First a list: with a = act(W1 x + b1), unit n is listed if scale_n·|a_n| > limits[0]. Then, for listed units
        only, hidden_n = a_n·(W3 x + b3)_n; unit n is open if norm_n·|hidden_n| > limits[1]. Without W3 hidden is a.

        With ``near_1`` and ``near_3``, int8 copies of W1 and W3 (their scales are ``sn`` and ``sm``), the list is made
        from the copies: unit n is listed if scale_n·|hidden_n|, computed from them, is above limits[0]. Then a_n,
        too, is computed exactly for listed units only.
        """
        # fmt: off
        (
            counter, x, w1, s1, b1, w3, s3, b3, near_1, sn, near_3, sm, scale, norm, limits, w2, s2, out, units, width,
            outputs, code, scratch, stride, parts,
        ) = arguments(p, 25)
        # fmt: on
        words = (units + 63) // 64
        while True:
            part = take(counter)
            if part >= parts:
                break
            near, target = scratch + part * stride, out + part * outputs * 4
            clear(target, outputs * 4)
            rows = near + NEAR * 4
            count = numbered(rows, 64 * (part * words // parts), min(64 * ((part + 1) * words // parts), units))
            kept, i = 0, 0
            while i < count:
                k = min(ROWS, count - i)
                some, later = rows + 16 * i, rows + 16 * min(i + ROWS, count - k)
                if near_1 != 0:
                    hidden_of(near, k, some, later, x, width, near_1, sn, b1, near_3, sm, b3, code, byte, one)
                else:
                    hidden_of(near, k, some, later, x, width, w1, s1, b1, 0, 0, 0, code, kind, one)
                kept = keep(rows, kept, some, k, near, scale, read(limits, one), one)
                i += k
            count, kept, i = kept, 0, 0
            while i < count:
                k = min(ROWS, count - i)
                some, later = rows + 16 * i, rows + 16 * min(i + ROWS, count - k)
                if near_1 != 0:
                    hidden_of(near, k, some, later, x, width, w1, s1, b1, w3, s3, b3, code, kind, one)
                else:
                    hidden_of(near, k, some, later, x, width, 0, 0, 0, w3, s3, b3, code, kind, one)
                    for e in range(k):
                        write(near + 4 * e, read(near + 4 * e, one) * read(some + 16 * e + 8, one))
                kept = keep(rows, kept, some, k, near, norm, read(limits + 4, one), one)
                i += k
            for i in range(kept if s2 != 0 else 0):
                at = rows + 16 * i
                write(at + 8, read(at + 8, one) * read(s2 + 4 * read_word(at), one))
            add_rows(near, rows, kept, w2, target, outputs, kind, one)

    def by_input(p: Any) -> None:
        """out[part] = Σ_d x_d · W[d] over the part's inputs d of which |x_d|·norm_d > limits[0]; W is (D, N)."""
        counter, x, w, s, norm, limits, out, width, outputs, scratch, stride, parts = arguments(p, 12)
        words = (width + 63) // 64
        while True:
            part = take(counter)
            if part >= parts:
                break
            near, target = scratch + part * stride, out + part * outputs * 4
            clear(target, outputs * 4)
            rows, kept = near + NEAR * 4, 0
            for d in range(64 * (part * words // parts), min(64 * ((part + 1) * words // parts), width)):
                value = read(x + 4 * d, one)
                if abs(value) * read(norm + 4 * d, one) > read(limits, one):
                    write_word(rows + 16 * kept, d)
                    write(rows + 16 * kept + 8, value * read(s + 4 * d, one) if s != 0 else value)
                    kept += 1
            add_rows(near, rows, kept, w, target, outputs, kind, one)

    def full(p: Any) -> None:
        """out = x Wᵀ + b, all rows."""
        counter, x, w, s, b, out, units, width, scratch, stride, parts = arguments(p, 11)
        words = (units + 63) // 64
        while True:
            part = take(counter)
            if part >= parts:
                break
            near = scratch + part * stride
            rows = near + NEAR * 4
            unit, last = 64 * (part * words // parts), min(64 * ((part + 1) * words // parts), units)
            while unit < last:
                k = min(ROWS, last - unit)
                numbered(rows, unit, min(unit + 2 * ROWS, last))
                rows_dots(k, rows, rows + 16 * min(ROWS, last - unit - k), w, x, width, near, kind)
                for e in range(k):
                    write(out + 4 * (unit + e), shifted(read(near + 4 * e, one), s, b, unit + e, one))
                unit += k

    return {kernel.__name__: kernel for kernel in (by_itself, by_input, full)}


decode = g.Kernels(_make)
