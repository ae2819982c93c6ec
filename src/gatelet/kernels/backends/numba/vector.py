"""Vector microkernels, written as LLVM IR that Numba compiles into its callers.

In a Python loop the compiler decides what stays in registers, but the products need their sums there. A vector is as
wide as a register of the processor: LLVM would split wider ones in two, and the sums of a record would not fit.

Addresses are int64. The argument ``one`` only gives the type of the numbers.
"""

import inspect
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import config
from numba.extending import intrinsic as _intrinsic

_FEATURES = config.CPU_FEATURES or get_host_cpu_features().flatten()
VECTOR = 64 if "+avx512f" in _FEATURES else 32
"""Bytes of a vector, as many as a register of the processor that Numba compiles for."""
SLICE = 512
"""The most bytes of a row in a block: 64 such rows are as large as most first-level caches."""
ALONE = 32
"""This bit of a record's first word says that no other record has the same row; the bits below are the row's number."""
RECORD, MOST = 16, 8
"""Bytes of a record of pairs, and the most pairs in it: eight chains of multiply-adds hide their latency, and the sums
and weights fit in 16 registers."""

AHEAD = 4
"""A weight's slice is prefetched this many records ahead (more if it is small): processors do not predict it."""

_I32, _I64, _BIT = ir.IntType(32), ir.IntType(64), ir.IntType(1)


def intrinsic(function: Any) -> Any:
    """Numba's decorator, on the function itself: a run-time type checker may have wrapped it."""
    return _intrinsic(inspect.unwrap(function))


def _vector(context: Any, one: Any) -> Any:
    element = context.get_value_type(one)
    vector = ir.VectorType(element, VECTOR // (4 if isinstance(element, ir.FloatType) else 8))
    vector.element_size = VECTOR // vector.count
    return vector


def _call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    known = builder.module.globals.get(name)
    function = known or ir.Function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def _suffix(vector: Any) -> str:
    return f"v{vector.count}f{8 * VECTOR // vector.count}"


def _at(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    return builder.inttoptr(builder.add(address, _I64(offset)), kind.as_pointer())


def _load(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    align = 4 if isinstance(element, ir.FloatType) else 8
    return builder.load(_at(builder, address, offset, kind), align=align)


def _store(builder: Any, value: Any, address: Any, offset: int) -> None:
    element = value.type.element if isinstance(value.type, ir.VectorType) else value.type
    builder.store(value, _at(builder, address, offset, value.type), align=4 if isinstance(element, ir.FloatType) else 8)


def _masked(builder: Any, address: Any, count: Any, vector: Any) -> Any:
    """Load the first ``count`` numbers, then zeros; memory behind them is not read."""
    lanes = ir.Constant(ir.VectorType(_I64, vector.count), list(range(vector.count)))
    mask = builder.icmp_signed("<", lanes, _splat(builder, count, vector.count))
    name = f"llvm.masked.load.{_suffix(vector)}.p0{_suffix(vector)}"
    pointer = builder.inttoptr(address, vector.as_pointer())
    return _call(builder, name, vector, [pointer, _I32(vector.element_size), mask, ir.Constant(vector, None)])


def _masked_store(builder: Any, value: Any, address: Any, count: Any) -> None:
    vector = value.type
    lanes = ir.Constant(ir.VectorType(_I64, vector.count), list(range(vector.count)))
    mask = builder.icmp_signed("<", lanes, _splat(builder, count, vector.count))
    name = f"llvm.masked.store.{_suffix(vector)}.p0{_suffix(vector)}"
    pointer = builder.inttoptr(address, vector.as_pointer())
    _call(builder, name, ir.VoidType(), [value, pointer, _I32(4), mask])


def _splat(builder: Any, value: Any, count: int) -> Any:
    kind = ir.VectorType(value.type, count)
    empty = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(empty, value, _I32(0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(_I32, count), [0] * count))


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, f"llvm.fma.{_suffix(a.type)}", a.type, [a, b, c])


def _half(builder: Any, value: Any, low: int, count: int) -> Any:
    empty = ir.Constant(value.type, ir.Undefined)
    picked = ir.Constant(ir.VectorType(_I32, count), [low + lane for lane in range(count)])
    return builder.shuffle_vector(value, empty, picked)


def _folded(builder: Any, value: Any, count: int) -> Any:
    """Add the upper half of the lanes to the lower one until ``count`` are left."""
    lanes = value.type.count
    while lanes > count:
        lanes //= 2
        value = builder.fadd(_half(builder, value, 0, lanes), _half(builder, value, lanes, lanes))
    return value


def _prefetch(builder: Any, address: Any, to_write: bool = False) -> None:
    """Prefetch a line of 64 bytes. Any address may be given."""
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, _I32(int(to_write)), _I32(3), _I32(1)])


