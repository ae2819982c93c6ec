"""Vector microkernels over rows of float32, bfloat16 or int8 numbers, multiplied as float32.

The argument ``kind`` only says how a row's numbers are stored: float32, bfloat16 (as uint16) or int8.
"""

from typing import Any

from llvmlite import ir
from numba import types

from gatelet.kernels.backends.numba import vector as v

MOST = 8
"""Examples that are multiplied with a row at once, to which it is added at once, or of which it is the sum."""
ROWS = 8
"""Rows that are multiplied with a single example at once."""
BEGIN = 256
"""Bytes prefetched of the beginning of a float32 row; the processor itself predicts the rest of it."""
LANES = v.VECTOR // 4
SIZES = {types.float32: 4, types.uint16: 2, types.int8: 1}
"""Bytes of a stored number."""
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_FLOATS.element_size = 4


def _stored(kind: Any) -> Any:
    if kind == types.float32:
        return _FLOATS
    return ir.VectorType(ir.IntType(8 * SIZES[kind]), LANES)


def _floats(builder: Any, value: Any, kind: Any) -> Any:
    """Return stored numbers as float32."""
    words = ir.VectorType(_I32, LANES)
    if kind == types.uint16:
        sixteen = ir.Constant(words, [16] * LANES)
        return builder.bitcast(builder.shl(builder.zext(value, words), sixteen), _FLOATS)
    return builder.sitofp(builder.sext(value, words), _FLOATS) if kind == types.int8 else value


