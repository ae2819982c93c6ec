"""The sparse products all ops are made of, compiled by Numba. Import this module only to run them.

Three products on a pattern of open (example, unit) pairs, with x (B, D), W (N, D) and a coefficient C (B, N):

``dots``         z[b, n] = ⟨x[b], W[n]⟩ at open pairs: the forward pass, and the gradient of a hidden layer;
``by_example``   y[b] = Σ_n C[b, n] W[n] over open n: the gradient of x, and the next affine layer;
``by_unit``      V[n] = Σ_b C[b, n] x[b] over open b: the gradient of the weights.

A pair costs D multiply-adds and, since nothing is shared between random pairs, one loaded vector per multiply-add
at least. So everything is about where that vector comes from. Examples are taken in chunks of 64, the bits of a
word, and rows in slices of 512 bytes: such a block is 32 KB and stays in the first-level cache while all units
pass over it, each with its own slice in registers. Blocks are packed, for rows a power of two apart would share
a few cache sets.

``pointwise`` does what is left at open pairs: gates, activations, their gradients.
"""

import ctypes
import functools
import inspect
import math
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from gatelet.kernels import _vector as v

SLICE, VECTOR, PART = v.SLICE, v.VECTOR, v.PART
# Module globals of this module itself, as Numba's cache wants them.
dot_first, dot_more, dot_rest_first, dot_rest = v.dot_first, v.dot_more, v.dot_rest_first, v.dot_rest
axpy, axpy_rest, axpy_in_turn, axpy_rest_in_turn = v.axpy, v.axpy_rest, v.axpy_in_turn, v.axpy_rest_in_turn
prefetch = v.prefetch
tile44, tile41, tile11 = v.tile44, v.tile41, v.tile11
lanes_sum, nonzero_bits, lowest, take = v.lanes_sum, v.nonzero_bits, v.lowest, v.take
read, write, read_word, write_word = v.read, v.write, v.read_word, v.write_word
read_index, write_index = v.read_index, v.write_index
clear, copy, ones = v.clear, v.copy, v.ones

P = (
    1.1283791461557542,
    0.19040666570794865,
    0.05274875562965499,
    0.00376562702935509,
    2.8488321429e-4,
    2.05008926302e-6,
)
Q = (1.0, 0.5020762548661959, 0.11410919950549765, 0.014969236765898286, 0.001162538430056847, 3.8091760959976094e-5)
ACTIVATIONS = ("identity", "relu", "gelu", "silu")


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
    # erf(x)/x as a ratio of polynomials in x², fitted to a relative error of 2e-8 up to |x| = 3.92, where float32 no
    # longer tells it from 1: a third of the library's time, which would be a seventh of a layer's.
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
    while n < last:  # one gate at a time, whose units may reach over the word's ends
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
    """Transpose a 64 × 64 matrix of bits, in place: halves are exchanged, then quarters, and so on."""
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
        for b in range(b0, b1):  # along an example's gates, as memory likes it
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
def visits(
    listed: Any, cols: Any, c0: Any, c1: Any, n0: Any, n1: Any, chunks: Any
) -> Any:  # pragma: no cover (compiled)
    """List the words of some units and chunks that are not zero, (unit, chunk, word) by chunk; return how many.

    Within a chunk by the number of bits: loops over bits of one length after the other end where the processor
    expects it, and a wrong guess would cost as much as two pairs.
    """
    count = 0
    starts = np.empty(66, np.int64)
    for c in range(c0, c1):
        starts[:] = 0
        for n in range(n0, n1):
            starts[ones(read_word(cols + (n * chunks + c) * 8)) + 1] += 1
        starts[1] = 0  # closed for the whole chunk: not listed
        for bits in range(1, 66):
            starts[bits] += starts[bits - 1]
        for n in range(n0, n1):
            word = read_word(cols + (n * chunks + c) * 8)
            if word != 0:
                bits = ones(word)
                at = listed + 24 * (count + starts[bits])
                starts[bits] += 1
                write_word(at, n)
                write_word(at + 8, c)
                write_word(at + 16, word)
        count += starts[65]
    return count


