"""Two to 64 examples in one pass over the rows, compiled by Numba. Import this module only to run them.

Units are taken in blocks of 64, the bits of a word. A unit's row is read once, from end to end as memory likes it, for
all of its examples, whose x stay in the second-level cache. The block's values stay near until its end: columns of a
large matrix share a few cache sets, so that writing them one by one would cost more than the products. For the next
layer the block's rows, near by then, are added up example by example, as many at a time as the processor has streams
for.
"""

from typing import Any

import numpy as np

from gatelet.kernels.backends.numba import gather as g
from gatelet.kernels.backends.numba import narrow_vector as n
from gatelet.kernels.backends.numba import vector as v
from gatelet.kernels.backends.numba.kernels import activate, compiled, open_word
from gatelet.kernels.backends.numba.narrow_kernels import THIRD, add_rows, shifted

MOST = n.MOST
EXAMPLES = 64
"""The most examples: the bits of a word."""
BITS, UNITS, LIST, VALUES = 256, 256 + 512, 256 + 1024, 256 + 1024 + 1024
"""Where a thread's memory holds, behind results of products: a block's bits by example, by unit, a list, and values."""
arguments, row_dots = g.arguments, n.row_dots
take, lowest, ones = v.take, v.lowest, v.ones
read, write, read_word, write_word, clear, copy = v.read, v.write, v.read_word, v.write_word, v.clear, v.copy


@compiled
def turn(words: Any) -> None:  # pragma: no cover (compiled)
    """Transpose the 64 × 64 bits at an address, in place: halves are exchanged, then quarters, and so on."""
    half, mask = 32, 0xFFFFFFFF
    while half != 0:
        for start in range(0, 64, 2 * half):
            for k in range(start, start + half):
                low, high = read_word(words + 8 * k), read_word(words + 8 * (k + half))
                moved = ((low >> half) ^ high) & mask
                write_word(words + 8 * (k + half), high ^ moved)
                write_word(words + 8 * k, low ^ (moved << half))
        half >>= 1
        mask ^= mask << half


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
def block(
    near: Any, gate: Any, word: Any, examples: Any, units: Any, group: Any, one: Any
) -> Any:  # pragma: no cover (compiled)
    """Write a word's bits in both orders, and list its open units with their examples; return how many."""
    either, gates = 0, units // group
    for b in range(examples):
        bits = open_word(gate + b * gates * 4, word, units, group, 4, one)
        write_word(near + BITS + 8 * b, bits)
        write_word(near + UNITS + 8 * b, bits)
        either |= bits
    if either == 0:
        return 0
    for b in range(examples, 64):
        write_word(near + UNITS + 8 * b, 0)
    turn(near + UNITS)
    count = 0
    while either != 0:
        place = lowest(either)
        either &= either - 1
        write_word(near + LIST + 16 * count, 64 * word + place)
        write_word(near + LIST + 16 * count + 8, read_word(near + UNITS + 8 * place))
        count += 1
    return count


@compiled
def add_block(
    near: Any, word: Any, b: Any, weight: Any, target: Any, width: Any, kind: Any, one: Any
) -> None:  # pragma: no cover (compiled)
    """Add the block's open rows of an example, times their values, to its row of sums."""
    bits, count = read_word(near + BITS + 8 * b), 0
    while bits != 0:
        place, at = lowest(bits), near + LIST + 16 * count
        write_word(at, 64 * word + place)
        write(at + 8, read(near + VALUES + 256 * b + 4 * place, one))
        bits &= bits - 1
        count += 1
    add_rows(near, near + LIST, count, weight, target, width, kind, one)


