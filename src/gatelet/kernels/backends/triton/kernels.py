"""The Triton kernels all ops are made of. Import this module only to run them.

They form the same three products as on the CPU, on a pattern of open (example, unit) pairs, with x (B, D), W (N, D) and
a coefficient C (B, N), in the cases where a GPU gains by it:

``dots``         z[b, n] = ⟨x[b], W[n]⟩ at open pairs: the forward pass, and the gradient of a hidden layer;
``by_example``   y[b] = Σ_n C[b, n] W[n] over open n: the gradient of x, and the next affine layer;
``by_unit``      V[n] = Σ_b C[b, n] x[b] over open b: the gradient of the weights.

* *Few examples* (``few_dots``, ``one_by_example``): a program takes some units and reads only those rows that are open
  for any example.
* *Groups* (``group_…``): the examples of each group are listed first (``lists``). Tiles gather and scatter rows by that
  list, so nothing is padded or copied.
* *Pairs* (``pair_…``): a program follows one list, of open units or of examples.

In all other cases torch's dense products are used, and one kernel does the rest: ``finish`` after the forward product,
``pointwise`` before the backward ones.

One program writes each number and adds up in a fixed order, so results do not change from call to call. The only atomic
operation is the counting of ``sample``, where the order does not matter.

A closed unit does not reach a result, even if it is NaN. Where a sum includes a unit that only some of the examples
have open and is not finite, it is formed again, pair by pair (``careful``).
"""

# ruff: noqa: SIM102, SIM108 (Triton removes a branch that it can decide at compile time, if it stands alone)

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
    # A sum of distinct powers of two has these bits; bit 63 is the sign, which the sum reaches by wrapping around.
    shift = lane.to(tl.int64)
    tl.store(rows + b * row_words + w, tl.sum(bits << shift[None, :], 1), mask=b < batch)
    tl.store(cols + n * col_words + e, tl.sum(bits << shift[:, None], 0), mask=n < units)


