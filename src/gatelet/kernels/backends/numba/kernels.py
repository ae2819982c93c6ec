"""The sparse products all ops are made of, compiled by Numba. Import this module only to run them.

Three products on a pattern of open (example, unit) pairs, with x (B, D), W (N, D) and a coefficient C (B, N):

``dots``         z[b, n] = ⟨x[b], W[n]⟩ at open pairs: the forward pass, and the gradient of a hidden layer;
``by_example``   y[b] = Σ_n C[b, n] W[n] over open n: the gradient of x, and the next affine layer;
``by_unit``      V[n] = Σ_b C[b, n] x[b] over open b: the gradient of the weights.

A pair costs D multiply-adds. Random pairs share nothing, so each multiply-add needs at least one loaded vector, and
the speed depends on where that vector comes from. Examples are taken in chunks of 64 (the bits of a word) and rows in
slices of 512 bytes: such a block stays in the first-level cache while all units pass over it. Blocks and the sums of
rows are packed, because rows whose distance is a power of two would share a few cache sets.

Pairs are listed first (``listed``): a record holds a unit and up to eight of its examples in the chunk. A kernel keeps
one running sum per pair of a record in registers, and loads a weight once for all of them. Records are ordered by size,
and each size has its own code: a loop over the bits of a word would end at a point the processor cannot predict.

``pointwise`` does the rest at open pairs: gates, activations and their gradients.
"""

import inspect
import math
from typing import Any

import numpy as np
from numba import njit

from gatelet.kernels.backends.numba import gather
from gatelet.kernels.backends.numba import vector as v

SLICE, VECTOR, RECORD, MOST, ALONE = v.SLICE, v.VECTOR, v.RECORD, v.MOST, 1 << v.ALONE
RUNS = 128
"""Bytes that say where the records of each size start."""
WORDS = 16
"""Words of units that are listed at once for ``by_example``."""
# Numba's cache needs these as globals of this module.
dot, axpy, gated, prefetch = v.dot, v.axpy, v.gated, v.prefetch
TILE, tile, tile41, tile11 = v.TILE, v.tile, v.tile41, v.tile11
nonzero_bits, lowest, take = v.nonzero_bits, v.lowest, v.take
read, write, read_word, write_word = v.read, v.write, v.read_word, v.write_word
read_index, write_index = v.read_index, v.write_index
clear, copy, ones = v.clear, v.copy, v.ones
arguments = gather.arguments

P = (
    1.1283791461557542,
    0.19040666570794865,
    0.05274875562965499,
    0.00376562702935509,
    2.8488321429e-4,
    2.05008926302e-6,
)
Q = (1.0, 0.5020762548661959, 0.11410919950549765, 0.014969236765898286, 0.001162538430056847, 3.8091760959976094e-5)


def compiled(function: Any) -> Any:
    """Numba's decorator, on the function itself: a run-time type checker may have wrapped it."""
    return njit(error_model="numpy", boundscheck=False)(inspect.unwrap(function))


@compiled
def normal(z: Any, one: Any) -> Any:  # pragma: no cover (compiled)
    """Return Φ(z) = ½ (1 + erf(z/√2)), in float64; as exact as ``one``'s type needs."""
    x = z * 0.7071067811865476
    if type_as(1 + 1e-12, one) != 1:  # float64
        return 0.5 * (1 + math.erf(x))
    if x < -3.92:
        return 0.0
    if x > 3.92:
        return 1.0
    # erf(x)/x as a ratio of polynomials in x², fitted to a relative error of 2e-8 up to |x| = 3.92; beyond, erf is 1 in
    # float32. It takes a third of the time of the library's erf, which would be a seventh of a layer's time.
    u = x * x
    upper, lower = P[5], Q[5]
    for k in range(4, -1, -1):
        upper, lower = upper * u + P[k], lower * u + Q[k]
    return 0.5 + 0.5 * x * upper / lower