def _kernels(one: Any) -> dict[str, Any]:
    """Return the kernels, not yet compiled, for numbers of the type of ``one``."""
    size = one.itemsize
    lanes = VECTOR // size
    span = SLICE // size  # numbers in a slice
    zero = one * 0

    def pattern(p: Any) -> None:
        A = carray(p, (16,), types.int64)
        gate, rows, cols, B, N, group = A[2], A[3], A[4], A[5], A[6], A[7]
        words, chunks = (N + 63) // 64, (B + 63) // 64
        while True:
            t = take(A.ctypes.data)
            c, word = t % chunks, t // chunks * 16
            if word >= words:
                break
            build(gate, rows, cols, word, min(word + 16, words), c, B, N, group, size, one)

    def pack(p: Any) -> None:
        """Copy x (B, D) into slices: (D / span) blocks of B rows, then rest vectors, padded with zeros."""
        A = carray(p, (16,), types.int64)
        x, packed, B, D = A[2], A[3], A[4], A[5]
        whole = D // span
        rest = (D - whole * span + lanes - 1) // lanes
        while True:
            b0 = take(A.ctypes.data) * 16
            if b0 >= B:
                break
            for b in range(b0, min(b0 + 16, B)):
                source = x + b * D * size
                for d in range(whole):
                    copy(packed + (d * B + b) * SLICE, source + d * SLICE, SLICE)
                tail = packed + whole * B * SLICE
                for r in range(rest):
                    start = whole * span + r * lanes
                    target = tail + (r * B + b) * VECTOR
                    clear(target, VECTOR)
                    copy(target, source + start * size, min(lanes, D - start) * size)

    def dots(p: Any) -> None:
        """Pattern (unless given), products, and bias, activation, gate at the end; a task is some units × examples."""
        A = carray(p, (32,), types.int64)
        scratch = A[16] + take(A.ctypes.data + 8) * A[17]
        packed, W, bias, mask, gate, rows, cols = A[2], A[3], A[4], A[5], A[6], A[7], A[8]
        out, pre, B, N, D, group, span_b, span_n = A[9], A[10], A[11], A[12], A[13], A[14], A[15], A[18]
        fill, code = A[19], A[20]
        listed = scratch + span_b * span_n * PART
        near = listed + (span_b // 64 * span_n + 4) * 24
        near_pre, near_gate = near + 64 * span_n * size, near + 128 * span_n * size
        chunks, whole = (B + 63) // 64, D // span
        rest = (D - whole * span + lanes - 1) // lanes
        tail = packed + whole * B * SLICE
        tiles_n, gates = (N + span_n - 1) // span_n, N // group
        tasks = tiles_n * ((B + span_b - 1) // span_b)
        following = take(A.ctypes.data)
        while following < tasks:
            t, following = following, take(A.ctypes.data)
            b0, n0 = (t // tiles_n) * span_b, (t % tiles_n) * span_n
            b1, n1 = min(b0 + span_b, B), min(n0 + span_n, N)
            c0, c1 = b0 // 64, (b1 + 63) // 64
            if mask != 0:
                for c in range(c0, c1):
                    build(mask, rows, cols, n0 // 64, (n1 + 63) // 64, c, B, N, group, size, one)
            count = visits(listed, cols, c0, c1, n0, n1, chunks)
            # Rows of weights are read in slices, which no processor foresees: while one task runs, each visit asks
            # for some lines of the next one's. Where few units are open, most of that would be for nothing.
            ahead = W + (following % tiles_n) * span_n * D * size
            lines = 0
            if following < tasks and 2 * count > (c1 - c0) * (n1 - n0):
                lines = (min(span_n, N - (following % tiles_n) * span_n) * D * size) // (64 * count * max(whole, 1)) + 1
            for d in range(whole):
                sums = scratch
                block, w = packed + d * B * SLICE, W + d * span * size
                for i in range(count):
                    n, c, word = (
                        read_word(listed + 24 * i),
                        read_word(listed + 24 * i + 8),
                        read_word(listed + 24 * i + 16),
                    )
                    for _ in range(lines):
                        prefetch(ahead)
                        ahead += 64
                    if d == 0:
                        sums = dot_first(w + n * D * size, 0, block + 64 * c * SLICE, word, sums, one)
                    else:
                        sums = dot_more(w + n * D * size, 0, block + 64 * c * SLICE, word, sums, one)
            for r in range(rest):
                sums = scratch
                start = whole * span + r * lanes
                block, w = tail + r * B * VECTOR, W + start * size
                for i in range(count):
                    n, c, word = (
                        read_word(listed + 24 * i),
                        read_word(listed + 24 * i + 8),
                        read_word(listed + 24 * i + 16),
                    )
                    if whole == 0 and r == 0:
                        sums = dot_rest_first(w + n * D * size, D - start, block + 64 * c * VECTOR, word, sums, one)
                    else:
                        sums = dot_rest(w + n * D * size, D - start, block + 64 * c * VECTOR, word, sums, one)
            sums = scratch
            i = 0
            wide = (n1 - n0) * size
            for c in range(c0, c1):
                first, last = 64 * c, min(64 * c + 64, B)
                # Columns of a large matrix share cache sets: values are put in place in a small copy of the block.
                if fill != 0:
                    clear(near, 64 * wide)
                    if pre != 0:
                        clear(near_pre, 64 * wide)
                if gate != 0 and group == 1:
                    for b in range(first, last):
                        copy(near_gate + (b - first) * wide, gate + (b * N + n0) * size, wide)
                while i < count and read_word(listed + 24 * i + 8) == c:
                    n, word = read_word(listed + 24 * i), read_word(listed + 24 * i + 16)
                    i += 1
                    add = read(bias + n * size, one) if bias != 0 else zero
                    while word != 0:
                        b = lowest(word)
                        word &= word - 1
                        z = add if D == 0 else lanes_sum(sums, one) + add
                        sums += PART
                        inside, outside = b * wide + (n - n0) * size, ((first + b) * N + n) * size
                        if pre != 0:
                            write((near_pre + inside) if fill != 0 else (pre + outside), z)
                        z = activate(z, code, one)
                        if gate != 0:
                            if group == 1:
                                h = read(near_gate + inside, one)
                            else:
                                h = read(gate + ((first + b) * gates + n // group) * size, one)
                            z = z * h if h != 0 else zero
                        write((near + inside) if fill != 0 else (out + outside), z)
                if fill != 0:
                    for b in range(first, last):
                        copy(out + (b * N + n0) * size, near + (b - first) * wide, wide)
                        if pre != 0:
                            copy(pre + (b * N + n0) * size, near_pre + (b - first) * wide, wide)

    def group_dots(p: Any) -> None:
        """Like ``dots`` for gates of several units: a task is a group, a dense product with its open examples."""
        A = carray(p, (32,), types.int64)
        scratch = A[16] + take(A.ctypes.data + 8) * A[17]
        x, W, bias, gate, cols = A[2], A[3], A[4], A[6], A[8]
        out, pre, B, N, D, group = A[9], A[10], A[11], A[12], A[13], A[14]
        fill, code = A[19], A[20]
        chunks, gates = (B + 63) // 64, N // group
        result = scratch + ((4 * B + 79) // 64) * 64
        while True:
            g = take(A.ctypes.data)
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
            e = 0
            while e < count:
                examples = 4 if e + 4 <= count else 1
                n = n0
                while n < n0 + group:
                    units = 4 if n + 4 <= n0 + group else 1
                    w = W + n * D * size
                    if units == 1:
                        for k in range(examples):
                            tile11(w, D * size, x, scratch + 4 * (e + k), D, result + k * size, one)
                    elif examples == 4:
                        tile44(w, D * size, x, scratch + 4 * e, D, result, one)
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
                    n += units
                e += examples

    def by_example(p: Any) -> None:
        """A task is some slices of D × some examples; units pass in blocks of 64, copied together where that pays."""
        A = carray(p, (32,), types.int64)
        scratch = A[12] + take(A.ctypes.data + 8) * SLICE * 64
        C, W, bias, rows, out = A[2], A[3], A[4], A[5], A[6]
        B, N, D, span_b, span_s = A[7], A[8], A[9], A[10], A[11]
        words, whole = (N + 63) // 64, D // span
        slices = whole + (D - whole * span + lanes - 1) // lanes
        tiles = (slices + span_s - 1) // span_s
        copies = span_b >= 16
        while True:
            t = take(A.ctypes.data)
            if t >= tiles * ((B + span_b - 1) // span_b):
                break
            s0, b0 = (t % tiles) * span_s, (t // tiles) * span_b
            s1, b1 = min(s0 + span_s, slices), min(b0 + span_b, B)
            d0 = s0 * span if s0 < whole else whole * span + (s0 - whole) * lanes
            d1 = s1 * span if s1 <= whole else min(whole * span + (s1 - whole) * lanes, D)
            for b in range(b0, b1):
                target = out + (b * D + d0) * size
                if bias != 0:
                    copy(target, bias + d0 * size, (d1 - d0) * size)
                else:
                    clear(target, (d1 - d0) * size)
            # Meanwhile the next word's rows are brought near, some lines per visit, where most of them will be read.
            piece = ((d1 - d0) * size + 63) // 64
            lines = 64 * piece // ((s1 - s0) * (b1 - b0)) + 1 if b1 - b0 > 8 else 0
            for word in range(words):
                row, line = 64 * (word + 1), 0
                for s in range(s0, s1):
                    d = s * span if s < whole else whole * span + (s - whole) * lanes
                    count = span if s < whole else min(lanes, D - d)
                    block, stride = W + (64 * word * D + d) * size, D * size
                    if copies:
                        for n in range(min(64, N - 64 * word)):
                            copy(scratch + n * SLICE, block + n * stride, count * size)
                        block, stride = scratch, SLICE
                    for b in range(b0, b1):
                        for _ in range(lines):
                            prefetch(W + (row * D + d0) * size + 64 * line)
                            line += 1
                            if line == piece:
                                row, line = row + 1, 0
                        bits = read_word(rows + (b * words + word) * 8)
                        if bits == 0:
                            continue
                        target = out + (b * D + d) * size
                        c = C + (b * N + 64 * word) * size
                        if s < whole:
                            axpy(target, 0, block, stride, c, bits, one)
                        else:
                            axpy_rest(target, count, block, stride, c, bits, one)

    def by_unit(p: Any) -> None:
        """A task is some units; their rows of V stay near while the packed examples pass."""
        A = carray(p, (32,), types.int64)
        listed = A[10] + take(A.ctypes.data + 8) * A[11]
        C, packed, cols, V, total = A[2], A[3], A[4], A[5], A[6]
        B, N, D, span_n = A[7], A[8], A[9], A[12]
        chunks, whole = (B + 63) // 64, D // span
        rest = (D - whole * span + lanes - 1) // lanes
        tail = packed + whole * B * SLICE
        near = listed + (span_n * chunks + 1) * 24
        coefficients = near + 64 * span_n * size
        while True:
            n0 = take(A.ctypes.data) * span_n
            if n0 >= N:
                break
            n1 = min(n0 + span_n, N)
            wide = (n1 - n0) * size
            count = visits(listed, cols, 0, chunks, n0, n1, chunks)
            if total != 0:
                clear(total + n0 * size, wide)
            at = coefficients  # collected once: C's columns lie far apart
            i = 0
            for c in range(chunks):
                for b in range(64 * c, min(64 * c + 64, B)):
                    copy(near + (b - 64 * c) * wide, C + (b * N + n0) * size, wide)
                while i < count and read_word(listed + 24 * i + 8) == c:
                    n, word = read_word(listed + 24 * i), read_word(listed + 24 * i + 16)
                    i += 1
                    value = zero
                    while word != 0:
                        scale = read(near + lowest(word) * wide + (n - n0) * size, one)
                        write(at, scale)
                        at += size
                        value += scale
                        word &= word - 1
                    if total != 0:
                        write(total + n * size, read(total + n * size, one) + value)
            if V == 0:
                continue
            clear(V + n0 * D * size, (n1 - n0) * D * size)
            for s in range(whole + rest):
                d = s * span if s < whole else whole * span + (s - whole) * lanes
                at = coefficients
                for i in range(count):
                    n, c, word = (
                        read_word(listed + 24 * i),
                        read_word(listed + 24 * i + 8),
                        read_word(listed + 24 * i + 16),
                    )
                    target = V + (n * D + d) * size
                    if s < whole:
                        axpy_in_turn(target, 0, packed + (s * B + 64 * c) * SLICE, SLICE, at, word, one)
                    else:
                        block = tail + ((s - whole) * B + 64 * c) * VECTOR
                        axpy_rest_in_turn(target, D - d, block, VECTOR, at, word, one)
                    at += ones(word) * size

    def pointwise(p: Any) -> None:
        """At open pairs, from the gradient g of act(z) ∘ gate: C = g · gate · act'(z), gradient of the gate g · act(z).

        Where the gate is zero (pairs that only the support has) C is not formed.
        """
        A = carray(p, (32,), types.int64)
        g, z, gate, rows, C, slopes = A[2], A[3], A[4], A[5], A[6], A[7]
        B, N, group, code = A[8], A[9], A[10], A[11]
        words, gates = (N + 63) // 64, N // group
        while True:
            b0 = take(A.ctypes.data) * 4
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

    made = (pattern, pack, dots, group_dots, by_example, by_unit, pointwise)
    return {kernel.__name__: kernel for kernel in made}


@functools.cache
def kernel(name: str, bits: int) -> int:
    """Return the address of a kernel for float32 or float64, compiled at the first call (or read from the cache)."""
    one = np.float32(1) if bits == 32 else np.float64(1)
    function = inspect.unwrap(_kernels(one)[name])
    built = cfunc(types.void(types.voidptr), cache=True, error_model="numpy")(function)
    _keep.append(built)
    return ctypes.cast(built.ctypes, ctypes.c_void_p).value or 0


_keep: list[Any] = []