@kernel
def lists(cols, examples, starts, batch, col_words, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the examples that have a group open, ascending, and where in that list each word's examples start."""
    g = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 64)
    done = tl.zeros((), tl.int32)
    for first in range(0, col_words, WORDS):
        w = first + tl.arange(0, WORDS)
        word = tl.load(cols + g * col_words + w, mask=w < col_words, other=0)
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
def finish(  # type: ignore[no-untyped-def]
    pre,
    gate,
    rows,
    out,
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
    """Write act(z) ∘ gate, from dense z, at open pairs, and zero elsewhere; ``out`` may be ``pre``.

    A program takes BM examples and BN units, or the whole of one group.
    """
    b = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    valid = b < batch
    size = BN if UNIT else group
    low = tl.program_id(1) * size
    for start in range(0, size, BN):
        k = start + tl.arange(0, BN)
        n = low + k
        within = (k < size) & (n < units)
        inside = valid[:, None] & within[None, :]
        at = b[:, None] * units + n[None, :]
        if UNIT:
            h = activate(tl.load(pre + at, mask=inside, other=0).to(ACC), ACTIVATION)
            if gate is not None:
                value = tl.load(gate + at, mask=inside, other=0).to(ACC)
                h = tl.where(value != 0, h * value, 0)
        else:
            each = tl.load(gate + b * gates + tl.program_id(1), mask=valid, other=0).to(ACC)
            z = tl.load(pre + at, mask=(each != 0)[:, None] & within[None, :], other=0).to(ACC)
            h = tl.where((each != 0)[:, None], activate(z, ACTIVATION) * each[:, None], 0)
        if rows is not None:
            h = tl.where(open_pairs(rows, gate, b[:, None], n[None, :], inside, gates, group, row_words), h, 0)
        tl.store(out + at, h.to(out.dtype.element_ty), mask=inside)


# Long: Triton compiles a kernel from one function, and many of the lines are its arguments.
@kernel
def group_dots(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    gate,
    examples,
    starts,
    out,
    pre,
    batch,
    units,
    width,
    gates,
    group,
    col_words,
    chunk_words,
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
    """Write act(z) ∘ gate and z for BN units of a group and its examples in ``chunk_words`` words, BM at a time.

    Programs of one chunk of examples run at about the same time, so that all groups find its rows of x in the cache.
    """
    blocks = tl.cdiv(group, BN)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    n = g * group + k
    ours = k < group
    low = tl.program_id(1) * chunk_words
    high = tl.minimum(low + chunk_words, col_words)
    first = tl.load(starts + g * (col_words + 1) + low)
    last = tl.load(starts + g * (col_words + 1) + high)
    w_at = weight + n[None, :] * unit_stride
    for begin in range(first, last, BM):
        m = begin + tl.arange(0, BM)
        valid = m < last
        b = tl.load(examples + g * batch + m, mask=valid, other=0).to(tl.int64)
        x_at = x + b[:, None] * width
        acc = tl.zeros((BM, BN), ACC)
        for start in range(0, width, BK):
            d = start + tl.arange(0, BK)
            a = tl.load(x_at + d[None, :], mask=valid[:, None] & (d < width)[None, :], other=0)
            w = tl.load(
                w_at + d[:, None].to(tl.int64) * width_stride, mask=ours[None, :] & (d < width)[:, None], other=0
            )
            acc = tl.dot(a.to(DOT), w.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)
        if bias is not None:
            acc += tl.load(bias + n, mask=ours, other=0).to(ACC)[None, :]
        inside = valid[:, None] & ours[None, :]
        at = b[:, None] * units + n[None, :]
        if pre is not None:
            tl.store(pre + at, acc.to(pre.dtype.element_ty), mask=inside)
        h = activate(acc, ACTIVATION)
        if gate is not None:
            value = tl.load(gate + b * gates + g, mask=valid, other=0).to(ACC)[:, None]
            h = tl.where(value != 0, h * value, 0)
        tl.store(out + at, h.to(out.dtype.element_ty), mask=inside)


# Long: Triton compiles a kernel from one function, and many of the lines are its arguments.
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
    BK: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write act(z) ∘ gate and z of at most FEW examples and SPAN units; only rows open for any example are read."""
    b = tl.arange(0, FEW).to(tl.int64)
    valid = b < batch
    n = (tl.program_id(0) * SPAN + tl.arange(0, SPAN)).to(tl.int64)
    inside = valid[:, None] & (n < units)[None, :]
    found = open_pairs(rows, gate, b[:, None], n[None, :], inside, gates, group, row_words)
    wanted = tl.max(found.to(tl.int32), 0) > 0
    length = tl.where(any_of(wanted) > 0, width, 0)
    if FEW == 1:
        part = tl.zeros((SPAN, BK), ACC)
        for start in range(0, length, BK):
            d = start + tl.arange(0, BK)
            a = tl.load(x + d, mask=d < width, other=0).to(ACC)
            w = tl.load(
                weight + n[:, None] * unit_stride + d[None, :].to(tl.int64) * width_stride,
                mask=wanted[:, None] & (d < width)[None, :],
                other=0,
            )
            part += a[None, :] * w.to(ACC)
        acc = tl.sum(part, 1)[None, :]
    else:
        acc = tl.zeros((FEW, SPAN), ACC)
        for start in range(0, length, BK):
            d = start + tl.arange(0, BK)
            a = tl.load(x + b[:, None] * width + d[None, :], mask=valid[:, None] & (d < width)[None, :], other=0)
            w = tl.load(
                weight + n[None, :] * unit_stride + d[:, None].to(tl.int64) * width_stride,
                mask=wanted[None, :] & (d < width)[:, None],
                other=0,
            )
            acc = tl.dot(a.to(DOT), w.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)
    if bias is not None:
        acc += tl.load(bias + n, mask=wanted, other=0).to(ACC)[None, :]
    at = b[:, None] * units + n[None, :]
    if pre is not None:
        tl.store(pre + at, tl.where(found, acc, 0).to(pre.dtype.element_ty), mask=inside)
    h = activate(acc, ACTIVATION)
    if gate is not None:
        value = tl.load(gate + b[:, None] * gates + (n // group)[None, :], mask=inside, other=0).to(ACC)
        h = tl.where(value != 0, h * value, 0)
    tl.store(out + at, tl.where(found, h, 0).to(out.dtype.element_ty), mask=inside)


# -------------------------------------------------------------------- by_example


@kernel
def careful(  # type: ignore[no-untyped-def]
    coefficient,
    table,
    m,
    d,
    valid,
    within,
    low,
    high,
    coefficient_row,
    coefficient_column,
    table_row,
    table_column,
    BM: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return the sum of C R over R's rows from low to high, one after the other, without those with C = 0."""
    acc = tl.zeros((BM, BD), ACC)
    zero = tl.zeros((), tl.int64)
    for index in range(low, high):
        n = zero + index
        c = tl.load(coefficient + m * coefficient_row + n * coefficient_column, mask=valid, other=0).to(ACC)
        r = tl.load(table + n * table_row + d * table_column, mask=within, other=0).to(ACC)
        acc += tl.where((c != 0)[:, None], c[:, None] * r[None, :], 0)
    return acc


@kernel
def one_by_example(  # type: ignore[no-untyped-def]
    coefficient,
    weight,
    parts,
    units,
    width,
    unit_stride,
    width_stride,
    per_part,
    SPAN: tl.constexpr,
    SLOTS: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write a part (``per_part`` units) of the sum of one example; SLOTS rows with C ≠ 0 are read at a time."""
    d = (tl.program_id(0) * BD + tl.arange(0, BD)).to(tl.int64)
    within = d < width
    low = tl.program_id(1) * per_part
    high = tl.minimum(low + per_part, units)
    acc = tl.zeros((BD,), ACC)
    for first in range(low, high, SPAN):
        n = first + tl.arange(0, SPAN)
        c = tl.load(coefficient + n, mask=n < high, other=0).to(ACC)
        wanted = (c != 0).to(tl.int32)
        place = tl.cumsum(wanted, 0) - 1
        count = tl.sum(wanted)
        for base in range(0, count, SLOTS):
            slot = base + tl.arange(0, SLOTS)
            hit = (wanted > 0)[None, :] & (place[None, :] == slot[:, None])
            unit = tl.sum(tl.where(hit, n[None, :], 0), 1).to(tl.int64)
            factor = tl.sum(tl.where(hit, c[None, :], 0), 1)
            w = tl.load(
                weight + unit[:, None] * unit_stride + d[None, :] * width_stride,
                mask=(slot < count)[:, None] & within[None, :],
                other=0,
            )
            acc += tl.sum(factor[:, None] * w.to(ACC), 0)
    tl.store(parts + tl.program_id(1).to(tl.int64) * width + d, acc, mask=within)


@kernel
def add_parts(parts, bias, out, count, width, ACC: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the sum of the parts and the bias."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    acc = tl.zeros((BLOCK,), ACC)
    for first in range(0, count, PARTS):
        part = (first + tl.arange(0, PARTS)).to(tl.int64)
        at = parts + part[:, None] * width + d[None, :]
        acc += tl.sum(tl.load(at, mask=(part < count)[:, None] & inside[None, :], other=0), 0)
    if bias is not None:
        acc += tl.load(bias + d, mask=inside, other=0).to(ACC)
    tl.store(out + d, acc.to(out.dtype.element_ty), mask=inside)


# -------------------------------------------------------------------- by_unit


@kernel
def group_by_unit(  # type: ignore[no-untyped-def]
    coefficient,
    x,
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
    BM: tl.constexpr,
    ACROSS: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the sums over a group's examples, of BN of its units: of C x for BD columns, or of C alone.

    ACROSS neighbouring tiles run one after the other, before those of the next group: they read the same coefficients.
    """
    blocks = tl.cdiv(group, BN)
    count = tl.num_programs(0) // ACROSS
    index = tl.program_id(0) // ACROSS % count
    g = (index // blocks).to(tl.int64)
    k = index % blocks * BN + tl.arange(0, BN)
    n = g * group + k
    ours = k < group
    d = ((tl.program_id(1) * ACROSS + tl.program_id(0) % ACROSS) * BD + tl.arange(0, BD)).to(tl.int64)
    within = d < width
    last = tl.load(starts + g * (col_words + 1) + col_words)
    acc = tl.zeros((BN, BD), ACC)
    total = tl.zeros((BN,), ACC)
    for begin in range(0, last, BM):
        m = begin + tl.arange(0, BM)
        valid = m < last
        b = tl.load(examples + g * batch + m, mask=valid, other=0).to(tl.int64)
        c = tl.load(coefficient + b[None, :] * units + n[:, None], mask=valid[None, :] & ours[:, None], other=0)
        if sums is not None:
            total += tl.sum(c.to(ACC), 1)
        if out is not None:
            a = tl.load(x + b[:, None] * width + d[None, :], mask=valid[:, None] & within[None, :], other=0)
            acc = tl.dot(c.to(DOT), a.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)
    if sums is not None:
        tl.store(sums + n, total.to(sums.dtype.element_ty), mask=ours)
    if out is not None:
        at = n[:, None] * unit_stride + d[None, :] * width_stride
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=ours[:, None] & within[None, :])


# -------------------------------------------------------------------- dense products that are not finite


@kernel
def spoilt(rows, flags, depth, width, row_stride, column_stride, BM: tl.constexpr, BD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write whether a tile of rows holds a number that is NaN or infinite."""
    m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    d = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)
    tile = tl.load(
        rows + m[:, None] * row_stride + d[None, :] * column_stride,
        mask=(m < depth)[:, None] & (d < width)[None, :],
        other=0,
    )
    tl.store(flags + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), not_finite(tile))


@kernel
def repair(  # type: ignore[no-untyped-def]
    product,
    coefficient,
    rows,
    bias,
    flags,
    height,
    depth,
    width,
    flag_count,
    product_row,
    product_column,
    coefficient_row,
    coefficient_column,
    rows_row,
    rows_column,
    BM: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
):
    """Form tiles of C R + bias again, in place, if they are not finite: a row of R with C = 0 may be the cause.

    Where no flag of R is set, no tile is read.
    """
    columns = tl.cdiv(width, BD)
    tiles = tl.cdiv(height, BM) * columns
    if flags is not None:
        bad = tl.zeros((), tl.int32)
        for first in range(0, flag_count, 1024):
            f = first + tl.arange(0, 1024)
            bad = tl.maximum(bad, tl.max(tl.load(flags + f, mask=f < flag_count, other=0)))
        tiles = tl.where(bad > 0, tiles, 0)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        m = (tile // columns * BM + tl.arange(0, BM)).to(tl.int64)
        d = (tile % columns * BD + tl.arange(0, BD)).to(tl.int64)
        valid, within = m < height, d < width
        inside = valid[:, None] & within[None, :]
        at = product + m[:, None] * product_row + d[None, :] * product_column
        if not_finite(tl.load(at, mask=inside, other=0)) > 0:
            acc = careful(
                coefficient, rows, m, d, valid, within, 0, depth,
                coefficient_row, coefficient_column, rows_row, rows_column, BM, BD, ACC,
            )  # fmt: skip
            if bias is not None:
                acc += tl.load(bias + d, mask=within, other=0).to(ACC)[None, :]
            tl.store(at, acc.to(product.dtype.element_ty), mask=inside)


# -------------------------------------------------------------------- lists of pairs


@kernel
def pair_dots(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    starts,
    names,
    values,
    width,
    parts,
    unit_stride,
    width_stride,
    KP: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write ⟨x[b], W[n]⟩ + bias[n] for an example's list of pairs: every ``parts``-th block of KP of them."""
    b = tl.program_id(0).to(tl.int64)
    first = tl.load(starts + b)
    last = tl.load(starts + b + 1)
    for begin in range(first + tl.program_id(1) * KP, last, parts * KP):
        i = begin + tl.arange(0, KP)
        valid = i < last
        n = tl.load(names + i, mask=valid, other=0).to(tl.int64)
        part = tl.zeros((KP, BK), ACC)
        for start in range(0, width, BK):
            d = (start + tl.arange(0, BK)).to(tl.int64)
            a = tl.load(x + b * width + d, mask=d < width, other=0).to(ACC)
            w = tl.load(
                weight + n[:, None] * unit_stride + d[None, :] * width_stride,
                mask=valid[:, None] & (d < width)[None, :],
                other=0,
            )
            part += a[None, :] * w.to(ACC)
        z = tl.sum(part, 1)
        if bias is not None:
            z += tl.load(bias + n, mask=valid, other=0).to(ACC)
        tl.store(values + i, z.to(values.dtype.element_ty), mask=valid)


@kernel
def pair_sums(  # type: ignore[no-untyped-def]
    values,
    table,
    bias,
    starts,
    names,
    places,
    out,
    sums,
    width,
    row_stride,
    column_stride,
    out_row,
    out_column,
    KP: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write Σ values · table[name] + bias over a list, for BD columns; and the sum of the values.

    A list is that of an example (of units), or that of a unit (of examples); for the latter ``places`` says where its
    values are.
    """
    row = tl.program_id(0).to(tl.int64)
    d = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)
    within = d < width
    first = tl.load(starts + row)
    last = tl.load(starts + row + 1)
    acc = tl.zeros((BD,), ACC)
    total = tl.zeros((), ACC)
    for begin in range(first, last, KP):
        i = begin + tl.arange(0, KP)
        valid = i < last
        n = tl.load(names + i, mask=valid, other=0).to(tl.int64)
        at = i
        if places is not None:
            at = tl.load(places + i, mask=valid, other=0).to(tl.int64)
        v = tl.load(values + at, mask=valid, other=0).to(ACC)
        total += tl.sum(v)
        if out is not None:
            w = tl.load(
                table + n[:, None] * row_stride + d[None, :] * column_stride,
                mask=valid[:, None] & within[None, :],
                other=0,
            )
            acc += tl.sum(v[:, None] * w.to(ACC), 0)
    if out is not None:
        if bias is not None:
            acc += tl.load(bias + d, mask=within, other=0).to(ACC)
        tl.store(out + row * out_row + d * out_column, acc.to(out.dtype.element_ty), mask=within)
    if sums is not None:
        if tl.program_id(1) == 0:
            tl.store(sums + row, total.to(sums.dtype.element_ty))


# -------------------------------------------------------------------- before the backward products


# Long: Triton compiles a kernel from one function, and many of the lines are its arguments.
@kernel
def pointwise(  # type: ignore[no-untyped-def]
    upper,
    pre,
    gate,
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
    """Write C = g · gate · act'(z), zero at closed pairs, and the gate's gradient Σ g · act(z).

    The second is formed where the gate is open or, if given, where ``wide_rows`` is. A program takes BM examples and BN
    units, or the whole of one group.
    """
    b = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    valid = b < batch
    total = tl.zeros((BM,), ACC)
    size = BN if UNIT else group
    low = tl.program_id(1) * size
    for start in range(0, size, BN):
        k = start + tl.arange(0, BN)
        n = low + k
        within = (k < size) & (n < units)
        inside = valid[:, None] & within[None, :]
        at = b[:, None] * units + n[None, :]
        # Single units are read whether open or not: skipping the closed ones takes longer.
        if UNIT:
            value = tl.load(gate + at, mask=inside, other=0).to(ACC)
            found = value != 0
            wide, read = found, inside
            if wide_rows is not None:
                wide = open_pairs(wide_rows, gate, b[:, None], n[None, :], inside, gates, group, row_words)
        else:
            each = tl.load(gate + b * gates + tl.program_id(1), mask=valid, other=0).to(ACC)
            row = each != 0
            some = row
            if wide_rows is not None:
                some = open_pairs(wide_rows, gate, b, low, valid, gates, group, row_words)
            value, found, wide = each[:, None], row[:, None], some[:, None]
            read = (row | some)[:, None] & within[None, :]
        g = tl.load(upper + at, mask=read, other=0).to(ACC)
        if pre is not None:
            z = tl.load(pre + at, mask=read, other=0).to(ACC)
        if coefficient is not None:
            c = g * value
            if ACTIVATION != "identity":
                c *= slope(z, ACTIVATION)
            tl.store(coefficient + at, tl.where(found, c, 0).to(coefficient.dtype.element_ty), mask=inside)
        if slopes is not None:
            s = tl.where(wide, g * activate(z, ACTIVATION), 0)
            if UNIT:
                tl.store(slopes + at, s.to(slopes.dtype.element_ty), mask=inside)
            else:
                total += tl.sum(s, 1)
    if slopes is not None and not UNIT:
        tl.store(slopes + b * gates + tl.program_id(1), total.to(slopes.dtype.element_ty), mask=valid)


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
    # All units of a group find the same; the first one writes. The order does not matter for whole numbers.
    leads = (n < units) & (n % group == 0)
    tl.store(gate + at, tl.where(found, 1.0, 0.0).to(gate.dtype.element_ty), mask=inside & leads[None, :])
    tl.atomic_add(counts + n // group, tl.sum(found.to(tl.int32), 0), mask=leads)