# Long: the kernels are nested functions, because Numba fixes their types and widths by what they close over.
def _make(kind: Any) -> dict[str, Any]:
    """Return the kernels, not yet compiled, for weights stored like ``kind``."""
    size, one = kind.itemsize, np.float32(1)

    def linear(p: Any) -> None:
        """out = act(x Wᵀ + bias) ∘ gate, zero where closed; a task is ``span`` words of units."""
        counter, x, weight, scales, bias, gate, out, examples, units, width, group, code, scratch, stride, span = (
            arguments(p, 15)
        )
        near = scratch + take(counter + 8) * stride
        words, gates = (units + 63) // 64, units // group
        while True:
            first = take(counter) * span
            if first >= words:
                break
            for word in range(first, min(first + span, words)):
                clear(near + VALUES, examples * 256)
                count = block(near, gate, word, examples, units, group, one)
                for i in range(count):
                    unit, mask = read_word(near + LIST + 16 * i), read_word(near + LIST + 16 * i + 8)
                    soon = read_word(near + LIST + 16 * min(i + 1, count - 1))
                    at, own = near + VALUES + 4 * (unit & 63), unit if group == 1 else unit // group
                    while mask != 0:
                        k, places = min(ones(mask), MOST), some_of(mask)
                        row_dots(
                            *(k, weight + unit * width * size, x, width * 4, places, width),
                            *(weight + soon * width * size, weight + unit * width * size, near, kind),
                        )
                        for e in range(k):
                            b = (places >> (8 * e)) & 255
                            mask &= mask - 1
                            z = activate(shifted(read(near + 4 * e, one), scales, bias, unit, one), code, one)
                            write(at + 256 * b, z * read(gate + (b * gates + own) * 4, one))
                begin = 64 * word
                for b in range(examples):
                    copy(out + (b * units + begin) * 4, near + VALUES + 256 * b, min(64, units - begin) * 4)

    def ffn(p: Any) -> None:
        """out[part] = Σ_n hidden[b, n] · W2[n] over the part's units; hidden = act(x W1ᵀ + b1) ∘ (x W3ᵀ + b3) ∘ gate.

        Without W3 its factor is left out; without W1 hidden is the gate.
        """
        # fmt: off
        (
            counter, x, w1, s1, b1, w3, s3, b3, gate, w2, s2, out, examples, units, width, outputs, group, code,
            scratch, stride, parts,
        ) = arguments(p, 21)
        # fmt: on
        near = scratch + take(counter + 8) * stride
        words, gates = (units + 63) // 64, units // group
        while True:
            part = take(counter)
            if part >= parts:
                break
            target = out + part * examples * outputs * 4
            clear(target, examples * outputs * 4)
            for word in range(part * words // parts, (part + 1) * words // parts):
                count = block(near, gate, word, examples, units, group, one)
                for i in range(count):
                    unit, mask = read_word(near + LIST + 16 * i), read_word(near + LIST + 16 * i + 8)
                    soon = read_word(near + LIST + 16 * min(i + 1, count - 1))
                    at, own = near + VALUES + 4 * (unit & 63), unit if group == 1 else unit // group
                    here, later = unit * width * size, soon * width * size
                    soon_2 = w2 + unit * outputs * size  # read when the block's values are known
                    factor = read(s2 + 4 * unit, one) if s2 != 0 else one
                    while mask != 0:
                        k, places = min(ones(mask), MOST), some_of(mask)
                        if w1 != 0:
                            row_dots(k, w1 + here, x, width * 4, places, width, w1 + later, soon_2, near, kind)
                        if w3 != 0:
                            row_dots(k, w3 + here, x, width * 4, places, width, w3 + later, soon_2, near + THIRD, kind)
                        for e in range(k):
                            b = (places >> (8 * e)) & 255
                            mask &= mask - 1
                            h = read(gate + (b * gates + own) * 4, one)
                            if w1 != 0:
                                h *= activate(shifted(read(near + 4 * e, one), s1, b1, unit, one), code, one)
                            if w3 != 0:
                                h *= shifted(read(near + THIRD + 4 * e, one), s3, b3, unit, one)
                            write(at + 256 * b, h * factor)
                if count != 0:
                    for b in range(examples):
                        add_block(near, word, b, w2, target + b * outputs * 4, outputs, kind, one)

    return {kernel.__name__: kernel for kernel in (linear, ffn)}


few = g.Kernels(_make)
