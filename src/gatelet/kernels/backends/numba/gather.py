"""Vector microkernels over rows that a list of indices names, and how a kernel gets its arguments.

They are like those of :mod:`vector`, but the rows may lie anywhere in a table: each is named by an int64 of a list.
They prefetch the rows that come later in the list, because a processor cannot predict them.
"""

import ctypes
import dis
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic as _intrinsic

from gatelet.kernels.backends.numba import team
from gatelet.kernels.backends.numba import vector as v

VECTOR, MOST = v.VECTOR, v.MOST
PIECE = 24 if VECTOR == 64 else 12
"""Vectors of a row that are summed at once, of the 32 (AVX-512) or 16 registers there are."""
_I64 = ir.IntType(64)


def _index(builder: Any, indices: Any, e: int) -> Any:
    return builder.load(v._at(builder, indices, 8 * e, _I64), align=8)


def _rows(builder: Any, table: Any, pitch: Any, indices: Any, k: int) -> list[Any]:
    """Return the addresses of the rows that the next k indices name."""
    return [builder.add(table, builder.mul(pitch, _index(builder, indices, e))) for e in range(k)]


@v.intrinsic
def gather_dots(
    typing: Any,
    size: Any,
    indices: Any,
    later: Any,
    table: Any,
    pitch: Any,
    row: Any,
    length: Any,
    rest: Any,
    result: Any,
    one: Any,
) -> Any:
    """Write ⟨row, table[i]⟩ to ``result`` for the ``size`` indices i (at most MOST) at an address.

    Rows of the table are ``pitch`` bytes apart: ``length`` bytes of whole vectors, then ``rest`` numbers. The rows that
    the indices at ``later`` name are prefetched.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size, indices, later, table, pitch, row, length, rest, result, _ = args
        vector = v._vector(context, signature.args[9])
        lanes = 16 // vector.element_size

        def body(k: int) -> None:
            rows = _rows(builder, table, pitch, indices, k)
            ahead = _rows(builder, table, pitch, later, k)
            step = v._Loop(builder, length, VECTOR)
            chains = [step.carry(ir.Constant(vector, None)) for _ in range(k)]
            step.open()
            own = v._load(builder, builder.add(row, step.index), 0, vector)
            following = []
            for each, chain, far in zip(rows, chains, ahead, strict=True):
                v._prefetch(builder, builder.add(far, step.index))
                read = v._load(builder, builder.add(each, step.index), 0, vector)
                following.append(v._fma(builder, own, read, chain))
            step.close(following)
            own = v._masked(builder, builder.add(row, length), rest, vector)
            totals = [
                v._fma(builder, own, v._masked(builder, builder.add(each, length), rest, vector), chain)
                for each, chain in zip(rows, chains, strict=True)
            ]
            for first in range(0, k, lanes):
                part = totals[first : first + lanes]
                found = v._across(builder, part, lanes)
                for lane in range(len(part)):
                    value = builder.extract_element(found, ir.IntType(32)(lane))
                    v._store(builder, value, result, (first + lane) * vector.element_size)

        v._by_size(builder, size, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9, one), generate


@v.intrinsic
def gather_axpy(
    typing: Any,
    size: Any,
    indices: Any,
    later: Any,
    scales: Any,
    table: Any,
    pitch: Any,
    target: Any,
    length: Any,
    rest: Any,
    fresh: Any,
    one: Any,
) -> Any:
    """Add Σ_e scale[e] · table[i[e]] to the target's row; if ``fresh``, overwrite the row.

    Arguments are as in ``gather_dots``. For short lists, whose target comes from memory: it is loaded on the way.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size, indices, later, scales, table, pitch, target, length, rest, fresh, _ = args
        vector = v._vector(context, signature.args[10])
        zero = ir.Constant(vector, None)
        fresh = v._splat(builder, builder.icmp_signed("!=", fresh, _I64(0)), vector.count)
        some = builder.icmp_signed("!=", rest, _I64(0))

        def body(k: int) -> None:
            rows = _rows(builder, table, pitch, indices, k)
            ahead = _rows(builder, table, pitch, later, k)
            each = [v._load(builder, scales, e * vector.element_size, vector.element) for e in range(k)]
            each = [v._splat(builder, scale, vector.count) for scale in each]
            step = v._Loop(builder, length, VECTOR)
            step.open()
            total = v._load(builder, builder.add(target, step.index), 0, vector)
            total = builder.select(fresh, zero, total)
            for scale, place, far in zip(each, rows, ahead, strict=True):
                v._prefetch(builder, builder.add(far, step.index))
                total = v._fma(builder, scale, v._load(builder, builder.add(place, step.index), 0, vector), total)
            v._store(builder, total, builder.add(target, step.index), 0)
            step.close([])
            masked, end = builder.append_basic_block("masked"), builder.append_basic_block("end")
            builder.cbranch(some, masked, end)
            builder.position_at_end(masked)
            total = v._masked(builder, builder.add(target, length), rest, vector)
            total = builder.select(fresh, zero, total)
            for scale, place in zip(each, rows, strict=True):
                total = v._fma(builder, scale, v._masked(builder, builder.add(place, length), rest, vector), total)
            v._masked_store(builder, total, builder.add(target, length), rest)
            builder.branch(end)
            builder.position_at_end(end)

        v._by_size(builder, size, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10, one), generate


