"""Vector microkernels, written as LLVM IR that Numba compiles into its callers.

A Python loop leaves the compiler to guess where a row slice lives; the products need it in registers. Here a
slice is WIDTH vectors of 64 bytes: 512 bytes of a row, 16 numbers of float32 or 8 of float64 to a vector. On a
processor with narrower registers LLVM splits the vectors.

Addresses are int64. The argument ``one`` carries nothing but the type of the numbers.
"""

import inspect
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic as _intrinsic

WIDTH = 8
"""Vectors in a slice: the slice and its running sums fit in 32 registers."""
VECTOR = 64
"""Bytes of a vector."""
SLICE = WIDTH * VECTOR
PART = 16
"""Bytes of a pair's running sum."""
CHAINS = 2
"""Chains of multiply-adds per pair: more of them hide latency, but have to be added up."""

_I32, _I64, _BIT = ir.IntType(32), ir.IntType(64), ir.IntType(1)


def intrinsic(function: Any) -> Any:
    """Numba's decorator, on the function itself: a run-time type checker may have wrapped it."""
    return _intrinsic(inspect.unwrap(function))


def _vector(context: Any, one: Any) -> Any:
    element = context.get_value_type(one)
    return ir.VectorType(element, 16 if isinstance(element, ir.FloatType) else 8)


def _call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    known = builder.module.globals.get(name)
    function = known or ir.Function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def _suffix(vector: Any) -> str:
    return f"v{vector.count}f{1024 // vector.count // 2}"


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
    """Load the first ``count`` numbers, zero for the rest, without touching memory behind them."""
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


def _sum(builder: Any, value: Any) -> Any:
    return builder.extract_element(_folded(builder, value, 1), _I32(0))


def _part(builder: Any, value: Any) -> Any:
    return _folded(builder, value, value.type.count * PART // VECTOR)


def _ctz(builder: Any, word: Any) -> Any:
    return _call(builder, "llvm.cttz.i64", _I64, [word, _BIT(1)])


class _Bits:
    """A loop over the set bits of a word. ``with`` its body; values that change are phis, given in ``carry``."""

    def __init__(self, builder: Any, word: Any) -> None:
        self.builder = builder
        before = builder.block
        self.loop = builder.append_basic_block("bits")
        self.done = builder.append_basic_block("bits.done")
        builder.branch(self.loop)
        builder.position_at_end(self.loop)
        self.word = builder.phi(_I64)
        self.word.add_incoming(word, before)
        self.before = before
        self.carried: list[Any] = []

    def carry(self, start: Any) -> Any:
        phi = self.builder.phi(start.type)
        phi.add_incoming(start, self.before)
        self.carried.append(phi)
        return phi

    def end(self, following: list[Any]) -> None:
        builder = self.builder
        rest = builder.and_(self.word, builder.sub(self.word, _I64(1)))
        self.word.add_incoming(rest, builder.block)
        for phi, value in zip(self.carried, following, strict=True):
            phi.add_incoming(value, builder.block)
        builder.cbranch(builder.icmp_signed("!=", rest, _I64(0)), self.loop, self.done)
        builder.position_at_end(self.done)


def _dot(width: int, masked: bool, fresh: bool) -> Any:
    """For each bit j of ``word`` in turn: sums[k++] (+)= w ∘ block[j], slice by slice; return the end of ``sums``.

    The sums stay four numbers (of float64: two) until all of D is added: a quarter of a vector, so that a task's
    sums stay near, and no more additions of lanes than a processor does beside its multiply-adds.
    """

    @intrinsic
    def dot(typing: Any, w: Any, count: Any, block: Any, word: Any, sums: Any, one: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            w, count, block, word, sums, _ = args
            vector = _vector(context, signature.args[5])
            vector.element_size = 4 if vector.count == 16 else 8
            if masked:
                row = [_masked(builder, w, count, vector)]
            else:
                row = [_load(builder, w, VECTOR * v, vector) for v in range(width)]
            bits = _Bits(builder, word)
            here = bits.carry(sums)
            example = builder.add(block, builder.mul(_ctz(builder, bits.word), _I64(VECTOR * width)))
            chains: list[Any] = [None] * min(width, CHAINS)
            for v in range(width):
                x = _load(builder, example, VECTOR * v, vector)
                chain = chains[v % len(chains)]
                chains[v % len(chains)] = builder.fmul(row[v], x) if chain is None else _fma(builder, row[v], x, chain)
            part = _part(builder, chains[0] if len(chains) == 1 else builder.fadd(*chains))
            _store(builder, part if fresh else builder.fadd(part, _load(builder, here, 0, part.type)), here, 0)
            after = builder.add(here, _I64(PART))
            bits.end([after])
            return after

        integers = [types.int64] * 5
        return types.int64(*integers, one), generate

    return dot


dot_first, dot_more = _dot(WIDTH, False, True), _dot(WIDTH, False, False)
dot_rest_first, dot_rest = _dot(1, True, True), _dot(1, True, False)


def _axpy(width: int, masked: bool, in_turn: bool) -> Any:
    """Add coefficient · rows[j] to the slice ``target`` for each bit j of ``word``.

    The coefficients are one for every j, or only the needed ones ``in_turn``.
    """

    @intrinsic
    def axpy(
        typing: Any,
        target: Any,
        count: Any,
        rows: Any,
        stride: Any,
        coefficient: Any,
        word: Any,
        one: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            target, count, rows, stride, coefficient, word, _ = args
            vector = _vector(context, signature.args[6])
            vector.element_size = 4 if vector.count == 16 else 8
            if masked:
                start = [_masked(builder, target, count, vector)]
            else:
                start = [_load(builder, target, VECTOR * v, vector) for v in range(width)]
            bits = _Bits(builder, word)
            sums = [bits.carry(value) for value in start]
            here = bits.carry(coefficient) if in_turn else None
            j = _ctz(builder, bits.word)
            row = builder.add(rows, builder.mul(j, stride))
            size = _I64(4 if vector.count == 16 else 8)
            scale = here if in_turn else builder.add(coefficient, builder.mul(j, size))
            scale = _load(builder, scale, 0, vector.element)
            scale = _splat(builder, scale, vector.count)
            following = []
            for v in range(width):
                part = _masked(builder, row, count, vector) if masked else _load(builder, row, VECTOR * v, vector)
                following.append(_fma(builder, scale, part, sums[v]))
            bits.end([*following, builder.add(here, size)] if in_turn else following)
            for v in range(width):
                if masked:
                    _masked_store(builder, following[v], target, count)
                else:
                    _store(builder, following[v], target, VECTOR * v)
            return context.get_dummy_value()

        integers = [types.int64] * 6
        return types.void(*integers, one), generate

    return axpy


axpy, axpy_rest = _axpy(WIDTH, False, False), _axpy(1, True, False)
axpy_in_turn, axpy_rest_in_turn = _axpy(WIDTH, False, True), _axpy(1, True, True)


def _tile(units: int, examples: int) -> Any:
    """Dot products of ``units`` consecutive weight rows with ``examples`` listed rows, over all of D.

    Units of one group are open for the same examples, so each loaded vector serves several products.
    """

    @intrinsic
    def tile(typing: Any, w: Any, stride: Any, x: Any, listed: Any, length: Any, result: Any, one: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            w, stride, x, listed, length, result, _ = args
            vector = _vector(context, signature.args[6])
            size = vector.element_size = 4 if vector.count == 16 else 8
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
            # The masked tail reads nothing where D is a multiple of the vector.
            b = [_masked(builder, builder.add(address, offset), rest, vector) for address in right]
            for u in range(units):
                a = _masked(builder, builder.add(left[u], offset), rest, vector)
                for e in range(examples):
                    total = _sum(builder, _fma(builder, a, b[e], sums[u][e]))
                    _store(builder, total, result, size * (u * examples + e))
            return context.get_dummy_value()

        integers = [types.int64] * 6
        return types.void(*integers, one), generate

    return tile


tile44, tile41, tile11 = _tile(4, 4), _tile(4, 1), _tile(1, 1)


def _load_int(builder: Any, address: Any, offset: int) -> Any:
    return builder.load(_at(builder, address, offset, _I32), align=4)


@intrinsic
def lanes_sum(typing: Any, address: Any, one: Any) -> Any:
    """Return the total of a running sum."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = _vector(context, signature.args[1])
        part = ir.VectorType(vector.element, vector.count * PART // VECTOR)
        return _sum(builder, _load(builder, args[0], 0, part))

    return one(types.int64, one), generate


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
def lowest(typing: Any, word: Any) -> Any:
    """Return the index of the lowest set bit."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _ctz(builder, args[0])

    return types.int64(types.int64), generate


@intrinsic
def take(typing: Any, address: Any) -> Any:
    """Return a counter's value and add one to it, atomically: how threads share out tasks."""

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
    """Ask for a line of 64 bytes to be brought into the second-level cache. Any address may be given."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, _I32(0), _I32(2), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def ones(typing: Any, word: Any) -> Any:
    """Return how many bits are set."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "llvm.ctpop.i64", _I64, [args[0]])

    return types.int64(types.int64), generate
