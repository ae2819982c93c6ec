"""One token through a feed-forward block with a gater network, in one pass. Import this module only to run it.

For one token, the time is that of reading the gater's weights and the rows of open units. So gater, comparison,
products and sums are one kernel, with no return to Python and no intermediate result in memory.

Every thread computes the gater's hidden layer, because waiting for another thread would take longer. Units are split
into a fixed number of parts, each with its own sums, so results do not depend on the order of threads.
"""

import math
from typing import Any

import numpy as np

from gatelet.kernels.backends.numba import gather as g
from gatelet.kernels.backends.numba import narrow_vector as n
from gatelet.kernels.backends.numba import vector as v
from gatelet.kernels.backends.numba.kernels import compiled
from gatelet.kernels.backends.numba.narrow_kernels import NEAR, hidden_of, shifted

ROWS = n.ROWS
LIST = NEAR * 4
"""Offset of the list of units in the memory of a thread or part, behind the results of products."""
COUNT = LIST - 8
"""Offset of the number of these units."""
HIDDEN = LIST + 2 * ROWS * 16
"""Offset of the gater's hidden layer in the memory of a thread."""
SAMPLES = 8
"""How many numbers of W2's copy each part compares with the original."""
arguments, rows_dots, rows_axpy, take = g.arguments, n.rows_dots, n.rows_axpy, v.take
read, write, read_word, write_word, clear, copy = v.read, v.write, v.read_word, v.write_word, v.clear, v.copy


@compiled
def all_rows(
    near: Any, first: Any, last: Any, weight: Any, x: Any, width: Any, kind: Any
) -> Any:  # pragma: no cover (compiled)
    """Write ⟨row, x⟩ to ``near`` for the rows from ``first``, at most ROWS and to ``last``; return how many."""
    k = min(ROWS, last - first)
    ahead = min(ROWS, last - first - k)
    for e in range(k + ahead):
        write_word(near + LIST + 16 * e, first + e)
    rows_dots(k, near + LIST, near + LIST + 16 * ahead, weight, x, width, near, kind)
    return k


@compiled
def bottleneck(
    near: Any, x: Any, weight: Any, bias: Any, width: Any, count: Any, one: Any
) -> Any:  # pragma: no cover (compiled)
    """Write the gater's hidden layer; return the sum of its affine map, which is not finite if x is not."""
    total, i = one * 0, 0
    while i < count:
        k = all_rows(near, i, count, weight, x, width, one)
        for e in range(k):
            z = shifted(read(near + 4 * e, one), 0, bias, i + e, one)
            total += z
            write(near + HIDDEN + 4 * (i + e), math.tanh(z))
        i += k
    return total


@compiled
def opened_units(
    rows: Any, near: Any, first: Any, last: Any, weight: Any, bias: Any, count: Any, limit: Any, one: Any
) -> Any:  # pragma: no cover (compiled)
    """List the units ``first`` to ``last`` with a logit above the limit; return how many, and the logits' sum."""
    total, found, unit = one * 0, 0, first
    while unit < last:
        k = all_rows(near, unit, last, weight, near + HIDDEN, count, one)
        for e in range(k):
            z = shifted(read(near + 4 * e, one), 0, bias, unit + e, one)
            total += z
            write_word(rows + 16 * found, unit + e)  # always listed; overwritten by the next unit if it is closed
            found += 1 if z > limit else 0
        unit += k
    return found, total


@compiled
def still_copied(
    given: Any, copied: Any, units: Any, outputs: Any, part: Any, parts: Any, one: Any
) -> Any:  # pragma: no cover (compiled)
    """Whether the copy (N, O) still equals the matrix (O, N), judged by a few numbers spread over both."""
    for i in range(part * SAMPLES, (part + 1) * SAMPLES):
        unit = i * units // (parts * SAMPLES)
        output = (i * 7919) % outputs
        a, b = read(copied + 4 * (unit * outputs + output), one), read(given + 4 * (output * units + unit), one)
        if a != b and (a == a or b == b):
            return False
    return True


def _make(kind: Any) -> dict[str, Any]:
    """Return the kernel, not yet compiled, for weights stored like ``kind``; the gater's are float32."""
    one = np.float32(1)

    def by_network(p: Any) -> None:
        """out = Σ_n hidden_n · W2[n] + b2 over the units with ⟨V[n], tanh(U x + c)⟩ + d_n > threshold.

        hidden = act(W1 x + b1), times W3 x + b3 if there is a W3. For open units ``gates`` is set to 1 and ``opened``
        grows by 1. If a sum is not finite, the threshold is NaN, or W2 no longer equals ``given``, ``failed`` becomes 1
        and nothing is counted.
        """
        # fmt: off
        (
            counter, failed, done, x, u, c, v, d, threshold, w1, b1, w3, b3, w2, given, b2, out, gates, opened,
            width, middle, units, outputs, code, scratch, stride, parts,
        ) = arguments(p, 27)
        # fmt: on
        failed, done = counter + 16, counter + 24
        sums = scratch + parts * stride
        thread = sums + parts * outputs * 4 + take(counter + 8) * (HIDDEN + (middle + 15) // 16 * 64)
        limit, wrong = read(threshold, one), 0
        if not math.isfinite(bottleneck(thread, x, u, c, width, middle, one)) or limit != limit:
            wrong = 1
        words = (units + 63) // 64
        while True:
            part = take(counter)
            if part >= parts:
                break
            near, target = scratch + part * stride, sums + part * outputs * 4
            clear(target, outputs * 4)
            first, last = 64 * (part * words // parts), min(64 * ((part + 1) * words // parts), units)
            count, total = opened_units(near + LIST, thread, first, last, v, d, middle, limit, one)
            write_word(near + COUNT, count)
            if not math.isfinite(total) or (
                given != 0 and not still_copied(given, w2, units, outputs, part, parts, one)
            ):
                wrong = 1
            i = 0
            while i < count:
                k = min(ROWS, count - i)
                some, later = near + LIST + 16 * i, near + LIST + 16 * min(i + ROWS, count - k)
                hidden_of(near, k, some, later, x, width, w1, 0, b1, w3, 0, b3, code, kind, one)
                rows_axpy(k, some, later, w2, target, outputs, near, kind)
                i += k
            if wrong != 0:
                write_word(failed, 1)
            if take(done) == parts - 1:  # the last part adds up all
                finish(scratch, stride, parts, sums, b2, out, outputs, gates, opened, units, read_word(failed), one)

    return {"by_network": by_network}


@compiled
def finish(
    scratch: Any,
    stride: Any,
    parts: Any,
    sums: Any,
    bias: Any,
    out: Any,
    outputs: Any,
    gates: Any,
    opened: Any,
    units: Any,
    failed: Any,
    one: Any,
) -> None:  # pragma: no cover (compiled)
    """Add up the parts' sums; write the gates, and count the open units."""
    if bias != 0:
        copy(out, bias, outputs * 4)
    else:
        clear(out, outputs * 4)
    clear(gates, units * 4)
    for part in range(parts):
        near = scratch + part * stride
        write_word(near, 0)
        write(near + 32, one)
        rows = near + LIST
        for i in range(read_word(near + COUNT)):
            unit = read_word(rows + 16 * i)
            write(gates + 4 * unit, one)
            if failed == 0:
                write_word(opened + 8 * unit, read_word(opened + 8 * unit) + 1)
        rows_axpy(1, near, near, sums + part * outputs * 4, out, outputs, near + 32, one)


network = g.Kernels(_make)