@v.intrinsic
def gather_sum(
    typing: Any,
    size: Any,
    rest: Any,
    count: Any,
    indices: Any,
    ahead: Any,
    back: Any,
    leap: Any,
    last: Any,
    scales: Any,
    table: Any,
    pitch: Any,
    start: Any,
    target: Any,
    one: Any,
) -> Any:
    """Write start + Σ_e scale[e] · table[i[e]], over ``count`` indices i, to ``target``, for a piece of the rows.

    A piece is ``size`` vectors (at most PIECE), the last of which has ``rest`` numbers. Its sums stay in registers
    while the rows are read one after the other. Meanwhile a later row is prefetched: the one named by the index
    ``ahead`` bytes later. If that is behind these indices, it is the index ``back`` bytes before it, and of its row the
    part ``leap`` bytes further on: the next piece. No index behind ``last`` is read. If ``start`` is 0, sums start at
    zero.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size, rest, count, indices, ahead, back, leap, last, scales, table, pitch, start, target, _ = args
        vector = v._vector(context, signature.args[13])

        end = builder.add(indices, builder.mul(count, _I64(8)))

        def pick(base: Any, k: int) -> list[Any]:
            whole = [v._load(builder, base, VECTOR * each, vector) for each in range(k - 1)]
            return [*whole, v._masked(builder, builder.add(base, _I64(VECTOR * (k - 1))), rest, vector)]

        def body(k: int) -> None:
            sums = _given_or_zero(builder, start, lambda: pick(start, k), [ir.Constant(vector, None)] * k)
            step = v._Loop(builder, count, 1)
            chains = [step.carry(each) for each in sums]
            step.open()
            at = builder.add(indices, builder.mul(step.index, _I64(8)))
            later = builder.add(at, ahead)
            here = builder.icmp_unsigned("<", later, end)
            later = builder.select(here, later, builder.sub(later, back))
            later = builder.select(builder.icmp_unsigned("<", later, last), later, last)
            piece = builder.select(here, table, builder.add(table, leap))
            (row,), (far,) = _rows(builder, table, pitch, at, 1), _rows(builder, piece, pitch, later, 1)
            for line in range(0, VECTOR * k, 64):
                v._prefetch(builder, builder.add(far, _I64(line)))
            place = builder.add(scales, builder.mul(step.index, _I64(vector.element_size)))
            scale = v._splat(builder, v._load(builder, place, 0, vector.element), vector.count)
            step.close([v._fma(builder, scale, own, chain) for own, chain in zip(pick(row, k), chains, strict=True)])
            for each in range(k - 1):
                v._store(builder, chains[each], target, VECTOR * each)
            final = builder.add(target, _I64(VECTOR * (k - 1)))
            with builder.if_else(builder.icmp_signed("==", rest, _I64(vector.count))) as (whole, part):
                with whole:
                    v._store(builder, chains[-1], final, 0)
                with part:
                    v._masked_store(builder, chains[-1], final, rest)

        v._by_size(builder, size, body, PIECE)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 13, one), generate


def _given_or_zero(builder: Any, address: Any, load: Callable[[], list[Any]], zeros: list[Any]) -> list[Any]:
    """Return the vectors that ``load`` emits, or zeros if the address is 0, from which nothing may be read."""
    before = builder.block
    given, begin = builder.append_basic_block("given"), builder.append_basic_block("begin")
    builder.cbranch(builder.icmp_signed("!=", address, _I64(0)), given, begin)
    builder.position_at_end(given)
    loaded = load()
    builder.branch(begin)
    builder.position_at_end(begin)
    found = []
    for own, zero in zip(loaded, zeros, strict=True):
        phi = builder.phi(own.type)
        phi.add_incoming(own, given)
        phi.add_incoming(zero, before)
        found.append(phi)
    return found


@v.intrinsic
def above(typing: Any, address: Any, shift: Any, count: Any, floor: Any, one: Any) -> Any:
    """Return a word whose bit i says that number i plus shift i is not at most ``floor``, for ``count`` ≤ 64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, shift, count, floor, _ = args
        vector = v._vector(context, signature.args[4])
        floor = v._splat(builder, floor, vector.count)

        def found(load: Any) -> Any:
            word: Any = _I64(0)
            for part in range(64 // vector.count):
                first = part * vector.count
                value = builder.fadd(load(address, first), load(shift, first))
                # An unordered comparison: NaN is above every floor, and every number is above a floor of NaN.
                flags = builder.fcmp_unordered(">", value, floor)
                flags = builder.zext(builder.bitcast(flags, ir.IntType(vector.count)), _I64)
                word = builder.or_(word, builder.shl(flags, _I64(first)))
            return word

        def masked(base: Any, first: int) -> Any:
            at = builder.add(base, _I64(first * vector.element_size))
            return v._masked(builder, at, builder.sub(count, _I64(first)), vector)

        whole, part, end = (builder.append_basic_block(f"above.{name}") for name in ("whole", "part", "end"))
        builder.cbranch(builder.icmp_signed("==", count, _I64(64)), whole, part)
        builder.position_at_end(whole)
        all_bits = found(lambda base, first: v._load(builder, base, first * vector.element_size, vector))
        builder.branch(end)
        builder.position_at_end(part)
        bits = found(masked)
        kept = builder.sub(builder.shl(_I64(1), builder.and_(count, _I64(63))), _I64(1))
        bits = builder.and_(bits, kept)
        builder.branch(end)
        builder.position_at_end(end)
        word = builder.phi(_I64)
        word.add_incoming(all_bits, whole)
        word.add_incoming(bits, part)
        return word

    return types.int64(types.int64, types.int64, types.int64, one, one), generate


# -------------------------------------------------------------------- how a kernel gets its arguments


def _arguments(typing: Any, p: Any, count: Any) -> Any:
    """Return the address of a kernel's counters and the int64 arguments behind them, ``count`` words in all."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    result = types.UniTuple(types.int64, count.literal_value)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = builder.ptrtoint(args[0], _I64)
        places = range(team.RESERVED, team.RESERVED + len(result) - 1)
        words = [address, *(builder.load(v._at(builder, address, 8 * place, _I64), align=8) for place in places)]
        return context.make_tuple(builder, result, words)

    return result(p, count), generate


arguments = _intrinsic(prefer_literal=True)(inspect.unwrap(_arguments))


def slots(kernel: Any) -> tuple[str, ...]:
    """Return the names of a kernel's arguments: those its first line unpacks from ``arguments``, after the counters."""
    unpacked = next(each.argval for each in dis.get_instructions(kernel) if each.opname == "UNPACK_SEQUENCE")
    # Python numbers local names in the order in which they are first bound. The first one is the kernel's own argument.
    return tuple(kernel.__code__.co_varnames[2 : 1 + unpacked])


NUMBERS = {64: np.float64, 32: np.float32, 16: np.uint16, 8: np.int8}
"""What kernels are compiled for, by bits: float64, float32, bfloat16 (as it is stored), int8."""


class Kernels:
    """Kernels that are compiled when they first run, for numbers of some type.

    Args:
        make: returns the functions, by name, for numbers of the type of its argument.
    """

    def __init__(self, make: Callable[[Any], dict[str, Any]]) -> None:
        self.make = inspect.unwrap(make)
        self.find = functools.cache(self._find)

    def _find(self, name: str, bits: int) -> tuple[Any, int, tuple[str, ...]]:
        function = inspect.unwrap(self.make(NUMBERS[bits](1))[name])
        built = team.compiled(function, error_model="numpy")
        return built, ctypes.cast(built.ctypes, ctypes.c_void_p).value or 0, slots(function)

    def run(self, name: str, bits: int, threads: int, /, **args: int) -> None:
        """Run a kernel with arguments by name: integers, or the addresses of tensors."""
        _, address, names = self.find(name, bits)
        if len(args) != len(names):
            raise TypeError(f"{name} takes {names}, not {tuple(args)}")
        team.run(address, [args[each] for each in names], threads)

    def prepare(self, name: str, bits: int, /, **args: int | None) -> team.Prepared:
        """Return a kernel with its arguments. Each call gives those that are None, in the order of the kernel."""
        _, address, names = self.find(name, bits)
        if len(args) != len(names):
            raise TypeError(f"{name} takes {names}, not {tuple(args)}")
        return team.Prepared(address, [args[each] for each in names])