def _whole(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    stored = _stored(kind)
    value = builder.load(v._at(builder, address, offset * SIZES[kind], stored), align=SIZES[kind])
    return _floats(builder, value, kind)


def _part(builder: Any, address: Any, count: Any, kind: Any) -> Any:
    """Return the first ``count`` numbers (none if negative), then zeros; memory behind them is not read."""
    stored = _stored(kind)
    lanes = ir.Constant(ir.VectorType(_I64, LANES), list(range(LANES)))
    mask = builder.icmp_signed("<", lanes, v._splat(builder, count, LANES))
    suffix = f"v{LANES}{'f' if kind == types.float32 else 'i'}{8 * SIZES[kind]}"
    pointer = builder.inttoptr(address, stored.as_pointer())
    args = [pointer, _I32(SIZES[kind]), mask, ir.Constant(stored, None)]
    return _floats(builder, v._call(builder, f"llvm.masked.load.{suffix}.p0{suffix}", stored, args), kind)


def _by_count(builder: Any, size: Any, body: Any, most: int = MOST, least: int = 1) -> None:
    """Emit ``body(k)`` for ``least`` … ``most``, and the switch between them."""
    done = builder.append_basic_block("counts.done")
    switch = builder.switch(size, done)
    for k in range(least, most + 1):
        block = builder.append_basic_block(f"count{k}")
        switch.add_case(_I64(k), block)
        builder.position_at_end(block)
        body(k)
        builder.branch(done)
    builder.position_at_end(done)


def _examples(builder: Any, base: Any, pitch: Any, places: Any, k: int) -> list[Any]:
    """Return the addresses of the rows of the k examples that the bytes of ``places`` name."""
    bytes_ = [builder.and_(builder.lshr(places, _I64(8 * e)), _I64(255)) for e in range(k)]
    return [builder.add(base, builder.mul(each, pitch)) for each in bytes_]


@v.intrinsic
def row_dots(
    typing: Any,
    size: Any,
    row: Any,
    x: Any,
    pitch: Any,
    places: Any,
    width: Any,
    later: Any,
    result: Any,
    kind: Any,
) -> Any:
    """Write ⟨row, x[b]⟩ to ``result`` for ``size`` examples b, at most MOST; the row at ``later`` is prefetched.

    x is float32, its rows ``pitch`` bytes apart; the bytes of ``places`` number the examples.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size, row, x, pitch, places, width, later, result, _ = args
        kind = signature.args[8]
        bytes_ = SIZES[kind]

        def body(k: int) -> None:
            # A chain of multiply-adds waits for itself: few examples have several each.
            turns = max(4 // k, 1)
            rows = _examples(builder, x, pitch, places, k)
            whole = builder.mul(builder.sdiv(width, _I64(turns * LANES)), _I64(turns * LANES))
            step = v._Loop(builder, whole, turns * LANES)
            chains = [step.carry(ir.Constant(_FLOATS, None)) for _ in range(k * turns)]
            step.open()
            here = builder.mul(step.index, _I64(bytes_))
            for line in range(0, turns * LANES * bytes_, 64):
                v._prefetch(builder, builder.add(builder.add(later, here), _I64(line)))
            at, over = builder.add(row, here), builder.mul(step.index, _I64(4))
            following = []
            for turn in range(turns):
                own = _whole(builder, at, turn * LANES, kind)
                for e in range(k):
                    other = v._load(builder, builder.add(rows[e], over), 4 * turn * LANES, _FLOATS)
                    following.append(v._fma(builder, own, other, chains[turn * k + e]))
            step.close(following)
            sums = list(chains)
            for turn in range(turns):
                first = builder.add(whole, _I64(turn * LANES))
                rest = builder.sub(width, first)
                own = _part(builder, builder.add(row, builder.mul(first, _I64(bytes_))), rest, kind)
                for e in range(k):
                    other = v._masked(builder, builder.add(rows[e], builder.mul(first, _I64(4))), rest, _FLOATS)
                    sums[turn * k + e] = v._fma(builder, own, other, sums[turn * k + e])
            totals = []
            for e in range(k):
                for turn in range(1, turns):
                    sums[e] = builder.fadd(sums[e], sums[turn * k + e])
                totals.append(sums[e])
            for e in range(0, k, 4):
                found = v._across(builder, totals[e : e + 4], 4)
                for lane in range(min(4, k - e)):
                    v._store(builder, builder.extract_element(found, _I32(lane)), result, 4 * (e + lane))

        _by_count(builder, size, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8, kind), generate


@v.intrinsic
def row_spread(
    typing: Any, size: Any, row: Any, y: Any, pitch: Any, places: Any, width: Any, scales: Any, later: Any, kind: Any
) -> Any:
    """Add scale[e] · row to y[b] for ``size`` examples b, at most MOST; the row at ``later`` is prefetched.

    Arguments are as in ``row_dots``.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size, row, y, pitch, places, width, scales, later, _ = args
        kind = signature.args[8]
        bytes_ = SIZES[kind]

        def body(k: int) -> None:
            turns = max(4 // k, 1)
            rows, each = _examples(builder, y, pitch, places, k), _scales(builder, scales, k)
            whole = builder.mul(builder.sdiv(width, _I64(turns * LANES)), _I64(turns * LANES))
            step = v._Loop(builder, whole, turns * LANES)
            step.open()
            here, over = builder.mul(step.index, _I64(bytes_)), builder.mul(step.index, _I64(4))
            for line in range(0, turns * LANES * bytes_, 64):
                v._prefetch(builder, builder.add(builder.add(later, here), _I64(line)))
            targets = [builder.add(each_row, over) for each_row in rows]
            for turn in range(turns):
                own = _whole(builder, builder.add(row, here), turn * LANES, kind)
                before = [v._load(builder, target, 4 * turn * LANES, _FLOATS) for target in targets]
                for scale, old, target in zip(each, before, targets, strict=True):
                    v._store(builder, v._fma(builder, scale, own, old), target, 4 * turn * LANES)
            step.close([])
            for turn in range(turns):
                first = builder.add(whole, _I64(turn * LANES))
                rest = builder.sub(width, first)
                own = _part(builder, builder.add(row, builder.mul(first, _I64(bytes_))), rest, kind)
                for scale, each_row in zip(each, rows, strict=True):
                    target = builder.add(each_row, builder.mul(first, _I64(4)))
                    old = v._masked(builder, target, rest, _FLOATS)
                    v._masked_store(builder, v._fma(builder, scale, own, old), target, rest)

        _by_count(builder, size, body, MOST)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8, kind), generate


@v.intrinsic
def row_sum(
    typing: Any,
    size: Any,
    x: Any,
    pitch: Any,
    places: Any,
    width: Any,
    scales: Any,
    start: Any,
    target: Any,
    stream: Any,
    one: Any,
) -> Any:
    """Write start + Σ_e scale[e] · x[b] to ``target`` for 0 to MOST examples b; without ``start`` if that is 0.

    Arguments are as in ``row_dots``. If ``stream``, the numbers go past the caches; the target must then be aligned to
    vectors, and the width a multiple of them.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size, x, pitch, places, width, scales, start, target, stream, _ = args
        some = builder.icmp_signed("!=", start, _I64(0))
        stream = builder.icmp_signed("!=", stream, _I64(0))
        # Without a start x is read in its place. The target must not be read: its lines would come from memory.
        start = builder.select(some, start, x)
        some = v._splat(builder, some, LANES)
        zero = ir.Constant(_FLOATS, None)

        def body(k: int) -> None:
            rows, each = _examples(builder, x, pitch, places, k), _scales(builder, scales, k)
            whole = builder.mul(builder.sdiv(width, _I64(LANES)), _I64(LANES))

            def total(load: Any, at: Any) -> Any:
                value = builder.select(some, load(builder.add(start, at)), zero)
                for scale, each_row in zip(each, rows, strict=True):
                    value = v._fma(builder, scale, load(builder.add(each_row, at)), value)
                return value

            def loop(store: Any) -> None:
                step = v._Loop(builder, whole, LANES)
                step.open()
                over = builder.mul(step.index, _I64(4))
                found = total(lambda address: v._load(builder, address, 0, _FLOATS), over)
                store(found, builder.add(target, over))
                step.close([])

            with builder.if_else(stream) as (past, near):
                with past:
                    loop(lambda found, address: _stream(builder, found, address))
                with near:
                    loop(lambda found, address: v._store(builder, found, address, 0))
            rest, over = builder.sub(width, whole), builder.mul(whole, _I64(4))
            with builder.if_then(builder.icmp_signed("!=", rest, _I64(0))):
                found = total(lambda address: v._masked(builder, address, rest, _FLOATS), over)
                v._masked_store(builder, found, builder.add(target, over), rest)

        _by_count(builder, size, body, MOST, least=0)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9, one), generate


def _stream(builder: Any, value: Any, address: Any) -> None:
    """Store a vector past the caches."""
    stored = builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=v.VECTOR)
    stored.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))


def _scales(builder: Any, scales: Any, k: int) -> list[Any]:
    """Return k numbers at an address, a vector of each."""
    return [v._splat(builder, v._load(builder, scales, 4 * e, ir.FloatType()), LANES) for e in range(k)]


def _listed(builder: Any, base: Any, pitch: Any, units: Any, k: int) -> list[Any]:
    """Return the addresses of the rows of the next k units of a list whose entries are 16 bytes."""
    numbers = [builder.load(v._at(builder, units, 16 * e, _I64), align=8) for e in range(k)]
    return [builder.add(base, builder.mul(each, pitch)) for each in numbers]


def _ask_for_begin(builder: Any, ahead: list[Any], bytes_: int) -> None:
    """Prefetch the first lines of float32 rows. Rows of fewer bytes are prefetched line by line in the loop."""
    for line in range(0, BEGIN if bytes_ == 4 else 0, 64):
        for each in ahead:
            v._prefetch(builder, builder.add(each, _I64(line)))


@v.intrinsic
def rows_dots(
    typing: Any, size: Any, units: Any, later: Any, base: Any, x: Any, width: Any, result: Any, kind: Any
) -> Any:
    """Write ⟨row of a unit, x⟩ to ``result`` for ``size`` listed units, at most ROWS; those at ``later`` are
    prefetched.

    Rows follow each other from ``base`` on. ROWS of them are read at once, as many streams as a processor follows.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size, units, later, base, x, width, result, _ = args
        kind = signature.args[7]
        bytes_ = SIZES[kind]

        def body(k: int) -> None:
            pitch = builder.mul(width, _I64(bytes_))
            rows = _listed(builder, base, pitch, units, k)
            ahead = _listed(builder, base, pitch, later, k)
            turns = max(4 // bytes_, 1)
            whole = builder.mul(builder.sdiv(width, _I64(turns * LANES)), _I64(turns * LANES))
            _ask_for_begin(builder, ahead, bytes_)
            step = v._Loop(builder, whole, turns * LANES)
            chains = [step.carry(ir.Constant(_FLOATS, None)) for _ in range(k)]
            step.open()
            here, over = builder.mul(step.index, _I64(bytes_)), builder.mul(step.index, _I64(4))
            sums = list(chains)
            if bytes_ < 4:  # of longer rows the processor foresees all but the beginning
                for each_ahead in ahead:
                    v._prefetch(builder, builder.add(each_ahead, here))
            for turn in range(turns):
                other = v._load(builder, builder.add(x, over), 4 * turn * LANES, _FLOATS)
                for e in range(k):
                    own = _whole(builder, builder.add(rows[e], here), turn * LANES, kind)
                    sums[e] = v._fma(builder, own, other, sums[e])
            step.close(sums)
            sums = list(chains)
            for turn in range(turns):
                first = builder.add(whole, _I64(turn * LANES))
                rest = builder.sub(width, first)
                other = v._masked(builder, builder.add(x, builder.mul(first, _I64(4))), rest, _FLOATS)
                for e in range(k):
                    own = _part(builder, builder.add(rows[e], builder.mul(first, _I64(bytes_))), rest, kind)
                    sums[e] = v._fma(builder, own, other, sums[e])
            for first_row in range(0, k, 4):
                some = sums[first_row : first_row + 4]
                totals = v._across(builder, some, 4)
                for e in range(len(some)):
                    v._store(builder, builder.extract_element(totals, _I32(e)), result, 4 * (first_row + e))

        _by_count(builder, size, body, ROWS)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, kind), generate


@v.intrinsic
def rows_axpy(
    typing: Any, size: Any, units: Any, later: Any, base: Any, y: Any, width: Any, scales: Any, kind: Any
) -> Any:
    """Add Σ scale · row to y for ``size`` listed units, at most ROWS. Arguments are as in ``rows_dots``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size, units, later, base, y, width, scales, _ = args
        kind = signature.args[7]
        bytes_ = SIZES[kind]

        def body(k: int) -> None:
            pitch = builder.mul(width, _I64(bytes_))
            rows = _listed(builder, base, pitch, units, k)
            ahead = _listed(builder, base, pitch, later, k)
            each = _scales(builder, scales, k)
            turns = max(4 // bytes_, 1)
            whole = builder.mul(builder.sdiv(width, _I64(turns * LANES)), _I64(turns * LANES))
            _ask_for_begin(builder, ahead, bytes_)
            step = v._Loop(builder, whole, turns * LANES)
            step.open()
            here, over = builder.mul(step.index, _I64(bytes_)), builder.mul(step.index, _I64(4))
            if bytes_ < 4:  # of longer rows the processor foresees all but the beginning
                for each_ahead in ahead:
                    v._prefetch(builder, builder.add(each_ahead, here))
            for turn in range(turns):
                target = builder.add(y, over)
                total = v._load(builder, target, 4 * turn * LANES, _FLOATS)
                for e in range(k):
                    own = _whole(builder, builder.add(rows[e], here), turn * LANES, kind)
                    total = v._fma(builder, each[e], own, total)
                v._store(builder, total, target, 4 * turn * LANES)
            step.close([])
            for turn in range(turns):
                first = builder.add(whole, _I64(turn * LANES))
                rest = builder.sub(width, first)
                target = builder.add(y, builder.mul(first, _I64(4)))
                total = v._masked(builder, target, rest, _FLOATS)
                for e in range(k):
                    own = _part(builder, builder.add(rows[e], builder.mul(first, _I64(bytes_))), rest, kind)
                    total = v._fma(builder, each[e], own, total)
                v._masked_store(builder, total, target, rest)

        _by_count(builder, size, body, ROWS)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, kind), generate


@v.intrinsic
def widen(typing: Any, target: Any, source: Any, count: Any) -> Any:
    """Write ``count`` bfloat16 numbers as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, source, count = args
        whole = builder.and_(count, _I64(-LANES))
        step = v._Loop(builder, whole, LANES)
        step.open()
        numbers = _whole(builder, builder.add(source, builder.mul(step.index, _I64(2))), 0, types.uint16)
        v._store(builder, numbers, builder.add(target, builder.mul(step.index, _I64(4))), 0)
        step.close([])
        rest = builder.sub(count, whole)
        numbers = _part(builder, builder.add(source, builder.mul(whole, _I64(2))), rest, types.uint16)
        v._masked_store(builder, numbers, builder.add(target, builder.mul(whole, _I64(4))), rest)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@v.intrinsic
def round_to_half(typing: Any, target: Any, source: Any, count: Any) -> Any:
    """Write ``count`` float32 numbers as bfloat16, rounded to the nearest, of two to the even one. NaN stays NaN."""
    words, halves = ir.VectorType(_I32, LANES), ir.VectorType(ir.IntType(16), LANES)

    def constant(value: int) -> Any:
        return ir.Constant(words, [value] * LANES)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, source, count = args

        def rounded(numbers: Any) -> Any:
            bits = builder.bitcast(numbers, words)
            odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
            near = builder.add(bits, builder.add(odd, constant(0x7FFF)))
            usual = builder.fcmp_ordered("==", numbers, numbers)
            near = builder.select(usual, near, builder.or_(bits, constant(1 << 22)))
            return builder.trunc(builder.lshr(near, constant(16)), halves)

        whole = builder.and_(count, _I64(-LANES))
        step = v._Loop(builder, whole, LANES)
        step.open()
        numbers = v._load(builder, builder.add(source, builder.mul(step.index, _I64(4))), 0, _FLOATS)
        at = builder.add(target, builder.mul(step.index, _I64(2)))
        builder.store(rounded(numbers), builder.inttoptr(at, halves.as_pointer()), align=2)
        step.close([])
        rest = builder.sub(count, whole)
        numbers = v._masked(builder, builder.add(source, builder.mul(whole, _I64(4))), rest, _FLOATS)
        lanes = ir.Constant(ir.VectorType(_I64, LANES), list(range(LANES)))
        mask = builder.icmp_signed("<", lanes, v._splat(builder, rest, LANES))
        at = builder.inttoptr(builder.add(target, builder.mul(whole, _I64(2))), halves.as_pointer())
        name = f"llvm.masked.store.v{LANES}i16.p0v{LANES}i16"
        v._call(builder, name, ir.VoidType(), [rounded(numbers), at, _I32(2), mask])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate
