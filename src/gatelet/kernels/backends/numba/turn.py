"""Transposes a large matrix in memory, on all threads."""

from typing import Any

from llvmlite import ir
from numba import types
from torch import Tensor

from gatelet.kernels.backends.numba import gather, memory, team
from gatelet.kernels.backends.numba import vector as v

STRIP = 64
"""Rows of a task."""
LINE = 64
"""Bytes of a cache line."""
# Numba's cache needs these as globals of this module.
arguments, take, read, write = gather.arguments, v.take, v.read, v.write


@v.intrinsic
def square(typing: Any, source: Any, pitch: Any, target: Any, target_pitch: Any, one: Any) -> Any:
    """Copy a square whose side is a cache line, with rows and columns exchanged.

    Blocks of the square are exchanged across its diagonal: halves first, then quarters, and so on.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, pitch, target, target_pitch, _ = args
        size = v._vector(context, signature.args[4]).element_size
        count = LINE // size
        vector = ir.VectorType(context.get_value_type(signature.args[4]), count)
        rows = []
        for _ in range(count):
            rows.append(v._load(builder, source, 0, vector))
            source = builder.add(source, pitch)
        step = count // 2
        while step:
            low = [lane if not lane & step else count + lane - step for lane in range(count)]
            high = [lane + step if not lane & step else count + lane for lane in range(count)]
            masks = [ir.Constant(ir.VectorType(ir.IntType(32), count), each) for each in (low, high)]
            for i in range(count):
                if not i & step:
                    pair = rows[i], rows[i + step]
                    rows[i], rows[i + step] = (builder.shuffle_vector(*pair, mask) for mask in masks)
            step //= 2
        for row in rows:
            v._store(builder, row, target, 0)
            target = builder.add(target, target_pitch)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, one), generate


def _kernels(one: Any) -> dict[str, Any]:
    """Return the kernel, not yet compiled, for numbers of the type of ``one``."""
    size = one.itemsize
    side = LINE // size

    def turn(p: Any) -> None:
        """A task is a strip of rows, copied in squares; numbers outside of whole squares are copied one by one."""
        counter, source, target, R, C = arguments(p, 5)
        while True:
            r0 = take(counter) * STRIP
            if r0 >= R:
                break
            r1 = min(r0 + STRIP, R)
            for c0 in range(0, C, side):
                for r in range(r0, r1, side):
                    if r + side <= r1 and c0 + side <= C:
                        square(source + (r * C + c0) * size, C * size, target + (c0 * R + r) * size, R * size, one)
                        continue
                    for i in range(r, min(r + side, r1)):
                        for c in range(c0, min(c0 + side, C)):
                            write(target + (c * R + i) * size, read(source + (i * C + c) * size, one))

    return {"turn": turn}


_turn = gather.Kernels(_kernels)


def turned(matrix: Tensor, into: Tensor | None = None) -> Tensor:
    """Return a contiguous copy (C, R) of a contiguous matrix (R, C) with rows and columns exchanged."""
    rows, columns = matrix.shape
    found = memory.empty(matrix, (columns, rows)) if into is None else into
    if found.numel():
        place = {"source": matrix.data_ptr(), "target": found.data_ptr()}
        _turn.run("turn", 8 * matrix.element_size(), team.threads(matrix.numel()), **place, R=rows, C=columns)
    return found