@compiled
def activate(z: Any, code: Any, one: Any) -> Any:  # pragma: no cover (compiled)
    """Return the activation of z."""
    if code == 1:
        return z if z > 0 or z != z else one - one
    if code == 2:
        return type_as(z * normal(z, one), one)
    if code == 3:
        return type_as(z / (1 + math.exp(-z)), one)
    return z


@compiled
def slope(z: Any, code: Any, one: Any) -> Any:  # pragma: no cover (compiled)
    """Return the derivative of the activation at z."""
    if code == 1:
        return one if z > 0 else one - one
    if code == 2:
        return type_as(normal(z, one) + z * 0.3989422804014327 * math.exp(-0.5 * z * z), one)
    if code == 3:
        s = 1 / (1 + math.exp(-z))
        return type_as(s * (1 + z * (1 - s)), one)
    return one


@compiled
def type_as(value: Any, one: Any) -> Any:  # pragma: no cover (compiled)
    """Return the number in the type of ``one``."""
    return type(one)(value)


@compiled
def open_word(row: Any, word: Any, N: Any, group: Any, size: Any, one: Any) -> Any:  # pragma: no cover (compiled)
    """Return the open units 64·word ... 64·word + 63 of an example, from its row of gates."""
    first = 64 * word
    if group == 1 and first + 64 <= N:
        return nonzero_bits(row + first * size, one)
    bits = 0
    last = min(first + 64, N)
    n = first
    while n < last:  # one gate at a time; its units may begin before the word and end after it
        end = min((n // group + 1) * group, last)
        if read(row + (n // group) * size, one) != 0:
            if end - n == 64:
                bits = -1
            else:
                bits |= ((1 << (end - n)) - 1) << (n - first)
        n = end
    return bits


@compiled
def transpose(words: Any) -> None:  # pragma: no cover (compiled)
    """Transpose a 64 × 64 matrix of bits in place: exchange halves, then quarters, and so on."""
    half = 32
    mask = 0xFFFFFFFF
    while half != 0:
        for start in range(0, 64, 2 * half):
            for k in range(start, start + half):
                moved = ((words[k] >> half) ^ words[k + half]) & mask
                words[k + half] ^= moved
                words[k] ^= moved << half
        half >>= 1
        mask ^= mask << half


@compiled
def build(
    gate: Any, rows: Any, cols: Any, word0: Any, word1: Any, c: Any, B: Any, N: Any, group: Any, size: Any, one: Any
) -> None:  # pragma: no cover (compiled)
    """Write blocks of 64 × 64 pairs in both orders: words ``word0`` to ``word1`` of the examples of chunk ``c``."""
    words, chunks, gates = (N + 63) // 64, (B + 63) // 64, N // group
    block = np.empty((8, 64), np.int64)
    b0, b1 = 64 * c, min(64 * c + 64, B)
    for start in range(word0, word1, 8):
        end = min(start + 8, word1)
        for b in range(b0, b1):  # along an example's gates, in the order of memory
            for word in range(start, end):
                bits = open_word(gate + b * gates * size, word, N, group, size, one)
                block[word - start, b - b0] = bits
                if rows != 0:
                    write_word(rows + (b * words + word) * 8, bits)
        for word in range(start, end):
            for b in range(b1 - b0, 64):
                block[word - start, b] = 0
            transpose(block[word - start])
            for n in range(64 * word, min(64 * word + 64, N)):
                write_word(cols + (n * chunks + c) * 8, block[word - start, n - 64 * word])


@compiled
def listed(
    records: Any, runs: Any, table: Any, pitch: Any, first: Any, last: Any
) -> Any:  # pragma: no cover (compiled)
    """List the pairs of some words, every ``pitch``-th of a table; return how many records there are.

    A record is the word's number and up to MOST of its bits, a byte each. Records are ordered by size, and ``runs``
    says where each size starts. A word with more bits is split evenly into several records.
    """
    starts = np.zeros(MOST + 2, np.int64)
    for i in range(first, last):
        bits = ones(read_word(table + i * pitch * 8))
        if bits != 0:
            parts = (bits + MOST - 1) // MOST
            size = bits // parts
            longer = bits - size * parts
            starts[size] += parts - longer
            if longer != 0:
                starts[size + 1] += longer
    count = 0
    for size in range(MOST + 2):
        count += starts[size]
        starts[size] = count - starts[size]
        write_word(runs + 8 * size, starts[size])
    for i in range(first, last):
        word = read_word(table + i * pitch * 8)
        bits = ones(word)
        if bits == 0:
            continue
        parts = (bits + MOST - 1) // MOST
        named = i | ALONE if parts == 1 else i
        while parts != 0:
            size = bits // parts
            packed = 0
            for place in range(size):
                packed |= lowest(word) << (8 * place)
                word &= word - 1
            at = records + starts[size] * RECORD
            starts[size] += 1
            write_word(at, named)
            write_word(at + 8, packed)
            bits -= size
            parts -= 1
    return count


@compiled
def slicing(D: Any, lanes: Any, span: Any) -> Any:  # pragma: no cover (compiled)
    """Return how many slices D has, and the numbers in each: whole vectors, spread evenly over the slices."""
    vectors = (D + lanes - 1) // lanes
    slices = (vectors * lanes + span - 1) // span
    if slices == 0:
        return 0, lanes
    each = (vectors + slices - 1) // slices
    return (vectors + each - 1) // each, each * lanes


@compiled
def lengths(left: Any, each: Any, size: Any) -> Any:  # pragma: no cover (compiled)
    """Return the bytes of whole vectors in a slice of ``each`` numbers, of which ``left`` are left, and the rest."""
    lanes, count = VECTOR // size, min(left, each)
    return count // lanes * VECTOR, count % lanes


@compiled
def dot_chunks(
    records: Any,
    runs: Any,
    chunks: Any,
    w: Any,
    pitch: Any,
    block: Any,
    stride: Any,
    length: Any,
    rest: Any,
    sums: Any,
    size: Any,
    one: Any,
) -> None:  # pragma: no cover (compiled)
    """Add a slice's products to the sums of the records of some chunks of 64 examples; arguments are as in ``dot``."""
    total = 0
    for c in range(chunks):
        start = runs + c * RUNS
        for k in range(1, MOST + 1):
            i = read_word(start + 8 * k)
            count = read_word(start + 8 * k + 8) - i
            i += total
            if count != 0:
                dot(
                    *(k, records + i * RECORD, count, w, pitch, block + 64 * c * stride, stride, length, rest),
                    *(sums + i * MOST * size, one),
                )
        total += read_word(start + 8 * (MOST + 1))


@compiled
def axpy_sizes(
    start: Any,
    before: Any,
    records: Any,
    target: Any,
    pitch: Any,
    block: Any,
    stride: Any,
    length: Any,
    rest: Any,
    scales: Any,
    fresh: Any,
    size: Any,
    one: Any,
) -> None:  # pragma: no cover (compiled)
    """Add a slice's rows for the records whose runs are at ``start``, behind ``before`` others; as in ``axpy``."""
    for k in range(1, MOST + 1):
        i = read_word(start + 8 * k)
        count = read_word(start + 8 * k + 8) - i
        i += before
        if count != 0:
            axpy(
                *(k, records + i * RECORD, count, target, pitch, block, stride, length, rest),
                *(scales + i * MOST * size, fresh, one),
            )


@compiled
def put_rows(
    start: Any,
    before: Any,
    records: Any,
    sums: Any,
    bias: Any,
    gate: Any,
    out: Any,
    pre: Any,
    near: Any,
    near_pre: Any,
    first: Any,
    last: Any,
    n0: Any,
    n1: Any,
    N: Any,
    group: Any,
    code: Any,
    size: Any,
    one: Any,
) -> None:  # pragma: no cover (compiled)
    """Write a block's results, zero at closed pairs, for examples ``first`` to ``last`` and units ``n0`` to ``n1``.

    Columns of a large matrix share cache sets, so results are put into a small copy of the block first. Gates are read
    by rows, in whole vectors, unless units share a gate.
    """
    wide, gates = (n1 - n0) * size, N // group
    clear(near, (last - first) * wide)
    if pre != 0 and code != 0:
        clear(near_pre, (last - first) * wide)
    for k in range(1, MOST + 1):
        for i in range(before + read_word(start + 8 * k), before + read_word(start + 8 * k + 8)):
            n, places = read_word(records + i * RECORD) & (ALONE - 1), read_word(records + i * RECORD + 8)
            add = read(bias + (n0 + n) * size, one) if bias != 0 else one - one
            for e in range(k):
                at = n * size + (places & 255) * wide
                places >>= 8
                z = read(sums + (i * MOST + e) * size, one) + add
                if code != 0:
                    if pre != 0:
                        write(near_pre + at, z)
                    z = activate(z, code, one)
                write(near + at, z)
    for b in range(first, last):
        source, here = near + (b - first) * wide, (b * N + n0) * size
        if pre != 0:
            copy(pre + here, source if code == 0 else near_pre + (b - first) * wide, wide)
        if gate != 0 and group == 1:
            gated(out + here, source, gate + here, n1 - n0, one)
            continue
        if gate != 0:
            for n in range(n0, n1):
                h = read(gate + (b * gates + n // group) * size, one)
                at = source + (n - n0) * size
                write(at, read(at, one) * h if h != 0 else one - one)
        copy(out + here, source, wide)


@compiled
def put_pairs(
    start: Any,
    before: Any,
    records: Any,
    sums: Any,
    bias: Any,
    gate: Any,
    out: Any,
    pre: Any,
    near: Any,
    first: Any,
    last: Any,
    n0: Any,
    n1: Any,
    N: Any,
    group: Any,
    code: Any,
    size: Any,
    one: Any,
) -> None:  # pragma: no cover (compiled)
    """Write a block's results at open pairs alone; arguments are as in ``put_rows``."""
    wide, gates = (n1 - n0) * size, N // group
    if gate != 0 and group == 1:
        for b in range(first, last):
            copy(near + (b - first) * wide, gate + (b * N + n0) * size, wide)
    for k in range(1, MOST + 1):
        for i in range(before + read_word(start + 8 * k), before + read_word(start + 8 * k + 8)):
            n, places = read_word(records + i * RECORD) & (ALONE - 1), read_word(records + i * RECORD + 8)
            add = read(bias + (n0 + n) * size, one) if bias != 0 else one - one
            for e in range(k):
                b = (places >> (8 * e)) & 255
                z = read(sums + (i * MOST + e) * size, one) + add
                at = ((first + b) * N + n0 + n) * size
                if pre != 0:
                    write(pre + at, z)
                z = activate(z, code, one)
                if gate != 0:
                    far = gate + ((first + b) * gates + (n0 + n) // group) * size
                    h = read(near + n * size + b * wide if group == 1 else far, one)
                    z = z * h if h != 0 else one - one
                write(out + at, z)


@compiled
def list_words(
    records: Any,
    scales: Any,
    runs: Any,
    rows: Any,
    C: Any,
    words: Any,
    height: Any,
    count: Any,
    N: Any,
    size: Any,
    one: Any,
) -> None:  # pragma: no cover (compiled)
    """List the pairs of ``count`` words of units and ``height`` examples, and the coefficient of each pair.

    ``rows`` and ``C`` are where the first word's bits and coefficients of the first example are.
    """
    have = 0
    for word in range(count):
        start = runs + word * RUNS
        found = listed(records + have * RECORD, start, rows + word * 8, words, 0, height)
        for k in range(1, MOST + 1):
            for i in range(have + read_word(start + 8 * k), have + read_word(start + 8 * k + 8)):
                b, places = read_word(records + i * RECORD) & (ALONE - 1), read_word(records + i * RECORD + 8)
                c = C + (b * N + 64 * word) * size
                for e in range(k):
                    write(scales + (i * MOST + e) * size, read(c + ((places >> (8 * e)) & 255) * size, one))
        have += found


@compiled
def copy_block(
    near: Any, stride: Any, block: Any, pitch: Any, count: Any, size: Any
) -> None:  # pragma: no cover (compiled)
    """Copy ``size`` bytes of ``count`` rows; meanwhile those of the next 64 rows are prefetched."""
    ahead = block + 64 * pitch
    for n in range(count):
        copy(near + n * stride, block + n * pitch, size)
        for line in range(0, stride, 64):
            prefetch(ahead + n * pitch + line)


# Long: the kernels are nested functions, because Numba fixes their types and widths by what they close over.
def _kernels(one: Any) -> dict[str, Any]:
    """Return the kernels, not yet compiled, for numbers of the type of ``one``."""
    size = one.itemsize
    lanes = VECTOR // size
    span = SLICE // size  # numbers in a slice of a row of sums
    zero = one * 0

    def pattern(p: Any) -> None:
        counter, gate, rows, cols, B, N, group = arguments(p, 7)
        words, chunks = (N + 63) // 64, (B + 63) // 64
        while True:
            t = take(counter)
            c, word = t % chunks, t // chunks * 16
            if word >= words:
                break
            build(gate, rows, cols, word, min(word + 16, words), c, B, N, group, size, one)

    def pack(p: Any) -> None:
        """Copy x (B, D) into slices: blocks of B rows, the last ones padded with zeros."""
        counter, x, packed, B, D, most_bytes = arguments(p, 6)
        slices, each = slicing(D, lanes, most_bytes // size)
        while True:
            b0 = take(counter) * 16
            if b0 >= B:
                break
            for b in range(b0, min(b0 + 16, B)):
                for s in range(slices):
                    count = min(each, D - s * each)
                    target = packed + (s * B + b) * each * size
                    copy(target, x + (b * D + s * each) * size, count * size)
                    if count < each:
                        clear(target + count * size, (each - count) * size)

    def dots(p: Any) -> None:
        """Pattern (unless given), products, then bias, activation and gate; a task is some units × examples."""
        # fmt: off
        (
            counter, packed, W, bias, mask, gate, rows, cols, out, pre, B, N, D,
            group, fill, code, span_b, span_n, most_bytes, scratch, stride,
        ) = arguments(p, 21)
        # fmt: on
        near = scratch + take(counter + 8) * stride
        near_pre = near + 64 * span_n * size
        runs = near_pre + 64 * span_n * size
        records = runs + span_b // 64 * RUNS
        most = span_b // 64 * span_n * ((min(B, 64) + MOST - 1) // MOST)
        sums = records + (most * RECORD + 63) // 64 * 64
        chunks = (B + 63) // 64
        slices, each = slicing(D, lanes, most_bytes // size)
        tiles_n = (N + span_n - 1) // span_n
        while True:
            t = take(counter)
            if t >= tiles_n * ((B + span_b - 1) // span_b):
                break
            b0, n0 = (t // tiles_n) * span_b, (t % tiles_n) * span_n
            b1, n1 = min(b0 + span_b, B), min(n0 + span_n, N)
            c0, c1 = b0 // 64, (b1 + 63) // 64
            if mask != 0:
                for c in range(c0, c1):
                    build(mask, rows, cols, n0 // 64, (n1 + 63) // 64, c, B, N, group, size, one)
            total = 0
            for c in range(c0, c1):
                start, words = runs + (c - c0) * RUNS, cols + (n0 * chunks + c) * 8
                total += listed(records + total * RECORD, start, words, chunks, 0, n1 - n0)
            clear(sums, total * MOST * size)
            for s in range(slices):
                w, block = W + (n0 * D + s * each) * size, packed + (s * B + b0) * each * size
                length, rest = lengths(D - s * each, each, size)
                dot_chunks(
                    *(records, runs, c1 - c0, w, D * size, block, each * size, length, rest, sums, size, one),
                )
            total = 0
            for c in range(c0, c1):
                first, last, start = 64 * c, min(64 * c + 64, B), runs + (c - c0) * RUNS
                if fill != 0:
                    put_rows(
                        *(start, total, records, sums, bias, gate, out, pre, near, near_pre),
                        *(first, last, n0, n1, N, group, code, size, one),
                    )
                else:
                    put_pairs(
                        *(start, total, records, sums, bias, gate, out, pre, near),
                        *(first, last, n0, n1, N, group, code, size, one),
                    )
                total += read_word(start + 8 * (MOST + 1))

    def one_dots(p: Any) -> None:
        """Like ``dots`` for one example, whose open weight rows are read from end to end; a task is 256 units."""
        counter, x, W, bias, mask, gate, rows, cols, out, pre, N, D, group, fill, code, room, stride = arguments(p, 17)
        scratch = room + take(counter + 8) * stride
        sums = scratch + 64
        write_word(scratch, 0)
        length, rest = D // lanes * VECTOR, D % lanes
        while True:
            n0 = take(counter) * 256
            if n0 >= N:
                break
            n1 = min(n0 + 256, N)
            if fill != 0:
                clear(out + n0 * size, (n1 - n0) * size)
                if pre != 0:
                    clear(pre + n0 * size, (n1 - n0) * size)
            for first in range(n0, n1, 64):
                last = min(first + 64, n1)
                if mask != 0:
                    bits = open_word(mask, first // 64, N, group, size, one)
                    if rows != 0:
                        write_word(rows + first // 8, bits)
                    if cols != 0:
                        for n in range(first, last):
                            write_word(cols + n * 8, (bits >> (n - first)) & 1)
                else:
                    bits = 0
                    for n in range(first, last):
                        bits |= (read_word(cols + n * 8) & 1) << (n - first)
                block = W + first * D * size
                while bits != 0:
                    places, k = 0, 0
                    while bits != 0 and k < MOST:
                        places |= lowest(bits) << (8 * k)
                        bits &= bits - 1
                        k += 1
                    write_word(scratch + 8, places)
                    clear(sums, MOST * size)
                    dot(k, scratch, 1, x, 0, block, D * size, length, rest, sums, one)
                    for e in range(k):
                        n = first + ((places >> (8 * e)) & 255)
                        z = read(sums + e * size, one) + (read(bias + n * size, one) if bias != 0 else zero)
                        if pre != 0:
                            write(pre + n * size, z)
                        z = activate(z, code, one)
                        if gate != 0:
                            h = read(gate + n // group * size, one)
                            z = z * h if h != 0 else zero
                        write(out + n * size, z)

    def group_dots(p: Any) -> None:
        """Like ``dots`` for gates of several units: a task is a group, a dense product with its open examples."""
        counter, x, W, bias, gate, cols, out, pre, B, N, D, group, fill, code, room, stride = arguments(p, 16)
        scratch = room + take(counter + 8) * stride
        chunks, gates = (B + 63) // 64, N // group
        result = scratch + ((4 * B + 79) // 64) * 64
        while True:
            g = take(counter)
            if g >= gates:
                break
            n0 = g * group
            count = 0
            for c in range(chunks):
                word = read_word(cols + (n0 * chunks + c) * 8)
                while word != 0:
                    write_index(scratch + 4 * count, 64 * c + lowest(word))
                    count += 1
                    word &= word - 1
            if fill != 0:
                for b in range(B):
                    clear(out + (b * N + n0) * size, group * size)
                    if pre != 0:
                        clear(pre + (b * N + n0) * size, group * size)
            # Four rows of weights stay in the first-level cache; the second one holds the examples that pass over them.
            step = max((1 << 17) // max(D * size, 1) // TILE, 4) * TILE
            for e0 in range(0, count, step):
                e1 = min(e0 + step, count)
                n = n0
                while n < n0 + group:
                    units = 4 if n + 4 <= n0 + group else 1
                    w = W + n * D * size
                    e = e0
                    while e < e1:
                        examples = TILE if e + TILE <= e1 else 1
                        if units == 1:
                            for k in range(examples):
                                tile11(w, D * size, x, scratch + 4 * (e + k), D, result + k * size, one)
                        elif examples == TILE:
                            tile(w, D * size, x, scratch + 4 * e, D, result, one)
                        else:
                            tile41(w, D * size, x, scratch + 4 * e, D, result, one)
                        for u in range(units):
                            add = read(bias + (n + u) * size, one) if bias != 0 else zero
                            for k in range(examples):
                                b = read_index(scratch + 4 * (e + k))
                                z = read(result + (u * examples + k) * size, one) + add
                                at = (b * N + n + u) * size
                                if pre != 0:
                                    write(pre + at, z)
                                z = activate(z, code, one)
                                if gate != 0:
                                    h = read(gate + (b * gates + g) * size, one)
                                    z = z * h if h != 0 else zero
                                write(out + at, z)
                        e += examples
                    n += units

    def by_example(p: Any) -> None:
        """A task is some slices of D × some examples, whose sums stay in cache; units pass in blocks of 64."""
        counter, C, W, bias, rows, out, B, N, D, span_b, span_s, room, room_stride = arguments(p, 13)
        slices, each = slicing(D, lanes, span)
        stride = each * size
        scratch = room + take(counter + 8) * room_stride
        near = scratch + 64 * SLICE
        runs = near + span_s * span_b * stride
        records = runs + WORDS * RUNS
        most = WORDS * span_b * (64 // MOST)
        scales = records + most * RECORD
        words = (N + 63) // 64
        tiles = (slices + span_s - 1) // span_s
        copies = span_b > 32
        while True:
            t = take(counter)
            if t >= tiles * ((B + span_b - 1) // span_b):
                break
            s0, b0 = (t % tiles) * span_s, (t // tiles) * span_b
            s1, b1 = min(s0 + span_s, slices), min(b0 + span_b, B)
            height = b1 - b0
            for s in range(s0, s1):
                for b in range(height):
                    target = near + ((s - s0) * height + b) * stride
                    if bias != 0:
                        copy(target, bias + s * stride, min(each, D - s * each) * size)
                    else:
                        clear(target, stride)
            for word0 in range(0, words, WORDS):
                word1 = min(word0 + WORDS, words)
                list_words(
                    *(records, scales, runs, rows + (b0 * words + word0) * 8, C + (b0 * N + 64 * word0) * size),
                    *(words, height, word1 - word0, N, size, one),
                )
                for s in range(s0, s1):
                    length, rest = lengths(D - s * each, each, size)
                    target, have = near + (s - s0) * height * stride, 0
                    for word in range(word0, word1):
                        start = runs + (word - word0) * RUNS
                        count = read_word(start + 8 * (MOST + 1))
                        block, pitch = W + (64 * word * D + s * each) * size, D * size
                        if count != 0 and copies:
                            wide = min(each, D - s * each) * size
                            copy_block(scratch, stride, block, pitch, min(64, N - 64 * word), wide)
                            block, pitch = scratch, stride
                        axpy_sizes(
                            *(start, have, records, target, stride, block, pitch, length, rest, scales, 0, size, one),
                        )
                        have += count
            for b in range(height):
                for s in range(s0, s1):
                    source = near + ((s - s0) * height + b) * stride
                    copy(out + ((b0 + b) * D + s * each) * size, source, min(each, D - s * each) * size)

    def by_unit(p: Any) -> None:
        """A task is some units; a slice of their rows of V stays in cache while the packed examples pass."""
        counter, C, packed, cols, V, total, B, N, D, span_n, most_bytes, room, room_stride = arguments(p, 13)
        chunks = (B + 63) // 64
        slices, each = slicing(D, lanes, most_bytes // size)
        stride = each * size
        near = room + take(counter + 8) * room_stride
        columns = near + span_n * SLICE
        runs = columns + 64 * span_n * size
        records = runs + chunks * RUNS
        most = chunks * span_n * ((min(B, 64) + MOST - 1) // MOST)
        scales = records + (most * RECORD + 63) // 64 * 64
        while True:
            n0 = take(counter) * span_n
            if n0 >= N:
                break
            n1 = min(n0 + span_n, N)
            wide = (n1 - n0) * size
            if total != 0:
                clear(total + n0 * size, wide)
            have = 0
            for c in range(chunks):
                start = runs + c * RUNS
                count = listed(records + have * RECORD, start, cols + (n0 * chunks + c) * 8, chunks, 0, n1 - n0)
                # Collected once, because the numbers of a column of C lie far apart.
                for b in range(64 * c, min(64 * c + 64, B)):
                    copy(columns + (b - 64 * c) * wide, C + (b * N + n0) * size, wide)
                for k in range(1, MOST + 1):
                    for i in range(have + read_word(start + 8 * k), have + read_word(start + 8 * k + 8)):
                        n, places = read_word(records + i * RECORD) & (ALONE - 1), read_word(records + i * RECORD + 8)
                        value = zero
                        for e in range(k):
                            scale = read(columns + ((places >> (8 * e)) & 255) * wide + n * size, one)
                            write(scales + (i * MOST + e) * size, scale)
                            value += scale
                        if total != 0:
                            at = total + (n0 + n) * size
                            write(at, read(at, one) + value)
                have += count
            if V == 0:
                continue
            # With one chunk of examples most rows of V belong to one record, which overwrites them.
            fresh = 1 if chunks == 1 else 0
            if fresh != 0:
                for n in range(n0, n1):
                    word = read_word(cols + n * 8)
                    if word == 0 or ones(word) > MOST:
                        clear(V + n * D * size, D * size)
            for s in range(slices):
                target, pitch = V + (n0 * D + s * each) * size, D * size
                if fresh == 0:
                    target, pitch = near, stride
                    clear(near, (n1 - n0) * stride)
                length, rest = lengths(D - s * each, each, size)
                have = 0
                for c in range(chunks):
                    start, block = runs + c * RUNS, packed + (s * B + 64 * c) * stride
                    axpy_sizes(
                        *(start, have, records, target, pitch, block, stride, length, rest, scales, fresh, size, one),
                    )
                    have += read_word(start + 8 * (MOST + 1))
                if fresh == 0:
                    for n in range(n0, n1):
                        copy(V + (n * D + s * each) * size, near + (n - n0) * stride, min(each, D - s * each) * size)

    def pointwise(p: Any) -> None:
        """At open pairs, from the gradient g of act(z) ∘ gate: C = g · gate · act'(z), gradient of the gate g · act(z).

        Where the gate is zero (pairs that only the support has) C is not formed.
        """
        counter, g, z, gate, rows, C, slopes, B, N, group, code = arguments(p, 11)
        words, gates = (N + 63) // 64, N // group
        while True:
            b0 = take(counter) * 4
            if b0 >= B:
                break
            for b in range(b0, min(b0 + 4, B)):
                if slopes != 0:
                    clear(slopes + b * gates * size, gates * size)
                for word in range(words):
                    bits = read_word(rows + (b * words + word) * 8)
                    while bits != 0:
                        n = 64 * word + lowest(bits)
                        bits &= bits - 1
                        at = (b * N + n) * size
                        k = (b * gates + n // group) * size
                        upper = read(g + at, one)
                        h = read(gate + k, one)
                        if slopes != 0:
                            value = activate(read(z + at, one), code, one)
                            write(slopes + k, read(slopes + k, one) + upper * value)
                        if C != 0:
                            scale = h if code == 0 else h * slope(read(z + at, one), code, one)
                            write(C + at, upper * scale if h != 0 else zero)

    made = (pattern, pack, dots, one_dots, group_dots, by_example, by_unit, pointwise)
    return {kernel.__name__: kernel for kernel in made}


products = gather.Kernels(_kernels)