def _ctz(builder: Any, word: Any) -> Any:
    return _call(builder, "llvm.cttz.i64", _I64, [word, _BIT(1)])


class _Loop:
    """A loop from 0 to ``end`` by ``step``. ``carry`` adds a value that changes, ``close`` takes the next values."""

    def __init__(self, builder: Any, end: Any, step: int) -> None:
        self.builder, self.step = builder, step
        self.before = builder.block
        self.head, self.body, self.done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
        builder.branch(self.head)
        builder.position_at_end(self.head)
        self.index = builder.phi(_I64)
        self.index.add_incoming(_I64(0), self.before)
        self.more = builder.icmp_signed("<", self.index, end)
        self.carried: list[Any] = []

    def carry(self, start: Any) -> Any:
        # Before the first instruction that is not a phi.
        self.builder.position_before(self.more)
        phi = self.builder.phi(start.type)
        phi.add_incoming(start, self.before)
        self.carried.append(phi)
        return phi

    def open(self) -> None:
        self.builder.position_at_end(self.head)
        self.builder.cbranch(self.more, self.body, self.done)
        self.builder.position_at_end(self.body)

    def close(self, following: list[Any]) -> None:
        builder = self.builder
        self.index.add_incoming(builder.add(self.index, _I64(self.step)), builder.block)
        for phi, value in zip(self.carried, following, strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(self.head)
        builder.position_at_end(self.done)


def _by_size(builder: Any, size: Any, body: Any, most: int = MOST) -> None:
    """Emit ``body(k)`` for every size from 1 to ``most``, by default of a record, and the switch between them."""
    done = builder.append_basic_block("sizes.done")
    switch = builder.switch(size, done)
    for k in range(1, most + 1):
        block = builder.append_basic_block(f"size{k}")
        switch.add_case(_I64(k), block)
        builder.position_at_end(block)
        body(k)
        builder.branch(done)
    builder.position_at_end(done)


def _number(builder: Any, record: Any) -> Any:
    """Return the row that a record names."""
    return builder.zext(builder.load(_at(builder, record, 0, _I32), align=8), _I64)


def _places(builder: Any, record: Any, k: int, block: Any, stride: Any) -> list[Any]:
    """Return the addresses of the rows of a block that a record names."""
    listed = builder.load(_at(builder, record, 8, _I64), align=8)
    bytes_ = [builder.and_(builder.lshr(listed, _I64(8 * e)), _I64(255)) for e in range(k)]
    return [builder.add(block, builder.mul(each, stride)) for each in bytes_]


def _across(builder: Any, sums: list[Any], lanes: int) -> Any:
    """Return one 128-bit vector with the totals of ``lanes`` vectors; missing ones count as zero.

    The vectors are transposed while they are added: log2(lanes) steps for all of them, instead of as many for each.
    """
    vector = sums[0].type
    count, zero = vector.count, ir.Constant(vector, None)
    width = 1
    while len(sums) > 1 or width < lanes:
        # Within each 128 bits, pieces of ``width`` lanes of the two vectors alternate.
        low, high = [], []
        for start in range(0, count, lanes):
            for turn in range(lanes // width // 2):
                for base in (0, count):
                    low += [base + start + turn * width + lane for lane in range(width)]
                    high += [base + start + lanes // 2 + turn * width + lane for lane in range(width)]
        masks = [ir.Constant(ir.VectorType(_I32, count), each) for each in (low, high)]
        pairs = [(sums[i], sums[i + 1] if i + 1 < len(sums) else zero) for i in range(0, len(sums), 2)]
        sums = [builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks)) for a, b in pairs]
        width *= 2
    return _folded(builder, sums[0], lanes)


# Long: it emits one loop, and the parts of a loop share its values.
@intrinsic
def dot(
    typing: Any,
    size: Any,
    records: Any,
    count: Any,
    w: Any,
    pitch: Any,
    block: Any,
    stride: Any,
    length: Any,
    rest: Any,
    sums: Any,
    one: Any,
) -> Any:
    """Add ⟨w[n], block[e]⟩ to the sums of ``count`` records of ``size`` pairs (n, e).

    Rows of w are ``pitch`` bytes apart, rows of the block ``stride`` bytes. A row has ``length`` bytes of whole
    vectors, then ``rest`` numbers, which are read through a mask.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size, records, count, w, pitch, block, stride, length, rest, sums, _ = args
        vector = _vector(context, signature.args[10])
        lanes = 16 // vector.element_size
        part = ir.VectorType(vector.element, lanes)
        some = builder.icmp_signed("!=", rest, _I64(0))

        def body(k: int) -> None:
            visit = _Loop(builder, count, 1)
            visit.open()
            record = builder.add(records, builder.mul(visit.index, _I64(RECORD)))
            row = builder.add(w, builder.mul(_number(builder, record), pitch))
            later = _number(builder, builder.add(record, _I64(max(AHEAD, 4 * AHEAD // k) * RECORD)))
            later = builder.add(w, builder.mul(later, pitch))
            ask = _Loop(builder, length, SLICE)
            ask.open()
            for line in range(0, SLICE, 64):
                _prefetch(builder, builder.add(later, builder.add(ask.index, _I64(line))))
            ask.close([])
            places = _places(builder, record, k, block, stride)
            step = _Loop(builder, length, VECTOR)
            chains = [step.carry(ir.Constant(vector, None)) for _ in range(k)]
            step.open()
            own = _load(builder, builder.add(row, step.index), 0, vector)
            following = []
            for place, chain in zip(places, chains, strict=True):
                following.append(_fma(builder, own, _load(builder, builder.add(place, step.index), 0, vector), chain))
            step.close(following)
            whole = builder.block
            masked, end = builder.append_basic_block("masked"), builder.append_basic_block("end")
            builder.cbranch(some, masked, end)
            builder.position_at_end(masked)
            own = _masked(builder, builder.add(row, length), rest, vector)
            more = []
            for place, chain in zip(places, chains, strict=True):
                more.append(_fma(builder, own, _masked(builder, builder.add(place, length), rest, vector), chain))
            builder.branch(end)
            builder.position_at_end(end)
            totals = []
            for chain, longer in zip(chains, more, strict=True):
                total = builder.phi(vector)
                total.add_incoming(chain, whole)
                total.add_incoming(longer, masked)
                totals.append(total)
            slot = builder.add(sums, builder.mul(visit.index, _I64(MOST * vector.element_size)))
            for first in range(0, k, lanes):
                found = _across(builder, totals[first : first + lanes], lanes)
                before = _load(builder, slot, first * vector.element_size, part)
                _store(builder, builder.fadd(found, before), slot, first * vector.element_size)
            visit.close([])

        _by_size(builder, size, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10, one), generate


@intrinsic
def axpy(
    typing: Any,
    size: Any,
    records: Any,
    count: Any,
    target: Any,
    pitch: Any,
    block: Any,
    stride: Any,
    length: Any,
    rest: Any,
    scales: Any,
    fresh: Any,
    one: Any,
) -> Any:
    """Add Σ_e scale[e] · block[e] to target[n], for ``count`` records of ``size`` pairs (n, e).

    Arguments are as in ``dot``. If ``fresh``, a record that is alone on its row overwrites the row.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size, records, count, target, pitch, block, stride, length, rest, scales, fresh, _ = args
        vector = _vector(context, signature.args[11])
        zero = ir.Constant(vector, None)
        fresh = builder.icmp_signed("!=", fresh, _I64(0))
        some = builder.icmp_signed("!=", rest, _I64(0))

        def body(k: int) -> None:
            visit = _Loop(builder, count, 1)
            visit.open()
            record = builder.add(records, builder.mul(visit.index, _I64(RECORD)))
            row = builder.add(target, builder.mul(_number(builder, record), pitch))
            named = builder.load(_at(builder, record, 0, _I64), align=8)
            alone = builder.and_(fresh, builder.trunc(builder.lshr(named, _I64(ALONE)), _BIT))
            alone = _splat(builder, alone, vector.count)
            places = _places(builder, record, k, block, stride)
            slot = builder.add(scales, builder.mul(visit.index, _I64(MOST * vector.element_size)))
            each = [_load(builder, slot, e * vector.element_size, vector.element) for e in range(k)]
            each = [_splat(builder, scale, vector.count) for scale in each]
            step = _Loop(builder, length, VECTOR)
            step.open()
            total = _load(builder, builder.add(row, step.index), 0, vector)
            total = builder.select(alone, zero, total)
            for scale, place in zip(each, places, strict=True):
                total = _fma(builder, scale, _load(builder, builder.add(place, step.index), 0, vector), total)
            _store(builder, total, builder.add(row, step.index), 0)
            step.close([])
            masked, end = builder.append_basic_block("masked"), builder.append_basic_block("end")
            builder.cbranch(some, masked, end)
            builder.position_at_end(masked)
            total = _masked(builder, builder.add(row, length), rest, vector)
            total = builder.select(alone, zero, total)
            for scale, place in zip(each, places, strict=True):
                total = _fma(builder, scale, _masked(builder, builder.add(place, length), rest, vector), total)
            _masked_store(builder, total, builder.add(row, length), rest)
            builder.branch(end)
            builder.position_at_end(end)
            visit.close([])

        _by_size(builder, size, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11, one), generate


def _tile(units: int, examples: int) -> Any:
    """Dot products of ``units`` consecutive weight rows with ``examples`` listed rows, over all of D.

    Units of one group are open for the same examples, so each loaded vector serves several products.
    """

    @intrinsic
    def tile(typing: Any, w: Any, stride: Any, x: Any, listed: Any, length: Any, result: Any, one: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            w, stride, x, listed, length, result, _ = args
            vector = _vector(context, signature.args[6])
            size = vector.element_size
            left = [builder.add(w, builder.mul(stride, _I64(u))) for u in range(units)]
            right = [
                builder.add(x, builder.mul(stride, builder.zext(_load_int(builder, listed, 4 * e), _I64)))
                for e in range(examples)
            ]
            whole = builder.and_(length, _I64(-vector.count))
            before = builder.block
            head, loop, tail = (builder.append_basic_block(f"tile.{name}") for name in ("head", "loop", "tail"))
            builder.branch(head)
            builder.position_at_end(head)
            i = builder.phi(_I64)
            i.add_incoming(_I64(0), before)
            sums = [[builder.phi(vector) for _ in range(examples)] for _ in range(units)]
            for line in sums:
                for phi in line:
                    phi.add_incoming(ir.Constant(vector, None), before)
            builder.cbranch(builder.icmp_signed("<", i, whole), loop, tail)
            builder.position_at_end(loop)
            offset = builder.mul(i, _I64(size))
            b = [_load(builder, builder.add(address, offset), 0, vector) for address in right]
            for u in range(units):
                a = _load(builder, builder.add(left[u], offset), 0, vector)
                for e in range(examples):
                    sums[u][e].add_incoming(_fma(builder, a, b[e], sums[u][e]), loop)
            i.add_incoming(builder.add(i, _I64(vector.count)), loop)
            builder.branch(head)
            builder.position_at_end(tail)
            rest = builder.sub(length, whole)
            offset = builder.mul(whole, _I64(size))
            # The masked end reads nothing if D is a multiple of the vector.
            b = [_masked(builder, builder.add(address, offset), rest, vector) for address in right]
            totals = []
            for u in range(units):
                a = _masked(builder, builder.add(left[u], offset), rest, vector)
                totals += [_fma(builder, a, b[e], sums[u][e]) for e in range(examples)]
            lanes = min(16 // size, len(totals))
            for first in range(0, len(totals), lanes):
                _store(builder, _across(builder, totals[first : first + lanes], lanes), result, size * first)
            return context.get_dummy_value()

        integers = [types.int64] * 6
        return types.void(*integers, one), generate

    return tile


TILE = 4 if VECTOR == 64 else 3
"""Examples in a tile of four units: the sums and factors fit in the registers (32 with AVX-512, 16 with AVX2)."""
tile, tile41, tile11 = _tile(4, TILE), _tile(4, 1), _tile(1, 1)


def _load_int(builder: Any, address: Any, offset: int) -> Any:
    return builder.load(_at(builder, address, offset, _I32), align=4)


@intrinsic
def gated(typing: Any, out: Any, values: Any, gate: Any, count: Any, one: Any) -> Any:
    """Write values · gate for ``count`` numbers; where the gate is zero, write zero even if the value is NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, values, gate, count, _ = args
        vector = _vector(context, signature.args[4])
        zero = ir.Constant(vector, None)

        def product(value: Any, by: Any) -> Any:
            return builder.select(builder.fcmp_unordered("!=", by, zero), builder.fmul(value, by), zero)

        whole = builder.mul(builder.and_(count, _I64(-vector.count)), _I64(vector.element_size))
        step = _Loop(builder, whole, VECTOR)
        step.open()
        value, by = (_load(builder, builder.add(each, step.index), 0, vector) for each in (values, gate))
        _store(builder, product(value, by), builder.add(out, step.index), 0)
        step.close([])
        rest = builder.and_(count, _I64(vector.count - 1))
        value, by = (_masked(builder, builder.add(each, whole), rest, vector) for each in (values, gate))
        _masked_store(builder, product(value, by), builder.add(out, whole), rest)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, one), generate


@intrinsic
def nonzero_bits(typing: Any, address: Any, one: Any) -> Any:
    """Return a word whose bit i says that number i at ``address`` is not zero (NaN is not), for 64 numbers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = _vector(context, signature.args[1])
        word: Any = _I64(0)
        for part in range(64 // vector.count):
            value = _load(builder, args[0], VECTOR * part, vector)
            flags = builder.fcmp_unordered("!=", value, ir.Constant(vector, None))
            packed = builder.zext(builder.bitcast(flags, ir.IntType(vector.count)), _I64)
            word = builder.or_(word, builder.shl(packed, _I64(part * vector.count)))
        return word

    return types.int64(types.int64, one), generate


@intrinsic
def nonzero_columns(typing: Any, address: Any, pitch: Any, count: Any, target: Any, one: Any) -> Any:
    """Write 64 words of 32 bits to ``target``: bit b of word i says that number i of row b is not zero (NaN is not).

    The rows, ``count`` ≤ 32 of them, are ``pitch`` bytes apart.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, pitch, count, target, _ = args
        vector = _vector(context, signature.args[4])
        kind = ir.VectorType(_I32, vector.count)
        parts = 64 // vector.count
        step = _Loop(builder, count, 1)
        words = [step.carry(ir.Constant(kind, None)) for _ in range(parts)]
        step.open()
        row = builder.add(address, builder.mul(step.index, pitch))
        bit = _splat(builder, builder.shl(_I32(1), builder.trunc(step.index, _I32)), vector.count)
        following = []
        for part, word in enumerate(words):
            flags = builder.fcmp_unordered("!=", _load(builder, row, VECTOR * part, vector), ir.Constant(vector, None))
            following.append(builder.or_(word, builder.select(flags, bit, ir.Constant(kind, None))))
        step.close(following)
        for part, word in enumerate(words):
            builder.store(word, _at(builder, target, 4 * vector.count * part, kind), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, one), generate


@intrinsic
def lowest(typing: Any, word: Any) -> Any:
    """Return the index of the lowest set bit."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _ctz(builder, args[0])

    return types.int64(types.int64), generate


@intrinsic
def take(typing: Any, address: Any) -> Any:
    """Return a counter's value and add one to it, atomically. So threads take tasks."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _at(builder, args[0], 0, _I64), _I64(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def read_word(typing: Any, address: Any) -> Any:
    """Return the int64 at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_at(builder, args[0], 0, _I64), align=8)

    return types.int64(types.int64), generate


@intrinsic
def write_word(typing: Any, address: Any, value: Any) -> Any:
    """Write an int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], _at(builder, args[0], 0, _I64), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def write_index(typing: Any, address: Any, value: Any) -> Any:
    """Write an int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(builder.trunc(args[1], _I32), _at(builder, args[0], 0, _I32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def read_index(typing: Any, address: Any) -> Any:
    """Return the int32 at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(_load_int(builder, args[0], 0), _I64)

    return types.int64(types.int64), generate


@intrinsic
def read(typing: Any, address: Any, one: Any) -> Any:
    """Return the number at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(builder, args[0], 0, context.get_value_type(signature.args[1]))

    return one(types.int64, one), generate


@intrinsic
def write(typing: Any, address: Any, value: Any) -> Any:
    """Write a number."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, args[1], args[0], 0)
        return context.get_dummy_value()

    return types.void(types.int64, value), generate


@intrinsic
def clear(typing: Any, address: Any, size: Any) -> Any:
    """Set ``size`` bytes to zero."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        _call(builder, "llvm.memset.p0.i64", ir.VoidType(), [pointer, ir.IntType(8)(0), args[1], _BIT(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def copy(typing: Any, target: Any, source: Any, size: Any) -> Any:
    """Copy ``size`` bytes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, come = (builder.inttoptr(each, ir.IntType(8).as_pointer()) for each in args[:2])
        _call(builder, "llvm.memcpy.p0.p0.i64", ir.VoidType(), [to, come, args[2], _BIT(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Prefetch a line of 64 bytes. Any address may be given."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _prefetch(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def prefetch_to_write(typing: Any, address: Any) -> Any:
    """Prefetch a line of 64 bytes that will be written. Any address may be given."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _prefetch(builder, args[0], to_write=True)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def ones(typing: Any, word: Any) -> Any:
    """Return how many bits are set."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "llvm.ctpop.i64", _I64, [args[0]])

    return types.int64(types.int64), generate


@intrinsic
def call(typing: Any, function: Any, argument: Any) -> Any:
    """Call the function at an address with an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()])
        function = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(function, [builder.inttoptr(args[1], ir.IntType(8).as_pointer())])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def call_team(typing: Any, parallel: Any, function: Any, argument: Any, threads: Any) -> Any:
    """Call OpenMP's ``GOMP_parallel``, at an address: ``threads`` threads call the function with the argument."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, _I32, _I32])
        parallel = builder.inttoptr(args[0], kind.as_pointer())
        function, argument = (builder.inttoptr(each, pointer) for each in args[1:3])
        builder.call(parallel, [function, argument, builder.trunc(args[3], _I32), _I32(0)])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def now(typing: Any, clock: Any) -> Any:
    """Return the time of a system clock in nanoseconds."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with builder.goto_entry_block():
            place = builder.alloca(ir.ArrayType(_I64, 2))
        into = builder.bitcast(place, ir.IntType(8).as_pointer())
        _call(builder, "clock_gettime", _I32, [builder.trunc(args[0], _I32), into])
        seconds, rest = (builder.load(builder.gep(place, [_I32(0), _I32(each)])) for each in range(2))
        return builder.add(builder.mul(seconds, _I64(1_000_000_000)), rest)

    return types.int64(types.int64), generate


@intrinsic
def write_first(typing: Any, address: Any, value: Any) -> Any:
    """Write an int64 unless another one than 0 stands there already."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.cmpxchg(_at(builder, args[0], 0, _I64), _I64(0), args[1], "monotonic", "monotonic")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate
