"""The Triton kernels all ops are made of. Import this module only to run them.

The same three products as on the CPU, on a pattern of open (example, unit) pairs, with x (B, D), W (N, D) and a
coefficient C (B, N); each in the form that suits the number of examples and the gates:

``dots``         z[b, n] = ⟨x[b], W[n]⟩ at open pairs: the forward pass, and the gradient of a hidden layer;
``by_example``   y[b] = Σ_n C[b, n] W[n] over open n: the gradient of x, and the next affine layer;
``by_unit``      V[n] = Σ_b C[b, n] x[b] over open b: the gradient of the weights.

*Few examples* (``few_…``): a program takes some units, lists those that are open for any example, and reads the
rows of these alone. *Groups*: the examples of a group are listed first (``lists``), and tiles gather and scatter
their rows by that list, so nothing is padded or copied. *Tiles*: dense tiles with the mask at the end, of which those
without an open pair are skipped.

Every number that is written belongs to one program, which adds up in a fixed order: results do not change from call to
call, and there is no atomic operation but the counting of ``sample``, where order does not matter.

What is closed does not reach a result, be it NaN: where examples share a tile with a unit that only some of them have
open, a product that is not finite is computed again, pair by pair (``careful``).
"""

# ruff: noqa: SIM102, SIM108 (Triton drops branches that are decided when it compiles: they stand alone)

import inspect
from typing import Any

import triton
import triton.language as tl


def kernel(function: Any) -> Any:
    """Triton's decorator, on the function itself: a run-time type checker may have wrapped it."""
    return triton.jit(inspect.unwrap(function))


# -------------------------------------------------------------------- parts of kernels


@kernel
def open_pairs(rows, gate, b, n, inside, gates, group, row_words):  # type: ignore[no-untyped-def]
    """Return which pairs are open: by the pattern or, where there is none, by the gates."""
    if rows is None:
        value = tl.load(gate + b * gates + n // group, mask=inside, other=0).to(tl.float32)
        found = inside & (value != 0)
    else:
        word = tl.load(rows + b * row_words + n // 64, mask=inside, other=0)
        found = inside & (((word >> (n % 64)) & 1) != 0)
    return found


@kernel
def activate(z, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the activation of z."""
    y = z
    if ACTIVATION == "relu":
        y = tl.where(z <= 0, 0.0, z)
    if ACTIVATION == "gelu":
        y = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    if ACTIVATION == "silu":
        y = z / (1 + tl.exp(-z))
    return y


@kernel
def slope(z, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the derivative of the activation (any but the identity) at z."""
    y = tl.where(z > 0, 1.0, 0.0)
    if ACTIVATION == "gelu":
        normal = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        y = normal + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    if ACTIVATION == "silu":
        s = 1 / (1 + tl.exp(-z))
        y = s * (1 + z * (1 - s))
    return y


@kernel
def any_of(flags):  # type: ignore[no-untyped-def]
    """Return whether any is set, as 0 or 1."""
    return tl.max(flags.to(tl.int32))


@kernel
def not_finite(x):  # type: ignore[no-untyped-def]
    """Return whether any is NaN or infinite, as 0 or 1."""
    return tl.max(1 - (tl.abs(x) < float("inf")).to(tl.int32))


# -------------------------------------------------------------------- the pattern, and lists made of it


@kernel
def pattern(gate, rows, cols, batch, units, gates, group, row_words, col_words):  # type: ignore[no-untyped-def]
    """Write the bits of a block of 64 × 64 pairs in both orders."""
    lane = tl.arange(0, 64)
    e, w = tl.program_id(0), tl.program_id(1)
    b, n = (e * 64 + lane).to(tl.int64), (w * 64 + lane).to(tl.int64)
    inside = (b < batch)[:, None] & (n < units)[None, :]
    bits = open_pairs(None, gate, b[:, None], n[None, :], inside, gates, group, row_words).to(tl.int64)
    # The bits of a sum of distinct powers of two; bit 63 is the sign, and the sum wraps around to it.
    shift = lane.to(tl.int64)
    tl.store(rows + b * row_words + w, tl.sum(bits << shift[None, :], 1), mask=b < batch)
    tl.store(cols + n * col_words + e, tl.sum(bits << shift[:, None], 0), mask=n < units)


@kernel
def lists(cols, examples, starts, batch, group, col_words, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the examples that have a group open, ascending, and where in that list each word's examples start."""
    g = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 64)
    done = tl.zeros((), tl.int32)
    for first in range(0, col_words, WORDS):
        w = first + tl.arange(0, WORDS)
        word = tl.load(cols + g * group * col_words + w, mask=w < col_words, other=0)
        bits = ((word[:, None] >> lane.to(tl.int64)[None, :]) & 1).to(tl.int32)
        within = tl.cumsum(bits, 1)
        each = tl.sum(bits, 1)
        start = done + tl.cumsum(each, 0) - each
        tl.store(starts + g * (col_words + 1) + w, start, mask=w < col_words)
        place = examples + g * batch + start[:, None] + within - 1
        tl.store(place, w[:, None] * 64 + lane[None, :], mask=bits == 1)
        done += tl.sum(each)
    tl.store(starts + g * (col_words + 1) + col_words, done)


# -------------------------------------------------------------------- dots


@kernel
def dots(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    gate,
    rows,
    examples,
    starts,
    out,
    pre,
    batch,
    units,
    width,
    gates,
    group,
    row_words,
    col_words,
    unit_stride,
    width_stride,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write act(z) ∘ gate and z at the open pairs of a tile: of the examples listed for a group, or of all.

    A tile of all examples writes zeros at closed pairs; one of listed examples has none.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    if examples is None:
        first = tl.program_id(1) * BN
        last = units
        valid = m < batch
        b = m.to(tl.int64)
    else:
        blocks = tl.cdiv(group, BN)
        g = tl.program_id(1) // blocks
        first = g * group + tl.program_id(1) % blocks * BN
        last = (g + 1) * group
        valid = m < tl.load(starts + g.to(tl.int64) * (col_words + 1) + col_words)
        b = tl.load(examples + g.to(tl.int64) * batch + m, mask=valid, other=0).to(tl.int64)
    n = first + tl.arange(0, BN)
    # Which pairs are open is found out twice: once kept, it would take the registers that the product needs.
    if examples is None:
        inside = valid[:, None] & (n < last)[None, :]
        wanted = any_of(open_pairs(rows, gate, b[:, None], n[None, :], inside, gates, group, row_words))
    else:
        wanted = any_of(valid)
    acc = tl.zeros((BM, BN), ACC)
    for start in range(0, tl.where(wanted > 0, width, 0), BK):
        k = start + tl.arange(0, BK)
        a = tl.load(x + b[:, None] * width + k[None, :], mask=valid[:, None] & (k < width)[None, :], other=0)
        w = tl.load(
            weight + n[None, :].to(tl.int64) * unit_stride + k[:, None].to(tl.int64) * width_stride,
            mask=(n < last)[None, :] & (k < width)[:, None],
            other=0,
        )
        acc = tl.dot(a.to(DOT), w.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < last, other=0).to(ACC)[None, :]
    inside = valid[:, None] & (n < last)[None, :]
    found = inside
    if examples is None:
        found = open_pairs(rows, gate, b[:, None], n[None, :], inside, gates, group, row_words)
    at = b[:, None] * units + n[None, :]
    if pre is not None:
        tl.store(pre + at, tl.where(found, acc, 0).to(pre.dtype.element_ty), mask=inside)
    h = activate(acc, ACTIVATION)
    if gate is not None:
        value = tl.load(gate + b[:, None] * gates + (n // group)[None, :], mask=inside, other=0).to(ACC)
        h = tl.where(value != 0, h * value, 0)
    tl.store(out + at, tl.where(found, h, 0).to(out.dtype.element_ty), mask=inside)


@kernel
def few_dots(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    gate,
    rows,
    out,
    pre,
    batch,
    units,
    width,
    gates,
    group,
    row_words,
    unit_stride,
    width_stride,
    ACTIVATION: tl.constexpr,
    FEW: tl.constexpr,
    SPAN: tl.constexpr,
    SLOTS: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Like ``dots`` for at most FEW examples and SPAN units, of which only rows open for any example are read."""
    b = tl.arange(0, FEW).to(tl.int64)
    valid = b < batch
    n = (tl.program_id(0) * SPAN + tl.arange(0, SPAN)).to(tl.int64)
    inside = valid[:, None] & (n < units)[None, :]
    wanted = tl.max(open_pairs(rows, gate, b[:, None], n[None, :], inside, gates, group, row_words).to(tl.int32), 0)
    place = tl.cumsum(wanted, 0) - 1
    count = tl.sum(wanted)
    for base in range(0, count, SLOTS):
        slot = base + tl.arange(0, SLOTS)
        hit = (wanted > 0)[None, :] & (place[None, :] == slot[:, None])
        unit = tl.sum(tl.where(hit, n[None, :], 0), 1)
        there = slot < count
        acc = tl.zeros((FEW, SLOTS), ACC)
        for start in range(0, width, BK):
            k = start + tl.arange(0, BK)
            a = tl.load(x + b[:, None] * width + k[None, :], mask=valid[:, None] & (k < width)[None, :], other=0)
            w = tl.load(
                weight + unit[None, :] * unit_stride + k[:, None].to(tl.int64) * width_stride,
                mask=there[None, :] & (k < width)[:, None],
                other=0,
            )
            acc = tl.dot(a.to(DOT), w.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)
        if bias is not None:
            acc += tl.load(bias + unit, mask=there, other=0).to(ACC)[None, :]
        pairs = valid[:, None] & there[None, :]
        found = open_pairs(rows, gate, b[:, None], unit[None, :], pairs, gates, group, row_words)
        at = b[:, None] * units + unit[None, :]
        if pre is not None:
            tl.store(pre + at, tl.where(found, acc, 0).to(pre.dtype.element_ty), mask=pairs)
        h = activate(acc, ACTIVATION)
        if gate is not None:
            value = tl.load(gate + b[:, None] * gates + (unit // group)[None, :], mask=pairs, other=0).to(ACC)
            h = tl.where(value != 0, h * value, 0)
        tl.store(out + at, tl.where(found, h, 0).to(out.dtype.element_ty), mask=pairs)
    closed = inside & (wanted == 0)[None, :]
    at = b[:, None] * units + n[None, :]
    tl.store(out + at, tl.zeros((FEW, SPAN), out.dtype.element_ty), mask=closed)
    if pre is not None:
        tl.store(pre + at, tl.zeros((FEW, SPAN), pre.dtype.element_ty), mask=closed)


# -------------------------------------------------------------------- by_example


@kernel
def careful_by_example(  # type: ignore[no-untyped-def]
    coefficient,
    weight,
    gate,
    rows,
    b,
    d,
    valid,
    within,
    low,
    high,
    units,
    gates,
    group,
    row_words,
    unit_stride,
    width_stride,
    BM: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return the sum over open units from low to high, one after the other: closed ones are left out, be they NaN."""
    acc = tl.zeros((BM, BD), ACC)
    zero = tl.zeros((), tl.int64)
    for unit in range(low, high):
        n = zero + unit
        found = open_pairs(rows, gate, b, n, valid, gates, group, row_words)
        c = tl.load(coefficient + b * units + n, mask=found, other=0).to(ACC)
        w = tl.load(weight + n * unit_stride + d * width_stride, mask=within, other=0).to(ACC)
        acc += tl.where(found[:, None], c[:, None] * w[None, :], 0)
    return acc


@kernel
def by_example(  # type: ignore[no-untyped-def]
    coefficient,
    weight,
    bias,
    rows,
    out,
    batch,
    units,
    width,
    row_words,
    unit_stride,
    width_stride,
    GIVEN: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write a tile of the sums over open units; words of units that no example of the tile has open are skipped.

    With GIVEN the dense product stands in ``out`` already, and is computed again where it is not finite; the pattern is
    then that of the coefficients.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = m < batch
    b = m.to(tl.int64)
    d = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)
    within = d < width
    at = out + b[:, None] * width + d[None, :]
    inside = valid[:, None] & within[None, :]
    lane = tl.arange(0, 64).to(tl.int64)
    acc = tl.zeros((BM, BD), ACC)
    if GIVEN:
        acc = tl.load(at, mask=inside, other=0).to(ACC)
    else:
        for w in range(0, row_words):
            word = tl.load(rows + b * row_words + w, mask=valid, other=0)
            if any_of(word != 0) > 0:
                n = w * 64 + lane
                found = ((word[:, None] >> lane[None, :]) & 1) != 0
                c = tl.load(coefficient + b[:, None] * units + n[None, :], mask=found, other=0)
                v = tl.load(
                    weight + n[:, None] * unit_stride + d[None, :] * width_stride,
                    mask=(n < units)[:, None] & within[None, :],
                    other=0,
                )
                acc = tl.dot(c.to(DOT), v.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)
    if not_finite(acc) > 0:
        acc = careful_by_example(
            coefficient, weight, coefficient, rows, b, d, valid, within, 0, units,
            units, units, 1, row_words, unit_stride, width_stride, BM, BD, ACC,
        )  # fmt: skip
        if GIVEN:
            tl.store(at, acc.to(out.dtype.element_ty), mask=inside)
    if not GIVEN:
        if bias is not None:
            acc += tl.load(bias + d, mask=within, other=0).to(ACC)[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=inside)


@kernel
def few_by_example(  # type: ignore[no-untyped-def]
    coefficient,
    weight,
    gate,
    rows,
    parts,
    batch,
    units,
    width,
    gates,
    group,
    row_words,
    unit_stride,
    width_stride,
    per_part,
    FEW: tl.constexpr,
    SPAN: tl.constexpr,
    SLOTS: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write a part (``per_part`` units) of the sums of at most FEW examples; only rows open for any are read."""
    b = tl.arange(0, FEW).to(tl.int64)
    valid = b < batch
    d = (tl.program_id(0) * BD + tl.arange(0, BD)).to(tl.int64)
    within = d < width
    low = tl.program_id(1) * per_part
    high = tl.minimum(low + per_part, units)
    acc = tl.zeros((FEW, BD), ACC)
    for first in range(low, high, SPAN):
        n = (first + tl.arange(0, SPAN)).to(tl.int64)
        inside = valid[:, None] & (n < high)[None, :]
        wanted = tl.max(open_pairs(rows, gate, b[:, None], n[None, :], inside, gates, group, row_words).to(tl.int32), 0)
        place = tl.cumsum(wanted, 0) - 1
        count = tl.sum(wanted)
        for base in range(0, count, SLOTS):
            slot = base + tl.arange(0, SLOTS)
            hit = (wanted > 0)[None, :] & (place[None, :] == slot[:, None])
            unit = tl.sum(tl.where(hit, n[None, :], 0), 1)
            there = slot < count
            pairs = valid[:, None] & there[None, :]
            found = open_pairs(rows, gate, b[:, None], unit[None, :], pairs, gates, group, row_words)
            c = tl.load(coefficient + b[:, None] * units + unit[None, :], mask=found, other=0)
            w = tl.load(
                weight + unit[:, None] * unit_stride + d[None, :] * width_stride,
                mask=there[:, None] & within[None, :],
                other=0,
            )
            acc = tl.dot(c.to(DOT), w.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)
    if not_finite(acc) > 0:
        acc = careful_by_example(
            coefficient, weight, gate, rows, b, d, valid, within, low, high,
            units, gates, group, row_words, unit_stride, width_stride, FEW, BD, ACC,
        )  # fmt: skip
    at = (tl.program_id(1).to(tl.int64) * batch + b)[:, None] * width + d[None, :]
    tl.store(parts + at, acc, mask=valid[:, None] & within[None, :])


@kernel
def add_parts(parts, bias, out, count, size, width, ACC: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the sum of the parts and the bias, in the parts' order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    acc = tl.zeros((BLOCK,), ACC)
    zero = tl.zeros((), tl.int64)
    for part in range(0, count):
        acc += tl.load(parts + (zero + part) * size + at, mask=inside, other=0)
    if bias is not None:
        acc += tl.load(bias + at % width, mask=inside, other=0).to(ACC)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@kernel
def group_by_example(  # type: ignore[no-untyped-def]
    coefficient,
    weight,
    examples,
    starts,
    out,
    batch,
    units,
    width,
    count,
    group,
    col_words,
    words_each,
    unit_stride,
    width_stride,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to ``out`` the sums over open groups, for BD columns and the examples of ``words_each`` words.

    An example's groups are anywhere, so there is no tile of which all groups are open. This program takes one group
    after the other and adds its product to the rows of its examples. No other program touches these rows and
    columns: nothing is atomic, and the order is fixed.
    """
    d = (tl.program_id(0) * BD + tl.arange(0, BD)).to(tl.int64)
    within = d < width
    low = tl.program_id(1) * words_each
    high = tl.minimum(low + words_each, col_words)
    zero = tl.zeros((), tl.int64)
    for index in range(0, count):
        g = zero + index
        first = tl.load(starts + g * (col_words + 1) + low)
        last = tl.load(starts + g * (col_words + 1) + high)
        for begin in range(first, last, BM):
            m = begin + tl.arange(0, BM)
            valid = m < last
            b = tl.load(examples + g * batch + m, mask=valid, other=0).to(tl.int64)
            acc = tl.zeros((BM, BD), ACC)
            for start in range(0, group, BK):
                k = start + tl.arange(0, BK)
                n = g * group + k
                c = tl.load(
                    coefficient + b[:, None] * units + n[None, :], mask=valid[:, None] & (k < group)[None, :], other=0
                )
                w = tl.load(
                    weight + n[:, None] * unit_stride + d[None, :] * width_stride,
                    mask=(k < group)[:, None] & within[None, :],
                    other=0,
                )
                acc = tl.dot(c.to(DOT), w.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)
            at = out + b[:, None] * width + d[None, :]
            inside = valid[:, None] & within[None, :]
            tl.store(at, tl.load(at, mask=inside, other=0) + acc, mask=inside)
            # The next group's examples may be held by other threads of this program, which must see the sums.
            tl.debug_barrier()


# -------------------------------------------------------------------- by_unit


@kernel
def by_unit(  # type: ignore[no-untyped-def]
    coefficient,
    x,
    cols,
    examples,
    starts,
    out,
    sums,
    batch,
    units,
    width,
    group,
    col_words,
    unit_stride,
    width_stride,
    BN: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write a tile of the sums over open examples: those listed for a group, or words of all that have an open one."""
    if examples is None:
        first = tl.program_id(0) * BN
        last = units
    else:
        blocks = tl.cdiv(group, BN)
        g = (tl.program_id(0) // blocks).to(tl.int64)
        first = g * group + tl.program_id(0) % blocks * BN
        last = (g + 1) * group
    n = (first + tl.arange(0, BN)).to(tl.int64)
    d = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)
    wanted, within = n < last, d < width
    lane = tl.arange(0, 64).to(tl.int64)
    acc = tl.zeros((BN, BD), ACC)
    total = tl.zeros((BN,), ACC)
    if examples is None:
        for e in range(0, col_words):
            word = tl.load(cols + n * col_words + e, mask=wanted, other=0)
            if any_of(word != 0) > 0:
                b = e * 64 + lane
                found = ((word[:, None] >> lane[None, :]) & 1) != 0
                c = tl.load(coefficient + b[None, :] * units + n[:, None], mask=found, other=0)
                total += tl.sum(c.to(ACC), 1)
                if out is not None:
                    inside = (b < batch)[:, None] & within[None, :]
                    a = tl.load(x + b[:, None] * width + d[None, :], mask=inside, other=0)
                    acc = tl.dot(c.to(DOT), a.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        count = tl.load(starts + g * (col_words + 1) + col_words)
        for begin in range(0, count, 64):
            m = begin + lane
            valid = m < count
            b = tl.load(examples + g * batch + m, mask=valid, other=0).to(tl.int64)
            c = tl.load(coefficient + b[None, :] * units + n[:, None], mask=valid[None, :] & wanted[:, None], other=0)
            total += tl.sum(c.to(ACC), 1)
            if out is not None:
                a = tl.load(x + b[:, None] * width + d[None, :], mask=valid[:, None] & within[None, :], other=0)
                acc = tl.dot(c.to(DOT), a.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)
    if sums is not None:
        if tl.program_id(1) == 0:
            tl.store(sums + n, total.to(sums.dtype.element_ty), mask=wanted)
    if out is not None:
        if examples is None:
            if not_finite(acc) > 0:
                acc = tl.zeros((BN, BD), ACC)
                zero = tl.zeros((), tl.int64)
                for example in range(0, batch):
                    r = zero + example
                    bits = tl.load(cols + n * col_words + r // 64, mask=wanted, other=0)
                    there = ((bits >> (r % 64)) & 1) != 0
                    factor = tl.load(coefficient + r * units + n, mask=there, other=0).to(ACC)
                    row = tl.load(x + r * width + d, mask=within, other=0).to(ACC)
                    acc += tl.where(there[:, None], factor[:, None] * row[None, :], 0)
        at = n[:, None] * unit_stride + d[None, :] * width_stride
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=wanted[:, None] & within[None, :])


# -------------------------------------------------------------------- what is left at open pairs


@kernel
def pointwise(  # type: ignore[no-untyped-def]
    upper,
    pre,
    gate,
    rows,
    wide_rows,
    coefficient,
    slopes,
    batch,
    units,
    gates,
    group,
    row_words,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write C = g · gate · act'(z) at open pairs, and the gate's gradient Σ g · act(z), on the wide pattern if given.

    A program takes BM examples and BN units, or the whole of one group.
    """
    b = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    valid = b < batch
    total = tl.zeros((BM,), ACC)
    size = BN if UNIT else group
    low = tl.program_id(1).to(tl.int64) * size
    for start in range(0, size, BN):
        k = start + tl.arange(0, BN)
        n = low + k
        inside = valid[:, None] & ((k < size) & (n < units))[None, :]
        found = open_pairs(rows, gate, b[:, None], n[None, :], inside, gates, group, row_words)
        at = b[:, None] * units + n[None, :]
        if coefficient is not None:
            c = tl.load(upper + at, mask=found, other=0).to(ACC)
            c *= tl.load(gate + b[:, None] * gates + (n // group)[None, :], mask=found, other=0).to(ACC)
            if ACTIVATION != "identity":
                c *= slope(tl.load(pre + at, mask=found, other=0).to(ACC), ACTIVATION)
            tl.store(coefficient + at, c.to(coefficient.dtype.element_ty), mask=found)
        if slopes is not None:
            if wide_rows is not None:
                found = open_pairs(wide_rows, None, b[:, None], n[None, :], inside, gates, group, row_words)
            z = tl.load(pre + at, mask=found, other=0).to(ACC)
            s = tl.load(upper + at, mask=found, other=0).to(ACC) * activate(z, ACTIVATION)
            if UNIT:
                tl.store(slopes + at, s.to(slopes.dtype.element_ty), mask=inside)
            else:
                total += tl.sum(s, 1)
    if slopes is not None and not UNIT:
        at = b * gates + tl.program_id(1)
        tl.store(slopes + at, total.to(slopes.dtype.element_ty), mask=valid)


# -------------------------------------------------------------------- sampling


@kernel
def sample(  # type: ignore[no-untyped-def]
    logits,
    noise,
    seed,
    gate,
    rows,
    cols,
    counts,
    batch,
    units,
    gates,
    group,
    row_words,
    col_words,
    ACC: tl.constexpr,
):
    """Write the gates 1[u < σ(a)] of a block of 64 × 64 pairs, their bits in both orders, and how many are open."""
    lane = tl.arange(0, 64)
    e, w = tl.program_id(0), tl.program_id(1)
    b, n = (e * 64 + lane).to(tl.int64), (w * 64 + lane).to(tl.int64)
    inside = (b < batch)[:, None] & (n < units)[None, :]
    at = b[:, None] * gates + (n // group)[None, :]
    a = tl.load(logits + at, mask=inside, other=0).to(ACC)
    if noise is not None:
        u = tl.load(noise + at, mask=inside, other=1).to(ACC)
    else:
        u = tl.rand(tl.load(seed), at).to(ACC)
    found = inside & (u < 1 / (1 + tl.exp(-a)))
    bits, shift = found.to(tl.int64), lane.to(tl.int64)
    tl.store(rows + b * row_words + w, tl.sum(bits << shift[None, :], 1), mask=b < batch)
    tl.store(cols + n * col_words + e, tl.sum(bits << shift[:, None], 0), mask=n < units)
    # A group's units all find the same; its first one writes. Whole numbers add up to the same in any order.
    leads = (n < units) & (n % group == 0)
    tl.store(gate + at, tl.where(found, 1.0, 0.0).to(gate.dtype.element_ty), mask=inside & leads[None, :])
    tl.atomic_add(counts + n // group, tl.sum(found.to(tl.int32), 0), mask=leads)
